"""Your answers. Replace each `raise NotImplementedError`; the README.md beside this file explains how.

Letters: B rows, T tokens in a row, V vocabulary. A `model` is any function ids (B, T) int64 -> logits (B, T, V + 1),
the last one for [MASK]. Its logits at position i predict token i, so there is no shift. Logits need not be normalised,
and a model may be unsure of the tokens that it sees. Do not change your inputs.
"""

import torch  # noqa: F401  (you will need it)


def ex1_loss(model, x0, xt, masked, t):
    """Return the pre-training loss (Eq. 3), a scalar tensor.

    x0 (B, T) is the text, xt (B, T) the same text with [MASK] where masked (B, T) bool is True, and t (B,) is the
    mask ratio of each row:

        1/B sum_b  1/(t_b T)  sum over the masked i of row b  -log p(x0_bi | xt_b)
    """
    raise NotImplementedError


def ex2_hide(maskable, n, u):
    """Choose exactly n[b] of the maskable positions of row b at random -> masked (B, T) bool.

    maskable (B, T) bool, n (B,) int64, where n[b] is at most the number of maskable positions in row b, and
    u (B, T) is uniform noise. The answer fits on one line: what does the argsort of an argsort give you?
    """
    raise NotImplementedError


def ex3_bound(model, x0, masks, mask_id):
    """Estimate the lower bound on log p(x0) from some masks (Eq. 6) -> a number.

    x0 (T,), masks (K, T) bool. Each mask hides l >= 1 of the T tokens:

        mean over the masks of  T/l  sum over the masked i  log p(x0_i | the rest)
    """
    raise NotImplementedError


def ex4_step(model, x, mask_id, n, generator):
    """Take one step of random remasking (Alg. 4 with a fixed count): x (B, T) -> x with n masks fewer in each row.

    n: an int. Draw a token for every mask from the softmax of its logits. Then choose n of the masks of each row at
    random (all of them, if fewer are left) and write their tokens into a copy of x. Rows may have different numbers of
    masks. Call the model once. generator: for both draws. (The logit of [MASK] is -inf in 4 and 5.)
    """
    raise NotImplementedError


def ex5_law(model, mask_id, T, V):
    """Return the distribution that low-confidence remasking samples from: probabilities (V,) * T.

    Take one token per step and temperature 1. Begin with T masks. Draw a proposal for every mask from its own
    softmax, and write only the proposal with the highest probability (the leftmost one of ties). Repeat until no
    mask is left. Return the exact probability of every text. (T and V are small, so you can enumerate all proposals.)
    """
    raise NotImplementedError


def ex6_counts(n_masked, steps):
    """Divide n_masked tokens among `steps` steps -> a list of ints that add up to n_masked.

    They differ by at most 1, and the larger ones come first.
    """
    raise NotImplementedError


def ex6_guide(conditional, unconditional, w):
    """Return logits with classifier-free guidance (Sec. 2.4).

    They go w + 1 times the way from the unconditional to the conditional logits. w = 0 is no guidance.
    """
    raise NotImplementedError


def ex7_write(keys, new, pos):
    """Update a cache: keys (B, H, T, D), new keys (B, H, W, D) of the positions pos (W,) -> keys (B, H, T, D).

    Only the keys at pos are replaced. Use no loop, and do not change `keys` itself.
    """
    raise NotImplementedError


def ex8_bits_per_byte(nats_per_token, n_tokens, text):
    """Return the cross-entropy in bits per byte of UTF-8, from the mean nats per token of this text."""
    raise NotImplementedError


def ex9_cost(h):
    """Return what a step loses: a table of (T + 1) x (T + 1) numbers (lists in a list), from T entropies h.

    h[j] is the mean entropy in nats of a hidden token, given j others. If a tokens are there, a step that writes
    the tokens a, ..., b - 1 draws all of them with entropy h[a]. One at a time they would have h[a], h[a + 1], ...,
    h[b - 1]. The difference is what is lost (a Kullback-Leibler divergence):

        cost[a][b] = (b - a) h[a] - (h[a] + ... + h[b - 1])        for a < b; the other entries are not used
    """
    raise NotImplementedError


def ex9_schedule(cost, T, k):
    """Return the best schedule of exactly k steps: a list of k numbers of tokens, each at least 1, that add up to T.

    cost[a][b] is what it costs (in nats) to write the tokens a, ..., b-1 in one step. Use dynamic programming: the
    best way to write b tokens in j steps is the best way to write some a of them in j - 1 steps, plus cost[a][b].
    """
    raise NotImplementedError


def ex10_attention_mask(lengths):
    """Return who attends to whom in a packed row: segment lengths, a list that adds up to T -> (T, T) bool.

    True where a query (row) may attend to a key (column): everywhere in its own segment, in both directions, and
    nowhere else.
    """
    raise NotImplementedError
