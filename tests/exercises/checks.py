"""Check exercises 1 to 4 against an independent truth. Red is a sentence that names the mistake, green is the truth.

Each check takes the functions under test as a module or a namespace, so tests/test_exercises.py can also run it
on right answers and on wrong ones. It returns what it found, in words.
"""

import itertools
import math

import checks_more
import torch
from helpers import MASK, T, V, seeded
from naming import (
    ENTROPY,
    MASKS,
    MODEL,
    TEXTS,
    P,
    call,
    check_of,
    explain,
    fail_if,
    frequencies,
    log_p,
    near,
    surprise,
    total_variation,
    unsure,
    versions_of_log_p,
)


def ex1(my):
    # 1) a batch in which every number of something is another number
    masked = [[1, 0, 1, 0], [0, 0, 0, 1], [1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 0, 0]]
    masked = torch.tensor(masked).bool()
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

    (B, length), n, hidden = masked.shape, masked.numel(), masked.sum(1)

    def value(weight, over, divisor, logp, sign):
        return sign * (torch.where(over, logp, 0.0).sum(1) * weight / divisor).sum()

    weights = {
        '': 1 / t,
        "1/t is missing: this is BERT's loss, and not a bound, because rows with few masks count too little":
            torch.ones(B),
        'this is the mean over the masked tokens, without 1/t, so it is not the bound of Eq. 3': n / hidden.sum(),
        'this has T/l, from the number l of masks in the row, in place of 1/t (or divides each row by its '
        'number '
        'of masked tokens): right for exactly l masks (Eq. 14), but here t is given': length / hidden.clamp(min=1),
        'this uses one t for the whole batch, but each row has its own': 1 / t.mean(),
        'this uses the mean of 1/t for the whole batch, but each row has its own t': (1 / t).mean(),
        'the weight is 1/t, not 1/(1 - t), because t is the probability to be hidden': 1 / (1 - t),
        'the weight is 1/t, not t': t, 'the weight is 1/t, not 1 - t': 1 - t,
        'the weight is 1/t, not 1/t^2': t ** -2,
        'the weight is 1/t, not its square root': t ** -0.5, 'the weight is 1/t, not -log t': -t.log()}
    over = {'': masked,
            'this counts visible tokens as well, but only the masked ones are in the sum': masked | True,
            'this counts the visible tokens (~masked), but the masked ones are in the sum': ~masked}
    divisors = {
        '': n, 'this divides by the number of masked tokens, but Eq. 3 divides by all tokens': hidden.sum(),
        'this divides by the number of visible tokens, but Eq. 3 divides by all tokens': (~masked).sum(),
        'this divides by the number of rows only, but Eq. 3 divides by T as well': B,
        'this is a sum over the rows, divided by T, but Eq. 3 is their mean': length,
        'this is a sum, but Eq. 3 divides by B and by T': 1,
        'this divides by T - 1, but all T tokens are predicted': B * (length - 1),
        'rows without a mask are left out of the mean, but Eq. 3 counts them (as 0)': (hidden > 0).sum() * length,
        'this divides each row by its number of masked tokens, but Eq. 3 divides by T': B * hidden.clamp(min=1),
        'this divides by T twice': n * length, 'this divides by B twice': n * B}
    logits = model(xt)
    sign = {'': -1, 'the sign is wrong, because a loss is -log p': 1}
    explain(got, value, weights, over, divisors, versions_of_log_p(logits, x0), sign)

    # 2) can it train?
    fail_if(not got.requires_grad, 'the number is right, but no gradient reaches the model, so this loss '
        'cannot train (no_grad, detach, item?)')
    slope, = torch.autograd.grad(got, scale)
    right, = torch.autograd.grad(value(1 / t, masked, n, log_p(logits, x0), -1), scale)
    fail_if(not torch.allclose(slope, right, rtol=1e-4),
            'the number is right, but its gradient is not: is a part of it detached?')

    # 3) rows of their own, with the smallest and the largest t
    for t in (0.5, 0.2, 0.05, 0.004, 0.001, 0.97, 1.0):
        loss = call(my.ex1_loss, model=logits_of, x0=x0[:1], xt=xt[:1], masked=masked[:1],
                    t=torch.tensor([t], dtype=torch.float64))
        weight = float(loss / -log_p(logits_of(xt[:1]), x0[:1])[masked[:1]].sum()) * length
        fail_if(not near(weight, 1 / t), f'at t = {t} the weight is {weight:.5g} in place of 1/t = '
            f'{1 / t:.5g}: is t clamped, or is something added to it?')
    nothing = call(my.ex1_loss, model=logits_of, x0=x0, xt=x0, masked=masked & False, t=torch.ones(B))
    fail_if(not near(nothing, 0), f'if nothing is masked, the loss is 0, but this is {float(nothing)}')

    # The independent truth: averaged over all texts, masks and t, the loss is the entropy per token.
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
    fail_if(not any(ordered), 'the subsets are not equally likely: hide the n positions with the smallest u, '
        'and do not change u by a factor, a power or a position')
    return f'exactly n, and the 6 ways to hide 2 of 4 came {sorted(shares[0].tolist())} times of 2000'


def ex3(my):
    # 1) five tokens, a model that is also unsure of visible ones, and a mask that comes twice
    x0 = torch.tensor([1, 0, 3, 2, 0])
    masks = [[1, 0, 1, 0, 0], [0, 1, 1, 1, 0], [1, 0, 1, 0, 0], [0, 0, 0, 0, 1], [1, 1, 0, 1, 1]]
    masks = torch.tensor(masks).bool()
    masks = torch.cat((masks, masks[3:4], ~masks[2:3]))
    model, n, rows = unsure(5, 4), masks.sum(1), x0.expand(len(masks), -1)
    got = call(my.ex3_bound, model=model, x0=x0, masks=masks, mask_id=4)
    fail_if(torch.is_tensor(got) and got.dim(), 'expected a number, got the shape '
        f'{tuple(getattr(got, "shape", ()))}')

    order = torch.arange(5)
    in_order = log_p(model(torch.where(order >= order[:, None], 4, x0)), x0.expand(5, -1)).diagonal().sum()
    fail_if(near(got, in_order), 'this is the chain rule from left to right, but Eq. 6 uses the masks it is '
        'given')

    def value(factor, over, logp, reduce, sign):
        return sign * reduce(factor * torch.where(over, logp, 0.0).sum(1))

    def mean_by_size(values):
        return torch.stack([values[n == size].mean() for size in n.unique()]).mean()

    factors = {
        '': 5 / n,
        'T/l is missing, but a mask that hides few tokens stands for all T of them': torch.ones(len(n)),
        'this is log p of one token; for T tokens multiply by T': 1 / n, 'the factor is T/l, not l/T': n / 5,
        'T is the length of x0, but this has 3 written into it': 3 / n,
        'l is the number of masked tokens, not of the visible ones': 5 / (5 - n)}
    over = {'': masks, 'this counts all tokens, but only the masked ones are in the sum': masks | True,
            'this counts the visible tokens, but the masked ones are in the sum': ~masks}
    logps = versions_of_log_p(model(torch.where(masks, 4, x0)), rows)
    logps.update({
        'the model sees x0 itself, so it need not guess: put [MASK] where the mask is True':
            log_p(model(rows), rows),
        'hidden and visible are exchanged in what the model sees: [MASK] belongs where the mask is True':
            log_p(model(torch.where(masks, x0, 4)), rows)})
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
        got, right = call(my.ex3_bound, model=model, x0=x0, masks=some, mask_id=4), (5 / some.sum(1) * logp).mean()
        fail_if(not near(got, right), f'with {len(some)} masks {float(got):.6f} is not {float(right):.6f}')

    # 2) the independent truth: with l uniform, and all masks of one l equally likely, the mean is -entropy
    def bound(model, text):
        of_size = [MASKS[MASKS.sum(1) == size] for size in (1, 2, 3)]
        return sum(float(my.ex3_bound(model, text, masks, MASK)) for masks in of_size) / T

    total = sum(float(p) * bound(MODEL, text) for text, p in zip(TEXTS, P.flatten()))
    fail_if(not near(-total, ENTROPY),
            f'over all texts and masks it is {-total:.6f} nats, the entropy is {ENTROPY:.6f}')

    # 3) a predictor that contradicts itself: exercise 4 writes in a random order, so p is a mean over orders
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
    return (f'a perfect predictor has a bound of {total:.4f} nats, and {-ENTROPY:.4f} is the truth. One that '
        f'contradicts itself has {float((P.flatten() * bounds).sum()):.4f}, and what it writes has log p '
        f'{float((P.flatten() * log_of_mean).sum()):.4f}: a bound, not the value. {spread(my)}')


def spread(my, text=5):
    """Compare the standard deviation of one draw of Eq. 6 and of Eq. 5 (t uniform on 0.001 ... 1), exactly."""
    text, masks, n = TEXTS[text], MASKS[1:], MASKS[1:].sum(1)
    eq6 = torch.stack([torch.as_tensor(my.ex3_bound(MODEL, text, mask[None], MASK)) for mask in masks]).double()
    t = torch.linspace(0.001, 1, 100_001, dtype=torch.float64)[:, None]
    sums, chance = eq6 * n / T, t ** n * (1 - t) ** (T - n)
    share = torch.tensor([1 / T / math.comb(T, int(size)) for size in n], dtype=torch.float64)
    sd6 = (share @ eq6 ** 2 - (share @ eq6) ** 2) ** 0.5
    mean5, square5 = ((chance * (sums / t) ** k).sum(1).mean() for k in (1, 2))
    return (f'One draw of Eq. 6 on text {"".join(map(str, text.tolist()))}: {share @ eq6:.2f} +- {sd6:.2f}, '
        f'and of Eq. 5: {mean5:.2f} +- {(square5 - mean5 ** 2) ** 0.5:.2f}.')


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
        mask_id = MASK if model is MODEL else 5
        new = call(my.ex4_step, model=model, x=x, mask_id=mask_id, n=n, generator=generator)
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
    for n, rows in ((2, some), (2, some[[1, 0]]), (4, some), (1, some), (1, some[3:])):
        new = step(rows.repeat(200, 1), n, seeded(0)).view(200, *rows.shape)
        fail_if(((new != rows) & (rows != 5)).any(), 'it writes over visible tokens where fewer than n masks '
            'are left, or changes tokens that were written before')
        before, left = (rows == 5).sum(1), (new[0] == 5).sum(1)
        fail_if(((new == 5).sum(2) != (before - n).clamp(min=0)).any(),
                f'rows with {before.tolist()} masks and n = {n} have {left.tolist()} masks after the step, '
                'but each row must lose n of its own, or all it has, if fewer than n are left')
    calls.clear()
    step(x[:8], 3, seeded(0))
    fail_if(len(calls) != 1, f'one step looks at the canvas once, but this calls the model {len(calls)} '
        'times: tokens of one step do not see each other')

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

    # 3) all tokens at once: each from its own softmax, independent of the others
    generator = seeded(1)
    new = step(x, 4, generator)[:, 1:]
    certain = torch.arange(4) == s[:, None]
    best = torch.where(certain, 4, 0)
    fail_if((new == best).all(), 'it writes the most probable token, but tokens are drawn from the softmax')
    fail_if((new[::4] == new[0]).all(), 'all rows get the same tokens: is there one draw for all rows, or '
        'none?')
    for p, drawn in ((flat, new[~certain]), (sharp, new[certain])):
        counts = torch.bincount(drawn, minlength=5)[:5].double()
        f = counts / counts.sum()
        fail_if((f == 0).any(), f'it never draws tokens of probability {p[f == 0].tolist()}: top-k, top-p, '
            'or the maximum?')
        x_, y_ = p.log(), f.log()
        power = float(((x_ - x_.mean()) * (y_ - y_.mean())).sum() / ((x_ - x_.mean()) ** 2).sum())
        fail_if(surprise(counts, p) > 9, f'tokens of probability {[round(float(q), 3) for q in p]} come with '
            f'frequency {[round(float(q), 3) for q in f]}: like p to the power {power:.2f}. Is there a '
            'temperature, or other noise than Gumbel noise?')
    drawn = new[~certain].view(-1, 3)
    for pair, rows in ((drawn[:, :2], 'of one row'), (drawn[:, 0].view(-1, 2), 'of two rows')):
        counts = torch.bincount(pair[:, 0] * 5 + pair[:, 1], minlength=25).double()
        fail_if(surprise(counts, torch.outer(flat, flat).flatten()) > 5,
                f'tokens {rows} depend on each other, but every mask has a draw of its own')

    fail_if(torch.equal(tokens[3], tokens[4]), again.format('tokens'))

    # 4) two of four: which positions, and do they know what was drawn?
    new = step(x, 2, generator)[:, 1:]
    written = new != 5
    fail_if((written == written[0]).all(), 'it fills the same positions in every row, but each row must '
        f'choose its own at random (here it always fills position {int(written[0].int().argmax()) + 1})')
    fail_if(abs(float(written[certain].double().mean()) - 0.5) > 0.01,
            f'the most certain position is written in {float(written[certain].double().mean()):.0%} of the '
            'rows, not in half of them: the choice must not depend on the confidence')
    counts = torch.bincount(new[~certain & written], minlength=5)[:5].double()
    fail_if(surprise(counts, flat) > 7, 'the choice of positions depends on the tokens that were drawn: it '
        'must not depend on the confidence, nor use the random numbers of the tokens again')
    share = written.double().mean(0)
    ways = (written.long() * torch.tensor([8, 4, 2, 1])).sum(1)
    ways = torch.bincount(ways, minlength=16)[[3, 5, 6, 9, 10, 12]]
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
    fail_if(total_variation(once, product) > 0.016, 'all tokens in one step should be independent of each '
        'other')
    return (f'one token per step: {distance:.3f} (total variation) from the true distribution, which is '
        'noise. All at '
        f'once: {total_variation(once, P):.3f}, because tokens of one step do not see each other')


CHECKS = {f.__name__: check_of(f) for f in (ex1, ex2, ex3, ex4, *checks_more.CHECKS)}
