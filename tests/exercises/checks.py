"""Check the exercises against an independent truth. Red is one sentence that names the mistake, green is the truth.

Each check takes the functions under test as a module or a namespace, so tests/test_exercises.py can also run it on
right answers and on wrong ones. It returns what it found, in words.
"""

import copy
import functools
import itertools
import json
import math
import traceback
from pathlib import Path

import pytest
import torch
from helpers import MASK, T, V, seeded, table_model
from torch import nn

from model import attention

GOLDEN = Path(__file__).resolve().parents[1] / 'golden'
P, MODEL = table_model()                                    # 27 texts of 3 tokens whose distribution is known
TEXTS = torch.tensor(list(itertools.product(range(V), repeat=T)))
MASKS = torch.tensor(list(itertools.product([False, True], repeat=T)))
ENTROPY = float(-(P * P.log()).sum())


# ------------------------------------------------------ what the checks share


def fail_if(condition, message):
    """Fail the check with a sentence, if the condition is true."""
    if condition:
        pytest.fail(message, pytrace=False)


def near(a, b, tolerance=1e-5):
    a, b = (float(x.detach() if torch.is_tensor(x) else x) for x in (a, b))
    return math.isclose(a, b, rel_tol=tolerance, abs_tol=1e-9)


def call(f, **inputs):
    """Call f with copies of its inputs, by position. Fail if it writes into one of them."""
    given = {}
    for name, value in inputs.items():
        given[name] = value.clone() if torch.is_tensor(value) else value
        if isinstance(value, list):
            given[name] = copy.deepcopy(value)
    result = f(*given.values())
    for name, value in inputs.items():
        same = torch.equal(given[name], value) if torch.is_tensor(value) else given[name] == value
        fail_if(not same, f'{name} itself has changed, so work on a copy of it')
    return result


def explain(got, value, *choices):
    """Fail if a number is not the right one, and say what was chosen wrongly, also if it is two or three things.

    value: function of one option per choice -> number. choices: {'': the right option, message: a wrong one, ...}.
    """
    for n_wrong in range(4):
        for wrong in itertools.combinations(range(len(choices)), n_wrong):
            options = [[m for m in choice if bool(m) == (i in wrong)] for i, choice in enumerate(choices)]
            for messages in itertools.product(*options):
                if near(got, value(*(choice[m] for choice, m in zip(choices, messages)))):
                    fail_if(n_wrong, ', and '.join(filter(None, messages)))
                    return
    right = value(*(choice[''] for choice in choices))
    fail_if(True, f'{float(got):.6f} is not {float(right):.6f}')


def name_it(got, right, mistakes, otherwise):
    """Fail if a tensor or a list is not the right one. mistakes: message -> what this mistake leads to."""
    def same(a, b):
        if not torch.is_tensor(a):
            return a == b
        return a.shape == b.shape and torch.allclose(a.double(), b.double(), atol=1e-5)

    if not same(got, right):
        for message, wrong in mistakes.items():
            fail_if(same(got, wrong), message)
        fail_if(True, otherwise)


def unsure(T, V, mask_logit=True, seed=0):
    """Make a mask predictor with logits that are random, not normalised, and also unsure of visible tokens."""
    generator = seeded(seed)
    embed = torch.randn(T, V + 1, 16, generator=generator, dtype=torch.float64)
    head = torch.randn(16, V + 1, generator=generator, dtype=torch.float64)

    def model(ids):
        h = embed[torch.arange(T), ids]                                             # (B, T, 16)
        h = h + h.sum(1, keepdim=True)
        logits = h.tanh() @ head / 2 + h[..., :1]
        if not mask_logit:
            logits[..., V] = -math.inf
        return logits

    return model


def log_p(logits, x0):
    """Return log p of the tokens x0 (B, T) under logits (B, T, V) -> (B, T)."""
    return logits.log_softmax(-1).gather(-1, x0[..., None])[..., 0]


def versions_of_log_p(logits, x0):
    """Return log p (B, T) of x0, and what becomes of it by typical mistakes: message -> (B, T)."""
    right = log_p(logits, x0)
    shifted = torch.zeros_like(right)
    shifted[:, 1:] = log_p(logits[:, :-1], x0[:, 1:])
    return {
        '': right,
        'these are logits, but log p is their log_softmax': logits.gather(-1, x0[..., None])[..., 0],
        'these are probabilities, but the sum is over their logarithms': right.exp(),
        'this is in bits, but log is the natural logarithm here': right / math.log(2),
        'this predicts the next token, but here logit i is about token i': shifted,
        'the softmax goes over the positions (dim 1), not over the vocabulary':
            logits.log_softmax(1).gather(-1, x0[..., None])[..., 0],
        'this takes the logit of [MASK] out of the softmax (MDLM does so), but p is the softmax of all logits':
            log_p(logits[..., :-1], x0)}


SIGN_OF_LOSS = {'': -1, 'the sign is wrong, because a loss is -log p': 1}
ALL_THREE = MASKS[-1:]


def check_of(f):
    """Turn a check into one that also fails in one sentence if a function is not written, or raises."""
    @functools.wraps(f)
    def run(my):
        try:
            return f(my)
        except NotImplementedError as error:
            name = traceback.extract_tb(error.__traceback__)[-1].name
            fail_if(True, f'{name} is not written yet: it is in exercises.py')
        except RecursionError:
            fail_if(True, 'this never ends: is [MASK] among the proposals? There are V of them for a mask, not V + 1')
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            own = [frame for frame in frames if Path(frame.filename).name == 'exercises.py']
            at = (own or frames)[-1]
            fail_if(True, f'{type(error).__name__} in {at.name}, line {at.lineno} ({at.line}): {error}')
    return run


# ------------------------------------------------------ one check for each exercise


def ex1(my):
    # 1) a batch in which every number of something is another number
    masked = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 1], [1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 0, 0]]).bool()
    t = torch.tensor([0.5, 0.3, 0.9, 0.4, 0.8, 0.2], dtype=torch.float64)
    x0 = torch.randint(5, masked.shape, generator=seeded(0))
    xt = torch.where(masked, 5, x0)
    logits_of, inputs = unsure(4, 5), []
    scale = torch.ones(6, dtype=torch.float64, requires_grad=True)                  # the weights of the model

    def model(ids):
        inputs.append(ids)
        return logits_of(ids) * scale

    got = call(my.ex1_loss, model=model, x0=x0, xt=xt, masked=masked, t=t)
    fail_if(not torch.is_tensor(got) or got.dim(), f'the loss is a tensor without dimensions, got {got!r}')
    seen, given = ({tuple(row) for row in rows.tolist()} for rows in (torch.cat(inputs), xt))
    fail_if(seen & {tuple(row) for row in x0[masked.any(1)].tolist()},
            'the model must see xt, because x0 holds the answers')
    fail_if(not seen <= given, 'the model must see xt as it is')

    B, length, n, l = *masked.shape, masked.numel(), masked.sum(1)

    def value(weight, over, divisor, logp, sign):
        return sign * (torch.where(over, logp, 0.0).sum(1) * weight / divisor).sum()

    weights = {
        '': 1 / t,
        "1/t is missing: this is BERT's loss, and not a bound, because rows with few masks count too little":
            torch.ones(B),
        'this is the mean over the masked tokens, without 1/t, so it is not the bound of Eq. 3': n / l.sum(),
        'this has T/l, from the number l of masks in the row, in place of 1/t (or divides each row by its number '
        'of masked tokens): right for exactly l masks (Eq. 14), but here t is given': length / l.clamp(min=1),
        'this uses one t for the whole batch, but each row has its own': 1 / t.mean(),
        'this uses the mean of 1/t for the whole batch, but each row has its own t': (1 / t).mean(),
        'the weight is 1/t, not 1/(1 - t), because t is the probability to be hidden': 1 / (1 - t),
        'the weight is 1/t, not t': t, 'the weight is 1/t, not 1 - t': 1 - t, 'the weight is 1/t, not 1/t^2': t ** -2,
        'the weight is 1/t, not its square root': t ** -0.5, 'the weight is 1/t, not -log t': -t.log()}
    over = {'': masked, 'this counts visible tokens as well, but only the masked ones are in the sum': masked | True,
            'this counts the visible tokens (~masked), but the masked ones are in the sum': ~masked}
    divisors = {
        '': n, 'this divides by the number of masked tokens, but Eq. 3 divides by all tokens': l.sum(),
        'this divides by the number of visible tokens, but Eq. 3 divides by all tokens': (~masked).sum(),
        'this divides by the number of rows only, but Eq. 3 divides by T as well': B,
        'this is a sum over the rows, divided by T, but Eq. 3 is their mean': length,
        'this is a sum, but Eq. 3 divides by B and by T': 1,
        'this divides by T - 1, but all T tokens are predicted': B * (length - 1),
        'rows without a mask are left out of the mean, but Eq. 3 counts them (as 0)': (l > 0).sum() * length,
        'this divides each row by its number of masked tokens, but Eq. 3 divides by T': B * l.clamp(min=1),
        'this divides by T twice': n * length, 'this divides by B twice': n * B}
    logits = model(xt)
    explain(got, value, weights, over, divisors, versions_of_log_p(logits, x0), SIGN_OF_LOSS)

    # 2) can it train?
    fail_if(not got.requires_grad, 'the number is right, but no gradient reaches the model, so this loss cannot train '
            '(no_grad, detach, item?)')
    slope, = torch.autograd.grad(got, scale)
    right, = torch.autograd.grad(value(1 / t, masked, n, log_p(logits, x0), -1), scale)
    fail_if(not torch.allclose(slope, right, rtol=1e-4),
            'the number is right, but its gradient is not: is a part of it detached?')

    # 3) rows of their own, with the smallest and the largest t
    for t in (0.5, 0.2, 0.05, 0.004, 0.001, 0.97, 1.0):
        loss = call(my.ex1_loss, model=logits_of, x0=x0[:1], xt=xt[:1], masked=masked[:1],
                    t=torch.tensor([t], dtype=torch.float64))
        weight = float(loss / -log_p(logits_of(xt[:1]), x0[:1])[masked[:1]].sum()) * length
        fail_if(not near(weight, 1 / t), f'at t = {t} the weight is {weight:.5g} in place of 1/t = {1 / t:.5g}: is t '
                'clamped, or is something added to it?')
    nothing = call(my.ex1_loss, model=logits_of, x0=x0, xt=x0, masked=masked & False, t=torch.ones(B))
    fail_if(not near(nothing, 0), f'if nothing is masked, the loss is 0, but this is {float(nothing)}')

    # The independent truth: averaged over all texts, masks and t, the loss is the entropy of the source per token.
    # Three Gauss points integrate t^0 ... t^5 exactly.
    total = 0.0
    for t, share in ((0.5 - 0.15 ** 0.5, 5 / 18), (0.5, 8 / 18), (0.5 + 0.15 ** 0.5, 5 / 18)):
        for mask, (text, p) in itertools.product(MASKS, zip(TEXTS, P.flatten())):
            chance = t ** int(mask.sum()) * (1 - t) ** int((~mask).sum())
            xt, ratio = torch.where(mask, MASK, text), torch.tensor([t], dtype=torch.float64)
            loss = my.ex1_loss(MODEL, text[None], xt[None], mask[None], ratio)
            total += share * chance * float(p) * float(loss)
    fail_if(not near(total * T, ENTROPY),
            f'averaged over everything it is {total * T:.6f} nats, the entropy is {ENTROPY:.6f}')
    return f'your loss over all texts, masks and t is {total * T:.4f} nats, and the entropy is {ENTROPY:.4f}'


def ex2(my):
    rows = torch.tensor([[1, 1, 0, 1, 1], [1, 1, 1, 1, 1], [0, 1, 0, 0, 1]], dtype=torch.bool)
    maskable = rows.repeat(2000, 1)
    full, n = maskable.sum(1), torch.tensor([2, 3, 1]).repeat(2000)
    u = torch.rand(maskable.shape, generator=seeded(0)) * 0.98

    def hide(n=n, u=u, maskable=maskable):
        got = call(my.ex2_hide, maskable=maskable, n=n, u=u)
        fail_if(not torch.is_tensor(got) or got.shape != maskable.shape or got.dtype != torch.bool,
                f'expected (B, T) bool, got {getattr(got, "shape", got)} {getattr(got, "dtype", "")}')
        return got

    got = hide()
    fail_if(not torch.equal(got, hide()), 'this draws numbers of its own, but u is the noise')
    fail_if(torch.equal(got, hide(u=u.flip(0))), 'these are always the same positions, so u is not used')
    late = u.masked_fill(~maskable, 2)
    for message, wrong in {
            'argsort gives the order of the positions, not their ranks, so argsort once more':
                late.argsort(1) < n[:, None],
            'positions that are not maskable take up ranks, so give them noise that sorts last':
                (u.argsort(1).argsort(1) < n[:, None]) & maskable,
            'the ranks go down the columns (dim 0), but each row has its own (dim 1)':
                late.argsort(0).argsort(0) < n[:, None],
            'this uses n[0] for every row, but each row has its own n': late.argsort(1).argsort(1) < n[0]}.items():
        fail_if(torch.equal(got, wrong), message)
    fail_if((got & ~maskable).any(), 'this hides what is not maskable, so give that noise that sorts last')
    hidden = got.sum(1)
    fail_if(hidden.unique().numel() > 3,
            'the number varies: u < n / T hides n tokens only on average (that is Eq. 3, not Eq. 14)')
    fail_if((hidden != n).any(), 'the number of hidden positions in row b is not n[b]')

    for message, count, noise, where in [
            ('n = 0 hides nothing', n * 0, u, maskable), ('n = 0 hides nothing', n * (n > 1), u, maskable),
            ('n can be all that is maskable', full, u, maskable),
            ('n can differ in every row', (u[:, 0] * (full + 1)).long(), u, maskable),
            ('a row may have nothing that is maskable', n * (n > 1), u, maskable & (n > 1)[:, None]),
            ('some u are equal (noise in float32 has equal numbers), so count by rank, not by a threshold',
             n, (u * 3).floor() / 3, maskable),
            ('u reaches up to 1, so what is not maskable needs noise of 1 or more',
             n, 0.9999 + u.argsort(1).argsort(1) / 1e5, maskable)]:
        again = hide(count, noise, where)
        fail_if((again.sum(1) != count).any() or (again & ~where).any(),
                f'the number of hidden positions is wrong: {message}')

    shares = []
    for k in range(3):
        _, counts = got[k::3].unique(dim=0, return_counts=True)
        shares.append(counts)
        n_subsets = math.comb(int(full[k]), int(n[k]))
        expected = 2000 / n_subsets
        fail_if(len(counts) != n_subsets or (counts - expected).abs().max() > 5 * expected ** 0.5,
                f'the {n_subsets} subsets are not equally likely: {counts.tolist()} of 2000')
    # they must be the n smallest u of the maskable ones, or the n largest, if the ranks are turned round
    ranks = late.argsort(1).argsort(1)
    ordered = [torch.equal(got, mask & maskable) for mask in (ranks < n[:, None], ranks >= (full - n)[:, None])]
    fail_if(not any(ordered), 'the subsets are not equally likely: hide the n positions with the smallest u, and do not '
            'change u by a factor, a power or a position')
    return f'exactly n, and the 6 ways to hide 2 of 4 came {sorted(shares[0].tolist())} times of 2000'


def ex3(my):
    # 1) five tokens, a model that is also unsure of visible ones, and a mask that comes twice
    x0 = torch.tensor([1, 0, 3, 2, 0])
    masks = torch.tensor([[1, 0, 1, 0, 0], [0, 1, 1, 1, 0], [1, 0, 1, 0, 0], [0, 0, 0, 0, 1], [1, 1, 0, 1, 1]]).bool()
    masks, n = torch.cat((masks, masks[3:4], ~masks[2:3])), None
    model, n, rows = unsure(5, 4), masks.sum(1), x0.expand(len(masks), -1)
    got = call(my.ex3_bound, model=model, x0=x0, masks=masks, mask_id=4)
    fail_if(torch.is_tensor(got) and got.dim(), f'expected a number, got the shape {tuple(getattr(got, "shape", ()))}')

    order = torch.arange(5)
    in_order = log_p(model(torch.where(order >= order[:, None], 4, x0)), x0.expand(5, -1)).diagonal().sum()
    fail_if(near(got, in_order), 'this is the chain rule from left to right, but Eq. 6 uses the masks it is given')

    def value(factor, over, logp, reduce, sign):
        return sign * reduce(factor * torch.where(over, logp, 0.0).sum(1))

    def mean_by_size(values):
        return torch.stack([values[n == size].mean() for size in n.unique()]).mean()

    factors = {
        '': 5 / n, 'T/l is missing, but a mask that hides few tokens stands for all T of them': torch.ones(len(n)),
        'this is log p of one token; for T tokens multiply by T': 1 / n, 'the factor is T/l, not l/T': n / 5,
        'T is the length of x0, but this has 3 written into it': 3 / n,
        'l is the number of masked tokens, not of the visible ones': 5 / (5 - n)}
    over = {'': masks, 'this counts all tokens, but only the masked ones are in the sum': masks | True,
            'this counts the visible tokens, but the masked ones are in the sum': ~masks}
    logps = versions_of_log_p(model(torch.where(masks, 4, x0)), rows)
    logps['the model sees x0 itself, so it need not guess: put [MASK] where the mask is True'] = log_p(model(rows), rows)
    logps['hidden and visible are exchanged in what the model sees: [MASK] belongs where the mask is True'] = log_p(
        model(torch.where(masks, x0, 4)), rows)
    reduce = {
        '': torch.mean, 'this is a sum over the masks, but Eq. 6 is their mean': torch.sum,
        'this is the ratio of two sums, not the mean of the ratios: T/l belongs to its mask':
            lambda values: (values * n).sum() / n.sum(),
        'this is the log of a mean, but Eq. 6 is a mean of logs (a bound for each mask)':
            lambda values: values.logsumexp(0) - math.log(len(n)),
        'this averages by the number of hidden tokens first, but every mask counts the same': mean_by_size,
        'a mask that comes twice counts twice': lambda values: values[[0, 1, 3, 4, 6]].mean(),
        'this takes the best mask, but Eq. 6 is the mean': torch.max}
    sign = {'': 1, 'the sign is wrong: it is a bound on log p, which is negative': -1}
    explain(got, value, factors, over, logps, reduce, sign)
    for some in (masks[:1], masks[3:6], masks | True):
        logp = torch.where(some, log_p(model(torch.where(some, 4, x0)), x0.expand(len(some), -1)), 0.0).sum(1)
        explain(call(my.ex3_bound, model=model, x0=x0, masks=some, mask_id=4), lambda: (5 / some.sum(1) * logp).mean())

    # 2) the independent truth: with l uniform, and all masks of the same l equally likely, the mean is -entropy
    def bound(model, text):
        return sum(float(my.ex3_bound(model, text, MASKS[MASKS.sum(1) == size], MASK)) for size in (1, 2, 3)) / T

    total = sum(float(p) * bound(MODEL, text) for text, p in zip(TEXTS, P.flatten()))
    fail_if(not near(-total, ENTROPY),
            f'over all texts and masks it is {-total:.6f} nats, the entropy is {ENTROPY:.6f}')

    # 3) a predictor whose answers contradict each other: exercise 4 writes in a random order, so p is a mean over orders
    noise = torch.randn(*(V + 1,) * T, T, V + 1, generator=seeded(1), dtype=torch.float64)

    def torn(ids):
        return MODEL(ids) + noise[tuple(ids.T)]

    orders = []
    for ranks in itertools.permutations(range(T)):
        ranks = torch.tensor(ranks)
        steps = [log_p(torn(torch.where(ranks >= k, MASK, TEXTS)), TEXTS)[:, ranks == k] for k in range(T)]
        orders.append(torch.cat(steps, 1).sum(1))
    log_of_mean = torch.stack(orders).logsumexp(0) - math.log(len(orders))
    bounds = torch.tensor([bound(torn, text) for text in TEXTS])
    fail_if((bounds > log_of_mean + 1e-6).any(), 'with a predictor that contradicts itself it is above log p')
    return (f'a perfect predictor has a bound of {total:.4f} nats, and {-ENTROPY:.4f} is the truth. One that contradicts '
            f'itself has {float((P.flatten() * bounds).sum()):.4f}, and what it writes has log p '
            f'{float((P.flatten() * log_of_mean).sum()):.4f}: a bound, not the value. {spread(my)}')


def spread(my, text=5):
    """Compare the standard deviation of one draw of Eq. 6 and of Eq. 5 (t uniform on 0.001 ... 1), exactly."""
    text, masks, l = TEXTS[text], MASKS[1:], MASKS[1:].sum(1)
    eq6 = torch.tensor([float(my.ex3_bound(MODEL, text, mask[None], MASK)) for mask in masks], dtype=torch.float64)
    t = torch.linspace(0.001, 1, 100_001, dtype=torch.float64)[:, None]
    sums, chance = eq6 * l / T, t ** l * (1 - t) ** (T - l)
    share = torch.tensor([1 / T / math.comb(T, int(size)) for size in l], dtype=torch.float64)
    sd6 = (share @ eq6 ** 2 - (share @ eq6) ** 2) ** 0.5
    mean5, square5 = ((chance * (sums / t) ** k).sum(1).mean() for k in (1, 2))
    return (f'One draw of Eq. 6 on text {"".join(map(str, text.tolist()))}: {share @ eq6:.2f} +- {sd6:.2f}, and of Eq. 5: '
            f'{mean5:.2f} +- {(square5 - mean5 ** 2) ** 0.5:.2f}.')


def frequencies(texts):
    """Count texts (N, T) -> frequencies (V,) * T."""
    number = (texts * torch.tensor([V * V, V, 1])).sum(1)
    return torch.bincount(number, minlength=V ** T).view((V,) * T).double() / len(texts)


def total_variation(p, q):
    return float((p - q).abs().sum() / 2)


def surprise(counts, p):
    """Return chi^2 per degree of freedom of counts against probabilities of the same shape. It is near 1 if they fit."""
    expected = p * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum() / (counts.numel() - 1))


def ex4(my):
    # 1) canvases [s, ?, ?, ?, ?] whose position s + 1 is far more certain than the others
    flat, sharp = torch.tensor([0.5, 0.3, 0.15, 0.045, 0.005]), torch.tensor([0.02, 0.03, 0.05, 0.1, 0.8])
    logits_of = torch.stack((flat, sharp)).double().log() + 1
    logits_of = torch.cat((logits_of, torch.full((2, 1), -math.inf)), 1)
    calls = []

    def model(ids):
        calls.append(len(ids))
        certain = torch.arange(ids.shape[1]) == ids[:, :1].clamp(max=4) + 1
        return logits_of[certain.long()]

    def step(x, n, generator, model=model):
        new = call(my.ex4_step, model=model, x=x, mask_id=MASK if model is MODEL else 5, n=n, generator=generator)
        fail_if(new.shape != x.shape or new.dtype != x.dtype, f'expected ids of shape {tuple(x.shape)}, got '
                f'{tuple(new.shape)} {new.dtype}')
        return new

    s = torch.arange(4).repeat(20_000)
    x = torch.cat((s[:, None], torch.full((len(s), 4), 5)), 1)
    new = step(x[:400], 1, seeded(0))
    left = (new == 5).sum(1)
    fail_if((left == 1).all(), 'n is the number of tokens that are written, not of those that stay masked')
    fail_if(left.unique().numel() > 1, 'the number of written tokens varies, but it is exactly n in each row')
    fail_if((left != 3).any(), f'after a step of one token {left.unique().tolist()} masks are left, not 3')
    fail_if((new[:, 0] != x[:400, 0]).any(), 'it changes tokens that were written before')

    # rows with 1, 3, 2 and 0 masks
    some = torch.tensor([[0, 5, 1, 2, 3], [3, 5, 5, 4, 5], [1, 2, 5, 5, 0], [2, 0, 1, 0, 1]])
    for n, rows in ((2, some), (2, some[[1, 0]]), (9, some), (1, some), (1, some[3:])):
        new = step(rows.repeat(200, 1), n, seeded(0)).view(200, *rows.shape)
        fail_if(((new != rows) & (rows != 5)).any(), 'it writes over visible tokens where fewer than n masks are left, '
                'or changes tokens that were written before')
        before, left = (rows == 5).sum(1), (new[0] == 5).sum(1)
        fail_if(((new == 5).sum(2) != (before - n).clamp(min=0)).any(),
                f'rows with {before.tolist()} masks and n = {n} have {left.tolist()} masks after the step, but each row '
                'must lose n of its own, or all it has, if fewer than n are left')
    calls.clear()
    step(x[:8], 3, seeded(0))
    fail_if(len(calls) != 1, f'one step looks at the canvas once, but this calls the model {len(calls)} times: tokens of '
            'one step do not see each other')

    # 2) who decides? The generator, and nothing else
    tokens, places, again = [], [], seeded(7)
    for global_seed, generator in ((0, seeded(7)), (1, seeded(7)), (0, seeded(7)), (0, again), (0, again)):
        torch.manual_seed(global_seed)
        tokens.append(step(x[:400], 4, generator))
        places.append(step(x[:400], 2, generator) == 5)
    for k, what in ((tokens, 'tokens'), (places, 'positions')):
        fail_if(not torch.equal(k[0], k[1]) or not torch.equal(k[0], k[2]),
                f'the same generator gives other {what}, so their draw does not use it')
    again = 'two steps in a row draw the same {}, so the generator is seeded again (or not used)'
    fail_if(torch.equal(tokens[3], tokens[4]) and not (tokens[3] == tokens[3][:1]).all(), again.format('tokens'))

    # 3) all tokens at once: each from its own softmax, independent of the others
    generator = seeded(1)
    new = step(x, 4, generator)[:, 1:]
    fail_if((new[::4] == new[0]).all(), 'all rows get the same tokens: is there one draw for all rows, or none?')
    certain = torch.arange(4) == s[:, None]
    best = torch.where(certain, 4, 0)
    fail_if((new == best).all(), 'it writes the most probable token, but tokens are drawn from the softmax')
    for p, drawn in ((flat, new[~certain]), (sharp, new[certain])):
        counts = torch.bincount(drawn, minlength=5)[:5].double()
        f = counts / counts.sum()
        fail_if((f == 0).any(), f'it never draws tokens of probability {p[f == 0].tolist()}: top-k, top-p, or the maximum?')
        x_, y_ = p.log(), f.log()
        power = float(((x_ - x_.mean()) * (y_ - y_.mean())).sum() / ((x_ - x_.mean()) ** 2).sum())
        fail_if(surprise(counts, p) > 9, f'tokens of probability {[round(float(q), 3) for q in p]} come with frequency '
                f'{[round(float(q), 3) for q in f]}: like p to the power {power:.2f}. Is there a temperature, or other '
                'noise than Gumbel noise?')
    drawn = new[~certain].view(-1, 3)
    for first, second, rows in ((drawn[:, 0], drawn[:, 1], 'of one row'), (drawn[::2, 0], drawn[1::2, 0], 'of two rows')):
        counts = torch.bincount(first * 5 + second, minlength=25).double()
        fail_if(surprise(counts, torch.outer(flat, flat).flatten()) > 5,
                f'tokens {rows} depend on each other, but every mask has a draw of its own')

    # 4) two of four: which positions, and do they know what was drawn?
    new = step(x, 2, generator)[:, 1:]
    written = new != 5
    fail_if((written == written[0]).all(), 'it fills the same positions in every row, but each row must choose its own '
            f'at random (here it always fills position {int(written[0].int().argmax()) + 1})')
    fail_if(abs(float(written[certain].double().mean()) - 0.5) > 0.01,
            f'the most certain position is written in {float(written[certain].double().mean()):.0%} of the rows, not in '
            'half of them: the choice must not depend on the confidence')
    counts = torch.bincount(new[~certain & written], minlength=5)[:5].double()
    fail_if(surprise(counts, flat) > 7, 'the choice of positions depends on the tokens that were drawn: it must not '
            'depend on the confidence, nor use the random numbers of the tokens again')
    share = written.double().mean(0)
    ways = torch.bincount((written.long() * torch.tensor([8, 4, 2, 1])).sum(1), minlength=16)[[3, 5, 6, 9, 10, 12]]
    fail_if(surprise(ways.double(), torch.full((6,), 1 / 6)) > 8 or ways.sum() < len(x),
            f'positions are not equally likely: {[round(float(q), 3) for q in share]} instead of a half each')

    fail_if(torch.equal(places[3], places[4]), again.format('positions'))

    # 5) the independent truth: 40,000 texts
    x = all_masks = torch.full((40_000, T), MASK)
    for _ in range(T):
        x = step(x, 1, generator, MODEL)
    distance = total_variation(frequencies(x), P)
    fail_if(distance > 0.016,
            f'the texts are {distance:.3f} (total variation) from the true distribution, noise is 0.009')
    # and all tokens in one step: the product of what each position has by itself
    once = frequencies(step(all_masks, T, generator, MODEL))
    product = torch.einsum('a,b,c->abc', P.sum((1, 2)), P.sum((0, 2)), P.sum((0, 1)))
    fail_if(total_variation(once, product) > 0.016, 'all tokens in one step should be independent of each other')
    return (f'one token per step: {distance:.3f} (total variation) from the true distribution, which is noise. All at '
            f'once: {total_variation(once, P):.3f}, because tokens of one step do not see each other')


def law(model, T, V, score, draw=True):
    """Return the law of writing one token per step, the mask k of the highest score (the first of equal ones).

    score(k, token, p, logits, p at the start) -> what to compare. Goes from step to step, over all canvases at once.
    """
    start = model(torch.full((1, T), V))[0].softmax(-1)
    canvases = {(V,) * T: 1.0}
    for _ in range(T):
        after = dict.fromkeys(itertools.product(range(V + 1), repeat=T), 0.0)
        for x, chance in canvases.items():
            logits = model(torch.tensor([x]))[0]
            p = logits.softmax(-1)
            holes = [i for i in range(T) if x[i] == V]
            tokens = itertools.product(range(V), repeat=len(holes)) if draw else [p[holes].argmax(-1).tolist()]
            for guess in tokens:
                scores = [score(i, token, p, logits, start) for i, token in zip(holes, guess)]
                k = scores.index(max(scores))
                y = x[:holes[k]] + (guess[k],) + x[holes[k] + 1:]
                after[y] += chance * (math.prod(float(p[i, token]) for i, token in zip(holes, guess)) if draw else 1)
        canvases = {x: chance for x, chance in after.items() if chance}
    result = torch.zeros((V,) * T, dtype=torch.float64)
    for x, chance in canvases.items():
        result[x] = chance
    return result


def confidence(i, token, p, logits, start):
    return float(p[i, token])


def ex5(my):
    import diffusion
    peaked = torch.tensor([0.6, 0.3, 0.1, 0.0], dtype=torch.float64).log()
    for model, length, size in (
            (MODEL, T, V), (unsure(3, 3, False), 3, 3), (lambda ids: peaked.expand(*ids.shape, 4), 3, 3),
            (unsure(2, 4, False, seed=1), 2, 4)):
        calls = []

        def counted(ids, model=model, calls=calls):
            calls.append(ids)
            fail_if(len(calls) > 20_000, 'this never ends: is [MASK] among the proposals? There are V of them for a mask')
            return model(ids)

        got = torch.as_tensor(my.ex5_law(counted, size, length, size)).double()
        shape = (size,) * length
        fail_if(got.shape != shape, f'expected probabilities of shape {shape}, got {tuple(got.shape)}')
        right = law(model, length, size, confidence)
        distance = total_variation(got, right)
        if distance < 1e-6:
            continue
        fail_if(not near(got.sum(), 1), f'probabilities add up to 1, these to {float(got.sum()):.6f}')
        fail_if(model is MODEL and total_variation(got, P) < 0.05, 'this is the true distribution, but the position must '
                'be chosen after the draw, by what was drawn')

        def other(score, model=model, length=length, size=size, **options):
            return law(model, length, size, score, **options)

        start = model(torch.full((1, length), size))[0].softmax(-1)[:, :size]
        at_once = functools.reduce(lambda a, b: a[..., None] * b, start)
        mistakes = {
            'this is the mode, but at temperature 1 the proposals are drawn, and only the choice is greedy':
                other(confidence, draw=False),
            'all proposals are written at once (or never drawn again), but one step writes one of them, and then the '
            'model looks again': at_once,
            'this writes the least confident proposal, but the most confident one is right':
                other(lambda *a: -confidence(*a)),
            'the position must be chosen after the draw, by the probability of what was drawn, not of the best token':
                other(lambda i, token, p, logits, start: float(p[i].max())),
            'this compares logits, but the confidence is the probability (softmax) of the proposal':
                other(lambda i, token, p, logits, start: float(logits[i, token])),
            'the confidence is of the first pass, but after each step the model gives new probabilities':
                other(lambda i, token, p, logits, start: float(start[i, token])),
            'of equally confident proposals this writes the rightmost, but the leftmost is asked for':
                other(lambda i, token, p, logits, start: (round(float(p[i, token]), 9), i)),
            'this writes from left to right, but the most confident proposal comes first': other(lambda i, *rest: -i),
            'this writes from right to left, but the most confident proposal comes first': other(lambda i, *rest: i)}
        for axes in itertools.permutations(range(length)):
            fail_if(model is MODEL and torch.allclose(got, right.permute(axes)), 'the axes are exchanged: axis i is the token at position i')
        close = 'is it sampled? The exact law is asked for: go through all proposals' if distance < 0.03 else (
            'at every step draw anew for each mask, write the proposal with the highest probability, and ask the model again')
        name_it(got, right, mistakes, f'{distance:.4f} (total variation) from this law: {close}')

    # the independent truth: what the sampler of the project writes
    law_of_table = law(MODEL, T, V, confidence)
    params = diffusion.SamplingParams(steps=T, temperature=1.0)
    x, _ = diffusion.generate(MODEL, torch.full((20000, T), MASK), MASK, params, generator=seeded(0))
    distance = total_variation(law_of_table, frequencies(x))
    fail_if(distance > 0.03,
            f'20,000 real samples are {distance:.3f} (total variation) from this law, noise is 0.016')
    return (f'low confidence samples from a law that is {total_variation(law_of_table, P):.3f} (total variation) from the '
            f'true distribution. 20,000 samples of generate() are {distance:.3f} from your law, which is noise')


def ex6(my):
    cases = json.loads((GOLDEN / 'transfer_tokens.json').read_text())['cases']
    pairs = [(case['mask_num'], case['steps']) for case in cases if 'mask_num' in case]
    for n, steps in [(7, 3), (5, 8), (64, 64), (0, 3), *pairs]:
        got = [int(count) for count in my.ex6_counts(n, steps)]
        where = f'{n} masks in {steps} steps'
        fail_if(len(got) != steps, f'{where}: expected {steps} numbers, got {len(got)}')
        fail_if(sum(got) != n, f'{where}: {got[:8]} adds up to {sum(got)} (rounding loses or invents some)')
        up = [max(0, min(-(-n // steps), n + n // -steps * k)) for k in range(steps)]
        fail_if(got == up != sorted(got, key=lambda k: -k) or got == up and max(up) - min(up) > 1,
                f'{where}: {got[:8]} rounds up in every step until nothing is left, but counts differ by at most 1')
        fail_if(max(got) - min(got) > 1,
                f'{where}: {got[:8]} is uneven, because one step gets all of the remainder')
        fail_if(got != sorted(got, reverse=True), f'{where}: the remainder comes first, not {got[:8]}')

    c, u = torch.randn(2, 4, 3, 5, generator=seeded(0))
    for w in (1.5, 0.0):
        got = call(my.ex6_guide, conditional=c, unconditional=u, w=w)
        name_it(got, u + (w + 1) * (c - u), {
            'one w is missing: it goes w + 1 times the way, so that w = 0 gives the conditional logits': u + w * (c - u),
            'one w is too many: it goes w + 1 times the way from the unconditional logits': c + (w + 1) * (c - u),
            'the direction is wrong: it must lead away from the unconditional logits': c + w * (u - c),
            'conditional and unconditional are exchanged': c + (w + 1) * (u - c),
            'the unconditional logits are added, but they are subtracted w times': (w + 1) * c + w * u,
            'the unconditional logits are subtracted w times, not w + 1 times': (w + 1) * c - (w + 1) * u,
            'this only multiplies the conditional logits, but they are moved away from the unconditional ones':
                (w + 1) * c,
            'these are probabilities, but logits are guided': u.softmax(-1) + (w + 1) * (c.softmax(-1) - u.softmax(-1)),
            'the result is normalised, but logits go in and logits come out':
                (u + (w + 1) * (c - u)).log_softmax(-1),
            'the inputs are normalised first, but logits go in and logits come out':
                u.log_softmax(-1) + (w + 1) * (c.log_softmax(-1) - u.log_softmax(-1)),
            'the result is turned into probabilities, but logits are asked for': (u + (w + 1) * (c - u)).softmax(-1),
            }, f'w = {w}: expected uncond + (w + 1)(cond - uncond), got something else')
    p = (c + 2 * (c - u))[0, 0].softmax(-1)
    token = int((c - u)[0, 0].argmax())
    return (f'the token that the condition favours most has {float(c[0, 0].softmax(-1)[token]):.3f} without guidance '
            f'and {float(p[token]):.3f} with w = 2')


def ex7(my):
    generator = seeded(0)
    keys = torch.randn(2, 3, 8, 4, generator=generator)
    new = torch.randn(2, 3, 2, 4, generator=generator)
    pos = torch.tensor([6, 1])
    got = call(my.ex7_write, keys=keys, new=new, pos=pos)
    fail_if(got.shape != keys.shape,
            f'expected the keys of all positions, {tuple(keys.shape)}, got {tuple(got.shape)}')
    fail_if(torch.equal(got[:, :, :2], new), 'this writes to the first positions, but pos says where')
    fail_if(torch.equal(got[:, :, pos.sort().values], new),
            'in the wrong order: new[:, :, k] belongs to position pos[k]')
    others = [0, 2, 3, 4, 5, 7]
    fail_if(torch.allclose(got[:, :, pos], (keys.index_add(2, pos, new))[:, :, pos]),
            'this adds the new keys to the old ones, but they are replaced')
    fail_if(not torch.equal(got[:, :, others], keys[:, :, others]), 'positions that are not in pos must stay')
    fail_if(not torch.equal(got[:, :, pos], new), 'the keys at pos are not the new ones')

    # the independent truth: two layers of attention that are given a part of the canvas, in any order
    embed = torch.randn(12, 30, 8, generator=generator)
    matrices = torch.randn(2, 3, 8, 8, generator=generator) / 3

    def two_layers(ids, pos, cache, causal):
        h, after = embed[pos, ids[pos]], []
        pattern = torch.arange(12) <= pos[:, None] if causal else torch.ones(len(pos), 12, dtype=torch.bool)
        for (q, k, v), kv in zip(matrices, cache):
            new = [(h @ w).view(1, len(pos), 2, 4).transpose(1, 2) for w in (q, k, v)]
            kv = [my.ex7_write(old, z, pos) for old, z in zip(kv, new[1:])]
            h = h + attention(new[0], *kv, attn_mask=pattern)[0].transpose(0, 1).flatten(1)
            after.append(kv)
        return h, after

    ids, everything, some = torch.arange(12), torch.arange(12), torch.tensor([3, 9, 4])
    empty = [[torch.zeros(1, 2, 12, 4)] * 2] * 2
    off = {}
    for causal in (True, False):
        expected, cache = two_layers(ids, everything, empty, causal)
        again, _ = two_layers(ids, some, cache, causal)
        fail_if(not torch.allclose(again, expected[some], atol=1e-5), 'a Transformer with this cache gives other numbers')
        # a token is committed at position 9, and only position 9 is computed anew
        after = torch.where(everything == 9, 25, ids)
        exact, exact_cache = two_layers(after, everything, empty, causal)
        cached, _ = two_layers(after, everything[9:10], cache, causal)
        changed = [int((a[0] != b[0]).any(-1).any(1).sum()) for a, b in zip(cache, exact_cache)]
        off[causal] = float((cached - exact[9]).abs().max()), changed
    fail_if(off[True][0] > 1e-5, 'in a causal model a cache is exact, but with yours it is not')
    return (f'after one new token a causal cache is off by {off[True][0]:.3f}, and one that looks both ways by '
            f'{off[False][0]:.3f}. Of its 12 keys {off[False][1][0]} changed in layer 1 and {off[False][1][1]} in layer 2')


def ex8(my):
    for text, n, nats in ((' naïve: 漢字 in 6 words\n', 11, 2.5), ('plain words', 7, 0.3)):
        raw = text.encode()
        explain(my.ex8_bits_per_byte(nats, n, text), lambda unit, tokens, per: nats * unit * tokens / per, {
            '': 1 / math.log(2), 'these are nats, and one bit is log 2 nats': 1,
            'nats are divided by log 2, not multiplied': math.log(2),
            'this divides by the logarithm of 10 or of 256, but a bit is log 2 nats': 1 / math.log(10),
            'this divides by log 256, but a bit is log 2 nats': 1 / math.log(256)}, {
            '': n, 'the nats are per token, and there are n_tokens of them': 1,
            'this divides by the number of tokens, but multiply by it': 1 / n}, {
            '': len(raw), 'these are bits per character, but in UTF-8 some characters take more than a byte': len(text),
            'these are bits per token, but a token is not a byte': n,
            'this is the sum over the text, so divide by its bytes': 1,
            'these are bits per word, but divide by bytes': len(text.split()),
            'spaces at the ends are bytes as well': len(text.strip().encode()),
            'this multiplies by the bytes, but divide by them': 1 / len(raw),
            'the bytes are those of UTF-8, not of UTF-16': len(text.encode('utf-16')),
            'the bytes are those of UTF-8, not of UTF-32': len(text.encode('utf-32'))})
    return f'2.5 nats per token and 4.1 bytes per token are {my.ex8_bits_per_byte(2.5, 10, "x" * 41):.2f} bits per byte'


def schedules(n, k):
    """Yield all lists of k positive numbers that add up to n."""
    for cuts in itertools.combinations(range(1, n), k - 1):
        yield [b - a for a, b in zip((0, *cuts), (*cuts, n))]


def entropies(p):
    """Return h(j), the mean entropy in nats of a hidden token given j others, of a distribution p (V,) * T."""
    n = p.dim()
    total = [0.0] * (n + 1)                                 # the mean entropy of j tokens
    for j in range(1, n + 1):
        for hidden in itertools.combinations(range(n), n - j):
            q = p.sum(hidden) if hidden else p
            total[j] += float(-(q * q.log()).sum()) / math.comb(n, j)
    return [after - before for before, after in zip(total, total[1:])]


def weather(n=9, stay=0.9):
    """Return a distribution (2,) * n in which a token is that of its left neighbour with probability `stay`."""
    p = torch.ones((2,) * n, dtype=torch.float64) / 2
    for x in itertools.product(range(2), repeat=n):
        p[x] *= math.prod(stay if a == b else 1 - stay for a, b in zip(x, x[1:]))
    return p


def step_cost(h, a, b):
    return (b - a) * h[min(a, len(h) - 1)] - sum(h[a:b])


class Read(list):
    """A row of costs that counts how often it is read."""
    reads = 0

    def __getitem__(self, i):
        Read.reads += 1
        return super().__getitem__(i)


def ex9(my):
    h = entropies(weather())
    n = len(h)
    cost = call(my.ex9_cost, h=h)
    fail_if(len(cost) != n + 1 or any(len(row) != n + 1 for row in cost), f'cost is a table of {n + 1} x {n + 1} numbers')
    fail_if(all(abs(row[b]) < 1e-12 for row in cost for b in range(n + 1)), 'all costs are 0')
    steps = list(itertools.combinations(range(n + 1), 2))
    got = torch.tensor([float(cost[a][b]) for a, b in steps])
    versions = {
        '': lambda a, b: step_cost(h, a, b),
        'the sign is wrong, because a step can only lose': lambda a, b: -step_cost(h, a, b),
        'this has h(b) in place of h(a), but the step sees a tokens': lambda a, b: (b - a) * h[min(b, n - 1)] - sum(h[a:b]),
        'this is the entropy of the written tokens, but only the loss counts': lambda a, b: sum(h[a:b]),
        'the sum of h(a) ... h(b - 1) is to be subtracted: that is what one token per step would give':
            lambda a, b: (b - a) * h[a],
        'the sum begins at 0, but this step begins at a': lambda a, b: (b - a) * h[a] - sum(h[:b]),
        'the sum ends at h(b - 1), not at h(b)': lambda a, b: (b - a) * h[a] - sum(h[a:b + 1]),
        'the sum begins at h(a), not at h(a + 1)': lambda a, b: (b - a) * h[a] - sum(h[a + 1:b + 1]),
        'this is in bits': lambda a, b: step_cost(h, a, b) / math.log(2),
        'this is per token, but all b - a tokens count': lambda a, b: step_cost(h, a, b) / (b - a),
        'one token is always given by itself: h(a) is counted b - a times, not b - a - 1': lambda a, b: (
            step_cost(h, a, b) - h[a])}
    versions = {m: torch.tensor([f(a, b) for a, b in steps]) for m, f in versions.items()}
    transposed = torch.tensor([float(cost[b][a]) for a, b in steps])
    fail_if(torch.allclose(transposed, versions['']) and not torch.allclose(got, versions['']),
            'the table is transposed: a, what is already written, is the row')
    name_it(got, versions.pop(''), versions, 'these are not the costs (b - a) h(a) - (h(a) + ... + h(b - 1))')
    # an independent truth: all at once loses the divergence between the text and tokens that know nothing of each other
    table = my.ex9_cost(entropies(P))[0][T]
    product = torch.einsum('a,b,c->abc', P.sum((1, 2)), P.sum((0, 2)), P.sum((0, 1)))
    divergence = float((P * (P / product).log()).sum())
    fail_if(not near(table, divergence), f'all of a text at once costs {table:.6f}, and KL(truth | product) is {divergence:.6f}')

    # costs from entropies, and made-up ones for which the order and the place of a big step matter
    luck = torch.rand(n + 1, n + 1, generator=seeded(38))
    fake = [[float(luck[a, b]) * (1 + abs(b - a)) for b in range(n + 1)] for a in range(n + 1)]
    real = [[step_cost(h, min(a, b), max(a, b)) for b in range(n + 1)] for a in range(n + 1)]
    for table, size, k in ((real, 9, 3), (real, 9, 4), (fake, 7, 3), (fake, 9, 4), (fake, 7, 7), (fake, 5, 1)):
        sizes = [int(size) for size in call(my.ex9_schedule, cost=table, T=size, k=k)]
        where = f'{size} tokens in {k} steps'
        fail_if(len(sizes) != k, f'{where}: expected {k} numbers, got {sizes}')
        fail_if(sum(sizes) != size or min(sizes) < 1, f'{where}: {sizes} are not positive numbers that add up to {size}')

        def parts(sizes, table=table):
            ends = list(itertools.accumulate(sizes))
            return [table[end - size][end] for size, end in zip(sizes, ends)]

        def price(sizes, parts=parts):
            return sum(parts(sizes))

        every = list(schedules(size, k))
        best = min(every, key=price)
        if near(price(sizes), price(best)):
            continue
        equal = [size // k + (i < size % k) for i in range(k)]
        greedy, a = [], 0
        for j in range(k - 1):
            greedy.append(min(range(1, size - a - (k - 1 - j) + 1), key=lambda d: table[a][a + d]))
            a += greedy[-1]

        def turned(sizes, table=table):
            ends = list(itertools.accumulate(sizes))
            return sum(table[end][end - size] for size, end in zip(sizes, ends))

        name_it(sizes, best, {
            f'equal steps cost {price(equal):.4f} and the best ones {price(best):.4f}, so let the costs decide': equal,
            f'{where}: these are the best sizes in the wrong order: {sizes}': best[::-1],
            f'{where}: this is the dearest schedule, so maximum and minimum are exchanged': max(every, key=price),
            f'{where}: this makes the dearest step cheap (min-max), but the sum of all steps counts':
                min(every, key=lambda s: max(parts(s))),
            f'{where}: this reads cost[b][a] (transposed), but a, what is already written, comes first':
                min(every, key=turned),
            f'{where}: {sizes} is greedy, because each step takes what is cheapest for itself': [*greedy, size - a],
            f'{where}: {sizes} doubles in every step, whatever it costs':
                [2 ** j for j in range(k - 1)] + [size - 2 ** (k - 1) + 1],
            f'{where}: {sizes} are the right sizes in another order': next(
                (list(s) for s in itertools.permutations(best) if list(s) == sizes), None),
            }, f'{sizes} costs {price(sizes):.4f}, the best schedule {price(best):.4f}: is there a greedy choice in it?')

    # dynamic programming reads a cost once for each number of steps
    big = [Read((b - a) ** 2 / (1 + a) for b in range(25)) for a in range(25)]
    Read.reads = 0
    my.ex9_schedule(big, 24, 6)
    fail_if(Read.reads > 6 * 25 * 25 * 2, f'right, but this reads {Read.reads:,} costs for 24 tokens in 6 steps: it tries '
            'all schedules. Keep the best way to write b tokens in j steps, and build on it')
    best = call(my.ex9_schedule, cost=real, T=9, k=3)
    loss = [sum(step_cost(h, e - d, e) for d, e in zip(sizes, itertools.accumulate(sizes))) for sizes in (best, [3] * 3)]
    return (f'nine tokens, each like its neighbour in 90 % of the texts: h = {h[0]:.2f} ... {h[-1]:.2f} nats, the best '
            f'three steps {best} lose {loss[0]:.3f} nats, and [3, 3, 3] loses {loss[1]:.3f}')


def ex10(my):
    for lengths in ([3, 1, 4], [3, 1, 3, 1], [2, 2, 2], [5], [1, 1, 1]):
        size = sum(lengths)
        got = call(my.ex10_attention_mask, lengths=lengths)
        fail_if(not torch.is_tensor(got) or tuple(got.shape) != (size, size) or got.dtype != torch.bool,
                f'expected ({size}, {size}) bool, got {getattr(got, "shape", got)} {getattr(got, "dtype", "")}')
        right = torch.block_diag(*(torch.ones(n, n) for n in lengths)).bool()
        length = torch.tensor(lengths).repeat_interleave(torch.tensor(lengths))
        number = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        name_it(got, right, {
            'it is the wrong way round: True is where a query may attend': ~right,
            'this is causal, but a mask predictor looks in both directions': right.tril(),
            'this looks at later tokens only, but a mask predictor looks in both directions': right.triu(),
            'everything attends to everything, but segments must not see each other': right | True,
            'everything before attends as well (causal by segments), but segments must not see each other':
                number[:, None] >= number,
            'this compares the lengths of the segments, but two segments may have the same length: number them':
                length[:, None] == length},
            'a query attends across a border' if (got & ~right).any() else
            'a query does not attend to all of its own segment')

        # the independent truth: packed segments give what each segment gives alone
        q, k, v = torch.randn(3, 1, 2, size, 4, generator=seeded(0))
        alone = [attention(*parts) for parts in zip(*(z.split(lengths, 2) for z in (q, k, v)))]
        off = float((attention(q, k, v, attn_mask=got[None, None]) - torch.cat(alone, 2)).abs().max())
        fail_if(off > 1e-5, 'attention in a packed segment differs from the segment alone')
    return 'attention in a packed row and in each segment alone are equal, also if two segments have the same length'


def together(my):
    """Train a small network on the 27 texts with the student's ex1_loss and ex2_hide, then score and sample."""
    torch.manual_seed(0)
    onehot, never = torch.eye(V + 1), torch.tensor([0.0] * V + [-math.inf])         # [MASK] is not a token
    net = nn.Sequential(nn.Linear(12, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 12))

    def model(ids):
        return net(onehot[ids].flatten(1)).view(-1, T, V + 1) + never

    optimizer = torch.optim.Adam(net.parameters())
    generator, updates, rows = seeded(0), 400, 512
    for i in range(updates):
        for group in optimizer.param_groups:
            group['lr'] = 1e-2 * (1 - i / updates)
        x0 = TEXTS[torch.multinomial(P.flatten(), rows, replacement=True, generator=generator)]
        n = torch.randint(1, T + 1, (rows,), generator=generator)
        masked = my.ex2_hide(torch.ones_like(x0).bool(), n, torch.rand(x0.shape, generator=generator))
        loss = my.ex1_loss(model, x0, torch.where(masked, MASK, x0), masked, n / T)
        fail_if(not loss.requires_grad, 'no gradient reaches the model (exercise 1)')
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    with torch.no_grad():
        def trained(ids):
            return model(ids).double()

        bound = sum(float(p) * float(my.ex3_bound(trained, text, MASKS[MASKS.sum(1) == size], MASK)) / T
                    for text, p in zip(TEXTS, P.flatten()) for size in range(1, T + 1))
        away = []
        for n in (1, T):
            x = torch.full((20_000, T), MASK)
            while (x == MASK).any():
                before = int((x == MASK).sum())
                x = my.ex4_step(trained, x, MASK, n, generator)
                fail_if(int((x == MASK).sum()) >= before, 'a step writes nothing (exercise 4)')
            away.append(total_variation(frequencies(x), P))
    fail_if(-bound < ENTROPY - 1e-3, f'{-bound:.4f} nats are less than the entropy {ENTROPY:.4f}, so it is no bound (ex. 3)')
    fail_if(-bound > ENTROPY + 0.05, f'the model has {-bound:.3f} nats, far from the entropy {ENTROPY:.3f}: are exercises 1 '
            'to 3 green?')
    fail_if(away[0] > 0.06, f'one token per step is {away[0]:.3f} from the truth (total variation): is exercise 4 green?')
    return (f'your loss trained a network to {-bound:.4f} nats by your bound (the entropy is {ENTROPY:.4f}), and your '
            f'sampler is {away[0]:.3f} from the truth with one token per step, {away[1]:.3f} with all at once')


CHECKS = {f.__name__: check_of(f) for f in (ex1, ex2, ex3, ex4, ex5, ex6, ex7, ex8, ex9, ex10, together)}
