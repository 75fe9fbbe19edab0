"""Check the exercises against an independent truth. A check that fails names the mistake in words.

Each check takes the functions under test as a module or a namespace. So tests/test_exercises.py can also run it
on right answers and on typical wrong ones.
"""

import itertools
import json
import math
from pathlib import Path

import torch
from helpers import MASK, T, V, seeded, table_model, tiny_model

GOLDEN = Path(__file__).resolve().parents[1] / 'golden'
P, MODEL = table_model()                                    # 27 texts of 3 tokens whose distribution is known
TEXTS = torch.tensor(list(itertools.product(range(V), repeat=T)))
MASKS = torch.tensor(list(itertools.product([False, True], repeat=T)))
ENTROPY = float(-(P * P.log()).sum())


def fail_if(condition, message):
    """Fail the check with a message, if the condition is true."""
    assert not condition, f'\n\n    {message}\n'


def near(a, b, tolerance=1e-6):
    return math.isclose(float(a), float(b), rel_tol=tolerance, abs_tol=tolerance)


def compare(got, right, mistakes):
    """Fail if a number is not the right one. mistakes: message -> the number that this mistake leads to."""
    for message, wrong in mistakes.items():
        fail_if(near(got, wrong), message)
    fail_if(not near(got, right), f'{float(got):.6f} is not {float(right):.6f}')


def log_p(logits, x0):
    """Return log p of the tokens x0 (B, T) under logits (B, T, V) -> (B, T)."""
    return logits.log_softmax(-1).gather(-1, x0[..., None])[..., 0]


def ex1(my):
    x0 = TEXTS[[5, 22, 13, 7]]
    masked = torch.tensor([[1, 0, 1], [0, 0, 1], [1, 1, 1], [0, 0, 0]], dtype=torch.bool)
    t = torch.tensor([0.5, 0.3, 0.9, 0.4], dtype=torch.float64)
    xt = torch.where(masked, MASK, x0)
    n = masked.numel()
    inputs = []

    def model(ids):
        inputs.append(ids)
        # not normalised, and also unsure of the visible tokens
        return 0.7 * MODEL(ids).clamp(min=-4) + 1

    got = my.ex1_loss(model, x0, xt, masked, t)
    fail_if(not torch.is_tensor(got) or got.dim(), f'the loss is a tensor without dimensions, got {got!r}')
    sees_xt = all(torch.equal(ids, xt) for ids in inputs)
    fail_if(not sees_xt, 'the model must see xt, because x0 holds the answers')

    logits = model(xt)
    every = -log_p(logits, x0)
    rows = torch.where(masked, every, 0.0).sum(1)
    right = (rows / t).sum() / n
    per_row = rows / masked.sum(1).clamp(min=1)
    raw = torch.where(masked, logits.gather(-1, x0[..., None])[..., 0], 0.0)
    next_token = -log_p(logits[:, :-1], x0[:, 1:])
    next_token = (torch.where(masked[:, 1:], next_token, 0.0) / t[:, None]).sum()
    shift = 'this predicts the next token, but here logit i is about token i'
    fail_if(near(got, next_token / masked[:, 1:].numel()), shift)
    compare(got, right, {
        'the sign is wrong, because a loss is -log p': -right,
        'this is the mean over the masked tokens, without 1/t. That is not the bound of Eq. 3':
            rows.sum() / masked.sum(),
        'this divides by the masked tokens, but Eq. 3 divides by all tokens': (rows / t).sum() / masked.sum(),
        'this divides each row by its number of masked tokens, but Eq. 3 divides by T': (per_row / t).mean(),
        'this uses one t for the whole batch, but each row has its own': (rows / t.mean()).sum() / n,
        'the weight is 1/t, not 1/(1 - t), because t is the probability to be hidden':
            (rows / (1 - t)).sum() / n,
        'the weight is 1/t, not t': (rows * t).sum() / n,
        'this divides by the number of rows only, but Eq. 3 divides by T as well': (rows / t).sum() / len(x0),
        'this is a sum, but Eq. 3 divides by B and by T': (rows / t).sum(),
        'this counts visible tokens as well, but only the masked ones are in the sum':
            (every / t[:, None]).sum() / n,
        'these are logits, but log p is their log_softmax': -(raw.sum(1) / t).sum() / n,
        shift: next_token / n})

    # The independent truth: averaged over all texts, masks and t, the loss is the entropy of the source per token.
    # Three Gauss points integrate t^0 ... t^5 exactly.
    total = 0.0
    for t, share in ((0.5 - 0.15 ** 0.5, 5 / 18), (0.5, 8 / 18), (0.5 + 0.15 ** 0.5, 5 / 18)):
        for mask, (text, p) in itertools.product(MASKS, zip(TEXTS, P.flatten())):
            chance = t ** int(mask.sum()) * (1 - t) ** int((~mask).sum())
            xt = torch.where(mask, MASK, text)
            ratio = torch.tensor([t], dtype=torch.float64)
            loss = my.ex1_loss(MODEL, text[None], xt[None], mask[None], ratio)
            total += share * chance * float(p) * float(loss)
    fail_if(not near(total * T, ENTROPY),
            f'averaged over everything it is {total * T:.6f} nats, the entropy is {ENTROPY:.6f}')


def ex2(my):
    rows = torch.tensor([[1, 1, 0, 1, 1], [1, 1, 1, 1, 1], [0, 1, 0, 0, 1]], dtype=torch.bool)
    maskable = rows.repeat(2000, 1)
    n = torch.tensor([2, 3, 1]).repeat(2000)
    u = torch.rand(maskable.shape, generator=seeded(0))
    got = my.ex2_hide(maskable, n, u)
    fail_if(got.shape != maskable.shape or got.dtype != torch.bool,
            f'expected (B, T) bool, got {tuple(got.shape)} {got.dtype}')

    once = u.masked_fill(~maskable, 2).argsort(1) < n[:, None]
    fail_if(torch.equal(got, once),
            'argsort gives the order of the positions, not their ranks, so argsort once more')
    too_late = (u.argsort(1).argsort(1) < n[:, None]) & maskable
    fail_if(torch.equal(got, too_late),
            'positions that are not maskable take up ranks, so give them noise that sorts last')
    fail_if((got & ~maskable).any(),
            'this hides what is not maskable, so give those positions noise that sorts last')
    fail_if(got.sum(1).unique().numel() > 3,
            'the number varies: u < n / T hides n tokens only on average (that is Eq. 3, not Eq. 14)')
    fail_if((got.sum(1) != n).any(), 'the number of hidden positions in row b is not n[b]')

    for k in range(3):
        subsets, counts = got[k::3].unique(dim=0, return_counts=True)
        n_subsets = math.comb(int(maskable[k].sum()), int(n[k]))
        fail_if(len(subsets) == 1, 'these are always the same positions, so u is not used')
        expected = 2000 / n_subsets
        uneven = (counts - expected).abs().max() > 5 * expected ** 0.5
        fail_if(len(subsets) != n_subsets or uneven,
                f'the {n_subsets} subsets are not equally likely: {counts.tolist()} of 2000')


def ex3(my):
    x0, masks = TEXTS[11], MASKS[1:]
    n = masks.sum(1)
    logp = log_p(MODEL(torch.where(masks, MASK, x0)), x0.expand(len(masks), -1))
    logp = torch.where(masks, logp, 0.0).sum(1)
    right = (T / n * logp).mean()
    got = my.ex3_bound(MODEL, x0, masks, MASK)
    compare(got, right, {
        'the sign is wrong: it is a bound on log p, which is negative': -right,
        'T/l is missing, but a mask that hides few tokens stands for all T of them': logp.mean(),
        'this is log p of one token; for T tokens multiply by T': (logp / n).mean(),
        'this is the ratio of two sums, not the mean of the ratios: T/l belongs to its mask':
            logp.sum() / n.sum() * T,
        'this is a sum over the masks, but Eq. 6 is their mean': (T / n * logp).sum(),
        'the factor is T/l, not l/T': (n / T * logp).mean()})

    # the independent truth: with l uniform, and all masks of the same l equally likely, the mean is -entropy
    total = 0.0
    for text, p in zip(TEXTS, P.flatten()):
        for size in range(1, T + 1):
            bound = my.ex3_bound(MODEL, text, MASKS[MASKS.sum(1) == size], MASK)
            total += float(p) * float(bound) / T
    fail_if(not near(-total, ENTROPY),
            f'over all texts and masks it is {-total:.6f} nats, the entropy is {ENTROPY:.6f}')


def frequencies(texts):
    """Count texts (N, T) -> frequencies (V,) * T."""
    number = (texts * torch.tensor([V * V, V, 1])).sum(1)
    counts = torch.zeros(V ** T).index_add_(0, number, torch.ones(len(texts)))
    return counts.view((V,) * T) / len(texts)


def total_variation(p, q):
    return float((p - q).abs().sum() / 2)


def ex4(my):
    def step(x, n, generator, model=MODEL):
        return my.ex4_step(model, x, MASK, n, generator)

    # 1) on canvases for which the right result is plain to see
    all_masks = torch.full((600, T), MASK)
    new = step(all_masks[:4], 5, seeded(0))
    fail_if((new == MASK).any(), 'if fewer than n masks are left, it must write all of them')
    some = torch.tensor([[0, MASK, 1], [MASK, 2, MASK]]).repeat(200, 1)
    anything = torch.zeros(V + 1)
    anything[MASK] = -math.inf
    new = step(some, 2, seeded(0), lambda ids: anything.expand(*ids.shape, -1))
    fail_if((new != some)[some != MASK].any(), 'where fewer than n masks are left, it writes over visible tokens')

    share = (step(all_masks, 1, seeded(0)) != MASK).float().mean(0)
    fail_if(share.max() > 0.99,
            f'it always fills position {int(share.argmax())}, but each row must choose its positions at random')

    # 2) the independent truth: 20,000 texts, written one token per step
    x = torch.full((20000, T), MASK)
    generator = seeded(1)
    for left in range(T - 1, -1, -1):
        before = x.clone()
        new = step(x, 1, generator)
        fail_if(not torch.equal(x, before), 'it writes into x itself, so work on a copy')
        n_masks = (new == MASK).sum(1)
        fail_if((n_masks != left).any(),
                f'after a step of one token {n_masks.unique().tolist()} masks are left, not {left}')
        fail_if((new[x != MASK] != x[x != MASK]).any(), 'it changes tokens that were written before')
        x = new

    frequency = frequencies(x)
    distance = total_variation(frequency, P)
    fail_if((frequency > 0).sum() < 20,
            'there is hardly any variety. Is it the most probable token, or one draw for all rows?')
    fail_if((share - 1 / 3).abs().max() > 0.1,
            'positions are not equally likely, but the choice must not depend on the confidence')
    fail_if(distance > 0.02,
            f'the texts are {distance:.3f} (total variation) from the true distribution, noise is 0.016')


def ex5(my):
    import diffusion
    got = torch.as_tensor(my.ex5_law(MODEL, MASK, T, V))
    shape = (V,) * T
    fail_if(got.shape != shape, f'expected probabilities of shape {shape}, got {tuple(got.shape)}')
    fail_if(not near(got.sum(), 1), f'probabilities add up to 1, these to {float(got.sum()):.6f}')
    fail_if(total_variation(got, P) < 0.05,
            'this is the true distribution, but the position must be chosen after the draw, by what was drawn')
    fail_if((got > 0).sum() == 1,
            'this is the mode, but at temperature 1 the proposals are drawn, and only the choice is greedy')

    # the independent truth: what the sampler of the project writes
    params = diffusion.SamplingParams(steps=T, temperature=1.0)
    x, _ = diffusion.generate(MODEL, torch.full((20000, T), MASK), MASK, params, generator=seeded(0))
    distance = total_variation(got, frequencies(x))
    fail_if(distance > 0.03,
            f'20,000 real samples are {distance:.3f} (total variation) from this law, noise is 0.016')


def ex6(my):
    cases = json.loads((GOLDEN / 'transfer_tokens.json').read_text())['cases']
    pairs = [(case['mask_num'], case['steps']) for case in cases if 'mask_num' in case]
    for n, steps in [(7, 3), (5, 8), (64, 64), *pairs]:
        got = [int(count) for count in my.ex6_counts(n, steps)]
        where = f'{n} masks in {steps} steps'
        fail_if(len(got) != steps, f'{where}: expected {steps} numbers, got {len(got)}')
        fail_if(sum(got) != n, f'{where}: {got[:8]} adds up to {sum(got)} (rounding loses or invents some)')
        fail_if(max(got) - min(got) > 1,
                f'{where}: {got[:8]} is uneven, because one step gets all of the remainder')
        fail_if(got != sorted(got, reverse=True), f'{where}: the remainder comes first, not {got[:8]}')

    cond, uncond = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.0, 1.0, 0.5])
    fail_if(not torch.allclose(my.ex6_guide(cond, uncond, 0.0), cond), 'w = 0 must give the conditional logits')
    got = my.ex6_guide(cond, uncond, 1.5)
    fail_if(torch.allclose(got, cond + 1.5 * (uncond - cond)),
            'the direction is wrong: it must lead away from the unconditional logits')
    fail_if(not torch.allclose(got, uncond + 2.5 * (cond - uncond)),
            f'expected uncond + (w + 1)(cond - uncond), got {got.tolist()}')


def ex7(my):
    import model as models
    generator = seeded(0)
    keys = torch.randn(2, 3, 8, 4, generator=generator)
    new = torch.randn(2, 3, 2, 4, generator=generator)
    pos = torch.tensor([6, 1])
    before = keys.clone()

    got = my.ex7_write(keys, new, pos)
    fail_if(not torch.equal(keys, before), 'keys itself has changed, so work on a copy')
    fail_if(got.shape != keys.shape,
            f'expected the keys of all positions, {tuple(keys.shape)}, got {tuple(got.shape)}')
    fail_if(torch.equal(got[:, :, :2], new), 'this writes to the first positions, but pos says where')
    fail_if(torch.equal(got[:, :, pos.sort().values], new),
            'in the wrong order: new[:, :, k] belongs to position pos[k]')
    others = [0, 2, 3, 4, 5, 7]
    fail_if(not torch.equal(got[:, :, others], keys[:, :, others]), 'positions that are not in pos must stay')
    fail_if(not torch.equal(got[:, :, pos], new), 'the keys at pos are not the new ones')

    # the independent truth: a Transformer that is given its canvas in two parts, in any order
    def forward(self, x, cos, sin, kv, kv_positions, pattern):
        q = models.apply_rope(self.heads(self.q(x)), cos, sin)
        k = models.apply_rope(self.heads(self.k(x)), cos, sin)
        v = self.heads(self.v(x))
        kv[0] = my.ex7_write(kv[0], k, kv_positions)
        kv[1] = my.ex7_write(kv[1], v, kv_positions)
        y = models.attention(q, kv[0], kv[1], **pattern)
        return self.out(y.transpose(1, 2).flatten(2))

    net = tiny_model()
    ids = torch.arange(12)[None] + 5
    original = models.Attention.forward
    with torch.no_grad():
        expected = net(ids)[:, [3, 9, 4]]
        kv = net.new_kv(1, 12)
        models.Attention.forward = forward
        try:
            for pos in (torch.arange(12), torch.tensor([3, 9, 4])):
                logits = net(ids[:, pos], kv=kv, kv_positions=pos)
        finally:
            models.Attention.forward = original
    fail_if(not torch.allclose(logits, expected, atol=1e-5), 'a Transformer with this cache gives other logits')


def ex8(my):
    text, n, nats = 'naïve: 漢字 in 6 words', 11, 2.5
    n_bytes = len(text.encode())
    bits = nats / math.log(2)
    compare(my.ex8_bits_per_byte(nats, n, text), bits * n / n_bytes, {
        'these are nats, and one bit is log 2 nats': nats * n / n_bytes,
        'these are bits per token, but a token is not a byte': bits,
        'these are bits per character, but in UTF-8 some characters take more than a byte': bits * n / len(text),
        'nats are divided by log 2, not multiplied': nats * n * math.log(2) / n_bytes,
        'the nats are per token, and there are n_tokens of them': bits / n_bytes,
        'this multiplies by bytes per token, but divide by it': bits * n_bytes / n})


def schedules(n, k):
    """Yield all lists of k positive numbers that add up to n."""
    for cuts in itertools.combinations(range(1, n), k - 1):
        yield [b - a for a, b in zip((0, *cuts), (*cuts, n))]


def ex9(my):
    generator = seeded(3)
    for n, k in ((7, 3), (9, 4), (7, 7), (5, 1)):
        cost = [[0.0] * (n + 1) for _ in range(n + 1)]
        for a, b in itertools.combinations(range(n + 1), 2):
            cost[a][b] = 0.5 + (b - a - 1) ** 2 * float(torch.rand(1, generator=generator)) / (1 + a)

        def price(sizes, cost=cost):
            ends = list(itertools.accumulate(sizes))
            return sum(cost[end - size][end] for size, end in zip(sizes, ends))

        best = min(map(price, schedules(n, k)))
        sizes = [int(size) for size in my.ex9_schedule(cost, n, k)]
        where = f'{n} tokens in {k} steps'
        fail_if(len(sizes) != k, f'{where}: expected {k} numbers, got {sizes}')
        fail_if(sum(sizes) != n or min(sizes) < 1, f'{where}: {sizes} are not positive numbers that add up to {n}')

        got = price(sizes)
        if not near(got, best):
            equal = [n // k + (i < n % k) for i in range(k)]
            fail_if(sizes == equal,
                    f'equal steps cost {got:.4f} and the best ones {best:.4f}, so let the costs decide')
            fail_if(near(price(sizes[::-1]), best), f'these are the best sizes in the wrong order: {sizes}')
            fail_if(True, f'{sizes} costs {got:.4f}, the best schedule {best:.4f}: is there a greedy choice in it?')


def ex10(my):
    from model import attention
    lengths = [3, 1, 4]
    got = my.ex10_attention_mask(lengths)
    fail_if(tuple(got.shape) != (8, 8) or got.dtype != torch.bool,
            f'expected (8, 8) bool, got {tuple(got.shape)} {got.dtype}')
    right = torch.block_diag(*(torch.ones(n, n) for n in lengths)).bool()
    fail_if(torch.equal(got, ~right), 'it is the wrong way round: True is where a query may attend')
    fail_if(torch.equal(got, right.tril()), 'this is causal, but a mask predictor looks in both directions')
    fail_if(got.all(), 'everything attends to everything, but segments must not see each other')
    fail_if((got & ~right).any(), 'a query attends across a border')
    fail_if((right & ~got).any(), 'a query does not attend to all of its own segment')

    # the independent truth: packed segments give what each segment gives alone
    generator = seeded(0)
    q, k, v = (torch.randn(1, 2, 8, 4, generator=generator) for _ in range(3))
    packed = attention(q, k, v, attn_mask=got[None, None])
    for part in (slice(0, 3), slice(3, 4), slice(4, 8)):
        alone = attention(q[:, :, part], k[:, :, part], v[:, :, part])
        fail_if(not torch.allclose(packed[:, :, part], alone, atol=1e-5),
                'attention in a packed segment differs from the segment alone')


CHECKS = {f.__name__: f for f in (ex1, ex2, ex3, ex4, ex5, ex6, ex7, ex8, ex9, ex10)}
