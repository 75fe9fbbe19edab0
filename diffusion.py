"""Masked diffusion on tokens, in the order of the papers (LLaDA, arXiv 2502.09992v3; iLLaDA, arXiv 2606.25331).

    loss = diffusion_loss(model, x0, maskable, mask_id)
    logp = log_likelihood(model, x0[0], maskable[0], mask_id)
    x, n = generate(model, canvas([prompt], 64, mask_id, pad_id)[0], mask_id, steps=64)

Nothing here imports the network. A mask predictor is any callable `model(ids) -> logits (B, T, V)`: a lookup
table will do, which is how tests/ checks every formula to machine precision. (Only `complete` and
`log_prob_rows`, which serve the scripts, need a model.Transformer.)

    >>> def abc(ids):                           # is sure of token 0 in the first place, 1 in the second, ...
    ...     return 9 * torch.eye(ids.shape[1], 8).expand(len(ids), -1, -1)
    >>> generate(abc, torch.tensor([[7, 7, 7]]), mask_id=7, steps=3)
    Generated(x=tensor([[0, 1, 2]]), n_forward=3)

Letters: B batch, T canvas length, V vocabulary, M rows read out, L number of maskable tokens of a row.
"""

import inspect
import math
import zlib
from collections import namedtuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

Question = namedtuple('Question', 'ids rows targets weights cu_seqlens', defaults=(None,))
Generated = namedtuple('Generated', 'x n_forward')      # x (B, T) int64, evaluations of the network
Rules = namedtuple('Rules', 'temperature remasking never last generator')       # how generate proposes
GOLDEN = (5 ** 0.5 - 1) / 2                             # its multiples, modulo 1, spread evenly over [0, 1)


# ----------------------------------------------------------------------------------------------------------
# Forward process (Sec. 2.1): a mask ratio t per sequence, every token hidden with probability t


def sample_t(batch_size, eps=1e-3, stratified=True,
             generator=None, device=None, *, logit_normal=0.):
    """Mask ratios t (B,) float32, each uniform on (eps, 1] (the guideline's p_mask = (1 - eps) t + eps).

    stratified: one t in each of B equal slices, so that the loss of a batch is less noisy, and every
    micro-batch and every rank gets an even mixture of easy and hard rows. False: i.i.d., as in LLaDA.
    logit_normal: above 0, t is sigmoid(logit_normal * z), z normal, on the same interval: more of middle t.
    """
    u = torch.rand(batch_size, generator=generator, device=device)
    if stratified:
        # slices: a permutation of 0 .. B-1, any window of which is evenly spread
        spread = torch.arange(batch_size, dtype=torch.float64) * GOLDEN % 1
        slices = spread.argsort().argsort().to(u.device)
        turn = torch.randint(batch_size, (1,), generator=generator, device=device)
        slices = (slices + turn) % batch_size
        u = (slices + u) / batch_size
    if logit_normal:
        u = (logit_normal * torch.special.ndtri(u)).sigmoid()
    return 1 - (1 - eps) * u


def forward_process(x0, t, mask_id, maskable=None, generator=None,
                    *, exact=False, u=None):
    """Hides tokens: x0 (B, T) int64, t (B,) -> xt (B, T) int64, masked (B, T) bool.           Eq. 7-8

    Only maskable (B, T) bool positions are hidden (default: all). `masked` marks the tokens hidden here, not
    data tokens that happen to equal mask_id. u (B, T): noise to use, uniform on [0, 1); drawn if not given.
    exact: hide exactly ceil(t L) of the L maskable tokens; for a uniform t their number is uniform on 1..L,
    the count form of the same objective (Eq. 6, Eq. 14).

    >>> x0, noise = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[0.1, 0.9, 0.4, 0.6]])
    >>> xt, masked = forward_process(x0, torch.tensor([0.5]), mask_id=0, u=noise)
    >>> xt.tolist()
    [[0, 6, 0, 8]]
    """
    if maskable is None:
        maskable = torch.ones_like(x0, dtype=torch.bool)
    if u is None:
        u = torch.rand(x0.shape, generator=generator, device=x0.device)

    if exact:
        count = t.to(widest(t.device)) * maskable.sum(1)
        count = count.ceil().clamp(min=1)
        order = u.masked_fill(~maskable, 2.0).argsort(1)        # maskable positions first, at random
        rank = order.argsort(1)
        drawn = rank < count[:, None]
    else:
        drawn = u < t[:, None]
    masked = maskable & drawn
    return torch.where(masked, mask_id, x0), masked


def row_noise(seed, iteration, rows, T):
    """Uniform noise (len(rows), T) float32 for global rows: a function of (seed, iteration, row) alone.

    The same tokens of a training row are hidden however the batch is split over passes and ranks.
    """
    noise = []
    key = np.array([seed, iteration], np.uint64)
    for row in rows:
        stream = np.random.Philox(key=key, counter=[0, 0, 0, row])
        draw = np.random.Generator(stream).random
        noise.append(draw(T, np.float32))
    return torch.from_numpy(np.stack(noise))


def keyed_generator(*key, device='cpu'):
    """A torch.Generator seeded by a key of integers, hashed because torch uses only 32 bits of a seed."""
    seed = zlib.crc32(repr(key).encode())
    return torch.Generator(device).manual_seed(seed)


# ----------------------------------------------------------------------------------------------------------
# Training losses: a question for the model, and the loss of its answers


def question(x0, xt, masked, maskable, t,
             *, cu_seqlens=None, **form):
    """Asks what x0 (B, T) was at the masked positions of xt (B, T) -> Question. form: see question_weights.

    A Question asks for `targets` (M,) at `rows` (M,), flat indices into ids (B, T), with loss `weights` (M,).
    Made on the host: selecting rows by a mask on the GPU would make the host wait for the GPU.
    """
    weight = question_weights(maskable, masked, t, **form)                          # (B,)
    rows = masked.flatten().nonzero()[:, 0]                                         # (M,)
    targets = x0.flatten()[rows]
    row_of = rows // x0.shape[1]
    return Question(xt, rows, targets, weight[row_of], cu_seqlens)


def question_weights(maskable, masked, t,
                     per='token', exact=False, total=None):
    """The loss weight of a masked token in each row, (B,) float32. per, exact, total: see diffusion_loss."""
    n = maskable.sum(1)                                                             # (B,)
    if exact:
        weight = n / masked.sum(1).clamp(min=1)                                     # Eq. 14: L / l
    else:
        weight = 1 / t                                                              # Eq. 3: 1 / t

    if per == 'token':
        return weight / (total or n.sum())                                          # Eq. 3: 1 / (b L)
    if per == 'sequence':
        return weight / n.clamp(min=1) / (total or len(n))                          # Eq. 5: 1 / (b L')
    raise ValueError(f"per must be 'token' or 'sequence', got {per!r}")


def weighted_loss(model, question):
    """Sum of weights * cross-entropy of the targets of a Question, a scalar: what training minimises."""
    ids, rows, targets, weights, cu_seqlens = question
    if takes(model, 'targets'):                                 # head and loss fused: no M x V logits
        return model(ids, rows=rows, targets=targets, weights=weights, cu_seqlens=cu_seqlens)
    logp = log_prob(logits_of(model, ids, rows), targets)                           # (M,)
    return -(logp * weights).sum()


def diffusion_loss(model, x0, maskable, mask_id,
                   *, per='token', exact=False, total=None,
                   t=None, masked=None, generator=None, cu_seqlens=None):
    """The training loss, a scalar, from x0 (B, T) int64 and maskable (B, T) bool; train.py calls its parts.

    per='token' (Eq. 3, Alg. 1): cross-entropy / t, summed over the masked tokens, divided by the number of
        maskable tokens in the batch: all b L in pre-training, never only the masked ones (not a bound).
    per='sequence' (Eq. 5, SFT): each row divided by its number of maskable tokens, then the mean over rows.
    t (B,), masked (B, T): noise to use. exact: the count form, weight L/l instead of 1/t.
    total: divide by this instead (tokens or rows of the global batch, of which this is a part).
    """
    if masked is None:
        if t is None:
            eps = 0 if exact else 1e-3
            t = sample_t(len(x0), eps, generator=generator, device=x0.device)
        _, masked = forward_process(x0, t, mask_id, maskable, generator, exact=exact)
    elif t is None and not exact:
        raise ValueError('masked needs the t that it was drawn with, or exact=True')

    xt = torch.where(masked, mask_id, x0)
    asked = question(x0, xt, masked, maskable, t,
                     cu_seqlens=cu_seqlens, per=per, exact=exact, total=total)
    return weighted_loss(model, asked)                                              # Eq. 3, Eq. 5


# ----------------------------------------------------------------------------------------------------------
# Likelihood (Sec. 2.4): log p(x0) is at least the value of Eq. 6


def masked_log_prob(model, x0, masked, mask_id,
                    *, prompt=None, cfg_scale=0., batch_size=16):
    """Sum of log p(x0_i | xt) over the masked i of each row: x0 (B, T), masked (B, T) -> (B,)."""
    sums = []
    for x, m in zip(x0.split(batch_size), masked.split(batch_size)):
        xt = torch.where(m, mask_id, x)
        logits = guided_logits(model, xt, prompt, cfg_scale, mask_id, rows=m)       # (M, V)
        logp = log_prob(logits, x[m])                                               # (M,)
        row_of = m.nonzero()[:, 0]
        sums.append(sum_by_row(logp, row_of, len(x)))
    return torch.cat(sums)


def eq6(model, x0, maskable, masked, mask_id, **options):
    """One term of Eq. 6 for each row, (B,): L/l times the log p of the l masked out of L maskable tokens."""
    logp = masked_log_prob(model, x0, masked, mask_id, **options)
    return logp * maskable.sum(1) / masked.sum(1).clamp(min=1)                      # Eq. 6


def eq6_masks(maskable, mc_num, generator=None):
    """Masks (n, T) for one sequence, maskable (T,), and the share (n,) float64 of each in the mean of Eq. 6.

    All 2^L - 1 masks of its L maskable tokens, if there are at most mc_num: the mean is then exact. Otherwise
    mc_num draws of l, stratified and exactly uniform on 1..L (the official rounding is not).
    """
    L = int(maskable.sum())
    device = maskable.device
    if L == 0:
        raise ValueError('log_likelihood: no position is maskable')

    if 2 ** L - 1 <= mc_num:
        either = torch.tensor([False, True], device=device)
        subsets = torch.cartesian_prod(*[either] * L)
        subsets = subsets.view(-1, L)[1:]                       # all but the empty one
        masks = maskable.repeat(len(subsets), 1)
        masks[:, maskable] = subsets
        sizes = subsets.sum(1).tolist()
        shares = [1 / L / math.comb(L, n) for n in sizes]

    else:
        rows = maskable.expand(mc_num, -1)
        jitter = torch.rand(mc_num, generator=generator, device=device)
        u = (torch.arange(mc_num, device=device) + jitter) / mc_num
        _, masks = forward_process(rows.long(), 1 - u, -1, rows, generator, exact=True)
        shares = [1 / mc_num] * mc_num
    return masks, torch.tensor(shares, dtype=torch.float64)


@torch.no_grad()
def log_likelihood(model, x0, maskable, mask_id,
                   *, mc_num=128, generator=None, **options):
    """Eq. 6 for one sequence: x0 (T,) int64, maskable (T,) bool -> float <= log p(maskable | rest).

    mc_num evaluations, or all masks if fewer, then exact: see eq6_masks. options: batch_size=16, cfg_scale=0.
    """
    masks, shares = eq6_masks(maskable, mc_num, generator)
    x0 = x0.expand_as(masks)
    maskable = maskable.expand_as(masks)
    options['prompt'] = ~maskable[:1]
    terms = eq6(model, x0, maskable, masks, mask_id, **options)
    return float(shares @ terms.cpu().double())


@torch.no_grad()
def log_likelihood_eq5(model, x0, maskable, mask_id,
                       *, mc_num=128, generator=None, **options):
    """The bound in the form of Eq. 5 (t uniform, Bernoulli masks, weight 1/t): far larger variance."""
    x0 = x0.expand(mc_num, -1)
    maskable = maskable.expand(mc_num, -1)
    t = sample_t(mc_num, 0, stratified=False, generator=generator, device=x0.device)
    _, masked = forward_process(x0, t, mask_id, maskable, generator)
    options['prompt'] = ~maskable[:1]
    logp = masked_log_prob(model, x0, masked, mask_id, **options)
    return float((logp / t).mean())                                                 # Eq. 5


@torch.no_grad()
def bound_per_row(model, x0, maskable, mask_id,
                  draws=16, seed=0, first=0, **options):
    """Eq. 6 for many rows: x0 (N, T), maskable (N, T) -> lower bounds on log p, (N,) float64.

    The noise is fixed by the seed: two checkpoints are compared on the same masks. t is stratified over the draws
    of a row and over the rows, by a randomly shifted lattice. first: number of the first row in a longer list.
    options: batch_size=16.
    """
    number = first * draws + torch.arange(len(x0) * draws)      # numbers of the masks, row by row
    row = number // draws
    draw = number % draws
    turn = torch.rand(1, generator=keyed_generator(seed), dtype=torch.float64)
    place = (row.double() * GOLDEN + turn) % 1             # within the draw's slice
    t = 1 - (draw + place) / draws
    noise = row_noise(seed, 2 ** 63, number.tolist(), x0.shape[1])      # a key that no iteration uses

    x0 = x0[row - first]
    maskable = maskable[row - first]
    t = t.float().to(x0.device)
    noise = noise.to(x0.device)
    _, masked = forward_process(x0, t, mask_id, maskable, exact=True, u=noise)
    terms = eq6(model, x0, maskable, masked, mask_id, **options)
    return terms.cpu().double().view(-1, draws).mean(1)


def log_prob_rows(model, x0, maskable, tok,
                  *, batch_size, **which):
    """log p of the maskable tokens of each row (N, T): exact for a causal model, else a lower bound -> (N,).

    model: a Transformer, since its configuration is read. which: draws, seed, first, see bound_per_row.
    """
    if model.config.causal:
        return ar_log_prob(model, x0, maskable, bos_id=tok.eos_id, batch_size=batch_size)
    return bound_per_row(model, x0, maskable, tok.mask_id, batch_size=batch_size, **which)


def nats_and_bits(logp, n_tokens, n_bytes):
    """log p of rows (N,) in nats per token and bits per byte -> [mean, standard error, mean, standard error]."""
    numbers = []
    for values in (-logp / n_tokens, -logp / n_bytes / math.log(2)):
        numbers.append(values.mean().item())
        if len(values) >= 64:                            # neighbouring windows are correlated: blocks of 8
            whole = len(values) // 8 * 8
            values = values[:whole].view(-1, 8).mean(1)
        n = len(values)
        spread = values.std().item() if n > 1 else math.nan
        numbers.append(spread / n ** 0.5)
    return numbers


@torch.no_grad()
def chain_rule(model, x0, maskable, mask_id, choose, cfg_scale=0.):
    """Sum of log p(x0_i | what is revealed), while the maskable tokens are revealed one by one -> float.

    choose(log p of the hidden tokens (M,), their positions (M,)) -> which of the M comes next.
    """
    hidden = maskable.clone()
    total = 0.0
    while hidden.any():
        xt = torch.where(hidden, mask_id, x0)[None]
        logits = guided_logits(model, xt, ~maskable[None], cfg_scale, mask_id, rows=hidden[None])
        logp = log_prob(logits, x0[hidden])                                         # (M,)
        positions = hidden.nonzero()[:, 0]
        k = choose(logp, positions)
        total += float(logp[k])
        hidden[positions[k]] = False
    return total


def fit(model, prompt, filled, mask_id, *, seed=0):
    """How well `filled` fills the gaps of `prompt`, both ids: a lower bound on log p, nats per token -> float.

    Two tokens on each side are scored too: at its given length almost any filling looks good by itself, and a
    wrong length shows in its neighbours.
    """
    device = device_of(model)
    gap = torch.tensor([prompt], device=device) == mask_id
    near = F.max_pool1d(gap.float(), 5, 1, 2)[0] > 0
    x0 = torch.tensor(filled, device=device)
    logp = log_likelihood(model, x0, near, mask_id, mc_num=64,
                          generator=keyed_generator(seed, device=device))
    return logp / int(near.sum())


def log_likelihood_ordered(model, x0, maskable, mask_id, order=None,
                           *, cfg_scale=0.):
    """Chain rule along one order (Eq. 15 is the mean over all): exact for a model whose orders agree.

    order: the maskable positions (indices into x0) as they are revealed; default left to right.
    """
    positions = maskable.nonzero()[:, 0].tolist()
    order = positions if order is None else list(order)
    if sorted(order) != positions:
        raise ValueError(f'order must hold the maskable positions {positions}, each once, got {order}')
    coming = iter(order)

    def in_order(logp, hidden):
        return hidden.tolist().index(next(coming))

    return chain_rule(model, x0, maskable, mask_id, in_order, cfg_scale)            # Eq. 15


def confidence_score(model, x0, maskable, mask_id,
                     *, eos_id=None, cfg_scale=0.):
    """iLLaDA's multiple-choice score of a candidate: x0 (T,), maskable (T,) -> float.

    The chain rule, revealing the most probable of the candidate's hidden tokens next: neither a bound nor
    normalised over candidates. eos_id: a visible EOS follows, not scored.
    """
    if eos_id is not None:
        x0 = F.pad(x0, (0, 1), value=eos_id)
        maskable = F.pad(maskable, (0, 1))

    def most_probable(logp, hidden):
        return logp.argmax()

    return chain_rule(model, x0, maskable, mask_id, most_probable, cfg_scale)


# ----------------------------------------------------------------------------------------------------------
# Reverse process (Sec. 2.4, App. A.3, B.4): propose a token everywhere, write down the trusted ones, repeat


def canvas(prompts, gen_length, mask_id, pad_id, device='cpu'):
    """A batch of prompts, padded on the left so that what is generated lines up.

    prompts: lists of ids -> x (B, T) int64 ending in gen_length masks; visible (B, T) bool, False on padding;
    prompt (B, T) bool, the given tokens (a mask inside a prompt is a gap to fill, not a given token).

    >>> x, visible, prompt = canvas([[5, 6], [7]], 2, mask_id=0, pad_id=1)
    >>> x.tolist()
    [[5, 6, 0, 0], [1, 7, 0, 0]]
    """
    if pad_id == mask_id:
        raise ValueError(f'padding must not look like a mask: pad_id and mask_id are both {mask_id}')
    masks = [mask_id] * gen_length
    rows = [torch.tensor([*ids, *masks], dtype=torch.long) for ids in prompts]
    seen = [torch.ones_like(row, dtype=torch.bool) for row in rows]

    x = pad_sequence(rows, batch_first=True, padding_value=pad_id, padding_side='left').to(device)
    visible = pad_sequence(seen, batch_first=True, padding_side='left').to(device)
    return x, visible, x != mask_id


def num_transfer_tokens(n_masked, steps):
    """How many tokens each step commits: n_masked (B,) int64 -> (B, steps); the remainder comes first.

    >>> num_transfer_tokens(torch.tensor([8, 5]), 3).tolist()
    [[3, 3, 2], [2, 2, 1]]
    """
    step = torch.arange(steps, device=n_masked.device)
    one_more = step < (n_masked % steps)[:, None]
    return (n_masked // steps)[:, None] + one_more


def step_sizes(n_masked, steps, threshold=None):
    """Yields, without end, how many tokens each row commits in a step, list (B,): with a threshold, at least 1."""
    if not threshold:
        yield from num_transfer_tokens(n_masked, steps).T.tolist()
    while True:                                                 # in case on_step puts masks back
        yield [1] * len(n_masked)


def guided_logits(model, x, prompt, cfg_scale, mask_id,
                  *, rows=None, kv=(None, None), **options):
    """Logits (M, V) of `rows` (default: the masks of x) with unsupervised classifier-free guidance.

    The unconditional pass sees the same canvas with the prompt (B or 1, T, bool) hidden as well (Sec. 2.4);
    cfg_scale 0 skips it. kv: a cache for each of the two passes.
    """
    rows = x == mask_id if rows is None else rows
    conditional = logits_of(model, x, rows, kv=kv[0], **options)
    if not cfg_scale:
        return conditional

    without_prompt = torch.where(prompt, mask_id, x)
    unconditional = logits_of(model, without_prompt, rows, kv=kv[1], **options)
    return unconditional + (cfg_scale + 1) * (conditional - unconditional)


def gumbel_argmax(logits, temperature, generator=None, *, u=None):
    """A sample of softmax(logits / temperature) by the Gumbel-max trick: (..., V) -> (...) int64.

    In float64 and in the log domain: in lower precision the tail of the noise is cut and the temperature
    silently falls (arXiv 2409.02908). u (..., V): uniform noise to use. Temperature 0 takes the argmax.
    """
    if temperature == 0:
        return logits.argmax(-1)
    if u is None:
        wide = widest(logits.device)
        u = torch.rand(logits.shape, dtype=wide, device=logits.device, generator=generator)
    gumbel = u.log().neg_().log_().neg_()
    return (logits.to(u.dtype) / temperature + gumbel).argmax(-1)


def confidence(logits, x0_hat, remasking, *, u=None, generator=None):
    """How much each proposal is trusted: logits (M, V), x0_hat (M,) -> (M,).

    'low_confidence': the probability of the proposal, without noise or temperature, in the dtype of the
    logits, as the official sampler has it. 'random': a uniform number, u (M,) if it is given.
    """
    if remasking == 'low_confidence':
        probability = logits.softmax(-1)
        return probability.gather(-1, x0_hat[:, None])[:, 0]
    if remasking != 'random':
        raise ValueError(f"remasking must be 'low_confidence' or 'random', got {remasking!r}")
    if u is None:
        u = torch.rand(x0_hat.shape, generator=generator, device=logits.device)
    return u


def select(confidence, masked, n, threshold=None):
    """Which proposals to write down: confidence (B, T), masked (B, T), n (list of B) -> committed (B, T).

    The n[b] most confident masked positions of row b and, with a threshold, all at or above it.

    >>> sure, masked = torch.tensor([[0.9, 0.2, 0.8, 0.7]]), torch.tensor([[False, True, True, True]])
    >>> select(sure, masked, [1]).tolist(), select(sure, masked, [1], threshold=0.6).tolist()
    ([[False, False, True, False]], [[False, False, True, True]])
    """
    confidence = torch.where(masked, confidence, -math.inf)     # full length: ties break as in one long top-k
    committed = confidence >= (threshold or math.inf)           # without a threshold none

    for b, wanted in enumerate(n):
        best = confidence[b].topk(min(wanted, masked.shape[1])).indices
        committed[b, best] = True
    return committed & masked                                   # a row may have fewer than are wanted


def forbid(logits, ids):
    """The logits (..., V) with `ids` ruled out (-inf)."""
    if not ids:
        return logits
    ids = torch.tensor(ids, device=logits.device)
    return logits.index_fill(-1, ids, -math.inf)


def uniform(rows, columns, generator):
    """Uniform noise for the True positions of rows (B, T), row by row: (M, columns) float64.

    generator: one torch.Generator, or a list with one for each row of the batch, so that what a row draws does
    not depend on its neighbours: a batch then equals its rows sampled one by one.
    """
    counts = rows.sum(1).tolist()
    if not isinstance(generator, list):
        counts = [sum(counts)]
        generator = [generator]

    options = dict(dtype=widest(rows.device), device=rows.device)
    drawn = [torch.rand(n, columns, generator=g, **options) for n, g in zip(counts, generator)]
    return torch.cat(drawn)


def draw(logits, rows, never=(), temperature=1., generator=None):
    """Draws a token for each True position of rows (B, T) from logits (M, V) -> (M,). never: ids not drawn."""
    u = uniform(rows, logits.shape[1], generator) if temperature > 0 else None
    return gumbel_argmax(forbid(logits, never), temperature, u=u)


def propose(logits, masked, rules):
    """For each True position of masked (B, T), from logits (M, V): a token (M,) and the trust in it (M,)."""
    guess = draw(logits, masked, rules.never, rules.temperature, rules.generator)
    u = None
    if rules.remasking == 'random':
        u = uniform(masked, 1, rules.generator)[:, 0]
    logits = forbid(logits, rules.last)
    return guess, confidence(logits, guess, rules.remasking, u=u)


def write(x, masked, guess, trust, n, threshold):
    """Writes the most trusted of the guesses (M,) for masked positions -> new canvas (B, T), committed (B, T)."""
    everywhere = trust.new_zeros(x.shape).masked_scatter(masked, trust)
    committed = select(everywhere, masked, n, threshold)
    filled = x.masked_scatter(masked, guess)
    return torch.where(committed, filled, x), committed


def block_plan(x, mask_id, gen_start, block_length, steps):
    """Blocks of the canvas, left to right, as (start, end, its steps): each has an equal share of `steps`.

    Gaps before gen_start form an extra block in front, with as many steps as the first, on top of `steps`.
    """
    T = x.shape[1]
    columns = (x == mask_id).any(0).tolist()
    if True not in columns:
        return []

    first = columns.index(True)
    start = first if gen_start is None else gen_start
    block_length = T - start if block_length is None else block_length
    if block_length < 1 or (T - start) % block_length:
        raise ValueError(f'block_length must divide the {T - start} tokens to generate, got {block_length}')
    borders = list(range(start, T + 1, block_length))
    n = len(borders) - 1
    if type(steps) is not int or steps < n:
        raise ValueError(f'steps must be a whole number, at least the number of blocks, {n}, got {steps!r}')

    steps_of = num_transfer_tokens(torch.tensor([steps]), n)[0].tolist()
    blocks = list(zip(borders, borders[1:], steps_of))
    if first < start:
        blocks.insert(0, (0, start, steps_of[0]))
    return blocks


def masks_between(x, mask_id, start, end):
    """The masks of x (B, T) in columns start to end, (B, T) bool."""
    masked = x == mask_id
    masked[:, :start] = False
    masked[:, end:] = False
    return masked


def recomputed_rows(cache, T, block, step, n_steps):
    """The columns that step `step` of a block recomputes, in order. n_steps: steps so far, in all blocks.

    Attention is bidirectional, so every commit changes every row, and any cache is an approximation. 'prefix'
    recomputes from the block to the end and 'dual' the block alone, with a full pass when a block begins
    (Fast-dLLM, arXiv 2505.22618); 'roll' makes one full pass, then recomputes the block and as many other
    columns, in rotation (which ones depends on the width of the batch, padding included).
    """
    start, end = block
    if not cache or (n_steps if cache == 'roll' else step) == 0:
        return list(range(T))
    if cache == 'roll':
        n, others = end - start, [*range(start), *range(end, T)]
        again = [others[(n_steps * n + i) % len(others)] for i in range(min(n, len(others)))]
        again += range(start, end)
        return sorted(again)
    return list(range(start, T if cache == 'prefix' else end))


def check_sampler(remasking, cache, threshold, **numbers):
    """Refuses bad sampler settings in one sentence, before the first forward pass. numbers: 0 or more."""
    for name, value in numbers.items():
        if not 0 <= value < math.inf:
            raise ValueError(f'{name} must be 0 or more, got {value}')

    if remasking not in ('low_confidence', 'random'):
        raise ValueError(f"remasking must be 'low_confidence' or 'random', got {remasking!r}")
    if cache and cache not in ('prefix', 'dual', 'roll'):
        raise ValueError(f"cache must be None, 'prefix', 'dual' or 'roll', got {cache!r}")
    if threshold and not (0 < threshold <= 1 and remasking == 'low_confidence'):
        raise ValueError(f'threshold lies in (0, 1] and needs low_confidence remasking, got {threshold}')


@torch.no_grad()
def generate(model, x, mask_id, *,
             steps, block_length=None, gen_start=None, cache=None,
             temperature=0., remasking='low_confidence', threshold=None, generator=None,
             cfg_scale=0., prompt=None, visible=None, suppress=(),
             eos_id=None, eot_id=None, logits_eos_inf=False, confidence_eos_eot_inf=False,
             until_end=False, adjust=None, on_step=None):
    """Fills every [MASK] of the canvas x (B, T) int64, wherever it stands -> Generated(x, n_forward).

    steps: denoising steps for the whole canvas, divided among its blocks; each step commits an equal share.
    block_length: None is pure diffusion; less is semi-autoregressive: blocks are finished from left to right,
        with later ones visible as masks. They begin at gen_start (default: the first mask).
    temperature: of the proposals. generator: see uniform. remasking: which proposals survive a step,
        'low_confidence' the most probable (Alg. 5: seeks the mode), 'random' any (Alg. 4 with a fixed count).
    threshold: above 0, parallel decoding: commits all proposals at least this probable, in as many steps as it takes.
    cfg_scale, prompt (B, T) bool: guidance away from the canvas without its prompt (default: what is given).
    visible (B, T) bool: False on left padding. suppress: ids never written; [MASK] never is.
    cache: None or '' is exact; 'prefix', 'dual', 'roll': see recomputed_rows; the model needs new_kv.
    logits_eos_inf: EOS is never written. confidence_eos_eot_inf: EOS and EoT are written last (App. B.4).
    until_end: stop once finished blocks of every row hold EOS or EoT; the rest becomes EOS: the same text.
    adjust(logits (M, V), x, masked) -> logits: see end_think. on_step(x, committed): after each step, may edit x.
    """
    check_sampler(remasking, cache, threshold, temperature=temperature, cfg_scale=cfg_scale)
    if (logits_eos_inf or confidence_eos_eot_inf) and eos_id is None:
        raise ValueError('logits_eos_inf and confidence_eos_eot_inf need eos_id')
    ends = [i for i in (eos_id, eot_id) if i is not None]
    last = ends if confidence_eos_eot_inf else []
    rules = Rules(temperature, remasking, [mask_id, *suppress], last, generator)
    given = x != mask_id if prompt is None else prompt
    visible = None if visible is None or visible.all() else visible
    kv = [model.new_kv(*x.shape) if cache else None for _ in range(2 if cfg_scale else 1)]
    blocks = block_plan(x, mask_id, gen_start, block_length, steps)
    n_steps = 0

    for start, end, block_steps in blocks:
        written = x[:, blocks[0][0]:start].tolist()
        if until_end and not any(set(ends).isdisjoint(row) for row in written):
            x = x.masked_fill(x == mask_id, eos_id)
            break

        n_masked = masks_between(x, mask_id, start, end).sum(1)
        for step, n in enumerate(step_sizes(n_masked, block_steps, threshold)):
            masked = masks_between(x, mask_id, start, end)                          # (B, T)
            if not masked.any():
                break

            columns = recomputed_rows(cache, x.shape[1], (start, end), step, n_steps)
            pos = torch.tensor(columns, device=x.device)
            logits = guided_logits(
                model, x[:, pos], given[:, pos], cfg_scale, mask_id, rows=masked[:, pos],
                visible=visible, kv=kv, pos=pos if cache else None)                 # (M, V)
            if adjust is not None:
                logits = adjust(logits, x, masked)
            logits = forbid(logits, [eos_id] if logits_eos_inf else [])

            guess, trust = propose(logits, masked, rules)                           # (M,), (M,)
            x, committed = write(x, masked, guess, trust, n, threshold)             # (B, T), (B, T)
            n_steps += 1
            if on_step is not None:
                on_step(x, committed)
    return Generated(x, n_steps * len(kv))


@torch.no_grad()
def generate_variable_length(model, prompts, mask_id, eos_id,
                             *, block_length, steps_per_block, max_length,
                             pad_id=None, stop=None, **settings):
    """Block diffusion on a growing canvas (iLLaDA; App. B.4): nothing after the current block exists yet.

    prompts: lists of ids -> (prompt + generated ids of each, to the end of the block that stopped it;
    n_forward). Blocks of masks are appended and denoised in steps_per_block steps each, at most max_length
    tokens in whole blocks, until every row has EOS or satisfies `stop(generated ids) -> bool`.
    block_length=1 is the autoregressive sampling of the paper's Table 7. Earlier blocks count as prompt.
    """
    if not 0 < block_length <= max_length:
        raise ValueError(f'max_length must hold a block of {block_length}, got {max_length}')
    pad_id = int(mask_id == 0) if pad_id is None else pad_id    # hidden, so any other id will do
    x, visible, _ = canvas(prompts, 0, mask_id, pad_id, device_of(model))
    rows = list(prompts)
    ended = set()
    n_forward = 0

    for _ in range(max_length // block_length):
        start = x.shape[1]
        x = F.pad(x, (0, block_length), value=mask_id)
        visible = F.pad(visible, (0, block_length), value=True)
        x, n = generate(model, x, mask_id, steps=steps_per_block, gen_start=start,
                        visible=visible, eos_id=eos_id, **settings)
        n_forward += n

        for b in set(range(len(rows))) - ended:
            rows[b] = x[b][visible[b]].tolist()
            new = rows[b][len(prompts[b]):]
            if eos_id in new or stop is not None and stop(new):
                ended.add(b)
        if len(ended) == len(rows):
            break
    return rows, n_forward


# the settings of a script that complete takes, by name
SETTINGS = (
    'steps block_length variable_length stop temperature remasking threshold cache cfg_scale logits_eos_inf '
    'confidence_eos_eot_inf think_boost think_power').split()


def sampler_of(cfg):
    """What complete takes from the settings of a script -> dict. ValueError if they are invalid."""
    if cfg.variable_length and not cfg.block_length:
        raise ValueError('variable_length needs a block_length')
    if not all(isinstance(text, str) and text for text in cfg.stop):
        raise ValueError(f'stop must hold texts that are not empty, got {cfg.stop}')

    check_sampler(
        cfg.remasking, cfg.cache, cfg.threshold,
        temperature=cfg.temperature, cfg_scale=cfg.cfg_scale,
        steps=cfg.steps, block_length=cfg.block_length,
        think_boost=cfg.think_boost, think_power=cfg.think_power)
    return {name: getattr(cfg, name) for name in SETTINGS}


def check_steps(new, cfg):
    """ValueError if `new` tokens do not divide into the blocks and steps of a script's settings."""
    if new < 1 or cfg.block_length and new % cfg.block_length:
        raise ValueError(f'block_length must divide the {new} tokens to generate, got {cfg.block_length}')
    least = new // (cfg.block_length or new)
    most = new
    if cfg.variable_length:
        least = 1
        most = cfg.block_length
    if cfg.steps and not least <= cfg.steps <= most:
        raise ValueError(f'steps must lie between {least} (blocks) and {most} (tokens), got {cfg.steps}')


def complete(model, prompts, gen_length, tok, *,
             batch_size=64, seed=0, first=0,
             steps=0, block_length=0, variable_length=False, stop=(),
             temperature=0., think_boost=0., think_power=3., **settings):
    """Continues prompts, lists of ids, or fills their gaps -> (lists of ids, prompt included; n_forward).

    model: a Transformer. tok: a data.Tokenizer. steps and block_length 0: one token per step, the whole canvas.
    stop: texts that end a canvas of variable length, as EOS and EoT do. think_boost, think_power: see
    end_think. settings: of generate. A causal model writes from left to right, at this temperature.
    The noise of prompt k depends on (seed, first + k) alone, not on its neighbours in the batch.
    """
    device = device_of(model)
    out = {}
    n_forward = 0
    by_length = sorted(range(len(prompts)), key=lambda k: len(prompts[k]))      # little padding in a batch
    never = [tok.mask_id, *tok.unused(model.config.vocab_size)]

    for start in range(0, len(prompts), batch_size):
        part = by_length[start:start + batch_size]
        rows = [prompts[k] for k in part]
        noise = [keyed_generator(seed, first + k, device=device) for k in part]
        how = dict(
            temperature=temperature, generator=noise,
            eos_id=tok.eos_id, suppress=never)
        more = dict(settings, eot_id=tok.eot_id)
        if think_boost:
            ids = tok.encode('</think>')
            before = settings.get('adjust')
            more['adjust'] = end_think(len(rows[-1]), gen_length, ids, think_boost, think_power, before)

        if model.config.causal:
            begun = [[tok.eos_id, *row] for row in rows]
            x, visible, _ = canvas(begun, 0, tok.mask_id, tok.pad_id, device)
            x, n = ar_generate(model, x, gen_length, visible=visible, **how)
            written = x[:, visible.shape[1]:].tolist()
            rows = [row + new for row, new in zip(rows, written)]

        elif variable_length:
            rows, n = generate_variable_length(
                model, rows, tok.mask_id,
                block_length=block_length, steps_per_block=steps or block_length,
                max_length=gen_length, pad_id=tok.pad_id,
                stop=lambda ids: tok.ended(ids, stop),
                **how, **more)

        else:
            gaps = any(tok.mask_id in row for row in rows)
            new = 0 if gaps else gen_length
            x, visible, _ = canvas(rows, new, tok.mask_id, tok.pad_id, device)
            masks = (x == tok.mask_id).sum(1)
            x, n = generate(
                model, x, tok.mask_id,
                steps=steps or int(masks.max()), block_length=block_length or None,
                visible=visible, until_end=not gaps,
                **how, **more)
            rows = [row[seen].tolist() for row, seen in zip(x, visible)]

        n_forward += n
        out.update(zip(part, rows))
    return [out[k] for k in range(len(prompts))], n_forward


def end_think(begin, gen_length, ids, boost=100.0, power=3.0, before=None):
    """A hook for `adjust`: makes the tokens `ids` of "</think>" ever more likely (iLLaDA's evaluation).

    Until a row contains them, the next of them gains boost * progress^power at the row's first mask in the
    block; progress is how far that position lies into the gen_length columns after `begin`. before: a hook to
    call first.
    """
    n = len(ids)

    def adjust(logits, x, masked):
        logits = before(logits, x, masked) if before else logits
        logits = logits.clone()
        rows = x[:, begin:].tolist()
        holes = masked[:, begin:].tolist()
        first = 0                                               # index of the row's first mask in logits

        for row, hidden in zip(rows, holes):
            said = any(row[k:k + n] == ids for k in range(len(row)))
            if any(hidden) and not said:
                at = hidden.index(True)
                k = n - 1                                       # how many of its tokens precede the mask
                while row[max(at - k, 0):at] != ids[:k]:
                    k -= 1
                progress = min(1.0, (at + 1) / gen_length)
                logits[first, ids[k]] += boost * progress ** power
            first += sum(hidden)
        return logits

    return adjust


# ----------------------------------------------------------------------------------------------------------
# The autoregressive baseline: shift by one, no noise, no 1/t, and that is the whole difference


def ar_question(x0, maskable, bos_id=None, **form):
    """Asks for the next token everywhere -> Question, weighted as in Eq. 3 or Eq. 5 without 1/t.

    With bos_id put before the row every token is predicted, otherwise all but the first. (Any id can mark the
    beginning: train.py passes EOS, which ends the text before.) form: per, total.
    """
    before = x0[:, :-1]
    if bos_id is None:
        x0 = x0[:, 1:]
        maskable = maskable[:, 1:]
    else:
        before = F.pad(before, (1, 0), value=bos_id)
    t = torch.ones(len(x0), device=x0.device)
    return question(x0, before, maskable, maskable, t, **form)


def ar_loss(model, x0, maskable,
            *, per='token', bos_id=None, total=None):
    """Mean cross-entropy of the next token over the maskable ones: x0 (B, T), maskable (B, T) -> ()."""
    asked = ar_question(x0, maskable, bos_id, per=per, total=total)
    return weighted_loss(model, asked)


@torch.no_grad()
def ar_log_prob(model, x0, maskable, *, bos_id=None, batch_size=64):
    """Exact log p of the maskable tokens of each row given all before them: (B, T) -> (B,) float64."""
    sums = []
    for x, m in zip(x0.split(batch_size), maskable.split(batch_size)):
        ids, rows, targets, _, _ = ar_question(x, m, bos_id)
        logp = log_prob(logits_of(model, ids, rows), targets)                       # (M,)
        row_of = rows // ids.shape[1]
        sums.append(sum_by_row(logp, row_of, len(x)))
    return torch.cat(sums)


def ar_log_likelihood(model, x0, maskable, *, bos_id=None):
    """log p(maskable | what stands before) of one sequence: x0 (T,), maskable (T,) -> float."""
    if bos_id is None and maskable[0]:
        raise ValueError('ar_log_likelihood: the first token has nothing before it; give bos_id')
    return float(ar_log_prob(model, x0[None], maskable[None], bos_id=bos_id))


@torch.no_grad()
def ar_generate(model, prompt, n_new,
                *, eos_id=None, visible=None, suppress=(), **sampling):
    """Continues prompt (B, P) int64 by n_new tokens -> Generated(x (B, P + n_new), n_forward).

    Keys and values are cached, so each token costs one row. Rows that produced eos_id keep repeating it.
    visible (B, P) bool: False on left padding. suppress: ids never written. sampling: temperature, generator.
    """
    x = prompt
    kv = None
    if hasattr(model, 'new_kv'):
        kv = model.new_kv(len(x), x.shape[1] + n_new)
    if visible is not None:
        visible = F.pad(visible, (0, n_new), value=True)
    ended = torch.zeros_like(x[:, :1], dtype=torch.bool)

    for k in range(n_new):
        ids = x
        pos = None
        if k and kv is not None:                                # the cache holds all but the newest
            ids = x[:, -1:]
            pos = torch.tensor([x.shape[1] - 1], device=x.device)
        newest = torch.zeros_like(ids, dtype=torch.bool)
        newest[:, -1] = True
        logits = logits_of(model, ids, newest, kv=kv, pos=pos, visible=visible)     # (B, V)

        token = draw(logits, newest, suppress, **sampling)[:, None]
        if eos_id is not None:
            token = torch.where(ended, eos_id, token)
            ended = ended | (token == eos_id)
        x = torch.cat((x, token), dim=1)
    return Generated(x, n_new)


# ----------------------------------------------------------------------------------------------------------
# How any mask predictor is called: model.Transformer takes every option, a lookup table none


def takes(model, name):
    """Whether a mask predictor has an argument of this name (DDP hides the signature of what it wraps)."""
    call = getattr(getattr(model, 'module', model), 'forward', model)
    return name in inspect.signature(call).parameters


def logits_of(model, ids, rows, **options):
    """Logits (M, V) of `rows`, (B, T) bool or flat indices (M,), whether or not the model can skip others."""
    options = {name: value for name, value in options.items() if value is not None}
    if takes(model, 'rows'):
        return model(ids, rows=rows, **options)

    logits = model(ids, **options)
    if rows.dtype == torch.bool:
        return logits[rows]
    return logits.flatten(0, 1)[rows]


def log_prob(logits, targets):
    """log softmax(logits)[targets] in float32 or wider: (M, V), (M,) -> (M,) in the widest dtype."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = F.cross_entropy(logits, targets, reduction='none')
    return -loss.to(widest(logits.device))


def sum_by_row(values, row_of, n_rows):
    """Adds up values (M,) that belong to rows row_of (M,): -> (n_rows,)."""
    return values.new_zeros(n_rows).index_add_(0, row_of, values)


def widest(device):
    """float64, or float32 on MPS, which has nothing wider."""
    return torch.float32 if device.type == 'mps' else torch.float64


def device_of(model):
    """The device of a model's parameters; a table has none."""
    return next(model.parameters()).device if hasattr(model, 'parameters') else 'cpu'
