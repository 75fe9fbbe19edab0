"""The checks of tests/exercises: right answers pass, each typical wrong one is refused by the name of its mistake."""

import math
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent / 'exercises'))

import checks  # noqa: E402
import exercises  # noqa: E402

import diffusion  # noqa: E402


def log_p(model, x0, xt):
    return model(xt).log_softmax(-1).gather(-1, x0[..., None])[..., 0]


# ----------------------------------------------------------------------------- right answers, by the project's own code


def loss(model, x0, xt, masked, t):
    asked = diffusion.question(x0, xt, masked, torch.ones_like(masked), t)
    return diffusion.weighted_loss(model, asked)


def hide(maskable, n, u):
    return u.masked_fill(~maskable, 2).argsort(1).argsort(1) < n[:, None]


def bound(model, x0, masks, mask_id):
    return diffusion.eq6(model, x0.expand_as(masks), torch.ones_like(masks), masks, mask_id).mean()


def sums(model, x0, masks, mask_id):
    return diffusion.masked_log_prob(model, x0.expand_as(masks), masks, mask_id)


def step(model, x, mask_id, n, generator):
    masked = x == mask_id
    rules = diffusion.Rules(1.0, 'random', [mask_id], [], generator)
    guess, trust = diffusion.propose(model(x)[masked], masked, rules)
    return diffusion.write(x, masked, guess, trust, [n] * len(x), None)[0]


def law(model, mask_id, T, V, choose=lambda p: max(range(len(p)), key=lambda k: p[k]), drawn=True):
    out = torch.zeros((V,) * T, dtype=torch.float64)

    def go(x, chance):
        holes = [i for i in range(T) if x[i] == mask_id]
        if not holes:
            out[tuple(x)] += chance
            return
        probs = model(torch.tensor([x]))[0].softmax(-1)
        modes = [[int(probs[i].argmax())] for i in holes]
        for guess in product(range(V), repeat=len(holes)) if drawn else product(*modes):
            p = [float(probs[i, v]) for i, v in zip(holes, guess)]
            k = choose(p)
            go([*x[:holes[k]], guess[k], *x[holes[k] + 1:]], chance * (math.prod(p) if drawn else 1.0))

    go([mask_id] * T, 1.0)
    return out


def counts(n_masked, steps):
    return diffusion.num_transfer_tokens(torch.tensor([n_masked]), steps)[0].tolist()


def guide(conditional, unconditional, w):
    return unconditional + (w + 1) * (conditional - unconditional)


def write(keys, new, pos):
    return keys.index_copy(2, pos, new)


def bits(nats_per_token, n_tokens, text):
    logp = torch.tensor([-nats_per_token * n_tokens])
    return diffusion.nats_and_bits(logp, torch.tensor([n_tokens]), len(text.encode()))[2]


def schedule(cost, T, k):
    best = {(0, 0): (0.0, [])}
    for j in range(1, k + 1):
        for b in range(j, T + 1):
            before = [(a, *best[a, j - 1]) for a in range(b) if (a, j - 1) in best]
            best[b, j] = min((price + cost[a][b], [*sizes, b - a]) for a, price, sizes in before)
    return best[T, k][1]


def price(cost, sizes):
    ends = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    return sum(cost[a][b] for a, b in zip(ends, ends[1:]))


def may_see(lengths):
    number = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return number[:, None] == number


RIGHT = dict(ex1_loss=loss, ex2_hide=hide, ex3_bound=bound, ex4_step=step, ex5_law=law, ex6_counts=counts,
             ex6_guide=guide, ex7_write=write, ex8_bits_per_byte=bits, ex9_schedule=schedule, ex10_may_see=may_see)


@pytest.mark.parametrize('name', checks.CHECKS)
def test_the_right_answer_passes(name):
    checks.CHECKS[name](SimpleNamespace(**RIGHT))


def test_the_stubs_ask_for_these_functions_and_are_empty():
    stubs = {name: f for name, f in vars(exercises).items() if name.startswith('ex')}
    assert stubs.keys() == RIGHT.keys()
    for f in stubs.values():
        with pytest.raises(NotImplementedError):
            f(*[None] * f.__code__.co_argcount)


def test_hiding_fits_on_one_line():
    assert len('    return u.masked_fill(~maskable, 2).argsort(1).argsort(1) < n[:, None]') < 80


# ---------------------------------------------------------------------- wrong answers, and what must be said about each


def eq3(weight=lambda t: 1 / t, divide=lambda m, x: m.numel(), hidden=True, see=None,
        shift=False, raw=False, rows=False, sign=-1):
    def wrong(model, x0, xt, masked, t):
        xt = x0 if see == 'x0' else xt
        logp = log_p(model, x0, xt)
        if raw:
            logp = model(xt).gather(-1, x0[..., None])[..., 0]
        if shift:
            logp = torch.cat((torch.zeros(len(x0), 1), log_p(lambda ids: model(ids)[:, :-1], x0[:, 1:], xt)), 1)
        logp = torch.where(masked, logp, 0.0) if hidden else logp
        if rows:
            return -(logp.sum(1) / masked.sum(1).clamp(min=1) / t).mean()
        return sign * (logp * weight(t)[:, None]).sum() / divide(masked, x0)
    return wrong


def wrong_step(pick='random', draw='sample', keep=False, inplace=False, at_most=False):
    def wrong(model, x, mask_id, n, generator):
        new, logits = x if inplace else x.clone(), model(x)
        probs = logits.softmax(-1)
        same = torch.rand(logits.shape[-1], generator=generator).log().neg().log().neg()
        for b in range(len(x)):
            holes = (x[b] == mask_id).nonzero()[:, 0]
            token = probs[b, holes].argmax(-1) if draw == 'argmax' else (
                (logits[b, holes] + same).argmax(-1) if draw == 'shared' else
                torch.multinomial(probs[b, holes] ** (1.5 if draw == 'sharp' else 1), 1, generator=generator)[:, 0])
            trust = torch.rand(len(holes), generator=generator)
            if pick == 'confident':
                trust = probs[b, holes].gather(-1, token[:, None])[:, 0]
            if pick == 'first':
                trust = -holes.float()
            k = trust.topk(min(n - at_most, len(holes)) if n - at_most > 0 else 0).indices
            new[b, holes[k]] = token[k]
        return new
    return wrong


def over(model, x, mask_id, n, generator):
    """Right while n masks are left."""
    draw = torch.multinomial(model(x).softmax(-1).flatten(0, 1), 1, generator=generator).view(x.shape)
    noise = torch.rand(x.shape, generator=generator).masked_fill(x != mask_id, 2)
    return torch.where(noise.argsort(1).argsort(1) < n, draw, x)


def uneven(n, steps):
    return [n - n // steps * (steps - 1)] + [n // steps] * (steps - 1)


WRONG = {
    'ex1': [(dict(ex1_loss=f), says) for f, says in (
        (eq3(weight=torch.ones_like, divide=lambda m, x: m.sum()), 'mean over the masked tokens, without 1/t'),
        (eq3(divide=lambda m, x: m.sum()), 'Eq. 3 divides by all of them'),
        (eq3(weight=lambda t: (1 / t.mean()).expand(len(t))), 'one t for the whole batch'),
        (eq3(weight=lambda t: 1 / (1 - t)), r'not 1/\(1 - t\)'), (eq3(weight=lambda t: t), 'not t'),
        (eq3(divide=lambda m, x: len(x)), 'divided by the rows only'), (eq3(divide=lambda m, x: 1), 'a sum'),
        (eq3(hidden=False), 'counts tokens in sight'), (eq3(shift=True), 'predicts the next token'),
        (eq3(raw=True), 'log_softmax'),
        (eq3(rows=True), 'by its number of masked tokens'),
        (eq3(sign=1), 'the sign'), (eq3(see='x0'), 'x0 holds the answers'))],
    'ex2': [(dict(ex2_hide=f), says) for f, says in (
        (lambda m, n, u: u.argsort(1).argsort(1) < n[:, None], 'hides what is not maskable'),
        (lambda m, n, u: m & (u < (n / m.sum(1))[:, None]), 'only on average'),
        (lambda m, n, u: u.masked_fill(~m, 2).argsort(1) < n[:, None], 'argsort once more'),
        (lambda m, n, u: m & (u.argsort(1).argsort(1) < n[:, None]), 'ranked together'),
        (lambda m, n, u: m & (m.cumsum(1) <= n[:, None]), 'always the same positions'),
        (lambda m, n, u: hide(m, n + 1, u), 'not exactly n'),
        (lambda m, n, u: hide(m, n, u ** torch.arange(1, 6)), 'equally likely'))],
    'ex3': [(dict(ex3_bound=f), says) for f, says in (
        (lambda *a: -bound(*a), 'the sign'),
        (lambda *a: sums(*a).mean(), 'T/l is missing'), (lambda *a: (sums(*a) / a[2].sum(1)).mean(), 'of a token'),
        (lambda *a: sums(*a).sum() / a[2].sum() * 3, 'not the mean of the ratios'),
        (lambda *a: bound(*a) * len(a[2]), 'a sum over the masks'),
        (lambda *a: (sums(*a) * a[2].sum(1) / 3).mean(), 'not l/T'))],
    'ex4': [(dict(ex4_step=f), says) for f, says in (
        (wrong_step(draw='argmax'), 'most probable token'),
        (wrong_step(pick='confident'), 'not look at the confidence'),
        (wrong_step(pick='first'), 'always position'), (wrong_step(inplace=True), 'work on a copy'),
        (wrong_step(at_most=True), 'masks are left|must write all'),
        (wrong_step(draw='shared'), 'one draw for all rows'),
        (wrong_step(draw='sharp'), 'from the true distribution'), (over, 'writes over tokens in sight'))],
    'ex5': [(dict(ex5_law=f), says) for f, says in (
        (lambda *a: checks.P, 'chosen after the draw'), (lambda *a: law(*a, drawn=False), 'this is the mode'),
        (lambda *a: law(*a, choose=lambda p: p.index(min(p))), 'from this law'),
        (lambda *a: torch.full((3, 3, 3), 1 / 27), 'from this law'), (lambda *a: law(*a) * 2, 'add up to 1'),
        (lambda *a: law(*a).flatten(), 'of shape'))],
    'ex6': [(dict(RIGHT, ex6_counts=f), says) for f, says in (
        (uneven, 'uneven'), (lambda n, s: counts(n, s)[::-1], 'remainder comes first'),
        (lambda n, s: [round(n / s)] * s, 'loses or invents'), (lambda n, s: [1] * n, 'numbers, got'))] + [
        (dict(RIGHT, ex6_guide=f), says) for f, says in (
            (lambda c, u, w: u + w * (c - u), 'w = 0'), (lambda c, u, w: c + w * (u - c), 'the direction'),
            (lambda c, u, w: c + w * c, 'want un'))],
    'ex7': [(dict(ex7_write=f), says) for f, says in (
        (lambda k, new, p: k.index_copy_(2, p, new), 'keys itself has changed'),
        (lambda k, new, p: new, 'want all T rows'),
        (lambda k, new, p: torch.cat((new, k[:, :, new.shape[2]:]), 2), 'the first rows'),
        (lambda k, new, p: k.index_copy(2, p.sort().values, new), 'wrong order'),
        (lambda k, new, p: torch.zeros_like(k).index_copy(2, p, new), 'must stay'))],
    'ex8': [(dict(ex8_bits_per_byte=f), says) for f, says in (
        (lambda a, n, s: a * n / len(s.encode()), 'these are nats'),
        (lambda a, n, s: a / math.log(2), 'bits per token'),
        (lambda a, n, s: a * n / math.log(2) / len(s), 'bits per character'),
        (lambda a, n, s: a * n * math.log(2) / len(s.encode()), 'divided by log 2'),
        (lambda a, n, s: a / math.log(2) / len(s.encode()), 'per token'),
        (lambda a, n, s: a / math.log(2) * len(s.encode()) / n, 'where tokens per byte belong'))],
    'ex9': [(dict(ex9_schedule=f), says) for f, says in (
        (lambda c, T, k: [T // k + (i < T % k) for i in range(k)], 'equal steps'),
        (lambda c, T, k: [1] * (k - 1) + [T - k + 1], 'greedy'), (lambda c, T, k: [T // k] * k, 'whole steps'),
        (lambda c, T, k: [T], 'want'), (lambda c, T, k: [T - k + 1] + [1] * (k - 1), 'the best|wrong order'),
        (lambda c, T, k: min((schedule(c, T, j) for j in range(1, k + 1)), key=lambda s: price(c, s)),
         'want 3 numbers'),
        (lambda c, T, k: schedule(c, T, k)[::-1], 'wrong order'))],
    'ex10': [(dict(ex10_may_see=f), says) for f, says in (
        (lambda n: ~may_see(n), 'other way round'), (lambda n: may_see(n).tril(), 'causal'),
        (lambda n: torch.ones(8, 8, dtype=torch.bool), 'everybody'), (lambda n: may_see(n).float(), 'bool'),
        (lambda n: may_see([4, 4]), 'across a border'),
        (lambda n: torch.eye(8, dtype=torch.bool), 'does not see all'))],
}


@pytest.mark.parametrize('name, number', [(name, k) for name, cases in WRONG.items() for k in range(len(cases))])
def test_a_wrong_answer_is_refused_by_its_name(name, number):
    answer, says = WRONG[name][number]
    with pytest.raises(AssertionError, match=says):
        checks.CHECKS[name](SimpleNamespace(**answer))


def test_every_check_refuses_enough():
    assert WRONG.keys() == checks.CHECKS.keys() and all(len(cases) >= 5 for cases in WRONG.values())
