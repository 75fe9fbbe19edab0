"""The checks of exercises 5 to 10, and of putting it together. See checks.py."""

import functools
import itertools
import json
import math

import torch
from helpers import GOLDEN, MASK, T, V, seeded
from naming import (
    ENTROPY,
    MASKS,
    MODEL,
    TEXTS,
    P,
    call,
    explain,
    fail_if,
    frequencies,
    name_it,
    near,
    total_variation,
    unsure,
)
from torch import nn

import diffusion
from model import attention


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
                drawn = math.prod(float(p[i, token]) for i, token in zip(holes, guess)) if draw else 1
                after[y] += chance * drawn
        canvases = {x: chance for x, chance in after.items() if chance}
    result = torch.zeros((V,) * T, dtype=torch.float64)
    for x, chance in canvases.items():
        result[x] = chance
    return result


def confidence(i, token, p, logits, start):
    return float(p[i, token])


def ex5(my):
    peaked = torch.tensor([0.6, 0.3, 0.1, 0.0], dtype=torch.float64).log()
    for model, length, size in (
            (MODEL, T, V), (unsure(3, 3, False), 3, 3), (lambda ids: peaked.expand(*ids.shape, 4), 3, 3),
            (unsure(2, 4, False, seed=1), 2, 4)):
        calls = []

        def counted(ids, model=model, calls=calls):
            calls.append(ids)
            fail_if(len(calls) > 20_000, 'this never ends: is [MASK] among the proposals? There are V of '
                'them for a mask')
            return model(ids)

        got = torch.as_tensor(my.ex5_law(counted, size, length, size)).double()
        shape = (size,) * length
        fail_if(got.shape != shape, f'expected probabilities of shape {shape}, got {tuple(got.shape)}')
        right = law(model, length, size, confidence)
        distance = total_variation(got, right)
        if distance < 1e-5:
            continue
        fail_if(not near(got.sum(), 1), f'probabilities add up to 1, these to {float(got.sum()):.6f}')
        fail_if(model is MODEL and total_variation(got, P) < 0.05, 'this is the true distribution, but the '
            'position must be chosen after the draw, by what was drawn')

        def other(score, model=model, length=length, size=size, **options):
            return law(model, length, size, score, **options)

        start = model(torch.full((1, length), size))[0].softmax(-1)[:, :size]
        at_once = functools.reduce(lambda a, b: a[..., None] * b, start)
        mistakes = {
            'this is the mode, but at temperature 1 the proposals are drawn, and only the choice is greedy':
                other(confidence, draw=False),
            'all proposals are written at once (or never drawn again), but one step writes one of them, and '
            'then the model looks again': at_once,
            'this writes the least confident proposal, but the most confident one is right':
                other(lambda *a: -confidence(*a)),
            'the position must be chosen after the draw, by the probability of what was drawn, not of the '
            'best token':
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
            fail_if(model is MODEL and torch.allclose(got, right.permute(axes)), 'the axes are exchanged: '
                'axis i is the token at position i')
        close = 'is it sampled? The exact law is asked for: go through all proposals' if distance < 0.03 else (
            'at every step draw anew for each mask, write the proposal with the highest probability, and ask '
            'the model again')
        name_it(got, right, mistakes, f'{distance:.4f} (total variation) from this law: {close}')

    # the independent truth: what the sampler of the project writes
    law_of_table = law(MODEL, T, V, confidence)
    params = diffusion.SamplingParams(steps=T, temperature=1.0)
    x, _ = diffusion.generate(MODEL, torch.full((20000, T), MASK), MASK, params, generator=seeded(0))
    distance = total_variation(law_of_table, frequencies(x))
    fail_if(distance > 0.03,
            f'20,000 real samples are {distance:.3f} (total variation) from this law, noise is 0.016')
    return (f'low confidence samples from a law that is {total_variation(law_of_table, P):.3f} (total '
        'variation) from the '
        f'true distribution. 20,000 samples of generate() are {distance:.3f} from your law, which is '
        'noise')


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
                f'{where}: {got[:8]} rounds up in every step until nothing is left, but counts differ by at '
                'most 1')
        fail_if(max(got) - min(got) > 1,
                f'{where}: {got[:8]} is uneven, because one step gets all of the remainder')
        fail_if(got != sorted(got, reverse=True), f'{where}: the remainder comes first, not {got[:8]}')

    c, u = torch.randn(2, 4, 3, 5, generator=seeded(0))
    for w in (1.5, 0.0):
        got = call(my.ex6_guide, conditional=c, unconditional=u, w=w)
        name_it(got, u + (w + 1) * (c - u), {
            'one w is missing: it goes w + 1 times the way, so that w = 0 gives the conditional logits':
                u + w * (c - u),
            'one w is too many: it goes w + 1 times the way from the unconditional logits': c + (w + 1) * (c - u),
            'the direction is wrong: it must lead away from the unconditional logits': c + w * (u - c),
            'conditional and unconditional are exchanged': c + (w + 1) * (u - c),
            'the unconditional logits are added, but they are subtracted w times': (w + 1) * c + w * u,
            'the unconditional logits are subtracted w times, not w + 1 times': (w + 1) * c - (w + 1) * u,
            'this only multiplies the conditional logits, but they are moved away from the unconditional '
            'ones':
                (w + 1) * c,
            'these are probabilities, but logits are guided':
                u.softmax(-1) + (w + 1) * (c.softmax(-1) - u.softmax(-1)),
            'the result is normalised, but logits go in and logits come out':
                (u + (w + 1) * (c - u)).log_softmax(-1),
            'the inputs are normalised first, but logits go in and logits come out':
                u.log_softmax(-1) + (w + 1) * (c.log_softmax(-1) - u.log_softmax(-1)),
            'the result is turned into probabilities, but logits are asked for': (u + (w + 1) * (c - u)).softmax(-1),
            }, f'w = {w}: expected uncond + (w + 1)(cond - uncond), got something else')
    p = (c + 2 * (c - u))[0, 0].softmax(-1)
    token = int((c - u)[0, 0].argmax())
    return (f'the token that the condition favours most has {float(c[0, 0].softmax(-1)[token]):.3f} without '
        f'guidance and {float(p[token]):.3f} with w = 2')


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
        fail_if(not torch.allclose(again, expected[some], atol=1e-5), 'a Transformer with this cache gives '
            'other numbers')
        # a token is committed at position 9, and only position 9 is computed anew
        after = torch.where(everything == 9, 25, ids)
        exact, exact_cache = two_layers(after, everything, empty, causal)
        cached, _ = two_layers(after, everything[9:10], cache, causal)
        changed = [int((a[0] != b[0]).any(-1).any(1).sum()) for a, b in zip(cache, exact_cache)]
        off[causal] = float((cached - exact[9]).abs().max()), changed
    fail_if(off[True][0] > 1e-5, 'in a causal model a cache is exact, but with yours it is not')
    return (f'after one new token a causal cache is off by {off[True][0]:.3f}, and one that looks both ways '
        f'by {off[False][0]:.3f}. Of its 12 keys {off[False][1][0]} changed in layer 1 and '
        f'{off[False][1][1]} in layer 2')


def ex8(my):
    for text, n, nats in ((' naïve: 漢字 in 6 words\n', 11, 2.5), ('plain words', 7, 0.3)):
        raw = text.encode()
        explain(my.ex8_bits_per_byte(nats, n, text), lambda unit, tokens, per, nats=nats: nats * unit * tokens / per, {
            '': 1 / math.log(2), 'these are nats, and one bit is log 2 nats': 1,
            'nats are divided by log 2, not multiplied': math.log(2),
            'this divides by the logarithm of 10 or of 256, but a bit is log 2 nats': 1 / math.log(10),
            'this divides by log 256, but a bit is log 2 nats': 1 / math.log(256)}, {
            '': n, 'the nats are per token, and there are n_tokens of them': 1,
            'this divides by the number of tokens, but multiply by it': 1 / n}, {
            '': len(raw),
            'these are bits per character, but in UTF-8 some characters take more than a byte': len(text),
            'these are bits per token, but a token is not a byte': n,
            'this is the sum over the text, so divide by its bytes': 1,
            'these are bits per word, but divide by bytes': len(text.split()),
            'spaces at the ends are bytes as well': len(text.strip().encode()),
            'this multiplies by the bytes, but divide by them': 1 / len(raw),
            'the bytes are those of UTF-8, not of UTF-16': len(text.encode('utf-16')),
            'the bytes are those of UTF-8, not of UTF-32': len(text.encode('utf-32'))})
    return (f'2.5 nats per token and 4.1 bytes per token are {my.ex8_bits_per_byte(2.5, 10, "x" * 41):.2f} '
        'bits per byte')


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
    fail_if(len(cost) != n + 1 or any(len(row) != n + 1 for row in cost), f'cost is a table of {n + 1} x '
        f'{n + 1} numbers')
    steps = list(itertools.combinations(range(n + 1), 2))
    got = torch.tensor([float(cost[a][b]) for a, b in steps])
    versions = {
        '': lambda a, b: step_cost(h, a, b),
        'the sign is wrong, because a step can only lose': lambda a, b: -step_cost(h, a, b),
        'this has h(b) in place of h(a), but the step sees a tokens':
            lambda a, b: (b - a) * h[min(b, n - 1)] - sum(h[a:b]),
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
    transposed = torch.tensor([float(cost[b][a] or 0) for a, b in steps])
    fail_if(torch.allclose(transposed, versions['']) and not torch.allclose(got, versions['']),
            'the table is transposed: a, what is already written, is the row')
    name_it(got, versions.pop(''), versions, 'these are not the costs (b - a) h(a) - (h(a) + ... + h(b - 1))')
    # an independent truth: all at once loses the divergence between the texts and independent tokens
    table = my.ex9_cost(entropies(P))[0][T]
    product = torch.einsum('a,b,c->abc', P.sum((1, 2)), P.sum((0, 2)), P.sum((0, 1)))
    divergence = float((P * (P / product).log()).sum())
    fail_if(not near(table, divergence), f'all of a text at once costs {table:.6f}, and KL(truth | product) '
        f'is {divergence:.6f}')

    # costs from entropies, and made-up ones for which the order and the place of a big step matter
    luck = torch.rand(n + 1, n + 1, generator=seeded(38))
    fake = [[float(luck[a, b]) * (1 + abs(b - a)) for b in range(n + 1)] for a in range(n + 1)]
    real = [[step_cost(h, min(a, b), max(a, b)) for b in range(n + 1)] for a in range(n + 1)]
    for table, size, k in ((real, 9, 3), (real, 9, 4), (fake, 7, 3), (fake, 9, 4), (fake, 7, 7), (fake, 5, 1)):
        sizes = [int(size) for size in call(my.ex9_schedule, cost=table, T=size, k=k)]
        where = f'{size} tokens in {k} steps'
        fail_if(len(sizes) != k, f'{where}: expected {k} numbers, got {sizes}')
        fail_if(sum(sizes) != size or min(sizes) < 1, f'{where}: {sizes} are not positive numbers that add '
            f'up to {size}')

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
            f'equal steps cost {price(equal):.4f} and the best ones {price(best):.4f}, so let the costs '
            'decide': equal,
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
            }, f'{sizes} costs {price(sizes):.4f}, the best schedule {price(best):.4f}: is there a greedy '
                'choice in it?')

    # dynamic programming reads a cost once for each number of steps
    big = [Read((b - a) ** 2 / (1 + a) for b in range(25)) for a in range(25)]
    Read.reads = 0
    my.ex9_schedule(big, 24, 6)
    fail_if(Read.reads > 6 * 25 * 25 * 2, f'right, but this reads {Read.reads:,} costs for 24 tokens in 6 '
        'steps: it tries all schedules. Keep the best way to write b tokens in j steps, and build on it')
    best = call(my.ex9_schedule, cost=real, T=9, k=3)
    loss = [sum(step_cost(h, end - n, end) for n, end in zip(sizes, itertools.accumulate(sizes)))
            for sizes in (best, [3] * 3)]
    return (f'nine tokens, each like its neighbour in 90 % of the texts: h = {h[0]:.2f} ... {h[-1]:.2f} '
        f'nats, the best three steps {best} lose {loss[0]:.3f} nats, and [3, 3, 3] loses {loss[1]:.3f}')


def ex10(my):
    for lengths in ([3, 1, 4], [3, 1, 3, 1], [2, 2, 2], [5], [1, 1, 1]):
        size = sum(lengths)
        got = call(my.ex10_attention_mask, lengths=lengths)
        fail_if(not torch.is_tensor(got) or tuple(got.shape) != (size, size) or got.dtype != torch.bool,
                f'expected ({size}, {size}) bool, got {getattr(got, "shape", got)} '
                f'{getattr(got, "dtype", "")}')
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
            'this compares the lengths of the segments, but two segments may have the same length: number '
            'them':
                length[:, None] == length},
            'a query attends across a border' if (got & ~right).any() else
            'a query does not attend to all of its own segment')

        # the independent truth: packed segments give what each segment gives alone
        q, k, v = torch.randn(3, 1, 2, size, 4, generator=seeded(0))
        alone = [attention(*parts) for parts in zip(*(z.split(lengths, 2) for z in (q, k, v)))]
        off = float((attention(q, k, v, attn_mask=got[None, None]) - torch.cat(alone, 2)).abs().max())
        fail_if(off > 1e-5, 'attention in a packed segment differs from the segment alone')
    return ('attention in a packed row and in each segment alone are equal, also if two segments have the '
        'same length')


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
    fail_if(-bound < ENTROPY - 1e-3, f'{-bound:.4f} nats are less than the entropy {ENTROPY:.4f}, so it is '
        'no bound (ex. 3)')
    fail_if(-bound > ENTROPY + 0.05, f'the model has {-bound:.3f} nats, far from the entropy {ENTROPY:.3f}: '
        'are exercises 1 to 3 green?')
    fail_if(away[0] > 0.06, f'one token per step is {away[0]:.3f} from the truth (total variation): is '
        'exercise 4 green?')
    return (f'your loss trained a network to {-bound:.4f} nats by your bound (the entropy is {ENTROPY:.4f}), '
        'and your '
        f'sampler is {away[0]:.3f} from the truth with one token per step, {away[1]:.3f} with all at '
        'once')


CHECKS = (ex5, ex6, ex7, ex8, ex9, ex10, together)
