"""Your answers. Replace each `raise NotImplementedError`; README.md beside this file explains how.

Letters: B rows, T tokens in a row, V vocabulary, M masked positions of all rows. A `model` is any function
ids (B, T) int64 -> logits (B, T, V): its logits at position i predict token i (no shift).
"""

import torch  # noqa: F401  (you will need it)


def ex1_loss(model, x0, xt, masked, t):
    """Eq. 3: the pre-training loss, a scalar.

    x0 (B, T) the text, xt (B, T) the text with [MASK] at masked (B, T) bool, t (B,) the mask ratio of each row:

        1/B sum_b  1/(t_b T)  sum over the masked i of row b  -log p(x0_bi | xt_b)
    """
    raise NotImplementedError


def ex2_hide(maskable, n, u):
    """Exactly n[b] of the maskable positions of row b, at random -> masked (B, T) bool.

    maskable (B, T) bool, n (B,) int64, n[b] at most the number maskable in row b, u (B, T) uniform noise. It fits on
    one line of 80 columns: what does argsort of argsort give for a row?
    """
    raise NotImplementedError


def ex3_bound(model, x0, masks, mask_id):
    """Eq. 6: a lower bound on log p(x0) from some masks -> a number.

    x0 (T,), masks (K, T) bool, each hiding l >= 1 of the T tokens:

        mean over the masks of  T/l  sum over the masked i  log p(x0_i | the rest)
    """
    raise NotImplementedError


def ex4_step(model, x, mask_id, n, generator):
    """One step of random remasking (Alg. 4 with a fixed count): x (B, T) with masks -> x with n fewer in each row.

    n: an int. Draw a token for every mask from the softmax of the logits, then write n of them, chosen at random in
    each row (all that are left, if there are fewer), to a copy of x. generator: for both draws.
    """
    raise NotImplementedError


def ex5_law(model, mask_id, T, V):
    """The law that low-confidence remasking, one token per step, temperature 1, samples: probabilities (V,) * T.

    From a canvas of T masks: propose a token at every mask, each drawn from its own softmax; write down the
    proposal with the highest probability (the leftmost of ties); repeat until no mask is left. Return the exact
    probability of every text. (T and V are 3: go through all proposals.)
    """
    raise NotImplementedError


def ex6_counts(n_masked, steps):
    """How many tokens each of `steps` steps writes: a list of whole numbers that differ by at most 1, larger ones
    first, and add up to n_masked."""
    raise NotImplementedError


def ex6_guide(conditional, unconditional, w):
    """Classifier-free guidance (Sec. 2.4): logits that go w + 1 times the way from the unconditional to the
    conditional ones. w = 0 is no guidance."""
    raise NotImplementedError


def ex7_write(keys, new, pos):
    """The cache is a slice: keys (B, H, T, D), the keys `new` (B, H, W, D) of positions pos (W,) -> keys of all T
    positions, those of pos replaced. Without a loop; `keys` itself must not change."""
    raise NotImplementedError


def ex8_bits_per_byte(nats_per_token, n_tokens, text):
    """Cross-entropy in bits per byte of UTF-8, from the mean nats per token over the n_tokens tokens of this text."""
    raise NotImplementedError


def ex9_schedule(cost, T, k):
    """The best schedule of exactly k steps: a list of k numbers of tokens, each at least 1, that add up to T.

    cost[a][b]: the cost (in nats lost) of writing the tokens a, ..., b-1 in one step. Dynamic programming: the best
    way to write b tokens in j steps is the best way to write some a of them in j - 1, plus cost[a][b].
    """
    raise NotImplementedError


def ex10_may_see(lengths):
    """Packing: segments of these lengths, a list, lie end to end in one row of T tokens -> (T, T) bool, whether
    the query (row) may look at the key (column): anywhere in its own segment, nowhere else. No causal mask."""
    raise NotImplementedError
