"""The mask predictor: a LLaMA-style Transformer that sees the whole canvas, and its weights on disk.

LLaDA (arXiv 2502.09992v3, Sec. 2.2 and App. B.2): pre-norm blocks, RMSNorm, SwiGLU, rotary positions, no
biases, and attention without a causal mask. Logit i predicts token i (no shift). The network is not given the
mask ratio t: it can count the masks. `causal=True` turns the same module into the autoregressive baseline.

    logits = Transformer(ModelConfig(...))(ids)             # (B, W) int64 -> (B, W, V)
    model, meta = load_model('out/docs')                    # a run of train.py, or released weights

Letters: B batch, W window (the tokens given), T canvas (the keys attended to; T = W without a cache), V
vocabulary, C channels (d_model), H heads, D head size, M rows read out, N packed tokens.
"""

import hashlib
import json
import math
import pickle
import shutil
import warnings
import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from errno import EIO, ENOENT
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from configurator import (
    ROLES,
    TOKENIZER_FILES,
    Damaged,
    Refused,
    copy_tokenizer,
    facts_sha256,
    out_of_range,
    own_tokenizer,
    read_json,
    read_manifest,
    refuse,
    say,
    special_tokens,
)


@dataclass
class ModelConfig:
    """Everything that decides the shape of the weights. Field names are the keys of the config files."""

    vocab_size: int
    seq_len: int                    # longest canvas seen in training; rotary positions set no hard limit
    n_layer: int
    n_head: int
    n_kv_head: int                  # fewer than n_head: grouped-query attention (iLLaDA: 8 for 32)
    d_model: int
    d_ff: int
    rope_theta: float = 500000.0
    norm_eps: float = 1e-5
    tied: bool = False              # the head shares the embedding matrix (iLLaDA)
    causal: bool = False            # the autoregressive baseline
    rope_fp32: bool = True          # rotate in float32 (LLaDA); False: in the dtype of q and k (iLLaDA)

    def __post_init__(self):
        refuse(out_of_range(self, (
            ('n_layer', 'a whole number from 1 to 9999', lambda v: type(v) is int and 0 < v < 10 ** 4),
            ('vocab_size seq_len n_head n_kv_head d_model d_ff', 'a whole number from 1 to 2147483647',
             lambda v: type(v) is int and 0 < v < 2 ** 31),
            ('rope_theta norm_eps', 'above 0', lambda v: type(v) in (int, float) and 0 < v < math.inf),
            ('tied causal rope_fp32', 'true or false', lambda v: type(v) is bool))))

        if self.d_model % (2 * self.n_head):
            raise Refused(f'd_model / n_head must be even and whole, got {self.d_model} / {self.n_head}')
        if self.n_head % self.n_kv_head:
            raise Refused(f'n_kv_head must divide n_head, got {self.n_kv_head} and {self.n_head}')

    @property
    def head_dim(self):
        return self.d_model // self.n_head


linear = partial(nn.Linear, bias=False)


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        h = F.rms_norm(x, self.weight.shape, eps=self.eps)  # x / sqrt(mean(x^2) + eps), float32 inside
        return h.to(x.dtype) * self.weight.to(x.dtype)      # cast, then multiply: as released weights expect


def rope_angles(pos, head_dim, theta):
    """cos and sin of position * theta^(-2j/D), j = 0 .. D/2-1: pos (...) -> two float32 tensors (..., D/2)."""
    j = torch.arange(0, head_dim, 2, device=pos.device, dtype=torch.float32)
    frequency = 1.0 / theta ** (j / head_dim)
    angle = pos.to(torch.float32)[..., None] * frequency
    return angle.cos(), angle.sin()


def apply_rope(x, cos, sin):
    """Rotates dimension j together with j + D/2 ("half rotation"): x (B, H, W, D) -> same shape and dtype."""
    a, b = x.to(cos.dtype).chunk(2, dim=-1)
    turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return turned.to(x.dtype)


def attention(q, k, v, *, causal=False, may_see=None, cu_seqlens=None):
    """softmax(q k^T / sqrt(D)) v; q (B, H, W, D), k and v (B, Hkv, T, D) -> (B, H, W, D).

    may_see: bool, broadcastable to (B, 1, W, T): whether a query attends to a key. causal: a query attends
    only to itself and earlier keys (then W = T). cu_seqlens (n+1,) int32, CUDA only: see Transformer.forward.
    """
    if cu_seqlens is not None:
        return packed_attention(q, k, v, cu_seqlens)

    # In training on short canvases plain code beats torch's fused CPU kernel, whose bfloat16 backward is 4x slower
    if q.device.type == 'cpu' and q.dtype == torch.bfloat16 and q.requires_grad and k.shape[2] <= 256:
        k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
        scores = Scores.apply(q, k) * q.shape[-1] ** -0.5                               # (B, H, W, T) float32
        if causal:
            may_see = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
        if may_see is not None:
            scores = scores.masked_fill(~may_see, -math.inf)
        return scores.softmax(-1).to(v.dtype) @ v

    # (On CUDA a mask stays out of training: cuDNN's masked backward has returned NaN since torch 2.11.)
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=may_see, is_causal=causal, enable_gqa=grouped)


class Scores(torch.autograd.Function):
    """q k^T in float32 (softmax amplifies rounding errors of scores); gradients in the dtype of q and k."""

    @staticmethod
    def forward(ctx, q, k):
        ctx.save_for_backward(q, k)
        with torch.autocast(q.device.type, enabled=False):
            return q.float() @ k.float().transpose(-2, -1)

    @staticmethod
    def backward(ctx, grad):
        q, k = ctx.saved_tensors
        grad = grad.to(q.dtype)
        return grad @ k, grad.transpose(-2, -1) @ q


def repeat_heads(z, H):
    """Keys or values of grouped-query attention, once for each query head: (B, Hkv, T, D) -> (B, H, T, D)."""
    return z if z.shape[1] == H else z.repeat_interleave(H // z.shape[1], dim=1)


def packed_attention(q, k, v, cu_seqlens):
    """Attention inside each segment of a packed batch, by CUDA's kernel for variable-length segments."""
    from torch.nn.attention.varlen import varlen_attn

    B, H, W, D = q.shape
    k, v = repeat_heads(k, H), repeat_heads(v, H)           # torch 2.11's kernel has no GQA
    q, k, v = (z.transpose(1, 2).reshape(B * W, H, D) for z in (q, k, v))                   # (N, H, D)
    out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, W, W)
    return out.view(B, W, H, D).transpose(1, 2)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, self.head_dim = config.d_model, config.head_dim
        self.q = linear(C, config.n_head * self.head_dim)
        self.k = linear(C, config.n_kv_head * self.head_dim)
        self.v = linear(C, config.n_kv_head * self.head_dim)
        self.out = linear(config.n_head * self.head_dim, C)

    def heads(self, y):
        """(B, W, H * D) -> (B, H, W, D)."""
        return y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def forward(self, x, cos, sin, pos, kv, **limits):
        q = apply_rope(self.heads(self.q(x)), cos, sin)                                     # (B, H, W, D)
        k = apply_rope(self.heads(self.k(x)), cos, sin)                                     # (B, Hkv, W, D)
        v = self.heads(self.v(x))

        if kv is not None:                                 # update rows pos of the cache, attend to all T
            k = kv[0].index_copy_(2, pos, k.to(kv.dtype)).to(q.dtype)                       # (B, Hkv, T, D)
            v = kv[1].index_copy_(2, pos, v.to(kv.dtype)).to(q.dtype)
        y = attention(q, k, v, **limits)
        return self.out(y.transpose(1, 2).flatten(2))                                       # (B, W, C)


class SwiGLU(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate = linear(config.d_model, config.d_ff)
        self.up = linear(config.d_model, config.d_ff)
        self.down = linear(config.d_ff, config.d_model)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attn_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attn = Attention(config)
        self.ff_norm = RMSNorm(config.d_model, config.norm_eps)
        self.ff = SwiGLU(config)

    def forward(self, x, rows=None, **context):
        x = x + self.attn(self.attn_norm(x), **context)
        if rows is not None:                                # last block: nothing reads the other rows again
            x = x[rows] if rows.dtype == torch.bool else x.flatten(0, 1)[rows]              # (M, C)
        return x + self.ff(self.ff_norm(x))


def cross_entropy_and_gradient(z, y, weights):
    """Logits z (M, V), targets y (M, 1), weights (M, 1) -> sum of weights * CE (), and its gradient (M, V)."""
    dtype, z = z.dtype, z.to(weights.dtype)
    lse = z.logsumexp(-1, keepdim=True)
    loss = (weights * (lse - z.gather(1, y))).sum()

    # d CE / d z = softmax(z) - onehot(y), in the memory of z (the caller's own, if as wide as the weights)
    dz = z.sub_(lse).exp_().scatter_add_(1, y, torch.full_like(lse, -1)).mul_(weights)
    return loss, dz.to(dtype)


class FusedCrossEntropy(torch.autograd.Function):
    """sum_i weights_i * CE(h_i W^T, targets_i), a few rows at a time: no float32 M x V matrix exists.

    The gradients are computed in forward, while the logits of a chunk are at hand; backward only scales them.
    """

    @staticmethod
    def forward(ctx, h, weight, targets, weights, chunk, ce):
        w = weight.to(h.dtype)
        wide = torch.promote_types(h.dtype, torch.float32)
        loss = h.new_zeros((), dtype=wide)
        dh, dw = torch.empty_like(h), torch.zeros_like(w, dtype=wide)

        for start in range(0, len(h), chunk):
            part = slice(start, start + chunk)
            y, scale = targets[part, None], weights[part, None].to(wide)
            summand, dz = ce(h[part] @ w.t(), y, scale)                                     # (), (chunk, V)
            loss += summand
            dh[part] = dz @ w
            dw += dz.t() @ h[part]

        ctx.save_for_backward(dh, dw)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx, grad):
        dh, dw = ctx.saved_tensors
        return dh * grad.to(dh.dtype), (dw * grad).to(ctx.weight_dtype), None, None, None, None


def weighted_cross_entropy(h, weight, targets, weights, chunk=None, ce=cross_entropy_and_gradient):
    """sum_i weights_i * CE(h_i W^T, targets_i): h (M, C), weight (V, C), targets (M,), weights (M,) -> ().

    Cross-entropy in at least float32: a weight of 1/t multiplies its rounding error by up to 1000. chunk:
    rows at a time, by default 2048 on a GPU, elsewhere what fits into a cache. ce: may be compiled.
    """
    if chunk is None:
        chunk = 2048 if h.is_cuda else max(128, 10 ** 6 // len(weight))
    with torch.autocast(h.device.type, enabled=False):
        return FusedCrossEntropy.apply(h, weight, targets, weights, chunk, ce)


class Transformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.recompute = config, False     # recompute: keep only each block's input for backward
        self.ce = cross_entropy_and_gradient            # train.py compiles it together with the blocks
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.head = None if config.tied else linear(config.d_model, config.vocab_size)

    def forward(self, ids, *, pos=None, kv=None, visible=None, cu_seqlens=None, rows=None, targets=None,
                weights=None):
        """ids (B, W) int64 -> logits (B, W, V).

        pos (W,) int64: positions of the ids on the canvas (default 0 .. W-1; packed: counted per segment).
        kv (n_layer, 2, B, n_kv_head, T, D): cached keys (rotated) and values; rows `pos` are overwritten.
        visible (B, T) bool: keys that may be attended to; False hides left padding.
        cu_seqlens (n+1,) int32: the batch, read row by row, is n segments end to end; none continues in the
            next row, and attention does not cross their borders.
        rows (M,) int64 flat indices, or (B, W) bool: return only these, (M, V), as the head is the widest
            matrix.
        targets (M,) int64, weights (M,): return the scalar sum of weights * cross-entropy over those rows
            instead. (Under FSDP the head is gathered inside this forward only.)
        """
        x = self.embed(ids)                                                                 # (B, W, C)
        x = x.to(dtype_of_pass(x))                         # a narrow residual stream: half the memory traffic

        if pos is None and cu_seqlens is None:
            pos = torch.arange(ids.shape[1], device=x.device)                               # (W,)
        elif pos is None:
            _, pos = segments(*ids.shape, cu_seqlens)                                       # (B, 1, W)
        cos, sin = rope_angles(pos, self.config.head_dim, self.config.rope_theta)           # (..., W, D/2)
        if not self.config.rope_fp32:
            cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        context = dict(cos=cos, sin=sin, pos=pos, **self._limits(x, pos, kv, visible, cu_seqlens))

        for i, block in enumerate(self.blocks):
            context['kv'] = None if kv is None else kv[i]
            context['rows'] = rows if block is self.blocks[-1] else None
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, **context, use_reentrant=False)
            else:
                x = block(x, **context)

        x = self.norm(x)
        head = self.embed.weight if self.head is None else self.head.weight
        if targets is not None:
            return weighted_cross_entropy(x, head, targets, weights, ce=self.ce)
        return F.linear(x, head)

    def _limits(self, x, pos, kv, visible, cu_seqlens):
        """Tells attention who may see whom, by a mask only if nothing shorter will do. x (B, W, C)."""
        causal = self.config.causal
        device = x.device
        if cu_seqlens is None:
            if visible is None and not (causal and kv is not None):
                return dict(causal=causal)
        elif visible is not None or kv is not None:
            raise ValueError('cu_seqlens cannot be combined with visible or kv')
        elif x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and not causal:
            return dict(cu_seqlens=cu_seqlens)              # the kernel for segments takes only these

        W = x.shape[1]
        T = W if kv is None else kv.shape[-2]
        may_see = torch.ones(1, 1, W, T, dtype=torch.bool, device=device)
        if visible is not None:                             # padding is never attended to
            may_see = may_see & visible[:, None, None, :]                                   # (B, 1, W, T)

        if cu_seqlens is not None:                          # attend only within the segment
            segment, _ = segments(len(x), W, cu_seqlens)                                    # (B, 1, W)
            may_see = segment[..., :, None] == segment[..., None, :]                        # (B, 1, W, W)

        if causal:                                          # attend only to what comes before on the canvas
            keys = torch.arange(T, device=device)
            now = keys if kv is None else pos
            may_see = may_see & (keys <= now[:, None])

        nobody = ~may_see.any(-1, keepdim=True)             # a query that may see no key sees all: else NaN
        return dict(may_see=may_see | nobody)

    def new_kv(self, batch_size, length):
        """An empty cache for `forward(kv=...)`: (n_layer, 2, B, n_kv_head, T, D) in the dtype of the pass."""
        c, weight = self.config, self.embed.weight
        shape = (c.n_layer, 2, batch_size, c.n_kv_head, length, c.head_dim)
        return torch.zeros(shape, device=weight.device, dtype=dtype_of_pass(weight))

    def num_params(self, non_embedding=False):
        """All parameters, or those outside the embedding and head (N of the papers' 6ND)."""
        n = sum(p.numel() for p in self.parameters())
        if non_embedding:
            n -= (1 if self.config.tied else 2) * self.embed.weight.numel()
        return n

    def flops_per_token(self, masked_fraction=1.0, length=None):
        """FLOPs per token of one forward and backward pass; the head counts only for the rows it computes.

        The attention term counts the full square even under a causal mask, and the last block counts all rows,
        though its feed-forward computes only those read out (1 % less for 8B). length: of the segments that
        attention is confined to, default seq_len; for a mixture of lengths, sum(length^2) / sum(length).
        """
        c = self.config
        blocks = self.num_params(non_embedding=True) - (2 * c.n_layer + 1) * c.d_model      # without norms
        attention = 2 * c.n_layer * c.d_model * (length or c.seq_len)
        return 6 * (blocks + c.d_model * c.vocab_size * masked_fraction + attention)


def segments(B, W, cu_seqlens):
    """For B * W packed tokens, the number of the segment and the position in it: two tensors (B, 1, W)."""
    if not cu_seqlens.is_cuda and cu_seqlens[-1] != B * W:  # (would make the host wait for a GPU)
        raise ValueError(f'cu_seqlens must end at the {B * W} tokens of the batch, got {int(cu_seqlens[-1])}')
    at = torch.arange(B * W, dtype=cu_seqlens.dtype, device=cu_seqlens.device).view(B, 1, W)
    number = torch.bucketize(at, cu_seqlens[1:], right=True)
    return number, at - cu_seqlens[number]


def dtype_of_pass(z):
    """The dtype in which autocast computes on z's device; without autocast the dtype of z."""
    kind = z.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else z.dtype


# ----------------------------------------------------------------------------------------------------------
# Fresh weights, and where they live


@torch.no_grad()
def init_weights(model, seed=0, emb_std=None, device=None):
    """Fills a fresh model; each matrix from its own generator, keyed by seed and name, however it is sharded.

    The scheme is the one named in the released LLaDA config ("mitchell"; that pre-training used it is
    unconfirmed): a normal truncated at three sigma with std 1/sqrt(fan_in), divided by sqrt(2 * layer) for the
    two matrices of a block that write to the residual stream; the embedding has std 1/sqrt(C) unless `emb_std`
    says otherwise. device: where matrices are drawn.
    """
    for name, p in model.named_parameters():
        full = torch.ones(p.shape, dtype=p.dtype, device=device or p.device)
        if p.dim() == 2:
            std = p.shape[1] ** -0.5
            if name == 'embed.weight' and emb_std is not None:
                std = emb_std
            if name.endswith(('attn.out.weight', 'ff.down.weight')):
                std *= (2 * (int(name.split('.')[1]) + 1)) ** -0.5

            key = zlib.crc32(f'{seed} {name}'.encode())     # torch's CPU generator uses 32 bits only
            generator = torch.Generator(full.device).manual_seed(key)
            nn.init.trunc_normal_(full, 0.0, std, -3 * std, 3 * std, generator=generator)
        put(p, full)
    return model


@torch.no_grad()
def put(parameter, full):
    """Copies a full matrix, present on every rank, into a parameter; of a DTensor each takes its shard."""
    if hasattr(parameter, 'placements'):
        from torch.distributed.tensor import distribute_tensor
        full = distribute_tensor(full.to(parameter.device), parameter.device_mesh, parameter.placements,
                                 src_data_rank=None)        # nothing is sent: every rank has it
    parameter.copy_(full)


def pick_device(device, dtype):
    """-> (device, whether to compute in bfloat16: by default only where the hardware supports it)."""
    found = {'cuda': torch.cuda.is_available(), 'mps': torch.backends.mps.is_available(), 'cpu': True}
    here = [kind for kind in found if found[kind]]
    if device == 'auto':
        device = here[0]
    if device not in here:
        raise Refused(f'device {device!r} is not available here; choose one of auto, {", ".join(here)}')

    if dtype not in ('auto', 'bfloat16', 'float32'):
        raise Refused(f'dtype must be one of auto, bfloat16, float32, got {dtype!r}')
    fast = False
    if device == 'cuda':
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device == 'cpu':
        fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return device, dtype == 'bfloat16' or dtype == 'auto' and fast


# ----------------------------------------------------------------------------------------------------------
# Weights on disk: checkpoints of train.py


def open_model(path, device, dtype, compile):
    """load_model for a script's settings: -> (model, meta, device, context manager for the forward pass).

    Weights of train.py are float32, cast for each pass; released ones stay as stored unless dtype is set.
    compile: each block, when it is first called.
    """
    released = (Path(path) / 'config.json').is_file()
    device, bf16 = pick_device(device, dtype)
    stored = getattr(torch, dtype) if released and dtype != 'auto' else None
    autocast = torch.autocast(device, torch.bfloat16, enabled=bf16 and not released)
    model, meta = load_model(path, device, stored)
    if compile:
        torch._dynamo.config.recompile_limit = 64           # batches and canvases have many shapes
        for block in model.blocks:
            block.compile()
    return model, meta, device, autocast


def load_model(path, device='cpu', dtype=None):
    """Loads weights of any kind -> (model in eval mode, meta).

    path: a step folder or a run folder of train.py (its newest step), or a Hugging Face style folder
    (config.json and *.safetensors) of LLaDA or iLLaDA. dtype None keeps the stored one.
    meta: mask_id, eos_id, pad_id, bos_id, eot_id (None if the folder does not say), tokenizer (a spec for
    data.get_tokenizer, or None), folder; config, iteration and examples (how many its data held) of
    a run of train.py, None for released weights.
    Only tensors are unpickled, no code is run, every shape is checked. Raises Refused or OSError.
    """
    folder = weights_in(path)
    manifest = {}
    if (folder / 'config.json').is_file():
        model, meta = read_release(folder, device, dtype)
    else:
        manifest = read_checkpoint(folder)
        model = empty_model(ModelConfig(**manifest['model'])).to_empty(device='cpu')
        read_tensors(folder, {f'model.{name}': p.data for name, p in model.named_parameters()})
        model.to(device=device, dtype=dtype)
        meta = dict(manifest['ids'], tokenizer=own_tokenizer(manifest['tokenizer'], folder))

    meta['folder'] = str(folder)
    meta.update((key, manifest.get(key)) for key in ('config', 'iteration', 'examples'))
    return model.eval(), meta


def weights_in(path):
    """The folder with the weights: `path`, or the newest step in it. FileNotFoundError if there is none."""
    path = Path(path)
    if any((path / name).is_file() for name in ('config.json', 'manifest.json')):
        return path
    steps = find_checkpoints(path)
    if not steps:
        what = 'no checkpoint here (train.py writes the first after eval_interval updates; or released weights)'
        raise FileNotFoundError(ENOENT, what, str(path))
    return steps[-1]


def empty_model(config):
    """A Transformer whose parameters take no memory yet."""
    with torch.device('meta'):
        return Transformer(config)


def find_checkpoints(run):
    """The complete step folders of a run, oldest first: a folder is complete once it has its manifest."""
    return sorted(f for f in Path(run).glob('iter_' + '[0-9]' * 7) if (f / 'manifest.json').is_file())


ASKED_FOR = {'masking', 'optimizer', 'batch_size', 'global_batch', 'seq_len', 'dataset'}      # by callers


def read_checkpoint(folder, share=(0, 1)):
    """The manifest of a step folder. share: which files are verified by checksum, see read_manifest."""
    manifest = read_manifest(folder, share)
    path = folder / 'manifest.json'
    if manifest.get('format') != 'nanollada 3':
        raise Refused(f"{path}: format {manifest.get('format')!r}, this code reads 'nanollada 3'")

    try:
        config = ModelConfig(**manifest['model'])
        if not all(0 <= i < config.vocab_size for i in manifest['ids'].values()):
            raise Refused('a special token lies outside the vocabulary')
        if not ASKED_FOR <= manifest['config'].keys():
            raise Refused('not all settings are there')
    except (KeyError, TypeError, AttributeError, Refused) as error:
        raise Refused(f'{path}: not a checkpoint ({type(error).__name__}: {error})') from None
    return manifest


class _OnlyTensors(pickle.Unpickler):
    """Reads the table of contents of torch.distributed.checkpoint, a pickle, and builds nothing else."""

    allowed = {
        'torch.distributed.checkpoint.metadata':
            'Metadata TensorStorageMetadata TensorProperties _MEM_FORMAT_ENCODING '
            'ChunkStorageMetadata MetadataIndex StorageMeta',
        'torch.distributed.checkpoint.filesystem': '_StorageInfo',
        'torch': 'Size float32 bfloat16 float16 float64 int64',
        'torch.serialization': '_get_layout',
        'pathlib': 'PosixPath WindowsPath',
        'pathlib._local': 'PosixPath WindowsPath'}

    def find_class(self, module, name):
        if (module, name) == ('builtins', 'getattr'):       # how some Pythons pickle members of an enum
            return self.member
        if name not in self.allowed.get(module, '').split():
            raise ValueError(f'it asks for {module}.{name}')
        return super().find_class(module, name)

    def member(self, enumeration, name):
        if enumeration is not self.find_class('torch.distributed.checkpoint.metadata', '_MEM_FORMAT_ENCODING'):
            raise ValueError(f'it asks for {name} of {enumeration}')
        return enumeration[name]


def stored_tensors(folder):
    """The tensors in a step folder: name -> torch.Size. Anything but whole tensors in its files is refused."""
    path = folder / '.metadata'
    sizes = {}
    try:
        with path.open('rb') as file:
            table = _OnlyTensors(file).load()

        for info in table.storage_data.values():
            if not (folder / Path(info.relative_path).name).is_file():
                raise ValueError(f'it points to {info.relative_path}')
        for name, entry in table.state_dict_metadata.items():
            if not covers(entry.chunks, entry.size):
                raise ValueError(f'it has only parts of {name}')
            sizes[name] = entry.size
        return sizes

    except Exception as error:                              # a pickle has a dozen ways to be broken
        raise Refused(f'{path}: not a table of tensors ({type(error).__name__}: {error})') from None


def covers(chunks, size):
    """Whether chunks are the rows of a tensor of this size, each once, as FSDP cuts it. (A scalar: one chunk.)"""
    end, (rows, *rest) = 0, size or (1,)
    for chunk in sorted(chunks, key=lambda chunk: chunk.offsets):
        start, *corner = chunk.offsets or (0,)
        n, *width = chunk.sizes or (1,)
        if start != end or any(corner) or width != rest:
            return False
        end += n
    return end == rows


def read_tensors(folder, state):
    """Fills the tensors of `state` (name -> tensor or DTensor), saved on any number of ranks."""
    import torch.distributed.checkpoint as dcp
    sizes = stored_tensors(folder)
    for name, tensor in state.items():
        if sizes.get(name) != tensor.shape:
            there = list(sizes[name]) if name in sizes else 'missing'
            raise Refused(f'{folder}: {name} is {there}, the configuration says {list(tensor.shape)}')
    with one_line(folder, 'cannot be read'):
        dcp.load(state, checkpoint_id=folder, no_dist=not torch.distributed.is_initialized())


@contextmanager
def one_line(folder, what):
    """Wraps torch.distributed.checkpoint: no warnings; its own exception, a BaseException, becomes OSError."""
    from torch.distributed.checkpoint.api import CheckpointException
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    except CheckpointException as error:
        cause = error.__cause__ or error
        last_line = (str(cause).splitlines() or [''])[-1]
        free = shutil.disk_usage(folder.parent).free / 1e6      # a full disk goes by many names there
        why = f'{type(cause).__name__}: {last_line[:150]}; {free:,.1f} MB are free there'
        raise OSError(EIO, f'{what} ({why})', str(folder)) from None


# ----------------------------------------------------------------------------------------------------------
# Weights on disk: the released layouts. LLaDA's gate is `ff_proj` (SiLU is applied to it), and `ff_out` names
# two different matrices.

KINDS = {'llada': 'LLaDAModelLM', 'illada': 'ILLaDAForCausalLM'}         # model_type -> class

# What the two releases call our modules and, in config.json, the fields of ModelConfig
PARTS = '''
ours                   llada                                    illada
embed                  model.transformer.wte                    model.embed_tokens
norm                   model.transformer.ln_f                   model.norm
head                   model.transformer.ff_out                 lm_head
blocks.{i}.attn_norm   model.transformer.blocks.{i}.attn_norm   model.layers.{i}.input_layernorm
blocks.{i}.attn.q      model.transformer.blocks.{i}.q_proj      model.layers.{i}.self_attn.q_proj
blocks.{i}.attn.k      model.transformer.blocks.{i}.k_proj      model.layers.{i}.self_attn.k_proj
blocks.{i}.attn.v      model.transformer.blocks.{i}.v_proj      model.layers.{i}.self_attn.v_proj
blocks.{i}.attn.out    model.transformer.blocks.{i}.attn_out    model.layers.{i}.self_attn.o_proj
blocks.{i}.ff_norm     model.transformer.blocks.{i}.ff_norm     model.layers.{i}.post_attention_layernorm
blocks.{i}.ff.gate     model.transformer.blocks.{i}.ff_proj     model.layers.{i}.mlp.gate_proj
blocks.{i}.ff.up       model.transformer.blocks.{i}.up_proj     model.layers.{i}.mlp.up_proj
blocks.{i}.ff.down     model.transformer.blocks.{i}.ff_out      model.layers.{i}.mlp.down_proj
'''
FIELDS = '''
ours            llada                   illada
vocab_size      embedding_size          vocab_size
seq_len         max_sequence_length     max_position_embeddings
n_layer         n_layers                num_hidden_layers
n_head          n_heads                 num_attention_heads
n_kv_head       n_kv_heads              num_key_value_heads
d_model         d_model                 hidden_size
d_ff            mlp_hidden_size         intermediate_size
rope_theta      rope_theta              rope_theta
norm_eps        rms_norm_eps            rms_norm_eps
tied            weight_tying            tie_word_embeddings
rope_fp32       rope_full_precision
'''

PLAIN = {           # what the two architectures fix, where config.json could say otherwise
    'llada': dict(
        activation_type='silu', block_type='llama', layer_norm_type='rms', rope=True, alibi=False,
        include_bias=False, include_qkv_bias=False, bias_for_layer_norm=False, attention_layer_norm=False,
        input_emb_norm=False, scale_logits=False, multi_query_attention=None, layer_norm_with_affine=True),
    'illada': dict(hidden_act='silu', attention_bias=False, mlp_bias=False, layer_norm_eps=None)}
HARMLESS = (        # keys of config.json that do not change what is computed here
    'architectures auto_map model_type torch_dtype dtype transformers_version use_cache sha256 _name_or_path '
    'vocab_size bos_token_id eos_token_id pad_token_id mask_token_id eot_token_id init_fn init_std init_device '
    'init_cutoff_factor initializer_range precision flash_attention block_group_size alibi_bias_max mlp_ratio '
    'attention_layer_norm_with_affine attention_dropout embedding_dropout residual_dropout resid_pdrop').split()


def column(table, kind):
    """A table as a dict: our name -> the name under this kind, if there is one."""
    heads, *rows = [line.split() for line in table.strip().splitlines()]
    number = heads.index(kind)
    return {row[0]: row[number] for row in rows if row[number:]}


def release_names(kind, config):
    """Our parameter names -> the names in a released folder."""
    names = {}
    parts = column(PARTS, kind)
    for i in range(config.n_layer):
        for ours, theirs in parts.items():
            names[f'{ours.format(i=i)}.weight'] = f'{theirs.format(i=i)}.weight'
    if config.tied:
        del names['head.weight']
    return names


def release_config(folder):
    """config.json of a released folder -> (kind, ModelConfig, raw dict); what is not implemented is refused."""
    path = folder / 'config.json'
    raw = read_json(path)
    kind = str(raw.get('model_type'))
    if kind not in KINDS:
        raise Refused(f"{path}: model_type {kind!r}; known are {', '.join(KINDS)}")

    keys = column(FIELDS, kind)
    plain = PLAIN[kind]
    ropes = ('rope_scaling', 'rope_parameters')
    known = {*keys.values(), *plain, *HARMLESS, *ropes}
    for key, value in raw.items():
        if key in plain and value not in (None, plain[key]):
            raise Refused(f'{path}: {key} = {value!r} is not supported (only {plain[key]!r})')
        if value and key not in known:                      # it may say something that changes the logits
            raise Refused(f'{path}: {key} = {value!r} is not known here; '
                          'if it changes nothing, take it out of the file')

    told = dict(vocab_size=raw.get('vocab_size'), n_kv_head=raw.get(keys['n_head']))        # unless it says more
    told.update((ours, raw[theirs]) for ours, theirs in keys.items() if raw.get(theirs) is not None)
    for rope in (raw.get(key) or {} for key in ropes):     # transformers keeps the base and its scaling there
        if not isinstance(rope, dict) or rope.get('rope_type', rope.get('type', 'default')) != 'default':
            raise Refused(f'{path}: scaled rotary angles are not supported, got {rope}')
        base = rope.get('rope_theta')
        if base is not None and told.setdefault('rope_theta', base) != base:
            raise Refused(f"{path}: rope_theta is {told['rope_theta']} and {base}: which one?")

    if kind == 'illada':
        told['rope_fp32'] = False
    elif type(raw.get('mlp_ratio')) is int and type(raw.get('d_model')) is int:
        told.setdefault('d_ff', raw['mlp_ratio'] * raw['d_model'])

    unknown = [theirs for ours, theirs in keys.items() if told.get(ours) is None]
    if unknown:                                             # a guessed theta degrades quietly: never guess
        raise Refused(f"{path}: {', '.join(unknown)} missing")
    return kind, ModelConfig(**told), raw


def release_files(folder):
    """The safetensors files of a released folder, by its index if it has one."""
    single = folder / 'model.safetensors'
    index = folder / 'model.safetensors.index.json'
    if not index.is_file():
        return [single]

    names = read_json(index).get('weight_map')
    if not isinstance(names, dict):
        raise Refused(f'{index}: not a safetensors index')
    files = {folder / Path(str(name)).name for name in names.values()}
    if single.is_file() and single not in files:
        raise Refused(f'{folder}: its index does not know {single.name}: which weights? Remove one of the two')
    return sorted(files)


def read_release(folder, device='cpu', dtype=None):
    """A LLaDA or iLLaDA folder -> (model, meta). Memory-mapped: on a CPU what keeps its dtype is not copied."""
    kind, config, raw = release_config(folder)
    stored = {}
    for file in release_files(folder):
        stored.update(read_safetensors(file))
    model = release_model(folder, kind, config, stored, device, dtype)

    files = [folder / f'tokenizer{ending}' for ending in TOKENIZER_FILES]
    tokenizer = next((str(file) for file in files if file.is_file()), None)
    meta = dict(release_ids(folder, raw), tokenizer=tokenizer)

    told = raw.pop('sha256', None)
    if told and told != facts_sha256(raw):                  # people do edit it: reported, not refused
        say(f'{folder / "config.json"}: changed since save_release wrote it')
    return model, meta


def read_safetensors(file):
    """name -> tensor. Damaged if they are not what save_release wrote; other writers leave no checksum."""
    if not file.is_file():
        raise FileNotFoundError(ENOENT, 'missing', str(file))
    safetensors = _safetensors()
    try:
        tensors = safetensors.torch.load_file(file)
        with safetensors.safe_open(file, 'pt') as opened:
            told = (opened.metadata() or {}).get('sha256')
    except safetensors.SafetensorError as error:
        raise Refused(f'{file}: not a complete safetensors file ({error})') from None

    if told and told != tensors_sha256(tensors):
        raise Damaged(f'{file}: damaged (its sha256 is not the one it bears)')
    return tensors


def release_model(folder, kind, config, stored, device='cpu', dtype=None):
    """A model from tensors under their released names; every name and shape is checked."""
    names = release_names(kind, config)
    stored = {name: z for name, z in stored.items() if not name.endswith('.inv_freq')}      # rope_theta says it
    if config.tied:                                         # some files store it twice, or as the head
        head = stored.pop(f"{column(PARTS, kind)['head']}.weight", None)
        if head is not None and not torch.equal(head, stored.setdefault(names['embed.weight'], head)):
            raise Refused(f'{folder}: the configuration ties the head to the embedding, but they differ')

    wanted = set(names.values())
    missing, extra = wanted - stored.keys(), stored.keys() - wanted
    if missing or extra:
        raise Refused(f'{folder}: lacks {sorted(missing)[:1]}, has {sorted(extra)[:1]} that this architecture '
                      f'does not have ({len(missing)} and {len(extra)} tensors)')

    model = empty_model(config)
    for ours, theirs in names.items():
        there = stored[theirs].shape
        want = model.get_parameter(ours).shape
        if there != want:
            raise Refused(f'{folder}: {theirs} has shape {list(there)}, the configuration says {list(want)}')

    kinds = {str(tensor.dtype) for tensor in stored.values()}
    if len(kinds) > 1 and dtype is None:
        raise Refused(f'{folder}: tensors of {" and ".join(sorted(kinds))}; choose one by --dtype')
    weights = {ours: stored[theirs].to(device=device, dtype=dtype) for ours, theirs in names.items()}
    model.load_state_dict(weights, assign=True)
    return model


def release_ids(folder, raw):
    """Special ids of a released folder, as far as its files give them: by number, or by name in the tokenizer."""
    generation = read_json(folder / 'generation_config.json')
    _, named = special_tokens(folder / 'tokenizer.json')
    ids = {}
    for role in ROLES:
        key = f'{role}_token_id'
        told = (raw.get(key), generation.get(key), named.get(role))
        number = next((i for i in told if type(i) is int), None)
        if named.get(role, number) != number:
            raise Refused(f'{folder}: the weights say {role} is {number}, the tokenizer says {named[role]}')
        ids[f'{role}_id'] = number
    return ids


def _safetensors():
    try:
        import safetensors.torch
    except ImportError:
        raise Refused('released weights need one more package: pip install safetensors') from None
    return safetensors


def tensors_sha256(tensors):
    """Checksum of tensors and their names."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(name.encode())
        total.update(tensor.contiguous().view(torch.uint8).numpy())
    return total.hexdigest()


def save_release(model, meta, path):
    """Writes a model in LLaDA's release layout (iLLaDA's if rope_fp32 is off), which load_model reads.

    meta: special ids and tokenizer as in load_model. The folder must be new.
    """
    config = model.config
    path = Path(path)
    kind = 'llada' if config.rope_fp32 else 'illada'
    if config.causal:
        raise Refused('the released layouts are bidirectional: no autoregressive model can be saved in them')
    path.mkdir(parents=True, exist_ok=True)
    if any(path.iterdir()):                                 # an old index would override the new file
        raise Refused(f'{path}: not empty; choose a new folder')

    state = model.state_dict()
    names = release_names(kind, config)
    tensors = {theirs: state[ours].cpu().contiguous() for ours, theirs in names.items()}
    metadata = {'format': 'pt', 'sha256': tensors_sha256(tensors)}
    _safetensors().torch.save_file(tensors, path / 'model.safetensors', metadata=metadata)
    copy_tokenizer(meta.get('tokenizer'), path)

    dtype = str(model.embed.weight.dtype).removeprefix('torch.')
    raw = {'model_type': kind, 'architectures': [KINDS[kind]], 'torch_dtype': dtype, **PLAIN[kind],
           'vocab_size': config.vocab_size}
    raw.update((theirs, getattr(config, ours)) for ours, theirs in column(FIELDS, kind).items())
    raw.update((f'{role}_token_id', meta.get(f'{role}_id')) for role in ROLES)
    raw['sha256'] = facts_sha256(raw)
    text = json.dumps(raw, indent=1)
    (path / 'config.json').write_text(text, encoding='utf-8')               # last: completes the folder
