"""Every command of the README runs, on a tiny model and a few kB of text. (Of two equal flags the later counts.)"""

import json
import re
import shlex

import pytest
from helpers import ROOT, checkpoint, script, small_corpus, write_worlds

TEXT = (ROOT / 'README.md').read_text(encoding='utf-8')
COMMANDS = re.findall(r'`(python [^`]+)`', TEXT) + re.findall(r'^(python .+)', TEXT, re.M)
COMMANDS = [command for command in COMMANDS if 'FOLDER' not in command]
OWN_DATA = ('world', 'sft_toy', 'reversal', 'talks', 'data/my')     # commands that bring their own data set
TINY = ('--n_layer=1 --n_head=2 --n_kv_head=2 --d_model=32 --d_ff=48 --seq_len=96 --batch_size=2 --max_iters=4 '
        '--eval_interval=2 --eval_windows=4 --eval_draws=1 --sample_tokens=4 --warmup_iters=1 --device=cpu').split()


@pytest.fixture(scope='module')
def desk(tmp_path_factory):
    """A folder with what the commands name: data, prompts, questions, stand-ins for the released models."""
    folder = tmp_path_factory.mktemp('desk')
    small_corpus(folder / 'small', 60)
    write_worlds(folder / 'data')
    for name in ('config', 'tests'):
        (folder / name).symlink_to(ROOT / name)
    talks = [json.dumps({'prompt': f'question {i}', 'response': 'yes'}) for i in range(90)]
    for name, text in {
            'a.txt': 'the words of a file of mine\n' * 4000, 'b.jsonl': '{"text": "a line of mine"}\n' * 40,
            'prompts.txt': 'the\na word\n', 'questions.jsonl': '{"prompt": "why?"}\n',
            'choices.jsonl': '{"question": "Which?", "choices": ["He goes.", "He go."], "answer": 0}\n',
            'talks.jsonl': '\n'.join(talks)}.items():
        (folder / name).write_text(text)
    for name in ('LLaDA-8B-Instruct', 'iLLaDA-8B-Instruct'):
        checkpoint(folder / name, seq_len=4096, rope_fp32=name.startswith('LLaDA'))
    return folder


def smaller(command, name, argv):
    """Return the words of a command, and those that make it small."""
    small_data = [] if any(own in command for own in OWN_DATA) else ['--dataset=./small']
    if name == 'train':
        return [*argv, *TINY, *small_data, *(['--max_iters=6'] if '--resume' in argv else [])]
    if name == 'data':
        return [*argv, '--tokenizer=bytes', '--val_every=3']            # no network, no data/docs
    if name == 'evaluate':
        few = {'choice': ['--mc_num=2'], 'exact': ['--gen_length=8', '--limit=3']}
        return [*argv, *few.get(argv[0], ['--draws=1', '--windows=4', *small_data])]
    if 'estimate' in name:
        return [*argv, '--n_layer=1', '--compile=false']
    if 'experiments' in name:
        return [*argv, '--limit=3', '--samples=2', '--draws=1', '--windows=4', *small_data]
    if '8B' in command:
        return [*argv, '--gen_length=64', *(['--steps=64'] if 'sample_llada' in command else [])]
    return argv


def test_every_command(desk, monkeypatch, capsys):
    def nobody(_=''):
        raise EOFError

    monkeypatch.chdir(desk)
    monkeypatch.setattr('builtins.input', nobody)           # --chat ends at once
    # what prepares comes first, then what trains
    commands = sorted(dict.fromkeys(COMMANDS), key=lambda c: (
        ' data.py' not in c, ' train.py' not in c, '--resume' in c, 'sft' in c or 'talks' in c))
    commands.insert(0, 'python train.py config/docs.py')
    names = set()
    for command in commands:
        file, *argv = shlex.split(command)[1:]
        name = file.removesuffix('.py')
        names.add(name)
        # the fixture has made the worlds, because the real ones take too long
        if name != 'tests/lab/worlds':
            try:
                script(name, *smaller(command, name, argv))
            except SystemExit as end:
                assert not end.code, command
            capsys.readouterr()
    lab = {f'tests/lab/{name}' for name in ('worlds', 'experiments', 'trace', 'estimate')}
    assert names == {'train', 'data', 'sample', 'evaluate', *lab} and len(commands) > 20


def test_what_it_names_is_there():
    lines = [line for line in TEXT.splitlines() if line.startswith('python3 -m venv')]
    assert len(lines) == 2 and all('requirements.txt' in line for line in lines)
    assert lines[0].endswith('train.py config/docs.py') and lines[1].endswith('-m pytest')
    for path in re.findall(r'`((?:config|tests)/[\w/.]+)`', TEXT):
        assert (ROOT / path).exists(), path
    for module, name in re.findall(r'`(diffusion|model|train)\.(\w+)`', TEXT):
        assert name in (ROOT / f'{module}.py').read_text(encoding='utf-8'), name
