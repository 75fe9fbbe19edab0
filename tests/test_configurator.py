"""nanoGPT's feel without its holes: nothing runs, nothing is swallowed, every mistake is one line."""

import random

import pytest

from configurator import configure


def namespace():
    return {'batch_size': 12, 'lr': 1e-3, 'name': 'x', 'flag': False, 'points': [(0, 0.0)], 'prompt': [], '_hidden': 1,
            'CONST': 2, '__doc__': 'A script.', '__file__': ''}


def run(*argv, positional=()):
    return configure(namespace(), list(argv), positional)


def test_flags_and_types():
    out = run('--batch_size=3', '--lr', '1', '--flag', '--name=a=b', '--points=[(0, 0), (10, 1e-4)]', '--prompt=[x',
              '--prompt=y')
    assert out['batch_size'] == 3 and out['lr'] == 1.0 and type(out['lr']) is float and out['flag'] is True
    assert out['name'] == 'a=b' and out['points'] == [[0, 0], [10, 1e-4]] and out['prompt'] == ['[x', 'y']
    assert '_hidden' not in out and 'CONST' not in out
    assert run('--batch_size=1e3')['batch_size'] == 1000 and run('--flag=FALSE')['flag'] is False
    assert run('--flag', 'word', positional=('name',))['name'] == 'word' and run('--flag', 'false')['flag'] is False
    assert run('--lr=-1')['lr'] == -1.0 and run('--lr', '-1')['lr'] == -1.0


def test_the_namespace_is_updated_and_later_wins(tmp_path):
    (tmp_path / 'c.py').write_text('"""doc"""\nbatch_size = 5 * 8  # comment\nlr = batch_size / 4\nname = "n"\n'
                                   'points = [(0, lr)]\n')
    names = namespace()
    out = configure(names, [str(tmp_path / 'c.py'), '--batch_size=7'])
    assert names['batch_size'] == out['batch_size'] == 7 and out['lr'] == 10.0 and out['points'] == [[0, 10.0]]


def test_the_first_flag_of_a_list_replaces_what_a_file_says(tmp_path):
    (tmp_path / 'c.py').write_text('prompt = ["of", "the file"]\n')
    assert configure(namespace(), [str(tmp_path / 'c.py')])['prompt'] == ['of', 'the file']
    flags = [str(tmp_path / 'c.py'), '--prompt=a', '--prompt=b']
    assert configure(namespace(), flags)['prompt'] == ['a', 'b']


def test_positional_words():
    out = run('a', 'b', 'c', positional=('name', 'prompt'))
    assert out['name'] == 'a' and out['prompt'] == ['b', 'c']


@pytest.mark.parametrize('argv, says', [
    (['--bach_size=3'], "no setting is called 'bach_size'; did you mean batch_size?"),
    (['--batch_size=12.5'], 'batch_size wants int'),
    (['--batch_size='], 'batch_size wants int'),
    (['--batch_size=true'], 'batch_size wants int'),
    (['--flag=maybe'], 'flag wants bool'),
    (['--lr=fast'], 'lr wants float'),
    (['word'], 'want a config file'),
    (['no/such.py'], 'No such file'),
    (['--batch_size=9**9**9'], 'batch_size wants int'),
    (['--lr=__import__("os")'], 'lr wants float'),
])
def test_bad_flags(argv, says, capsys):
    with pytest.raises(SystemExit) as e:
        run(*argv)
    captured = capsys.readouterr()
    assert e.value.code == 2 and says in captured.err and captured.out == '' and len(captured.err.splitlines()) == 1


@pytest.mark.parametrize('text, says', [
    ('batchsize = 3', 'c.py:1: no setting'),
    ('\nimport os', 'c.py:2: a config file holds only lines'),
    ('lr = print("ran")', 'only literals'),
    ('lr = 1 / 0', 'division by zero'),
    ('lr = 9 ** 9 ** 9', 'only literals'),
    ('name = "a" * 10', 'arithmetic wants numbers'),
    ('lr = unknown', "'unknown' is not a known name"),
    ('lr = (', 'c.py:1:'),
    ('batch_size, lr = 1, 2', 'a config file holds only lines'),
    ('lr = ' + '-' * 5000 + '1', 'c.py:1:'),
])
def test_bad_files(text, says, tmp_path, capsys):
    (tmp_path / 'c.py').write_text(text)
    with pytest.raises(SystemExit) as e:
        run(str(tmp_path / 'c.py'))
    captured = capsys.readouterr()
    assert e.value.code == 2 and says in captured.err and captured.out == ''


def test_all_problems_at_once(tmp_path, capsys):
    (tmp_path / 'c.py').write_text('foo = 1\nlr = "x"\n')
    with pytest.raises(SystemExit):
        run(str(tmp_path / 'c.py'), '--bar=2')
    assert len(capsys.readouterr().err.splitlines()) == 3


def test_help_lists_keys_defaults_and_comments(tmp_path, capsys):
    script = tmp_path / 's.py'
    script.write_text('"""Doc."""\nalpha = 3     # the first # letter\nbeta = "b"\n')
    with pytest.raises(SystemExit) as e:
        configure({'alpha': 3, 'beta': 'b', '__doc__': 'Doc.', '__file__': str(script)}, ['--help'])
    out = capsys.readouterr().out
    assert e.value.code == 0 and '--alpha=3' in out and 'the first # letter' in out and "--beta='b'" in out


def test_fuzz_never_a_traceback(tmp_path, capsys):
    rng = random.Random(0)
    alphabet = list('abz_-=.[](){}"\'\\ 019\n\t#*/+,:%\x00é')
    for _ in range(300):
        text = ''.join(rng.choice(alphabet) for _ in range(rng.randrange(1, 25)))
        (tmp_path / 'c.py').write_text('batch_size = ' + text)
        for argv in ([str(tmp_path / 'c.py')], ['--' + text], ['--batch_size=' + text], ['--points=' + text]):
            try:
                run(*argv)
            except SystemExit as e:
                assert e.code == 2 or 'help' in argv[0]
                assert 'Traceback' not in capsys.readouterr().err
