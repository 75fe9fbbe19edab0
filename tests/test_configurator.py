"""Settings: globals, then config files, then flags; and a mistake is one line that says what was expected."""

import importlib
import re
import subprocess
import sys

import pytest
from helpers import ROOT

import configurator
from configurator import UserError, configure

SETTINGS = {'batch_size': 12, 'lr': 1e-3, 'name': 'x', 'flag': False, 'points': [[0, 0.0]], 'prompt': []}


def namespace():
    """Return the globals of a script."""
    return {**SETTINGS, 'prompt': [], '_hidden': 1, 'CONSTANT': 2, 'function': len, '__doc__': 'A script.'}


def settings(*argv, positional=()):
    return configure(namespace(), list(argv), positional)


@pytest.fixture
def config(tmp_path):
    """A function that writes a config file -> its path."""
    def write(text):
        (tmp_path / 'c.py').write_text(text, encoding='utf-8')
        return str(tmp_path / 'c.py')
    return write


# ---------------------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize('argv, name, value', [
    (['--batch_size=3'], 'batch_size', 3), (['--batch_size', '3'], 'batch_size', 3),
    (['--batch-size=3'], 'batch_size', 3), (['--batch_size=1e3'], 'batch_size', 1000),
    (['--batch_size=-5'], 'batch_size', -5),
    (['--lr=1'], 'lr', 1.0), (['--lr', '-1'], 'lr', -1.0), (['--lr=2', '--lr=3'], 'lr', 3.0),
    (['--flag'], 'flag', True), (['--flag', '--lr=1'], 'flag', True), (['--flag', 'false'], 'flag', False),
    (['--flag=FALSE'], 'flag', False), (['--flag=1'], 'flag', True),
    (['--name=a=b'], 'name', 'a=b'), (['--name='], 'name', ''), (['--name', 'x.py'], 'name', 'x.py'),
    (['--name=3'], 'name', '3'), (['--prompt=a', '--prompt', 'b'], 'prompt', ['a', 'b'])], ids=str)
def test_flags_have_the_type_of_their_default(argv, name, value):
    got = settings(*argv)
    assert got[name] == value and type(got[name]) is type(value) and got.keys() == SETTINGS.keys()


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


def test_positional_words():
    got = settings('a', 'b', '--lr=1', 'c', positional=('name', 'prompt'))
    assert got['name'] == 'a' and got['prompt'] == ['b', 'c'] and got['lr'] == 1
    assert settings('--flag', 'word', positional=('name',))['name'] == 'word'       # a switch takes true or false


@pytest.mark.parametrize('argv, message', [
    (['--bach_size=3'], r"--bach_size=3: unknown setting 'bach_size' \(did you mean batch_size\?\)"),
    (['--zzz'], "unknown setting 'zzz'$"),
    (['--_hidden=1'], "unknown setting '_hidden'"), (['--CONSTANT=1'], "unknown setting 'CONSTANT'"),
    (['--batch_size=12.5'], '--batch_size must be of type int, got 12.5'),
    (['--batch_size='], "--batch_size must be of type int, got ''"),
    (['--batch_size=true'], 'type int'), (['--batch_size=inf'], 'type int'),
    (['--batch_size'], '--batch_size needs a value'), (['--lr', '--flag'], '--lr needs a value'),
    (['--lr=fast'], "--lr must be of type float, got 'fast'"), (['--lr=__import__("os")'], 'type float'),
    (['--flag=maybe'], "--flag must be of type bool, got 'maybe'"),
    (['word'], r'word: expected a config file \(.py\) or --name=value'), (['-h3'], 'expected a config')], ids=str)
def test_bad_flags(argv, message):
    with pytest.raises(UserError, match=message) as error:
        settings(*argv)
    assert '\n' not in str(error.value)


# --------------------------------------------------------------------------------------------- config files


def test_a_config_file_is_executed_with_the_settings_so_far(config):
    path = config('import math\nfrom math import sqrt\n_base = math.floor(5.5)\nbatch_size = _base * 8\n'
                  'lr = sqrt(16) * lr\npoints = [(0, batch_size)]\n\ndef helper():\n    pass\n')
    names = namespace()
    got = configure(names, ['--lr=0.5', '--batch_size=5', path, '--name=n'])
    assert got == {**SETTINGS, 'batch_size': 40, 'lr': 2.0, 'points': [(0, 40)], 'name': 'n'}
    # the globals of the script get them, too
    assert {name: names[name] for name in SETTINGS} == got and names['CONSTANT'] == 2


def test_flags_of_a_list_replace_what_a_file_says_and_the_default_is_not_changed_in_place(config):
    path = config('prompt.append("z")')
    names = namespace()
    default = names['prompt']
    assert configure(names, [path])['prompt'] == ['z'] and default == []
    assert settings(path, '--prompt=a', '--prompt=b')['prompt'] == ['a', 'b']


@pytest.mark.parametrize('text, message', [
    ('batchsize = 3', r"c.py: unknown setting 'batchsize' \(did you mean batch_size\?\)"),
    ('CONSTANT = 3', "c.py: unknown setting 'CONSTANT'"), ('helper = 3', "unknown setting 'helper'"),
    ('lr = "x"', "c.py: lr must be of type float, got 'x'"), ('lr = len', 'lr must be of type float'),
    ('batch_size = 12.5', 'batch_size must be of type int'), ('batch_size = True', 'must be of type int'),
    ('flag = 1', 'flag must be of type bool'), ('name = None', 'name must be of type str'),
    ('prompt = "a"', 'prompt must be of type list'), ('points = (0, 1)', 'must be of type list')], ids=str)
def test_bad_config_files(text, message, config):
    with pytest.raises(UserError, match=message):
        settings(config(text))


def test_a_mistake_in_python_keeps_its_traceback(config):
    for text, error in (('lr = (', SyntaxError), ('lr = 1 / 0', ZeroDivisionError), ('lr = x', NameError)):
        with pytest.raises(error):
            settings(config(text))


# --------------------------------------------------------------------------------------------- help and run


def test_help_lists_settings_defaults_and_comments(tmp_path, capsys):
    script = tmp_path / 's.py'
    script.write_text(f'''"""Doc."""\nalpha = 3     # the first # letter\n{' ' * 32}# and more\nbeta = "b"\n''')
    names = {'alpha': 3, 'beta': 'b', '__doc__': 'Doc.', '__file__': str(script)}
    with pytest.raises(SystemExit) as stop:
        configure(names, ['--help'], ('beta',))
    printed = capsys.readouterr().out
    assert not stop.value.code and printed.startswith('Doc.') and '[beta] [--name=value' in printed
    assert re.search(r"--alpha=3 +the first # letter\n {36}and more\n  --beta='b'", printed)


def test_run_passes_the_settings(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['script.py', '--lr=2', 'word'])
    seen = []
    configurator.run(seen.append, namespace(), positional=('name',))
    assert vars(seen[0]) == {**SETTINGS, 'lr': 2.0, 'name': 'word'}


def fails(error):
    """Return a main that raises this error."""
    def main(cfg):
        raise error
    return main


@pytest.mark.parametrize('error, argv, code, line', [
    (UserError('this will not do'), [], 2, 'this will not do\n'),
    (KeyboardInterrupt(), [], 130, 'interrupted\n'),
    (FileNotFoundError(2, 'No such file', '/a.txt'), [], 2, '/a.txt: No such file\n'),
    (None, ['--batch_size=x'], 2, "--batch_size must be of type int, got 'x'\n"),
    (None, ['no/such.py'], 2, '.*no/such.py: No such file or directory\n')], ids=repr)
@pytest.mark.parametrize('rank', ['0', '1'])
def test_a_mistake_of_the_user_is_one_line(error, argv, code, line, rank, monkeypatch, capsys):
    """Other ranks wait before they repeat it, because torchrun usually ends them first."""
    slept = []
    monkeypatch.setattr(configurator.time, 'sleep', slept.append)
    monkeypatch.setattr(sys, 'argv', ['script.py', *argv])
    monkeypatch.setenv('RANK', rank)
    with pytest.raises(SystemExit) as stop:
        configurator.run(fails(error), namespace())
    assert stop.value.code == code and re.fullmatch(line, capsys.readouterr().err)
    assert slept == ([3] if rank == '1' else [])


@pytest.mark.parametrize('error', [ValueError('a bug'), OSError('without a file')], ids=repr)
def test_a_bug_keeps_its_traceback(error, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['script.py'])
    with pytest.raises(type(error)):
        configurator.run(fails(error), namespace())


def test_a_reader_that_leaves_is_no_error():
    """As in `python sample.py | head`."""
    program = 'from configurator import run\nrun(lambda cfg: [print(i) for i in range(100_000)], {})'
    with subprocess.Popen([sys.executable, '-c', program], cwd=ROOT, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b'' and process.wait() == 141
