"""Masked diffusion on tokens, in the order of the paper (LLaDA, arXiv 2502.09992v3; iLLaDA, arXiv 2606.25331).

    forward process, Eq. 7-8     training loss, Eq. 3 and Eq. 5     likelihood, Eq. 6     reverse process: the samplers
and last the autoregressive baseline, same arguments in the same order.

Nothing here imports the network. A mask predictor is any callable `model(ids) -> logits (B, T, V)`: a lookup table
will do, which is how tests/ checks every formula to machine precision. A model whose forward has an argument
`rows`, `visible`, `cu_seqlens`, or `targets` and `weights` (model.Transformer has all) is given them where they matter.

    loss = diffusion_loss(model, x0, maskable, mask_id)
    logp = log_likelihood(model, x0[0], maskable[0], mask_id)
    out = generate(model, canvas([prompt], 64, mask_id, pad_id)[0], mask_id, steps=64)

Letters: B batch, T canvas length, V vocabulary, M rows read out, L number of maskable tokens of a row.

At 700 lines longer than other files, because a formula and the sampler that relies on it belong on one desk.
"""

import inspect
import math
import zlib
from collections import namedtuple

import numpy as np
import torch
import torch.nn.functional as F

Generated = namedtuple('Generated', 'x n_forward')      # x (B, T) int64, n_forward: evaluations of the network
GOLDEN = (5 ** 0.5 - 1) / 2                             # multiples of it, modulo 1, spread evenly over [0, 1)


def takes(model, name):
    """Whether a mask predictor has an argument of this name (DDP hides the signature of what it wraps)."""
    call = getattr(getattr(model, 'module', model), 'forward', model)
    try:
        return name in inspect.signature(call).parameters
    except (TypeError, ValueError):
        return False


def widest(device):
    """float64, or float32 on MPS, which has nothing wider."""
    return torch.float32 if torch.device(device).type == 'mps' else torch.float64


def log_prob(logits, targets):
    """log softmax(logits)[targets], computed in float32 or wider: (M, V), (M,) -> (M,) in the widest dtype."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return -F.cross_entropy(logits, targets, reduction='none').to(widest(logits.device))


def logits_of(model, ids, rows, **options):
    """The logits (M, V) of the True positions of `rows` (B, T), whether or not the model can skip the others."""
    options = {k: v for k, v in options.items() if v is not None}
    if takes(model, 'rows'):
        options['rows'] = rows
    logits = model(ids, **options)
    return logits[rows] if logits.dim() == 3 else logits


# ---------------------------------------------------------------------------------------------------------------------
# Forward process (Sec. 2.1): a mask ratio t per sequence, every token hidden independently with probability t


def sample_t(batch_size, eps=1e-3, stratified=True, generator=None, device=None):
    """Mask ratios t (B,) float32, each uniform on (eps, 1] (the guideline's p_mask = (1 - eps) t + eps).

    stratified: one t in each of B equal slices, so the loss of a batch is less noisy and every part of the batch,
    hence every micro-batch and every rank, gets an even mixture of easy and hard rows. False: i.i.d., as in LLaDA.
    """
    u = torch.rand(batch_size, generator=generator, device=device)
    if stratified:
        spread = np.argsort(np.argsort(np.arange(batch_size) * GOLDEN % 1))     # slices in an order even in any window
        turn = torch.randint(batch_size, (1,), generator=generator, device=device)
        u = ((torch.from_numpy(spread).to(u.device) + turn) % batch_size + u) / batch_size
    return 1 - (1 - eps) * u


def keyed_generator(*key, device='cpu'):
    """A torch.Generator for a key of whole numbers. Hashed, for the CPU generator looks at 32 bits of its seed only."""
    return torch.Generator(device).manual_seed(zlib.crc32(repr(key).encode()))


def row_noise(seed, iteration, rows, T):
    """Uniform noise (len(rows), T) float32 for global rows of an iteration: a function of (seed, iteration, row) alone.

    A counter-based generator makes the masks of a training row the same for any batch split and any number of ranks.
    """
    draw = [np.random.Generator(np.random.Philox(key=[seed, iteration], counter=[0, 0, 0, row])).random(T, np.float32)
            for row in rows]
    return torch.from_numpy(np.stack(draw))


def forward_process(x0, t, mask_id, maskable=None, generator=None, *, exact=False, u=None):
    """Hides tokens: x0 (B, T) int64, t (B,) -> xt (B, T) int64, masked (B, T) bool.                         Eq. 7-8

    Only maskable (B, T) bool positions are hidden (default: all). `masked` is what was drawn: a token of the data that
    happens to be mask_id is not in it. exact: hide exactly ceil(t L) of the L maskable tokens: l is then uniform on
    1..L, the count form of the same objective (Eq. 6, Eq. 14). u (B, T): use this uniform noise.
    """
    if maskable is None:
        maskable = torch.ones_like(x0, dtype=torch.bool)
    if u is None:
        u = torch.rand(x0.shape, generator=generator, device=x0.device)
    if exact:
        n = maskable.sum(1)
        count = torch.minimum((t.to(widest(t.device)) * n).ceil().long().clamp(min=1), n)  # (B,)
        rank = u.masked_fill(~maskable, 2.0).argsort(1).argsort(1)                      # a random order of the maskable
        masked = rank < count[:, None]
    else:
        masked = maskable & (u < t[:, None])
    return torch.where(masked, mask_id, x0), masked


# ---------------------------------------------------------------------------------------------------------------------
# Training losses


def weighted_loss(model, ids, rows, targets, weights, **options):
    """Sum of weights * cross-entropy of targets at `rows`, flat indices into ids (B, T); all three (M,) -> ()."""
    if takes(model, 'targets'):                                             # head and loss fused: M x V need not exist
        return model(ids, rows=rows, targets=targets, weights=weights, **options)
    read = torch.zeros(ids.numel(), dtype=torch.bool, device=ids.device).index_fill_(0, rows, True).view(ids.shape)
    logits = logits_of(model, ids, read, **options)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))    # a weight of 1/t magnifies rounding
    return (F.cross_entropy(logits, targets, reduction='none') * weights).sum()


def loss_terms(x0, maskable, mask_id, t, masked, *, per='token', exact=False, total=None):
    """What diffusion_loss sums, as tensors: xt (B, T), and (M,) each: rows (flat indices), targets, weights.

    Made on the host by the training loop: choosing rows by a mask on the GPU would make the host wait for it.
    """
    if per not in ('token', 'sequence'):
        raise ValueError(f"per must be 'token' or 'sequence', got {per!r}")
    n = maskable.sum(1)                                                                 # (B,)
    weight = n / masked.sum(1).clamp(min=1) if exact else 1 / t                         # Eq. 14: L/l;  Eq. 3: 1/t
    if per == 'token':
        weight = weight / (total or n.sum())                                            # Eq. 3
    else:
        weight = weight / n.clamp(min=1) / (total or x0.shape[0])                       # Eq. 5
    rows = masked.flatten().nonzero()[:, 0]
    return torch.where(masked, mask_id, x0), rows, x0.flatten()[rows], weight[rows // x0.shape[1]]


def diffusion_loss(model, x0, maskable, mask_id, *, t=None, masked=None, per='token', cu_seqlens=None, generator=None,
                   exact=False, total=None):
    """The training loss, a scalar, from x0 (B, T) int64 and maskable (B, T) bool.

    per='token' (Eq. 3, Alg. 1): cross-entropy of the masked tokens over t, summed, divided by the number of maskable
    tokens of the batch: all b*L of them in pre-training, never only the masked ones (that would not be a bound).
    per='sequence' (Eq. 5, SFT): each row is divided by its own number of maskable tokens, then rows are averaged.
    t (B,) and masked (B, T): use this noise; else it is drawn. exact: the count form, weight L/l instead of 1/t.
    total: divide by this instead (tokens or rows of the global batch when this is one micro-batch of it).
    """
    if t is None and masked is not None and not exact:
        raise ValueError('masked needs the t that it was drawn with, or exact=True')
    if t is None and masked is None:
        t = sample_t(x0.shape[0], eps=0 if exact else 1e-3, generator=generator, device=x0.device)
    if masked is None:
        _, masked = forward_process(x0, t, mask_id, maskable, generator, exact=exact)
    terms = loss_terms(x0, maskable, mask_id, t, masked, per=per, exact=exact, total=total)     # Eq. 3, Eq. 5
    return weighted_loss(model, *terms, cu_seqlens=cu_seqlens)


# ---------------------------------------------------------------------------------------------------------------------
# Likelihood (Sec. 2.4): log p(x0) is at least the value of Eq. 6


def masked_log_prob(model, x0, masked, mask_id, prompt=None, cfg_scale=0.0, **options):
    """Sum of log p(x0_i | xt) over the masked i of each row: x0 (B, T), masked (B, T) -> (B,)."""
    xt = torch.where(masked, mask_id, x0)
    logits = guided_logits(model, xt, prompt, cfg_scale, mask_id, rows=masked, **options)
    logp = log_prob(logits, x0[masked])                                                 # (M,)
    return logp.new_zeros(x0.shape[0]).index_add_(0, masked.nonzero()[:, 0], logp)


def eq6_terms(model, x0, maskable, mask_id, u, noise, **options):
    """One draw of Eq. 6 per row, a lower bound on log p in expectation: -> (B,) float64.

    u (B,) uniform on [0, 1) decides l = ceil((1 - u) L), exactly uniform on 1..L, and noise (B, T) which l tokens.
    """
    _, masked = forward_process(x0, 1 - u, mask_id, maskable, exact=True, u=noise)
    scale = maskable.sum(1) / masked.sum(1)                                             # L / l
    return scale * masked_log_prob(model, x0, masked, mask_id, **options)               # Eq. 6


@torch.no_grad()
def bound_per_row(model, x0, maskable, mask_id, *, draws=16, batch_size=32, seed=0, first=0):
    """Eq. 6 for many rows: x0 (N, T), maskable (N, T) -> lower bounds on log p, (N,) float64, each a mean of `draws`.

    The noise is fixed by the seed, and stratified over the draws of a row and over the rows: two checkpoints are
    compared on the same masks. first: number of the first row, when the rows are a part of a longer list.
    """
    N, T = x0.shape
    index = torch.arange(first * draws, (first + N) * draws)
    u = (index % draws + (index // draws + 0.5) * GOLDEN % 1) / draws           # stratum of the draw, spread by the row
    out = torch.zeros(N, dtype=torch.float64)
    for i in range(0, N * draws, batch_size):
        part = index[i:i + batch_size]
        row = part // draws - first
        noise = row_noise(seed, 2 ** 63, part.tolist(), T).to(x0.device)        # a key that no iteration has
        terms = eq6_terms(model, x0[row], maskable[row], mask_id, u[i:i + batch_size].to(x0.device), noise)
        out.index_add_(0, row, terms.cpu().double())
    return out / draws


def eq6_masks(maskable, mc_num, generator=None):
    """Masks (n, T) and weights (n,): the weighted sum of log p(masked | rest) over them is Eq. 6 for one sequence.

    Where all 2^L - 1 masks of the L maskable tokens are no more than mc_num, they are all taken and the sum is exact;
    else mc_num draws of l, stratified and exactly uniform on 1..L (the official rounding is not), each with l tokens
    drawn without replacement.
    """
    L, T, device = int(maskable.sum()), len(maskable), maskable.device
    if L == 0:
        raise ValueError('log_likelihood: no position is maskable')
    if L < 31 and 2 ** L - 1 <= mc_num:
        masks = torch.zeros(2 ** L - 1, T, dtype=torch.bool, device=device)
        subset = torch.arange(1, 2 ** L, device=device)[:, None] >> torch.arange(L, device=device) & 1
        masks[:, maskable] = subset.bool()
        share = [1 / (n * math.comb(L, n)) for n in masks.sum(1).tolist()]              # Eq. 6: (1/L) (L/l) / C(L, l)
        return masks, torch.tensor(share, dtype=torch.float64)
    u = (torch.arange(mc_num, device=device) + torch.rand(mc_num, generator=generator, device=device)) / mc_num
    noise = torch.rand(mc_num, T, generator=generator, device=device)
    rows = maskable.expand(mc_num, -1)
    _, masks = forward_process(rows.long(), 1 - u, -1, rows, exact=True, u=noise)
    return masks, L / masks.sum(1).cpu().double() / mc_num                                      # Eq. 6: L/l


def score_rows(model, entries, mask_id, batch_size, cfg_scale=0.):
    """Runs many short questions in full batches. entries: (tag, x0 (T,), masked (T,), prompt (T,)), of any lengths.

    Yields (tag, log p of the masked tokens given the rest (n,)). Shorter rows are padded on the left, out of sight; a
    model that cannot hide padding gets rows of one length at a time.
    """
    pads, waiting = takes(model, 'visible'), []

    def ask(rows):
        longest = max(len(x0) for _, x0, _, _ in rows)
        x0, masked, prompt, visible = (
            torch.stack([F.pad(z, (longest - len(z), 0)) for z in column])
            for column in zip(*((x0, m, p, torch.ones_like(m)) for _, x0, m, p in rows)))
        logits = guided_logits(model, torch.where(masked, mask_id, x0), prompt, cfg_scale, mask_id, rows=masked,
                               visible=None if visible.all() else visible)
        yield from zip((row[0] for row in rows), log_prob(logits, x0[masked]).split(masked.sum(1).tolist()))

    for entry in entries:
        if len(waiting) == batch_size or waiting and not pads and len(entry[1]) != len(waiting[0][1]):
            yield from ask(waiting)
            waiting = []
        waiting.append(entry)
    if waiting:
        yield from ask(waiting)


@torch.no_grad()
def log_likelihoods(model, x0s, maskables, mask_id, *, mc_num=128, batch_size=16, cfg_scale=0., generator=None):
    """Eq. 6 for many sequences, batched over sequences and draws: lists of (T,) tensors -> list of float."""
    out = [0.0] * len(x0s)
    shortest_first = sorted(range(len(x0s)), key=lambda i: len(x0s[i]))                 # little padding in a batch

    def entries():
        for i in shortest_first:
            for masked, weight in zip(*eq6_masks(maskables[i], mc_num, generator)):
                yield (i, float(weight)), x0s[i], masked, ~maskables[i]

    for (i, weight), logp in score_rows(model, entries(), mask_id, batch_size, cfg_scale):
        out[i] += weight * float(logp.sum())                                            # Eq. 6
    return out


def log_likelihood(model, x0, maskable, mask_id, *, mc_num=128, batch_size=16, cfg_scale=0., generator=None):
    """Eq. 6 for one sequence: x0 (T,) int64, maskable (T,) bool -> float, a lower bound on log p(maskable | rest).

    mc_num evaluations, or fewer and then exact: see eq6_masks; a single token costs one. cfg_scale: see guided_logits.
    """
    return log_likelihoods(model, [x0], [maskable], mask_id, mc_num=mc_num, batch_size=batch_size,
                           cfg_scale=cfg_scale, generator=generator)[0]


@torch.no_grad()
def log_likelihood_eq5(model, x0, maskable, mask_id, *, mc_num=128, batch_size=16, cfg_scale=0., generator=None):
    """The same bound by the form of Eq. 5 (t uniform, Bernoulli masks, weight 1/t): same mean, far larger variance."""
    total, options = 0.0, dict(prompt=(~maskable)[None], cfg_scale=cfg_scale)
    for i in range(0, mc_num, batch_size):
        n = min(batch_size, mc_num - i)
        rows = x0.expand(n, -1)
        t = sample_t(n, eps=0, stratified=False, generator=generator, device=x0.device)
        _, masked = forward_process(rows, t, mask_id, maskable.expand_as(rows), generator)
        total += float((masked_log_prob(model, rows, masked, mask_id, **options) / t).sum())    # Eq. 5
    return total / mc_num


@torch.no_grad()
def log_likelihood_ordered(model, x0, maskable, mask_id, order=None, *, batch_size=16, cfg_scale=0.):
    """Chain rule along one order (Eq. 15 is its mean over all orders): exact for a model whose orders agree.

    order: the maskable positions (indices into x0) in the order in which they are revealed; default left to right.
    """
    positions = maskable.nonzero()[:, 0].tolist()
    order = positions if order is None else [int(i) for i in order]
    if sorted(order) != positions:
        raise ValueError(f'order must hold the maskable positions {positions}, each once, got {order}')
    masked = maskable.repeat(len(order), 1)
    for k, position in enumerate(order):
        masked[k + 1:, position] = False                            # evaluation k still sees order[k:] hidden
    rows, prompt, total = x0.expand(len(order), -1), (~maskable)[None], 0.0
    for i in range(0, len(order), batch_size):
        part, now = masked[i:i + batch_size], order[i:i + batch_size]
        xt = torch.where(part, mask_id, rows[:len(part)])
        read = torch.zeros_like(part)
        read[torch.arange(len(part)), now] = True
        logits = guided_logits(model, xt, prompt, cfg_scale, mask_id, rows=read)
        total += float(log_prob(logits, x0[now]).sum())
    return total


@torch.no_grad()
def confidence_scores(model, x0s, maskables, mask_id, *, eos_id=None, cfg_scale=0., batch_size=16):
    """confidence_score of many candidates, batched: lists of (T,) tensors -> list of float."""
    if eos_id is not None:
        x0s = [F.pad(x0, (0, 1), value=eos_id) for x0 in x0s]
        maskables = [F.pad(maskable, (0, 1)) for maskable in maskables]
    hidden, out = [maskable.clone() for maskable in maskables], [0.0] * len(x0s)
    alive = sorted((i for i in range(len(x0s)) if hidden[i].any()), key=lambda i: len(x0s[i]))
    while alive:
        entries = [(i, x0s[i], hidden[i], ~maskables[i]) for i in alive]
        for i, own in list(score_rows(model, entries, mask_id, batch_size, cfg_scale)):
            best = own.argmax()
            out[i] += float(own[best])
            hidden[i][hidden[i].nonzero()[best]] = False
        alive = [i for i in alive if hidden[i].any()]
    return out


def confidence_score(model, x0, maskable, mask_id, *, eos_id=None, cfg_scale=0.):
    """iLLaDA's multiple-choice score of a candidate: x0 (T,), maskable (T,) -> float.

    Each step adds the log-probability of the candidate's own most probable hidden token and reveals it. A chain rule
    along an order that the candidate chooses for itself, hence neither a bound nor normalised over candidates.
    eos_id: a visible, unscored EOS stands after the sequence.
    """
    return confidence_scores(model, [x0], [maskable], mask_id, eos_id=eos_id, cfg_scale=cfg_scale)[0]


# ---------------------------------------------------------------------------------------------------------------------
# Reverse process (Sec. 2.4, App. A.3, B.4): propose a token everywhere, write down those that are trusted, repeat


def num_transfer_tokens(n_masked, steps):
    """How many tokens each step commits: n_masked (B,) int64 -> (B, steps); the remainder goes to the first steps."""
    base, rest = n_masked // steps, n_masked % steps
    return base[:, None] + (torch.arange(steps, device=n_masked.device) < rest[:, None])


def canvas(prompts, gen_length, mask_id, pad_id):
    """A batch of prompts, padded on the left so that what is generated lines up.

    prompts: lists of ids -> x (B, T) int64 ending in gen_length masks; visible (B, T) bool, False on padding;
    prompt (B, T) bool, the given tokens (a mask inside a prompt is a gap to fill, not a given token).
    """
    if pad_id == mask_id:
        raise ValueError(f'padding must not look like a mask: pad_id and mask_id are both {mask_id}')
    longest = max(len(p) for p in prompts)
    x = torch.full((len(prompts), longest + gen_length), mask_id, dtype=torch.long)
    visible = torch.ones_like(x, dtype=torch.bool)
    for i, p in enumerate(prompts):
        pad = longest - len(p)
        x[i, :pad], visible[i, :pad] = pad_id, False
        x[i, pad:longest] = torch.as_tensor(p, dtype=torch.long)
    return x, visible, x != mask_id


def guided_logits(model, x, prompt, cfg_scale, mask_id, *, rows=None, **options):
    """Logits (M, V) of `rows` (default: the masks of x) with unsupervised classifier-free guidance (Sec. 2.4).

    The second opinion sees the same canvas with the prompt (B or 1, T, bool) hidden as well; scale 0 does not ask it.
    """
    rows = x == mask_id if rows is None else rows
    kv, other_kv = options.pop('kv', None) or (None, None)          # a cache for each of the two
    conditional = logits_of(model, x, rows, kv=kv, **options)
    if not cfg_scale:
        return conditional
    unconditional = logits_of(model, torch.where(prompt, mask_id, x), rows, kv=other_kv, **options)
    return unconditional + (cfg_scale + 1) * (conditional - unconditional)


def uniform(rows, columns, generator):
    """Uniform float64 noise for the True positions of rows (B, T): (M, columns), row by row.

    generator: one torch.Generator, or a list with one for each row of the batch, so that what a row draws does not
    depend on its neighbours: a batch then equals its rows sampled one by one.
    """
    options = {'dtype': widest(rows.device), 'device': rows.device}
    if not isinstance(generator, (list, tuple)):
        return torch.rand(int(rows.sum()), columns, generator=generator, **options)
    return torch.cat([torch.rand(n, columns, generator=g, **options) for n, g in zip(rows.sum(1).tolist(), generator)])


def gumbel_argmax(logits, temperature, generator=None, *, u=None):
    """A sample of softmax(logits / temperature) by the Gumbel-max trick: (..., V) -> (...) int64; 0 takes the argmax.

    In float64 and in the log domain: in lower precision the tail of the noise is cut and the temperature silently
    falls (arXiv 2409.02908).
    """
    if temperature == 0:
        return logits.argmax(-1)
    if u is None:
        u = torch.rand(logits.shape, dtype=widest(logits.device), device=logits.device, generator=generator)
    return (logits.to(u.dtype) / temperature).sub_(u.log().neg_().log_()).argmax(-1)


def confidence(logits, x0_hat, remasking, *, u=None, generator=None):
    """How much each proposal is trusted: logits (M, V), x0_hat (M,) -> (M,).

    'low_confidence': the probability of the proposal, without noise or temperature, in the dtype of the logits, as the
    official sampler has it. 'random': a uniform number.
    """
    if remasking == 'low_confidence':
        return logits.softmax(-1).gather(-1, x0_hat[:, None])[:, 0]
    if remasking == 'random':
        return torch.rand(x0_hat.shape, generator=generator, device=logits.device) if u is None else u
    raise ValueError(f"remasking must be 'low_confidence' or 'random', got {remasking!r}")


def select(confidence, masked, n, threshold=None):
    """Which proposals to write down: confidence (B, T), masked (B, T) candidates, n (list of B) -> committed (B, T).

    The n[b] most confident candidates of row b; with a threshold all candidates at or above it, and always the best.
    """
    confidence = torch.where(masked, confidence, -math.inf)       # full length, so that ties break as in one long top-k
    committed = torch.zeros_like(masked) if threshold is None else masked & (confidence >= threshold)
    left = masked.sum(1).tolist()
    for b, n_b in enumerate(n):
        n_b = min(n_b if threshold is None else 1, left[b])
        committed[b, confidence[b].topk(n_b).indices] = True
    return committed


def propose(logits, rows, mask_id, *, temperature, remasking, eos_id, eot_id, logits_eos_inf, confidence_eos_eot_inf,
            generator, suppress=()):
    """Proposals and their confidence, (M,) each, for the True positions of rows (B, T) from their logits (M, V).

    [MASK] is never proposed, nor is an id in `suppress`. logits_eos_inf: neither is EOS. confidence_eos_eot_inf: EOS
    and EoT have confidence 0: they are written last, at every temperature (App. B.4); random remasking asks for none.
    """
    if logits_eos_inf:
        logits = logits.index_fill(-1, torch.tensor([eos_id], device=logits.device), -math.inf)
    allowed = logits.index_fill(-1, torch.tensor([mask_id, *suppress], device=logits.device), -math.inf)
    u = uniform(rows, logits.shape[-1], generator) if temperature > 0 else None
    x0_hat = gumbel_argmax(allowed, temperature, u=u)
    if confidence_eos_eot_inf:
        ends = torch.tensor([i for i in (eos_id, eot_id) if i is not None], device=logits.device)
        logits = logits.index_fill(-1, ends, -math.inf)
    u = uniform(rows, 1, generator)[:, 0] if remasking == 'random' else None
    return x0_hat, confidence(logits, x0_hat, remasking, u=u)


def block_plan(x, mask_id, gen_start, block_length, steps):
    """Blocks of the canvas, left to right, as (start, end, steps): gaps in the prompt first, then the blocks proper."""
    T = x.shape[1]
    columns = (x == mask_id).any(0).nonzero()[:, 0].tolist()
    if not columns:
        return []
    start = columns[0] if gen_start is None else gen_start
    block_length = T - start if block_length is None else block_length
    if block_length < 1 or (T - start) % block_length:
        raise ValueError(f'block_length must divide the {T - start} positions to generate, got {block_length}')
    n = (T - start) // block_length
    if steps < max(n, 1):
        raise ValueError(f'steps must be at least the number of blocks, {n}, got {steps}')
    share = num_transfer_tokens(torch.tensor([steps]), n)[0].tolist() if n else []
    blocks = [(start + i * block_length, start + (i + 1) * block_length, share[i]) for i in range(n)]
    if columns[0] < start:                                        # gaps in the prompt: a block with a budget of its own
        blocks.insert(0, (0, start, max(share, default=steps)))
    return blocks


def cached_rows(cache, T, start, end, step, turn):
    """The rows of the canvas that a step recomputes, sorted host integers; None is all of them, exactly.

    Attention looks both ways, so every commit changes every row: any cache is an approximation. 'prefix' recomputes
    from the block to the end and 'dual' the block alone, both with a full pass when a block begins (Fast-dLLM, arXiv
    2505.22618); 'roll' makes one full pass, then the block and as many of the other rows, in turn.
    """
    if cache is None or (turn if cache == 'roll' else step) == 0:
        return None
    if cache == 'roll':
        n = end - start
        return sorted({*range(start, end), *((turn * n + i) % T for i in range(n))})
    return list(range(start, T if cache == 'prefix' else end))


def check_sampler(steps, temperature, cfg_scale, remasking, eos_id=None, logits_eos_inf=False,
                  confidence_eos_eot_inf=False, cache=None, threshold=None):
    """The settings that two samplers share, refused in one sentence before the first forward pass."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f'steps must be a whole number above 0, got {steps!r}')
    for name, value in (('temperature', temperature), ('cfg_scale', cfg_scale)):
        if not 0 <= value < math.inf:
            raise ValueError(f'{name} must be 0 or more, got {value}')
    for name, value, allowed in (('remasking', remasking, ('low_confidence', 'random')),
                                 ('cache', cache, (None, 'prefix', 'dual', 'roll'))):
        if value not in allowed:
            raise ValueError(f'{name} must be one of {allowed}, got {value!r}')
    if threshold is not None and not (0 < threshold <= 1 and remasking == 'low_confidence'):
        raise ValueError(f'threshold lies in (0, 1] and needs low_confidence remasking, got {threshold}, {remasking}')
    if (logits_eos_inf or confidence_eos_eot_inf) and eos_id is None:
        raise ValueError('logits_eos_inf and confidence_eos_eot_inf need eos_id')


@torch.no_grad()
def generate(model, x, mask_id, *, steps, block_length=None, temperature=0., cfg_scale=0., remasking='low_confidence',
             prompt=None, visible=None, gen_start=None, eos_id=None, eot_id=None, logits_eos_inf=False,
             confidence_eos_eot_inf=False, threshold=None, cache=None, on_step=None, generator=None, suppress=(),
             adjust=None):
    """Fills every [MASK] of the canvas x (B, T) int64, wherever it stands -> Generated(x, n_forward).

    steps: denoising steps for the whole canvas, shared out over its blocks; a step commits an equal part of a block.
    block_length: None is pure diffusion; less is LLaDA's semi-autoregressive remasking: blocks are finished from left
        to right, later blocks stay in view as masks. They begin at gen_start (default: the first mask); gaps before
        it are filled first.
    temperature: of the proposals; 0 takes the most probable token. remasking: which proposals survive a step:
        'low_confidence' the most probable ones (Alg. 5: it seeks modes), 'random' any (Alg. 4 with a fixed count).
    cfg_scale, prompt (B, T) bool: guidance away from the canvas without its prompt (default: all that is given).
    visible (B, T) bool: False on left padding. eos_id, eot_id and the two flags: see propose.
    threshold: approximate parallel decoding: commit every proposal this probable, as many steps as that takes.
    cache: None is exact; 'prefix', 'dual', 'roll' are approximate, see cached_rows; the model needs new_kv, pos and kv.
    on_step(x, committed): called after every step. generator: a torch.Generator, or a list of one for each row.
    suppress: ids never written, such as vocabulary rows that stand for no token. adjust(logits (M, V), x, masked,
        begin) -> logits: a hook before the end rules; begin is the first generated column. See end_think.
    """
    check_sampler(steps, temperature, cfg_scale, remasking, eos_id, logits_eos_inf, confidence_eos_eot_inf, cache,
                  threshold)
    x = x.clone()
    prompt = x != mask_id if prompt is None else prompt
    kv = None if cache is None else [model.new_kv(*x.shape) for _ in range(2 if cfg_scale else 1)]
    n_forward = turn = 0
    plan = block_plan(x, mask_id, gen_start, block_length, steps)
    for start, end, block_steps in plan:
        masked = x == mask_id
        masked[:, :start], masked[:, end:] = False, False
        schedule = num_transfer_tokens(masked.sum(1), block_steps).T.tolist()           # steps x B
        for step, n in enumerate(schedule if threshold is None else [[1] * len(x)] * (end - start)):
            if not masked.any():                                                        # nothing left to ask
                break
            pos = cached_rows(cache, x.shape[1], start, end, step, turn)
            pos = slice(None) if pos is None else torch.tensor(pos, device=x.device)
            where = {} if kv is None else {'kv': (*kv, None)[:2], 'pos': torch.arange(x.shape[1], device=x.device)[pos]}
            logits = guided_logits(model, x[:, pos], prompt[:, pos], cfg_scale, mask_id, rows=masked[:, pos],
                                   visible=visible, **where)
            n_forward, turn = n_forward + (2 if cfg_scale else 1), turn + 1
            if adjust is not None:
                logits = adjust(logits, x, masked, plan[0][0] if gen_start is None else gen_start)
            guess, trust = propose(logits, masked, mask_id, temperature=temperature, remasking=remasking, eos_id=eos_id,
                                   eot_id=eot_id, logits_eos_inf=logits_eos_inf,
                                   confidence_eos_eot_inf=confidence_eos_eot_inf, generator=generator,
                                   suppress=suppress)
            x0_hat = x.masked_scatter(masked, guess)
            committed = select(torch.zeros(x.shape, dtype=trust.dtype, device=x.device).masked_scatter(masked, trust),
                               masked, n, threshold)
            x = torch.where(committed, x0_hat, x)
            masked &= ~committed
            if on_step is not None:
                on_step(x, committed)
    return Generated(x, n_forward)


@torch.no_grad()
def generate_variable_length(model, prompts, mask_id, eos_id, *, block_length, steps_per_block, max_length, pad_id=None,
                             stop=None, generator=None, adjust=None, **settings):
    """Block diffusion on a growing canvas (iLLaDA; App. B.4): nothing after the current block exists yet.

    prompts: lists of ids -> (prompt + generated ids of each, kept to the end of the block that stopped it; n_forward).
    Blocks of block_length masks are appended and denoised in steps_per_block steps, at most max_length tokens in whole
    blocks, until EOS, or `stop(generated ids) -> bool`, is found in a row; the other rows go on. block_length=1 is the
    autoregressive sampling of the paper's Table 7. Guidance sees earlier blocks as prompt.
    """
    if block_length < 1 or max_length < block_length:
        raise ValueError(f'max_length must hold a block of {block_length}, got {max_length}')
    ids, alive, n_forward = [list(p) for p in prompts], list(range(len(prompts))), 0
    pad_id = int(mask_id == 0) if pad_id is None else pad_id        # hidden, so any other id will do
    for n in range(1, max_length // block_length + 1):
        hook = adjust and (lambda *a, n=n: adjust(*a[:3], a[1].shape[1] - n * block_length))    # n blocks in all rows
        x, visible, _ = canvas([ids[i] for i in alive], block_length, mask_id, pad_id)
        if hasattr(model, 'parameters'):
            device = next(model.parameters()).device
            x, visible = x.to(device), visible.to(device)
        noise = [generator[i] for i in alive] if isinstance(generator, (list, tuple)) else generator
        out = generate(model, x, mask_id, steps=steps_per_block, gen_start=x.shape[1] - block_length,
                       block_length=block_length, visible=None if visible.all() else visible, eos_id=eos_id,
                       adjust=hook, generator=noise, prompt=torch.ones_like(visible).index_fill_(
                           1, torch.arange(x.shape[1] - block_length, x.shape[1], device=x.device), False), **settings)
        n_forward += out.n_forward
        for i, row, seen in zip(alive, out.x.tolist(), visible.tolist()):
            ids[i] = [token for token, shown in zip(row, seen) if shown]
        new = {i: ids[i][len(prompts[i]):] for i in alive}
        alive = [i for i in alive if eos_id not in new[i] and not (stop is not None and stop(new[i]))]
        if not alive:
            break
    return ids, n_forward


def complete(model, prompts, gen_length, special, *, steps=0, block_length=0, variable_length=False, stop=None,
             generator=None, on_step=None, **settings):
    """Prompts, lists of ids, continued (or their gaps filled) -> (lists of ids, prompt included; n_forward).

    special: has mask_id, eos_id, eot_id, pad_id. steps and block_length 0 are one token a step and the whole canvas.
    A causal model writes from left to right, at settings['temperature'].
    """
    device = next(model.parameters()).device
    if getattr(getattr(model, 'config', None), 'causal', False):
        out, n_forward = [None] * len(prompts), 0
        for length in sorted({len(p) for p in prompts}):            # rows of one length at a time: nothing to pad
            part = [i for i, p in enumerate(prompts) if len(p) == length]
            noise = [generator[i] for i in part] if isinstance(generator, (list, tuple)) else generator
            x = torch.tensor([[special.eos_id, *prompts[i]] for i in part], device=device)
            made = ar_generate(model, x, gen_length, temperature=settings['temperature'], eos_id=special.eos_id,
                               generator=noise)
            n_forward += made.n_forward
            for i, row in zip(part, made.x[:, 1:].tolist()):
                out[i] = row
        return out, n_forward
    settings.update(eot_id=special.eot_id, generator=generator, on_step=on_step)
    if variable_length:
        return generate_variable_length(model, prompts, special.mask_id, special.eos_id, block_length=block_length,
                                        steps_per_block=steps or block_length, max_length=gen_length, stop=stop,
                                        pad_id=special.pad_id, **settings)
    gaps = any(special.mask_id in p for p in prompts)
    x, visible, given = (z.to(device) for z in canvas(prompts, 0 if gaps else gen_length, special.mask_id,
                                                      special.pad_id))
    made = generate(model, x, special.mask_id, steps=steps or int((x == special.mask_id).sum(1).max()),
                    block_length=block_length or None, prompt=given, visible=None if visible.all() else visible,
                    eos_id=special.eos_id, **settings)
    return [row[seen].tolist() for row, seen in zip(made.x, visible)], made.n_forward


def end_think(ids, gen_length, boost=100.0, power=3.0):
    """A hook for `adjust`: makes the tokens `ids` of "</think>" ever more likely (iLLaDA's evaluation).

    Until they stand in the text, the one that would come next gains boost * progress^power at the first mask of the
    block; progress is how far that position lies in gen_length.
    """
    ids = list(ids)

    def adjust(logits, x, masked, begin):
        logits, first = logits.clone(), 0                           # first: number of a row's first mask among the M
        for row, hidden in zip(x[:, begin:].tolist(), masked[:, begin:].tolist()):
            said = any(row[k:k + len(ids)] == ids for k in range(len(row)))
            if any(hidden) and not said:
                p = hidden.index(True)
                done = max(k for k in range(len(ids)) if row[max(p - k, 0):p] == ids[:k])
                logits[first, ids[done]] += boost * min(1.0, (p + 1) / gen_length) ** power
            first += sum(hidden)
        return logits

    return adjust


# ---------------------------------------------------------------------------------------------------------------------
# The autoregressive baseline: shift by one, no noise, no 1/t, and that is the whole difference


def shifted(x0, maskable, bos_id):
    """Inputs, targets and which targets count, each (B, T) (with bos_id every token is predicted) or (B, T-1)."""
    if bos_id is None:
        return x0[:, :-1], x0[:, 1:], maskable[:, 1:]
    return torch.cat((torch.full_like(x0[:, :1], bos_id), x0[:, :-1]), dim=1), x0, maskable


def ar_terms(x0, maskable, bos_id=None, *, per='token', total=None):
    """What ar_loss sums, in the form of loss_terms."""
    ids, targets, counted = shifted(x0, maskable, bos_id)
    n, rows = counted.sum(1), counted.flatten().nonzero()[:, 0]                         # (B,), (M,)
    weight = torch.ones_like(n) / (total or n.sum()) if per == 'token' else 1 / n.clamp(min=1) / (total or len(n))
    return ids, rows, targets.flatten()[rows], weight[rows // ids.shape[1]]


def ar_loss(model, x0, maskable, *, per='token', bos_id=None, total=None):
    """Mean cross-entropy of the next token over the maskable ones: x0 (B, T), maskable (B, T) -> ()."""
    return weighted_loss(model, *ar_terms(x0, maskable, bos_id, per=per, total=total))


@torch.no_grad()
def ar_log_prob(model, x0, maskable, *, bos_id=None, batch_size=64):
    """Exact log p of the maskable tokens of each row given all tokens before them: (B, T) -> (B,) float64."""
    out = []
    for x, m in zip(x0.split(batch_size), maskable.split(batch_size)):
        ids, targets, counted = shifted(x, m, bos_id)
        logp = log_prob(logits_of(model, ids, counted), targets[counted])               # (M,)
        out.append(logp.new_zeros(len(x)).index_add_(0, counted.nonzero()[:, 0], logp))
    return torch.cat(out)


def ar_log_likelihood(model, x0, maskable, *, bos_id=None):
    """log p(maskable | what stands before) of one sequence: x0 (T,), maskable (T,) -> float."""
    if bos_id is None and bool(maskable[0]):
        raise ValueError('ar_log_likelihood: the first token has nothing before it; give bos_id')
    return float(ar_log_prob(model, x0[None], maskable[None], bos_id=bos_id))


@torch.no_grad()
def ar_generate(model, prompt, n_new, *, temperature=1., eos_id=None, generator=None):
    """Continues prompt (B, P) int64 by n_new tokens -> Generated(x (B, P + n_new), n_forward).

    Keys and values are cached, so each token costs one row. Rows that produced eos_id keep repeating it.
    generator: one, or a list of one for each row.
    """
    x, P = prompt, prompt.shape[1]
    kv = model.new_kv(x.shape[0], P + n_new) if hasattr(model, 'new_kv') else None
    ended = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    for i in range(n_new):
        if kv is None:
            logits = model(x)[:, -1]
        else:
            pos = torch.arange(0 if i == 0 else P + i - 1, P + i, device=x.device)
            logits = model(x[:, pos], pos=pos, kv=kv)[:, -1]                            # (B, V)
        u = uniform(torch.ones_like(ended)[:, None], logits.shape[-1], generator) if temperature > 0 else None
        token = gumbel_argmax(logits, temperature, u=u)
        if eos_id is not None:
            token = torch.where(ended, eos_id, token)
            ended |= token == eos_id
        x = torch.cat((x, token[:, None]), dim=1)
    return Generated(x, n_new)
