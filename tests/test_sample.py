"""sample.py as a user meets it: prompts, gaps, batches, chat, and mistakes in one line."""

import json
import re

import pytest
import torch
from helpers import checkpoint, refused, script, settings_of

import data
import diffusion
import sample
from diffusion import SamplingParams

RULE = '-' * 80 + '\n'
TOK = data.get_tokenizer('bytes')


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A model of texts, context 96."""
    return checkpoint(tmp_path_factory.mktemp('run'), 'unified')


@pytest.fixture(scope='module')
def causal(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp('causal'), 'unified', causal=True)


def settings(**changes):
    """Return the defaults in float32, because in bfloat16 a batch differs from single rows in the last bits."""
    return settings_of(sample, **{'dtype': 'float32', **changes})


def load(folder):
    return sample.load(folder, settings())


def texts(capsys, *argv):
    """Run the script -> what it prints, one text for each prompt."""
    script('sample', *argv)
    return capsys.readouterr().out.split(RULE)[1:]


# ------------------------------------------------------------------------------------------ ids in, ids out


@pytest.mark.parametrize('kind, gen_length, params, options', [
    ('run', 16, SamplingParams(temperature=1.0, remasking='random'), {}),
    ('run', 16, SamplingParams(steps=8, block_length=4, temperature=0.7, cfg_scale=0.5), {}),
    ('run', 16, SamplingParams(block_length=4, temperature=1.0), {'variable_length': True}),
    ('run', 0, SamplingParams(temperature=1.0, remasking='random'), {}),
    ('causal', 16, SamplingParams(temperature=1.0), {})], ids=['random', 'blocks', 'variable', 'gaps', 'causal'])
def test_a_batch_writes_the_same_as_single_prompts(kind, gen_length, params, options, request):
    r = load(request.getfixturevalue(kind))
    some = ('a long prompt', 'b', 'some text', 'c') if gen_length else ('ab ___ d', 'x___y ___z', '___', 'a ___')
    prompts = [sample.encode_prompt(text, r, settings()) for text in some]

    def write(prompts, seeds):
        return sample.generate_text(
            r.model, prompts, gen_length, r.tok, params, seeds=seeds, batch_size=3, **options)[0]

    seeds = [(7, k) for k in range(4)]
    rows = write(prompts, seeds)
    for ids, row, seed in zip(prompts, rows, seeds):
        assert write([ids], [seed]) == [row] and r.tok.mask_id not in row
        # what is given stays, and stands before what is new
        assert all(i in (j, r.tok.mask_id) for i, j in zip(ids, row)) and len(row) >= len(ids)
    assert len({tuple(row[-8:]) for row in rows}) == 4


def test_ids_that_are_no_token_are_never_written(run):
    r = load(run)
    unused = r.tok.unused(r.model.config.vocab_size)
    assert len(unused) == 3
    params = SamplingParams(temperature=50.0, remasking='random')
    rows, _ = sample.generate_text(r.model, [[]] * 20, 40, r.tok, params, seeds=[(k,) for k in range(20)])
    written = {i for row in rows for i in row}
    assert len(written) > 200 and not written & {r.tok.mask_id, *unused}


def test_variable_length_ends_with_a_stop_text(run):
    r = load(run)
    params = SamplingParams(block_length=4, temperature=1.0)
    options = dict(seeds=[(3,)], variable_length=True)
    (free,), _ = sample.generate_text(r.model, [[65]], 32, r.tok, params, **options)
    assert len(free) == 33
    mark = r.tok.decode(free[6:8])                          # in the second block
    (row,), n_forward = sample.generate_text(r.model, [[65]], 32, r.tok, params, stop=[mark], **options)
    assert row == free[:9] and n_forward == 8


def test_a_causal_model_begins_after_eos(causal):
    r = load(causal)
    (row,), n_forward = sample.generate_text(r.model, [[65, 66]], 3, r.tok, SamplingParams(), seeds=[(0,)])
    ids = [r.tok.eos_id, 65, 66]
    for _ in range(3):
        logits = r.model(torch.tensor([ids]))[0, -1]
        logits[[r.tok.mask_id, *r.tok.unused(len(logits))]] = -torch.inf
        ids.append(int(logits.argmax()))
    assert row == ids[1:] and n_forward == 3


def test_the_text_of_an_answer_ends_with_eos_eot_or_the_first_stop_text():
    ids = TOK.encode('one two three')
    assert sample.answer_text(ids, TOK) == 'one two three'
    for end in (TOK.eos_id, TOK.eot_id):
        assert sample.answer_text([*ids[:3], end, *ids], TOK) == 'one'
    assert sample.answer_text(ids, TOK, [' three', ' two']) == 'one'


# -------------------------------------------------------------------------------------------------- prompts


def test_samples_continuations_and_gaps(run, capsys):
    argv = [run, '--gen_length=16', '--num_samples=2']
    assert len(texts(capsys, *argv)) == 2
    script('sample', *argv)
    assert re.search(r'16 forward passes in .* s', capsys.readouterr().err)

    gaps = '--prompt=the model ______ text', '--prompt=a ___ b'
    first, second = texts(capsys, run, *gaps, '--block_length=32')          # gaps know no blocks
    assert first.startswith('the model') and first.endswith(' text\n') and second[0] == 'a'
    argv = [run, '--prompt=the', '--gen_length=8', '--block_length=4', '--steps=4', '--temperature=0.5']
    assert texts(capsys, *argv) == texts(capsys, *argv)                     # the seed decides
    assert texts(capsys, *argv) != texts(capsys, *argv, '--seed=2')


def test_how_prompts_become_ids(run, tmp_path, capsys):
    r = load(run)
    masks = [TOK.mask_id] * 2
    messages = [{'role': 'user', 'content': 'a ___'}]
    for prompt, instruct, ids in (
            ('ab', False, list(b'ab')), ('a ___ b ____.', False, [*b'a', *masks, *b' b', *masks, *b'.']),
            ([], False, []), ([5, 6], False, [5, 6]),
            (messages, False, TOK.encode_chat(messages)), ('a ___', True, TOK.encode_chat(messages))):
        assert sample.encode_prompt(prompt, r, settings(gap_length=2, instruct=instruct)) == ids

    # a model that was trained on examples begins with BOS, which is not shown
    folder = checkpoint(tmp_path, 'response')
    r = load(folder)
    assert r.start == [TOK.bos_id] and sample.encode_prompt('a', r, settings()) == [TOK.bos_id, 97]
    assert texts(capsys, folder, '--prompt=abc', '--gen_length=4')[0].startswith('abc')


def test_prompts_from_files(run, tmp_path, capsys):
    (tmp_path / 'p.txt').write_text('the model\n\na token\r\n', encoding='utf-8')
    (tmp_path / 'p.jsonl').write_text(
        '{"prompt": "the model"}\n{"ids": [97, 32, 116]}\n{"messages": [{"role": "user", "content": "a"}]}\n')
    lines = {}
    for name in ('p.txt', 'p.jsonl'):
        out = tmp_path / f'{name}.out'
        argv = [run, f'--prompt-file={tmp_path / name}', '--gen_length=8', '--batch_size=1', f'--out={out}']
        shown = texts(capsys, *argv)
        lines[name] = [json.loads(line) for line in out.read_text(encoding='utf-8').splitlines()]
        assert [line['text'] + '\n' for line in lines[name][:2]] == shown[:2]
        assert 'File exists' in refused(capsys, 'sample', *argv)

    of_text, of_rows = lines.values()
    assert [line['prompt'] for line in of_text] == ['the model', 'a token']
    assert all(len(line['ids']) == len(line['prompt']) + 8 for line in of_text)
    assert of_text[0]['settings']['gen_length'] == 8
    assert of_rows[0]['ids'] == of_text[0]['ids'] and len(of_rows) == 3
    assert of_rows[1]['ids'][:3] == [97, 32, 116]


@pytest.mark.parametrize('content, message', [
    ('{"prompt": "a"}\n{"prompt": 5}\n', 'p.jsonl:2: '), ('{"a": 1}', 'p.jsonl:1: '), ('{', 'p.jsonl:1: '),
    ('{"ids": [1, 99999]}', 'ids must lie in 0..')])
def test_bad_prompt_files(run, tmp_path, capsys, content, message):
    (tmp_path / 'p.jsonl').write_text(content)
    assert message in refused(capsys, 'sample', run, f'--prompt_file={tmp_path / "p.jsonl"}')


@pytest.mark.parametrize('argv, message', [
    (['--prompt='], 'the prompt is empty'),
    (['--prompt=' + 'x' * 96], 'the context holds 96 tokens, but the longest prompt has 96, and 1 are'),
    (['--prompt=a', '--gen_length=96'], 'shorten the prompt or gen_length'),
    (['--gen_length=8', '--block_length=3'], 'block_length must divide the 8 tokens'),
    (['--gen_length=8', '--block_length=4', '--steps=1'], 'steps must be at least the number of blocks'),
    (['--variable_length'], 'variable_length fills no ___ and needs a block_length in 1..64, got 0'),
    (['--remasking=best'], 'remasking must be'), (['--temperature=-2'], 'temperature must'),
    (['--checkpoint=no/such'], 'no checkpoint here'),
    (['--gen_lenght=8'], 'did you mean gen_length'), (['--prompt_file=none.txt'], 'none.txt')])
def test_mistakes_get_one_line(run, capsys, argv, message):
    assert message in refused(capsys, 'sample', run, *argv)


def test_an_autoregressive_model_cannot_fill_gaps(causal, capsys):
    assert 'cannot fill a ___' in refused(capsys, 'sample', causal, '--prompt=a ___ b')
    assert texts(capsys, causal, '--prompt=a', '--gen_length=4')[0][0] == 'a'


def test_gaps_and_continuations_need_a_run_each(run, capsys):
    assert 'a run each' in refused(capsys, 'sample', run, '--prompt=a ___ b', '--prompt=a')


# -------------------------------------------------------------------------------------------------- sampler


def test_answers_seek_the_mode_and_samples_are_drawn(run, tmp_path, monkeypatch, capsys):
    released = checkpoint(tmp_path / 'released')
    examples = checkpoint(tmp_path / 'examples', 'response')
    real = diffusion.generate
    seen = []

    def noted(model, x, mask_id, params, **options):
        seen.append((params.remasking, params.temperature))
        return real(model, x, mask_id, params, **options)

    monkeypatch.setattr(diffusion, 'generate', noted)
    for folder, flags, expected in (
            (run, '', ('random', 1.0)), (run, '--instruct', ('low_confidence', 0.0)),
            (released, '', ('low_confidence', 0.0)), (examples, '', ('low_confidence', 0.0)),
            (run, '--temperature=0.5', ('random', 0.5)), (run, '--temperature=0', ('random', 0.0)),
            (run, '--remasking=low_confidence', ('low_confidence', 0.0)),
            (run, '--instruct --remasking=random', ('random', 1.0))):
        script('sample', folder, '--prompt=a', '--gen_length=4', *flags.split())
        assert seen.pop() == expected


def test_settings_become_sampling_params():
    for changes in (
            {}, dict(steps=8, block_length=4, threshold=0.5, cache='dual'),
            dict(remasking='random', temperature=1.0),
            dict(cfg_scale=0.5, logits_eos_inf=True, confidence_eos_eot_inf=True)):
        assert sample.sampling_params(settings(**changes), 8) == SamplingParams(**changes)


@pytest.mark.parametrize('flags', [
    '--block_length=4 --variable_length --steps=2 --instruct --stop=a', '--cache=dual --block_length=4',
    '--logits_eos_inf --cfg_scale=0.5', '--show --block_length=8 --variable_length'])
def test_flags_of_the_sampler_work_together(run, capsys, flags):
    script('sample', run, '--prompt=a', '--prompt=tok', *flags.split(), '--gen_length=8')
    assert 'forward passes' in capsys.readouterr().err


def test_compiled_blocks_write_the_same_tokens(run, monkeypatch, capsys):
    """By the tracer alone: its graphs run eagerly, which needs no C++ compiler and no half a minute."""
    calls = []
    real = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, 'compile', lambda self: calls.append(real(self, backend='eager')))
    argv = [run, '--prompt=the', '--prompt=a model', '--gen_length=8', '--block_length=4', '--cache=dual']
    assert texts(capsys, *argv) == texts(capsys, *argv, '--compile') and len(calls) == 2


# --------------------------------------------------------------------------------------------------- screen


@pytest.mark.parametrize('terminal', [False, True])
def test_the_canvas_is_drawn(run, capsys, monkeypatch, terminal):
    monkeypatch.setattr('sys.stdout.isatty', lambda: terminal, raising=False)
    monkeypatch.setattr('time.sleep', lambda seconds: None)
    script('sample', run, '--prompt=abc', '--gen_length=16', '--show', '--block_length=8')
    frames = capsys.readouterr().out.split(RULE)[0]
    if terminal:
        assert frames.count('\x1b[H\x1b[J') == 16 and frames.count('\x1b[1;32m') == 16
        return
    lines = frames.splitlines()
    assert '\x1b[' not in frames and [line[:4] for line in lines[:2]] == ['   1', '   2'] and len(lines) == 16
    assert all(line[4:].startswith(' | abc') for line in lines)
    assert lines[0].count('░') == 15 and '░' not in lines[-1]


def test_characters_of_several_tokens_are_drawn_whole(capsys):
    x = torch.tensor([[*TOK.encode('é\n👍'), TOK.mask_id, *TOK.encode('b')]])
    sample.screen(TOK)(x, torch.zeros_like(x, dtype=torch.bool))
    assert capsys.readouterr().out == '   1 | é⏎👍░b\n'


# ----------------------------------------------------------------------------------------------------- chat


@pytest.fixture
def chat(monkeypatch, capsys):
    """A function: play a user who types these lines -> the canvases that are filled, as text, and stderr."""
    real = diffusion.generate

    def play(folder, lines, interrupt=None):
        typed = iter([*lines, EOFError()])                  # the end is Ctrl-D
        canvases = []

        def read(_=''):
            line = next(typed)
            if isinstance(line, BaseException):
                raise line
            return line

        def noted(model, x, *args, **options):
            canvases.append(TOK.decode(x[0].tolist()))
            if len(canvases) - 1 == interrupt:
                raise KeyboardInterrupt
            return real(model, x, *args, **options)

        monkeypatch.setattr('builtins.input', read)
        monkeypatch.setattr(diffusion, 'generate', noted)
        script('sample', folder, '--chat', '--gen_length=8', '--temperature=1')
        return canvases, capsys.readouterr().err

    return play


def test_a_chat(run, chat):
    lines = ['hi', '', 'more', 'interrupted', '/reset', 'anew', '/quit', 'never read']
    seen, err = chat(run, lines, interrupt=2)
    assert len(seen) == 4
    assert seen[0].startswith('<|startoftext|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>')
    assert 'hi<|eot_id|><|start_header_id|>assistant' in seen[1] and 'more' in seen[1]
    assert 'interrupted' in seen[2] and '(interrupted)' in err
    assert 'anew' in seen[3] and 'hi' not in seen[3].replace('<|', '')


def test_a_chat_drops_the_oldest_turns(tmp_path, chat):
    folder = checkpoint(tmp_path, seq_len=40)               # room for one turn
    seen, err = chat(folder, ['first', 'second', 'x' * 50, 'third', KeyboardInterrupt()])
    assert len(seen) == 3 and 'first' not in seen[1] and 'the oldest turn is dropped' in err
    assert 'the context holds 40 tokens' in err and 'x' * 50 not in seen[2]


def test_an_answer_is_printed(run, capsys, monkeypatch):
    monkeypatch.setattr(diffusion, 'generate', lambda model, x, mask_id, params, **_: (
        torch.where(x == mask_id, 65, x), 4))
    assert texts(capsys, run, '--prompt=hi', '--instruct', '--gen_length=4') == ['AAAA\n']


def test_several_samples_of_a_prompt(run, capsys):
    argv = ['--prompt=the', '--gen_length=8', '--temperature=1', '--remasking=random']
    once, = texts(capsys, run, *argv)
    three = texts(capsys, run, *argv, '--num_samples=3')
    assert three[0] == once and len(set(three)) == 3 and all(text.startswith('the') for text in three)
    assert len(texts(capsys, run, '--gen_length=4')) == 3


def test_an_autoregressive_model_says_what_it_ignores(causal, capsys):
    script('sample', causal, '--prompt=a', '--gen_length=2')
    assert 'only the temperature counts' in capsys.readouterr().err
