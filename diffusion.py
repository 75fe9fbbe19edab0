"""Masked diffusion on tokens, in the order of the papers LLaDA (arXiv 2502.09992v3) and iLLaDA (2606.25331).

Nothing here knows the network, a tokenizer or a file. A mask predictor is a function that is called like
model.Transformer, and `plain` makes one of any function ids -> logits, such as a lookup table. That is how
the tests check every formula to machine precision.

    >>> def abc(ids):                           # puts nearly all probability on token i at position i
    ...     return 9 * torch.eye(ids.shape[1], 8).expand(len(ids), -1, -1)
    >>> generate(plain(abc), torch.tensor([[7, 7, 7]]), mask_id=7, params=SamplingParams(steps=3))
    Generated(x=tensor([[0, 1, 2]]), n_forward=3)

Letters: B batch (b in the papers), T sequence length, V vocabulary, P prompt length, M masked positions,
L maskable tokens of a sequence (L' if it has a prompt), l of them hidden.
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


def sample_t(batch_size, eps=1e-3,
             *, stratified=True, logit_normal=0., generator=None):
    """Draw mask ratios t (B,) float32, each uniform on (eps, 1], on the CPU.

    stratified: one t in each of B equal slices, for a less noisy loss. False: independent, as in LLaDA.
    logit_normal: if > 0, t = sigmoid(logit_normal * z) with z ~ N(0, 1), which up to 1.5 favours t near 1/2.
    """
    # one number per row decides how much of it is hidden
    u = torch.rand(batch_size, generator=generator)
    if stratified:
        # each row gets a slice of [0, 1) of its own
        slices = torch.randperm(batch_size, generator=generator)
        u = (slices + u) / batch_size
    # a uniform number becomes a normal one, and a sigmoid brings it back to (0, 1)
    if logit_normal:
        z = torch.special.ndtri(u)
        u = torch.sigmoid(logit_normal * z)
    return 1 - (1 - eps) * u                                # u <= 1, hence t >= eps


def forward_process(x0, t, mask_id, maskable=None,
                    *, fixed_count=False, u=None, generator=None):
    """Hide tokens: x0 (B, T) int64, t (B,) -> xt (B, T) int64, masked (B, T) bool.              Eq. 7-8

    maskable (B, T) bool: which tokens may be hidden (default: all). fixed_count: hide exactly ceil(t L) of
    them. For a uniform t that is the count form of the same objective (Eq. 6, Eq. 14).
    u (B, T): the uniform noise to use. It is drawn if not given.

    >>> x0, u = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[0.1, 0.9, 0.4, 0.6]])
    >>> xt, masked = forward_process(x0, torch.tensor([0.5]), mask_id=0, u=u)
    >>> xt.tolist()
    [[0, 6, 0, 8]]
    """
    # in pre-training any token may be hidden; in fine-tuning (Eq. 5) only the response
    if maskable is None:
        maskable = torch.ones_like(x0, dtype=torch.bool)
    if u is None:
        u = torch.rand(x0.shape, generator=generator, device=x0.device)
    # either exactly ceil(t L) tokens, or each token with probability t
    if fixed_count:
        L = maskable.sum(1)
        count = torch.ceil(t.double() * L)
        count = count.clamp(min=1)
        # rank the maskable positions at random: u orders them, and all others come last
        order = u.masked_fill(~maskable, 2.).argsort(1)
        rank = order.argsort(1)
        hide = rank < count[:, None]
    else:
        hide = u < t[:, None]                                                       # Eq. 8
    # xt == mask_id would not do: the data may contain that token, and it is not hidden
    masked = maskable & hide
    return torch.where(masked, mask_id, x0), masked


def keyed_generator(*key, device='cpu'):
    """Return a torch.Generator that depends on the key alone, some integers."""
    # hashed, because torch seeds its CPU generator with 32 bits only
    seed = zlib.crc32(repr(key).encode())
    return torch.Generator(device).manual_seed(seed)


def row_noise(seed, iteration, rows, T):
    """Draw uniform noise (len(rows), T) float32 that depends on (seed, iteration, row) alone.

    So a training row gets the same masks however the batch is split over micro-batches and ranks.
    """
    noise = []
    # numbered in the whole batch of an update, of which this may be a part
    for row in rows:
        generator = keyed_generator(seed, iteration, row)
        noise.append(torch.rand(T, generator=generator))
    return torch.stack(noise)


# ----------------------------------------------------------------------------------------------------------
# 2. The loss (Eq. 3): cross-entropy of the masked tokens, weighted by 1/t. This is what train.py minimises.

# The network needs to predict only the masked positions, and they are few. So a batch names them, and the
# head, its widest matrix, leaves out all others.
MaskedBatch = namedtuple('MaskedBatch', 'xt positions targets weights cu_seqlens')


def diffusion_loss(model, batch):
    """Return the training loss of a MaskedBatch in nats, a scalar."""
    ce = model(
        batch.xt, positions=batch.positions, targets=batch.targets,
        cu_seqlens=batch.cu_seqlens)                        # (M,) cross-entropy of the masked tokens
    return (batch.weights * ce).sum()                       # Eq. 3 with 1/(t b L), Eq. 5 with 1/(t b L')


def loss_weights(maskable, masked, t,
                 *, normalize='token', fixed_count=False, normalizer=None):
    """Return the weight of a masked token in each row: maskable, masked (B, T) bool, t (B,) -> (B,) float32.

    normalize: 'token' divides by all b L maskable tokens of the batch (pre-training), never by the masked
    ones alone, which would be no bound. 'sequence' divides each row by its own L', then by the b rows (SFT).
    normalizer: the b L or b to divide by, if this is one micro-batch of a larger batch.
    """
    L = maskable.sum(1)                                                             # (B,)
    if fixed_count:
        weights = L / masked.sum(1).clamp(min=1)                                    # Eq. 14: L / l (config/docs.py)
    else:
        weights = 1 / t                                                             # Eq. 3: 1 / t
    if normalize == 'token':
        return weights / (normalizer or L.sum())                                    # Eq. 3: 1 / (b L)
    assert normalize == 'sequence', normalize
    return weights / L.clamp(min=1) / (normalizer or len(L))                        # Eq. 5: 1 / (b L')


def masked_batch(x0, xt, masked, weights, cu_seqlens=None):
    """Gather what the loss needs: x0, xt (B, T) int64, masked (B, T) bool, weights (B,) -> MaskedBatch.

    Of the M masked positions: positions (M,) int64 in the flattened batch, targets (M,) in x0, weights (M,).
    """
    # train.py calls this on the CPU, because on a GPU the host would wait until the number M is known
    positions = masked.flatten().nonzero()[:, 0]
    targets = x0[masked]
    row = positions // x0.shape[1]
    return MaskedBatch(xt, positions, targets, weights[row], cu_seqlens)


def plain(f):
    """Turn a function ids (B, T) -> logits (B, T, V) into a mask predictor (without padding, packing, cache)."""
    def predictor(ids, *, positions=None, targets=None, **unused):
        logits = f(ids)
        if positions is not None:
            # bool (B, T), or numbers (M,) in the flattened batch
            logits = logits.flatten(0, 1)[positions.flatten()]                      # (M, V)
        if targets is None:
            return logits
        return -log_prob(logits, targets)

    return predictor


def log_prob(logits, targets):
    """Return log softmax(logits)[targets] in float32 or wider: (M, V), (M,) -> (M,)."""
    # float32 at least, because 1/t multiplies a rounding error by up to 1000
    wide = torch.promote_types(logits.dtype, torch.float32)
    ce = F.cross_entropy(logits.to(wide), targets, reduction='none')
    return -ce


# ----------------------------------------------------------------------------------------------------------
# 3. Likelihood (Sec. 2.4): Eq. 6 averages to a lower bound on log p(x0), so losses are written with <=.


def draw_masks(maskable, n_masks, generator=None):
    """Draw masks (n_masks, T) bool of a sequence, maskable (T,) bool: l uniform on 1..L, then l random positions."""
    # the tokens do not matter here, so the row itself stands for them
    rows = maskable.expand(n_masks, -1)
    # stratified, and exactly uniform. (The official code rounds l, so that its ends are rarer.)
    t = sample_t(n_masks, 0.0, generator=generator)
    _, masks = forward_process(
        rows.long(), t, 0, rows, fixed_count=True, generator=generator)
    return masks


def all_masks(maskable):
    """Return all 2^L - 1 masks of a sequence, (n, T) bool, and their probabilities in Eq. 6, (n,) float64."""
    # each number from 1 to 2^L - 1 is a mask, by its bits
    L = int(maskable.sum())
    number = torch.arange(1, 2 ** L, device=maskable.device)
    bit = torch.arange(L, device=maskable.device)
    subsets = (number[:, None] >> bit) % 2 == 1                                     # (n, L)
    masks = maskable.repeat(len(subsets), 1)
    masks[:, maskable] = subsets
    # l is uniform on 1..L, and all masks of the same size are equally likely
    sizes = subsets.sum(1).tolist()
    probabilities = [1 / L / math.comb(L, size) for size in sizes]
    return masks, torch.tensor(probabilities, dtype=torch.float64)


@torch.no_grad()
def log_likelihood(model, x0, maskable, mask_id,
                   *, mc_num=128, batch_size=16, cfg_scale=0., generator=None):
    """Estimate Eq. 6 for one sequence, a lower bound on log p(maskable | the rest), in nats -> float.

    x0 (T,) int64, maskable (T,) bool. mc_num: masks to average over. If there are no more than that (2^L - 1), all
    are used, and the bound is exact. cfg_scale: guidance by all that is not maskable. generator: on the CPU.
    """
    # an empty sum would be 0, the best of all scores
    if not maskable.any():
        raise ValueError('log_likelihood: no position is maskable')
    if 2 ** int(maskable.sum()) - 1 <= mc_num:
        masks, probabilities = all_masks(maskable)
    else:
        # on the CPU, so that the masks do not depend on the device
        masks = draw_masks(maskable.cpu(), mc_num, generator)
        masks = masks.to(x0.device)
        probabilities = torch.ones(mc_num, dtype=torch.float64) / mc_num

    # each mask hides l of the L tokens, and the model predicts these l
    terms = []
    for masked in masks.split(batch_size):
        xt = torch.where(masked, mask_id, x0)                                       # (B, T)
        logits = guided_logits(model, xt, masked, ~maskable, cfg_scale, mask_id)    # (M, V)
        logp = log_prob(logits, x0.expand_as(xt)[masked])

        everywhere = logp.new_zeros(xt.shape).masked_scatter(masked, logp)          # (B, T)
        scale = maskable.sum() / masked.sum(1)                                      # L / l, (B,)
        terms.append(scale * everywhere.sum(1))                                     # Eq. 6
    terms = torch.cat(terms).cpu().double()
    return float(probabilities @ terms)


def mean_and_error(values):
    """Return the mean of values (N,) and its standard error."""
    std, mean = torch.std_mean(values)
    return [mean.item(), std.item() / len(values) ** 0.5]


def nats_and_bits(logp, rows, n_bytes):
    """Return nats per token, its standard error, bits per byte, its standard error, from log p of rows (N,).

    rows: pairs of x0 (T,) and maskable (T,). n_bytes: bytes of text in a row, on average.
    """
    # nats depend on the vocabulary, but bits per byte can be compared between tokenizers
    n_tokens = torch.stack([maskable.sum() for _, maskable in rows])
    nats = -logp / n_tokens
    bits = -logp / n_bytes / math.log(2)
    return mean_and_error(nats) + mean_and_error(bits)


@torch.no_grad()
def confidence_score(model, x0, maskable, mask_id,
                     *, eos_id=None, cfg_scale=0.):
    """Score a candidate answer as iLLaDA does for multiple choice: x0 (T,), maskable (T,) -> float.

    Reveal the candidate's most probable hidden token again and again, and add up the log-probabilities. This
    is neither a bound nor normalised over candidates. eos_id: put a visible EOS behind, which is not scored.
    """
    if eos_id is not None:
        x0 = F.pad(x0, (0, 1), value=eos_id)
        maskable = F.pad(maskable, (0, 1))
    hidden = maskable.clone()
    total = 0.
    # each round shows the model what has been revealed so far
    while hidden.any():
        xt = torch.where(hidden, mask_id, x0)
        logits = guided_logits(
            model, xt[None], hidden[None], ~maskable, cfg_scale, mask_id)           # (M, V)
        logp = log_prob(logits, x0[hidden])
        best = logp.argmax()
        total += logp[best].item()
        position = hidden.nonzero()[best, 0]
        hidden[position] = False
    return total


# ----------------------------------------------------------------------------------------------------------
# 4. The sampler as simple as can be: one prompt, one block, no temperature. The next section has the rest.


def num_transfer_tokens(n_masked, steps):
    """Share out masks among steps: n_masked (B,) int64 -> tokens to commit (B, steps). The remainder comes first.

    >>> num_transfer_tokens(torch.tensor([8, 5]), 3).tolist()
    [[3, 3, 2], [2, 2, 1]]
    """
    # n / steps, in the first n % steps of them rounded up, then down
    step = torch.arange(steps, device=n_masked.device)
    return (n_masked[:, None] + steps - 1 - step) // steps


@torch.no_grad()
def generate_simple(model, prompt, gen_length, mask_id, steps):
    """Write gen_length tokens after a prompt, ids (P,) -> ids (P + gen_length,) int64.              Alg. 5"""
    prompt = torch.as_tensor(prompt, dtype=torch.long)
    masks = torch.full((gen_length,), mask_id, device=prompt.device)
    x = torch.cat((prompt, masks))[None]                                            # (1, T)
    n_masked = (x == mask_id).sum(1)
    for n in num_transfer_tokens(n_masked, steps)[0].tolist():
        # 1. guess all tokens at once, but never [MASK] itself
        probability = model(x).softmax(-1)                                          # (1, T, V)
        probability[..., mask_id] = 0
        confidence, guess = probability.max(-1)                                     # (1, T), (1, T)
        # 2. keep the n guesses that the model is most confident of, and look again
        confidence = torch.where(x == mask_id, confidence, -math.inf)
        keep = confidence[0].topk(n).indices
        x[0, keep] = guess[0, keep]
    return x[0]


# ----------------------------------------------------------------------------------------------------------
# 5. The sampler with everything (Sec. 2.4, App. A.3, B.4): batches, blocks, guidance, temperature, caches

# x (B, T) int64, and how many times the network was called, which is what a sample costs
Generated = namedtuple('Generated', 'x n_forward')


@dataclass(frozen=True)
class SamplingParams:
    """Hold the settings of a sampler. Raises ValueError if one of them is invalid."""

    steps: int | None = None            # denoising steps, divided among the blocks. None: one token per step
    block_length: int | None = None     # finish blocks of this size from left to right. None: one block
    temperature: float = 0.             # of the guesses. 0 takes the most probable token
    remasking: str = 'low_confidence'   # keep the most probable guesses (Alg. 5), or 'random' ones (Alg. 4)
    cfg_scale: float = 0.               # classifier-free guidance. 0 is none
    threshold: float | None = None      # if set, commit all guesses at least this probable (steps is not used)
    cache: str | None = None            # 'prefix' or 'dual' reuse keys and values, which is fast and inexact
    logits_eos_inf: bool = False        # never write EOS (App. B.4)
    confidence_eos_eot_inf: bool = False    # low_confidence: write EOS and EoT last (App. B.4)

    def __post_init__(self):
        # these are often mistyped, and a wrong word would silently be something else
        if self.remasking not in ('low_confidence', 'random'):
            raise ValueError(f"remasking must be 'low_confidence' or 'random', got {self.remasking!r}")
        if self.cache not in (None, 'prefix', 'dual'):
            raise ValueError(f"cache must be None, 'prefix' or 'dual', got {self.cache!r}")
        if self.threshold and self.remasking == 'random':
            raise ValueError("threshold needs remasking 'low_confidence', because random confidences mean nothing")
        least = dict(
            steps=1, block_length=1,
            temperature=0, cfg_scale=0, threshold=0)
        for name, minimum in least.items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise ValueError(f'{name} must be at least {minimum}, got {value}')


def canvas(prompts, gen_length, mask_id, pad_id, device='cpu'):
    """Make a batch of prompts (lists of ids), padded on the left so that what is generated lines up.

    pad_id: any token but [MASK], because masks are filled in.
    Returns x (B, T) int64, which ends in gen_length masks; attention_mask (B, T) bool, False on padding; and
    prompt (B, T) bool, the given tokens. (A mask inside a prompt is a gap to fill, so it is not given.)

    >>> x, attention_mask, prompt = canvas([[5, 6], [7]], 2, mask_id=0, pad_id=1)
    >>> x.tolist()
    [[5, 6, 0, 0], [1, 7, 0, 0]]
    """
    masks = [mask_id] * gen_length
    rows = [torch.tensor([*ids, *masks], dtype=torch.long) for ids in prompts]
    # padding on the left, so that all rows end together; -1 is no token
    x = pad_sequence(rows, batch_first=True, padding_value=-1, padding_side='left')
    x = x.to(device)
    attention_mask = x >= 0
    x = torch.where(attention_mask, x, pad_id)
    return x, attention_mask, x != mask_id


def guided_logits(model, x, positions, prompt, cfg_scale, mask_id,
                  *, kv=(None, None), **options):
    """Return logits (M, V) at positions (B, T) bool or (M,) int64 of x (B, T), with classifier-free guidance.

    The unconditional pass sees the same canvas with the prompt (bool, broadcastable to (B, T)) hidden as well.
    Without guidance (cfg_scale 0) it is left out. kv: a cache for each pass. options: of the model.
    """
    conditional = model(x, positions=positions, kv=kv[0], **options)
    # weights in float16 can overflow, and then a score or a sample would mean nothing
    if not conditional.max().isfinite():
        raise FloatingPointError('the logits are not finite; try --dtype=bfloat16 or --dtype=float32')
    if not cfg_scale:
        return conditional
    # the two passes see different canvases, so they cannot share a cache
    without_prompt = torch.where(prompt, mask_id, x)
    unconditional = model(
        without_prompt, positions=positions, kv=kv[1], **options)
    difference = conditional - unconditional
    return unconditional + (cfg_scale + 1) * difference                             # Sec. 2.4


def uniform(positions, n, generator):
    """Draw uniform noise (M, n) for the True positions of (B, T) bool, row by row. float64 (MPS: float32).

    generator: one torch.Generator, or a list with one for each row. With a list, the noise of a row does not
    depend on its neighbours, so a batch equals its rows sampled one by one.
    """
    counts = positions.sum(1).tolist()
    # a single generator draws for all rows, one after the other
    if not isinstance(generator, list):
        counts = [sum(counts)]
        generator = [generator]
    dtype = torch.float32 if positions.is_mps else torch.float64
    return torch.cat([
        torch.rand(
            m, n, generator=g,
            dtype=dtype, device=positions.device)
        for m, g in zip(counts, generator)])


def gumbel_argmax(logits, temperature, u):
    """Sample from softmax(logits / temperature), (M, V) -> (M,), with uniform noise u (M, V)."""
    # The largest of logits + Gumbel noise is a sample of their softmax. In float64 and with logarithms, because
    # in lower precision the tail of the noise is cut off, which silently lowers the temperature (2409.02908).
    gumbel = -(-u.log()).log()
    # (times the temperature, because a division by a tiny one overflows)
    noisy = logits.to(u.dtype) + temperature * gumbel
    return noisy.argmax(-1)


def forbid(logits, ids):
    """Return logits (M, V) with the tokens `ids` ruled out (-inf)."""
    if not ids:
        return logits
    ids = torch.tensor(ids, device=logits.device)
    return logits.index_fill(-1, ids, -math.inf)


def draw(logits, positions,
         never, temperature=1., generator=None):
    """Draw a token for each True position of (B, T) from logits (M, V), none of them in `never` -> (M,)."""
    logits = forbid(logits, never)
    # without noise the most probable token
    if temperature == 0:
        return logits.argmax(-1)
    u = uniform(positions, logits.shape[1], generator)
    return gumbel_argmax(logits, temperature, u)


def propose(logits, masked, params, never, deferred, generator):
    """Guess a token for each masked position of (B, T) from logits (M, V) -> guess (M,), confidence (M,).

    never: tokens that are not guessed. deferred: tokens that get confidence 0 (low_confidence only).
    """
    guess = draw(logits, masked, never, params.temperature, generator)
    if params.remasking == 'random':
        noise = uniform(masked, 1, generator)
        return guess, noise[:, 0]                                                   # Alg. 4
    # the probability of the guess, without noise or temperature
    probability = forbid(logits, deferred).softmax(-1)
    confidence = probability.gather(-1, guess[:, None])
    return guess, confidence[:, 0]                                                  # Alg. 5


def commit(x, masked, guess, confidence,
           n, threshold=None):
    """Write the most confident of the guesses (M,) into the masked positions of x (B, T) -> x, committed (B, T).

    These are n[b] in row b and, with a threshold, all that reach it. (Alg. 5 as printed keeps the least
    confident ones. The text of the paper and the official code keep the most confident.)
    """
    # over the full length, so that ties break as they do in the official top-k
    everywhere = confidence.new_full(x.shape, -math.inf)
    everywhere = everywhere.masked_scatter(masked, confidence)                      # (B, T)
    threshold = threshold or math.inf
    committed = everywhere >= threshold
    for b, wanted in enumerate(n):
        best = everywhere[b].topk(wanted).indices
        committed[b, best] = True
    # a row may have fewer masks than are wanted
    committed = committed & masked
    filled = x.masked_scatter(masked, guess)
    return torch.where(committed, filled, x), committed


def block_plan(x, mask_id, gen_start, params):
    """Divide the canvas x (B, T) into blocks -> list of (start, end, steps of the block), from left to right.

    Blocks begin at gen_start (default: the first mask). Gaps before gen_start belong to the first block.
    """
    T = x.shape[1]
    # a column counts if any row of the batch has a mask there
    has_mask = (x == mask_id).any(0).tolist()
    if True not in has_mask:
        return []
    first = has_mask.index(True)
    start = first if gen_start is None else gen_start
    length = params.block_length or T - start
    if (T - start) % length:
        raise ValueError(f'block_length must divide the {T - start} tokens to generate, got {length}')
    # steps are divided evenly among the blocks
    borders = list(range(start, T + 1, length))
    borders[0] = min(start, first)
    n_blocks = len(borders) - 1
    steps = params.steps or n_blocks * length
    if steps < n_blocks:
        raise ValueError(f'steps must be at least the number of blocks, {n_blocks}, got {steps}')
    shares = num_transfer_tokens(torch.tensor([steps]), n_blocks)
    steps_of = shares[0].tolist()
    return list(zip(borders, borders[1:], steps_of))


def columns_to_recompute(cache, step, start, end):
    """Return the columns, a slice, that a step of the block (start, end) computes anew."""
    # Attention looks both ways, so every commit changes all keys and values, and a cache is always a little
    # stale. It is renewed when a block begins. After that (Fast-dLLM, arXiv 2505.22618) 'dual' recomputes the
    # block, and 'prefix' also what follows it.
    if cache is None or step == 0:
        return slice(None)
    return slice(start, end if cache == 'dual' else None)


@torch.no_grad()
def generate(model, x, mask_id, params,
             *, gen_start=None, attention_mask=None, prompt=None,
             eos_id=None, eot_id=None, suppress=(), until_end=False,
             generator=None, adjust=None, on_step=None):
    """Fill every [MASK] of the canvas x (B, T) int64, wherever it stands -> Generated(x, n_forward).

    gen_start: the column where blocks begin (default: the first mask).
    attention_mask (B, T) bool: False on padding. prompt (B, T) bool: what guidance hides (default: what is given).
    suppress: ids that are never written. generator: see `uniform`. eos_id, eot_id: what ends an answer; until_end:
    stop once the finished blocks of every row hold one of them, and fill the rest with EOS.
    adjust(logits (M, V), x, masked) -> logits: a hook for other rules. on_step(x, committed): a hook to watch.
    """
    ends = [i for i in (eos_id, eot_id) if i is not None]
    deferred = ends if params.confidence_eos_eot_inf else []
    given = x != mask_id if prompt is None else prompt
    if attention_mask is not None and attention_mask.all():
        attention_mask = None                               # nothing is padded
    # guidance takes two forward passes, each with its own cache
    kv = [None] * (2 if params.cfg_scale else 1)
    if params.cache:
        kv = [model.new_kv(*x.shape) for _ in kv]
    blocks = block_plan(x, mask_id, gen_start, params)
    every_column = torch.arange(x.shape[1], device=x.device)
    n_steps = 0
    # blocks from left to right, and in each block step by step
    for start, end, steps in blocks:
        written = x[:, blocks[0][0]:start]
        ended = torch.isin(written, x.new_tensor(ends)).any(1)                      # (B,)
        if until_end and ended.all():
            x = x.masked_fill(x == mask_id, eos_id)
            break

        # left of the block nothing is masked any more, and right of it nothing may be written yet
        masked = x == mask_id                                                       # (B, T)
        masked[:, end:] = False
        n_masked = masked.sum(1)
        if params.steps is None or params.threshold:
            steps = int(n_masked.max()) or 1                # at least one token per step
        schedule = num_transfer_tokens(n_masked, steps).T.tolist()
        for step, n in enumerate(schedule):
            if not masked.any():
                break
            columns = columns_to_recompute(params.cache, step, start, end)
            logits = guided_logits(
                model, x[:, columns], masked[:, columns], given[:, columns],
                params.cfg_scale, mask_id,
                kv=kv, kv_positions=every_column[columns], attention_mask=attention_mask)   # (M, V)
            if adjust is not None:
                logits = adjust(logits, x, masked)
            if params.logits_eos_inf:
                logits = forbid(logits, [eos_id])
            # guess everywhere, keep some of it, and look again
            guess, confidence = propose(
                logits, masked, params, [mask_id, *suppress], deferred, generator)  # (M,), (M,)
            x, committed = commit(x, masked, guess, confidence, n, params.threshold)
            n_steps += 1
            if on_step is not None:
                on_step(x, committed)
            masked = masked & (x == mask_id)
    return Generated(x, n_steps * len(kv))


# ----------------------------------------------------------------------------------------------------------
# 6. Variable length (iLLaDA; App. B.4): blocks are appended until the end is written


def generate_variable_length(model, prompts, mask_id, eos_id, params,
                             *, max_length, stop=None, **options):
    """Continue prompts (lists of ids) block by block -> (lists of ids, prompt included), n_forward.

    Each block has params.block_length masks and gets params.steps steps. Nothing exists yet behind the block.
    A row ends with the block in which EOS appears or after which stop(generated ids) is True. At most
    max_length tokens are written, in whole blocks. block_length=1 is autoregressive sampling (Table 7).
    options: of generate.
    """
    block_length = params.block_length
    if not block_length or block_length > max_length:
        raise ValueError(f'block_length must lie in 1..{max_length} (max_length), got {block_length}')
    # padding is never attended to, so any id but mask_id will do
    pad_id = int(mask_id == 0)
    device = device_of(model)
    x, attention_mask, prompt = canvas(prompts, 0, mask_id, pad_id, device)
    # a row is what is known of a text so far, without padding
    rows = list(prompts)
    running = set(range(len(rows)))
    n_forward = 0

    # append a block of masks, and fill it in
    for _ in range(max_length // block_length):
        start = x.shape[1]
        x = F.pad(x, (0, block_length), value=mask_id)
        attention_mask = F.pad(attention_mask, (0, block_length), value=True)
        prompt = F.pad(prompt, (0, block_length))           # finished blocks are none
        x, n = generate(
            model, x, mask_id, params, gen_start=start, eos_id=eos_id,
            attention_mask=attention_mask, prompt=prompt, **options)
        n_forward += n

        # rows that have ended stay in the batch, but what is written there is not kept
        for b in sorted(running):
            is_text = attention_mask[b]
            rows[b] = x[b][is_text].tolist()
            new = rows[b][len(prompts[b]):]
            stopped = stop is not None and stop(new)
            if stopped or eos_id in new:
                running.remove(b)
        if not running:
            break
    return rows, n_forward


def device_of(model):
    """Return the device of a model's parameters, the CPU for a table of the tests."""
    if not hasattr(model, 'parameters'):
        return 'cpu'
    return next(model.parameters()).device


# ----------------------------------------------------------------------------------------------------------
# 7. The autoregressive twin. The network has a causal mask (causal=True); here: shift by one, no noise, no 1/t


def ar_batch(x0, maskable,
             *, bos_id=None, normalize='token', normalizer=None):
    """Ask for the next token everywhere: x0 (B, T) int64, maskable (B, T) bool -> MaskedBatch for diffusion_loss.

    With bos_id in front every token is predicted, else all but the first. The rest: see loss_weights.
    """
    # the input is the row itself, one position late
    before = x0[:, :-1]
    if bos_id is None:
        x0 = x0[:, 1:]
        maskable = maskable[:, 1:]
    else:
        before = F.pad(before, (1, 0), value=bos_id)
    # all tokens are asked for, so there is no t, and L / l is 1
    weights = loss_weights(
        maskable, maskable, None, fixed_count=True, normalize=normalize, normalizer=normalizer)
    return masked_batch(x0, before, maskable, weights)


def ar_loss(model, x0, maskable, **options):
    """Return the mean cross-entropy of the next token: x0 (B, T), maskable (B, T) -> (). options: of ar_batch."""
    return diffusion_loss(model, ar_batch(x0, maskable, **options))


@torch.no_grad()
def ar_log_likelihood(model, x0, maskable, *, bos_id=None):
    """Return the exact log p(maskable | all before): x0, maskable (T,) -> float; of x0[0] only with bos_id."""
    batch = ar_batch(x0[None], maskable[None], bos_id=bos_id)
    logits = guided_logits(
        model, batch.xt, batch.positions, None, 0., None)                           # (M, V)
    logp = log_prob(logits, batch.targets)
    total = logp.cpu().double().sum()
    return total.item()


def score_row(model, x0, maskable, mask_id, eos_id,
              *, key, **options):
    """Return log p(maskable | the rest) of a row: exact if the model is causal, else the bound of Eq. 6.

    x0 (T,) int64, maskable (T,) bool. key: integers that decide on the masks. options: of log_likelihood.
    """
    device = device_of(model)
    x0 = x0.to(device)
    maskable = maskable.to(device)
    if model.config.causal:
        # EOS in front, as in training, so that the first token has something before it
        return ar_log_likelihood(model, x0, maskable, bos_id=eos_id)
    generator = keyed_generator(*key)
    return log_likelihood(
        model, x0, maskable, mask_id, generator=generator, **options)


@torch.no_grad()
def ar_generate(model, prompt, n_new,
                *, attention_mask=None, suppress=(), **sampling):
    """Continue prompt (B, P) int64 by n_new tokens -> Generated(x (B, P + n_new), n_forward).

    Keys and values are cached, so a token costs one position. attention_mask (B, P) bool: False on padding.
    suppress: ids that are never written. sampling: temperature and generator, of `draw`.
    """
    x = prompt
    kv = None
    # what stands before a token never changes here, so a cache is exact
    if hasattr(model, 'new_kv'):
        kv = model.new_kv(len(x), x.shape[1] + n_new)
    if attention_mask is not None:
        attention_mask = F.pad(attention_mask, (0, n_new), value=True)
    # one token at a time, each behind the last
    start = 0
    for _ in range(n_new):
        newest = torch.zeros_like(x[:, start:], dtype=torch.bool)
        newest[:, -1] = True
        kv_positions = torch.arange(start, x.shape[1], device=x.device)
        logits = guided_logits(
            model, x[:, start:], newest, None, 0., None, attention_mask=attention_mask,
            kv=[kv], kv_positions=kv_positions)                                     # (B, V)
        token = draw(logits, newest, suppress, **sampling)
        if kv is not None:
            start = x.shape[1]                              # the cache holds everything before the new token
        x = torch.cat((x, token[:, None]), dim=1)
    return Generated(x, n_new)
