"""The checks of tests/exercises accept right answers, and name the mistake in each typical wrong one."""

import itertools
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

FOLDER = Path(__file__).resolve().parent / 'exercises'
sys.path.append(str(FOLDER))

import checks  # noqa: E402
import checks_more  # noqa: E402
from naming import log_p  # noqa: E402

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
    ex7_write=write, ex8_bits_per_byte=bits, ex9_cost=cost_table, ex9_schedule=schedule,
    ex10_attention_mask=attention_mask)


@pytest.mark.parametrize('name', checks.CHECKS)
def test_the_right_answer_passes(name):
    checks.CHECKS[name](SimpleNamespace(**RIGHT))


def test_the_exercises_ask_for_these_functions():
    # by name only, because a student may have filled them in, or be in the middle of it
    asked = re.findall(r'^def (ex\d+_\w+)', (FOLDER / 'exercises.py').read_text(encoding='utf-8'), re.MULTILINE)
    assert set(asked) == RIGHT.keys()


@pytest.mark.parametrize('name', RIGHT)
def test_what_is_not_written_or_raises_is_red_in_one_sentence(name):
    check = checks.CHECKS[name.partition('_')[0]]
    source = f'def {name}(*_):\n    raise NotImplementedError\n'
    raises = source.replace('NotImplemented', 'Key')
    for code, message in ((source, f'{name} is not written yet'), (raises, 'KeyError')):
        scope = {}
        exec(compile(code, 'exercises.py', 'exec'), scope)
        with pytest.raises(pytest.fail.Exception, match=message) as failed:
            check(SimpleNamespace(**{**RIGHT, name: scope[name]}))
        assert not failed.value.pytrace and '\n' not in str(failed.value)


def test_the_example_by_hand_runs(capsys):
    code, = re.findall(r'```python\n(.*?)```', (FOLDER / 'README.md').read_text(encoding='utf-8'), re.DOTALL)
    scope = {}
    exec(code, scope)
    assert (scope['canvas'] == scope['mask_id']).all() and scope['written'].x[0, 3] == scope['teacher']
    # the forced token is there from the first step on
    steps = [line.split() for line in capsys.readouterr().out.splitlines()[:-1]]
    assert steps and all(step[3] == f"{scope['teacher']:02}" for step in steps)


# ------------------------------------------------------ wrong answers, and what must be said about each


def tokens(masked, x0):
    return masked.numel()


def rows(masked, x0):
    return len(x0)


def masked_tokens(masked, x0):
    return masked.sum()


def wrong_loss(weight=lambda t, masked: 1 / t, divide_by=tokens, sign=-1, over=lambda masked: masked, logp=log_p):
    """Make a version of Eq. 3 with some part of it changed."""
    def wrong(model, x0, xt, masked, t):
        sums = torch.where(over(masked), logp(model(xt), x0), 0.0).sum(1)
        return sign * (sums * weight(t, masked)).sum() / divide_by(masked, x0)
    return wrong


def loss_of_next_token(model, x0, xt, masked, t):
    logp = torch.where(masked[:, 1:], log_p(model(xt)[:, :-1], x0[:, 1:]), 0.0)
    return -(logp / t[:, None]).sum() / masked.numel()


def loss_by_row(model, x0, xt, masked, t):
    logp = torch.where(masked, log_p(model(xt), x0), 0.0)
    return -(logp.sum(1) / masked.sum(1).clamp(min=1) / t).mean()


def logits_of(logits, x0):
    return logits.gather(-1, x0[..., None])[..., 0]


def loss_without_gradient(*a):
    with torch.no_grad():
        return loss(*a)


def half_detached(model, x0, xt, masked, t):
    return loss(model, x0, xt, masked, t) / 2 + loss(model, x0, xt, masked, t).detach() / 2


def changes_xt(model, x0, xt, masked, t):
    result = loss(model, x0, xt, masked, t)
    xt[masked] = 0
    return result


def kth_smallest(maskable, n, u):
    """Hide all that is at most the n-th smallest: wrong for n = 0 and for equal numbers."""
    noise = u.masked_fill(~maskable, 2)
    return noise <= noise.sort(1).values.gather(1, (n - 1).clamp(min=0)[:, None])


def below_next(maskable, n, u):
    """Hide all that is below the next one: wrong for equal numbers only."""
    noise = torch.cat((u.masked_fill(~maskable, 2), torch.full((len(u), 1), 3.0)), 1).sort(1).values
    return maskable & (u < noise.gather(1, n[:, None]))


def hide_in_place(maskable, n, u):
    u[~maskable] = 2
    return u.argsort(1).argsort(1) < n[:, None]


def wrong_bound(sees=lambda x0, masks, mask_id: torch.where(masks, mask_id, x0),
                logp=log_p, over=lambda masks: masks,
                factor=lambda x0, masks: len(x0) / masks.sum(1), reduce=torch.mean):
    """Make a version of Eq. 6 with some part of it changed."""
    def wrong(model, x0, masks, mask_id):
        seen = sees(x0, masks, mask_id)
        logps = torch.where(over(masks), logp(model(seen), x0.expand_as(seen)), 0.0)
        return reduce(factor(x0, masks) * logps.sum(1))
    return wrong


def bound_of_next_token(model, x0, masks, mask_id):
    logp = log_p(model(torch.where(masks, mask_id, x0))[:, :-1], x0.expand_as(masks)[:, 1:])
    return (len(x0) / masks.sum(1) * torch.where(masks[:, 1:], logp, 0.0).sum(1)).mean()


def chain_rule(model, x0, masks, mask_id):
    x, total = torch.full_like(x0, mask_id), 0.0
    for i in range(len(x0)):
        total += log_p(model(x[None]), x0[None])[0, i]
        x[i] = x0[i]
    return total


def bound_written_on_x0(model, x0, masks, mask_id):
    total = 0.0
    for mask in masks:
        xt = x0
        xt[mask] = mask_id
        total += len(x0) / mask.sum() * log_p(model(xt[None]), x0[None])[0][mask].sum()
    return total / len(masks)


def mean_by_size(model, x0, masks, mask_id):
    values, n = len(x0) / masks.sum(1) * masked_sums(model, x0, masks, mask_id), masks.sum(1)
    return torch.stack([values[n == size].mean() for size in n.unique()]).mean()


def wrong_step(order='random', token='drawn', in_place=False, change=lambda n, masked: n,
               tokens_by=None, order_by=None):
    """Make a version of a step with some part of it changed."""
    def wrong(model, x, mask_id, n, generator):
        masked = x == mask_id
        logits = model(x)
        p = logits.softmax(-1)
        if token == 'sharp':
            p = p ** (1 / 0.97)
        if token == 'top-p':
            ranked, index = p.sort(-1, descending=True)
            ranked = ranked * (ranked.cumsum(-1) - ranked < 0.95)
            p = torch.zeros_like(p).scatter(-1, index, ranked)
        noise = torch.rand(p.shape, generator=generator if tokens_by is None else tokens_by(generator), dtype=p.dtype)
        if token == 'same in all rows':
            noise = noise[:1].expand(p.shape)
        if token == 'same in a row':
            noise = noise[:, :1].expand(p.shape)
        gumbel = noise if token == 'uniform noise' else -(-noise.log()).log()
        guess = (p.log() + gumbel).argmax(-1)
        if token == 'most probable':
            guess = p.argmax(-1)

        priority = torch.rand(x.shape, generator=generator if order_by is None else order_by(generator))
        if order == 'noise of the tokens':
            priority = noise.gather(-1, guess[..., None])[..., 0]
        if order in ('confidence', 'least confident'):
            priority = p.gather(-1, guess[..., None])[..., 0] * (1 if order == 'confidence' else -1)
        if order == 'certain':
            priority = p.max(-1).values
        if order == 'left to right':
            priority = -torch.arange(x.shape[1]).expand(x.shape).float()
        if order == 'a bit to the left':
            priority = priority - 0.05 * torch.arange(x.shape[1])
        if order == 'same in all rows':
            priority = priority[:1].expand(x.shape)
        rank = priority.masked_fill(~masked, -2 * x.shape[1]).argsort(1, descending=True).argsort(1)
        new = torch.where(masked & (rank < change(n, masked)), guess, x)
        return x.copy_(new) if in_place else new
    return wrong


def single_steps(model, x, mask_id, n, generator):
    for _ in range(n):
        x = step(model, x, mask_id, 1, generator)
    return x


def step_by_chance(model, x, mask_id, n, generator):
    """Write each mask with probability n / masks."""
    guess = wrong_step()(model, x, mask_id, x.shape[1], generator)
    keep = torch.rand(x.shape, generator=generator) < n / (x == mask_id).sum(1, keepdim=True).clamp(min=1)
    return torch.where(keep, guess, x)


def step_over_visible(model, x, mask_id, n, generator):
    """Take a step that is right while n masks are left."""
    guess = torch.multinomial(model(x).softmax(-1).flatten(0, 1), 1, generator=generator).view(x.shape)
    noise = torch.rand(x.shape, generator=generator).masked_fill(x != mask_id, 2)
    return torch.where(noise.argsort(1).argsort(1) < n, guess, x)


def wrong_law(score):
    """Make a version of the law with another score of the proposals, by the function of the checks."""
    return lambda model, mask_id, T, V: checks_more.law(model, T, V, score)


def sampled_law(model, mask_id, T, V, n=20_000):
    law_of_table = checks_more.law(model, T, V, checks_more.confidence).flatten()
    texts = torch.multinomial(law_of_table, n, replacement=True, generator=checks.seeded(0))
    return (torch.bincount(texts, minlength=V ** T).double() / n).view((V,) * T)


def one_pass_law(model, mask_id, T, V):
    """Return the law of writing all proposals at once."""
    p = model(torch.full((1, T), mask_id))[0].softmax(-1)[:, :V]
    result = torch.ones((), dtype=torch.float64)
    for row in p:
        result = result[..., None] * row
    return result


def law_with_mask_as_token(model, mask_id, T, V):
    def go(x):
        return 1.0 if mask_id not in x else sum(go([k, *x[1:]]) for k in (mask_id, 0))
    return go([mask_id] * T)


def fewer_steps(cost, T, k):
    """Return the cheapest schedule of at most k steps."""
    return min((schedule(cost, T, j) for j in range(1, k + 1)), key=lambda sizes: price(cost, sizes))


def best_of(key, turned=False):
    """Make a search over all schedules, with another idea of what is best."""
    def wrong(cost, T, k):
        def parts(sizes):
            ends = list(itertools.accumulate(sizes))
            return [cost[e][e - n] if turned else cost[e - n][e] for n, e in zip(sizes, ends)]
        return min(checks_more.schedules(T, k), key=lambda sizes: key(parts(sizes)))
    return wrong


def greedy(cost, T, k):
    sizes, a = [], 0
    for j in range(k - 1, 0, -1):
        sizes.append(min(range(1, T - a - j + 1), key=lambda n: cost[a][a + n]))
        a += sizes[-1]
    return [*sizes, T - a]


def wrong_cost(f):
    return lambda h: [[f(h, a, b) if a < b else 0.0 for b in range(len(h) + 1)] for a in range(len(h) + 1)]


def by_length(lengths):
    length = torch.tensor(lengths).repeat_interleave(torch.tensor(lengths))
    return length[:, None] == length


# what is wrong -> the function, what the check must say (a regular expression)
WRONG = {
    'ex1_loss': [
        (wrong_loss(weight=lambda t, m: 1, divide_by=masked_tokens), 'mean over the masked tokens, without'),
        (wrong_loss(weight=lambda t, m: 1), "BERT's loss"),
        (wrong_loss(divide_by=masked_tokens), 'Eq. 3 divides by all tokens'),
        (wrong_loss(weight=lambda t, m: (1 / t.mean()).expand(len(t))), 'one t for the whole batch'),
        (wrong_loss(weight=lambda t, m: 1 / t.mean(), divide_by=masked_tokens), 'one t for .* and .*all tokens'),
        (wrong_loss(weight=lambda t, m: 1 / (1 - t)), r'not 1/\(1 - t\)'),
        (wrong_loss(weight=lambda t, m: t), 'not t'),
        (wrong_loss(weight=lambda t, m: t ** -2), r'not 1/t\^2'),
        (wrong_loss(weight=lambda t, m: m.shape[1] / m.sum(1).clamp(min=1)), r'T/l.*Eq. 14'),
        (wrong_loss(divide_by=rows), 'number of rows only'),
        (wrong_loss(divide_by=lambda m, x0: x0.shape[1]), 'sum over the rows'),
        (wrong_loss(divide_by=lambda *_: 1), 'a sum'),
        (wrong_loss(divide_by=lambda m, x0: m.any(1).sum() * x0.shape[1]), 'rows without a mask are left out'),
        (wrong_loss(over=lambda m: m | True), 'counts visible tokens'),
        (wrong_loss(over=lambda m: ~m), 'counts the visible tokens'),
        (wrong_loss(sign=1), 'the sign'),
        (wrong_loss(logp=lambda logits, x0: log_p(logits, x0) / math.log(2)), 'in bits'),
        (wrong_loss(logp=lambda logits, x0: logits_of(logits.log_softmax(1), x0)), 'over the positions'),
        (wrong_loss(logp=lambda logits, x0: log_p(logits[..., :-1], x0)), 'MDLM'),
        (wrong_loss(logp=lambda logits, x0: logits_of(logits.softmax(-1), x0)), 'probabilities'),
        (wrong_loss(logp=logits_of), 'log_softmax'),
        (loss_of_next_token, 'predicts the next token'),
        (loss_by_row, 'by its number of masked tokens|of masked tokens'),
        (loss_without_gradient, 'cannot train'),
        (lambda *a: loss(*a).detach(), 'cannot train'),
        (half_detached, 'gradient is not'),
        (lambda model, x0, xt, m, t: loss(model, x0, xt, m, t.clamp(min=0.1)), 'clamped'),
        (lambda model, x0, xt, m, t: loss(model, x0, xt, m, t.clamp(max=0.95)), 'clamped'),
        (lambda model, x0, xt, m, t: loss(model, x0, xt, m, t + 1e-4), 'is not|clamped'),
        (changes_xt, 'xt itself has changed'),
        (lambda *a: float(loss(*a)), 'tensor without dimensions'),
        (lambda model, x0, xt, masked, t: loss(model, x0, x0, masked, t), 'x0 holds the answers')],
    'ex2_hide': [
        (lambda m, n, u: u.argsort(1).argsort(1) < n[:, None], 'hides what is not maskable'),
        (lambda m, n, u: m & (u < (n / m.sum(1))[:, None]), 'only on average'),
        (lambda m, n, u: u.masked_fill(~m, 2).argsort(1) < n[:, None], 'argsort once more'),
        (lambda m, n, u: m & (u.argsort(1).argsort(1) < n[:, None]), 'take up ranks'),
        (lambda m, n, u: u.masked_fill(~m, 2).argsort(0).argsort(0) < n[:, None], 'dim 0'),
        (lambda m, n, u: m & (m.cumsum(1) <= n[:, None]), 'always the same positions'),
        (lambda m, n, u: hide(m, n, torch.rand(u.shape)), 'u is the noise'),
        (lambda m, n, u: hide(m, n, torch.rand(u.shape, generator=checks.seeded(5))), 'u is not used'),
        (lambda m, n, u: hide(m, n + (n > 0), u), r'not n\[b\]'),
        (lambda m, n, u: hide(m, n[:1].expand(len(n)), u), r'uses n\[0\]'),
        (lambda m, n, u: hide(m, n, u ** torch.arange(1, 6)), 'equally likely'),
        (lambda m, n, u: hide(m, n, u ** (1 + 0.05 * torch.arange(5))), 'equally likely'),
        (kth_smallest, 'n = 0 hides nothing'),
        (below_next, 'some u are equal'),
        (lambda m, n, u: u.masked_fill(~m, 0.99).argsort(1).argsort(1) < n[:, None], 'u reaches up to 1'),
        (hide_in_place, 'u itself has changed'),
        (lambda m, n, u: hide(m, n, u).float(), 'bool')],
    'ex3_bound': [
        (lambda *a: -bound(*a), 'the sign'),
        (lambda *a: masked_sums(*a).mean(), 'T/l is missing'),
        (lambda *a: (masked_sums(*a) / a[2].sum(1)).mean(), 'of one token'),
        (lambda *a: masked_sums(*a).sum() / a[2].sum() * len(a[1]), 'not the mean of the ratios'),
        (lambda *a: bound(*a) * len(a[2]), 'a sum over the masks'),
        (lambda *a: (masked_sums(*a) * a[2].sum(1) / len(a[1])).mean(), 'not l/T'),
        (wrong_bound(over=lambda m: m | True), 'counts all tokens'),
        (wrong_bound(logp=logits_of), 'log_softmax'),
        (wrong_bound(factor=lambda x0, m: 3 / m.sum(1)), '3 written into it'),
        (lambda model, x0, m, mask_id: bound(model, x0, m.unique(dim=0), mask_id), 'comes twice'),
        (wrong_bound(sees=lambda x0, m, mask_id: x0.expand_as(m)), 'sees x0 itself'),
        (wrong_bound(sees=lambda x0, m, mask_id: torch.where(m, x0, mask_id)), 'exchanged'),
        (bound_of_next_token, 'predicts the next token'),
        (wrong_bound(logp=lambda logits, x0: logits_of(logits.softmax(-1), x0)), 'probabilities'),
        (wrong_bound(reduce=lambda values: values.logsumexp(0) - math.log(len(values))), 'log of a mean'),
        (mean_by_size, 'number of hidden tokens first'),
        (chain_rule, 'chain rule'),
        (bound_written_on_x0, 'x0 itself has changed'),
        (wrong_bound(logp=logits_of, factor=lambda x0, m: torch.ones(len(m))), 'T/l is missing.* and .*log_softmax')],
    'ex4_step': [
        (wrong_step(token='most probable'), 'most probable token'),
        (wrong_step(order='confidence'), 'depend on the confidence'),
        (wrong_step(order='certain'), 'depend on the confidence'),
        (wrong_step(order='least confident'), 'depend on the confidence'),
        (wrong_step(order='noise of the tokens'), 'depend on the confidence'),
        (wrong_step(order='left to right'), 'always fills position'),
        (wrong_step(order='same in all rows'), 'same positions in every row'),
        (wrong_step(order='a bit to the left'), 'positions are not equally likely'),
        (wrong_step(in_place=True), 'work on a copy'),
        (wrong_step(change=lambda n, m: n - 1), 'masks are left'),
        (wrong_step(change=lambda n, m: m.sum(1, keepdim=True) - n), 'not of those that stay masked'),
        (wrong_step(change=lambda n, m: min(n, m.sum(1).min())), 'each row must lose n of its own'),
        (wrong_step(change=lambda n, m: min(n, m[0].sum())), 'each row must lose n of its own'),
        (step_by_chance, 'number of written tokens varies'),
        (single_steps, 'calls the model 3 times'),
        (wrong_step(token='same in all rows'), 'one draw for all rows'),
        (wrong_step(token='same in a row'), 'tokens of one row depend on each other'),
        (wrong_step(token='sharp'), 'temperature'),
        (wrong_step(token='top-p'), 'top-p'),
        (wrong_step(token='uniform noise'), 'Gumbel|never draws'),
        (wrong_step(tokens_by=lambda g: None), 'other tokens'),
        (wrong_step(order_by=lambda g: None), 'other positions'),
        (wrong_step(tokens_by=lambda g: None, order_by=lambda g: None), 'does not use it'),
        (lambda model, x, mask_id, n, g: step(model, x, mask_id, n, g.manual_seed(0)), 'seeded again'),
        (wrong_step(order_by=lambda g: checks.seeded(3)), 'the same positions'),
        (step_over_visible, 'writes over visible tokens')],
    'ex5_law': [
        (lambda *a: checks.P, 'chosen after the draw'),
        (lambda *a: law(*a, drawn=False), 'this is the mode'),
        (lambda *a: law(*a, choose=lambda p: p.index(min(p))), 'least confident'),
        (lambda *a: law(*a, choose=lambda p: len(p) - 1 - p[::-1].index(max(p))), 'rightmost'),
        (wrong_law(lambda i, token, p, logits, start: float(logits[i, token])), 'compares logits'),
        (wrong_law(lambda i, token, p, logits, start: float(start[i, token])), 'first pass'),
        (wrong_law(lambda i, token, p, logits, start: float(p[i].max())), 'chosen after the draw'),
        (wrong_law(lambda i, *rest: -i), 'chosen after the draw|from left to right'),
        (one_pass_law, 'at once'),
        (lambda *a: law(*a).permute(2, 1, 0) if a[2] == 3 else law(*a), 'axes are exchanged'),
        (sampled_law, 'is it sampled'),
        (law_with_mask_as_token, 'never ends'),
        (lambda *a: torch.full((3, 3, 3), 1 / 27), 'from this law'),
        (lambda *a: law(*a) * 2, 'add up to 1'),
        (lambda *a: law(*a).flatten(), 'of shape')],
    'ex6_counts': [
        (lambda n, s: [n - n // s * (s - 1)] + [n // s] * (s - 1), 'uneven'),
        (lambda n, s: counts(n, s)[::-1], 'remainder comes first'),
        (lambda n, s: [round(n / s)] * s, 'loses or invents'),
        (lambda n, s: [max(0, min(-(-n // s), n - -(-n // s) * k)) for k in range(s)], 'rounds up'),
        (lambda n, s: [1] * n, 'numbers, got')],
    'ex6_guide': [
        (lambda c, u, w: u + w * (c - u), 'one w is missing'),
        (lambda c, u, w: c + (w + 1) * (c - u), 'one w is too many'),
        (lambda c, u, w: c + w * (u - c), 'the direction'),
        (lambda c, u, w: c + (w + 1) * (u - c), 'exchanged'),
        (lambda c, u, w: (w + 1) * c + w * u, 'subtracted w times'),
        (lambda c, u, w: u.softmax(-1) + (w + 1) * (c.softmax(-1) - u.softmax(-1)), 'probabilities'),
        (lambda c, u, w: c.sub_(u).mul_(w + 1).add_(u), 'conditional itself has changed'),
        (lambda c, u, w: u.lerp_(c, w + 1), 'unconditional itself has changed'),
        (lambda c, u, w: c + w * c, 'only multiplies')],
    'ex7_write': [
        (lambda k, new, pos: k.index_copy_(2, pos, new), 'keys itself has changed'),
        (lambda k, new, pos: new, 'keys of all positions'),
        (lambda k, new, pos: torch.cat((new, k[:, :, new.shape[2]:]), 2), 'the first positions'),
        (lambda k, new, pos: k.index_copy(2, pos.sort().values, new), 'wrong order'),
        (lambda k, new, pos: k.index_add(2, pos, new), 'adds'),
        (lambda k, new, pos: torch.zeros_like(k).index_copy(2, pos, new), 'must stay')],
    'ex8_bits_per_byte': [
        (lambda nats, n, s: nats * n / len(s.encode()), 'these are nats'),
        (lambda nats, n, s: nats / math.log(2), 'bits per token'),
        (lambda nats, n, s: nats * n / math.log(2) / len(s), 'bits per character'),
        (lambda nats, n, s: nats * n * math.log(2) / len(s.encode()), 'divided by log 2'),
        (lambda nats, n, s: nats / math.log(2) / len(s.encode()), 'per token'),
        (lambda nats, n, s: nats * n / len(s), 'these are nats.* and .*per character'),
        (lambda nats, n, s: nats * n / math.log(2) / len(s.strip().encode()), 'spaces'),
        (lambda nats, n, s: nats / math.log(2) * len(s.encode()) / n, 'multipl.*divide')],
    'ex9_cost': [
        (lambda h: [list(row) for row in zip(*cost_table(h))], 'transposed'),
        (wrong_cost(lambda h, a, b: sum(h[a:b])), 'only the loss counts'),
        (wrong_cost(lambda h, a, b: (b - a) * h[a]), 'subtracted'),
        (wrong_cost(lambda h, a, b: -checks_more.step_cost(h, a, b)), 'the sign'),
        (wrong_cost(lambda h, a, b: checks_more.step_cost(h, a, b) / math.log(2)), 'bits')],
    'ex9_schedule': [
        (lambda cost, T, k: [T // k + (i < T % k) for i in range(k)], 'equal steps'),
        (lambda cost, T, k: [1] * (k - 1) + [T - k + 1], 'greedy|best'),
        (lambda cost, T, k: [T // k] * k if T % k else schedule(cost, T, k), 'positive numbers'),
        (lambda cost, T, k: [T], 'expected'),
        (lambda cost, T, k: [T - k + 1] + [1] * (k - 1), 'dearest'),
        (lambda cost, T, k: schedule(cost, T, k)[::-1], 'wrong order'),
        (lambda cost, T, k: [2 ** j for j in range(k - 1)] + [T - 2 ** (k - 1) + 1] if T > 2 ** k - 2 else
            schedule(cost, T, k), 'doubles'),
        (greedy, 'greedy'),
        (best_of(lambda parts: -sum(parts)), 'dearest schedule'),
        (best_of(max), 'min-max'),
        (best_of(sum, turned=True), 'transposed'),
        (best_of(sum), 'tries all schedules'),
        (fewer_steps, 'expected 3 numbers')],
    'ex10_attention_mask': [
        (lambda lengths: ~attention_mask(lengths), 'wrong way round'),
        (lambda lengths: attention_mask(lengths).tril(), 'causal'),
        (lambda lengths: torch.ones(8, 8, dtype=torch.bool), 'everything attends'),
        (lambda lengths: attention_mask(lengths).float(), 'bool'),
        (by_length, 'compares the lengths'),
        (lambda lengths: attention_mask([4, 4]), 'across a border'),
        (lambda lengths: torch.eye(sum(lengths), dtype=torch.bool), 'not attend to all')],
}


def variants():
    """Yield every wrong answer. All but the first three of an exercise are slow together."""
    for name in WRONG:
        for k in range(len(WRONG[name])):
            yield pytest.param(name, k, marks=[pytest.mark.slow] if k > 2 else [])


@pytest.mark.parametrize('name, k', list(variants()))
def test_a_wrong_answer_is_refused_by_its_name(name, k):
    answer, message = WRONG[name][k]
    check = checks.CHECKS[name.partition('_')[0]]
    with pytest.raises(pytest.fail.Exception, match=message):
        check(SimpleNamespace(**{**RIGHT, name: answer}))


def test_every_exercise_has_typical_mistakes():
    assert WRONG.keys() == RIGHT.keys() and all(len(cases) >= 3 for cases in WRONG.values())
