"""What every sampler keeps, and the samplers with everything, which must equal the plain ones."""

import pytest
import torch
from helpers import GOLDEN_MODELS, golden_model, seeded, tiny_model

import diffusion
from diffusion import SamplingParams, generate, generate_variable_length

MASK, EOS, EOT, PAD = 39, 38, 37, 36
MODEL = tiny_model(5)
SETTINGS = [
    dict(), dict(steps=5), dict(block_length=4), dict(steps=3, block_length=4), dict(remasking='random'),
    dict(temperature=0.7), dict(remasking='random', temperature=1.0, block_length=2),
    dict(steps=6, cfg_scale=0.8), dict(cfg_scale=1.5, temperature=1.0, block_length=4), dict(threshold=0.2),
    dict(temperature=0.7, confidence_eos_eot_inf=True), dict(logits_eos_inf=True, remasking='random')]
all_settings = pytest.mark.parametrize('settings', SETTINGS, ids=str)
AT_RANDOM = dict(remasking='random', temperature=1.0)


def prompts(n=8):
    """Return n prompts of 2 to 6 tokens."""
    g = seeded(3)
    return [torch.randint(0, 36, (2 + i % 5,), generator=g).tolist() for i in range(n)]


def generators(n):
    """Return a generator for each row."""
    return [seeded(100 + i) for i in range(n)]


def fill(batch, generator, settings, **options):
    """Continue a batch of prompts by 8 tokens -> Generated."""
    x, attention_mask, prompt = diffusion.canvas(batch, 8, MASK, PAD)
    return generate(MODEL, x, MASK, SamplingParams(**settings), attention_mask=attention_mask, prompt=prompt,
                    gen_start=x.shape[1] - 8, eos_id=EOS, eot_id=EOT, generator=generator, **options)


def likes(*favourites):
    """Make a mask predictor with the same logits everywhere, that wants the first of the given ids most."""
    def logits(ids):
        out = torch.zeros(*ids.shape, 40)
        for rank, token in enumerate(favourites):
            out[..., token] = 9.0 - rank
        return out
    return diffusion.plain(logits)


def masks_after(prompt, n, mask_id=MASK):
    """Return the canvas of one prompt, (1, T)."""
    return torch.tensor([*prompt, *[mask_id] * n])[None]


# ------------------------------------------------------------------------------- equal to something simpler


@pytest.mark.parametrize('name', [*GOLDEN_MODELS, 'random'])
def test_generate_equals_generate_simple(name):
    """After prompts, and in gaps inside of a prompt."""
    model = tiny_model(2) if name == 'random' else golden_model(name)
    mask_id = {'llada_mha': 299, 'llada_gqa_tied': 256, 'illada_gqa': 5, 'random': MASK}[name]
    for length, steps in ((1, 1), (6, 6), (12, 5), (16, 2)):
        for prompt in ([], [7], [11, 8, 9, 10], [1, mask_id, 2], [mask_id, mask_id]):
            simple = diffusion.generate_simple(model, prompt, length, mask_id, steps)
            x = masks_after(prompt, length, mask_id)
            full = generate(model, x, mask_id, SamplingParams(steps=steps))
            assert full.x[0].tolist() == simple.tolist() and full.n_forward == steps


@all_settings
def test_a_batch_of_unequal_prompts_equals_single_runs(settings):
    together = fill(prompts(), generators(8), settings)
    for i, prompt in enumerate(prompts()):
        alone = fill([prompt], generators(8)[i:i + 1], settings)
        assert together.x[i, -len(prompt) - 8:].tolist() == alone.x[0].tolist()


@pytest.mark.parametrize('settings', [dict(steps=3), dict(steps=3, **AT_RANDOM)], ids=str)
def test_rows_with_different_gaps_end_together(settings):
    x = torch.tensor([[1, MASK, MASK, MASK, 2], [1, 5, MASK, 6, 2]])
    params = SamplingParams(**settings)
    together = generate(MODEL, x, MASK, params, generator=generators(2))
    for i in range(2):
        alone = generate(MODEL, x[i:i + 1], MASK, params, generator=generators(2)[i:i + 1])
        assert together.x[i].tolist() == alone.x[0].tolist()


# ---------------------------------------------------------------------------------------- what always holds


@all_settings
def test_what_is_given_never_changes_and_every_mask_is_filled(settings):
    start, _, prompt = diffusion.canvas(prompts(), 8, MASK, PAD)
    frames = [start]

    def on_step(x, committed):
        assert torch.equal(x != frames[-1], committed) and (frames[-1][committed] == MASK).all()
        frames.append(x.clone())

    out = fill(prompts(), generators(8), settings, on_step=on_step)
    assert torch.equal(out.x, frames[-1]) and torch.equal(out.x[prompt], start[prompt])
    assert not (out.x == MASK).any()
    assert out.n_forward == (len(frames) - 1) * (2 if settings.get('cfg_scale') else 1)


@pytest.mark.parametrize('x, settings, n_forward', [
    ([1] + [MASK] * 8, dict(), 8), ([1] + [MASK] * 8, dict(block_length=2), 8),         # one step per token
    ([1, 2, 3], dict(steps=4), 0),
    ([MASK, 1, 2, 3, MASK, MASK], dict(block_length=2), 3),                             # a block is full
    ([MASK, 1, 2, 3, MASK, MASK], dict(block_length=2, threshold=1.0), 3)], ids=str)
def test_no_pass_is_made_where_nothing_is_masked(x, settings, n_forward):
    out = generate(MODEL, torch.tensor([x]), MASK, SamplingParams(**settings))
    assert not (out.x == MASK).any() and out.n_forward == n_forward


def test_block_plan():
    x = masks_after([1, 2], 8)

    def plan(gen_start=None, **settings):
        return diffusion.block_plan(x, MASK, gen_start, SamplingParams(**settings))

    assert plan(steps=3) == [(2, 10, 3)]
    assert plan(steps=3, block_length=4) == [(2, 6, 2), (6, 10, 1)]
    assert plan(gen_start=4, steps=6, block_length=2) == [(2, 6, 2), (6, 8, 2), (8, 10, 2)]
    with pytest.raises(ValueError, match='block_length must divide the 8 tokens'):
        plan(steps=3, block_length=3)
    with pytest.raises(ValueError, match='at least the number of blocks, 4'):
        plan(steps=3, block_length=2)


def test_canvas():
    x, attention_mask, prompt = diffusion.canvas([[1, MASK, 2], [3]], 2, MASK, PAD)
    assert x.tolist() == [[1, MASK, 2, MASK, MASK], [PAD, PAD, 3, MASK, MASK]]
    assert attention_mask.tolist() == [[True] * 5, [False, False, True, True, True]]
    assert prompt[0].tolist() == [True, False, True, False, False] and not prompt[:, 3:].any()


# ------------------------------------------------------------------------------------------ single settings


@pytest.mark.parametrize('settings, message', [
    (dict(remasking='best'), "must be 'low_confidence' or 'random'"),
    (dict(remasking='random', threshold=0.9), 'threshold needs'),
    (dict(cache='all'), "'prefix' or 'dual'"), (dict(steps=-1), 'steps must be at least 1'),
    (dict(block_length=-1), 'block_length must be'), (dict(temperature=-1.), 'temperature must be'),
    (dict(cfg_scale=-0.5), 'cfg_scale must be'), (dict(threshold=-0.1), 'threshold must be')], ids=str)
def test_sampling_params_refuse_nonsense(settings, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**settings)


@pytest.mark.parametrize('temperature', [0., 0.5, 1.0])
def test_what_is_forbidden_is_never_written(temperature):
    params = SamplingParams(temperature=temperature)
    out = generate(likes(MASK, 5, 6, 7), masks_after([1], 5), MASK, params, suppress=[5, 6])
    assert not set(out.x[0, 1:].tolist()) & {MASK, 5, 6}
    assert temperature or (out.x[0, 1:] == 7).all()
    assert diffusion.generate_simple(likes(MASK, 7), [1], 3, MASK, steps=3).tolist() == [1, 7, 7, 7]


def test_threshold_commits_all_that_reach_it_and_replaces_steps():
    x = masks_after([1], 8)
    assert generate(likes(3), x, MASK, SamplingParams(threshold=0.9)).n_forward == 1
    assert generate(likes(3), x, MASK, SamplingParams(threshold=1.0, steps=2)).n_forward == 8
    assert generate(likes(3), x, MASK, SamplingParams(threshold=0., steps=2)).n_forward == 2    # 0 is none


@pytest.mark.parametrize('cache', ['prefix', 'dual'])
@pytest.mark.parametrize('settings', [dict(), dict(cfg_scale=0.7), AT_RANDOM], ids=str)
def test_a_cache_is_exact_if_every_block_has_one_step(cache, settings):
    """Because then nothing in it is stale. Otherwise it still fills every mask and nothing else."""
    exact = fill(prompts(4), generators(4), dict(steps=2, block_length=4, **settings))
    cached = fill(prompts(4), generators(4), dict(steps=2, block_length=4, cache=cache, **settings))
    assert torch.equal(cached.x, exact.x) and cached.n_forward == exact.n_forward

    stale = fill(prompts(4), generators(4), dict(steps=8, block_length=4, cache=cache, **settings)).x
    start, _, prompt = diffusion.canvas(prompts(4), 8, MASK, PAD)
    assert torch.equal(stale[prompt], start[prompt]) and not (stale == MASK).any()


def test_what_a_cache_recomputes():
    columns = diffusion.columns_to_recompute
    assert columns(None, 0, 4, 8) == columns(None, 3, 4, 8) == slice(None)
    assert columns('prefix', 0, 4, 8) == columns('dual', 0, 4, 8) == slice(None)
    assert columns('prefix', 1, 4, 8) == slice(4, None) and columns('dual', 1, 4, 8) == slice(4, 8)


def test_until_end_saves_passes_and_changes_no_text():
    @diffusion.plain
    def model(ids):
        """Want EOS behind the prompt [1], but nowhere else."""
        logits = likes(7)(ids)
        logits[ids[:, 0] == 1, 1, EOS] = 20.
        return logits

    def write(rows, until_end):
        x = torch.tensor([[1] + [MASK] * 8, [2] + [MASK] * 8])[rows]
        params = SamplingParams(block_length=2)
        return generate(model, x, MASK, params, eos_id=EOS, eot_id=EOT, until_end=until_end)

    both = slice(0, 2)
    assert torch.equal(write(both, True).x, write(both, False).x)           # the second row never ends
    assert write(slice(0, 1), False).x.tolist() == [[1, EOS] + [7] * 7]
    out = write(slice(0, 1), True)
    assert out.x.tolist() == [[1, EOS, 7] + [EOS] * 6] and out.n_forward == 2


def test_adjust_changes_the_logits():
    def only_7(logits, x, masked):
        assert len(logits) == masked.sum()
        return torch.full_like(logits, -9.).index_fill(-1, torch.tensor([7]), 9.)

    out = generate(MODEL, masks_after([1], 8), MASK, SamplingParams(), adjust=only_7)
    assert (out.x[0, 1:] == 7).all()


@pytest.mark.parametrize('settings', [dict(), dict(block_length=4), dict(threshold=0.9)], ids=str)
def test_on_step_may_write_a_token_where_it_likes(settings):
    def on_step(x, committed):
        x[:, [2, 6]] = 7

    out = generate(MODEL, masks_after([1], 8), MASK, SamplingParams(**settings), on_step=on_step)
    assert out.x[0, [0, 2, 6]].tolist() == [1, 7, 7]
    assert not (out.x == MASK).any() and out.n_forward > 1


# ----------------------------------------------------------------- variable length, the autoregressive twin


@pytest.mark.parametrize('block_length', [1, 3, 4])
@pytest.mark.parametrize('settings', [dict(), AT_RANDOM, dict(cfg_scale=0.5)], ids=str)
def test_variable_length(block_length, settings):
    """A batch equals single runs. A row ends with the block that holds EOS (here 7), which is kept whole."""
    params = SamplingParams(block_length=block_length, **settings)

    def write(batch, noise):
        return generate_variable_length(MODEL, batch, MASK, 7, params, max_length=12, generator=noise)[0]

    together = write(prompts(), generators(8))
    for i, prompt in enumerate(prompts()):
        assert write([prompt], generators(8)[i:i + 1]) == [together[i]]
        new = together[i][len(prompt):]
        assert together[i] == prompt + new
        assert 7 in new[-block_length:] or len(new) == 12
        assert len(new) % block_length == 0 and 7 not in new[:-block_length]


def test_guidance_in_variable_length_hides_the_prompt_and_no_finished_block(monkeypatch):
    hidden = []
    real = diffusion.guided_logits

    def spy(model, x, positions, prompt, *rest, **options):
        hidden.append(prompt.sum().item())
        return real(model, x, positions, prompt, *rest, **options)

    monkeypatch.setattr(diffusion, 'guided_logits', spy)
    params = SamplingParams(block_length=2, cfg_scale=1.0)
    generate_variable_length(MODEL, [[1, 2, 3]], MASK, None, params, max_length=6)
    assert hidden == [3] * 6


def test_variable_length_stops_when_told():
    params = SamplingParams(block_length=2)
    rows, n_forward = generate_variable_length(
        MODEL, [[1, 2]], MASK, None, params, max_length=20, stop=lambda ids: len(ids) >= 6)
    assert len(rows[0]) == 8 and n_forward == 6
    for block_length in (None, 21):
        with pytest.raises(ValueError, match='block_length must lie in 1..20'):
            params = SamplingParams(block_length=block_length)
            generate_variable_length(MODEL, [[1]], MASK, None, params, max_length=20)


def test_ar_generate_with_a_cache_equals_a_function_without_one():
    model = tiny_model(2, causal=True)
    widths = []
    model.register_forward_pre_hook(lambda model, args: widths.append(args[0].shape[1]))
    prompt = torch.tensor([[1, 2, 3], [4, 5, 6]])
    cached = diffusion.ar_generate(model, prompt, 8, temperature=0.)
    assert widths == [3] + [1] * 7                          # a token costs one position
    plain = diffusion.ar_generate(diffusion.plain(model), prompt, 8, temperature=0.)
    assert torch.equal(cached.x, plain.x) and torch.equal(cached.x[:, :3], prompt)

    # left padding changes nothing, and what is suppressed is not written
    padded = torch.tensor([[0, 0, 1, 2, 3]])
    attention_mask = torch.tensor([[0, 0, 1, 1, 1]])
    out = diffusion.ar_generate(model, padded, 8, temperature=0., attention_mask=attention_mask)
    assert torch.equal(out.x[0, 2:], cached.x[0])
    first = cached.x[0, 3].item()
    other = diffusion.ar_generate(model, prompt[:1], 8, temperature=0., suppress=[first])
    assert not (other.x[0, 3:] == first).any()
