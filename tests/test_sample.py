"""sample.py as a user meets it: prompts, gaps, batches, chat, and mistakes in one line."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from helpers import script, tiny_model

import data
import diffusion
import model as models
import sample
from configurator import UserError, configure
from diffusion import SamplingParams

RULE = '-' * 80 + '\n'


def checkpoint(folder, masking=None, **changes):
    """Save a small random model with the tokenizer of bytes -> folder. masking: pretend that train.py made it so."""
    tok = data.get_tokenizer('bytes')
    model = tiny_model(vocab_size=tok.vocab_size + 3, **{'seq_len': 96, **changes})
    ids = {f'{role}_id': getattr(tok, f'{role}_id') for role in models.ROLES}
    models.save_model(model, folder, ids)
    tok.save(folder)
    if masking:
        state = {'iteration': 2, 'settings': {'masking': masking, 'dataset': 'none'}}
        (folder / 'state.json').write_text(json.dumps(state))
    return folder


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A model of texts, context 96."""
    return checkpoint(tmp_path_factory.mktemp('run'), 'unified')


@pytest.fixture(scope='module')
def causal(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp('causal'), 'unified', causal=True)


def settings(**changes):
    """The defaults in float32, because in bfloat16 a batch differs from single prompts in the last bits."""
    return SimpleNamespace(**{**configure(dict(vars(sample)), []), 'dtype': 'float32', **changes})


def texts(capsys, *argv):
    """What a call prints, one text for each prompt."""
    script('sample', *argv)
    return capsys.readouterr().out.split(RULE)[1:]


def refused(capsys, *argv):
    """The one line that a call ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        script('sample', *argv)
    captured = capsys.readouterr()
    assert stopped.value.code == 2 and captured.out == '' and len(captured.err.splitlines()) == 1
    return captured.err


# ------------------------------------------------------------------------------------------------- ids in, ids out


@pytest.mark.parametrize('kind, params, options', [
    ('diffusion', SamplingParams(temperature=1.0, remasking='random'), {}),
    ('diffusion', SamplingParams(steps=8, block_length=4, temperature=0.7, cfg_scale=0.5), {}),
    ('diffusion', SamplingParams(block_length=4, temperature=1.0), {'variable_length': True}),
    ('causal', SamplingParams(temperature=1.0), {})])
def test_a_batch_writes_the_same_as_single_prompts(run, causal, kind, params, options):
    r = sample.load(run if kind == 'diffusion' else causal, settings())
    prompts = [r.tok.encode(text) for text in ('a long prompt', 'b', 'some text', '')]
    seeds = [(7, k) for k in range(4)]
    rows, _ = sample.generate_text(
        r.model, prompts, 16, r.tok, params, seeds=seeds, batch_size=3, **options)
    for ids, row, seed in zip(prompts, rows, seeds):
        single, _ = sample.generate_text(r.model, [ids], 16, r.tok, params, seeds=[seed], **options)
        assert single == [row] and row[:len(ids)] == ids and r.tok.mask_id not in row
    assert len({tuple(row[-8:]) for row in rows}) == 4


def test_a_batch_of_gaps(run):
    r = sample.load(run, settings())
    prompts = [sample.encode_prompt('ab ___ d', r, settings(gap_length=2)),
               sample.encode_prompt('x___y ___z', r, settings(gap_length=5))]
    params = SamplingParams(temperature=1.0, remasking='random')
    rows, n_forward = sample.generate_text(r.model, prompts, 0, r.tok, params, seeds=[(1,), (2,)])
    assert n_forward == 10
    for ids, row, seed in zip(prompts, rows, [(1,), (2,)]):
        assert [b for a, b in zip(ids, row) if a != r.tok.mask_id] == [a for a in ids if a != r.tok.mask_id]
        assert r.tok.mask_id not in row and len(row) == len(ids)
        assert sample.generate_text(r.model, [ids], 0, r.tok, params, seeds=[seed])[0] == [row]


def test_ids_that_are_no_token_are_never_written(run):
    r = sample.load(run, settings())
    unused = r.tok.unused(r.model.config.vocab_size)
    assert len(unused) == 3
    params = SamplingParams(temperature=50.0, remasking='random')
    rows, _ = sample.generate_text(r.model, [[]] * 20, 40, r.tok, params, seeds=[(k,) for k in range(20)])
    written = {i for row in rows for i in row}
    assert len(written) > 200 and not written & {r.tok.mask_id, *unused}


def test_variable_length_ends_with_a_stop_text(run):
    r = sample.load(run, settings())
    params = SamplingParams(block_length=4, temperature=1.0)
    options = dict(seeds=[(3,)], variable_length=True)
    (free,), _ = sample.generate_text(r.model, [[65]], 32, r.tok, params, **options)
    assert len(free) == 33
    mark = r.tok.decode(free[6:8])                              # in the second block
    (row,), n_forward = sample.generate_text(r.model, [[65]], 32, r.tok, params, stop=[mark], **options)
    assert row == free[:9] and n_forward == 8


def test_a_causal_model_begins_after_eos(causal):
    r = sample.load(causal, settings())
    (row,), n_forward = sample.generate_text(r.model, [[65, 66]], 3, r.tok, SamplingParams(), seeds=[(0,)])
    ids = [r.tok.eos_id, 65, 66]
    for _ in range(3):
        logits = r.model(torch.tensor([ids]))[0, -1]
        logits[[r.tok.mask_id, *r.tok.unused(len(logits))]] = -torch.inf
        ids.append(int(logits.argmax()))
    assert row == ids[1:] and n_forward == 3


def test_the_text_of_an_answer():
    tok = data.get_tokenizer('bytes')
    ids = tok.encode('one two three')
    assert sample.answer_text(ids, tok) == 'one two three'
    assert sample.answer_text([*ids[:3], tok.eos_id, *ids], tok) == 'one'
    assert sample.answer_text([*ids[:3], tok.eot_id, *ids], tok) == 'one'
    assert sample.answer_text(ids, tok, [' three', ' two']) == 'one'


# ---------------------------------------------------------------------------------------------------------- prompts


def test_samples_continuations_and_gaps(run, capsys):
    argv = [run, '--gen_length=16', '--num_samples=2']
    assert len(texts(capsys, *argv)) == 2
    script('sample', *argv)
    captured = capsys.readouterr()
    assert '32 tokens in' in captured.err and '16 forward passes' in captured.err

    first, second = texts(capsys, run, '--prompt=the model ______ text', '--prompt=a ___ b', '--gap_length=4')
    assert first.startswith('the model') and first.endswith(' text\n') and second[0] == 'a'
    argv = [run, '--prompt=the', '--gen_length=8', '--block_length=4', '--steps=4', '--temperature=0.5']
    assert texts(capsys, *argv) == texts(capsys, *argv)                     # the seed decides
    assert texts(capsys, *argv) != texts(capsys, *argv, '--seed=2')


def test_how_prompts_become_ids(run):
    r = sample.load(run, settings())
    tok = r.tok
    masks = [tok.mask_id] * 2
    cfg = settings(gap_length=2)
    assert sample.encode_prompt('ab', r, cfg) == tok.encode('ab')
    assert sample.encode_prompt('a ___ b ____.', r, cfg) == [*b'a', *masks, *b' b', *masks, *b'.']
    assert sample.encode_prompt([], r, cfg) == [] and sample.encode_prompt([5, 6], r, cfg) == [5, 6]
    messages = [{'role': 'user', 'content': 'a ___'}]
    for prompt, instruct in ((messages, False), ('a ___', True)):
        assert sample.encode_prompt(prompt, r, settings(instruct=instruct)) == tok.encode_chat(messages)


def test_examples_begin_with_bos(tmp_path, capsys):
    folder = checkpoint(tmp_path, 'response')
    r = sample.load(folder, settings())
    assert r.start == [r.tok.bos_id] and sample.encode_prompt('a', r, settings()) == [r.tok.bos_id, 97]
    assert texts(capsys, folder, '--prompt=abc', '--gen_length=4')[0].startswith('abc')     # it is not shown


def test_prompts_from_files(run, tmp_path, capsys):
    out = tmp_path / 'a.jsonl'
    (tmp_path / 'p.txt').write_text('the model\n\na token\r\n', encoding='utf-8')
    (tmp_path / 'p.jsonl').write_text(
        '{"prompt": "the model"}\n{"ids": [97, 32, 116]}\n{"messages": [{"role": "user", "content": "a"}]}\n')
    shown = texts(capsys, run, f'--prompt-file={tmp_path / "p.txt"}', '--gen_length=8', f'--out={out}')
    lines = [json.loads(line) for line in out.read_text(encoding='utf-8').splitlines()]
    assert [line['prompt'] for line in lines] == ['the model', 'a token']
    assert [line['text'] + '\n' for line in lines] == shown
    assert all(len(line['ids']) == len(line['prompt']) + 8 for line in lines)
    assert lines[0]['settings']['gen_length'] == 8

    again = tmp_path / 'b.jsonl'
    texts(capsys, run, f'--prompt_file={tmp_path / "p.jsonl"}', '--gen_length=8', '--batch_size=1', f'--out={again}')
    others = [json.loads(line) for line in again.read_text(encoding='utf-8').splitlines()]
    assert others[0]['ids'] == lines[0]['ids'] and others[1]['ids'][:3] == [97, 32, 116] and len(others) == 3
    assert 'File exists' in refused(capsys, run, '--prompt=a', f'--out={out}')


@pytest.mark.parametrize('content, message', [
    ('{"prompt": "a"}\n{"prompt": 5}\n', 'p.jsonl:2: '), ('{"a": 1}', 'p.jsonl:1: '), ('{', 'p.jsonl:1: '),
    ('{"ids": [1, 99999]}', 'ids must lie in 0..')])
def test_bad_prompt_files(run, tmp_path, capsys, content, message):
    (tmp_path / 'p.jsonl').write_text(content)
    assert message in refused(capsys, run, f'--prompt_file={tmp_path / "p.jsonl"}')


@pytest.mark.parametrize('argv, message', [
    (['--prompt='], 'the prompt is empty'),
    (['--prompt=' + 'x' * 96], 'the context holds 96 tokens, but the longest prompt has 96, and 1 are'),
    (['--prompt=a', '--gen_length=96'], 'shorten the prompt or gen_length'),
    (['--gen_length=8', '--block_length=3'], 'block_length must divide the 8 tokens'),
    (['--gen_length=8', '--block_length=4', '--steps=1'], 'steps must be at least the number of blocks'),
    (['--variable_length'], 'variable_length needs a block_length in 1..64, got 0'),
    (['--remasking=best'], 'remasking must be'), (['--temperature=-2'], 'temperature must'),
    (['--cache=roll'], 'cache must be'), (['--mask_id=5'], 'mask_id'),
    (['--checkpoint=no/such'], 'no checkpoint here'), (['--gen_lenght=8'], 'did you mean gen_length'),
    (['--prompt_file=none.txt'], 'none.txt')])
def test_mistakes_get_one_line(run, capsys, argv, message):
    assert message in refused(capsys, run, *argv)


def test_an_autoregressive_model_cannot_fill_gaps(causal, capsys):
    assert 'cannot fill a ___' in refused(capsys, causal, '--prompt=a ___ b')
    assert texts(capsys, causal, '--prompt=a', '--gen_length=4')[0][0] == 'a'


# ---------------------------------------------------------------------------------------------------------- sampler


def test_answers_seek_the_mode_and_samples_are_drawn(run, tmp_path, monkeypatch, capsys):
    seen = []
    real = diffusion.generate

    def noted(model, x, mask_id, params, **options):
        seen.append((params.remasking, params.temperature))
        return real(model, x, mask_id, params, **options)

    monkeypatch.setattr(diffusion, 'generate', noted)
    released = checkpoint(tmp_path / 'released')
    examples = checkpoint(tmp_path / 'examples', 'response')
    for folder, flags in (
            (run, []), (run, ['--instruct']), (released, []), (examples, []), (run, ['--temperature=0.5']),
            (run, ['--remasking=low_confidence']), (run, ['--instruct', '--remasking=random']),
            (run, ['--temperature=0'])):
        script('sample', folder, '--prompt=a', '--gen_length=4', *flags)
    assert seen == [('random', 1.0), ('low_confidence', 0.0), ('low_confidence', 0.0), ('low_confidence', 0.0),
                    ('random', 0.5), ('low_confidence', 0.0), ('random', 1.0), ('random', 0.0)]


@pytest.mark.parametrize('flags', [
    '--block_length=4 --variable_length --steps=2', '--block_length=4 --variable_length --cfg_scale=0.5',
    '--logits_eos_inf', '--confidence_eos_eot_inf --remasking=low_confidence', '--cache=prefix --block_length=4',
    '--cache=dual --block_length=4', '--threshold=0.3 --remasking=low_confidence', '--instruct --stop=a',
    '--show --block_length=8 --variable_length'])
def test_every_sampler_flag(run, capsys, flags):
    script('sample', run, '--prompt=a', '--prompt=tok', *flags.split(), '--gen_length=8')
    assert 'forward passes' in capsys.readouterr().err


def test_a_gap_ignores_blocks(run, capsys):
    """So a config for answers (blocks of 32) can also fill gaps."""
    assert len(texts(capsys, run, '--prompt=abc ___ e', '--block_length=32', '--gap_length=5')) == 1


def test_compiled_blocks_write_the_same_tokens(run, monkeypatch, capsys):
    """By the tracer alone: its graphs run eagerly, which needs no C++ compiler and no half a minute."""
    calls = []
    real = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, 'compile', lambda self: calls.append(real(self, backend='eager')))
    argv = [run, '--prompt=the', '--prompt=a model', '--gen_length=8', '--block_length=4', '--cache=dual']
    assert texts(capsys, *argv) == texts(capsys, *argv, '--compile') and len(calls) == 2


# ----------------------------------------------------------------------------------------------------------- screen


@pytest.mark.parametrize('terminal', [False, True])
def test_the_canvas_is_drawn(run, capsys, monkeypatch, terminal):
    monkeypatch.setattr('sys.stdout.isatty', lambda: terminal, raising=False)
    monkeypatch.setattr('time.sleep', lambda seconds: None)
    script('sample', run, '--prompt=abc', '--gen_length=16', '--show', '--block_length=8')
    out = capsys.readouterr().out
    frames = out.split(RULE)[0]
    if terminal:
        assert frames.count('\x1b[H\x1b[J') == 16 and frames.count('\x1b[1;32m') == 16
    else:
        lines = frames.splitlines()
        assert '\x1b' not in frames and [line[:4] for line in lines[:2]] == ['   1', '   2'] and len(lines) == 16
        assert all(line[4:].startswith(' | abc') for line in lines)
        assert lines[0].count('░') == 15 and '░' not in lines[-1]


def test_characters_of_several_tokens_are_drawn_whole(capsys):
    tok = data.get_tokenizer('bytes')
    x = torch.tensor([[*tok.encode('é\n👍'), tok.mask_id, *tok.encode('b')]])
    sample.screen(tok)(x, torch.zeros_like(x, dtype=torch.bool))
    assert capsys.readouterr().out == '   1 | é⏎👍░b\n'


# ------------------------------------------------------------------------------------------------------------- chat


def type_in(monkeypatch, *lines):
    """Play a user. An exception is raised instead of being typed; the end is Ctrl-D."""
    queue = iter([*lines, EOFError()])

    def typed(_=''):
        line = next(queue)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr('builtins.input', typed)


def note_canvases(monkeypatch, interrupt=None):
    """Return a list that receives each canvas. Its number `interrupt` is interrupted."""
    seen = []
    real = diffusion.generate

    def noted(model, x, *args, **options):
        seen.append(data.get_tokenizer('bytes').decode(x[0].tolist()))
        if len(seen) - 1 == interrupt:
            raise KeyboardInterrupt
        return real(model, x, *args, **options)

    monkeypatch.setattr(diffusion, 'generate', noted)
    return seen


def test_a_chat(run, capsys, monkeypatch):
    seen = note_canvases(monkeypatch, interrupt=2)
    type_in(monkeypatch, 'hi', '', 'more', 'interrupted', '/reset', 'anew', '/quit', 'never read')
    script('sample', run, '--chat', '--gen_length=8', '--temperature=1')
    captured = capsys.readouterr()
    assert len(seen) == 4
    assert seen[0].startswith('<|startoftext|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>')
    assert 'hi<|eot_id|><|start_header_id|>assistant' in seen[1] and 'more' in seen[1]
    assert 'interrupted' in seen[2] and '(interrupted)' in captured.err
    assert 'anew' in seen[3] and 'hi' not in seen[3].replace('<|', '')


def test_a_chat_drops_the_oldest_turns(tmp_path, capsys, monkeypatch):
    folder = checkpoint(tmp_path, seq_len=40)                               # room for one turn
    seen = note_canvases(monkeypatch)
    type_in(monkeypatch, 'first', 'second', 'x' * 50, KeyboardInterrupt())
    script('sample', folder, '--chat', '--gen_length=8')
    err = capsys.readouterr().err
    assert len(seen) == 2 and 'first' not in seen[1] and 'the oldest turn is dropped' in err
    assert 'the context holds 40 tokens' in err


def test_an_answer_and_its_speed_are_printed(run, capsys, monkeypatch):
    monkeypatch.setattr(diffusion, 'generate', lambda model, x, mask_id, params, **_: (
        torch.where(x == mask_id, 65, x), 4))
    type_in(monkeypatch, 'hi')
    script('sample', run, '--chat', '--gen_length=4')
    captured = capsys.readouterr()
    assert 'AAAA' in captured.out and re.search(r'4 tokens in .* s, .* tokens/s, 4 forward passes', captured.err)


def test_sampling_params_of_settings():
    params = sample.sampling_params(settings(steps=8, block_length=4, threshold=0.5, cache='dual'), 8)
    assert params == SamplingParams(steps=8, block_length=4, threshold=0.5, cache='dual')
    assert sample.sampling_params(settings(), 8) == SamplingParams()
    with pytest.raises(UserError, match='at least 0'):
        sample.sampling_params(settings(cfg_scale=-1.0), 8)


def test_several_samples_of_a_prompt(run, causal, capsys):
    argv = ['--prompt=the', '--gen_length=8', '--temperature=1', '--remasking=random']
    once, = texts(capsys, run, *argv)
    three = texts(capsys, run, *argv, '--num_samples=3')
    assert three[0] == once and len(set(three)) == 3 and all(text.startswith('the') for text in three)
    assert len(texts(capsys, run, '--gen_length=4')) == 3


def test_an_autoregressive_model_says_what_it_ignores(causal, capsys):
    script('sample', causal, '--prompt=a', '--gen_length=2', '--remasking=random')
    assert 'only the temperature counts' in capsys.readouterr().err
    script('sample', causal, '--prompt=a', '--gen_length=2')
    assert 'only the temperature counts' not in capsys.readouterr().err
