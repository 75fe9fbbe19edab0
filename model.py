"""The mask predictor: a LLaMA-style Transformer that sees the whole canvas, and one door to weights on disk.

LLaDA (arXiv 2502.09992v3, Sec. 2.2 and App. B.2): pre-norm blocks, RMSNorm, SwiGLU, rotary positions, no biases, and
attention without a causal mask. Logit i predicts token i (no shift). The network is not told the mask ratio t: it
can count the masks. `causal=True` turns the same module into the autoregressive baseline.

    logits = Transformer(ModelConfig(...))(ids)                     # (B, W) int64 -> (B, W, V)
    model, meta = load_model('out/docs')                            # a run of train.py, or a folder of released weights

Letters: B batch, W window (the tokens given), T canvas (the keys attended to; T = W without a cache), V vocabulary,
C channels (d_model), H heads, D head size, M rows that are read out, N packed tokens.

More lines than 600: behind one door to weights, every way in which a file can be wrong is met here.
"""

import hashlib
import json
import math
import pickle
import re
import warnings
import zlib
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


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
    tied: bool = False              # the head reads the embedding matrix (iLLaDA)
    causal: bool = False            # the autoregressive baseline
    rope_fp32: bool = True          # rotate in float32 (LLaDA); False: in the dtype of q and k (iLLaDA)

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type is int and (isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2 ** 31):
                raise ValueError(f'{f.name} must be a whole number from 1 to 2^31, got {value!r}')
            if f.type is bool and not isinstance(value, bool) or f.type is float and (
                    type(value) not in (int, float) or not 0 < value < math.inf):
                raise ValueError(f'{f.name} must be {"true or false" if f.type is bool else "above 0"}, got {value!r}')
        if self.d_model % self.n_head or self.d_model // self.n_head % 2:
            raise ValueError(f'd_model / n_head must be an even whole number, got {self.d_model} / {self.n_head}')
        if self.n_head % self.n_kv_head:
            raise ValueError(f'n_kv_head must divide n_head, got {self.n_kv_head} and {self.n_head}')

    @property
    def head_dim(self):
        return self.d_model // self.n_head


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        return h.to(x.dtype) * self.weight.to(x.dtype)     # cast first, multiply second: as the released weights expect


def rope_angles(pos, head_dim, theta):
    """cos and sin of position * theta^(-2j/D), j = 0 .. D/2-1: pos (W,) -> two float32 tensors (W, D/2)."""
    frequency = 1.0 / theta ** (torch.arange(0, head_dim, 2, device=pos.device, dtype=torch.float32) / head_dim)
    angle = pos.to(torch.float32)[:, None] * frequency
    return angle.cos(), angle.sin()


def apply_rope(x, cos, sin):
    """Rotates dimension j together with j + D/2 ("half rotation"): x (B, H, W, D) -> same shape and dtype."""
    a, b = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def attention(q, k, v, *, causal=False, hidden=None, cu_seqlens=None):
    """softmax(q k^T / sqrt(D)) v; q (B, H, W, D), k and v (B, Hkv, T, D) -> (B, H, W, D).

    hidden: bool, broadcastable to (B, 1, W, T), True = this query must not look at this key.
    cu_seqlens (n+1,) int32: the batch, read row by row, is n segments end to end, empty ones perhaps at the last; no
    segment goes on in the next row, and nobody looks across a border.
    """
    if cu_seqlens is not None:
        return packed_attention(q, k, v, cu_seqlens, causal)
    grouped = q.shape[1] != k.shape[1]
    # torch's fused CPU kernel loses to three plain lines for short canvases: its backward in bfloat16 is 2-8x slower.
    # (On CUDA a mask stays out of training: cuDNN's masked backward has returned NaN since torch 2.11.)
    if q.device.type == 'cpu' and q.dtype == torch.bfloat16 and k.shape[2] <= 512:
        if causal:
            hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)
        if grouped:
            k, v = (z.repeat_interleave(q.shape[1] // z.shape[1], dim=1) for z in (k, v))
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)                        # (B, H, W, T)
        if hidden is not None:
            scores = scores.masked_fill(hidden, -math.inf)
        return scores.softmax(-1) @ v
    mask = None if hidden is None else ~hidden
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)


def packed_attention(q, k, v, cu_seqlens, causal):
    """Attention inside each segment of a packed batch. One varlen kernel on CUDA, one SDPA call a segment elsewhere."""
    shape = q.shape
    q, k, v = (z.transpose(1, 2).flatten(0, 1) for z in (q, k, v))                      # (N, H, D)
    if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16):
        from torch.nn.attention.varlen import varlen_attn
        k, v = (z.repeat_interleave(q.shape[1] // z.shape[1], dim=1) for z in (k, v))   # torch 2.11's kernel has no GQA
        window = {'window_size': (-1, 0)} if causal else {}
        out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, shape[2], shape[2], **window)
    else:
        borders = cu_seqlens.tolist()
        out = torch.cat([
            attention(*(z[None, start:end].transpose(1, 2) for z in (q, k, v)), causal=causal)[0].transpose(0, 1)
            for start, end in zip(borders, borders[1:]) if start < end])
    return out.unflatten(0, (shape[0], shape[2])).transpose(1, 2)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.n_kv_head, config.head_dim
        self.causal = config.causal
        self.q = nn.Linear(config.d_model, config.n_head * config.head_dim, bias=False)
        self.k = nn.Linear(config.d_model, config.n_kv_head * config.head_dim, bias=False)
        self.v = nn.Linear(config.d_model, config.n_kv_head * config.head_dim, bias=False)
        self.out = nn.Linear(config.n_head * config.head_dim, config.d_model, bias=False)

    def forward(self, x, cos, sin, pos=None, kv=None, hidden=None, cu_seqlens=None):
        q = self.q(x).unflatten(-1, (self.n_head, self.head_dim)).transpose(1, 2)       # (B, H, W, D)
        k = self.k(x).unflatten(-1, (self.n_kv_head, self.head_dim)).transpose(1, 2)    # (B, Hkv, W, D)
        v = self.v(x).unflatten(-1, (self.n_kv_head, self.head_dim)).transpose(1, 2)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        if kv is not None:                                                              # the whole cache: refresh
            k = kv[0].index_copy_(2, pos, k.to(kv.dtype)).to(q.dtype)                   # rows pos, look at all T rows
            v = kv[1].index_copy_(2, pos, v.to(kv.dtype)).to(q.dtype)
        causal = self.causal and kv is None and hidden is None
        y = attention(q, k, v, causal=causal, hidden=hidden, cu_seqlens=cu_seqlens)
        return self.out(y.transpose(1, 2).flatten(2))                                   # (B, W, C)


class SwiGLU(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.up = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.down = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attn_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attn = Attention(config)
        self.ff_norm = RMSNorm(config.d_model, config.norm_eps)
        self.ff = SwiGLU(config)

    def forward(self, x, *context):
        x = x + self.attn(self.attn_norm(x), *context)
        return x + self.ff(self.ff_norm(x))


class FusedCrossEntropy(torch.autograd.Function):
    """sum_i weights_i * CE(h_i W^T, targets_i), a few rows at a time: M x V in float32 never exists.

    The gradients are made in forward, while the logits of a chunk are at hand: backward multiplies nothing again.
    """

    @staticmethod
    def forward(ctx, h, weight, targets, weights, chunk, ce):
        w = weight.to(h.dtype)
        wide = torch.promote_types(h.dtype, torch.float32)
        loss, dh, dw = h.new_zeros((), dtype=wide), torch.empty_like(h), torch.zeros_like(w, dtype=wide)
        for i in range(0, h.shape[0], chunk):
            rows, y, scale = h[i:i + chunk], targets[i:i + chunk, None], weights[i:i + chunk, None].to(wide)
            z = (rows @ w.t()).to(wide)                                                 # (chunk, V)
            lse = z.logsumexp(-1, keepdim=True)
            each = lse - z.gather(1, y)
            loss += (scale * each).sum()
            if ce is not None:
                ce[i:i + chunk] = each[:, 0]
            g = z.sub_(lse).exp_().scatter_add_(1, y, torch.full_like(lse, -1)).mul_(scale).to(h.dtype)
            dh[i:i + chunk] = g @ w
            dw += g.t() @ rows
        ctx.save_for_backward(dh, dw)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx, grad):
        dh, dw = ctx.saved_tensors
        return dh * grad.to(dh.dtype), (dw * grad).to(ctx.weight_dtype), None, None, None, None


def weighted_cross_entropy(h, weight, targets, weights, ce=None, chunk=None):
    """sum_i weights_i * CE(h_i W^T, targets_i): h (M, C), weight (V, C), targets (M,), weights (M,) -> ().

    Cross-entropy in float32 at least: a weight of 1/t multiplies its rounding by up to 1000. ce (M,): is filled with
    the terms. chunk: rows at a time, by default what stays in a cache, on a GPU 2048.
    """
    chunk = chunk or (2048 if h.is_cuda else max(128, 10 ** 6 // weight.shape[0]))
    with torch.autocast(h.device.type, enabled=False):
        return FusedCrossEntropy.apply(h, weight, targets, weights, chunk, ce)


class Transformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.recompute = config, False     # recompute: keep only each block's input for the backward pass
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.head = None if config.tied else nn.Linear(config.d_model, config.vocab_size, bias=False)

    def forward(self, ids, *, pos=None, kv=None, visible=None, cu_seqlens=None, rows=None, targets=None, weights=None,
                ce=None):
        """ids (B, W) int64 -> logits (B, W, V).

        pos (W,) int64: where the ids stand on the canvas (default 0 .. W-1; with cu_seqlens counted anew per segment).
        kv (n_layer, 2, B, n_kv_head, T, D): cached keys (rotated) and values; rows `pos` are overwritten, all T seen.
        visible (B, T) bool: keys that may be looked at; False hides left padding.
        cu_seqlens (n+1,) int32: borders of packed segments, each within a row, counted over the batch row by row.
        rows (B, W) bool, or (M,) int64 flat indices: return only these, (M, V): the head is the widest matrix.
        targets (M,) int64 and weights (M,): return the scalar sum of weights * cross-entropy over those rows instead,
            and fill ce (M,) with the cross-entropies. (FSDP has the head gathered inside this forward only.)
        """
        config = self.config
        if cu_seqlens is not None and (visible is not None or kv is not None):
            raise ValueError('cu_seqlens cannot be combined with visible or kv')
        if pos is None:
            pos = torch.arange(ids.shape[1], device=ids.device)
            if cu_seqlens is not None:
                count = torch.arange(ids.numel(), device=ids.device)
                start = cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff(), output_size=ids.numel())
                pos = (count - start).view(ids.shape)
        x = self.embed(ids)                                                             # (B, W, C)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))       # a narrow residual stream halves the memory traffic
        cos, sin = rope_angles(pos.flatten(), config.head_dim, config.rope_theta)
        if pos.dim() == 2:
            cos, sin = (z.view(*pos.shape, -1)[:, None] for z in (cos, sin))            # (B, 1, W, D/2)
        if not config.rope_fp32:
            cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        hidden, cu_seqlens = self._hidden(ids.shape[1], pos, kv, visible, cu_seqlens)
        for i, block in enumerate(self.blocks):
            context = (cos, sin, pos, None if kv is None else kv[i], hidden, cu_seqlens)
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, *context, use_reentrant=False)
            else:
                x = block(x, *context)
        if rows is not None:
            x = x[rows] if rows.dtype == torch.bool else x.flatten(0, 1)[rows]          # (M, C)
        x = self.norm(x)
        head = self.embed.weight if self.head is None else self.head.weight
        if targets is not None:
            return weighted_cross_entropy(x, head, targets, weights, ce=ce)
        return F.linear(x, head)

    def _hidden(self, W, pos, kv, visible, cu_seqlens):
        """Which keys a query must not see, as one mask (B or 1, 1, W, T) bool, or None if SDPA can do without.

        And cu_seqlens, unless the mask has taken care of it: short rows are quicker under a mask than a segment a call.
        """
        hidden = None if visible is None else ~visible[:, None, None, :]
        if cu_seqlens is not None and pos.device.type == 'cpu' and W <= 512:
            segment = torch.arange(len(cu_seqlens) - 1).repeat_interleave(cu_seqlens.diff()).view(pos.shape)
            hidden, cu_seqlens = (segment[:, :, None] != segment[:, None, :])[:, None], None
        if self.config.causal and (kv is not None or hidden is not None):
            T = W if kv is None else kv.shape[-2]
            future = torch.arange(T, device=pos.device) > (pos if pos.dim() == 1 else torch.arange(W))[:, None]
            hidden = future[None, None] if hidden is None else hidden | future          # future (W, T)
        if hidden is None:
            return None, cu_seqlens
        # a query that may see nothing sees all: no NaN, and nobody reads it
        return hidden & ~hidden.all(-1, keepdim=True), cu_seqlens

    def new_kv(self, batch_size, length):
        """An empty cache for `forward(kv=...)`: (n_layer, 2, B, n_kv_head, T, D) in the dtype of the pass."""
        c, like = self.config, self.embed.weight
        kind = like.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else like.dtype
        return like.new_zeros(c.n_layer, 2, batch_size, c.n_kv_head, length, c.head_dim, dtype=dtype)

    def num_params(self, non_embedding=False):
        """All parameters, or those outside the embedding and head (N of the papers' 6ND)."""
        n = sum(p.numel() for p in self.parameters())
        return n - (1 if self.config.tied else 2) * self.embed.weight.numel() if non_embedding else n

    def flops_per_token(self, masked_fraction=1.0, length=None):
        """FLOPs per token of one forward and backward pass; the head is credited only for the rows it computes.

        The attention term is the full square, also under a causal mask. length: of the segments that attend to each
        other, default seq_len; of a mixture sum(length^2) / sum(length).
        """
        c = self.config
        blocks = self.num_params(non_embedding=True) - (2 * c.n_layer + 1) * c.d_model
        attention = 2 * c.n_layer * c.d_model * (length or c.seq_len)
        return 6 * (blocks + c.d_model * c.vocab_size * masked_fraction + attention)


@torch.no_grad()
def init_weights(model, seed=0, emb_std=None, locality=0.0, device=None):
    """Fills a fresh model; each matrix from its own generator, keyed by seed and name, whatever is sharded where.

    The scheme is the one named in the released LLaDA config ("mitchell"; that pre-training used it is unconfirmed):
    a normal cut at three sigma with std 1/sqrt(fan_in), divided by sqrt(2 * layer) for the two matrices of a block
    that write to the residual stream; the embedding has std 1/sqrt(C) unless `emb_std` says otherwise.
    locality above 0: see look_nearby, not in the papers. device: where each matrix is drawn (default: where it lives).
    """
    nearby = look_nearby(model.config, seed, locality * (emb_std or model.config.d_model ** -0.5)) if locality else {}
    for name, p in model.named_parameters():
        full = torch.ones(p.shape, dtype=p.dtype, device=device or p.device)
        if p.dim() == 2:
            std = emb_std if name == 'embed.weight' and emb_std is not None else p.shape[1] ** -0.5
            if name.endswith(('attn.out.weight', 'ff.down.weight')):
                std *= (2 * (int(name.split('.')[1]) + 1)) ** -0.5
            key = zlib.crc32(f'{seed} {name}'.encode())             # torch's CPU generator uses 32 bits only
            generator = torch.Generator(full.device).manual_seed(key)
            nn.init.trunc_normal_(full, 0.0, std, -3 * std, 3 * std, generator=generator)
            if name in nearby:
                nearby[name](full)
        put(p, full)
    return model


@torch.no_grad()
def put(parameter, full):
    """Copies a whole matrix, which every rank has, into a parameter; a shard (DTensor) takes its part, in silence."""
    if hasattr(parameter, 'placements'):
        from torch.distributed.tensor import distribute_tensor
        full = distribute_tensor(full.to(parameter.device), parameter.device_mesh, parameter.placements,
                                 src_data_rank=None)
    parameter.copy_(full)


def look_nearby(config, seed, size):
    """Changes to fresh weights, name -> function: every attention head begins by looking at one near position.

    All embeddings share one direction, of the given size per channel. On it q and k answer with a fixed pair (q0, k0),
    k0 = q0 rotated back by the head's offset, so that the score of the key so far away is highest, whatever the tokens;
    only fast rotary frequencies (period below about 40 tokens) take part. Offsets go round -1, 1, -2, 2, ... over the
    heads of all layers, and only back in a causal model. Worth 20 lines: a masked position has no content to search by,
    and a small model spends its first thousand updates at the unigram plateau until it has found its neighbours.
    """
    c, changes = config, {}
    generator = torch.Generator().manual_seed(zlib.crc32(f'{seed} nearby'.encode()))
    shared = torch.randn(c.d_model, generator=generator)
    shared *= c.d_model ** 0.5 / shared.norm()                                          # root mean square 1
    changes['embed.weight'] = lambda w: w.add_(size * shared.to(w))
    frequency = 1.0 / c.rope_theta ** (torch.arange(0, c.head_dim, 2) / c.head_dim)
    for i in range(c.n_layer):
        q0 = torch.randn(c.n_kv_head, 2, c.head_dim // 2, generator=generator) * (frequency > 0.15)
        q0 = (q0.flatten(1) * c.head_dim ** 0.5 / q0.flatten(1).norm(dim=1, keepdim=True))     # (Hkv, D)
        number = torch.arange(c.n_kv_head) + i * c.n_kv_head
        offset = -(number % 8 + 1) if c.causal else (number % 8 // 2 + 1) * (2 * (number % 2) - 1)
        angle = -offset[:, None] * frequency
        k0 = apply_rope(q0, angle.cos(), angle.sin())
        q0 = q0.repeat_interleave(c.n_head // c.n_kv_head, 0)                        # one offset for a group of queries
        for part, answer in (('q', q0.flatten()), ('k', k0.flatten())):
            changes[f'blocks.{i}.attn.{part}.weight'] = lambda w, answer=answer: w.add_(
                torch.outer(answer.to(w) - w @ shared.to(w), shared.to(w)) / c.d_model)
    return changes


def pick_device(device, dtype):
    """-> (device, context manager for the forward pass). bfloat16 only where the hardware multiplies it."""
    here = {'cuda': torch.cuda.is_available(), 'mps': torch.backends.mps.is_available(), 'cpu': True}
    for key, got, allowed in (('device', device, ('auto', *here)), ('dtype', dtype, ('auto', 'bfloat16', 'float32'))):
        if got not in allowed:
            raise ValueError(f'{key} must be one of {", ".join(allowed)}, got {got!r}')
    device = next(kind for kind in here if here[kind]) if device == 'auto' else device
    if not here[device]:
        raise ValueError(f'device {device!r} is not available here')
    if dtype == 'auto':
        asks = [getattr(torch.cpu, f'_is_{name}_supported', None) for name in ('amx_tile', 'avx512_bf16')]
        fast = (torch.cuda.is_bf16_supported(including_emulation=False) if device == 'cuda'
                else device == 'cpu' and any(p and p() for p in asks))
        dtype = 'bfloat16' if fast else 'float32'
    return device, torch.autocast(device, torch.bfloat16) if dtype == 'bfloat16' else nullcontext()


def open_model(path, device='auto', dtype='auto'):
    """load_model for a script's settings: -> (model, meta, device, context manager for the forward pass).

    Weights of train.py are float32, narrowed for each pass; released ones stay as stored, unless `dtype` is given.
    """
    device, autocast = pick_device(device, dtype)
    released = (Path(path) / 'config.json').is_file()
    model, meta = load_model(path, device, getattr(torch, dtype) if released and dtype != 'auto' else None)
    return model, meta, device, nullcontext() if released else autocast


# ---------------------------------------------------------------------------------------------------------------------
# Weights on disk: checkpoints of train.py, and folders of released weights


def load_model(path, device='cpu', dtype=None, verify=True):
    """One door to all weights: -> (model in eval mode, meta).

    path: a step folder or a run folder of train.py (its newest step), or a Hugging Face style folder (config.json and
    *.safetensors) of LLaDA or iLLaDA. dtype None keeps the stored one. meta: mask_id, eos_id, pad_id, bos_id, eot_id
    (None where the folder does not tell), tokenizer (a spec for data.get_tokenizer, or None), config (None for released
    weights), iteration, folder. verify: check a release's sha256 sums where its index lists them.
    Nothing is unpickled but tensors, no remote code is run, every shape is checked. Raises ValueError or OSError.
    """
    path = Path(path)
    if (path / 'config.json').is_file():
        return _load_release(path, device, dtype, verify)
    steps = [path] if (path / 'manifest.json').is_file() else find_checkpoints(path)
    if not steps:
        raise FileNotFoundError(f'{path}: no checkpoint here (want a folder of train.py or of released weights)')
    folder = steps[-1]
    manifest = read_checkpoint(folder)
    config = ModelConfig(**manifest['model'])
    if 9 * config.n_layer > len(stored_tensors(folder, manifest)):  # before a hostile size is built
        raise ValueError(f'{folder}: too few tensors for {config.n_layer} layers')
    with torch.device('meta'):
        model = Transformer(config)
    read_tensors(folder, manifest, {f'model.{name}': p for name, p in model.named_parameters()})    # sizes, on meta
    model.to_empty(device='cpu')
    read_tensors(folder, manifest, {f'model.{name}': p.data for name, p in model.named_parameters()})
    model.to(device=device, dtype=dtype)
    spec = manifest['tokenizer']
    meta = dict(manifest['ids'], tokenizer=str(folder / spec) if spec.endswith('.json') else spec, folder=str(folder),
                config=manifest['config'], iteration=manifest['iteration'])
    return model.eval(), meta


def find_checkpoints(run):
    """The complete step folders of a run, oldest first (a folder is complete once it bears its final name)."""
    return sorted(f for f in Path(run).glob('iter_' + '[0-9]' * 7) if (f / 'manifest.json').is_file())


class Damaged(ValueError):
    """A file is not what was once written."""


def read_json(path):
    """A JSON object from a file, or {} if there is none."""
    try:
        return dict(json.loads(path.read_text(encoding='utf-8'))) if path.is_file() else {}
    except (ValueError, TypeError, RecursionError) as e:
        raise Damaged(f'{path}: not a JSON object ({type(e).__name__}: {e})') from None


def file_sha256(path):
    """Checksum of a file of any size, without reading it into memory."""
    return hashlib.sha256(np.memmap(path, np.uint8, 'r')).hexdigest()


def read_checkpoint(folder):
    """The manifest of a step folder, after checking every file against its sha256."""
    folder = Path(folder)
    manifest = read_json(folder / 'manifest.json')
    try:
        if manifest['format'] != 'nanollada 2':
            raise ValueError(f"format {manifest['format']!r}, this code reads 'nanollada 2'")
        files, ids, spec = manifest['files'], manifest['ids'], manifest['tokenizer']
        config = ModelConfig(**manifest['model'])
        if not {'.metadata', *([spec] if spec.endswith('.json') else [])} <= set(files) or any('/' in f for f in files):
            raise ValueError('the list of files is not complete')
        if not (all(0 <= i < config.vocab_size for i in ids.values()) and len(ids) == 4):
            raise ValueError('a special token lies outside the vocabulary')
        if re.fullmatch('iter_[0-9]{7}', folder.name) and manifest['iteration'] != int(folder.name[5:]):
            raise ValueError('the iteration is not the one in the name of the folder')
        manifest['config'].keys()
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as e:
        raise ValueError(f'{folder / "manifest.json"}: not a checkpoint manifest ({type(e).__name__}: {e})') from None
    for file, sha256 in ((folder / name, sha256) for name, sha256 in files.items()):
        if not file.is_file() or file.stat().st_size == 0 or file_sha256(file) != sha256:
            raise Damaged(f'{file}: missing, empty or damaged (its sha256 is not the one in the manifest)')
    return manifest


class _OnlyTensors(pickle.Unpickler):
    """torch.distributed.checkpoint keeps its table of contents as a pickle: this reads it and builds nothing else."""

    dcp = 'torch.distributed.checkpoint.'
    allowed = {f'{dcp}metadata': 'Metadata TensorStorageMetadata TensorProperties _MEM_FORMAT_ENCODING '
                                 'ChunkStorageMetadata MetadataIndex StorageMeta', f'{dcp}filesystem': '_StorageInfo',
               'torch': 'Size float32 bfloat16 float16 float64 int64', 'torch.serialization': '_get_layout',
               'pathlib': 'PosixPath WindowsPath', 'pathlib._local': 'PosixPath WindowsPath'}

    def find_class(self, module, name):
        if name not in self.allowed.get(module, '').split():
            raise ValueError(f'it asks for {module}.{name}')
        return super().find_class(module, name)


def stored_tensors(folder, manifest):
    """What a step folder holds: name -> torch.Size. Anything but tensors in files of the manifest is refused."""
    path = Path(folder) / '.metadata'
    try:
        with path.open('rb') as f:
            table = _OnlyTensors(f).load()
        if not {info.relative_path for info in table.storage_data.values()} <= set(manifest['files']):
            raise ValueError('it points outside the folder')
        return {name: entry.size for name, entry in table.state_dict_metadata.items()}
    except Exception as e:                                          # a pickle has a dozen ways to be broken
        raise ValueError(f'{path}: not a table of tensors ({type(e).__name__}: {e})') from None


def read_tensors(folder, manifest, state):
    """Fills the tensors of `state` (name -> tensor or DTensor) in place, whoever saved them on however many ranks."""
    sizes = stored_tensors(folder, manifest)
    for name, tensor in state.items():
        if sizes.get(name) != tensor.shape:
            raise ValueError(f'{folder}: {name} is {list(sizes[name]) if name in sizes else "missing"}, '
                             f'the configuration says {list(tensor.shape)}')
    if not all(t.is_meta for t in state.values()):
        import torch.distributed.checkpoint as dcp
        with quiet(f'{folder}: cannot be read'):
            dcp.load(state, checkpoint_id=folder, no_dist=not torch.distributed.is_initialized())


@contextmanager
def quiet(what):
    """Around torch.distributed.checkpoint: no warnings, and what goes wrong becomes an OSError of one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:                                      # its CheckpointException is no Exception
        cause = e.__cause__ or e
        raise OSError(f'{what} ({type(cause).__name__}: {(str(cause).splitlines() or [""])[-1][:150]})') from None


def _fill(model, names, stored, read, device, dtype, where):
    """Puts tensors into a model built on the meta device, one at a time. names: ours -> stored name."""
    missing, extra = set(names.values()) - set(stored), set(stored) - set(names.values())
    if missing or extra:
        what = f'lacks {sorted(missing)[0]}' if missing else f'has {sorted(extra)[0]}, which this architecture does not'
        raise ValueError(f'{where}: {what} ({len(missing)} tensors missing, {len(extra)} unknown)')
    first = None
    for ours, theirs in names.items():
        module, leaf = model.get_submodule(ours.rpartition('.')[0]), ours.rpartition('.')[2]
        want, tensor = getattr(module, leaf).shape, read(theirs)
        if tensor.shape != want:
            raise ValueError(f'{where}: {theirs} has shape {list(tensor.shape)}, the configuration says {list(want)}')
        first = first or tensor.dtype
        if not tensor.is_floating_point() or tensor.dtype != first and dtype is None:
            raise ValueError(f'{where}: {theirs} is {tensor.dtype}, want one floating dtype for all ({first})')
        setattr(module, leaf, nn.Parameter(tensor.to(device=device, dtype=dtype or tensor.dtype)))


# The released layouts. LLaDA's gate is `ff_proj` (SiLU goes through it), and `ff_out` is two different matrices.
PARTS = ('embed', 'norm', 'head', 'block', 'attn_norm', 'ff_norm', 'attn.q', 'attn.k', 'attn.v', 'attn.out', 'ff.gate',
         'ff.up', 'ff.down')
RELEASES = {                # our parts, in this order, by their released names
    'llada': dict(zip(PARTS, (
        'model.transformer.wte', 'model.transformer.ln_f', 'model.transformer.ff_out', 'model.transformer.blocks.',
        'attn_norm', 'ff_norm', 'q_proj', 'k_proj', 'v_proj', 'attn_out', 'ff_proj', 'up_proj', 'ff_out'))),
    'illada': dict(zip(PARTS, (
        'model.embed_tokens', 'model.norm', 'lm_head', 'model.layers.', 'input_layernorm', 'post_attention_layernorm',
        'self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj', 'self_attn.o_proj', 'mlp.gate_proj', 'mlp.up_proj',
        'mlp.down_proj'))),
}
CONFIG_KEYS = {             # ours -> the key of config.json
    'llada': dict(vocab_size='embedding_size', seq_len='max_sequence_length', n_layer='n_layers', n_head='n_heads',
                  n_kv_head='n_kv_heads', d_model='d_model', d_ff='mlp_hidden_size', rope_theta='rope_theta',
                  norm_eps='rms_norm_eps', tied='weight_tying', rope_fp32='rope_full_precision'),
    'illada': dict(vocab_size='vocab_size', seq_len='max_position_embeddings', n_layer='num_hidden_layers',
                   n_head='num_attention_heads', n_kv_head='num_key_value_heads', d_model='hidden_size',
                   d_ff='intermediate_size', rope_theta='rope_theta', norm_eps='rms_norm_eps',
                   tied='tie_word_embeddings'),
}
PLAIN = {                   # what the two architectures are, as far as their config.json can say otherwise
    'llada': dict(activation_type='silu', block_type='llama', layer_norm_type='rms', rope=True, alibi=False,
                  include_bias=False, include_qkv_bias=False, bias_for_layer_norm=False, attention_layer_norm=False,
                  input_emb_norm=False, scale_logits=False, multi_query_attention=None, layer_norm_with_affine=True),
    'illada': dict(hidden_act='silu', attention_bias=False, mlp_bias=False, layer_norm_eps=None, rope_scaling=None),
}


def release_names(kind, config):
    """Our parameter names -> the names in a released folder."""
    table = RELEASES[kind]
    names = {f'{part}.weight': f'{table[part]}.weight' for part in PARTS[:2 if config.tied else 3]}
    for i in range(config.n_layer):
        names.update({f'blocks.{i}.{part}.weight': f"{table['block']}{i}.{table[part]}.weight" for part in PARTS[4:]})
    return names


def release_config(folder):
    """config.json of a released folder -> (kind, ModelConfig, the raw dict); refuses by name what we do not compute."""
    path = Path(folder) / 'config.json'
    raw = read_json(path)
    kind = str(raw.get('model_type'))
    if kind not in RELEASES:
        raise ValueError(f"{path}: model_type {kind!r}; known are {', '.join(RELEASES)}")
    for key, plain in PLAIN[kind].items():
        if raw.get(key, plain) != plain and raw[key] is not None:
            raise ValueError(f'{path}: {key} = {raw[key]!r} is not supported (only {plain!r})')
    fields_ = {ours: raw[theirs] for ours, theirs in CONFIG_KEYS[kind].items() if raw.get(theirs) is not None}
    if kind == 'illada':
        fields_['rope_fp32'] = False
    elif type(raw.get('mlp_ratio')) is int and type(raw.get('d_model')) is int:
        fields_.setdefault('d_ff', raw['mlp_ratio'] * raw['d_model'])
    for ours, theirs in (('n_kv_head', fields_.get('n_head')), ('vocab_size', raw.get('vocab_size'))):
        fields_.setdefault(ours, theirs)
    unknown = [theirs for ours, theirs in CONFIG_KEYS[kind].items() if fields_.get(ours) is None]
    if unknown:                                                     # a guessed theta degrades quietly: never guess
        raise ValueError(f"{path}: {', '.join(unknown)} missing")
    return kind, ModelConfig(**fields_), raw


def release_ids(folder, raw):
    """Special ids of a released folder, as far as its files tell: {'mask_id', 'eos_id', 'pad_id', 'bos_id', 'eot_id'}.

    By id in config.json (raw) or generation_config.json, else by name in the files of the tokenizer: iLLaDA's mask.
    """
    config, generation = read_json(folder / 'tokenizer_config.json'), read_json(folder / 'generation_config.json')
    try:
        names = {t['content']: int(i) for i, t in (config.get('added_tokens_decoder') or {}).items()}
        names.update((a['content'], a['id']) for a in read_json(folder / 'tokenizer.json').get('added_tokens') or [])
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        raise ValueError(f'{folder}: a list of added tokens is broken ({type(e).__name__}: {e})') from None
    ids, usual = {}, {'mask': ('<|mdm_mask|>', '<[MASK]>'), 'eot': ('<|eot_id|>', '<eot_id>')}
    for role in ('mask', 'eos', 'pad', 'bos', 'eot'):
        told = config.get(f'{role}_token')
        told = str(told.get('content') if isinstance(told, dict) else told)
        found = [raw.get(f'{role}_token_id'), generation.get(f'{role}_token_id'), names.get(told)]
        found += map(names.get, usual.get(role, ()))
        ids[f'{role}_id'] = next((i for i in found if type(i) is int), None)
    return ids


def release_shards(folder, verify):
    """The names of the safetensors files of a released folder, by its index if it has one."""
    index = folder / 'model.safetensors.index.json'
    if not index.is_file():
        if not (folder / 'model.safetensors').is_file():
            raise FileNotFoundError(f'{folder}: no model.safetensors here')
        return ['model.safetensors']
    try:
        raw = read_json(index)
        shards = sorted({str(shard) for shard in raw['weight_map'].values()})
        sums = dict((raw.get('metadata') or {}).get('sha256') or {})
    except (KeyError, TypeError, AttributeError) as e:
        raise ValueError(f'{index}: not a safetensors index ({type(e).__name__}: {e})') from None
    for shard in shards:
        if Path(shard).name != shard or not (folder / shard).is_file():
            raise FileNotFoundError(f'{folder / shard}: missing, but named in {index.name}')
        if verify and shard in sums and file_sha256(folder / shard) != sums[shard]:
            raise ValueError(f'{folder / shard}: damaged (its sha256 is not the one in {index.name})')
    return shards


def _load_release(folder, device, dtype, verify):
    """A LLaDA or iLLaDA folder, tensor by tensor: peak memory is the model and one tensor."""
    kind, config, raw = release_config(folder)
    safetensors, where = _safetensors(), {}
    for shard in release_shards(folder, verify):
        try:
            with safetensors.safe_open(folder / shard, 'pt') as f:
                where.update({name: (shard, f.get_slice(name).get_shape()) for name in f.keys()})
        except safetensors.SafetensorError as e:
            raise ValueError(f'{folder / shard}: not a complete safetensors file ({e})') from None

    def read(name):
        with safetensors.safe_open(folder / where[name][0], 'pt') as f:
            return f.get_tensor(name)

    want = 9 * config.n_layer + 2
    embed, head = (f'{RELEASES[kind][part]}.weight' for part in ('embed', 'head'))
    if len(where) not in (want, want + 1):                                      # before a hostile size is built
        raise ValueError(f'{folder}: {len(where)} tensors, {config.n_layer} layers have {want + (not config.tied)}')
    if list(where.get(embed, (0, []))[1]) != [config.vocab_size, config.d_model]:
        raise ValueError(f'{folder}: {embed} is not [{config.vocab_size}, {config.d_model}], as config.json says')
    if config.tied and head in where:                                          # some shards store the tied head as well
        if not torch.equal(read(head), read(embed)):
            raise ValueError(f'{folder}: the configuration ties {head} to {embed}, but they differ')
        del where[head]
    with torch.device('meta'):
        model = Transformer(config)
    _fill(model, release_names(kind, config), where, read, device, dtype, folder)
    tokenizer = str(folder / 'tokenizer.json') if (folder / 'tokenizer.json').is_file() else None
    return model.eval(), {**release_ids(folder, raw), 'tokenizer': tokenizer, 'config': None, 'iteration': None,
                          'folder': str(folder)}


def _safetensors():
    try:
        import safetensors.torch
    except ImportError:
        raise ValueError('released weights need one more package: pip install safetensors') from None
    return safetensors


def save_release(model, meta, path, shard_bytes=5_000_000_000):
    """Writes a model in LLaDA's release layout (iLLaDA's if it rotates in its own dtype): load_model reads it.

    More than shard_bytes make several files and an index, which also lists their sha256.
    """
    config, state, path, safetensors = model.config, model.state_dict(), Path(path), _safetensors()
    kind = 'llada' if config.rope_fp32 else 'illada'
    if config.causal:
        raise ValueError('the released layouts are bidirectional: an autoregressive model cannot be saved in them')
    if path.exists() and any(path.iterdir()):                       # an old index would win over the new file
        raise ValueError(f'{path}: not empty; choose a new folder')
    path.mkdir(parents=True, exist_ok=True)
    shards, size = [{}], 0
    for ours, theirs in release_names(kind, config).items():
        size += state[ours].nbytes
        if shards[-1] and size > shard_bytes:
            shards, size = [*shards, {}], state[ours].nbytes
        shards[-1][theirs] = state[ours].contiguous()
    names = [f'model-{i:05d}-of-{len(shards):05d}.safetensors' for i in range(1, len(shards) + 1)]
    names = ['model.safetensors'] if len(shards) == 1 else names
    for name, tensors in zip(names, shards):
        safetensors.torch.save_file(tensors, path / name, metadata={'format': 'pt'})
    index = {'metadata': {'sha256': {name: file_sha256(path / name) for name in names}},
             'weight_map': {tensor: name for name, tensors in zip(names, shards) for tensor in tensors}}
    if len(shards) > 1:
        (path / 'model.safetensors.index.json').write_text(json.dumps(index, indent=1), encoding='utf-8')
    tokenizer = Path(meta.get('tokenizer') or 'none')
    for source in (tokenizer, tokenizer.with_name('tokenizer_config.json')) if tokenizer.suffix == '.json' else ():
        if source.is_file():
            (path / source.name.replace(tokenizer.name, 'tokenizer.json')).write_bytes(source.read_bytes())
    raw = {'model_type': kind, 'architectures': [{'llada': 'LLaDAModelLM', 'illada': 'ILLaDAForCausalLM'}[kind]],
           **PLAIN[kind], **{theirs: getattr(config, ours) for ours, theirs in CONFIG_KEYS[kind].items()},
           'vocab_size': config.vocab_size, 'torch_dtype': str(model.embed.weight.dtype).removeprefix('torch.'),
           **{f'{role}_token_id': meta.get(f'{role}_id') for role in ('mask', 'eos', 'pad', 'bos', 'eot')}}
    (path / 'config.json').write_text(json.dumps(raw, indent=1), encoding='utf-8')       # last: it completes the folder
