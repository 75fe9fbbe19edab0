"""The formulas of the paper, checked by enumeration on a table of 27 sequences whose true distribution is known."""

import math
from itertools import permutations, product

import numpy as np
import pytest
import torch
from helpers import MASK, T, V, table_model

import diffusion

ALL = torch.ones(T, dtype=torch.bool)
SEQUENCES = torch.tensor(list(product(range(V), repeat=T)))


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope='module')
def table():
    return table_model()


def test_eq6_over_all_masks_is_the_log_probability(table):
    p, model = table
    for x0 in SEQUENCES:
        value = diffusion.log_likelihood(model, x0, ALL, MASK, mc_num=7)                # 2^3 - 1 masks: all of them
        assert abs(value - p[tuple(x0)].log().item()) < 1e-9


def test_the_fit_of_a_gap_is_the_log_probability_of_it_and_its_neighbours(table):
    p, model = table
    for x0 in SEQUENCES:
        fit = diffusion.fit(model, [int(x0[0]), MASK, int(x0[2])], x0.tolist(), MASK)           # they are all there is
        assert abs(3 * fit - p[tuple(x0)].log().item()) < 1e-9
    seen = []

    def watched(ids):
        seen.append((ids == 9).any(0))
        return torch.zeros(*ids.shape, 10)

    diffusion.fit(watched, [1, 2, 3, 4, 9, 9, 5, 6, 7, 8], list(range(10)), 9)
    assert torch.cat(seen).view(-1, 10).any(0).nonzero()[:, 0].tolist() == [2, 3, 4, 5, 6, 7, 9]       # (9 is a 9)


def test_eq3_by_its_integral_is_the_log_probability(table):
    """int_0^1 t^l (1-t)^(L-l) / t dt = B(l, L-l+1): the weight that Eq. 3 gives to each mask of l tokens."""
    p, model = table
    for x0 in SEQUENCES:
        total = 0.0
        for bits in list(product([False, True], repeat=T))[1:]:
            masked = torch.tensor([bits])
            l = sum(bits)                                                               # noqa: E741
            beta = math.gamma(l) * math.gamma(T - l + 1) / math.gamma(T + 1)
            loss = diffusion.diffusion_loss(model, x0[None], ALL[None], MASK, t=torch.ones(1).double(), masked=masked)
            total += beta * (loss.item() * T)                                           # weight 1/t moved into beta
        assert abs(-total - p[tuple(x0)].log().item()) < 1e-9


def test_eq3_and_its_count_form_have_the_same_mean(table):
    _, model = table
    x0 = torch.tensor([[2, 0, 1]]).expand(20000, -1)
    losses = {}
    for exact in (False, True):
        values = []
        for i in range(20):
            t = diffusion.sample_t(20000, eps=0, stratified=False, generator=seeded(i))
            _, masked = diffusion.forward_process(x0, t, MASK, generator=seeded(100 + i), exact=exact)
            loss = diffusion.diffusion_loss(model, x0, ALL.expand_as(x0), MASK, t=t, masked=masked, exact=exact)
            values.append(loss.item())
        losses[exact] = np.array(values)
    spread = math.hypot(*(v.std() / 20 ** 0.5 for v in losses.values()))
    assert abs(losses[False].mean() - losses[True].mean()) < 4 * spread
    assert losses[False].std() > 2 * losses[True].std()                               # and the count form is less noisy


def test_eq6_is_far_less_noisy_than_eq5(table):
    p, model = table
    x0, logp = torch.tensor([0, 1, 2]), p[0, 1, 2].log().item()
    draws = {f: np.array([f(model, x0, ALL, MASK, mc_num=6, generator=seeded(i)) for i in range(500)])
             for f in (diffusion.log_likelihood, diffusion.log_likelihood_eq5)}
    for values in draws.values():
        assert abs(values.mean() - logp) < 4 * values.std() / 500 ** 0.5
    assert draws[diffusion.log_likelihood_eq5].std() > 2 * draws[diffusion.log_likelihood].std()


def test_counts_of_eq6_are_exactly_uniform():
    """The official draw rounds half to even: with L = 8 and 16 rows some counts come thrice as often as others."""
    L, seen = 8, np.zeros(9)

    def count(ids):
        seen[:] += np.bincount((ids == MASK).sum(1).numpy(), minlength=9)
        return torch.zeros(*ids.shape, V + 1)

    for i in range(400):
        diffusion.log_likelihood(count, torch.zeros(L, dtype=torch.long), torch.ones(L, dtype=torch.bool), MASK,
                                 mc_num=16, generator=seeded(i))
    assert seen[0] == 0 and seen[1:].sum() == 6400
    assert np.abs(seen[1:] / 800 - 1).max() < 0.05                            # stratified: far inside the binomial 11 %
    official = np.zeros(9)
    for k in range(1, L + 1):
        x = torch.round(torch.linspace(k, k + 15 * L / 16, 16)).long()
        official += np.bincount((x - 1) % L + 1, minlength=9)
    assert official[1:].max() == 3 * official[1:].min()


def test_chain_rule_along_every_order(table):
    p, model = table
    x0 = torch.tensor([1, 2, 0])
    for order in permutations(range(T)):
        value = diffusion.log_likelihood_ordered(model, x0, ALL, MASK, order)
        assert abs(value - p[1, 2, 0].log().item()) < 1e-9
    with pytest.raises(ValueError, match='each once'):
        diffusion.log_likelihood_ordered(model, x0, ALL, MASK, [0, 0, 1])


def test_conditional_likelihood(table):
    p, model = table
    maskable = torch.tensor([False, True, True])
    value = diffusion.log_likelihood(model, torch.tensor([2, 1, 1]), maskable, MASK)
    assert abs(value - (p[2, 1, 1] / p[2].sum()).log().item()) < 1e-9


def test_guided_likelihood_by_enumeration(table):
    _, model = table
    x0, maskable, w = torch.tensor([2, 1, 1]), torch.tensor([False, True, True]), 0.7
    total = 0.0
    for bits in ((0, 1), (1, 0), (1, 1)):
        masked = torch.tensor([False, *map(bool, bits)])
        xt = torch.where(masked, MASK, x0)[None]
        guided = (1 + w) * model(xt)[..., :V] - w * model(torch.where(maskable, xt, MASK))[..., :V]
        logp = guided.log_softmax(-1)[0, masked].gather(-1, x0[masked][:, None]).sum().item()
        total += logp * (2 / sum(bits)) / (2 * math.comb(2, sum(bits)))
    def guarded(ids):
        return model(ids).clamp(min=-1e300)                                           # -inf - -inf of the [MASK] column
    value = diffusion.log_likelihood(guarded, x0, maskable, MASK, cfg_scale=w)
    assert abs(value - total) < 1e-9


def test_confidence_score_by_brute_force(table):
    p, model = table
    for x0 in SEQUENCES:
        total, masked = 0.0, ALL.clone()
        while masked.any():
            logp = model(torch.where(masked, MASK, x0)[None])[0].gather(-1, x0[:, None])[:, 0]
            best = max(masked.nonzero()[:, 0].tolist(), key=lambda i: logp[i].item())
            total += logp[best].item()
            masked[best] = False
        assert abs(diffusion.confidence_score(model, x0, ALL, MASK) - total) < 1e-9
        assert abs(total - p[tuple(x0)].log().item()) < 1e-9                       # consistent table: any order will do


def law(samples):
    """Frequencies of the 27 sequences in samples (N, T)."""
    code = (samples * torch.tensor([9, 3, 1])).sum(1)
    return torch.bincount(code, minlength=27).double() / len(samples)


def total_variation(samples, p):
    return 0.5 * (law(samples) - p.flatten()).abs().sum().item()


def noise_floor(p, n, runs=20):
    """The total variation that n true samples show, at its largest of some runs."""
    return max(total_variation(SEQUENCES[torch.multinomial(p.flatten(), n, True, generator=seeded(i))], p)
               for i in range(runs))


def sample(model, n=20000, **settings):
    x = torch.full((n, T), MASK)
    return diffusion.generate(model, x, MASK, temperature=1.0, generator=seeded(5), **settings).x


def test_random_remasking_one_token_at_a_time_samples_the_joint(table):
    p, model = table
    floor = noise_floor(p, 20000)
    assert total_variation(sample(model, steps=T, remasking='random'), p) < 1.5 * floor
    assert total_variation(sample(model, steps=T, remasking='random', block_length=1), p) < 1.5 * floor  # left to right
    assert total_variation(sample(model, steps=1, remasking='random'), p) > 5 * floor       # independent tokens
    assert total_variation(sample(model, steps=T), p) > 5 * floor                           # low-confidence seeks modes


def test_blocks_that_grow_sample_the_joint_left_to_right():
    """On a growing canvas the model must know its length; a table over prefixes does, and gives back the joint."""
    p, _ = table_model(3)

    def model(ids):
        W = ids.shape[1]
        q = p.sum(dim=tuple(range(W, T))) if W < T else p                           # the marginal of the first W tokens
        out = torch.zeros(*ids.shape, V + 1, dtype=torch.float64)
        prefixes = torch.tensor(list(product(range(V), repeat=W)))
        agrees = ((ids[:, None] == prefixes) | (ids[:, None] == MASK)).all(-1)
        posterior = agrees * q.flatten()
        for v in range(V):
            out[..., v] = torch.einsum('bs,st->bt', posterior, (prefixes == v).double())
        return (out / posterior.sum(1)[:, None, None]).log()

    for block_length in (1, 3):
        ids, n_forward = diffusion.generate_variable_length(
            model, [[]] * 20000, MASK, None, block_length=block_length, steps_per_block=block_length, max_length=T,
            temperature=1.0, remasking='random', generator=seeded(1))
        assert n_forward == T
        assert total_variation(torch.tensor(ids), p) < 1.5 * noise_floor(p, 20000)


def test_forward_process_hides_each_token_with_probability_t():
    x0, t = torch.zeros(4000, 50, dtype=torch.long), torch.linspace(0.05, 1, 4000)
    maskable = torch.arange(50) % 2 == 0
    xt, masked = diffusion.forward_process(x0, t, 7, maskable.expand_as(x0), seeded(0))
    assert not masked[:, 1::2].any() and torch.equal(xt == 7, masked)
    share = masked[:, ::2].float().mean(1)
    assert abs((share - t).mean()) < 0.005 and ((share - t) / (t * (1 - t) / 25).sqrt().clamp(min=0.02)).std() < 1.2
    _, masked = diffusion.forward_process(x0, t, 7, maskable.expand_as(x0), seeded(0), exact=True)
    assert torch.equal(masked.sum(1), (t.double() * 25).ceil().long())
    assert (masked[:, ::2].float().mean(0) - masked[:, ::2].float().mean()).abs().max() < 0.03  # no preferred position


def test_a_natural_mask_token_is_not_noise():
    x0 = torch.tensor([[7, 1, 2, 7]])
    maskable = torch.tensor([[False, True, True, False]])
    xt, masked = diffusion.forward_process(x0, torch.tensor([0.5]), 7, maskable, exact=True)
    assert masked.sum() == 1 and xt[0, 0] == 7 and not masked[0, 0] and not masked[0, 3]


def test_stratified_t_is_uniform_in_every_row_and_even_in_every_part():
    for B in (1, 2, 8, 32, 100):
        t = torch.stack([diffusion.sample_t(B, 0.0, generator=seeded(i)) for i in range(500)])
        assert (t > 0).all() and (t <= 1).all()
        slices = ((1 - t.double()) * B).floor().long().clamp(0, B - 1).sort(1).values
        assert (slices == torch.arange(B)).float().mean() > 0.999                    # one in each slice, up to rounding
        assert (t.mean(0) - 0.5).abs().max() < 0.07                                     # 5 sigma of 500 uniform draws
    parts = t[:, :100].unflatten(1, (10, 10)).mean(2)                                   # micro-batches of 10
    assert parts.std() < 0.045 < 0.08 < torch.rand(500, 100, generator=seeded(0)).unflatten(1, (10, 10)).mean(2).std()
    iid = diffusion.sample_t(10000, 0.01, stratified=False, generator=seeded(1))
    assert 0.01 < iid.min() and abs(iid.mean() - 0.505) < 0.015


def test_gumbel_argmax_samples_the_softmax():
    logits = torch.tensor([2.0, 0.0, -1.0, 1.0, -math.inf]).expand(40000, -1)
    for temperature in (0.5, 1.0, 2.0):
        got = torch.bincount(diffusion.gumbel_argmax(logits, temperature, seeded(0)), minlength=5) / 40000
        want = (logits[0] / temperature).softmax(-1)
        assert (got - want).abs().max() < 0.012
    assert (diffusion.gumbel_argmax(logits, 0) == 0).all()


def test_ar_baseline_is_the_chain_rule():
    p, _ = table_model(1)

    def causal(ids):
        """Next-token logits of the same table; V stands for the start of the sequence."""
        out = torch.zeros(*ids.shape, V, dtype=torch.float64)
        for b, row in enumerate(ids.tolist()):
            for i in range(len(row)):
                prefix = tuple(row[1:i + 1])
                out[b, i] = p[prefix].reshape(V, -1).sum(1).log()
        return out

    for x0 in SEQUENCES[::5]:
        value = diffusion.ar_log_likelihood(causal, x0, ALL, bos_id=V)
        assert abs(value - p[tuple(x0)].log().item()) < 1e-9
        loss = diffusion.ar_loss(causal, x0[None], ALL[None], bos_id=V).item()
        assert abs(loss * T + value) < 1e-5
    start = torch.full((4000, 1), V)
    out = diffusion.ar_generate(causal, start, T, generator=seeded(0)).x[:, 1:]
    assert total_variation(out, p) < 1.5 * noise_floor(p, 4000)
    with pytest.raises(ValueError, match='bos_id'):
        diffusion.ar_log_likelihood(causal, SEQUENCES[0], ALL)
