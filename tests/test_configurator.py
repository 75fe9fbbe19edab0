"""Settings: globals, then config files, then flags; and a mistake is one line that says what was expected."""

import importlib
import re
import subprocess
import sys

import pytest
from helpers import ROOT

import configurator
from configurator import UserError, configure


def namespace():
    return {'batch_size': 12, 'lr': 1e-3, 'name': 'x', 'flag': False, 'points': [[0, 0.0]], 'prompt': [],
            '_hidden': 1, 'CONSTANT': 2, 'function': len, '__doc__': 'A script.', '__file__': ''}


def settings(*argv, positional=()):
    return configure(namespace(), list(argv), positional)


@pytest.fixture
def config(tmp_path):
    """A function that writes a config file -> its path."""
    def write(text):
        (tmp_path / 'c.py').write_text(text, encoding='utf-8')
        return str(tmp_path / 'c.py')
    return write


# ---------------------------------------------------------------------------------------------------------- flags


def test_settings_are_the_lower_case_globals_of_simple_types():
    assert settings() == {'batch_size': 12, 'lr': 1e-3, 'name': 'x', 'flag': False, 'points': [[0, 0.0]], 'prompt': []}


@pytest.mark.parametrize('argv, name, value', [
    (['--batch_size=3'], 'batch_size', 3), (['--batch_size', '3'], 'batch_size', 3),
    (['--batch-size=3'], 'batch_size', 3), (['--batch_size=1e3'], 'batch_size', 1000),
    (['--batch_size=-5'], 'batch_size', -5),
    (['--lr=1'], 'lr', 1.0), (['--lr', '-1'], 'lr', -1.0), (['--lr=2', '--lr=3'], 'lr', 3.0),
    (['--flag'], 'flag', True), (['--flag', '--lr=1'], 'flag', True), (['--flag=FALSE'], 'flag', False),
    (['--flag', 'false'], 'flag', False), (['--flag=1'], 'flag', True),
    (['--name=a=b'], 'name', 'a=b'), (['--name='], 'name', ''), (['--name=--x'], 'name', '--x'),
    (['--name', 'x.py'], 'name', 'x.py'), (['--name=3'], 'name', '3'),
], ids=str)
def test_flags_have_the_type_of_their_default(argv, name, value):
    got = settings(*argv)[name]
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize('script, name, wrong, says', [
    ('train', 'optimizer', 'sgd', 'optimizer must be one of adamw, muon'), ('train', 'schedule', 'poly', 'wsd, cosine'),
    ('train', 'masking', 'all', 'unified, response'), ('evaluate', 'task', 'score', 'bound, exact, choice, lm_eval'),
    ('evaluate', 'method', 'elo', 'likelihood, confidence')])
def test_settings_that_are_one_of_a_few_words(script, name, wrong, says):
    with pytest.raises(UserError, match=says):
        configure(dict(vars(importlib.import_module(script))), [f'--{name}={wrong}'])


def test_initials_suggest_a_name():
    with pytest.raises(UserError, match='did you mean learning_rate'):
        configure(dict(vars(importlib.import_module('train'))), ['--lr=1e-3'])


def test_a_list_collects_its_flags():
    assert settings('--prompt=a', '--prompt', 'b')['prompt'] == ['a', 'b']


def test_positional_words():
    got = settings('a', 'b', '--lr=1', 'c', positional=('name', 'prompt'))
    assert got['name'] == 'a' and got['prompt'] == ['b', 'c'] and got['lr'] == 1
    assert settings('--flag', 'word', positional=('name',))['name'] == 'word'       # a switch takes only true or false


@pytest.mark.parametrize('argv, message', [
    (['--bach_size=3'], r"--bach_size=3: unknown setting 'bach_size' \(did you mean batch_size\?\)"),
    (['--zzz'], "unknown setting 'zzz'$"),
    (['--_hidden=1'], "unknown setting '_hidden'"), (['--CONSTANT=1'], "unknown setting 'CONSTANT'"),
    (['--batch_size=12.5'], '--batch_size must be of type int, got 12.5'),
    (['--batch_size='], "--batch_size must be of type int, got ''"), (['--batch_size'], '--batch_size needs a value'),
    (['--batch_size=true'], 'type int'), (['--batch_size=inf'], 'type int'),
    (['--lr=fast'], "--lr must be of type float, got 'fast'"), (['--lr', '--flag'], '--lr needs a value'),
    (['--flag=maybe'], "--flag must be of type bool, got 'maybe'"),
    (['--lr=__import__("os")'], 'type float'), (['--batch_size=9**9'], 'type int'),
    (['word'], r'word: expected a config file \(.py\) or --name=value'), (['-h3'], 'expected a config file'),
], ids=str)
def test_bad_flags(argv, message):
    with pytest.raises(UserError, match=message) as error:
        settings(*argv)
    assert '\n' not in str(error.value)


# --------------------------------------------------------------------------------------------------- config files


def test_a_config_file_is_executed_with_the_settings_so_far(config):
    path = config('"""doc"""\nimport math\nfrom math import sqrt\n_base = math.floor(5.5)\nbatch_size = _base * 8\n'
                  'lr = sqrt(16) * lr\npoints = [(0, batch_size)]\n\ndef helper():\n    pass\n')
    got = settings('--lr=0.5', path, '--name=n')
    assert got == {**settings(), 'batch_size': 40, 'lr': 2.0, 'points': [(0, 40)], 'name': 'n'}


def test_the_namespace_is_updated_and_the_last_one_wins(config):
    names = namespace()
    got = configure(names, ['--batch_size=5', config('batch_size = 6\nlr = 7'), '--lr=8'])
    assert (names['batch_size'], names['lr']) == (got['batch_size'], got['lr']) == (6, 8.0)
    assert names['CONSTANT'] == 2


def test_flags_of_a_list_replace_what_a_file_says(config):
    path = config('prompt = ["of", "the file"]')
    assert settings(path)['prompt'] == ['of', 'the file']
    assert settings(path, '--prompt=a', '--prompt=b')['prompt'] == ['a', 'b']


def test_defaults_are_not_changed_in_place(config):
    names = namespace()
    default = names['prompt']
    assert configure(names, [config('prompt.append("z")')])['prompt'] == ['z']
    assert default == []


@pytest.mark.parametrize('text, message', [
    ('batchsize = 3', r"c.py: unknown setting 'batchsize' \(did you mean batch_size\?\)"),
    ('CONSTANT = 3', "c.py: unknown setting 'CONSTANT'"), ('helper = 3', "unknown setting 'helper'"),
    ('lr = "x"', "c.py: lr must be of type float, got 'x'"), ('batch_size = 12.5', 'batch_size must be of type int'),
    ('batch_size = True', 'batch_size must be of type int'), ('flag = 1', 'flag must be of type bool'),
    ('name = 3', 'name must be of type str'), ('prompt = "a"', 'prompt must be of type list'),
], ids=str)
def test_bad_config_files(text, message, config):
    with pytest.raises(UserError, match=message):
        settings(config(text))


@pytest.mark.parametrize('text', ['points = (0, 1)', 'name = None', 'lr = len'])
def test_a_setting_of_another_type_is_not_ignored(text, config):
    with pytest.raises(UserError, match='must be of type'):
        settings(config(text))


def test_a_mistake_in_python_keeps_its_traceback(config):
    for text, kind in (('lr = (', SyntaxError), ('lr = 1 / 0', ZeroDivisionError), ('lr = unknown', NameError)):
        with pytest.raises(kind):
            settings(config(text))


# ----------------------------------------------------------------------------------------------------- help and run


def test_help_lists_settings_defaults_and_comments(tmp_path, capsys):
    script = tmp_path / 's.py'
    script.write_text('"""Doc."""\nalpha = 3     # the first # letter\nbeta = "b"\n')
    for flag in ('--help',):
        with pytest.raises(SystemExit) as stop:
            configure({'alpha': 3, 'beta': 'b', '__doc__': 'Doc.', '__file__': str(script)}, [flag], ('beta',))
        printed = capsys.readouterr().out
        assert not stop.value.code and printed.startswith('Doc.') and '[beta] [--name=value' in printed
        assert re.search(r"--alpha=3 +the first # letter\n  --beta='b'", printed)


def exit_of(main, monkeypatch, capsys, argv=()):
    """Return exit code and stderr of a script with this main."""
    monkeypatch.setattr(sys, 'argv', ['script.py', *argv])
    with pytest.raises(SystemExit) as stop:
        configurator.run(main, namespace())
    return stop.value.code, capsys.readouterr().err


def test_run_passes_the_settings(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['script.py', '--lr=2', 'word'])
    seen = []
    configurator.run(seen.append, namespace(), positional=('name',))
    assert seen[0].lr == 2.0 and seen[0].name == 'word'


def test_a_mistake_of_the_user_is_one_line_and_exit_code_2(monkeypatch, capsys):
    def wrong(cfg):
        raise UserError('this will not do')

    assert exit_of(wrong, monkeypatch, capsys) == (2, 'this will not do\n')
    code, err = exit_of(wrong, monkeypatch, capsys, ['--batch_size=x'])
    assert code == 2 and err == "--batch_size must be of type int, got 'x'\n"
    code, err = exit_of(wrong, monkeypatch, capsys, ['no/such.py'])
    assert code == 2 and re.fullmatch(r'.*no/such.py: No such file or directory\n', err)
    code, err = exit_of(lambda cfg: open('/no/file'), monkeypatch, capsys)
    assert code == 2 and err == '/no/file: No such file or directory\n'


def test_an_interrupt_is_one_line(monkeypatch, capsys):
    def interrupted(cfg):
        raise KeyboardInterrupt

    assert exit_of(interrupted, monkeypatch, capsys) == (130, 'interrupted\n')


@pytest.mark.parametrize('error', [ValueError('a bug'), OSError('without a file')], ids=repr)
def test_a_bug_keeps_its_traceback(error, monkeypatch):
    def buggy(cfg):
        raise error

    monkeypatch.setattr(sys, 'argv', ['script.py'])
    with pytest.raises(type(error)):
        configurator.run(buggy, namespace())


def test_other_ranks_wait_before_they_repeat_the_line(monkeypatch, capsys):
    slept = []
    monkeypatch.setattr(configurator.time, 'sleep', slept.append)
    monkeypatch.setenv('RANK', '1')
    code, _ = exit_of(lambda cfg: open('/no/file'), monkeypatch, capsys)
    assert code == 2 and slept == [3]


def test_a_reader_that_leaves_is_no_error():
    """As in `python sample.py | head`."""
    program = 'from configurator import run\nrun(lambda cfg: [print(i) for i in range(100_000)], {})'
    with subprocess.Popen([sys.executable, '-c', program], cwd=ROOT, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b'' and process.wait() == 141
