"""Fine-tuning data, both ways: what is hidden, what is counted, who sees whom; and lines that cannot be read."""

import json
import random
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ROOT, script, tiny_model

import data
import diffusion
import train
from configurator import Refused, configure, settings_of

PAIRS = [{'prompt': f'question {i}' + '?' * (i % 5), 'response': 'yes ' * (i % 4 + 1)} for i in range(60)]
TALKS = [{'messages': [{'role': r, 'content': f'{r} {i} {k}'} for k in range(3) for r in ('user', 'assistant')]}
         for i in range(40)]


@pytest.fixture(scope='module')
def corpora(tmp_path_factory):
    folder = tmp_path_factory.mktemp('examples')
    for name, records in (('pairs', PAIRS), ('talks', TALKS)):
        (folder / f'{name}.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in records))
        data.prepare([folder / f'{name}.jsonl'], folder / name, 'bytes', val_every=5)
    return {name: data.Corpus(folder / name) for name in ('pairs', 'talks')}


TINY = ('--n_layer=1 --n_head=2 --n_kv_head=2 --d_model=32 --d_ff=48 --batch_size=2 --device=cpu --masking=response '
        '--eval_draws=1 --sample_tokens=0').split()


def prepared(records, folder, **options):
    """A corpus of records."""
    named = [(f'record {i}', data.as_record(record)) for i, record in enumerate(records)]
    data.prepare([named], folder, 'bytes', **options)
    return data.Corpus(folder)


def examples_of(corpus, seq_len, split='train', seed=1337, **cuts):
    return data.Examples(data.Dataset([corpus], [1.0]), split, corpus.tokenizer(), seq_len, seed, data.Cuts(**cuts))


def read(corpus, start, end):
    return corpus.read('train', start, end - start).tolist()


def settings(**changes):
    ours = {'seq_len': 96, 'batch_size': 4, 'masking': 'response'}
    return SimpleNamespace(**{**settings_of(vars(train)), **ours, **changes})


def test_an_example_is_template_answer_and_one_eos(corpora):
    corpus = corpora['pairs']
    tok, examples = corpus.tokenizer(), examples_of(corpus, 200)
    texts = {r['prompt']: r['response'].strip() for r in PAIRS}
    for start, response, end, _ in examples.rows.tolist():
        prompt, rest = read(corpus, start, response), read(corpus, response, end)
        asked = next(p for p in texts if tok.encode_chat([{'role': 'user', 'content': p}]) == prompt)
        assert rest == [*tok.encode(texts[asked]), tok.eos_id]
    stream = np.concatenate(corpus.shards['train'])
    assert (stream == tok.eos_id).sum() == len(examples.rows)                           # iLLaDA: one EOS each
    assert examples.rows[-1, 2] == len(stream)


def test_padding_is_hidden_and_counted_and_the_prompt_never(corpora):
    """Eq. 5 with L' = response, EOS and padding (LLaDA, App. B.1)."""
    examples = examples_of(corpora['pairs'], 200, pad_group=6)
    x0, maskable, cu_seqlens = examples.batch(0, range(6), 6)
    rows = examples.drawn(range(6))
    assert cu_seqlens is None and x0.shape[1] == (rows[:, 2] - rows[:, 0]).max()
    for x, m, (start, response, end, _) in zip(x0, maskable, rows.tolist()):
        assert not m[:response - start].any() and m[response - start:].all()
        assert (x[end - start:] == examples.tok.eos_id).all()


def test_rows_are_padded_to_their_group_however_the_batch_is_split(corpora):
    """The paper pads each mini-batch; the group, not the process, says which rows those are."""
    examples = examples_of(corpora['pairs'], 200, pad_group=4)
    for start in (0, 4):
        rows = examples.drawn(range(8 + start, 12 + start))
        both = [examples.batch(1, range(start + k, start + k + 2), 8).x0 for k in (0, 2)]
        assert both[0].shape[1] == both[1].shape[1] == (rows[:, 2] - rows[:, 0]).max()
        assert torch.equal(torch.cat(both), examples.batch(1, range(start, start + 4), 8).x0)


def test_what_a_held_out_example_costs_does_not_depend_on_the_others(tmp_path):
    """One long conversation among many does not make all canvases long."""
    short = [{'prompt': f'question {i}', 'response': 'yes ' * (i % 3 + 1)} for i in range(40)]
    bounds = {}
    for name, more in (('without', []), ('with', [{'prompt': 'a long one', 'response': 'word ' * 50}])):
        train_rows, val_rows = (list(enumerate(map(data.as_record, rows))) for rows in (short, [*short, *more]))
        data.prepare([train_rows], tmp_path / name, 'bytes', val=[val_rows])
        source = examples_of(data.Corpus(tmp_path / name), 400, split='val')
        model = tiny_model(vocab_size=262, seq_len=400)
        for x0, maskable in source.held_out()[0]:
            got = diffusion.bound_per_row(model, x0, maskable, source.tok.mask_id, draws=64)
            ids = [tuple(x[x != source.tok.eos_id].tolist()) for x in x0]
            bounds.setdefault(name, {}).update(zip(ids, (got / maskable.sum(1)).tolist()))
        assert {len(x0[0]) % 32 for x0, _ in source.held_out()[0]} == {0}
    assert len(bounds['with']) == len(bounds['without']) + 1
    for ids, value in bounds['without'].items():
        assert bounds['with'][ids] == pytest.approx(value, rel=0.05)            # other masks, the same canvas


def test_one_update_is_eq_5_however_it_is_split(corpora):
    model = tiny_model(vocab_size=262, seq_len=96)
    tok, source = corpora['pairs'].tokenizer(), examples_of(corpora['pairs'], 96, pad_group=8)
    one = train.Processes(0, 1, 'cpu', False, False)
    for form in (True, False):
        cfg = settings(batch_size=8, global_batch=8, count_form=form, complementary=False)
        whole, = train.questions(source, 3, cfg, tok, one)
        x0, maskable, _ = source.batch(3, range(8), 8)
        masked = torch.zeros(x0.numel(), dtype=torch.bool).index_fill_(0, whole.rows, True).view(x0.shape)
        t = diffusion.sample_t(8, 0 if form else cfg.mask_eps, True, diffusion.keyed_generator(cfg.seed, 3),
                               logit_normal=source.logit_normal)
        want = diffusion.diffusion_loss(model, x0, maskable, tok.mask_id, t=t, masked=masked, per='sequence',
                                        exact=form).detach()
        each = []
        for b in range(8):                                                              # Eq. 5, written out
            logp = -diffusion.log_prob(model(torch.where(masked, tok.mask_id, x0))[b], x0[b]).detach()
            n = int(maskable[b].sum())
            weight = n / int(masked[b].sum()) if form else 1 / float(t[b])
            each.append(weight * float((logp * masked[b]).sum()) / n)
        assert float(want) == pytest.approx(sum(each) / 8, rel=1e-5)
        small, got = settings(batch_size=2, global_batch=8, count_form=form, complementary=False), 0.0
        for rank in (0, 1):
            procs = train.Processes(rank, 2, 'cpu', False, False)
            got += sum(diffusion.weighted_loss(model, q).item() for q in train.questions(source, 3, small, tok, procs))
        assert got == pytest.approx(float(want), rel=1e-5)


def test_the_two_masks_of_an_example_together_ask_for_all_of_its_answer(corpora):
    tok, source = corpora['pairs'].tokenizer(), examples_of(corpora['pairs'], 96, pad_group=4, times=2)
    one, seen = train.Processes(0, 1, 'cpu', False, False), []
    for it in range(5):
        for start, question in zip((0, 4), train.questions(source, it, settings(global_batch=8), tok, one)):
            x0, maskable, _ = source.batch(it, range(start, start + 4), 8)
            hidden = torch.zeros(x0.numel(), dtype=torch.bool).index_fill_(0, question.rows, True).view(x0.shape)
            assert torch.equal(x0[::2], x0[1::2])
            assert torch.equal(hidden[::2] | hidden[1::2], maskable[::2])
            assert (hidden[::2] & hidden[1::2]).sum(1).max() <= 1                       # the count is rounded up
            seen += map(tuple, x0[::2].tolist())
    assert len(set(seen)) == 20                                                         # no other comes twice


def test_a_dialogue_gives_one_turn_a_visit(corpora):
    corpus = corpora['talks']
    examples = examples_of(corpus, 500, seed=5)
    n = len(examples.borders) - 1
    assert len(examples.rows) == 3 * n
    drawn = [examples.drawn(range(e * n, e * n + n)) for e in range(30)]
    for epoch in drawn:
        group = np.searchsorted(examples.rows[:, 0], epoch[:, 0]) // 3
        assert sorted(group) == list(range(n))                                          # every dialogue, once
    counts = np.bincount([np.searchsorted(examples.rows[:, 0], row[0]) % 3 for epoch in drawn for row in epoch])
    assert counts.min() > 0.8 * 10 * n                                                  # each turn equally often
    start, response, *_ = examples.rows[2]
    assert corpus.tokenizer().decode(read(corpus, start, response)).count('assistant') == 3 + 2


def test_a_question_is_never_in_both_splits(tmp_path):
    records = [{'prompt': f'q{i % 30}', 'response': f'a{i}'} for i in range(300)]
    corpus, asked = prepared(records, tmp_path / 'many'), {}
    for split in ('train', 'val'):
        asked[split] = {bytes(corpus.read(split, a, b - a).astype(np.uint16))
                        for a, b, *_ in examples_of(corpus, 99, split).rows.tolist()}
    assert asked['train'] and asked['val'] and not asked['train'] & asked['val']
    held_out = [record for _, record in data.read_records(tmp_path / 'many' / 'val_00000.jsonl')]
    assert {record['messages'][0]['content'] for record in held_out} == {
        f'q{i}' for i in range(30) if zlib.crc32(f'q{i}'.encode()) % 10 == 0}


def test_isolated_examples_are_as_if_alone(corpora):
    corpus, model = corpora['pairs'], tiny_model(vocab_size=262, seq_len=128)
    tok = corpus.tokenizer()
    source = data.Windows(data.Dataset([corpus], [1.0]), 'train', tok, 128, cuts=data.Cuts(isolate=True))
    x0, maskable, cu_seqlens = source.batch(0, range(2), 2)
    packed = model(x0, cu_seqlens=cu_seqlens).flatten(0, 1)
    borders = sorted(set(cu_seqlens.tolist()))
    assert maskable.all() and len(borders) > 6
    for a, b in zip(borders, borders[1:]):
        assert x0.flatten()[b - 1] == tok.eos_id or b % 128 == 0
        torch.testing.assert_close(packed[a:b], model(x0.flatten()[None, a:b])[0], rtol=1e-4, atol=1e-4)


def test_what_is_too_long_is_left_out_and_told(tmp_path, capsys):
    records = [{'prompt': 'q' * (200 if i % 3 == 0 else 5) + str(i), 'response': 'a'} for i in range(60)]
    examples = examples_of(prepared(records, tmp_path / 'd', val_every=3), 64)
    said = capsys.readouterr().err
    assert 'longer than seq_len = 64' in said and len(examples.rows) == 30
    script('train', *TINY, '--max_iters=2', f'--dataset={tmp_path / "d"}', '--seq_len=64',
           f'--out_dir={tmp_path / "o"}')
    assert said in capsys.readouterr().err


def test_fine_tuning_resumes_to_the_same_bits(corpora, tmp_path):
    tiny = [*TINY, '--seq_len=96', f'--dataset={corpora["talks"].folder}', '--eval_interval=3', '--schedule=wsd',
            '--decay_iters=1', '--warmup_iters=1']
    script('train', *tiny, '--max_iters=6', f'--out_dir={tmp_path / "whole"}')
    script('train', *tiny, '--max_iters=3', f'--out_dir={tmp_path / "half"}', '--decay_iters=0')
    script('train', *tiny, '--max_iters=6', f'--out_dir={tmp_path / "half"}', '--resume')
    from model import load_model
    a, b = (load_model(tmp_path / name)[0] for name in ('whole', 'half'))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    named = [(f'record {i}', data.as_record(record)) for i, record in enumerate(PAIRS)]
    data.prepare([named], tmp_path / 'other', 'bpe-270')
    with pytest.raises(SystemExit) as stopped:                                          # another vocabulary
        script('train', *TINY, '--seq_len=96', '--max_iters=2', f'--dataset={tmp_path / "other"}',
               f'--init_from={tmp_path / "whole"}', f'--out_dir={tmp_path / "x"}')
    assert stopped.value.code == 2


@pytest.mark.parametrize('name, peak, last', [('llada_8b_sft', 2.5e-5, 2.5e-6), ('illada_8b_sft', 5e-6, 5e-7)])
def test_the_schedules_of_the_papers(name, peak, last):
    cfg = SimpleNamespace(**configure(settings_of(vars(train)), [str(ROOT / 'config' / f'{name}.py')]))
    train.check(cfg, 1)
    rate = lambda it: cfg.learning_rate * train.lr_factor(it, cfg)                      # noqa: E731
    n = cfg.max_iters
    assert rate(0) == pytest.approx(peak / 50)
    assert rate(49) == rate(n // 2) == rate(int(n * 0.9) - 1) == pytest.approx(peak)
    assert rate(n - n // 20) == pytest.approx((peak + last) / 2, rel=0.01)
    assert rate(n - 1) == pytest.approx(last, rel=0.01)
    assert cfg.masking == ('response' if name == 'llada_8b_sft' else 'unified')


# ---------------------------------------------------------------------------------------------------------------------
# Lines that cannot be read


def mutated(number, rng):
    """A bad line: number `number` of the seven ways to spoil a good one."""
    good = {'prompt': f'question {number}', 'response': f'answer {number}'}
    line = json.dumps(good).encode()
    return [
        line[:rng.randrange(2, len(line) - 1)],                                         # cut
        b'\xef\xbb\xbf\xef\xbb\xbf' + line,                                             # a BOM, twice
        line.replace(b'answer', b'ans\xff\xfewer'),                                     # not UTF-8
        json.dumps({**good, rng.choice(['prompt', 'response']): None}).encode(),
        json.dumps({'prompt': good['prompt']} if rng.random() < .5 else {'answer': 'x'}).encode(),
        json.dumps({**good, 'response': rng.choice(['', '  ', '\n'])}).encode(),
        json.dumps({**good, 'response': 'x' * (1 << 20)}).encode(),                     # 1 MB
    ][number % 7]


def test_300_bad_lines_are_each_named(tmp_path):
    rng = random.Random(0)
    good = [json.dumps({'prompt': f'p{i}', 'response': 'yes'}).encode() for i in range(4)]
    for i in range(300):
        path, at = tmp_path / 'messy.jsonl', rng.randrange(1, 4)
        path.write_bytes(b'\n'.join([*good[:at], mutated(i, rng), *good[at:]]))
        with pytest.raises(Refused, match=f'{path}:{at + 1}: ') as refused:
            list(data.read_records(path))
        assert len(str(refused.value)) < 300 and '\n' not in str(refused.value)


@pytest.mark.parametrize('record', [
    {'messages': []}, {'messages': 'x'}, {'messages': [{'role': 'assistant', 'content': 'x'}]},
    {'messages': [{'role': 'user', 'content': 'x'}]}, {'messages': [{'role': 'user'}, {'role': 'assistant'}]},
    {'messages': [None]}, {'first': 'a'}, {'prompt': 'a'}, {'response': ''}, {}, {'text': ' '}, {'text': 3},
    {'prompt': 3, 'response': 'x'}, {'prompt_ids': [1], 'response_ids': []},
    {'prompt_ids': ['a'], 'response_ids': [1]}])
def test_records_that_are_no_examples(record):
    with pytest.raises(ValueError):
        data.as_record(record)


def test_examples_as_ids(tmp_path):
    """For chat templates that Tokenizer does not know."""
    records = [{'prompt_ids': [65, 66, i + 1], 'response_ids': [70, i + 1]} for i in range(60)]
    corpus = prepared(records, tmp_path / 'd', val_every=3)
    examples = examples_of(corpus, 10)
    for start, response, end, _ in examples.rows.tolist():
        prompt, answer = read(corpus, start, response), read(corpus, response, end)
        assert prompt[:2] == [65, 66] and answer == [70, prompt[2], corpus.tokenizer().eos_id]
    with pytest.raises(ValueError, match='record 3'):
        records[3]['prompt_ids'] = [10 ** 6]
        prepared(records, tmp_path / 'e')


def test_documents_and_examples_do_not_mix(tmp_path):
    (tmp_path / 'a.jsonl').write_text('{"text": "x"}\n{"prompt": "x", "response": "y"}\n')
    with pytest.raises(ValueError, match='a.jsonl:2: .*not both'):
        data.prepare([tmp_path / 'a.jsonl'], tmp_path / 'd', 'bytes')
    pairs = [json.dumps({'prompt': f'p{i}', 'response': 'yes'}) for i in range(40)]
    (tmp_path / 'b.jsonl').write_text('\n'.join(pairs))
    (tmp_path / 'c.txt').write_text('text\n' * 9000)
    with pytest.raises(ValueError, match='prepare them apart'):
        data.prepare([tmp_path / 'b.jsonl', tmp_path / 'c.txt'], tmp_path / 'd', 'bytes')
    assert not (tmp_path / 'd').exists()
