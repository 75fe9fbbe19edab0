"""What every run of every sampler keeps, and fast or batched runs that must equal plain ones."""

import pytest
import reference
import torch
from helpers import tiny_model

import diffusion

MASK, EOS, EOT, PAD = 39, 38, 37, 36
SAMPLERS = [
    dict(steps=8), dict(steps=5), dict(steps=8, block_length=4), dict(steps=3, block_length=4),
    dict(steps=8, remasking='random'), dict(steps=8, temperature=0.7),
    dict(steps=8, remasking='random', temperature=1.0, block_length=2), dict(steps=6, cfg_scale=0.8),
    dict(steps=8, cfg_scale=1.5, temperature=1.0, block_length=4), dict(steps=8, threshold=0.2),
    dict(steps=8, temperature=0.7, confidence_eos_eot_inf=True), dict(steps=8, logits_eos_inf=True, remasking='random'),
]
named = pytest.mark.parametrize('settings', SAMPLERS, ids=lambda s: ' '.join(f'{k}={v}' for k, v in s.items()))


@pytest.fixture(scope='module')
def model():
    return tiny_model(5).eval()


def prompts(n=8):
    g = torch.Generator().manual_seed(3)
    return [torch.randint(0, 36, (2 + i % 5,), generator=g).tolist() for i in range(n)]


def generators(n):
    return [torch.Generator().manual_seed(100 + i) for i in range(n)]


def run(model, batch, noise, **settings):
    x, visible, prompt = diffusion.canvas(batch, 8, MASK, PAD)
    return diffusion.generate(model, x, MASK, prompt=prompt, visible=visible, eos_id=EOS, eot_id=EOT, generator=noise,
                              gen_start=x.shape[1] - 8, **settings)


@named
def test_a_batch_of_unequal_prompts_equals_single_runs(model, settings):
    together = run(model, prompts(), generators(8), **settings)
    for i, prompt in enumerate(prompts()):
        alone = run(model, [prompt], [torch.Generator().manual_seed(100 + i)], **settings)
        assert together.x[i, -len(prompt) - 8:].tolist() == alone.x[0].tolist()


@named
def test_what_is_given_never_changes_and_every_mask_is_filled(model, settings):
    frames = []
    x, visible, prompt = diffusion.canvas(prompts(), 8, MASK, PAD)
    out = diffusion.generate(model, x, MASK, visible=visible, eos_id=EOS, eot_id=EOT, generator=generators(8),
                             on_step=lambda x, committed: frames.append((x.clone(), committed)), **settings)
    before = x
    for frame, committed in frames:
        assert torch.equal(frame != before, committed) and (before[committed] == MASK).all()
        before = frame
    assert torch.equal(out.x, before) and not (out.x == MASK).any() and torch.equal(out.x[prompt], x[prompt])
    assert out.n_forward == len(frames) * (2 if settings.get('cfg_scale') else 1)


def test_infilling_has_its_own_budget(model):
    x = torch.tensor([[1, MASK, 2, MASK, MASK, 3]])
    out = diffusion.generate(model, x, MASK, steps=3)
    assert not (out.x == MASK).any() and out.n_forward == 3
    mixed = torch.tensor([[1, MASK, 2] + [MASK] * 8])                                 # a gap in the prompt, then blocks
    order = []
    out = diffusion.generate(model, mixed, MASK, steps=8, block_length=4, gen_start=3,
                             on_step=lambda x, committed: order.extend(committed[0].nonzero()[:, 0].tolist()))
    assert order[0] == 1 and sorted(order[1:5]) == [3, 4, 5, 6] and sorted(order[5:]) == [7, 8, 9, 10]
    assert out.n_forward == 9
    full = torch.tensor([[1, 2, 3]])
    out = diffusion.generate(model, full, MASK, steps=4)
    assert torch.equal(out.x, full) and out.n_forward == 0                              # nothing masked, nothing asked


def test_rows_with_gaps_of_different_length_end_together(model):
    x = torch.tensor([[1, MASK, MASK, MASK, 2], [1, 5, MASK, 6, 2]])
    for settings in (dict(steps=3), dict(steps=3, remasking='random', temperature=1.0)):
        out = diffusion.generate(model, x, MASK, generator=generators(2), **settings)
        for i in range(2):
            alone = diffusion.generate(model, x[i:i + 1], MASK, generator=generators(2)[i:i + 1], **settings)
            assert out.x[i].tolist() == alone.x[0].tolist()


def likes(*favourites):
    """A model whose logits are the same everywhere: the given ids, most wanted first."""
    def model(ids):
        logits = torch.zeros(*ids.shape, 40)
        for rank, token in enumerate(favourites):
            logits[..., token] = 9.0 - rank
        return logits
    return model


@pytest.mark.parametrize('temperature', [0.0, 0.5, 1.0])
def test_end_tokens(temperature):
    x = torch.full((4, 6), MASK)
    x[:, 0] = 1
    options = dict(steps=5, temperature=temperature, eos_id=EOS, eot_id=EOT)
    out = diffusion.generate(likes(MASK, EOS, EOT, 7), x, MASK, **options)
    assert not (out.x == MASK).any() and (out.x == EOS).any()                           # [MASK] is never an answer
    out = diffusion.generate(likes(EOS, EOT, 7), x, MASK, logits_eos_inf=True, **options)
    assert not (out.x == EOS).any() and (out.x == EOT).any()
    first_kinds = []

    def mixed(ids):                                           # EOS and EoT wanted most on the left, a word on the right
        logits = likes(EOS)(ids)
        logits[:, 2:4] = likes(EOT)(ids)[:, 2:4]
        logits[:, 4:] = likes(7)(ids)[:, 4:] * 0.9
        return logits

    diffusion.generate(mixed, x[:1], MASK, confidence_eos_eot_inf=True, generator=torch.Generator().manual_seed(0),
                       **options, on_step=lambda x, c: first_kinds.append(x[0][c[0]].item()))
    if temperature == 0:                                            # the word first although it is less probable
        assert first_kinds[:2] == [7, 7] and set(first_kinds[2:]) == {EOS, EOT}
    ends = [k in (EOS, EOT) for k in first_kinds]
    assert ends == sorted(ends) and True in ends                    # at every temperature: all words before all ends


def test_threshold_commits_what_is_sure(model):
    x = torch.full((1, 8), MASK)
    assert diffusion.generate(likes(3), x, MASK, steps=8, threshold=0.9).n_forward == 1
    assert diffusion.generate(likes(3), x, MASK, steps=8, threshold=1.0).n_forward == 8


@pytest.mark.parametrize('block_length', [1, 3, 4])
@pytest.mark.parametrize('settings', [dict(), dict(remasking='random', temperature=1.0), dict(cfg_scale=0.5)])
def test_variable_length_batches_equal_single_runs(model, block_length, settings):
    options = dict(block_length=block_length, steps_per_block=block_length, max_length=12, **settings)
    ids, _ = diffusion.generate_variable_length(model, prompts(), MASK, 7, generator=generators(8), **options)
    for i, prompt in enumerate(prompts()):
        alone, n = diffusion.generate_variable_length(model, [prompt], MASK, 7, generator=generators(8)[i:i + 1],
                                                      **options)
        assert ids[i] == alone[0] and ids[i][:len(prompt)] == prompt
        new = alone[0][len(prompt):]
        assert len(new) % block_length == 0 and (7 in new[-block_length:] or len(new) == 12)
        assert 7 not in new[:-block_length]                         # the block with EOS is kept whole and is the last


def test_variable_length_stops_at_a_string(model):
    out, _ = diffusion.generate_variable_length(model, [[1, 2]], MASK, None, block_length=2, steps_per_block=2,
                                                max_length=20, stop=lambda ids: len(ids) >= 6)
    assert len(out[0]) == 8


def test_noise_is_drawn_only_for_masked_rows_of_the_block(monkeypatch):
    drawn = []
    real = diffusion.uniform

    def spy(rows, columns, generator):
        out = real(rows, columns, generator)
        drawn.append(tuple(out.shape))
        return out

    monkeypatch.setattr(diffusion, 'uniform', spy)
    x = torch.full((1, 64), MASK)
    diffusion.generate(likes(3), x, MASK, steps=16, block_length=16, temperature=1.0)
    assert max(n for n, _ in drawn) == 16 and all(v == 40 for _, v in drawn)


@pytest.mark.parametrize('cache', ['prefix', 'dual', 'roll'])
@pytest.mark.parametrize('settings', [dict(), dict(cfg_scale=0.7), dict(temperature=1.0, remasking='random')])
def test_caches(model, cache, settings):
    """Exact where nothing is stale (one step a block), close elsewhere, and never a touched prompt or a mask left."""
    x, visible, prompt = diffusion.canvas(prompts(4), 8, MASK, PAD)
    options = dict(visible=visible, prompt=prompt, gen_start=x.shape[1] - 8, block_length=4, **settings)
    plain = diffusion.generate(model, x, MASK, steps=2, generator=generators(4), **options)
    if cache != 'roll':
        cached = diffusion.generate(model, x, MASK, steps=2, cache=cache, generator=generators(4), **options)
        assert torch.equal(cached.x, plain.x)
    cached = diffusion.generate(model, x, MASK, steps=8, cache=cache, generator=generators(4), **options)
    assert torch.equal(cached.x[prompt], x[prompt]) and not (cached.x == MASK).any()


def test_a_rolling_cache_recomputes_every_column_in_turn():
    """As many in every pass, so that one shape serves all: the block, and others until each had its turn."""
    for T, block in ((40, (16, 24)), (12, (0, 8)), (8, (0, 8))):
        n, seen = block[1] - block[0], set()
        others = set(range(T)) - set(range(*block))
        assert diffusion.recomputed_rows('roll', T, block, 0, 0) == list(range(T))
        for step in range(1, 1 + -(-T // n)):
            rows = diffusion.recomputed_rows('roll', T, block, step, step)
            assert rows == sorted(set(rows)) and set(range(*block)) <= set(rows)
            assert len(rows) == n + min(n, len(others))
            seen |= set(rows)
        assert seen == set(range(T))


def test_ar_generation_with_and_without_a_cache():
    model = tiny_model(2, causal=True).eval()
    prompt = torch.tensor([[1, 2, 3], [4, 5, 6]])
    cached = diffusion.ar_generate(model, prompt, 8, temperature=0.0)
    plain = diffusion.ar_generate(lambda ids: model(ids), prompt, 8, temperature=0.0)
    assert torch.equal(cached.x, plain.x) and torch.equal(cached.x[:, :3], prompt)
    first = cached.x[0, 3].item()
    ended = diffusion.ar_generate(model, prompt[:1], 8, temperature=0.0, eos_id=first)
    assert (ended.x[0, 3:] == first).all()


@pytest.mark.parametrize('settings', [{}, {'block_length': 4}, {'threshold': 0.9}], ids=str)
def test_a_hand_on_the_canvas(model, settings):
    """on_step may force a token, forbid one and take one back: what it writes is seen, what it opens is filled."""
    x, seen = torch.tensor([[1] + [MASK] * 8]), []

    def on_step(x, committed):
        seen.append(x.clone())
        x[:, 2] = 7                                             # forced from the first step on
        if len(seen) == 3:
            x[:, 1] = MASK                                      # taken back, once

    out = diffusion.generate(model, x, MASK, steps=8, on_step=on_step, **settings).x
    assert (out != MASK).all() and out[0, 2] == 7 and out[0, 0] == 1
    assert all(canvas[0, 2] == 7 for canvas in seen[1:])
    plain = diffusion.generate(model, x, MASK, steps=8, **settings).x
    watched = diffusion.generate(model, x, MASK, steps=8, on_step=lambda x, committed: None, **settings).x
    assert torch.equal(plain, watched)


def test_leaving_at_the_end_changes_no_text(model):
    """Up to the first end token of each row the same, in fewer passes; a row that does not end keeps all going."""
    x, visible, prompt = diffusion.canvas(prompts(4), 16, MASK, PAD)
    options = dict(visible=visible, prompt=prompt, block_length=4, steps=16, gen_start=x.shape[1] - 16, eot_id=9)
    whole = diffusion.generate(model, x, MASK, eos_id=8, **options)
    rows = whole.x[:, -16:].tolist()
    common = max(set(rows[0][:8]), key=rows[0].count)
    for eos in {common, 8}:
        plain = diffusion.generate(model, x, MASK, eos_id=eos, **options)
        short = diffusion.generate(model, x, MASK, eos_id=eos, until_end=True, **options)
        assert short.n_forward <= plain.n_forward and not (short.x == MASK).any()
        for a, b in zip(plain.x[:, -16:].tolist(), short.x[:, -16:].tolist()):
            end = next((i for i, token in enumerate(a) if token in (eos, 9)), 16)
            assert a[:end + 1] == b[:end + 1]
    row = x[:1]                                                     # one row: it does leave
    ended = diffusion.generate(model, row, MASK, eos_id=common, until_end=True, **{
        **options, 'visible': visible[:1], 'prompt': prompt[:1]})
    assert ended.n_forward < whole.n_forward


def test_zero_and_nothing_are_as_good_as_none(model):
    """A script's settings have no None: threshold 0 and cache '' are off."""
    x = torch.tensor([[1] + [MASK] * 8])
    plain = diffusion.generate(model, x, MASK, steps=4, threshold=None, cache=None)
    assert torch.equal(diffusion.generate(model, x, MASK, steps=4, threshold=0.0, cache='').x, plain.x)


def test_a_misspelt_option_of_the_baseline_is_an_error():
    with pytest.raises(TypeError, match='temprature'):
        diffusion.ar_generate(tiny_model(2, causal=True), torch.tensor([[1]]), 2, temprature=0.0)


def test_a_row_without_a_maskable_token_costs_nothing(model):
    """Eq. 6 of nothing is log 1, not 0/0, also beside rows that have some."""
    x0, maskable = torch.tensor([[1, 2, 3], [1, 2, 3]]), torch.tensor([[False] * 3, [True] * 3])
    bounds = diffusion.bound_per_row(model, x0, maskable, MASK, draws=2)
    assert bounds[0] == 0 and bounds[1] < 0


@pytest.mark.parametrize('settings, says', [
    (dict(steps=0), 'steps'), (dict(steps=8, block_length=3), 'block_length must divide the 8'),
    (dict(steps=8, block_length=0), 'block_length'), (dict(steps=1, block_length=4), 'number of blocks'),
    (dict(steps=8, temperature=-1.0), 'temperature'),
    (dict(steps=8, remasking='best'), 'remasking must be'), (dict(steps=8, cache='all'), 'cache must be'),
    (dict(steps=8, logits_eos_inf=True), 'need eos_id'), (dict(steps=8, cfg_scale=-0.5), 'cfg_scale'),
])
def test_bad_settings(model, settings, says):
    with pytest.raises(ValueError, match=says):
        diffusion.generate(model, torch.tensor([[1] + [MASK] * 8]), MASK, **settings)


@pytest.mark.parametrize('steps, block_length', [(8, 8), (8, 4), (6, 4), (3, 8)])
def test_greedy_sampling_equals_the_plain_loop(model, steps, block_length):
    """What bench_sample.py measures against writes the same."""
    x, _, _ = diffusion.canvas([[1, 2, 3]], 8, MASK, PAD)
    how = dict(steps=steps, block_length=block_length, gen_start=3)
    with torch.no_grad():
        plain = reference.plain_generate(model, x.clone(), MASK, **how)
    assert torch.equal(plain, diffusion.generate(model, x, MASK, **how).x)
