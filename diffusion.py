"""Masked diffusion on tokens: the papers LLaDA (arXiv 2502.09992v3) and iLLaDA (arXiv 2606.25331), in their order.

    xt, masked = forward_process(x0, t, mask_id)                    # hide tokens
    loss = diffusion_loss(model, masked_batch(x0, xt, masked, weights))     # train
    logp = log_likelihood(model, x0[0], maskable[0], mask_id)       # score
    x, n = generate(model, x, mask_id, SamplingParams(steps=64))    # write

Nothing here knows the network, a tokenizer or a file. A mask predictor is a function that is called like
model.Transformer; `plain` makes one of any function ids -> logits, such as a lookup table. That is how the tests
check every formula to machine precision.

    >>> def abc(ids):                           # puts nearly all probability on token i at position i
    ...     return 9 * torch.eye(ids.shape[1], 8).expand(len(ids), -1, -1)
    >>> generate(plain(abc), torch.tensor([[7, 7, 7]]), mask_id=7, params=SamplingParams(steps=3))
    Generated(x=tensor([[0, 1, 2]]), n_forward=3)

Letters: B batch, T sequence length, V vocabulary, M masked positions, L maskable tokens of a sequence.
"""

import math
import zlib
from collections import namedtuple
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

# ----------------------------------------------------------------------------------------------------------
# 1. The forward process (Sec. 2.1) hides every token with probability t, and t differs from row to row.


def sample_t(batch_size, eps=1e-3, *, stratified=True, logit_normal=0., generator=None):
    """Draw mask ratios t (B,) float32, each uniform on (eps, 1]. Runs on the CPU.

    stratified: draw one t in each of B equal slices of the interval, so that the loss of a batch is less noisy.
    If False, the B ratios are independent, as in LLaDA.
    logit_normal: if > 0, t = sigmoid(logit_normal * z) with z ~ N(0, 1) instead, which favours t near 1/2.
    """
    u = torch.rand(batch_size, generator=generator)
    if stratified:
        # Multiples of the golden ratio spread evenly over [0, 1). Their ranks order the slices so that every
        # contiguous part of the batch (a micro-batch, the rows of one rank) covers [0, 1) evenly as well.
        golden = torch.arange(batch_size, dtype=torch.float64) * (5 ** 0.5 - 1) / 2 % 1
        slices = golden.argsort().argsort()
        # a random shift, so that each row meets each slice equally often
        slices = (slices + torch.randint(batch_size, (1,), generator=generator)) % batch_size
        u = (slices + u) / batch_size
    if logit_normal:
        u = (logit_normal * torch.special.ndtri(u)).sigmoid()
    return 1 - (1 - eps) * u                                # u < 1, hence t > eps


def forward_process(x0, t, mask_id, maskable=None, *, fixed_count=False, u=None, generator=None):
    """Hide tokens: x0 (B, T) int64, t (B,) -> xt (B, T) int64, masked (B, T) bool.              Eq. 7-8

    maskable (B, T) bool: which tokens may be hidden (default: all). `masked` marks the tokens hidden here, so it
    leaves out a token of the data that happens to be mask_id.
    fixed_count: hide exactly ceil(t L) of the L maskable tokens. If t is uniform, their number is uniform on
    1..L, which is the count form of the same objective (Eq. 6, Eq. 14).
    u (B, T): the uniform noise to use. It is drawn if not given.

    >>> x0, u = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[0.1, 0.9, 0.4, 0.6]])
    >>> xt, masked = forward_process(x0, torch.tensor([0.5]), mask_id=0, u=u)
    >>> xt.tolist()
    [[0, 6, 0, 8]]
    """
    if maskable is None:
        maskable = torch.ones_like(x0, dtype=torch.bool)
    if u is None:
        u = torch.rand(x0.shape, generator=generator, device=x0.device)

    if fixed_count:
        count = (t.double() * maskable.sum(1)).ceil().clamp(min=1)
        # rank the maskable positions at random: u orders them, and all others come last
        rank = u.masked_fill(~maskable, 2.).argsort(1).argsort(1)
        hide = rank < count[:, None]
    else:
        hide = u < t[:, None]                                                       # Eq. 8
    masked = maskable & hide
    return torch.where(masked, mask_id, x0), masked


def keyed_generator(*key, device='cpu'):
    """Return a torch.Generator that is a function of the key, some integers. (torch seeds with 32 bits only.)"""
    return torch.Generator(device).manual_seed(zlib.crc32(repr(key).encode()))


def row_noise(seed, iteration, rows, T):
    """Draw uniform noise (len(rows), T) float32 that depends on (seed, iteration, row) alone.

    So a training row gets the same masks however the batch is split over micro-batches and ranks.
    """
    return torch.stack([torch.rand(T, generator=keyed_generator(seed, iteration, row)) for row in rows])


# ----------------------------------------------------------------------------------------------------------
# 2. The loss (Eq. 3): cross-entropy of the masked tokens, weighted by 1/t. This is what train.py minimises.

MaskedBatch = namedtuple('MaskedBatch', 'xt positions targets weights cu_seqlens')


def diffusion_loss(model, batch):
    """Return the training loss of a MaskedBatch, a scalar in nats."""
    ce = model(batch.xt, positions=batch.positions, targets=batch.targets, cu_seqlens=batch.cu_seqlens)     # (M,)
    return (batch.weights * ce).sum()                       # Eq. 3 with 1/(t b L), Eq. 5 with 1/(t b L')


def loss_weights(maskable, masked, t, *, normalize='token', fixed_count=False, normalizer=None):
    """Return the weight of a masked token's cross-entropy in each row: (B, T), (B, T) bool, t (B,) -> (B,) float32.

    normalize: 'token' divides by all b L maskable tokens of the batch (pre-training). Never divide by the masked
    tokens alone: the loss would be no bound. 'sequence' divides each row by its own L' and by the b rows (SFT).
    normalizer: the number of tokens or rows to divide by, if this is one micro-batch of a larger batch.
    """
    L = maskable.sum(1)                                                             # (B,)
    if fixed_count:
        weights = L / masked.sum(1).clamp(min=1)                                    # Eq. 14: L / l
    else:
        weights = 1 / t                                                             # Eq. 3: 1 / t

    if normalize == 'token':
        return weights / (normalizer or L.sum())                                    # Eq. 3: 1 / (b L)
    if normalize == 'sequence':
        return weights / L.clamp(min=1) / (normalizer or len(L))                    # Eq. 5: 1 / (b L')
    raise ValueError(f"normalize must be 'token' or 'sequence', got {normalize!r}")


def masked_batch(x0, xt, masked, weights, cu_seqlens=None):
    """Gather what the loss needs: x0, xt (B, T) int64, masked (B, T) bool, weights (B,) -> MaskedBatch.

    positions (M,) int64 are the masked positions of the flattened batch, targets (M,) their tokens in x0, weights
    (M,) their loss weights. Call it on the CPU, because on a GPU the host would wait for the number M.
    """
    positions = masked.flatten().nonzero()[:, 0]                                    # (M,)
    targets = x0.flatten()[positions]
    sequence = positions // x0.shape[1]                     # the row of each position
    return MaskedBatch(xt, positions, targets, weights[sequence], cu_seqlens)


def plain(f):
    """Turn a function ids (B, T) -> logits (B, T, V) into a mask predictor, without padding, packing and cache."""
    def predictor(ids, *, positions=None, targets=None, **unused):
        logits = f(ids)
        if positions is not None:
            flat = positions.flatten() if positions.dtype == torch.bool else positions
            logits = logits.flatten(0, 1)[flat]                                     # (M, V)
        return logits if targets is None else -log_prob(logits, targets)

    return predictor


def log_prob(logits, targets):
    """Return log softmax(logits)[targets] in float32 or wider: (M, V), (M,) -> (M,)."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    return -F.cross_entropy(logits.to(wide), targets, reduction='none')


# ----------------------------------------------------------------------------------------------------------
# 3. Likelihood (Sec. 2.4): Eq. 6 averages to a lower bound on log p(x0), so losses are written with <=.


@torch.no_grad()
def masked_log_prob(model, x0, masked, mask_id, *, prompt=None, cfg_scale=0., batch_size=16):
    """Sum log p(x0_i | xt) over the masked i of each row: x0 (B, T), masked (B, T) bool -> (B,)."""
    sums = []
    for x, m in zip(x0.split(batch_size), masked.split(batch_size)):
        xt = torch.where(m, mask_id, x)
        logits = guided_logits(model, xt, m, prompt, cfg_scale, mask_id)            # (M, V)
        logp = log_prob(logits, x[m])                                               # (M,)
        row = m.nonzero()[:, 0]
        sums.append(logp.new_zeros(len(x)).index_add_(0, row, logp))
    return torch.cat(sums)


def bound_terms(model, x0, maskable, masked, mask_id, **options):
    """Return one term of Eq. 6 for each row, (B,): L/l times log p of the l masked out of L maskable tokens."""
    logp = masked_log_prob(model, x0, masked, mask_id, **options)
    return logp * maskable.sum(1) / masked.sum(1).clamp(min=1)                      # Eq. 6


def draw_masks(maskable, n_masks, generator=None):
    """Draw masks (n_masks, T) bool for a sequence, maskable (T,) bool, with l uniform on 1..L and stratified.

    (The official code rounds l, so that it is not quite uniform there.)
    """
    rows = maskable.expand(n_masks, -1)
    jitter = torch.rand(n_masks, generator=generator, device=maskable.device)
    t = 1 - (torch.arange(n_masks, device=maskable.device) + jitter) / n_masks
    _, masked = forward_process(rows.long(), t, 0, rows, fixed_count=True, generator=generator)
    return masked


def all_masks(maskable):
    """Return all 2^L - 1 masks of a sequence, (n, T) bool, and the weight of each in the mean of Eq. 6, (n,)."""
    L = int(maskable.sum())
    either = [torch.tensor([False, True])] * L
    subsets = torch.cartesian_prod(*either).view(-1, L)[1:]                         # all but the empty one
    masks = maskable.repeat(len(subsets), 1)
    masks[:, maskable] = subsets.to(maskable.device)
    # l is uniform on 1..L, and all masks with the same l are equally likely
    weights = [1 / L / math.comb(L, l) for l in subsets.sum(1).tolist()]            # noqa: E741
    return masks, torch.tensor(weights, dtype=torch.float64)


def log_likelihood(model, x0, maskable, mask_id, *, mc_num=128, batch_size=16, cfg_scale=0., generator=None):
    """Estimate Eq. 6 for one sequence, x0 (T,) int64, maskable (T,) bool -> float <= log p(maskable | the rest).

    mc_num: how many masks to average over. If L is so small that there are no more than that, all of them are
    used, and the value is exact. Unmaskable tokens are the prompt that guidance (cfg_scale > 0) hides.
    """
    if not maskable.any():
        raise ValueError('log_likelihood: no position is maskable')
    if 2 ** int(maskable.sum()) - 1 <= mc_num:
        masks, weights = all_masks(maskable)
    else:
        masks = draw_masks(maskable, mc_num, generator)
        weights = torch.full((mc_num,), 1 / mc_num, dtype=torch.float64)

    terms = bound_terms(model, x0.expand_as(masks), maskable.expand_as(masks), masks, mask_id,
                        prompt=~maskable[None], cfg_scale=cfg_scale, batch_size=batch_size)
    return float(weights @ terms.cpu().double())


def log_likelihoods(model, x0, maskable, mask_id, *, n_masks=16, seed=0, first=0, batch_size=16):
    """Estimate Eq. 6 for many sequences: x0 (N, T), maskable (N, T) -> lower bounds on log p, (N,) float64.

    Masks depend on (seed, number of the row), so two checkpoints are compared on the same masks. first: the number
    of the first row in a longer list.
    """
    masks = [draw_masks(m, n_masks, keyed_generator(seed, first + i)) for i, m in enumerate(maskable.cpu())]
    masks = torch.cat(masks).to(x0.device)                                          # (N n_masks, T)
    x0 = x0.repeat_interleave(n_masks, dim=0)
    maskable = maskable.repeat_interleave(n_masks, dim=0)
    terms = bound_terms(model, x0, maskable, masks, mask_id, batch_size=batch_size)
    return terms.cpu().double().view(-1, n_masks).mean(1)


def nats_and_bits(logp, n_tokens, n_bytes):
    """Return nats per token, its standard error, bits per byte, its standard error, from log p of rows (N,).

    n_tokens (N,): maskable tokens of each row. n_bytes: bytes of text in a row, on average.
    """
    numbers = []
    for values in (-logp / n_tokens, -logp / n_bytes / math.log(2)):
        numbers += [values.mean().item(), values.std().item() / len(values) ** 0.5]
    return numbers


def log_likelihood_ordered(model, x0, maskable, mask_id, order=None, *, cfg_scale=0.):
    """Sum the chain rule along one order: x0 (T,), maskable (T,) -> float. Eq. 15 is the mean over all orders.

    order: the maskable positions as they are revealed (default: left to right).
    """
    order = maskable.nonzero()[:, 0].tolist() if order is None else order
    hidden = maskable.clone()
    total = 0.
    for i in order:
        xt = torch.where(hidden, mask_id, x0)[None]
        this = torch.zeros_like(hidden)
        this[i] = True
        logits = guided_logits(model, xt, this[None], ~maskable[None], cfg_scale, mask_id)
        total += log_prob(logits, x0[this]).item()                                  # Eq. 15
        hidden[i] = False
    return total


@torch.no_grad()
def confidence_score(model, x0, maskable, mask_id, *, eos_id=None, cfg_scale=0.):
    """Score a candidate answer as iLLaDA does for multiple choice: x0 (T,), maskable (T,) -> float.

    Reveal the candidate's most probable hidden token again and again, and add up the log-probabilities. This is
    neither a bound nor normalised over candidates. eos_id: put a visible EOS behind, which is not scored.
    """
    if eos_id is not None:
        x0 = F.pad(x0, (0, 1), value=eos_id)
        maskable = F.pad(maskable, (0, 1))
    hidden = maskable.clone()
    total = 0.
    while hidden.any():
        xt = torch.where(hidden, mask_id, x0)[None]
        logits = guided_logits(model, xt, hidden[None], ~maskable[None], cfg_scale, mask_id)
        best, i = log_prob(logits, x0[hidden]).max(0)       # over the M hidden tokens
        total += best.item()
        hidden[hidden.nonzero()[i, 0]] = False
    return total


# ----------------------------------------------------------------------------------------------------------
# 4. The sampler as simple as can be: one prompt, the whole canvas, no temperature. `generate` is the fast one.


def num_transfer_tokens(n_masked, steps):
    """Divide masks among steps: n_masked (B,) int64 -> tokens to commit (B, steps). The remainder comes first.

    >>> num_transfer_tokens(torch.tensor([8, 5]), 3).tolist()
    [[3, 3, 2], [2, 2, 1]]
    """
    step = torch.arange(steps, device=n_masked.device)
    one_more = step < (n_masked % steps)[:, None]
    return (n_masked // steps)[:, None] + one_more


@torch.no_grad()
def generate_simple(model, prompt, gen_length, mask_id, steps):
    """Write gen_length tokens after a prompt, ids (P,) -> ids (P + gen_length,) int64.              Alg. 5"""
    prompt = torch.as_tensor(prompt, dtype=torch.long)
    masks = torch.full((gen_length,), mask_id, device=prompt.device)
    x = torch.cat((prompt, masks))[None]                                            # (1, T)

    for n in num_transfer_tokens((x == mask_id).sum(1), steps)[0].tolist():
        # 1. guess all tokens at once
        probability = model(x).softmax(-1)                                          # (1, T, V)
        probability[..., mask_id] = 0                       # a guess is never [MASK] itself
        confidence, guess = probability.max(-1)                                     # (1, T), (1, T)

        # 2. keep the n guesses that the model is most confident of; the rest stays masked
        confidence = torch.where(x == mask_id, confidence, -math.inf)
        keep = confidence[0].topk(n).indices                                        # (n,)
        x[0, keep] = guess[0, keep]
    return x[0]


# ----------------------------------------------------------------------------------------------------------
# 5. The sampler with everything (Sec. 2.4, App. A.3, B.4): batches, blocks, guidance, temperature, caches

Generated = namedtuple('Generated', 'x n_forward')      # x (B, T) int64, number of forward passes


@dataclass(frozen=True)
class SamplingParams:
    """Hold the settings of a sampler. Raises ValueError if one of them is invalid."""

    steps: int | None = None        # denoising steps, divided among the blocks. None: one token per step
    block_length: int | None = None     # finish blocks of this size from left to right. None: one block
    temperature: float = 0.         # of the guesses. 0 takes the most probable token
    remasking: str = 'low_confidence'   # keep the most probable guesses (Alg. 5), or 'random' ones (Alg. 4)
    cfg_scale: float = 0.           # classifier-free guidance. 0 is none
    threshold: float | None = None      # if set, commit all guesses at least this probable, in as many steps as needed
    cache: str | None = None        # 'prefix' or 'dual' reuse keys and values, which is fast and inexact
    logits_eos_inf: bool = False    # never write EOS (App. B.4)
    confidence_eos_eot_inf: bool = False    # write EOS and EoT last (App. B.4)

    def __post_init__(self):
        allowed = {
            'steps': self.steps is None or self.steps >= 1,
            'block_length': self.block_length is None or self.block_length >= 1,
            'temperature': 0 <= self.temperature < math.inf,
            'cfg_scale': 0 <= self.cfg_scale < math.inf,
            'remasking': self.remasking in ('low_confidence', 'random'),
            'threshold': self.threshold is None or self.remasking == 'low_confidence' and 0 < self.threshold <= 1,
            'cache': self.cache in (None, 'prefix', 'dual')}
        for name, valid in allowed.items():
            if not valid:
                raise ValueError(f'invalid {name} of a sampler: {getattr(self, name)!r}')


def canvas(prompts, gen_length, mask_id, pad_id, device='cpu'):
    """Make a batch of prompts (lists of ids), padded on the left so that what is generated lines up.

    Returns x (B, T) int64, which ends in gen_length masks; attention_mask (B, T) bool, False on padding; prompt
    (B, T) bool, the given tokens. (A mask inside a prompt is a gap to fill, so it is not given.)

    >>> x, attention_mask, prompt = canvas([[5, 6], [7]], 2, mask_id=0, pad_id=1)
    >>> x.tolist()
    [[5, 6, 0, 0], [1, 7, 0, 0]]
    """
    if pad_id == mask_id:
        raise ValueError(f'pad_id and mask_id are both {mask_id}, so padding would be filled in')
    masks = [mask_id] * gen_length
    rows = [torch.tensor([*ids, *masks], dtype=torch.long) for ids in prompts]
    ones = [torch.ones_like(row, dtype=torch.bool) for row in rows]

    x = pad_sequence(rows, batch_first=True, padding_value=pad_id, padding_side='left').to(device)
    attention_mask = pad_sequence(ones, batch_first=True, padding_side='left').to(device)
    return x, attention_mask, x != mask_id


def guided_logits(model, x, positions, prompt, cfg_scale, mask_id, *, kv=(None, None), **options):
    """Return logits (M, V) at positions (B, T) bool of x (B, T), with unsupervised classifier-free guidance.

    The unconditional pass sees the same canvas with the prompt (B or 1, T) bool hidden as well (Sec. 2.4). Without
    guidance (cfg_scale 0) it is left out. kv: the caches of the two passes.
    """
    conditional = model(x, positions=positions, kv=kv[0], **options)
    if not cfg_scale:
        return conditional
    without_prompt = torch.where(prompt, mask_id, x)
    unconditional = model(without_prompt, positions=positions, kv=kv[1], **options)
    return unconditional + (cfg_scale + 1) * (conditional - unconditional)          # Sec. 2.4


def gumbel_argmax(logits, temperature, generator=None, *, u=None):
    """Sample from softmax(logits / temperature) with the Gumbel-max trick: (..., V) -> (...) int64.

    It works in float64 and with logarithms, because in lower precision the tail of the noise is cut off, which
    silently lowers the temperature (arXiv 2409.02908). u (..., V): uniform noise to use. Temperature 0 is argmax.
    """
    if temperature == 0:
        return logits.argmax(-1)
    if u is None:
        u = torch.rand(logits.shape, dtype=torch.float64, device=logits.device, generator=generator)
    gumbel = -(-u.log()).log()
    return (logits.to(u.dtype) / temperature + gumbel).argmax(-1)


def uniform(positions, n, generator):
    """Draw uniform noise for the True positions of (B, T) bool, row by row -> (M, n) float64.

    generator: one torch.Generator, or a list with one for each row. With a list, the noise of a row does not depend
    on its neighbours, so a batch equals its rows sampled one by one.
    """
    counts = positions.sum(1).tolist()
    if not isinstance(generator, list):
        counts = [sum(counts)]
        generator = [generator]
    device = positions.device
    dtype = torch.float32 if device.type == 'mps' else torch.float64       # MPS has no float64
    drawn = [torch.rand(m, n, generator=g, dtype=dtype, device=device) for m, g in zip(counts, generator)]
    return torch.cat(drawn)


def forbid(logits, ids):
    """Return logits (M, V) with the tokens `ids` ruled out (-inf)."""
    return logits.index_fill(-1, torch.tensor(ids, device=logits.device), -math.inf) if ids else logits


def draw(logits, positions, never, temperature, generator):
    """Draw a token for each True position of (B, T), from logits (M, V) without the tokens `never` -> (M,)."""
    u = uniform(positions, logits.shape[1], generator) if temperature else None
    return gumbel_argmax(forbid(logits, never), temperature, u=u)


def propose(logits, masked, params, never, deferred, generator):
    """Guess a token for each masked position of (B, T), from logits (M, V) -> guess (M,), confidence (M,).

    never: tokens that are not guessed. deferred: tokens that get confidence 0.
    """
    guess = draw(logits, masked, never, params.temperature, generator)
    if params.remasking == 'random':
        return guess, uniform(masked, 1, generator)[:, 0]                           # Alg. 4
    # the probability of the guess, without noise or temperature, in the dtype of the logits, as in the official code
    probability = forbid(logits, deferred).softmax(-1)
    return guess, probability.gather(-1, guess[:, None])[:, 0]                      # Alg. 5


def select(confidence, masked, n, threshold=None):
    """Choose the guesses to commit: confidence (B, T), masked (B, T), n (list of B) -> (B, T) bool.

    They are the n[b] most confident masked positions of row b and, with a threshold, all that reach it. (As printed,
    Alg. 5 keeps the least confident. The text and the official code keep the most confident.)

    >>> confidence, masked = torch.tensor([[0.9, 0.2, 0.8, 0.7]]), torch.tensor([[False, True, True, True]])
    >>> select(confidence, masked, [1]).tolist(), select(confidence, masked, [1], threshold=0.6).tolist()
    ([[False, False, True, False]], [[False, False, True, True]])
    """
    # the full length, so that ties break as they do in the official top-k
    confidence = torch.where(masked, confidence, -math.inf)
    committed = confidence >= (threshold or math.inf)
    for b, wanted in enumerate(n):
        best = confidence[b].topk(min(wanted, masked.shape[1])).indices
        committed[b, best] = True
    return committed & masked                               # a row may have fewer masks than are wanted


def block_plan(x, mask_id, gen_start, params):
    """Divide the canvas x (B, T) into blocks -> list of (start, end, steps of the block), from left to right.

    Blocks begin at gen_start (default: the first mask). If there are gaps before gen_start, they are filled first,
    as one extra block with as many extra steps as the first block has.
    """
    T = x.shape[1]
    has_mask = (x == mask_id).any(0).tolist()
    if True not in has_mask:
        return []
    first = has_mask.index(True)
    start = first if gen_start is None else gen_start
    length = params.block_length or T - start
    if (T - start) % length:
        raise ValueError(f'block_length must divide the {T - start} tokens to generate, got {length}')

    borders = list(range(start, T + 1, length))
    n_blocks = len(borders) - 1
    steps = params.steps or n_blocks * length
    if steps < n_blocks:
        raise ValueError(f'steps must be at least the number of blocks, {n_blocks}, got {steps}')
    steps_of = num_transfer_tokens(torch.tensor([steps]), n_blocks)[0].tolist()
    blocks = list(zip(borders, borders[1:], steps_of))
    return [(0, start, steps_of[0]), *blocks] if first < start else blocks


@torch.no_grad()
def generate(model, x, mask_id, params, *, gen_start=None, attention_mask=None, prompt=None, eos_id=None, eot_id=None,
             suppress=(), until_end=False, generator=None, adjust=None, on_step=None):
    """Fill every [MASK] of the canvas x (B, T) int64, wherever it stands -> Generated(x, n_forward).

    gen_start: the column where blocks begin (default: the first mask). Later blocks are visible as masks.
    attention_mask (B, T) bool: False on padding. prompt (B, T) bool: what guidance hides (default: all that is given).
    suppress: ids that are never written. [MASK] is never written either.
    until_end: stop as soon as the finished blocks of every row hold EOS or EoT, and fill the rest with EOS.
    generator: a torch.Generator, or a list with one for each row.
    adjust(logits (M, V), x, masked) -> logits: a hook for other rules. on_step(x, committed): called after each step.
    Raises ValueError if block_length or steps do not fit, or if an EOS rule is set without eos_id.
    """
    if (params.logits_eos_inf or params.confidence_eos_eot_inf) and eos_id is None:
        raise ValueError('logits_eos_inf and confidence_eos_eot_inf need eos_id')
    ends = [i for i in (eos_id, eot_id) if i is not None]
    never = [mask_id, *suppress]
    deferred = ends if params.confidence_eos_eot_inf else []
    given = x != mask_id if prompt is None else prompt
    if attention_mask is not None and attention_mask.all():
        attention_mask = None                               # no padding, so attention needs no mask

    # guidance takes two forward passes, each with its own cache
    n_passes = 2 if params.cfg_scale else 1
    kv = [model.new_kv(*x.shape) if params.cache else None for _ in range(n_passes)]
    blocks = block_plan(x, mask_id, gen_start, params)
    n_steps = 0

    for start, end, block_steps in blocks:
        written = x[:, blocks[0][0]:start].tolist()
        if until_end and all(set(ends) & set(row) for row in written):
            x = x.masked_fill(x == mask_id, eos_id)
            break

        in_block = torch.zeros_like(x, dtype=torch.bool)
        in_block[:, start:end] = True
        masked = in_block & (x == mask_id)                                          # (B, T)
        schedule = num_transfer_tokens(masked.sum(1), block_steps).T.tolist()
        step = 0

        while masked.any():
            # with a threshold, and if on_step puts masks back, at least one token per step
            planned = not params.threshold and step < block_steps
            n = schedule[step] if planned else [1] * len(x)

            # Attention looks both ways, so every commit changes every key and value, and a cache is always a bit
            # stale. It is renewed when a block begins; then 'dual' recomputes the block, 'prefix' also what follows.
            columns = slice(0, x.shape[1])
            if params.cache and step:
                columns = slice(start, end if params.cache == 'dual' else x.shape[1])
            kv_positions = torch.arange(x.shape[1], device=x.device)[columns] if params.cache else None
            logits = guided_logits(model, x[:, columns], masked[:, columns], given[:, columns], params.cfg_scale, mask_id,
                                   attention_mask=attention_mask, kv=kv, kv_positions=kv_positions)     # (M, V)

            if adjust is not None:
                logits = adjust(logits, x, masked)
            if params.logits_eos_inf:
                logits = forbid(logits, [eos_id])
            guess, confidence = propose(logits, masked, params, never, deferred, generator)     # (M,), (M,)

            # back from the M masked positions to the canvas
            confidence = confidence.new_zeros(x.shape).masked_scatter(masked, confidence)       # (B, T)
            committed = select(confidence, masked, n, params.threshold)
            x = torch.where(committed, x.masked_scatter(masked, guess), x)

            step += 1
            n_steps += 1
            if on_step is not None:
                on_step(x, committed)
            masked = in_block & (x == mask_id)
    return Generated(x, n_steps * n_passes)


# ----------------------------------------------------------------------------------------------------------
# 6. Variable length (iLLaDA; App. B.4): blocks are appended until the end is written


def generate_variable_length(model, prompts, mask_id, eos_id, params, *, max_length, pad_id=None, stop=None, **options):
    """Continue prompts (lists of ids) block by block -> (lists of ids, prompt included), n_forward.

    Each block has params.block_length masks and gets params.steps steps (None: one token per step). What follows the
    block does not exist yet. A row ends with the block in which EOS appears, or in which stop(generated ids) is True;
    at most max_length tokens are written, in whole blocks. block_length=1 is autoregressive sampling (Table 7).
    pad_id: any id but mask_id, because padding is never attended to. options: of generate.
    """
    block_length = params.block_length
    if not block_length or block_length > max_length:
        raise ValueError(f'max_length must hold a block, got {max_length} and block_length {block_length}')
    pad_id = int(mask_id == 0) if pad_id is None else pad_id
    device = next(model.parameters()).device if hasattr(model, 'parameters') else 'cpu'
    x, attention_mask, _ = canvas(prompts, 0, mask_id, pad_id, device)
    rows = list(prompts)
    running = set(range(len(rows)))
    n_forward = 0

    for _ in range(max_length // block_length):
        start = x.shape[1]
        x = F.pad(x, (0, block_length), value=mask_id)
        attention_mask = F.pad(attention_mask, (0, block_length), value=True)
        x, n = generate(model, x, mask_id, params, gen_start=start, attention_mask=attention_mask, eos_id=eos_id, **options)
        n_forward += n

        # rows that have ended stay in the batch, but no longer grow
        for b in sorted(running):
            rows[b] = x[b][attention_mask[b]].tolist()
            new = rows[b][len(prompts[b]):]
            if eos_id in new or stop is not None and stop(new):
                running.remove(b)
        if not running:
            break
    return rows, n_forward


# ----------------------------------------------------------------------------------------------------------
# 7. The autoregressive twin: shift by one, no noise, no 1/t, and that is the whole difference


def ar_batch(x0, maskable, *, bos_id=None, normalize='token', normalizer=None):
    """Ask for the next token everywhere: x0 (B, T) int64, maskable (B, T) bool -> MaskedBatch for diffusion_loss.

    With bos_id in front every token is predicted, else all but the first. (train.py passes EOS, which ends the text
    before.) normalize, normalizer: of loss_weights.
    """
    before = x0[:, :-1]
    if bos_id is None:
        x0 = x0[:, 1:]
        maskable = maskable[:, 1:]
    else:
        before = F.pad(before, (1, 0), value=bos_id)
    t = torch.ones(len(x0), device=x0.device)               # all tokens are asked for, so 1/t is 1
    weights = loss_weights(maskable, maskable, t, normalize=normalize, normalizer=normalizer)
    return masked_batch(x0, before, maskable, weights)


def ar_loss(model, x0, maskable, **options):
    """Return the mean cross-entropy of the next token: x0 (B, T), maskable (B, T) -> scalar. options: of ar_batch."""
    return diffusion_loss(model, ar_batch(x0, maskable, **options))


@torch.no_grad()
def ar_log_likelihoods(model, x0, maskable, *, bos_id=None, batch_size=64):
    """Return log p of the maskable tokens of each row given all before them: (N, T), (N, T) -> (N,) float64. Exact."""
    sums = []
    for x, m in zip(x0.split(batch_size), maskable.split(batch_size)):
        batch = ar_batch(x, m, bos_id=bos_id)
        logp = log_prob(model(batch.xt, positions=batch.positions), batch.targets).double()
        row = batch.positions // batch.xt.shape[1]
        sums.append(logp.new_zeros(len(x)).index_add_(0, row, logp).cpu())
    return torch.cat(sums)


def ar_log_likelihood(model, x0, maskable, *, bos_id=None):
    """Return log p(maskable | what stands before) of one sequence: x0 (T,), maskable (T,) -> float."""
    if bos_id is None and maskable[0]:
        raise ValueError('ar_log_likelihood: the first token has nothing before it, so give bos_id')
    return ar_log_likelihoods(model, x0[None], maskable[None], bos_id=bos_id).item()


@torch.no_grad()
def ar_generate(model, prompt, n_new, *, eos_id=None, attention_mask=None, suppress=(), temperature=1., generator=None):
    """Continue prompt (B, P) int64 by n_new tokens -> Generated(x (B, P + n_new), n_forward).

    Keys and values are cached, so each token costs one position. Rows that have written eos_id go on repeating it.
    attention_mask (B, P) bool: False on left padding. suppress: ids that are never written.
    """
    x = prompt
    kv = model.new_kv(len(x), x.shape[1] + n_new) if hasattr(model, 'new_kv') else None
    if attention_mask is not None:
        attention_mask = F.pad(attention_mask, (0, n_new), value=True)
    ended = torch.zeros_like(x[:, :1], dtype=torch.bool)

    for k in range(n_new):
        # the cache holds all but the newest token
        start = x.shape[1] - 1 if k and kv is not None else 0
        ids = x[:, start:]
        kv_positions = torch.arange(start, x.shape[1], device=x.device)
        newest = torch.zeros_like(ids, dtype=torch.bool)
        newest[:, -1] = True
        logits = model(ids, positions=newest, kv=kv, kv_positions=kv_positions, attention_mask=attention_mask)  # (B, V)

        token = draw(logits, newest, list(suppress), temperature, generator)[:, None]
        if eos_id is not None:
            token = torch.where(ended, eos_id, token)
            ended = ended | (token == eos_id)
        x = torch.cat((x, token), dim=1)
    return Generated(x, n_new)
