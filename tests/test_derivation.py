"""The numbers in tests/exercises/DERIVATION.md, by enumeration of the 27 texts."""

import math
import re
from itertools import permutations, product

import torch
from helpers import MASK, ROOT, T, V, table_model

PAGE = (ROOT / 'tests/exercises/DERIVATION.md').read_text(encoding='utf-8')
SEQUENCES = torch.tensor(list(product(range(V), repeat=T)))
P, MODEL = table_model()
p = P.flatten().double()
ENTROPY = -(p * p.log()).sum() / T
SETS = [torch.tensor(bits) for bits in product([False, True], repeat=T) if any(bits)]


def hidden_nats(m):
    """Return -log p of each hidden token given the others, in all 27 texts: (27, l)."""
    log_p = MODEL(torch.where(m, MASK, SEQUENCES)).double().log_softmax(-1)
    return -log_p.gather(-1, SEQUENCES[..., None])[..., 0][:, m]


def chance(l, weight=0):                                                                # noqa: E741
    """Return the integral of t^(l - weight) (1 - t)^(T - l)."""
    a, b = l - weight + 1, T - l + 1
    return math.gamma(a) * math.gamma(b) / math.gamma(a + b)


def said(pattern):
    return float(re.search(pattern, PAGE)[1])


def test_only_1_over_t_gives_the_entropy():
    eq_3, plain, by_hidden, eq_6 = 0., 0., 0., 0.
    for m in SETS:
        l = int(m.sum())                                                                # noqa: E741
        nats = (p[:, None] * hidden_nats(m)).sum()
        assert math.isclose(chance(l, 1), 1 / l / math.comb(T, l))
        eq_3 += chance(l, 1) * nats / T
        plain += chance(l) * nats / T
        by_hidden += chance(l) * nats / l
        eq_6 += nats / l / math.comb(T, l) / T
    assert math.isclose(eq_3, ENTROPY) and math.isclose(eq_6, ENTROPY)
    for value, row in ((eq_3, r'1/t, divided by all L tokens \(Eq. 3\)'), (plain, '1, divided by all L tokens'),
                       (by_hidden, '1, divided by the hidden tokens'), (ENTROPY, 'entropy of the source')):
        assert abs(value - said(row + r' \| ([\d.]+)')) < 1e-4


def test_the_count_form_has_less_noise():
    text = (SEQUENCES == torch.tensor([0, 1, 2])).all(1).nonzero().item()
    sums = {m: hidden_nats(m)[text].sum().item() for m in SETS}
    mean = sum(chance(int(m.sum()), 1) * nats for m, nats in sums.items())
    # E (nats / t)^2: the integral of t^(l - 2) (1 - t)^(T - l), cut off at the smallest t of the paper's code
    t = torch.linspace(1e-3, 1, 200001, dtype=torch.float64)
    square_t = sum(torch.trapezoid(t ** (int(m.sum()) - 2) * (1 - t) ** (T - int(m.sum())), t).item() * nats ** 2
                   for m, nats in sums.items())
    square_l = sum((T / int(m.sum()) * nats) ** 2 / T / math.comb(T, int(m.sum())) for m, nats in sums.items())
    assert abs(math.sqrt(square_t - mean ** 2) - said(r'deviation of ([\d.]+)\s+nats with Eq. 3')) < 0.006
    assert abs(math.sqrt(square_l - mean ** 2) - said(r'and\s+of ([\d.]+) with Eq. 6')) < 0.006


def law(keep):
    """Return the distribution of what a sampler writes, (27,). keep(probabilities, left): which positions a step keeps.

    Recursive over canvases: all masked positions are guessed independently, `keep` picks some of them.
    """
    total = torch.zeros(27, dtype=torch.float64)

    def step(x, weight, left):
        masked = [i for i in range(T) if x[i] == MASK]
        if not masked:
            total[sum(token * V ** (T - 1 - i) for i, token in enumerate(x))] += weight
            return
        q = MODEL(torch.tensor([x])).double().softmax(-1)[0]
        for guess in product(range(V), repeat=len(masked)):
            probability = [q[i, token].item() for i, token in zip(masked, guess)]
            for share, chosen in keep(probability, left):
                new = list(x)
                for k in chosen:
                    new[masked[k]] = guess[k]
                step(new, weight * math.prod(probability) * share, left - 1)

    step([MASK] * T, 1., 3)
    return total


def distance(q):
    return 0.5 * (q - p).abs().sum().item()


def at_random(sizes):
    """Keep sizes[step] guesses, any of them, equally likely."""
    def keep(probability, left):
        orders = list(permutations(range(len(probability)), sizes[3 - left]))
        return [(1 / len(orders), order) for order in orders]
    return keep


def surest(probability, left):
    return [(1., [max(range(len(probability)), key=probability.__getitem__)])]


def test_what_the_samplers_write():
    found = [distance(law(at_random(sizes))) for sizes in ([3], [2, 1], [1, 1, 1])]
    assert found[2] < 1e-6
    stated = re.search(r'is ([\d.]+) away from p \(total.*?two\s+steps ([\d.]+); in three ([\d.]+)', PAGE, re.S)
    for value, number in zip(found, stated.groups()):
        assert abs(value - float(number.rstrip('.'))) < 1e-4
    assert abs(distance(law(surest)) - said(r'samples is ([\d.]+) away from p')) < 1e-4
