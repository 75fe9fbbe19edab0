"""The checks of tests/exercises accept right answers, and name the mistake in each typical wrong one."""

import itertools
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent / 'exercises'))

import checks  # noqa: E402
from checks import log_p  # noqa: E402

import diffusion  # noqa: E402

# ------------------------------------------------------ right answers, most of them by the project's own code


def loss(model, x0, xt, masked, t):
    everything = torch.ones_like(masked)
    weights = diffusion.loss_weights(everything, masked, t)
    batch = diffusion.masked_batch(x0, xt, masked, weights)
    return diffusion.diffusion_loss(diffusion.plain(model), batch)


def hide(maskable, n, u):
    return u.masked_fill(~maskable, 2).argsort(1).argsort(1) < n[:, None]


def masked_sums(model, x0, masks, mask_id):
    """Return the log-probability of the hidden tokens, for each mask (K,)."""
    logits = model(torch.where(masks, mask_id, x0))
    return torch.where(masks, log_p(logits, x0.expand_as(masks)), 0.0).sum(1)


def bound(model, x0, masks, mask_id):
    # diffusion.log_likelihood does the same, with masks that it draws itself
    return (len(x0) / masks.sum(1) * masked_sums(model, x0, masks, mask_id)).mean()


def step(model, x, mask_id, n, generator):
    masked = x == mask_id
    params = diffusion.SamplingParams(temperature=1.0, remasking='random')
    guess, confidence = diffusion.propose(model(x)[masked], masked, params, [mask_id], [], generator)
    x, _ = diffusion.commit(x, masked, guess, confidence, [n] * len(x))
    return x


def most_confident(probabilities):
    return probabilities.index(max(probabilities))


def law(model, mask_id, T, V, choose=most_confident, drawn=True):
    result = torch.zeros((V,) * T, dtype=torch.float64)

    def go(x, chance):
        masks = [i for i in range(T) if x[i] == mask_id]
        if not masks:
            result[tuple(x)] += chance
            return
        p = model(torch.tensor([x]))[0].softmax(-1).tolist()
        every_token = [range(V) for i in masks]
        best_token = [[most_confident(p[i])] for i in masks]
        for guess in itertools.product(*(every_token if drawn else best_token)):
            confidence = [p[i][token] for i, token in zip(masks, guess)]
            k = choose(confidence)
            after = list(x)
            after[masks[k]] = guess[k]
            go(after, chance * (math.prod(confidence) if drawn else 1.0))

    go([mask_id] * T, 1.0)
    return result


def counts(n_masked, steps):
    return diffusion.num_transfer_tokens(torch.tensor([n_masked]), steps)[0].tolist()


def guide(conditional, unconditional, w):
    return unconditional + (w + 1) * (conditional - unconditional)


def write(keys, new, pos):
    return keys.index_copy(2, pos, new)


def bits(nats_per_token, n_tokens, text):
    return nats_per_token * n_tokens / math.log(2) / len(text.encode())


def cost_table(h):
    T = len(h)
    return [[(b - a) * h[min(a, T - 1)] - sum(h[a:b]) for b in range(T + 1)] for a in range(T + 1)]


def schedule(cost, T, k):
    best = {(0, 0): (0.0, [])}                              # steps, tokens written -> cost, sizes
    for j in range(1, k + 1):
        for b in range(j, T + 1):
            ways = []
            for a in range(b):
                if (j - 1, a) in best:
                    before, sizes = best[j - 1, a]
                    ways.append((before + cost[a][b], [*sizes, b - a]))
            best[j, b] = min(ways)
    return best[k, T][1]


def price(cost, sizes):
    ends = list(itertools.accumulate(sizes))
    return sum(cost[end - size][end] for size, end in zip(sizes, ends))


def attention_mask(lengths):
    segment = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return segment[:, None] == segment


RIGHT = dict(
    ex1_loss=loss, ex2_hide=hide, ex3_bound=bound, ex4_step=step, ex5_law=law, ex6_counts=counts, ex6_guide=guide,
    ex7_write=write, ex8_bits_per_byte=bits, ex9_cost=cost_table, ex9_schedule=schedule, ex10_attention_mask=attention_mask)


@pytest.mark.parametrize('name', checks.CHECKS)
def test_the_right_answer_passes(name):
    checks.CHECKS[name](SimpleNamespace(**RIGHT))


def test_the_stubs_ask_for_these_functions_and_are_empty():
    stubs = {name: f for name, f in vars(exercises).items() if name.startswith('ex')}
    assert stubs.keys() == RIGHT.keys()
    for f in stubs.values():
        with pytest.raises(NotImplementedError):
            f(*[None] * f.__code__.co_argcount)


# ------------------------------------------------------ wrong answers, and what must be said about each


def tokens(masked, x0):
    return masked.numel()


def rows(masked, x0):
    return len(x0)


def masked_tokens(masked, x0):
    return masked.sum()


def wrong_loss(weight=lambda t: 1 / t, divide_by=tokens, sign=-1, only_masked=True):
    """Make a version of Eq. 3 with some part of it changed."""
    def wrong(model, x0, xt, masked, t):
        logp = log_p(model(xt), x0) * weight(t)[:, None]
        if only_masked:
            logp = torch.where(masked, logp, 0.0)
        return sign * logp.sum() / divide_by(masked, x0)
    return wrong


def loss_of_next_token(model, x0, xt, masked, t):
    logp = torch.where(masked[:, 1:], log_p(model(xt)[:, :-1], x0[:, 1:]), 0.0)
    return -(logp / t[:, None]).sum() / masked.numel()


def loss_of_logits(model, x0, xt, masked, t):
    logits = model(xt).gather(-1, x0[..., None])[..., 0]
    return -(torch.where(masked, logits, 0.0) / t[:, None]).sum() / masked.numel()


def loss_by_row(model, x0, xt, masked, t):
    logp = torch.where(masked, log_p(model(xt), x0), 0.0)
    return -(logp.sum(1) / masked.sum(1).clamp(min=1) / t).mean()


def wrong_step(order='random', token='drawn', in_place=False, one_less=False):
    """Make a version of a step with some part of it changed."""
    def wrong(model, x, mask_id, n, generator):
        masked = x == mask_id
        logits = model(x)
        p = logits.softmax(-1)
        if token == 'too sharp':
            p = p ** 1.5
        guess = torch.multinomial(p.flatten(0, 1), 1, generator=generator).view(x.shape)
        if token == 'most probable':
            guess = p.argmax(-1)
        if token == 'same noise':
            gumbel = torch.rand(p.shape[-1], generator=generator).log().neg().log().neg()
            guess = (logits + gumbel).argmax(-1)

        priority = torch.rand(x.shape, generator=generator)
        if order == 'confidence':
            priority = p.gather(-1, guess[..., None])[..., 0]
        if order == 'left to right':
            priority = -torch.arange(x.shape[1]).expand(x.shape).float()
        rank = priority.masked_fill(~masked, -2 * x.shape[1]).argsort(1, descending=True).argsort(1)
        new = torch.where(masked & (rank < n - one_less), guess, x)
        return x.copy_(new) if in_place else new
    return wrong


def step_over_visible(model, x, mask_id, n, generator):
    """Take a step that is right while n masks are left."""
    guess = torch.multinomial(model(x).softmax(-1).flatten(0, 1), 1, generator=generator).view(x.shape)
    noise = torch.rand(x.shape, generator=generator).masked_fill(x != mask_id, 2)
    return torch.where(noise.argsort(1).argsort(1) < n, guess, x)


def fewer_steps(cost, T, k):
    """Return the cheapest schedule of at most k steps."""
    return min((schedule(cost, T, j) for j in range(1, k + 1)), key=lambda sizes: price(cost, sizes))


# what is wrong -> the function, what the check must say (a regular expression)
WRONG = {
    'ex1_loss': [
        (wrong_loss(weight=torch.ones_like, divide_by=masked_tokens), 'mean over the masked tokens, without 1/t'),
        (wrong_loss(divide_by=masked_tokens), 'Eq. 3 divides by all tokens'),
        (wrong_loss(weight=lambda t: (1 / t.mean()).expand(len(t))), 'one t for the whole batch'),
        (wrong_loss(weight=lambda t: 1 / (1 - t)), r'not 1/\(1 - t\)'),
        (wrong_loss(weight=lambda t: t), 'not t'),
        (wrong_loss(divide_by=rows), 'number of rows only'),
        (wrong_loss(divide_by=lambda *_: 1), 'a sum'),
        (wrong_loss(only_masked=False), 'counts visible tokens'),
        (wrong_loss(sign=1), 'the sign'),
        (loss_of_next_token, 'predicts the next token'),
        (loss_of_logits, 'log_softmax'),
        (loss_by_row, 'by its number of masked tokens'),
        (lambda model, x0, xt, masked, t: loss(model, x0, x0, masked, t), 'x0 holds the answers')],
    'ex2_hide': [
        (lambda m, n, u: u.argsort(1).argsort(1) < n[:, None], 'hides what is not maskable'),
        (lambda m, n, u: m & (u < (n / m.sum(1))[:, None]), 'only on average'),
        (lambda m, n, u: u.masked_fill(~m, 2).argsort(1) < n[:, None], 'argsort once more'),
        (lambda m, n, u: m & (u.argsort(1).argsort(1) < n[:, None]), 'take up ranks'),
        (lambda m, n, u: m & (m.cumsum(1) <= n[:, None]), 'always the same positions'),
        (lambda m, n, u: hide(m, n + 1, u), r'not n\[b\]'),
        (lambda m, n, u: hide(m, n, u ** torch.arange(1, 6)), 'equally likely')],
    'ex3_bound': [
        (lambda *a: -bound(*a), 'the sign'),
        (lambda *a: masked_sums(*a).mean(), 'T/l is missing'),
        (lambda *a: (masked_sums(*a) / a[2].sum(1)).mean(), 'of one token'),
        (lambda *a: masked_sums(*a).sum() / a[2].sum() * 3, 'not the mean of the ratios'),
        (lambda *a: bound(*a) * len(a[2]), 'a sum over the masks'),
        (lambda *a: (masked_sums(*a) * a[2].sum(1) / 3).mean(), 'not l/T')],
    'ex4_step': [
        (wrong_step(token='most probable'), 'most probable token'),
        (wrong_step(order='confidence'), 'not depend on the confidence'),
        (wrong_step(order='left to right'), 'always fills position 0'),
        (wrong_step(in_place=True), 'work on a copy'),
        (wrong_step(one_less=True), 'masks are left'),
        (wrong_step(token='same noise'), 'one draw for all rows'),
        (wrong_step(token='too sharp'), 'from the true distribution'),
        (step_over_visible, 'writes over visible tokens')],
    'ex5_law': [
        (lambda *a: checks.P, 'chosen after the draw'),
        (lambda *a: law(*a, drawn=False), 'this is the mode'),
        (lambda *a: law(*a, choose=lambda p: p.index(min(p))), 'from this law'),
        (lambda *a: torch.full((3, 3, 3), 1 / 27), 'from this law'),
        (lambda *a: law(*a) * 2, 'add up to 1'),
        (lambda *a: law(*a).flatten(), 'of shape')],
    'ex6_counts': [
        (lambda n, s: [n - n // s * (s - 1)] + [n // s] * (s - 1), 'uneven'),
        (lambda n, s: counts(n, s)[::-1], 'remainder comes first'),
        (lambda n, s: [round(n / s)] * s, 'loses or invents'),
        (lambda n, s: [1] * n, 'numbers, got')],
    'ex6_guide': [
        (lambda c, u, w: u + w * (c - u), 'w = 0'),
        (lambda c, u, w: c + w * (u - c), 'the direction'),
        (lambda c, u, w: c + w * c, 'expected uncond')],
    'ex7_write': [
        (lambda k, new, pos: k.index_copy_(2, pos, new), 'keys itself has changed'),
        (lambda k, new, pos: new, 'keys of all positions'),
        (lambda k, new, pos: torch.cat((new, k[:, :, new.shape[2]:]), 2), 'the first positions'),
        (lambda k, new, pos: k.index_copy(2, pos.sort().values, new), 'wrong order'),
        (lambda k, new, pos: torch.zeros_like(k).index_copy(2, pos, new), 'must stay')],
    'ex8_bits_per_byte': [
        (lambda nats, n, s: nats * n / len(s.encode()), 'these are nats'),
        (lambda nats, n, s: nats / math.log(2), 'bits per token'),
        (lambda nats, n, s: nats * n / math.log(2) / len(s), 'bits per character'),
        (lambda nats, n, s: nats * n * math.log(2) / len(s.encode()), 'divided by log 2'),
        (lambda nats, n, s: nats / math.log(2) / len(s.encode()), 'per token'),
        (lambda nats, n, s: nats / math.log(2) * len(s.encode()) / n, 'but divide by it')],
    'ex9_schedule': [
        (lambda cost, T, k: [T // k + (i < T % k) for i in range(k)], 'equal steps'),
        (lambda cost, T, k: [1] * (k - 1) + [T - k + 1], 'greedy'),
        (lambda cost, T, k: [T // k] * k, 'positive numbers'),
        (lambda cost, T, k: [T], 'expected'),
        (lambda cost, T, k: [T - k + 1] + [1] * (k - 1), 'the best|wrong order'),
        (lambda cost, T, k: schedule(cost, T, k)[::-1], 'wrong order'),
        (fewer_steps, 'expected 3 numbers')],
    'ex10_attention_mask': [
        (lambda lengths: ~attention_mask(lengths), 'wrong way round'),
        (lambda lengths: attention_mask(lengths).tril(), 'causal'),
        (lambda lengths: torch.ones(8, 8, dtype=torch.bool), 'everything attends'),
        (lambda lengths: attention_mask(lengths).float(), 'bool'),
        (lambda lengths: attention_mask([4, 4]), 'across a border'),
        (lambda lengths: torch.eye(8, dtype=torch.bool), 'not attend to all')],
}


@pytest.mark.parametrize('name, k', [(name, k) for name in WRONG for k in range(len(WRONG[name]))])
def test_a_wrong_answer_is_refused_by_its_name(name, k):
    answer, message = WRONG[name][k]
    check = checks.CHECKS[name.partition('_')[0]]
    with pytest.raises(pytest.fail.Exception, match=message):
        check(SimpleNamespace(**{**RIGHT, name: answer}))


def test_every_exercise_has_typical_mistakes():
    assert WRONG.keys() == RIGHT.keys() and all(len(cases) >= 3 for cases in WRONG.values())
