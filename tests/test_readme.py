"""Every command of the README runs (on a tiny model and a few kB of text, later flags winning)."""

import gzip
import json
import re
import runpy
import shlex
import sys
from importlib.util import find_spec

import pytest
from helpers import ROOT, small_corpus, tiny_model, write_worlds

import data
import model as M

TEXT = (ROOT / 'README.md').read_text(encoding='utf-8')
COMMANDS = re.findall(r'`(python [^`]+)`', TEXT)
COMMANDS += re.findall(r'^python (?!tests/)[^#\n]+', TEXT, re.M)
COMMANDS = [c for c in COMMANDS if 'FOLDER' not in c and 'pytest' not in c]
MADE_UP = ('world', 'sft_toy', 'reversal', 'talks')                                     # these bring their own data
RELEASED = ('LLaDA-8B-Instruct', 'iLLaDA-8B-Instruct')
TINY = ('--n_layer=1 --n_head=2 --n_kv_head=2 --d_model=32 --d_ff=48 --seq_len=96 --batch_size=2 --max_iters=4 '
        '--eval_interval=2 --eval_windows=4 --eval_draws=1 --sample_tokens=4 --warmup_iters=1 --device=cpu').split()


@pytest.fixture(scope='module')
def desk(tmp_path_factory):
    """A folder with a small data set, files to prepare, and the two runs that the README samples from."""
    folder = tmp_path_factory.mktemp('desk')
    small_corpus(folder / 'small', 60)
    (folder / 'a.txt').write_text('the words of a file of mine\n' * 4000, encoding='utf-8')
    (folder / 'b.jsonl').write_text('{"text": "a line of mine"}\n' * 40, encoding='utf-8')
    (folder / 'prompts.txt').write_text('the\na word\n', encoding='utf-8')
    (folder / 'questions.jsonl').write_text('{"prompt": "why?"}\n', encoding='utf-8')
    (folder / 'config').symlink_to(ROOT / 'config')
    (folder / 'choices.jsonl').write_text('{"question": "Which?", "choices": ["He goes.", "He go."], "answer": 0}\n')
    (folder / 'gsm8k.jsonl').write_text('{"question": "1 + 1?", "answer": "two #### 2"}\n')
    talks = ({'prompt': f'question {i}', 'response': 'yes'} for i in range(90))
    (folder / 'talks.jsonl').write_text(''.join(json.dumps(t) + '\n' for t in talks))
    write_worlds(folder / 'data')
    data.save_bpe(folder / 'tokenizer.json', [])
    (folder / 'web').mkdir()
    for i in range(4):
        text = json.dumps({'text': f'page {i} of the web\n' * 400}) + '\n'
        (folder / 'web' / f'{i}.jsonl.gz').write_bytes(gzip.compress(text.encode()))
    if find_spec('safetensors'):                                    # stand-ins for the released models
        tok = data.get_tokenizer(folder / 'tokenizer.json')
        ids = {f'{role}_id': getattr(tok, f'{role}_id') for role in data.ROLES}
        for name in RELEASED:
            model = tiny_model(vocab_size=tok.vocab_size, seq_len=4096, rope_fp32=name == 'LLaDA-8B-Instruct')
            M.save_release(model, {**ids, 'tokenizer': str(folder / 'tokenizer.json')}, folder / name)
    return folder


def run(script, argv):
    before, sys.argv = sys.argv, [script, *argv]
    try:
        runpy.run_path(str(ROOT / script), run_name='__main__')
    except SystemExit as e:
        assert not e.code
    finally:
        sys.argv = before


def test_every_command(desk, monkeypatch, capsys):
    def nobody(_=''):
        raise EOFError

    monkeypatch.chdir(desk)
    monkeypatch.setattr('builtins.input', nobody)
    seen = set()
    prepare_first = sorted(dict.fromkeys(COMMANDS), key=lambda c: (
        ' data.py' not in c, ' train.py' not in c, '--resume' in c, 'sft' in c))
    for command in prepare_first:
        script, *argv = shlex.split(command)[1:]
        if script == 'train.py' and '--help' not in argv:
            more = ['--out_dir=out/docs', '--max_iters=6'] if '--resume' in argv else []
            more += [] if any(name in command for name in MADE_UP) else ['--dataset=./small']
            run(script, [*argv, *TINY, *more])
        elif script == 'data.py' and argv:
            offline = ['--input=a.txt', '--tokenizer=bytes', '--val_every=3']           # no network here
            run(script, [*argv, *(offline if '--input' not in command else offline[1:])])
        elif script in ('evaluate.py', 'tests/lab/experiments.py'):
            few = ['--draws=1', '--windows=4', '--limit=3', '--mc_num=2']
            few += ['--samples=2'] if 'lab' in script else []
            few += ['--gen_length=8'] if argv[0] in ('exact', 'flood') else []
            few += ['--input=choices.jsonl'] if argv[0] == 'choice' else []
            argv = [word for word in argv if 'choice' not in argv or not word.startswith('--input')]
            run(script, [*argv, *few, *([] if any(name in command for name in MADE_UP) else ['--dataset=./small'])])
        elif argv and argv[0] in RELEASED:
            if find_spec('safetensors'):
                run(script, [*argv, '--gen_length=64', *(['--steps=64'] if 'sample_llada' in command else [])])
        elif script == 'tests/bench_sample.py':
            small = dict(rounds=1, gen_length=8, block_length=4, prompt_length=8, d_model=32, d_ff=48, n_layer=1,
                         n_head=2, vocab_size=64)
            run(script, [*argv, *(f'--{key}={value}' for key, value in small.items())])
        elif script in ('sample.py', 'train.py', 'data.py', 'tests/lab/estimate.py'):
            run(script, argv)
        else:
            assert script in ('-m', 'tests/bench_train.py', 'tests/lab/worlds.py'), command     # as written: too long
        seen.add(script)
        capsys.readouterr()
    assert {'train.py', 'data.py', 'sample.py', 'evaluate.py', 'tests/lab/experiments.py'} <= seen
    assert len(COMMANDS) > 15


def test_the_two_command_lines_name_what_is_there():
    lines = [line for line in TEXT.splitlines() if line.startswith('python3 -m venv')]
    assert len(lines) == 2 and all('requirements.txt' in line for line in lines)
    assert lines[0].endswith('train.py') and lines[1].endswith('-m pytest')
