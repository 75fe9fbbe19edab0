"""What the checks of the exercises share: the world of 27 texts, and how a mistake gets its name."""

import copy
import functools
import itertools
import math
import traceback
from pathlib import Path

import pytest
import torch
from helpers import T, V, seeded, table_model

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
        'this takes the logit of [MASK] out of the softmax (MDLM does so), but p is the softmax of all '
        'logits':
            log_p(logits[..., :-1], x0)}


def check_of(f):
    """Turn a check into one that also fails in one sentence if a function is not written, or raises."""
    @functools.wraps(f)
    def run(my):
        try:
            return f(my)
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            own = [frame for frame in frames if Path(frame.filename).name == 'exercises.py']
            at, what = (own or frames)[-1], ' '.join(str(error).split())[:200]
            message = f'{type(error).__name__} in {at.name}, line {at.lineno} ({at.line}): {what}'
            if type(error) is NotImplementedError and not what:
                message = f'{at.name} is not written yet: it is in exercises.py'
            if isinstance(error, RecursionError):
                message = f'{at.name} never ends'
                if f.__name__ == 'ex5':
                    message += ': is [MASK] among the proposals? There are V of them for a mask'
        # out here, so that pytest shows this sentence alone and not the two exceptions
        fail_if(True, message)
    return run


def frequencies(texts):
    """Count texts (N, T) -> frequencies (V,) * T."""
    number = (texts * torch.tensor([V * V, V, 1])).sum(1)
    return torch.bincount(number, minlength=V ** T).view((V,) * T).double() / len(texts)


def total_variation(p, q):
    return float((p - q).abs().sum() / 2)


def surprise(counts, p):
    """Return chi^2 per degree of freedom of counts against probabilities. It is near 1 if they fit."""
    expected = p * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum() / (counts.numel() - 1))
