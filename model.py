"""The mask predictor, a LLaMA-style Transformer that sees the whole canvas, and its weights on disk.

LLaDA (arXiv 2502.09992v3, Sec. 2.2 and App. B.2): pre-norm blocks, RMSNorm, SwiGLU, rotary positions, no
biases, and no causal mask. Logit i predicts token i (no shift). The network is not given the mask ratio t,
because it can count the masks. With causal=True the same module is the autoregressive baseline.

    logits = Transformer(ModelConfig(...))(ids)             # (B, T) int64 -> (B, T, V)
    model, meta = load_model('out/docs')                    # a run of train.py, or released weights

Letters: B batch, T sequence length, S keys attended to (S = T without a cache), V vocabulary, C channels
(d_model), H heads, D head size, M positions to predict.
"""

import hashlib
import json
import re
import timeit
import warnings
import zlib
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from configurator import UserError, read_json

# Some processors need a hundred times as long for numbers below 1e-38, which AdamW's moments of rare tokens
# and peaked attention reach. Threads inherit this, so it stands before the first operation.
torch.set_flush_denormal(True)
# no need to say that a single process saves and loads as a single process
warnings.filterwarnings('ignore', 'torch.distributed is disabled')


@dataclass
class ModelConfig:
    """Hold the architecture. The field names are settings of train.py."""

    vocab_size: int
    seq_len: int                    # longest canvas seen in training; rotary positions set no hard limit
    n_layer: int
    n_head: int
    n_kv_head: int                  # fewer than n_head is grouped-query attention (iLLaDA: 8 for 32)
    d_model: int
    d_ff: int
    rope_theta: float = 500000.0
    norm_eps: float = 1e-5
    tied: bool = False              # the head shares the embedding matrix (iLLaDA)
    causal: bool = False            # the autoregressive baseline
    rope_fp32: bool = True          # rotate in float32 (LLaDA), or in the dtype of q and k (iLLaDA)

    def __post_init__(self):
        # rotary positions turn pairs of dimensions
        if self.d_model % (2 * self.n_head):
            raise UserError(f'd_model / n_head must be an even number, got {self.d_model} / {self.n_head}')
        self.head_dim = self.d_model // self.n_head


# ----------------------------------------------------------------------------------------------------------
# The network

linear = partial(nn.Linear, bias=False)


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        # cast first, then multiply: this order is what the released weights were trained with
        h = F.rms_norm(x, self.weight.shape, eps=self.eps)
        weight = self.weight.to(x.dtype)
        return h.to(x.dtype) * weight


def rope_angles(positions, head_dim, theta):
    """Return cos and sin of position * theta^(-2j/D), j = 0 .. D/2-1: (...) -> two float32 tensors (..., D/2)."""
    # low dimensions turn fast and tell neighbours apart, high ones tell distances
    two_j = torch.arange(0, head_dim, 2, device=positions.device)
    frequency = 1.0 / theta ** (two_j.float() / head_dim)
    # float32, because bfloat16 could not tell position 300 from 301
    angle = positions.float()[..., None] * frequency
    return angle.cos(), angle.sin()


def apply_rope(x, cos, sin):
    """Rotate dimension j together with j + D/2 ("half rotation"): x (B, H, T, D) -> same shape and dtype."""
    a, b = x.to(cos.dtype).chunk(2, dim=-1)
    rotated_a = a * cos - b * sin
    rotated_b = b * cos + a * sin
    return torch.cat((rotated_a, rotated_b), dim=-1).to(x.dtype)


def attention(q, k, v, *, attn_mask=None, causal=False, cu_seqlens=None):
    """Return softmax(q k^T / sqrt(D)) v: q (B, H, T, D), k and v (B, Hkv, S, D) -> (B, H, T, D).

    attn_mask, bool, broadcastable to (B, 1, T, S): True where a query may attend to a key. causal: only to
    itself and earlier keys. cu_seqlens: as in Transformer.forward, for CUDA's kernel for packed segments.
    """
    if cu_seqlens is not None:
        return packed_attention(q, k, v, cu_seqlens)
    # torch picks the kernel: flash attention on a GPU, if nothing needs a mask
    sdpa = partial(
        F.scaled_dot_product_attention,
        attn_mask=attn_mask, is_causal=causal,
        enable_gqa=q.shape[1] != k.shape[1])
    if q.device.type != 'cpu':
        return sdpa(q, k, v)
    # on a CPU torch's kernel is faster in float32 than in bfloat16 (backward: up to 4 times), and more exact
    dtype = q.dtype
    wide = torch.promote_types(dtype, torch.float32)
    with torch.autocast('cpu', enabled=False):
        out = sdpa(q.to(wide), k.to(wide), v.to(wide))
    return out.to(dtype)


def packed_attention(q, k, v, cu_seqlens):
    """Attend inside each segment, with CUDA's kernel for them: shapes as in `attention`, cu_seqlens (n + 1,) int32."""
    from torch.nn.attention.varlen import varlen_attn
    B, H, T, D = q.shape
    # every key and value serves several query heads, but the kernel of torch 2.11 has no grouped queries
    if k.shape[1] != H:
        k = k.repeat_interleave(H // k.shape[1], dim=1)
        v = v.repeat_interleave(H // v.shape[1], dim=1)
    # the kernel knows no rows, only B * T tokens in a line
    q, k, v = (z.transpose(1, 2).flatten(0, 1) for z in (q, k, v))                  # (B * T, H, D)
    out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, T, T)
    return out.view(B, T, H, D).transpose(1, 2)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        # four matrices without bias; keys and values may have fewer heads than queries
        C = config.d_model
        self.head_dim = config.head_dim
        self.q = linear(C, config.n_head * self.head_dim)
        self.k = linear(C, config.n_kv_head * self.head_dim)
        self.v = linear(C, config.n_kv_head * self.head_dim)
        self.out = linear(config.n_head * self.head_dim, C)

    def heads(self, y):
        """(B, T, H * D) -> (B, H, T, D)."""
        return y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def forward(self, x, rope, kv, kv_positions, pattern):
        # x (B, T, C), rope (cos, sin), kv: one layer of the cache, or None, pattern: arguments of `attention`
        q = self.heads(self.q(x))                                                   # (B, H, T, D)
        k = self.heads(self.k(x))                                                   # (B, Hkv, T, D)
        v = self.heads(self.v(x))
        q = apply_rope(q, *rope)
        k = apply_rope(k, *rope)

        if kv is not None:
            # overwrite these positions of the cache, then attend to all S of it
            k = kv[0].index_copy_(2, kv_positions, k.to(kv.dtype))                  # (B, Hkv, S, D)
            v = kv[1].index_copy_(2, kv_positions, v.to(kv.dtype))
            k = k.to(q.dtype)
            v = v.to(q.dtype)
        y = attention(q, k, v, **pattern)                                           # (B, H, T, D)
        y = y.transpose(1, 2).flatten(2)
        return self.out(y)                                                          # (B, T, C)


class SwiGLU(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate = linear(config.d_model, config.d_ff)
        self.up = linear(config.d_model, config.d_ff)
        self.down = linear(config.d_ff, config.d_model)

    def forward(self, x):
        # the gate decides, for each of d_ff features, how much of it passes
        gate = F.silu(self.gate(x))
        return self.down(gate * self.up(x))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attn_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attn = Attention(config)
        self.ff_norm = RMSNorm(config.d_model, config.norm_eps)
        self.ff = SwiGLU(config)

    def forward(self, x, rope, kv, kv_positions, pattern, positions=None):
        h = self.attn_norm(x)
        x = x + self.attn(h, rope, kv, kv_positions, pattern)
        if positions is not None:
            # the last block: only the positions to predict need its feed-forward part
            x = x.flatten(0, 1)[positions]                                          # (M, C)
        h = self.ff_norm(x)
        return x + self.ff(h)


class Transformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.recompute = False                  # keep only each block's input, and recompute the rest in backward
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        blocks = [Block(config) for _ in range(config.n_layer)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        # a tied head is the embedding matrix itself
        self.head = None
        if not config.tied:
            self.head = linear(config.d_model, config.vocab_size)

    def forward(self, ids, *, attention_mask=None, kv=None, kv_positions=None,
                cu_seqlens=None, positions=None, targets=None):
        """Predict all tokens: ids (B, T) int64 -> logits (B, T, V).

        attention_mask (B, S): 1 or True for keys that may be attended to, so 0 hides left padding.
        kv (n_layer, 2, B, n_kv_head, S, D): cached keys (rotated) and values, of which kv_positions (T,)
            int64, the positions of the ids on the canvas, are overwritten.
        cu_seqlens (n + 1,) int32: cumulative lengths of the n segments of the flattened batch, as in
            FlashAttention's varlen API. Attention stays inside a segment, and a segment inside a row.
            Positions start anew in each.
        positions (M,) int64 in the flattened batch, or (B, T) bool: predict only these -> (M, V).
        targets (M,) int64: return their cross-entropy in nats instead, (M,) float32.
        """
        config = self.config
        x = self.embed(ids)                                                         # (B, T, C)
        if torch.is_autocast_enabled(x.device.type):
            # a narrow residual stream halves the memory traffic
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if positions is not None and positions.dtype == torch.bool:
            # here, because inside of a block it would break the compiled graph
            positions = positions.flatten().nonzero()[:, 0]

        # where on the canvas, or in its segment, each token stands
        where = kv_positions
        if cu_seqlens is not None:
            _, where = segments_of(ids.shape, cu_seqlens)                           # (B, 1, T)
        elif where is None:
            where = torch.arange(ids.shape[1], device=ids.device)                   # (T,)
        rope = rope_angles(where, config.head_dim, config.rope_theta)
        if not config.rope_fp32:
            rope = tuple(z.to(x.dtype) for z in rope)

        # who attends to whom takes a mask only with padding, segments, or fewer queries than keys
        pattern = dict(causal=config.causal)
        cached_causal = config.causal and kv is not None        # more keys than queries
        if attention_mask is not None or cu_seqlens is not None or cached_causal:
            pattern = self.attention_pattern(x, kv, where, attention_mask, cu_seqlens)
        # every block reads the residual stream, and adds to it
        for i, block in enumerate(self.blocks):
            cache = None if kv is None else kv[i]
            wanted = positions if block is self.blocks[-1] else None
            inputs = (x, rope, cache, kv_positions, pattern, wanted)
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, *inputs, use_reentrant=False)
            else:
                x = block(*inputs)

        # logits, or the loss of each target where no logits need to be kept
        x = self.norm(x)
        head = self.head or self.embed
        if targets is None:
            return F.linear(x, head.weight)
        return head_cross_entropy(x, head.weight, targets)

    def attention_pattern(self, x, kv, where, attention_mask, cu_seqlens):
        """Return who attends to whom as keyword arguments of `attention`, with padding, segments or a cache."""
        causal = self.config.causal
        # CUDA's kernel for segments needs no mask, which is slow, and in cuDNN's backward can return NaN
        if cu_seqlens is not None and x.is_cuda and x.dtype == torch.bfloat16 and not causal:
            return dict(cu_seqlens=cu_seqlens)

        # anything else needs a mask: True where a query may attend to a key
        mask = x.new_ones((), dtype=torch.bool)
        if attention_mask is not None:
            mask = attention_mask.bool()[:, None, None]                             # (B, 1, 1, S)
        if cu_seqlens is not None:
            segment, _ = segments_of(x.shape[:2], cu_seqlens)                       # (B, 1, T)
            same = segment[..., None] == segment[..., None, :]
            mask = mask & same                                                      # (B, 1, T, T)
        if causal:
            S = x.shape[1] if kv is None else kv.shape[-2]
            keys = torch.arange(S, device=x.device)
            queries = keys if kv is None else where
            mask = mask & (keys <= queries[:, None])                                # (B, 1, T, S)

        # a query without any visible key attends to everything, because a softmax over nothing is NaN
        return dict(attn_mask=mask | ~mask.any(-1, keepdim=True))

    def new_kv(self, batch_size, length):
        """Return an empty cache for forward(kv=...): (n_layer, 2, B, n_kv_head, S, D)."""
        c = self.config
        shape = (c.n_layer, 2, batch_size, c.n_kv_head, length, c.head_dim)
        return self.embed.weight.new_zeros(shape)

    def num_params(self, non_embedding=False):
        """Count all parameters, or those outside embedding and head (N in the papers' 6ND)."""
        parts = [self.blocks, self.norm] if non_embedding else [self]
        return sum(p.numel() for part in parts for p in part.parameters())

    def flops_per_token(self, masked_fraction):
        """Return FLOPs per token of a forward and backward pass, with the head on the masked fraction only."""
        c = self.config
        weights = self.num_params(non_embedding=True)
        attention = 2 * c.n_layer * c.d_model * c.seq_len       # the full square, also under a causal mask
        head = c.d_model * c.vocab_size * masked_fraction
        return 6 * (weights + attention + head)


def head_cross_entropy(h, weight, targets):
    """Return cross-entropy of logits h W^T: h (M, C), weight (V, C), targets (M,) -> (M,) float32 or wider."""
    # With a vocabulary of 126,464 the logits would be the largest tensor by far. So at most 2^28 exist (1 GB).
    size = 2 ** 28 // len(weight)
    if len(h) > size:
        return chunked_cross_entropy(h, weight, targets, size)
    # in float32, because the loss weight 1/t multiplies its rounding error by up to 1000
    logits = F.linear(h, weight)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(wide), targets, reduction='none')


def chunked_cross_entropy(h, weight, targets, size):
    """Do the same for `size` positions at a time. Backward makes their logits again."""
    ce = []
    for few_h, few_targets in zip(h.split(size), targets.split(size)):
        ce.append(checkpoint(
            head_cross_entropy, few_h, weight, few_targets, use_reentrant=False))
    return torch.cat(ce)


def segments_of(shape, cu_seqlens):
    """Return the segment number of each packed token and its position there, two tensors (B, 1, T)."""
    B, T = shape
    # which of the borders each token has behind it
    token = torch.arange(B * T, device=cu_seqlens.device).view(B, 1, T)
    ends = cu_seqlens[1:].long()
    segment = torch.bucketize(token, ends, right=True)
    return segment, token - cu_seqlens[segment]


# ----------------------------------------------------------------------------------------------------------
# Fresh weights, and the device they live on


def empty_model(config):
    """Return a Transformer whose parameters take no memory yet."""
    with torch.device('meta'):
        return Transformer(config)


@torch.no_grad()
def init_weights(model, seed=0, emb_std=None, device=None):
    """Initialise the weights. Each matrix has its own seeded generator, so sharding does not change the result.

    The scheme is the one named in the released LLaDA config ("mitchell"; that pre-training used it is
    unconfirmed): a normal distribution truncated at 3 std, with std 1/sqrt(fan_in), and for the two matrices
    of a block that write to the residual stream 1/sqrt(2 * layer) of that. The embedding has std 1/sqrt(C),
    or emb_std if given.
    device: where the matrices are drawn (default: where they live).
    """
    for name, p in model.named_parameters():
        # norms begin as ones, matrices as noise
        full = torch.ones(p.shape, dtype=p.dtype, device=device or p.device)
        if p.dim() == 2:
            std = p.shape[1] ** -0.5
            if name == 'embed.weight' and emb_std:
                std = emb_std
            if name.endswith(('attn.out.weight', 'ff.down.weight')):
                layer = int(name.split('.')[1]) + 1
                std /= (2 * layer) ** 0.5
            # hashed, because torch seeds its CPU generator with 32 bits only
            key = zlib.crc32(f'{seed} {name}'.encode())
            generator = torch.Generator(full.device).manual_seed(key)
            nn.init.trunc_normal_(
                full, 0.0, std, -3 * std, 3 * std,
                generator=generator)
        if hasattr(p, 'placements'):
            # each rank takes its shard, and src_data_rank=None sends nothing, because all have drawn it
            from torch.distributed.tensor import distribute_tensor
            full = distribute_tensor(
                full, p.device_mesh, p.placements,
                src_data_rank=None)
        p.copy_(full)
    return model


def pick_device(device, dtype):
    """Resolve the settings device and dtype, of which 'auto' is a value -> device, torch.dtype to compute in."""
    best = torch.accelerator.current_accelerator(check_available=True)
    available = ['cpu'] if best is None else [best.type, 'cpu']
    if device == 'auto':
        device = available[0]
    if device not in available:
        raise UserError(f'device {device!r} is not available, choose one of: auto, {", ".join(available)}')
    if dtype == 'auto':
        dtype = 'bfloat16' if bfloat16_pays(device) else 'float32'
    if dtype not in ('bfloat16', 'float32'):
        raise UserError(f'dtype must be auto, bfloat16 or float32, got {dtype!r}')
    return device, getattr(torch, dtype)


def bfloat16_pays(device):
    """Tell whether a device is faster in bfloat16 than in float32."""
    if device == 'cuda':
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # a CPU may have bfloat16 and be slower with it, so it is tried
    return device == 'cpu' and product_seconds(torch.float32) > 1.2 * product_seconds(torch.bfloat16)


def product_seconds(dtype):
    """Return the seconds that products as large as those of a small model take on the CPU, at best."""
    x = torch.ones(512, 512, dtype=dtype)
    # the best of five, because other programs disturb
    return min(timeit.repeat(partial(F.linear, x, x), number=2))


# ----------------------------------------------------------------------------------------------------------
# Weights on disk, in the released layouts: config.json and safetensors. train.py writes the same.

# model_type in config.json -> layout, class. A causal model has a type of ours, so nobody takes it for LLaDA.
MODEL_TYPES = {
    'llada': ('llada', 'LLaDAModelLM'),
    'illada': ('illada', 'ILLaDAForCausalLM'),
    'nanollada_ar': ('llada', 'Transformer')}

# Our parameters in the two layouts. In LLaDA's, ff_proj is the gate (SiLU is applied to it), and ff_out names
# two different matrices.
NAMES = '''
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
# The fields of ModelConfig in the two kinds of config.json
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
# Switches of config.json that change the logits, and the only value that is implemented here
SWITCHES = {
    'llada': dict(
        activation_type='silu', block_type='llama',
        layer_norm_type='rms', layer_norm_with_affine=True, bias_for_layer_norm=False,
        rope=True, alibi=False,
        include_bias=False, include_qkv_bias=False,
        attention_layer_norm=False, multi_query_attention=None,
        input_emb_norm=False, scale_logits=False),
    'illada': dict(
        hidden_act='silu',
        attention_bias=False, mlp_bias=False, layer_norm_eps=None,
        rope_scaling=None, partial_rotary_factor=1.0)}
# What only the official code reads: it would default to dropout, which neither paper uses
OFFICIAL = {
    'llada': dict(
        attention_dropout=0.0, embedding_dropout=0.0, residual_dropout=0.0,
        auto_map={'AutoConfig': 'configuration_llada.LLaDAConfig',
                  'AutoModel': 'modeling_llada.LLaDAModelLM',
                  'AutoModelForCausalLM': 'modeling_llada.LLaDAModelLM'}),
    'illada': dict(attention_dropout=0.0, resid_pdrop=0.0, initializer_range=0.02)}
ROLES = ('mask', 'eos', 'pad', 'bos', 'eot')            # special tokens whose ids config.json may hold


def column(table, layout):
    """Return a table as a dict: our name -> the name in this layout, if it has one."""
    # the first line names the layouts
    heads, *rows = [line.split() for line in table.strip().splitlines()]
    number = heads.index(layout)
    return {row[0]: row[number] for row in rows if len(row) > number}


def type_of(config):
    """Return the model_type under which a model is saved."""
    if config.causal:
        return 'nanollada_ar'
    return 'llada' if config.rope_fp32 else 'illada'


def released_parameters(model):
    """Return the parameters of a model by the names under which they are saved."""
    layout, _ = MODEL_TYPES[type_of(model.config)]
    names = column(NAMES, layout)
    released = {}
    for ours, p in model.named_parameters():
        # the table has blocks.{i}.attn.q for blocks.0.attn.q.weight ('' outside of the blocks)
        layer = re.search(r'\d+|$', ours)[0]
        key = ours.removesuffix('.weight').replace(f'.{layer}.', '.{i}.')
        released[names[key].format(i=layer) + '.weight'] = p
    return released


def save_model(model, folder, meta):
    """Write config.json and model.safetensors in LLaDA's layout (iLLaDA's if rope_fp32 is off). Call on all ranks.

    meta: the special ids (mask_id and so on). The tokenizer has a `save` of its own.
    """
    # all weights in full, on the CPU, under the names of the layout
    tensors = {}
    for name, p in released_parameters(model).items():
        # all ranks gather a sharded parameter, and rank 0 writes it
        full = p.full_tensor() if hasattr(p, 'full_tensor') else p
        if not dist.is_initialized() or dist.get_rank() == 0:
            tensors[name] = full.detach().cpu().contiguous()
    if not tensors:
        return

    # config.json, in the words of the layout
    model_type = type_of(model.config)
    layout, class_name = MODEL_TYPES[model_type]
    dtype = str(model.embed.weight.dtype).removeprefix('torch.')
    # what transformers looks at first
    raw = {'model_type': model_type, 'architectures': [class_name], 'torch_dtype': dtype}
    raw |= SWITCHES[layout] | OFFICIAL[layout]
    raw['vocab_size'] = model.config.vocab_size
    for ours, theirs in column(FIELDS, layout).items():
        raw[theirs] = getattr(model.config, ours)
    for role in ROLES:
        raw[f'{role}_token_id'] = meta.get(f'{role}_id')

    # config.json comes last, because it makes the folder a model
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(tensors, folder / 'model.safetensors', metadata={'format': 'pt'})
    (folder / 'config.json').write_text(json.dumps(raw, indent=1))


def open_model(path, device='auto', dtype='auto', compile=False):
    """Load a model for a script, with its settings device and dtype -> model in eval mode, meta (of load_model)."""
    device, compute = pick_device(device, dtype)
    model, meta = load_model(path, device)
    # our own weights are float32, so they are cast to what the device is fast in; released ones stay as stored
    if meta['settings'] or dtype != 'auto':
        model = model.to(compute)
    if compile:
        compile_blocks(model)
    return model, meta


def compile_blocks(model):
    """Let torch.compile make each block of a model when it is first called."""
    # batches, canvases and segments have many shapes
    torch._dynamo.config.recompile_limit = 64
    for block in model.blocks:
        block.compile()


def load_model(path, device='cpu', dtype=None):
    """Load a checkpoint of train.py or released LLaDA or iLLaDA weights -> model in eval mode, meta.

    path: a folder with config.json, or a run of train.py (its newest checkpoint). dtype: None = as stored.
    meta: mask_id, eos_id, pad_id, bos_id, eot_id (None if the files do not say), folder; of a run of train.py
    also its settings and iteration, else {} and None. Raises UserError if it is not a model that this code computes.
    """
    folder = newest_checkpoint(path)
    # a run of train.py has state.json beside the weights, a release has not
    state = read_state(folder)
    raw = read_json(folder / 'config.json')
    model = empty_model(config_from(raw, folder))
    stored = read_headers(folder, model)
    # the parameters get their memory on the device, and then their values ('meta' has neither)
    model = model.to(dtype or stored).to_empty(device=device)
    if device != 'meta':
        read_tensors(folder, released_parameters(model))
    meta = {'folder': str(folder), 'settings': state.get('settings', {}), 'iteration': state.get('iteration')}
    for role in ROLES:
        # some list several EOS, and then the tokenizer says which of them ends a text
        value = raw.get(f'{role}_token_id')
        meta[f'{role}_id'] = None if isinstance(value, list) else value
    return model.eval(), meta


def newest_checkpoint(path):
    """Return the folder with the weights: path itself, or the newest checkpoint of a run."""
    path = Path(path)
    if (path / 'config.json').is_file():
        return path
    folders = list_checkpoints(path)
    if folders:
        return folders[-1]
    # what torch.distributed.checkpoint wrote before
    if any(path.rglob('.metadata')):
        raise UserError(f'{path}: a run of an older version of nanoLLaDA, which cannot be read; train it again')
    found = Path('out').glob('*/iter_*/state.json')
    runs = {str(state.parents[1]) for state in found}
    raise UserError(f'{path}: no checkpoint here; there are: {", ".join(sorted(runs)) or "none"} '
                    '(python train.py config/docs.py makes out/docs)')


def list_checkpoints(run):
    """Return the checkpoint folders of a run, oldest first. (An unfinished one or your own copy has another name.)"""
    states = Path(run).glob('iter_' + 7 * '[0-9]' + '/state.json')
    return sorted(state.parent for state in states)


def config_from(raw, folder):
    """Turn a config.json into ModelConfig. What this code does not compute is refused by its name."""
    model_type = raw.get('model_type')
    if model_type not in MODEL_TYPES:
        raise UserError(f'{folder}: model_type {model_type!r} is not one of {", ".join(MODEL_TYPES)}')
    layout, _ = MODEL_TYPES[model_type]
    # what config.json says, by our names
    fields = column(FIELDS, layout)
    values = {}
    for ours, theirs in fields.items():
        if raw.get(theirs) is not None:
            values[ours] = raw[theirs]

    # what some releases leave out, or keep elsewhere
    rope = raw.get('rope_parameters') or {}
    values.setdefault('rope_theta', rope.get('rope_theta'))
    values.setdefault('n_kv_head', values.get('n_head'))
    if layout == 'illada':
        values['rope_fp32'] = False

    # nothing is guessed, because a wrong rope_theta makes a model a little worse without a word
    missing = [theirs for ours, theirs in fields.items() if values.get(ours) is None]
    if missing:
        raise UserError(f'{folder}/config.json: {", ".join(missing)} missing')
    for name, only in SWITCHES[layout].items():
        if raw.get(name) not in (None, only):
            raise UserError(f'{folder}/config.json: {name} = {raw[name]!r} is not supported, only {only!r}')
    plain = {'rope_theta': values['rope_theta'], 'rope_type': 'default'}
    if not rope.items() <= plain.items():
        raise UserError(f'{folder}/config.json: rope_parameters = {rope} is not supported')
    return ModelConfig(**values, causal=model_type == 'nanollada_ar')


def read_headers(folder, model):
    """Compare names and shapes of the stored tensors with those of a model -> dtype in which they are stored."""
    # rotary frequencies follow from rope_theta, and a tied head may be stored, too
    heads = ('lm_head.weight', 'transformer.ff_out.weight')
    ignored = ('.inv_freq', *heads)
    expected = {name: list(p.shape) for name, p in released_parameters(model).items()}
    stored = {}
    first_rows = {}
    # all files, because torch reads all
    for file in sorted(folder.glob('*.safetensors')):
        try:
            with safetensors.safe_open(file, 'pt') as opened:
                for name in opened.keys():
                    if name in stored:
                        raise UserError(f'{file}: {name} is in another file, too')
                    tensor = opened.get_slice(name)         # its header, not its values
                    strange = file.name.startswith('model') and not name.endswith(ignored)
                    first_rows[name] = tensor[:1]
                    if name in expected or strange:
                        stored[name] = tensor.get_shape()
        except safetensors.SafetensorError as error:
            raise UserError(f'{file}: damaged or incomplete ({error})') from None

    # a tied head must be the embedding, which is the first parameter
    embedding = next(iter(expected))
    for name in first_rows.keys() - stored.keys():
        row = first_rows[name]
        if name.endswith(heads) and not row.equal(first_rows.get(embedding, row)):
            stored[name] = 'not the embedding'

    names = expected.keys() | stored.keys()
    wrong = [name for name in names if stored.get(name) != expected.get(name)]
    if wrong:
        # one example says more than a list of hundreds
        name = min(wrong)
        raise UserError(f'{folder}: {len(wrong)} tensors do not fit: {name} is {stored.get(name, "missing")}, '
                        f'by config.json {expected.get(name, "missing")}')
    # of several dtypes the widest, so that nothing is rounded
    dtypes = [first_rows[name].dtype for name in stored]
    return reduce(torch.promote_types, dtypes)


def read_tensors(folder, tensors):
    """Fill tensors (name -> tensor or DTensor) from the safetensors files of a folder; each rank reads its part."""
    import torch.distributed.checkpoint as dcp
    reader = dcp.HuggingFaceStorageReader(str(folder))
    dcp.load(tensors, storage_reader=reader)


def read_state(folder):
    """Return state.json of a checkpoint of train.py ({} for released weights) after comparing all checksums."""
    state = read_json(folder / 'state.json')
    # a flipped bit would go unnoticed for the rest of the training
    for name, sha256 in state.get('sha256', {}).items():
        file = folder / name
        # (optimizer/ may be left out when weights are passed on)
        if (file.is_file() or not name.startswith('optimizer')) and file_sha256(file) != sha256:
            raise UserError(f'{file}: damaged (its checksum is not the one in state.json)')
    return state


def file_sha256(path):
    """Return the checksum of a file of any size, as a hexadecimal string ('' if it is empty)."""
    # mapped into memory, not read
    return hashlib.sha256(np.memmap(path, mode='r')).hexdigest() if path.stat().st_size else ''
