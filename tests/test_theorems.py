"""The formulas of the paper, by enumeration on a table of 27 sequences whose true distribution is known."""

import math
from itertools import permutations, product

import numpy as np
import pytest
import reference
import torch
from helpers import MASK, T, V, seeded, table_model

import diffusion
from diffusion import SamplingParams

ALL = torch.ones(T, dtype=torch.bool)
SEQUENCES = torch.tensor(list(product(range(V), repeat=T)))     # (27, T)
P, MODEL = table_model()
LOG_P = P.flatten().log()                                       # (27,) in the order of SEQUENCES


@diffusion.plain
def INCONSISTENT(ids):
    """Predict from one table if the second token is hidden, and from another one if it is visible."""
    _, other = table_model(1)
    return torch.where((ids[:, 1] == MASK)[:, None, None], MODEL(ids), other(ids))


# --------------------------------------------------------------------------------------- 1. noise and masks


@pytest.mark.parametrize('fixed_count', [False, True])
def test_a_share_t_of_the_maskable_tokens_is_hidden(fixed_count):
    x0 = torch.zeros(4000, 50, dtype=torch.long)
    t = torch.linspace(0.05, 1, 4000)
    maskable = (torch.arange(50) % 2 == 0).expand_as(x0)
    xt, masked = diffusion.forward_process(x0, t, 7, maskable, fixed_count=fixed_count, generator=seeded(0))
    assert torch.equal(xt == 7, masked) and not masked[:, 1::2].any()

    share = masked[:, ::2].float().mean(1)
    if fixed_count:
        assert torch.equal(masked.sum(1), (t.double() * 25).ceil().long())
    else:
        deviation = (share - t) / (t * (1 - t) / 25).sqrt().clamp(min=0.02)
        assert abs((share - t).mean()) < 0.005 and deviation.std() < 1.2
    # no position is preferred
    share = masked[:, ::2].float().mean(0)
    assert (share - share.mean()).abs().max() < 0.03


def test_a_mask_token_in_the_data_is_not_noise():
    x0 = torch.tensor([[7, 1, 2, 7]])
    maskable = torch.tensor([[False, True, True, False]])
    xt, masked = diffusion.forward_process(x0, torch.tensor([0.5]), 7, maskable, fixed_count=True)
    assert masked.sum() == 1 and not masked[0, 0] and not masked[0, 3] and xt[0, 0] == 7


@pytest.mark.parametrize('B', [1, 8, 100])
def test_stratified_t_has_one_value_in_each_slice_and_is_uniform_in_every_row(B):
    t = torch.stack([diffusion.sample_t(B, 0.0, generator=seeded(i)) for i in range(500)])
    assert (t > 0).all() and (t <= 1).all()
    slices = ((1 - t.double()) * B).floor().long().clamp(0, B - 1)
    assert (slices.sort(1).values == torch.arange(B)).float().mean() > 0.999            # up to rounding
    assert (t.mean(0) - 0.5).abs().max() < 0.07                                         # 5 sigma of 500 draws


def test_independent_and_logit_normal_t():
    t = diffusion.sample_t(10000, 0.01, stratified=False, generator=seeded(1))
    assert t.min() > 0.01 and abs(t.mean() - 0.505) < 0.015
    t = diffusion.sample_t(10000, 0.0, logit_normal=0.5, generator=seeded(1)).double()
    z = (t.log() - (1 - t).log()) / 0.5
    assert abs(z.mean()) < 0.02 and abs(z.std() - 1) < 0.02


def test_noise_of_a_row_depends_on_its_key_alone():
    noise = diffusion.row_noise(1, 5, range(4), 6)
    assert torch.equal(diffusion.row_noise(1, 5, [2, 3], 6), noise[2:])
    others = diffusion.row_noise(2, 5, range(4), 6), diffusion.row_noise(1, 6, range(4), 6)
    assert len(torch.cat((noise, *others)).unique()) == 3 * noise.numel()


# ---------------------------------------------------------------------------------------------- 2. the loss


@pytest.mark.parametrize('fixed_count', [False, True])
def test_the_loss_over_all_masks_is_minus_log_p(fixed_count):
    """The expectations of Eq. 3 and of its count form (Eq. 14), by enumeration instead of random masks."""
    masks, probability = diffusion.all_masks(ALL)     # (7, T), (7,) the probability of each mask under Eq. 14
    if not fixed_count:
        # int_0^1 t^l (1-t)^(T-l) / t dt = B(l, T-l+1) is what Eq. 3 gives to a mask of l tokens
        n_hidden = masks.sum(1).tolist()
        beta = [math.gamma(n) * math.gamma(T - n + 1) / math.gamma(T + 1) for n in n_hidden]
        probability = torch.tensor(beta, dtype=torch.float64)

    t = torch.ones(len(masks), dtype=torch.float64)         # 1/t is in the integral already
    weights = diffusion.loss_weights(torch.ones_like(masks), masks, t, fixed_count=fixed_count, normalizer=1)
    for x0, log_p in zip(SEQUENCES, LOG_P):
        x0 = x0.expand_as(masks)
        xt = torch.where(masks, MASK, x0)
        batch = diffusion.masked_batch(x0, xt, masks, probability * weights)
        assert abs(diffusion.diffusion_loss(MODEL, batch) + log_p) < 1e-9


@pytest.mark.parametrize('form, expected', [
    (dict(normalize='token', normalizer=4), [2 / 4, 4 / 4]),                        # 1/(t b L)
    (dict(normalize='sequence', normalizer=2), [2 / 3 / 2, 4 / 1 / 2]),             # 1/(t b L')
    (dict(fixed_count=True, normalizer=4), [3 / 2 / 4, 1 / 1 / 4])], ids=str)       # L/(l b L)
def test_weights_of_parts_of_a_batch_are_those_of_the_whole(form, expected):
    """'token' makes a mean over all maskable tokens, 'sequence' first one over each row's own."""
    maskable = torch.tensor([[True, True, True], [False, False, True]])
    masked = torch.tensor([[True, False, True], [False, False, True]])
    t = torch.tensor([0.5, 0.25])
    parts = [diffusion.loss_weights(maskable[[i]], masked[[i]], t[[i]], **form) for i in range(2)]
    assert torch.cat(parts).tolist() == pytest.approx(expected)
    form = {**form, 'normalizer': None}
    assert diffusion.loss_weights(maskable, masked, t, **form).tolist() == pytest.approx(expected)
    with pytest.raises(AssertionError, match='batch'):
        diffusion.loss_weights(maskable, masked, t, normalize='batch')


# --------------------------------------------------------------------------------- 3. likelihood and scores


def test_the_bound_is_the_mean_over_all_orders_and_tight_if_they_agree():
    """Eq. 15: log p is the log of a mean over all orders to write in, and the bound the mean of the logs."""
    gaps = []
    for x0, log_p in zip(SEQUENCES, LOG_P):
        for model in (MODEL, INCONSISTENT):
            bound = diffusion.log_likelihood(model, x0, ALL, MASK, mc_num=7)           # 2^3 - 1 masks are all
            orders = [reference.log_likelihood_ordered(model, x0, ALL, MASK, order)
                      for order in permutations(range(T))]
            orders = torch.tensor(orders, dtype=torch.float64)
            assert abs(orders.mean() - bound) < 1e-9
            if model is MODEL:
                assert (orders - log_p).abs().max() < 1e-9
        gaps.append(orders.exp().mean().log() - bound)
    assert min(gaps) > -1e-9 and max(gaps) > 0.1


def test_eq6_is_far_less_noisy_than_eq5():
    x0 = torch.tensor([0, 1, 2])
    deviation = {}
    for estimate in (diffusion.log_likelihood, reference.log_likelihood_bernoulli):
        draws = [estimate(MODEL, x0, ALL, MASK, mc_num=6, generator=seeded(i)) for i in range(500)]
        deviation[estimate] = np.std(draws)
        assert abs(np.mean(draws) - P[0, 1, 2].log()) < 4 * np.std(draws) / 500 ** 0.5
    assert deviation[reference.log_likelihood_bernoulli] > 2 * deviation[diffusion.log_likelihood]


def test_the_number_of_masks_is_exactly_uniform():
    """The official draw rounds half to even. With L = 8 and 16 masks, some numbers come thrice as often."""
    eight, two = torch.ones(8, dtype=torch.bool), torch.ones(2, dtype=torch.bool)
    for i in range(100):
        n_hidden = diffusion.draw_masks(eight, 16, seeded(i)).sum(1)
        assert n_hidden.bincount(minlength=9).tolist() == [0] + [2] * 8         # stratified: each comes twice
    # if there are fewer masks than numbers, too
    single = [diffusion.draw_masks(two, 1, seeded(i)).sum().item() for i in range(400)]
    assert abs(single.count(1) - 200) < 40

    official = torch.zeros(9)
    for first in range(1, 9):
        x = torch.round(torch.linspace(first, first + 15 * 8 / 16, 16)).long()
        official += torch.bincount((x - 1) % 8 + 1, minlength=9)
    assert official[1:].max() == 3 * official[1:].min()


def test_log_probabilities_are_never_narrower_than_float32():
    logits = torch.tensor([[3.0, 1.0, -2.0]])
    exact = logits.double().log_softmax(-1)[:, 1]
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        logp = diffusion.log_prob(logits.to(dtype), torch.tensor([1]))
        assert torch.allclose(logp.double(), exact, rtol=1e-6) and logp.dtype != torch.bfloat16


def test_a_likelihood_may_be_conditional():
    x0 = torch.tensor([2, 1, 1])
    value = diffusion.log_likelihood(MODEL, x0, torch.tensor([False, True, True]), MASK)
    assert abs(value - (P[2, 1, 1] / P[2].sum()).log()) < 1e-9
    with pytest.raises(ValueError, match='no position is maskable'):
        diffusion.log_likelihood(MODEL, x0, ~ALL, MASK)


def test_confidence_score_follows_the_most_probable_token():
    for x0, log_p in zip(SEQUENCES, LOG_P):
        assert abs(diffusion.confidence_score(MODEL, x0, ALL, MASK) - log_p) < 1e-9
        hidden = [0, 1, 2]
        total = 0.
        while hidden:
            xt = x0.clone()
            xt[hidden] = MASK
            logp = INCONSISTENT(xt[None])[0].log_softmax(-1)[range(T), x0][hidden]
            total += logp.max()
            del hidden[logp.argmax()]
        assert abs(diffusion.confidence_score(INCONSISTENT, x0, ALL, MASK) - total) < 1e-9


def test_confidence_score_shows_the_end_and_does_not_score_it():
    @diffusion.plain
    def knows_the_end(ids):
        assert ids[0, T:].tolist() == [4]
        return torch.zeros(*ids.shape, V + 2)

    value = diffusion.confidence_score(knows_the_end, SEQUENCES[0], ALL, MASK, eos_id=4)
    assert math.isclose(value, -T * math.log(V + 2), rel_tol=1e-6)


# ------------------------------------------------------------------------------------------ 4. the samplers


def total_variation(samples, p=P):
    """Return the distance between the frequencies of samples (N, T) and the distribution p."""
    code = (samples * torch.tensor([9, 3, 1])).sum(1)
    frequency = torch.bincount(code, minlength=27).double() / len(samples)
    return 0.5 * (frequency - p.flatten()).abs().sum().item()


N = 20000
TRIALS = [SEQUENCES[torch.multinomial(P.flatten(), N, True, generator=seeded(i))] for i in range(20)]
NOISE = max(map(total_variation, TRIALS))                       # the largest distance of N true samples


@pytest.mark.parametrize('settings, samples_the_joint', [
    (dict(remasking='random'), True),
    (dict(remasking='random', block_length=1), True),       # from left to right
    (dict(remasking='random', steps=1), False),             # all tokens at once are independent
    (dict(remasking='low_confidence'), False),              # seeks the mode
], ids=str)
def test_what_samples_the_joint_distribution(settings, samples_the_joint):
    x = torch.full((N, T), MASK)
    params = SamplingParams(temperature=1.0, **settings)
    distance = total_variation(diffusion.generate(MODEL, x, MASK, params, generator=seeded(5)).x)
    assert distance < 1.5 * NOISE if samples_the_joint else distance > 5 * NOISE


@pytest.mark.parametrize('block_length', [1, 3])
def test_growing_blocks_sample_the_joint_distribution(block_length):
    """On a canvas that grows, the model must know its length, which a table of all prefixes does."""
    def logits(ids):
        W = ids.shape[1]
        prefixes = torch.tensor(list(product(range(V), repeat=W)))                      # (V^W, W)
        p = P.reshape(len(prefixes), -1).sum(1)             # of the first W tokens
        agrees = ((ids[:, None] == prefixes) | (ids[:, None] == MASK)).all(-1)
        onehot = torch.nn.functional.one_hot(prefixes, V + 1).double()
        return torch.einsum('bs,stv->btv', agrees * p, onehot).log()

    params = SamplingParams(block_length=block_length, temperature=1.0, remasking='random')
    rows, n_forward = diffusion.generate_variable_length(
        diffusion.plain(logits), [[]] * N, MASK, None, params, max_length=T, generator=seeded(1))
    assert n_forward == T and total_variation(torch.tensor(rows)) < 1.5 * NOISE


def test_gumbel_argmax_samples_the_softmax():
    n = 40000
    logits = torch.tensor([2.0, 0.0, -1.0, 1.0, -math.inf]).expand(n, -1)
    for temperature in (0.5, 1.0, 2.0):
        u = diffusion.uniform(torch.ones(n, 1, dtype=torch.bool), 5, seeded(0))
        assert u.dtype == torch.float64                     # in float32 the tail of the noise is cut off
        drawn = diffusion.gumbel_argmax(logits, temperature, u)
        frequency = torch.bincount(drawn, minlength=5) / n
        assert (frequency - (logits[0] / temperature).softmax(-1)).abs().max() < 0.012
    # a tiny temperature takes the most probable token, and does not overflow
    assert (diffusion.gumbel_argmax(logits, 1e-320, u) == 0).all()


# ------------------------------------------------------------------------------- 5. the autoregressive twin


@diffusion.plain
def next_token(ids):
    """Return next-token logits of the table. V stands for the beginning of the sequence."""
    out = torch.zeros(*ids.shape, V, dtype=torch.float64)
    for i in range(ids.shape[1]):
        p = P.reshape(*[V] * (i + 1), -1).sum(-1)           # of the first i + 1 tokens
        out[:, i] = p[tuple(ids[:, 1:i + 1].T)].log()
    return out


def test_ar_log_likelihood_and_loss_are_the_chain_rule():
    for x0, log_p in zip(SEQUENCES, LOG_P):
        # with bos_id all tokens are predicted, and otherwise all but the first
        whole = torch.cat((torch.tensor([V]), x0))
        but_the_first = torch.arange(T + 1) > 0
        for x, maskable, begin in ((x0, ALL, dict(bos_id=V)), (whole, but_the_first, dict())):
            assert abs(diffusion.ar_log_likelihood(next_token, x, maskable, **begin) - log_p) < 1e-9
            assert abs(T * diffusion.ar_loss(next_token, x[None], maskable[None], **begin) + log_p) < 1e-6


def test_ar_generate_samples_the_joint_distribution():
    out = diffusion.ar_generate(next_token, torch.full((N, 1), V), T, generator=seeded(0))
    assert total_variation(out.x[:, 1:]) < 1.5 * NOISE and out.n_forward == T
