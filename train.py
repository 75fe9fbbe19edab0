"""Trains a mask predictor (or, with --causal=true, the autoregressive baseline), on a laptop or on many GPUs.

    python train.py                                     # the default: config/docs.py, minutes on two CPU cores
    python train.py --resume                            # goes on where the newest checkpoint of out_dir stopped
    torchrun --nproc-per-node=8 train.py config/llada_8b.py --dataset=data/my

The objective is Eq. 3 of LLaDA (arXiv 2502.09992v3), or Eq. 5 on examples (masking = 'response', config/sft_toy.py).
Data and noise of a row are functions of (seed, iteration, row): a
resumed run ends with the same bits, and any number of processes and split of the batch see the same rows and masks.

More lines than 600: one process or a thousand is the same loop, and a second file for the many would hide that.
"""

import bisect
import json
import math
import os
import platform
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import data
import diffusion
import model as models
from configurator import Log, Stop, alone, command, configure, fail, user_errors

# --- run
out_dir = 'out/docs'            # checkpoints (iter_*/) and log.jsonl
resume = False                  # continue from the newest checkpoint in out_dir
init_from = ''                  # start from weights of this checkpoint or released folder (new optimizer, iteration 0)
seed = 1337                     # of the weights, the order of the data, and the noise
# --- data
dataset = 'docs'                # a name that `python data.py` lists, a folder that it wrote, or a mixture 'a:0.7,b:0.3'
verify_data = True              # check the sha256 of every shard at the start (1-2 GB/s)
random_length = 0.0             # share of windows of which only a random length is kept (LLaDA: 0.01)
random_split = 0.0              # share of windows split into two that do not see each other (iLLaDA: 0.3)
isolate = False                 # attention stays within a document or example of the window (iLLaDA's packing)
masking = 'unified'             # 'unified': windows, all tokens may be hidden; 'response': examples, prompts are not
# --- model (the fields of model.ModelConfig)
seq_len = 128                   # tokens in a training window
n_layer = 4                     # blocks
n_head = 4                      # attention heads
n_kv_head = 4                   # key/value heads; fewer is grouped-query attention
d_model = 192                   # width of the residual stream
d_ff = 512                      # width inside the SwiGLU
vocab_size = 0                  # rows of embedding and head; 0: as many as the tokenizer of the data has
rope_theta = 10000.0            # base of the rotary frequencies (500000 in LLaDA, whose context is 4096)
norm_eps = 1e-5                 # of RMSNorm
rope_fp32 = True                # rotate queries and keys in float32 (LLaDA); False: in their own dtype (iLLaDA)
tied = False                    # the head shares the embedding matrix
causal = False                  # True: the autoregressive baseline
locality = 2.0                  # strength of an initial look at neighbours (model.look_nearby); 0 is the papers' init
emb_std = 1.0                   # std of the initial embedding; 0 takes 1/sqrt(d_model), as OLMo and the LLaDA config do
# --- objective
count_form = True               # hide exactly l of L tokens, weight L/l; False: each with chance t, weight 1/t (Eq. 3)
stratified = True               # one t in each of B equal slices; False: i.i.d., as in LLaDA's guideline
mask_eps = 1e-3                 # smallest t when count_form is off
# --- optimizer
optimizer = 'muon'              # 'muon': torch.optim.Muon on the matrices of the blocks, AdamW elsewhere; or 'adamw'
learning_rate = 2e-2            # AdamW's peak
muon_lr = 5e-3                  # Muon's peak
beta1 = 0.9                     # AdamW
beta2 = 0.95                    # AdamW
weight_decay = 0.1              # on matrices; with Muon on those of the blocks only
grad_clip = 1.0                 # largest gradient norm; 0 turns clipping off
# --- schedule
max_iters = 1500                # optimizer updates
flops = 0.0                     # above 0: as many updates as this many training FLOPs pay for, whatever max_iters says
batch_size = 16                 # windows in one forward pass of one process
global_batch = 0                # windows in one update, over all processes and forward passes; 0: batch_size
schedule = 'cosine'             # 'cosine'; 'wsd': warm up, stay, decay linearly over decay_iters; 'points': lr_points
warmup_iters = 50               # linear from 0
decay_iters = 300               # wsd only
min_lr_ratio = 0.0              # the last learning rate as a part of the peak
lr_points = []                  # [[tokens, rate], ...], straight lines between; [.., 'cosine'] bends the way to a point
# --- reports
eval_interval = 250             # iterations between checkpoints, each with its validation bound and a sample
eval_windows = 256              # validation windows in that bound (all, if there are fewer)
eval_draws = 4                  # masks drawn for each of them
log_interval = 10               # iterations between lines of log.jsonl
keep_last = 2                   # newest checkpoints to keep, besides the best
sample_tokens = 64              # length of the sample shown at each evaluation; 0 shows none
async_save = False              # write checkpoints in a thread, from a copy in host memory
then = ''                       # what to type next, shown at the end
dry_run = False                 # print parameters, memory, steps and days, allocate nothing, and stop
gpus = 0                        # GPUs in the dry run; 0: as many as there are processes
gpu_gb = 80                     # memory of one of them in GB, for the dry run
assumed_mfu = 0.4               # share of the peak FLOPs that the dry run reckons with
# --- machine
device = 'auto'                 # 'cuda', 'mps' or 'cpu'; auto takes the first there is
dtype = 'auto'                  # 'bfloat16' or 'float32' for activations; auto: bfloat16 where the hardware has it
compile = False                 # torch.compile each block (on CPU needs a C++ compiler and half a minute)
fsdp = 0                        # 0: DDP; -1: parameters sharded over all processes; k: over groups of k, copies between
act_memory = 1.0                # share of a block's activations kept for the backward pass; 0 keeps its input only

# dense bfloat16 FLOP/s by the data sheets (SXM unless named); others print no MFU
PEAKS = ('H100 PCIe', 756e12), ('H100', 989e12), ('H200', 989e12), ('H800', 989e12), ('A100', 312e12), ('A800', 312e12)
SHAPE = [f.name for f in fields(models.ModelConfig) if f.name != 'vocab_size']

# ---------------------------------------------------------------------------------------------------------------------


def check(cfg):
    """Ranges of the settings; raises ValueError with every problem, one a line."""
    wrong = []
    for keys, fits, says in (
            ('seq_len max_iters batch_size eval_interval eval_windows eval_draws log_interval keep_last learning_rate '
             'muon_lr gpu_gb assumed_mfu', lambda v: v > 0, 'above 0'),
            ('seed warmup_iters decay_iters grad_clip weight_decay sample_tokens emb_std locality global_batch '
             'vocab_size gpus', lambda v: v >= 0, '0 or more'),
            ('fsdp', lambda v: v >= -1, '-1, 0 or the size of a group'),
            ('mask_eps min_lr_ratio beta1 beta2', lambda v: 0 <= v < 1, 'in [0, 1)'),
            ('random_length random_split act_memory', lambda v: 0 <= v <= 1, 'in [0, 1]')):
        wrong += [f'{key} must be {says}, got {getattr(cfg, key)}' for key in keys.split()
                  if not fits(getattr(cfg, key))]
    for key, allowed in (('optimizer', ('muon', 'adamw')), ('schedule', ('cosine', 'wsd', 'points')),
                         ('masking', ('unified', 'response'))):
        if getattr(cfg, key) not in allowed:
            wrong.append(f'{key} must be one of {", ".join(allowed)}, got {getattr(cfg, key)!r}')
    if cfg.seed >= 2 ** 62 or not cfg.out_dir:
        wrong.append(f'seed must be below 2^62 and out_dir not empty, got {cfg.seed} and {cfg.out_dir!r}')
    if cfg.tied and cfg.emb_std:
        wrong.append(f'a tied head is as large as the embedding: set emb_std=0, got {cfg.emb_std}')
    if cfg.init_from and cfg.resume:
        wrong.append('init_from starts a new run, resume continues one: give only one of them')
    if cfg.causal and (cfg.random_length or cfg.random_split or cfg.isolate):
        wrong.append('random_length, random_split and isolate are for diffusion, causal is not')
    if cfg.masking == 'response' and (cfg.random_length or cfg.random_split or cfg.isolate):
        wrong.append("random_length, random_split and isolate cut windows; masking = 'response' has one example a row")
    if cfg.masking == 'response' and cfg.flops:
        wrong.append("flops counts windows of seq_len tokens; with masking = 'response' give max_iters")
    points = [p for p in cfg.lr_points if isinstance(p, list) and len(p) > 1 and p[2:] in ([], ['cosine'])
              and all(type(x) in (int, float) and x >= 0 for x in p[:2])]
    ordered = points == cfg.lr_points == sorted(points, key=lambda p: p[0])
    if not ordered or (cfg.schedule == 'points') != bool(points):
        wrong.append("lr_points goes with schedule = 'points' and holds [tokens, rate] in order of tokens (in a config "
                     f"file), got {cfg.lr_points}")
    if wrong:
        raise ValueError('\n'.join(wrong))


def accumulation(cfg, world):
    """Forward passes of each process in one update; refuses a batch that does not divide, and says what would."""
    total = cfg.global_batch or cfg.batch_size
    if total % (cfg.batch_size * world):
        up_to = range(1, min(total, 10 ** 5) + 1)
        batches = [b for b in up_to if total % (b * world) == 0]
        ranks = [n for n in up_to if total % (cfg.batch_size * n) == 0]
        near = sorted(ranks, key=lambda n: abs(n - world))[:2]
        raise ValueError(
            f'global_batch: {total} windows do not divide into {world} processes x batch_size {cfg.batch_size} '
            f'({total / (cfg.batch_size * world):.4g} forward passes each); what would: '
            + '; '.join([*([f'batch_size {" or ".join(map(str, batches[-4:]))}'] if batches else []),
                         *([f'{" or ".join(map(str, sorted(near)))} processes'] if near else [])]))
    return total // (cfg.batch_size * world)


def lr_at(tokens, points):
    """The learning rate after `tokens` tokens: straight lines, or half a cosine, between points; equal tokens jump."""
    i = bisect.bisect_right([p[0] for p in points], tokens)
    if i == 0 or i == len(points):
        return points[max(i - 1, 0)][1]
    (x0, y0), (x1, y1) = points[i - 1][:2], points[i][:2]
    part = (tokens - x0) / (x1 - x0)
    if points[i][2:] == ['cosine']:
        part = 0.5 - 0.5 * math.cos(math.pi * part)
    return y0 + (y1 - y0) * part


def lr_factor(it, cfg):
    """The learning rate of update `it` (0-based) as a part of the peak: a pure function, so nothing need be saved."""
    if cfg.schedule == 'points':
        return lr_at((it + 1) * (cfg.global_batch or cfg.batch_size) * cfg.seq_len, cfg.lr_points) / cfg.learning_rate
    warm = min(1.0, (it + 1) / cfg.warmup_iters) if cfg.warmup_iters else 1.0
    if cfg.schedule == 'cosine':
        progress = min(1.0, max(0, it - cfg.warmup_iters) / max(1, cfg.max_iters - cfg.warmup_iters))
        height = 0.5 + 0.5 * math.cos(math.pi * progress)
    else:
        height = min(1.0, (cfg.max_iters - it) / cfg.decay_iters) if cfg.decay_iters else 1.0
    return warm * (cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * height)


def make_optimizers(model, cfg, device):
    """[AdamW], or [Muon for the blocks' matrices, AdamW for embedding, head and norms]; peaks in group['peak']."""
    fused = {'fused': True} if device in ('cuda', 'cpu') else {}
    blocks = [p for p in model.blocks.parameters() if p.dim() == 2]
    ours = {id(p) for p in blocks} if cfg.optimizer == 'muon' else set()
    rest = [p for p in model.parameters() if id(p) not in ours]
    decay = 0.0 if cfg.optimizer == 'muon' else cfg.weight_decay
    groups = [{'params': [p for p in rest if p.dim() == 2], 'weight_decay': decay},
              {'params': [p for p in rest if p.dim() < 2], 'weight_decay': 0.0}]
    optimizers = [torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2), **fused)]
    if cfg.optimizer == 'muon':
        optimizers.insert(0, torch.optim.Muon(blocks, lr=cfg.muon_lr, momentum=0.95, weight_decay=cfg.weight_decay,
                                              adjust_lr_fn='match_rms_adamw'))
    for o in optimizers:
        for group in o.param_groups:
            group['peak'] = group['lr']
    return optimizers


# ---------------------------------------------------------------------------------------------------------------------
# Processes, and one update by all of them


def join(cfg):
    """This process among the others: rank, world, device, autocast. torchrun tells the numbers."""
    device, autocast = models.pick_device(cfg.device, cfg.dtype)
    restarts = int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0))
    rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    me = SimpleNamespace(rank=rank, world=world, restarted=restarts > 0, device=device, autocast=autocast,
                         bf16=isinstance(autocast, torch.autocast))
    if me.world > 1 and not dist.is_initialized():
        if device == 'cuda':
            torch.cuda.set_device(int(os.environ['LOCAL_RANK']))
        # A restarted group must not meet the addresses of the one before, which torchrun's store still holds. (Nodes
        # count restarts each for itself; for many of them README names a switch of torchrun that makes new stores.)
        turn = restarts if os.environ.get('LOCAL_WORLD_SIZE') == str(me.world) else 0
        store = dist.PrefixStore(f'turn {turn}', next(dist.rendezvous('env://'))[0])
        backend = 'cpu:gloo,cuda:nccl' if device == 'cuda' else 'gloo'
        dist.init_process_group(backend, store=store, rank=me.rank, world_size=me.world)
    me.examples, me.skipped = None, torch.zeros((), device=device)  # updates whose gradients were not finite
    me.saver = dist.new_group(backend='gloo') if me.world > 1 else None     # saving in a thread needs its own line
    return me


def any_of(me, number):
    """The largest of the processes' numbers, known to all: has one of them got a signal?"""
    number = torch.tensor(int(number or 0))                         # on the host: the GPU's queue is not waited for
    if me.world > 1:
        dist.all_reduce(number, dist.ReduceOp.MAX)
    return int(number)


def agree(me, *value):
    """What rank 0 says, on every rank; and nobody goes on before it."""
    box = [*value, None]
    if me.world > 1:
        dist.broadcast_object_list(box)
    return box[0]


def build(cfg, me, vocab_size):
    """The model with its weights spread as cfg.fsdp says and still empty: -> (model, what to call in training)."""
    with torch.device('meta'):
        model = models.Transformer(models.ModelConfig(vocab_size=vocab_size, **{f: getattr(cfg, f) for f in SHAPE}))
    model.recompute = cfg.act_memory < 1 and (cfg.act_memory == 0 or not cfg.compile)
    for block in model.blocks if cfg.compile else ():
        from torch._functorch import config as functorch
        functorch.activation_memory_budget = cfg.act_memory or 1.0
        block.compile()
    if me.world > 1 and cfg.fsdp:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
        k = me.world if cfg.fsdp < 0 else cfg.fsdp
        if me.world % k:
            raise ValueError(f'fsdp: groups of {k} do not divide {me.world} processes')
        mesh = init_device_mesh(me.device, (me.world,)) if k == me.world else init_device_mesh(
            me.device, (me.world // k, k), mesh_dim_names=('replicate', 'shard'))
        # inputs are not cast: rotary angles and loss weights stay float32
        narrow = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if me.bf16 else None, reduce_dtype=torch.float32,
                                      cast_forward_inputs=False)
        for part in (*model.blocks, model):                         # the root's own: embedding, last norm, head
            fully_shard(part, mesh=mesh, mp_policy=narrow)
        me.autocast = nullcontext()                                 # the policy narrows instead
    model.to_empty(device=me.device)
    if me.world > 1 and not cfg.fsdp:
        return model, torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    return model, model


def micro_batches(corpus, cfg, it, tok, me=None, examples=None):
    """Data and noise of update `it` for one process: [(ids, rows, targets, weights, cu_seqlens, t of each target)].

    Row r of the global batch is sample it * batch + r of the data stream, with the noise of (seed, it, r). examples: of
    data.open_examples, for masking = 'response'.
    """
    rank, world = (me.rank, me.world) if me else (0, 1)
    size, T, out = cfg.global_batch or cfg.batch_size, cfg.seq_len, []
    samples = [it * size + r for r in range(size)]
    if examples is None:
        cuts = data.draw_cuts(cfg.seed, it, size, T, cfg.random_length, cfg.random_split)
        norm = dict(per='token', total=size * T - int((T + cuts[cuts < 0]).sum()))      # b L of Eq. 3, less cut tails
    else:
        drawn, norm = data.draw_examples(examples, samples, cfg.seed), dict(per='sequence', total=size)         # Eq. 5
        T = int((drawn[:, 2] - drawn[:, 0]).max())                  # the longest of the update, on whatever process
    t = diffusion.sample_t(size, 0.0 if cfg.count_form else cfg.mask_eps, cfg.stratified,
                           diffusion.keyed_generator(cfg.seed, it))
    for start in range(rank * cfg.batch_size, size, world * cfg.batch_size):
        rows = slice(start, start + cfg.batch_size)
        x0, maskable, cu_seqlens = data.example_batch(corpus, 'train', drawn[rows], tok.eos_id, T) if examples else \
            data.batch(corpus, 'train', samples[rows], T, cfg.seed, cuts[rows], tok.eos_id if cfg.isolate else None)
        if cfg.causal:
            out.append((*diffusion.ar_terms(x0, maskable, tok.eos_id, **norm), None, None))
            continue
        u = diffusion.row_noise(cfg.seed, it, range(start, start + cfg.batch_size), T)
        _, masked = diffusion.forward_process(x0, t[rows], tok.mask_id, maskable, exact=cfg.count_form, u=u)
        terms = diffusion.loss_terms(x0, maskable, tok.mask_id, t[rows], masked, exact=cfg.count_form, **norm)
        out.append((*terms, cu_seqlens, t[rows][terms[1] // T]))
    return out


def prefetched(make, it, pin):
    """make(it), make(it + 1), ...: each is made in a thread while the one before is in use."""
    def work(i):
        return [tuple(z.pin_memory() if pin and z is not None else z for z in piece) for piece in make(i)]
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(work, it)
        while True:
            now, it = coming.result(), it + 1
            coming = pool.submit(work, it)
            yield now


def train_step(net, optimizers, pieces, cfg, it, me):
    """One update -> (loss in nats per token, gradient norm, cross-entropy sums and counts by t (2, 4)), as tensors.

    If they are not finite there is no update: FloatingPointError is raised, or on a GPU, where the host would have to
    wait, fused AdamW skips it and the loop raises at its next report.
    """
    loss, bins = torch.zeros((), device=me.device), torch.zeros(2, 4, device=me.device)
    for i, piece in enumerate(pieces):
        ids, rows, targets, weights, cu_seqlens, t = (z if z is None else z.to(me.device, non_blocking=True)
                                                      for z in piece)
        ce = torch.zeros(rows.shape, device=me.device)
        if hasattr(net, 'require_backward_grad_sync'):              # DDP: gradients travel with the last piece only
            net.require_backward_grad_sync = i == len(pieces) - 1
        with me.autocast:
            part = net(ids, rows=rows, targets=targets, weights=weights, ce=ce, cu_seqlens=cu_seqlens)      # Eq. 3
        (part * me.world).backward()                                # DDP and FSDP average over processes: undo that
        loss += part.detach()
        if t is not None:
            bins.index_add_(1, (t * 4).long().clamp(max=3), torch.stack((ce, torch.ones_like(ce))))
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), cfg.grad_clip or math.inf)
    norm = norm.full_tensor() if hasattr(norm, 'full_tensor') else norm
    bad, later = ~norm.isfinite(), me.device == 'cuda' and cfg.optimizer == 'adamw'       # the norm is everybody's
    me.skipped += bad
    if not later and bad.item():
        raise FloatingPointError(f'iteration {it + 1}: loss {loss.item()}, gradient norm {norm.item()}; '
                                 'no update was made')
    for o in optimizers:
        for group in o.param_groups:
            group['lr'] = group['peak'] * lr_factor(it, cfg)
        o.found_inf = bad.float() if later else None                # the fused kernel looks at it on the device
        o.step()
        o.zero_grad(set_to_none=True)
    return loss, norm, bins


@torch.no_grad()
def validate(model, windows, cfg, tok, me):
    """Nats per maskable token and bits per byte of validation rows, each with its standard error, by all processes."""
    model.eval()
    n = len(windows[0])
    share = -(-n // me.world)                                    # equal parts: all call the model equally often
    mine = (torch.arange(share) + me.rank * share).clamp(max=n - 1)
    x0, maskable = (z[mine].to(me.device) for z in windows[:2])
    with me.autocast:
        size = dict(batch_size=cfg.batch_size)                      # logits are made: no more than training's passes
        logp = diffusion.ar_log_prob(model, x0, maskable, bos_id=tok.eos_id, **size).cpu() if cfg.causal else \
            diffusion.bound_per_row(model, x0, maskable, tok.mask_id, draws=cfg.eval_draws, first=int(mine[0]), **size)
    if me.world > 1:
        parts = [torch.empty_like(logp) for _ in range(me.world)]
        dist.all_gather(parts, logp)
        logp = torch.cat(parts)[:n]
    model.train()
    values = [-logp / windows[1].sum(1), -logp / windows[2] / math.log(2)]
    return [x for z in values for x in (z.mean().item(), (z.std() / n ** 0.5).item() if n > 1 else math.nan)]


def sample_text(model, cfg, tok, me, it):
    """A sample on one line: random remasking at temperature 1 draws from the model, where low-confidence would not."""
    start = [tok.bos_id] if cfg.masking == 'response' else []
    model.eval()
    with me.autocast, torch.compiler.set_stance('force_eager'):     # other shapes: not worth compiling
        (row,), _ = diffusion.complete(
            model, [start], max(1, min(cfg.sample_tokens, cfg.seq_len) - len(start)), tok, temperature=1.0,
            remasking='random',            generator=diffusion.keyed_generator(cfg.seed, it, device=me.device),
            suppress=tok.unused(model.config.vocab_size))
    model.train()
    return ''.join(c if c.isprintable() else '\\n' if c == '\n' else ' ' for c in tok.decode(row[len(start):]))


def needs(cfg, model, gpus):
    """What a run on `gpus` GPUs needs, reckoned: a list of (what, GB on each GPU), good to a tenth or so.

    Activations are counted in units of d_model * 2 bytes per token and layer, as measured for a compiled block: 19 all
    kept, 8 with act_memory 0.5, 6 with 0.2, 1 with 0 (and one block recomputed); without compile 28.
    """
    c, n, block = model.config, model.num_params(), model.num_params(non_embedding=True) / model.config.n_layer
    shard = 1 if not cfg.fsdp or gpus == 1 else gpus if cfg.fsdp < 0 else cfg.fsdp
    rows, full = cfg.batch_size * cfg.seq_len, 19 if cfg.compile else 28
    units = np.interp(cfg.act_memory, [0, 0.2, 0.5, 1], [1, 6, 8, 19]) if cfg.compile else full ** (cfg.act_memory == 1)
    kept = units * c.n_layer + (full if units == 1 else 0)
    copies = 2 * (n - block * c.n_layer) + 12 * block if shard > 1 else 2 * n
    return [('parameters, float32', 4 * n / shard / 1e9), ('gradients, float32', 4 * n / shard / 1e9),
            ('optimizer', (8 if cfg.optimizer == 'adamw' else 5) * n / shard / 1e9),
            ('bfloat16 copies and shards in flight', copies / 1e9),
            ('logits and gradient of the head', c.vocab_size * (min(2048, rows) * 8 + c.d_model * 6) / 1e9),
            ('activations', kept * rows * c.d_model * 2 / 1e9), ('CUDA, NCCL, fragmentation', 5.0)]


def dry_run_report(cfg, world):
    """Prints what the settings would take, without taking it."""
    with torch.device('meta'):
        model = models.Transformer(models.ModelConfig(cfg.vocab_size or 2 ** 15, **{f: getattr(cfg, f) for f in SHAPE}))
    gpus = cfg.gpus or world
    if gpus % max(cfg.fsdp, 1):
        raise ValueError(f'fsdp: groups of {cfg.fsdp} do not divide {gpus} GPUs')
    passes, size = accumulation(cfg, gpus), (cfg.global_batch or cfg.batch_size) * cfg.seq_len
    outside, parts = model.num_params(non_embedding=True), needs(cfg, model, gpus)
    print(f'parameters        {model.num_params():,} ({outside:,} outside embedding and head)')
    print('\n'.join(f'{gb:9.1f} GB      {what}' for what, gb in parts))
    total = sum(gb for _, gb in parts)
    verdict = 'fits into' if total <= cfg.gpu_gb * 2 ** 30 / 1e9 else 'does not fit into'
    flops = model.flops_per_token(1.0 if cfg.causal else 0.5) * cfg.max_iters * size
    seconds = flops / (gpus * 989e12 * cfg.assumed_mfu)
    print(f'{total:9.1f} GB      on each of {gpus} GPUs: {verdict} {cfg.gpu_gb} GiB\n'
          f'update            {size:,} tokens: {gpus} GPUs x {passes} passes x {cfg.batch_size} windows\n'
          f'run               {cfg.max_iters:,} updates, {cfg.max_iters * size / 1e9:,.1f} G tokens, {flops:.2e} FLOP\n'
          f'time              {seconds / 86400:,.1f} days, {seconds * gpus / 3600:,.0f} GPU hours at '
          f'{cfg.assumed_mfu:.0%} of 989 TFLOP/s (assumed, not measured)')


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: a new folder each, by torch.distributed.checkpoint, complete once it bears its final name


def run_state(model, optimizers):
    """Every tensor of a run by name: weights and optimizer state, in place, sharded as they are."""
    name_of = {id(p): name for name, p in model.named_parameters()}
    state = {f'model.{name}': p.data for name, p in model.named_parameters()}
    for o in optimizers:
        for p, entries in o.state.items():
            state.update({f'optim.{name_of[id(p)]}.{key}': value for key, value in entries.items()})
    return state


def save_checkpoint(run, it, model, optimizers, cfg, tok, corpus, me, last=False):
    """Writes run/iter_N unless it is there, aside until it is complete; with async_save in a thread, but the last."""
    import torch.distributed.checkpoint as dcp
    final, spec = run / f'iter_{it:07d}', corpus.manifest['tokenizer']
    aside = run / f'{final.name}.tmp'
    manifest = {'format': 'nanollada 2', 'iteration': it, 'model': vars(model.config), 'config': vars(cfg),
                'tokenizer': spec, 'tokens': it * (cfg.global_batch or cfg.batch_size) * cfg.seq_len,
                'ids': {f'{k}_id': getattr(tok, f'{k}_id') for k in ('mask', 'eos', 'pad', 'bos')}}

    def complete(written):
        """What torch wrote gets its checksums, then its name: on rank 0, when all ranks have written."""
        written()
        if me.rank == 0:
            if spec.endswith('.json'):
                shutil.copyfile(corpus.folder / spec, aside / 'tokenizer.json')
            manifest['files'] = {f.name: models.file_sha256(f) for f in sorted(aside.iterdir())}
            (aside / 'manifest.json').write_text(json.dumps(manifest, indent=1), encoding='utf-8')
            shutil.rmtree(final, ignore_errors=True)
            os.replace(aside, final)

    with models.quiet(f'{run}: a checkpoint could not be written'):
        if me.saving:
            me.saving.result()                                      # the one before
        if agree(me, final.exists()):
            return
        if me.rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        agree(me)                                                   # nobody writes before the folder is there
        write = dcp.async_save if cfg.async_save else dcp.save
        done = write(run_state(model, optimizers), checkpoint_id=aside, no_dist=me.world == 1, process_group=me.saver)
        me.saving = me.pool.submit(complete, done.result if cfg.async_save else lambda: None)
        if last or not cfg.async_save or it == cfg.max_iters:
            me.saving.result()
            agree(me)


def load_checkpoint(run, model, optimizers, me):
    """Restores the newest undamaged checkpoint of a run -> its iteration and settings."""
    found = None
    for folder in reversed(models.find_checkpoints(run)) if me.rank == 0 else ():
        try:
            found = folder, models.read_checkpoint(folder)
            break
        except models.Damaged as e:
            print(f'passing over {folder}: {e}', file=sys.stderr)
            shutil.rmtree(folder.with_name(folder.name + '.damaged'), ignore_errors=True)
            os.replace(folder, folder.with_name(folder.name + '.damaged'))      # its iteration will be saved anew
    found = agree(me, found)
    if found is None:
        raise FileNotFoundError(f'{run}: no checkpoint to resume from')
    folder, manifest = found
    ours = vars(model.config)
    differ = [f'{k} {v} here, {ours[k]} asked' for k, v in manifest['model'].items() if ours.get(k) != v]
    made, asked = manifest['config'].get('optimizer'), 'muon' if len(optimizers) == 2 else 'adamw'
    if differ or made != asked:
        raise ValueError(f'{folder}: another architecture ({"; ".join(differ)})' if differ else
                         f'{folder}: made with another optimizer ({made} here, {asked} asked)')
    for o in optimizers:                                            # an update by nothing gives each its tensors
        for group in o.param_groups:
            group['lr'] = 0.0
            for p in group['params']:
                p.grad = torch.zeros_like(p)
        o.step()
        o.zero_grad(set_to_none=True)
    models.read_tensors(folder, manifest, run_state(model, optimizers))
    return manifest['iteration'], manifest['config']


def prune(run, keep_last):
    """Removes checkpoints but the newest and the one that best.json names."""
    best = json.loads((run / 'best.json').read_text())['iteration'] if (run / 'best.json').is_file() else 0
    for folder in models.find_checkpoints(run)[:-keep_last]:
        if int(folder.name[5:]) != best:
            shutil.rmtree(folder)


def held_out(cfg, corpus, tok, me):
    """Validation rows (x0, maskable), and how many bytes of text one of them has; me.examples, if rows are examples."""
    if cfg.masking == 'unified':
        windows = data.all_windows(corpus, 'val', cfg.seq_len, cfg.eval_windows)
        data.batch(corpus, 'train', [0], cfg.seq_len, cfg.seed)                         # too little text shows here
        return windows, torch.ones_like(windows, dtype=torch.bool), cfg.seq_len * data.bytes_per_token(corpus, 'val')
    me.examples = data.open_examples(corpus, 'train', cfg.seq_len)
    x0, maskable = data.all_examples(corpus, 'val', cfg.seq_len, tok.eos_id, cfg.eval_windows)
    text = tok.decode_bytes(i for i in x0[maskable].tolist() if i not in (tok.eos_id, tok.pad_id))
    return x0, maskable, len(text) / len(x0)


def prepare_run(cfg):
    """What can be refused is refused here, before the first file is written."""
    me = join(cfg)
    accumulation(cfg, me.world)
    run = Path(cfg.out_dir)
    there = agree(me, bool(models.find_checkpoints(run)))           # as rank 0 sees it: file systems are not in step
    cfg.resume = cfg.resume or there and any_of(me, me.restarted) > 0                  # torchrun has started all anew
    if there and not cfg.resume:
        raise ValueError(f'{run} already holds a run: continue it with --resume, or choose another --out_dir')
    agree(me, me.rank == 0 and bool(data.open_dataset(cfg.dataset, False)))     # rank 0 first: it may have to make it
    corpus = data.open_dataset(cfg.dataset, cfg.verify_data and (me.rank, me.world))
    tok = data.corpus_tokenizer(corpus)
    if cfg.vocab_size and cfg.vocab_size < corpus.manifest['vocab_size']:
        raise ValueError(f"vocab_size must hold the {corpus.manifest['vocab_size']} tokens of {cfg.dataset}, "
                         f'got {cfg.vocab_size}')
    model, net = build(cfg, me, cfg.vocab_size or corpus.manifest['vocab_size'])
    if cfg.flops:
        update = (cfg.global_batch or cfg.batch_size) * cfg.seq_len * model.flops_per_token(1.0 if cfg.causal else 0.5)
        cfg.max_iters = max(1, round(cfg.flops / update))
    if cfg.init_from:
        start, meta = models.load_model(cfg.init_from)
        data.same_tokenizer(data.tokenizer_for(meta), tok, cfg.init_from, corpus.folder)
        if replace(start.config, seq_len=1) != replace(model.config, seq_len=1):        # rotary positions know no end
            raise ValueError(f'init_from: {cfg.init_from} is {start.config}, the settings say {model.config}')
        for p, q in zip(model.parameters(), start.parameters()):
            models.put(p, q.data)
        del start, q
    elif not cfg.resume:
        host = 'cpu' if model.num_params() < 3e9 else None          # the same on every device, as long as it is quick
        models.init_weights(model, cfg.seed, cfg.emb_std or None, cfg.locality, device=host)
    optimizers = make_optimizers(model, cfg, me.device)
    it, before = load_checkpoint(run, model, optimizers, me) if cfg.resume else (0, vars(cfg))
    size = [(c.get('global_batch') or c['batch_size']) * c['seq_len'] for c in (vars(cfg), {**vars(cfg), **before})]
    if size[0] != size[1]:
        raise ValueError(f'resume: an update had {size[1]} tokens, now {size[0]}: data and schedule count in updates')
    for key, value in vars(cfg).items() if me.rank == 0 else ():
        if key != 'resume' and before.get(key) != value:
            print(f'resuming with another {key}: {value!r}, it was {before.get(key)!r}', file=sys.stderr)
    windows = held_out(cfg, corpus, tok, me)
    run.mkdir(parents=True, exist_ok=True)
    return me, run, corpus, tok, model, net, optimizers, it, windows


def report(it, model, optimizers, run, corpus, cfg, tok, windows, me, log, bar):
    """A checkpoint, its validation bound, a sample; then old checkpoints go."""
    save_checkpoint(run, it, model, optimizers, cfg, tok, corpus, me)
    entry = agree(me, log.bound_at(it))
    if entry is None:
        keys = 'val_nats', 'val_nats_stderr', 'val_bits_per_byte', 'val_bits_per_byte_stderr'
        entry = {'iter': it, **dict(zip(keys, validate(model, windows, cfg, tok, me)))}
        if cfg.sample_tokens:
            entry['sample'] = sample_text(model, cfg, tok, me, it)
        log.write(**entry)
    if me.rank == 0:
        sign = '=' if cfg.causal else '<='
        bar.write(f"iter {it:5d} | validation {sign} {entry['val_nats']:.3f} nats/token {sign} "
                  f"{entry['val_bits_per_byte']:.3f} +- {entry['val_bits_per_byte_stderr']:.3f} bits/byte")
        if entry.get('sample'):
            bar.write(f"           | {entry['sample'][:200]}")
        best = min((e for e in log.lines if 'val_nats' in e), key=lambda e: e['val_nats'])
        (run / 'best.tmp').write_text(json.dumps({'iteration': best['iter'], 'val_nats': best['val_nats']}))
        os.replace(run / 'best.tmp', run / 'best.json')
        prune(run, cfg.keep_last)
    return entry


def start_log(run, it, cfg, model, me):
    """Opens log.jsonl, with a first line of settings and versions, and tells the terminal what is about to run."""
    log = Log(run / 'log.jsonl', it if cfg.resume else None, me.rank == 0)
    kind = torch.cuda.get_device_name() if me.device == 'cuda' else me.device
    facts = dict(config=vars(cfg), device=kind, processes=me.world, dtype='bfloat16' if me.bf16 else 'float32',
                 torch=torch.__version__, numpy=np.__version__, python=platform.python_version(),
                 machine=platform.platform(), model=vars(model.config), parameters=model.num_params())
    log.write(**({'resumed': it} if log.lines else {}), **facts)
    if me.rank == 0:
        spread = '' if me.world == 1 else f', {me.world} processes, ' + ('copies' if not cfg.fsdp else 'sharded')
        outside = model.num_params(non_embedding=True)
        print(f'{model.num_params():,} parameters ({outside:,} outside embedding and head), {kind}, '
              f'{facts["dtype"]}, {torch.get_num_threads()} threads{spread}; writing to {run}/')
    me.peak = next((peak for name, peak in PEAKS if name in kind), None)
    return log


def main(config):
    cfg = SimpleNamespace(**config)
    with user_errors():
        check(cfg)
        if cfg.dry_run:
            return dry_run_report(cfg, int(os.environ.get('WORLD_SIZE', 1)))
        me, run, corpus, tok, model, net, optimizers, it, windows = prepare_run(cfg)
    with ExitStack() as stack:
        if me.rank == 0:
            stack.enter_context(alone(run))
        me.pool, me.saving = stack.enter_context(ThreadPoolExecutor(1)), None
        stop = stack.enter_context(Stop())
        log = start_log(run, it, cfg, model, me)
        try:
            it, entry = loop(it, cfg, model, net, optimizers, run, corpus, tok, windows, me, log, stop)
        except (FloatingPointError, OSError) as e:
            kept = models.find_checkpoints(run)
            fail(f'stopped: {e}; ' + (f'the last good checkpoint: {kept[-1]}' if kept else 'no checkpoint yet'), 1)
    if me.world > 1:
        dist.destroy_process_group()
    if me.rank == 0:
        prune(run, cfg.keep_last)
        after = cfg.then or f'python sample.py {run}'
        print(f"done: {entry['val_bits_per_byte']:.3f} bits/byte in {run}/iter_{it:07d}; next:  {after}" if entry else
              'stopped before the first update' if not it else
              f'saved iteration {it} in {run}/; go on with the same command and --resume')
    return entry or sys.exit(128 + (stop.signal or signal.SIGTERM))


def loop(it, cfg, model, net, optimizers, run, corpus, tok, windows, me, log, stop):
    """Updates from iteration `it` to the end -> (iteration, last report), or (iteration, None) if asked to stop."""
    smooth, meter = None, Meter(it, cfg, model, corpus, me)
    pieces = prefetched(lambda i: micro_batches(corpus, cfg, i, tok, me, me.examples), it, me.device == 'cuda')
    with tqdm(total=cfg.max_iters, initial=it, disable=None if me.rank == 0 else True, dynamic_ncols=True,
              bar_format='{desc} | eta {remaining}') as bar:
        while True:
            if it % cfg.eval_interval == 0 and it or it == cfg.max_iters:
                entry = report(it, model, optimizers, run, corpus, cfg, tok, windows, me, log, bar)
                meter.restart(it)
            if it >= cfg.max_iters:
                return it, entry
            if any_of(me, stop.signal):
                if it:
                    save_checkpoint(run, it, model, optimizers, cfg, tok, corpus, me, last=True)
                return it, None
            batch = next(pieces)
            loss, norm, bins = train_step(net, optimizers, batch, cfg, it, me)
            it += 1
            meter.count(batch)
            bar.update()
            if it % cfg.log_interval == 0 or it == cfg.max_iters:
                entry = meter.read(it, loss, norm, bins, optimizers[-1].param_groups[0]['lr'])
                smooth = entry['loss'] if smooth is None else 0.7 * smooth + 0.3 * entry['loss']
                log.write(**entry)
                bar.set_description_str(meter.line(it, smooth, entry))
                if bar.disable and me.rank == 0 and it % (10 * cfg.log_interval) == 0:
                    minutes = (cfg.max_iters - it) * meter.seconds / 60
                    print(f'{meter.line(it, smooth, entry)} | eta {minutes:.1f} min', flush=True)


class Meter:
    """Counts between two reports; only reading it makes the host wait for the device."""
    def __init__(self, it, cfg, model, corpus, me):
        self.cfg, self.model, self.me = cfg, model, me
        self.tokens = (cfg.global_batch or cfg.batch_size) * cfg.seq_len      # at most, where rows are examples
        self.per_byte = None if me.examples else 1 / math.log(2) / data.bytes_per_token(corpus, 'train')
        self.restart(it)

    def restart(self, it):
        self.since, self.started, self.made, self.rows, self.squares = it, time.perf_counter(), 0, 0, 0

    def count(self, batch):
        for ids, rows, _, _, cu_seqlens, _ in batch:
            self.made, self.rows = self.made + ids.numel(), self.rows + len(rows)
            dense = ids.numel() * ids.shape[1]
            self.squares += dense if cu_seqlens is None else int(cu_seqlens.diff().square().sum())

    def read(self, it, loss, norm, bins, lr):
        """The entry of the log for update `it`, the same on every process."""
        me, counts = self.me, loss.new_tensor([self.made, self.rows, self.squares])
        sums = torch.cat((loss[None], bins.flatten(), me.skipped[None], counts))
        if me.world > 1:
            dist.all_reduce(sums)
        loss, *bins, skipped, n, rows, squares = sums.double().tolist()
        if skipped:
            raise FloatingPointError(f'by iteration {it}: loss {loss}, gradient norm {norm.item()}; '
                                     f'{skipped / me.world:.0f} updates were not made')
        elapsed = time.perf_counter() - self.started
        rate, self.seconds = n / elapsed, elapsed / (it - self.since)
        entry = dict(iter=it, tokens=it * self.tokens, loss=loss, grad_norm=norm.item(), lr=lr,
                     tokens_per_second=round(rate))
        if any(bins):
            entry['loss_by_t'] = [round(a / b, 4) if b else None for a, b in zip(bins[:4], bins[4:])]
        if me.device == 'cuda':
            entry['gb'] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        if me.peak:
            entry['mfu'] = round(self.model.flops_per_token(rows / n, squares / n) * rate / me.world / me.peak, 4)
        return entry

    def line(self, it, smooth, entry):
        rate, extra = entry['tokens_per_second'], f" | MFU {entry['mfu']:.1%}" if 'mfu' in entry else ''
        each = f' ({rate / self.me.world / 1e3:.1f}k each)' if self.me.world > 1 else ''
        bits = '' if self.per_byte is None else f' | {smooth * self.per_byte:.3f} bits/byte'
        return (f'iter {it}/{self.cfg.max_iters} | loss {smooth:.3f}{bits} | '
                f"lr {entry['lr']:.2e} | {rate / 1e3:.1f}k tok/s{each}{extra}")


if __name__ == '__main__':
    command(main, configure(globals()))
