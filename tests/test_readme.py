"""Every command of the README runs, on a tiny model and a few kB of text. (Of two equal flags the later one counts.)"""

import json
import re
import runpy
import shlex
import sys

import pytest
from helpers import ROOT, small_corpus, tiny_model, write_worlds

import data
import model as M

TEXT = (ROOT / 'README.md').read_text(encoding='utf-8')
COMMANDS = [command for command in re.findall(r'`(python [^`]+)`', TEXT) if 'FOLDER' not in command]
OWN_DATA = ('world', 'sft_toy', 'reversal', 'talks', 'data/my')     # commands that bring their own data set
TINY = ('--n_layer=1 --n_head=2 --n_kv_head=2 --d_model=32 --d_ff=48 --seq_len=96 --batch_size=2 --max_iters=4 '
        '--eval_interval=2 --eval_windows=4 --eval_draws=1 --sample_tokens=4 --warmup_iters=1 --device=cpu').split()


@pytest.fixture(scope='module')
def desk(tmp_path_factory):
    """A folder with what the commands name: data, prompts, questions, and stand-ins for the released models."""
    folder = tmp_path_factory.mktemp('desk')
    small_corpus(folder / 'small', 60)
    (folder / 'config').symlink_to(ROOT / 'config')
    (folder / 'a.txt').write_text('the words of a file of mine\n' * 4000, encoding='utf-8')
    (folder / 'b.jsonl').write_text('{"text": "a line of mine"}\n' * 40, encoding='utf-8')
    (folder / 'prompts.txt').write_text('the\na word\n', encoding='utf-8')
    (folder / 'choices.jsonl').write_text('{"question": "Which?", "choices": ["He goes.", "He go."], "answer": 0}\n')
    (folder / 'questions.jsonl').write_text('{"prompt": "why?"}\n', encoding='utf-8')
    talks = [json.dumps({'prompt': f'question {i}', 'response': 'yes'}) for i in range(90)]
    (folder / 'talks.jsonl').write_text('\n'.join(talks))
    write_worlds(folder / 'data')

    tok = data.get_tokenizer('bytes')
    ids = {f'{role}_id': getattr(tok, f'{role}_id') for role in M.ROLES}
    for name in ('LLaDA-8B-Instruct', 'iLLaDA-8B-Instruct'):
        model = tiny_model(vocab_size=tok.vocab_size, seq_len=4096, rope_fp32=name.startswith('LLaDA'))
        M.save_model(model, folder / name, ids)
        tok.save(folder / name)
    return folder


def run(script, argv):
    before, sys.argv = sys.argv, [script, *argv]
    try:
        runpy.run_path(str(ROOT / script), run_name='__main__')
    except SystemExit as e:
        assert not e.code, (script, argv)
    finally:
        sys.argv = before


def smaller(command, script, argv):
    """The words of a command, and those that make it small."""
    own = any(name in command for name in OWN_DATA)
    small_data = [] if own else ['--dataset=./small']
    if script == 'train.py':
        return [*argv, *TINY, *small_data, *(['--max_iters=6'] if '--resume' in argv else [])]
    if script == 'data.py':
        return [*argv, '--tokenizer=bytes', '--val_every=3']                            # no network, no data/docs
    if script == 'evaluate.py':
        few = {'choice': ['--mc_num=2'], 'exact': ['--gen_length=8', '--limit=3']}
        return [*argv, *few.get(argv[0], ['--draws=1', '--windows=4', *small_data])]
    if 'experiments' in script:
        return [*argv, '--limit=3', '--samples=2', '--draws=1', '--windows=4', *small_data]
    if '8B' in command:
        return [*argv, '--gen_length=64', *(['--steps=64'] if 'sample_llada' in command else [])]
    return argv


def test_every_command(desk, monkeypatch, capsys):
    def nobody(_=''):
        raise EOFError

    monkeypatch.chdir(desk)
    monkeypatch.setattr('builtins.input', nobody)               # --chat ends at once
    commands = sorted(dict.fromkeys(COMMANDS), key=lambda c: (
        ' data.py' not in c, ' train.py' not in c, '--resume' in c, 'sft' in c or 'talks' in c))     # prepare first
    commands.insert(0, 'python train.py config/docs.py')
    seen = set()
    for command in commands:
        script, *argv = shlex.split(command)[1:]
        if script != 'tests/lab/worlds.py':                     # as written: too long; the fixture made its data
            run(script, smaller(command, script, argv))
        seen.add(script)
        capsys.readouterr()
    assert {'train.py', 'data.py', 'sample.py', 'evaluate.py', 'tests/lab/experiments.py', 'tests/lab/trace.py',
            'tests/lab/estimate.py'} <= seen and len(commands) > 20


def test_the_two_command_lines_name_what_is_there():
    lines = [line for line in TEXT.splitlines() if line.startswith('python3 -m venv')]
    assert len(lines) == 2 and all('requirements.txt' in line for line in lines)
    assert lines[0].endswith('train.py config/docs.py') and lines[1].endswith('-m pytest')


def test_what_the_tables_name_exists():
    for path in re.findall(r'`(?:config|tests)/[\w/.]+`', TEXT):
        assert (ROOT / path.strip('`')).exists(), path
    for module, name in re.findall(r'`(diffusion|model|train)\.(\w+)`', TEXT):
        assert name in (ROOT / f'{module}.py').read_text(encoding='utf-8'), name
