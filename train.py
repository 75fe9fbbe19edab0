"""Trains a mask predictor (or, with --causal=true, the autoregressive baseline), on a laptop or on many GPUs.

    python train.py                                     # the default: config/docs.py, minutes on two cores
    python train.py --resume                            # goes on from the newest checkpoint in out_dir
    torchrun --nproc-per-node=8 train.py config/llada_8b.py --dataset=data/my

The objective is Eq. 3 of LLaDA (arXiv 2502.09992v3), or Eq. 5 on examples (masking = 'response').
Data and noise of a row are functions of (seed, iteration, row): a resumed run ends with the same bits, and
rows and masks are the same for any number of processes and any split of the batch.
"""

from configurator import before_torch

if __name__ == '__main__':
    before_torch()

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
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import data
import diffusion
import model as models
from configurator import (
    ROLES,
    Damaged,
    Refused,
    alone,
    clean,
    command,
    copy_tokenizer,
    fail,
    out_of_range,
    refuse,
    say,
    write_manifest,
)

# --- run
out_dir = 'out/docs'            # checkpoints (iter_*/) and log.jsonl
resume = False                  # continue from the newest checkpoint in out_dir, with its settings
init_from = ''                  # start from weights of this checkpoint or released folder (iteration 0)
seed = 1337                     # of the weights, the order of the data, and the noise
# --- data
dataset = 'docs'                # a name that `python data.py` lists, a folder, or a mixture 'a:0.7,b:0.3'
verify_data = True              # compare every shard with its sha256 at the start (1-2 GB/s)
random_length = 0.0             # share of windows of which only a random length is kept (LLaDA: 0.01)
random_split = 0.0              # share of windows cut in two, with no attention across (iLLaDA: 0.3)
isolate = False                 # attention stays within a document or example of a window (iLLaDA's packing)
masking = 'unified'             # 'unified': windows, any token maskable; 'response': examples, prompts never
pad_group = 0                   # examples padded to one length; 0: batch_size (fix it if batch_size changes)
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
rope_fp32 = True                # rotate queries and keys in float32 (LLaDA); False: in their dtype (iLLaDA)
tied = False                    # the head shares the embedding matrix
causal = False                  # True: the autoregressive baseline
emb_std = 1.0                   # std of the initial embedding; 0 takes 1/sqrt(d_model), as in LLaDA's config
# --- objective
count_form = True             # hide exactly l of L, weight L/l; False: with probability t, weight 1/t (Eq. 3)
stratified = True               # one t in each of B equal slices; False: i.i.d., as in LLaDA's guideline
mask_eps = 1e-3                 # smallest t when count_form is off
logit_normal = -1.0             # t = sigmoid(width * normal); 0: uniform (papers); -1: windows 0.5, examples 0
complementary = True            # each row twice in an update, under complementary masks (not in the papers)
# --- optimizer
optimizer = 'muon'              # 'muon': on the matrices of the blocks, with AdamW elsewhere; or 'adamw'
learning_rate = 2e-2            # AdamW's peak
muon_lr = 5e-3                  # Muon's peak
beta1 = 0.9                     # AdamW
beta2 = 0.95                    # AdamW
weight_decay = 0.1              # on matrices; with Muon on those of the blocks only
grad_clip = 1.0                 # largest gradient norm; 0 turns clipping off
# --- schedule
max_iters = 1600                # optimizer updates
batch_size = 16                 # windows in one forward pass of one process
global_batch = 0                # windows in one update, by all processes and forward passes; 0: batch_size
schedule = 'wsd'                # warm up, hold, decay linearly; or 'cosine', or 'points': see lr_points
warmup_iters = 50               # linear from 0
decay_iters = 950               # wsd only: how many at the end decay
min_lr_ratio = 0.0              # the final learning rate as a fraction of the peak
lr_points = []                # [[tokens, rate], ...], linear between; [.., 'cosine']: half a cosine to it
# --- reports
eval_interval = 400             # iterations between checkpoints, each with its validation bound and a sample
eval_windows = 256              # validation windows in that bound (all, if there are fewer)
eval_draws = 4                  # masks drawn for each of them
log_interval = 10               # iterations between lines of log.jsonl
keep_last = 2                   # newest checkpoints to keep
sample_tokens = 64              # length of the sample shown at each evaluation; 0 shows none
then = ''                       # the command to type next, shown at the end
# --- machine
device = 'auto'                 # 'cuda', 'mps' or 'cpu'; auto takes the first available
dtype = 'auto'                 # 'bfloat16' or 'float32' for activations; auto: bfloat16 where hardware has it
compile = False                 # torch.compile each block (on CPU needs a C++ compiler and half a minute)
fsdp = 0                        # 0: DDP; -1: sharded over all processes; k: in groups of k, replicated between
act_memory = 1.0                # share of a block's activations kept for backward; 0 keeps its input only
force = False                   # start even if the estimate does not fit into memory

# dense bfloat16 FLOP/s from the data sheets (SXM unless named); other devices print no MFU
PEAKS = {'H100 PCIe': 756e12, 'H100': 989e12, 'H200': 989e12, 'H800': 989e12, 'A100': 312e12, 'A800': 312e12}
SHAPE = [field.name for field in fields(models.ModelConfig) if field.name != 'vocab_size']

# ----------------------------------------------------------------------------------------------------------
# Settings, schedule, optimizers

RANGES = (          # see configurator.out_of_range
    ('seq_len max_iters batch_size eval_interval eval_windows eval_draws log_interval keep_last '
     'learning_rate muon_lr', 'above 0', lambda v: v > 0),
    ('batch_size global_batch eval_windows eval_draws sample_tokens pad_group', 'below 10^5',
     lambda v: v < 10 ** 5),
    ('seed pad_group warmup_iters decay_iters grad_clip weight_decay sample_tokens emb_std '
     'global_batch vocab_size', '0 or more', lambda v: v >= 0),
    ('fsdp', '-1, 0 or the size of a group', lambda v: v >= -1),
    ('mask_eps min_lr_ratio beta1 beta2', 'in [0, 1)', lambda v: 0 <= v < 1),
    ('random_length random_split act_memory', 'in [0, 1]', lambda v: 0 <= v <= 1),
    ('seed', 'below 2^62', lambda v: v < 2 ** 62),
    ('max_iters', 'below 10^7', lambda v: v < 10 ** 7),             # seven digits name a checkpoint
    ('optimizer', 'one of muon, adamw', lambda v: v in ('muon', 'adamw')),
    ('schedule', 'one of cosine, wsd, points', lambda v: v in ('cosine', 'wsd', 'points')),
    ('masking', 'one of unified, response', lambda v: v in ('unified', 'response')))


def check(cfg, world):
    """Refuses invalid settings, all of them at once, one per line."""
    wrong, size = out_of_range(cfg, RANGES), update_size(cfg)
    rules = (
        (size % copies(cfg),
         f'an update of {size} windows is odd, complementary masks come in pairs (--complementary=false)'),
        (size % max(cfg.batch_size * world, 1),
         f'global_batch: {size} windows do not divide into {world} processes x batch_size {cfg.batch_size}'),
        (not cfg.out_dir, 'out_dir must not be empty'),
        (cfg.tied and cfg.emb_std, f'a tied head is as large as the embedding: emb_std=0, got {cfg.emb_std}'),

        ((cfg.causal or cfg.masking == 'response') and (cfg.random_length or cfg.random_split or cfg.isolate),
         "random_length, random_split and isolate are for diffusion on windows: not causal, nor masking = 'response', "
         'which has one example a row'),
        (cfg.random_length + cfg.random_split > 1,
         'random_length and random_split are shares of the same windows: together at most 1'),
        (cfg.pad_group % max(cfg.batch_size, 1),
         f'pad_group must be a multiple of batch_size, got {cfg.pad_group}'),

        ((cfg.schedule == 'points') != bool(cfg.lr_points), "lr_points goes with schedule = 'points'"),
        (not in_order(cfg.lr_points),
         f'lr_points holds [tokens, rate] in order of tokens (in a config file), got {cfg.lr_points}'),
        (world % max(cfg.fsdp, 1), f'fsdp: groups of {cfg.fsdp} do not divide {world} processes'))
    refuse(wrong + [says for bad, says in rules if bad])


def in_order(points):
    """Whether points are [tokens, rate] or [tokens, rate, 'cosine'], tokens never decreasing."""
    for point in points:
        if not isinstance(point, list) or len(point) < 2 or point[2:] not in ([], ['cosine']):
            return False
        if not all(type(x) in (int, float) and x >= 0 for x in point[:2]):
            return False
    return points == sorted(points, key=lambda point: point[0])


def update_size(cfg):
    """Windows in one update, over all processes and forward passes."""
    return cfg.global_batch or cfg.batch_size


def copies(cfg):
    """How many successive rows each row of data fills: 2 if rows 2k and 2k + 1 have complementary masks."""
    return 2 if cfg.complementary and not cfg.causal else 1


def lr_at(x, points):
    """The learning rate at x, tokens or updates: linear, or half a cosine, between points; constant beyond.

    Two points at the same x are a jump.
    """
    i = bisect.bisect_right([point[0] for point in points], x)
    if i in (0, len(points)):
        return points[max(i - 1, 0)][1]
    (x0, y0), (x1, y1) = points[i - 1][:2], points[i][:2]
    part = (x - x0) / (x1 - x0)
    if points[i][2:] == ['cosine']:
        part = 0.5 - 0.5 * math.cos(math.pi * part)
    return y0 + (y1 - y0) * part


def lr_factor(it, cfg):
    """The learning rate of update `it` (0-based) as a fraction of either peak: a pure function."""
    if cfg.schedule == 'points':
        tokens = (it + 1) * update_size(cfg) * cfg.seq_len
        return lr_at(tokens, cfg.lr_points) / cfg.learning_rate

    # during warmup, update `it` is number it + 1 of warmup_iters; a run may end before its warmup does
    end = max(cfg.max_iters, cfg.warmup_iters)
    decay, bend = end - cfg.warmup_iters, ['cosine']
    if cfg.schedule == 'wsd':
        decay, bend = min(cfg.decay_iters, decay), []           # in a short run all of it
    last = [end, cfg.min_lr_ratio, *bend]
    return lr_at(it, [[-1, 0.0], [cfg.warmup_iters - 1, 1.0], [end - decay, 1.0], last])


def make_optimizers(model, cfg, device):
    """[AdamW], or [Muon for the blocks' matrices, AdamW for the rest], at their peaks."""
    muon, optimizers, decay = [], [], cfg.weight_decay
    if cfg.optimizer == 'muon':
        muon = [p for p in model.blocks.parameters() if p.dim() == 2]
        optimizers = [torch.optim.Muon(muon, lr=cfg.muon_lr, momentum=0.95, weight_decay=decay,
                                       adjust_lr_fn='match_rms_adamw')]
        decay = 0.0

    taken = set(muon)
    rest = [p for p in model.parameters() if p not in taken]
    groups = [{'params': [p for p in rest if p.dim() == 2], 'weight_decay': decay},
              {'params': [p for p in rest if p.dim() < 2], 'weight_decay': 0.0}]
    fused = True if device in ('cuda', 'cpu') else None
    betas = (cfg.beta1, cfg.beta2)
    adamw = torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=betas, fused=fused)
    return [*optimizers, adamw]


# ----------------------------------------------------------------------------------------------------------
# Processes


@dataclass(frozen=True)
class Processes:
    """This process among the others, and what it computes on."""

    rank: int
    world: int
    device: str
    bf16: bool
    sharded: bool

    def total(self, part):
        """A tensor on the host summed over all processes, in place, for all of them."""
        if self.world > 1:
            dist.all_reduce(part)
        return part

    def any(self, flag):
        """Whether a flag is set on any process. (On the host: no waiting for the GPU.)"""
        return bool(self.total(torch.tensor(int(flag))))

    def from_first(self, value):
        """The value of rank 0, on every rank; none goes on before rank 0 is here."""
        box = [value]
        if self.world > 1:
            dist.broadcast_object_list(box)
        return box[0]

    def wait_for_first(self):
        """No rank goes on before rank 0 is here."""
        self.from_first(None)

    def here(self, question):
        """A diffusion.Question on this process's device."""
        return question._make(z if z is None else z.to(self.device, non_blocking=True) for z in question)

    def autocast(self):
        """For a forward pass. (Under FSDP its own policy casts the parameters instead.)"""
        return torch.autocast(self.device, torch.bfloat16, enabled=self.bf16 and not self.sharded)


def join_processes(cfg, rank, world):
    """Meets the other processes, if torchrun has started any -> Processes."""
    device, bf16 = models.pick_device(cfg.device, cfg.dtype)
    if world > 1:
        if device == 'cuda':
            torch.cuda.set_device(int(os.environ['LOCAL_RANK']))
        # A restarted group must not see the addresses of the last one, which torchrun's store still holds.
        # (Each node counts its own restarts; for several nodes see config/llada_8b.py.)
        one_node = os.environ.get('LOCAL_WORLD_SIZE') == str(world)
        turn = os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') if one_node else '0'
        store = dist.PrefixStore(f'turn {turn}', next(dist.rendezvous('env://'))[0])
        backend = 'cpu:gloo,cuda:nccl' if device == 'cuda' else 'gloo'
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    return Processes(rank, world, device, bf16, sharded=world > 1 and cfg.fsdp != 0)


def refuse_giants(config, cfg, procs):
    """Refuses, before the model is made, a run that exceeds memory even by a low estimate."""
    if procs.device == 'cuda':
        have = torch.cuda.mem_get_info()[1]
    elif hasattr(os, 'sysconf'):
        have = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    else:
        return

    c, shards = config, procs.world if cfg.fsdp < 0 else max(cfg.fsdp, 1)
    block = 2 * (c.n_head + c.n_kv_head) * c.head_dim * c.d_model + 3 * c.d_model * c.d_ff
    weights = 16 * (c.n_layer * block + c.vocab_size * c.d_model) / shards      # with gradient and two moments
    kept = 16 * cfg.batch_size * cfg.seq_len * c.d_model * max(c.n_layer * cfg.act_memory, 1)
    if weights + kept > have and not cfg.force:
        raise Refused(f'{weights / 1e9:,.0f} GB for n_layer, d_model, d_ff and vocab_size, {kept / 1e9:,.0f} GB for '
                      f'batch_size x seq_len; {procs.device} has {have / 1e9:,.0f} GB; --force tries it')


def build(cfg, procs, vocab_size):
    """The model, its weights empty and distributed as cfg.fsdp says -> (model, what to call in training)."""
    shape = {name: getattr(cfg, name) for name in SHAPE}
    config = models.ModelConfig(vocab_size=vocab_size, **shape)
    refuse_giants(config, cfg, procs)
    model = models.empty_model(config)
    if cfg.compile:
        from torch._functorch import config as functorch
        functorch.activation_memory_budget = cfg.act_memory or 1.0
        model.ce = torch.compile(model.ce)
        for block in model.blocks:
            block.compile()
    model.recompute = cfg.act_memory == 0 or cfg.act_memory < 1 and not cfg.compile     # shares need compile

    if procs.sharded:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
        mesh = init_device_mesh(procs.device, (procs.world,))
        if 0 < cfg.fsdp < procs.world:
            sizes = procs.world // cfg.fsdp, cfg.fsdp
            mesh = init_device_mesh(procs.device, sizes, mesh_dim_names=('replicate', 'shard'))

        # inputs are not cast: rotary angles and loss weights stay float32
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if procs.bf16 else None,
                                      reduce_dtype=torch.float32, cast_forward_inputs=False)
        for part in (*model.blocks, model):                     # the root's own: embedding, last norm, head
            fully_shard(part, mesh=mesh, mp_policy=policy)

    model.to_empty(device=procs.device)
    if procs.world == 1 or procs.sharded:
        return model, model
    return model, torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)


# ----------------------------------------------------------------------------------------------------------
# One update


def questions(source, it, cfg, tok, procs):
    """What this process asks the model in update `it`: a list of diffusion.Question, one for each forward pass.

    Row r of the global batch is a function of (seed, it, r), and so is its noise: however many processes
    share the batch, and however many forward passes it takes, the same tokens are hidden.
    """
    size, asked = update_size(cfg), []
    form = dict(per='sequence', total=size)            # each row by its own length, cut ones too (Alg. 1)
    for start in range(procs.rank * cfg.batch_size, size, procs.world * cfg.batch_size):
        rows = range(start, start + cfg.batch_size)
        x0, maskable, cu_seqlens = source.batch(it, rows, size)
        if cfg.causal:
            asked.append(diffusion.ar_question(x0, maskable, tok.eos_id, **form))
            continue

        t, noise = noise_of(rows, it, x0.shape[1], source, cfg)
        xt, masked = diffusion.forward_process(x0, t, tok.mask_id, maskable, exact=cfg.count_form, u=noise)
        asked.append(diffusion.question(x0, xt, masked, maskable, t,
                                        cu_seqlens=cu_seqlens, exact=cfg.count_form, **form))
    return asked


def noise_of(rows, it, T, source, cfg):
    """Mask ratios t (B,) and noise u (B, T) for some rows of update `it`.

    In pairs, row 2k + 1 has 1 - t and 1 - u of row 2k: equally likely, and hiding what row 2k shows (of whole
    windows; a token may be hidden in both, since the count form rounds up).
    """
    eps = 0.0 if cfg.count_form else cfg.mask_eps
    width = cfg.logit_normal if cfg.logit_normal >= 0 else source.logit_normal
    times = copies(cfg)
    pair_of = [row // times for row in rows]
    t = diffusion.sample_t(update_size(cfg) // times, eps, cfg.stratified,
                           diffusion.keyed_generator(cfg.seed, it), logit_normal=width)
    t, u = t[pair_of], diffusion.row_noise(cfg.seed, it, pair_of, T)

    if times == 2:
        odd = torch.tensor(rows) % 2 == 1
        t[odd], u[odd] = 1 + eps - t[odd], 1 - u[odd]           # (t lies between eps and 1)
    return t, u


def prefetched(make, it):
    """make(it), make(it + 1), ...: each is made in a thread while the one before is in use."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(make, it)
        while True:
            now, it = coming.result(), it + 1
            coming = pool.submit(make, it)
            yield now


def settle(net, asked, procs):
    """One backward pass without an update: after its first, DDP puts its gradients in another order.

    Otherwise the first update of a resumed run would sum its gradients in that first order, to other bits.
    """
    with procs.autocast():
        diffusion.weighted_loss(net, procs.here(asked[0])).backward()
    net.zero_grad()


def train_step(net, optimizers, asked, lr_factor, cfg, procs):
    """One update -> (this process's part of the loss in nats per token, gradient norm), as tensors.

    If they are not finite there is no update: FloatingPointError.
    """
    loss = torch.zeros((), device=procs.device)
    for i, question in enumerate(asked):
        if hasattr(net, 'require_backward_grad_sync'):      # DDP: gradients travel with the last pass only
            net.require_backward_grad_sync = i == len(asked) - 1
        with procs.autocast():
            part = diffusion.weighted_loss(net, procs.here(question))               # Eq. 3, Eq. 5
        (part * procs.world).backward()                     # DDP and FSDP average over processes: undo that
        loss += part.detach()

    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), cfg.grad_clip or math.inf)
    norm = norm.full_tensor() if hasattr(norm, 'full_tensor') else norm
    if not norm.isfinite():                     # the same on all ranks; reading it is an update's only wait
        raise FloatingPointError(f'loss {loss.item()}, gradient norm {norm.item()}; no update was made')

    step(optimizers, lr_factor)
    return loss, norm


def step(optimizers, lr_factor):
    """Updates the weights by their gradients, at this fraction of the peak learning rates."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group['lr'] = optimizer.defaults['lr'] * lr_factor
        optimizer.step()
        optimizer.zero_grad()


# ----------------------------------------------------------------------------------------------------------
# Reports


@torch.no_grad()
def validate(model, held_out, cfg, tok, procs):
    """Nats per maskable token and bits per byte of held-out rows, with standard errors, by all processes."""
    groups, n_bytes = held_out
    logp, n_tokens, before = [], [], 0
    for x0, maskable in groups:
        each = -(-len(x0) // procs.world)                   # equal parts: all call the model equally often
        mine = (torch.arange(each) + procs.rank * each).clamp(max=len(x0) - 1)
        x, m = x0[mine].to(procs.device), maskable[mine].to(procs.device)
        with procs.autocast():
            part = diffusion.log_prob_rows(model, x, m, tok, draws=cfg.eval_draws, first=before + int(mine[0]),
                                           batch_size=cfg.batch_size)

        parts = torch.zeros(procs.world, each, dtype=part.dtype)
        parts[procs.rank] = part.cpu()
        logp.append(procs.total(parts).flatten()[:len(x0)])
        n_tokens.append(maskable.sum(1))
        before += len(x0)
    names = ('val_nats', 'val_nats_stderr', 'val_bits_per_byte', 'val_bits_per_byte_stderr')
    return dict(zip(names, diffusion.nats_and_bits(torch.cat(logp), torch.cat(n_tokens), n_bytes)))


def sample_text(model, cfg, tok, procs, it):
    """A sample on one line: random remasking at temperature 1 draws from the model, unlike low confidence."""
    start = [tok.bos_id] if cfg.masking == 'response' else []
    length = max(1, min(cfg.sample_tokens, cfg.seq_len) - len(start))
    with procs.autocast(), torch.compiler.set_stance('force_eager'):    # other shapes: not worth compiling
        (row,), _ = diffusion.complete(model, [start], length, tok, seed=cfg.seed, first=it,
                                       temperature=1.0, remasking='random')
    text = tok.decode(row[len(start):]).replace('\n', '\\n')
    return ''.join(c if c.isprintable() else ' ' for c in text)


class Log:
    """log.jsonl: one object per line, flushed at once, by rank 0. A resumed run repeats lines: the last counts.

    it: where this run continues; entries that an earlier run logged after that are not its own.
    """

    def __init__(self, path, it, procs):
        self.lines, self.file = [entry for entry in read_log(path) if entry.get('iter', 0) <= it], None
        if procs.rank == 0:
            cut = path.is_file() and not path.read_bytes().endswith(b'\n')          # by a kill
            self.file = path.open('a', encoding='utf-8')
            self.file.write('\n' if cut else '')

    def write(self, **entry):
        self.lines.append(entry)
        if self.file:
            print(json.dumps(entry), file=self.file, flush=True)


def read_log(path):
    """The entries of a log.jsonl, list of dict."""
    lines = path.read_text(encoding='utf-8', errors='replace').splitlines() if path.is_file() else []
    entries = []
    for number, line in enumerate(lines, 1):
        try:
            entries.append(dict(json.loads(line)))
        except (ValueError, TypeError, RecursionError):
            if number < len(lines):                             # the last line may have been cut by a kill
                say(f'{path}:{number}: not a line of a log, passed over')
    return entries


class Meter:
    """What is counted between two lines of the log, and the line that shows it."""

    def __init__(self, cfg, model, source, procs):
        self.cfg, self.model, self.source, self.procs = cfg, model, source, procs
        kind = torch.cuda.get_device_name() if procs.device == 'cuda' else ''
        self.peak = next((peak for name, peak in PEAKS.items() if name in kind), None)
        self.smooth = None
        self.restart()

    def restart(self):
        self.started, self.updates, self.loss = time.perf_counter(), 0, 0.0
        self.sizes = torch.zeros(3, dtype=torch.float64)        # tokens, rows that are read out, windows

    def count(self, asked, loss):
        self.updates += 1
        self.loss = self.loss + loss
        for question in asked:
            self.sizes += torch.tensor([question.ids.numel(), len(question.rows), len(question.ids)])

    def read(self, it, norm, lr):
        """The log entry of update `it`, the same on every rank; its loss is the mean since the last one."""
        sums = torch.tensor([float(self.loss), *self.sizes], dtype=torch.float64)
        loss, tokens, rows, windows = self.procs.total(sums).tolist()
        rate = tokens / (time.perf_counter() - self.started)

        entry = dict(iter=it, tokens=it * update_size(self.cfg) * self.cfg.seq_len, loss=loss / self.updates,
                     grad_norm=norm.item(), lr=lr, tokens_per_second=round(rate))
        if self.procs.device == 'cuda':
            entry['gb'] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        if self.peak:
            flops = self.model.flops_per_token(rows / tokens, tokens / windows) * rate
            entry['mfu'] = round(flops / self.procs.world / self.peak, 4)
        self.restart()
        return entry

    def show(self, bar, entry):
        """Shows progress: in place on a terminal, else the first and every tenth on a line of its own."""
        first = self.smooth is None
        self.smooth = entry['loss'] if first else 0.7 * self.smooth + 0.3 * entry['loss']
        bits = mfu = ''
        if self.source.bytes_per_token:
            bits = f' | {self.smooth / self.source.bytes_per_token / math.log(2):.3f} bits/byte'
        if self.peak:
            mfu = f" | MFU {entry['mfu']:.1%}"

        line = (f"iter {entry['iter']}/{self.cfg.max_iters} | loss {self.smooth:.3f}{bits} | lr {entry['lr']:.2e} | "
                f"{entry['tokens_per_second'] / 1e3:.1f}k tok/s{mfu}")
        bar.set_description_str(line)
        if bar.disable is True and (first or entry['iter'] % (10 * self.cfg.log_interval) == 0):
            print(line, flush=True)


def progress_bar(it, cfg, rank):
    """For a terminal; one of unknown width gets lines, as a file does."""
    blind = sys.stderr.isatty() and not os.get_terminal_size(sys.stderr.fileno()).columns
    return tqdm(total=cfg.max_iters, initial=it, disable=True if rank or blind else None, dynamic_ncols=True,
                bar_format='{desc} | eta {remaining}')


# ----------------------------------------------------------------------------------------------------------
# Checkpoints: one folder each, by torch.distributed.checkpoint, complete once it has its manifest and name


def run_state(model, optimizers):
    """Every tensor of a run by name: weights and optimizer state, in place, sharded as they are."""
    state = {}
    for name, p in model.named_parameters():
        state[f'model.{name}'] = p.data
        for optimizer in optimizers:
            for key, value in optimizer.state.get(p, {}).items():
                state[f'optim.{name}.{key}'] = value
    return state


def save_checkpoint(run, it, model, optimizers, cfg, source, procs):
    """Writes run/iter_N unless it exists, under another name until complete; then removes the oldest."""
    import torch.distributed.checkpoint as dcp
    final, aside = run / f'iter_{it:07d}', run / 'unfinished'
    if procs.from_first(final in models.find_checkpoints(run)):
        return
    if procs.rank == 0:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
    procs.wait_for_first()                                      # it makes the folder
    with models.one_line(final, 'could not be written'):
        dcp.save(run_state(model, optimizers), checkpoint_id=str(aside), no_dist=procs.world == 1)

    if procs.rank == 0:
        spec = copy_tokenizer(source.tok.spec, aside)
        ids = {f'{role}_id': getattr(source.tok, f'{role}_id') for role in ROLES}
        write_manifest(aside, dict(
            format='nanollada 3', iteration=it, model=vars(model.config), config=vars(cfg), tokenizer=spec, ids=ids,
            examples=source.examples))
        shutil.rmtree(final, ignore_errors=True)
        os.replace(aside, final)
        for old in models.find_checkpoints(run)[:-cfg.keep_last]:
            shutil.rmtree(old)
    procs.wait_for_first()


def newest_undamaged(run):
    """The newest checkpoint of a run whose files are as written -> folder; damaged ones are moved aside."""
    for folder in reversed(models.find_checkpoints(run)):
        try:
            models.read_checkpoint(folder)
            return folder
        except Damaged as error:
            say(f'passing over {folder}: {error}')
            aside = folder.with_name(folder.name + '.damaged')
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(folder, aside)                           # it will be saved again
    raise Refused(f'{run}: no checkpoint to resume from')


def load_checkpoint(run, model, optimizers, cfg, procs):
    """Restores the newest undamaged checkpoint of a run -> its iteration."""
    folder = procs.from_first(newest_undamaged(run) if procs.rank == 0 else None)
    manifest = models.read_checkpoint(folder, None)             # rank 0 has compared the files
    before, ours = manifest['config'], vars(model.config)
    differ = [f'{key} {value} here, {ours[key]} asked' for key, value in manifest['model'].items()
              if ours[key] != value]
    if differ:
        raise Refused(f'{folder}: another architecture ({"; ".join(differ)})')
    if before['optimizer'] != cfg.optimizer:
        raise Refused(f'{folder}: made with another optimizer ({before["optimizer"]} here, {cfg.optimizer} asked)')
    sizes = [update_size(c) * c.seq_len for c in (SimpleNamespace(**before), cfg)]
    if sizes[0] != sizes[1]:
        raise Refused(f'resume: an update had {sizes[0]} tokens, now {sizes[1]}; data and schedule count updates')

    for key, value in vars(cfg).items():
        if procs.rank == 0 and key not in ('resume', 'force', 'out_dir') and before.get(key) != value:
            say(f'resuming with another {key}: {value!r}, it was {before.get(key)!r}')

    for p in model.parameters():                # an optimizer creates its state in a step: one of size 0
        p.grad = torch.zeros_like(p)
    step(optimizers, 0.0)
    models.read_tensors(folder, run_state(model, optimizers))
    return manifest['iteration']


def take_weights(model, cfg, tok):
    """Copies the weights of cfg.init_from, if their architecture and vocabulary are the same."""
    start, meta = models.load_model(cfg.init_from)
    data.check_same(data.tokenizer_for(meta), tok, cfg.init_from, cfg.dataset)
    if replace(start.config, seq_len=1) != replace(model.config, seq_len=1):    # rotary positions have no limit
        raise Refused(f'init_from: {cfg.init_from} is {start.config}, the settings say {model.config}')
    for p, q in zip(model.parameters(), start.parameters()):
        models.put(p, q.data)


# ----------------------------------------------------------------------------------------------------------
# The run


@contextmanager
def noted_signals():
    """Ctrl-C and SIGTERM request a checkpoint after this update; Ctrl-C three seconds later exits at once.

    (Not sooner, and not by SIGTERM: torchrun forwards what the terminal or SLURM has sent to every process.)
    Yields the list of the signals received, and when: [(number, seconds), ...].
    """
    came = []

    def note(number, frame):
        came.append((number, time.monotonic()))
        if number == signal.SIGINT and came[-1][1] - came[0][1] > 3:
            os._exit(128 + number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def alone_in(run, procs):
    """Keeps other runs out of the folder, and removes it if nothing came of this one."""
    if procs.rank > 0:
        yield
        return
    try:
        with alone(run / '.lock'):
            yield
    finally:
        with suppress(OSError):
            run.rmdir()                                         # if it is empty


@contextmanager
def last_words(run):
    """Reports in one line what ended a run early, and the checkpoint to resume from; exit code 1."""
    try:
        yield
    except (FloatingPointError, OSError, RuntimeError) as error:
        lost = isinstance(error, dist.DistError) or 'gloo' in str(error)        # another process is gone
        if isinstance(error, RuntimeError) and not lost:
            raise
        shutil.rmtree(run / 'unfinished', ignore_errors=True)
        kept = models.find_checkpoints(run)
        rest = f'the last good checkpoint: {kept[-1]}' if kept else 'no checkpoint yet'
        what = f'another process is gone ({str(error).splitlines()[-1][:200]})' if lost else error
        fail(f'stopped: {what}; {rest}', 1)


def settings_of_run(cfg):
    """With --resume, the settings of the newest checkpoint in out_dir -> dict; typed values win."""
    if not cfg['resume']:
        return {}
    damaged = ''
    for folder in reversed(models.find_checkpoints(cfg['out_dir'])):
        try:
            there = {'complementary': False, **models.read_checkpoint(folder, None)['config']}      # once unknown
        except Damaged as error:
            damaged = f' ({error})'
            continue

        found = {key: there[key] for key in there.keys() & cfg.keys() - {'out_dir', 'force'}}
        refuse([f'{folder}: not a checkpoint ({key} = {value!r})' for key, value in found.items()
                if type(value) is not type(cfg[key])])
        return found
    raise Refused(f"{cfg['out_dir']}: no checkpoint to resume from{damaged}")


def open_data(cfg, procs):
    """-> (rows to train on, held-out rows as tensors, tokenizer)."""
    if procs.rank == 0:
        data.open_dataset(cfg.dataset, None)                    # it may have to be prepared first
    procs.wait_for_first()

    dataset = data.open_dataset(cfg.dataset, (procs.rank, procs.world) if cfg.verify_data else None)
    tok = dataset.parts[0].tokenizer()
    if 0 < cfg.vocab_size < tok.vocab_size:
        raise Refused(f'vocab_size must hold the {tok.vocab_size} tokens of {cfg.dataset}, '
                      f'got {cfg.vocab_size}')
    source = data.open_source(
        dataset, 'train', cfg.masking, tok, cfg.seq_len, cfg.seed,
        random_length=cfg.random_length, random_split=cfg.random_split, isolate=cfg.isolate,
        times=copies(cfg), pad_group=cfg.pad_group or cfg.batch_size)
    held_out = data.open_source(dataset, 'val', cfg.masking, tok, cfg.seq_len)
    return source, held_out.held_out(cfg.eval_windows), tok


def start(run, model, optimizers, cfg, tok, procs):
    """Fills the model from a checkpoint, other weights or at random -> the iteration to continue from."""
    there = procs.from_first(bool(models.find_checkpoints(run)))        # as rank 0 sees it
    restarted = procs.any(os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') != '0')
    if there and not (cfg.resume or restarted):
        raise Refused(f'{run} already holds a run: continue it with --resume, or choose another --out_dir')
    if there or cfg.resume:
        return load_checkpoint(run, model, optimizers, cfg, procs)
    if cfg.init_from:
        take_weights(model, cfg, tok)
    else:
        where = 'cpu' if model.num_params() < 3e9 else None     # the same on every device, while that is quick
        models.init_weights(model, cfg.seed, cfg.emb_std or None, device=where)
    return 0


def report(it, model, held_out, cfg, tok, procs, log):
    """The validation bound and a sample of a checkpoint, logged once -> the log entry."""
    known = [entry for entry in log.lines if entry.get('iter') == it and 'val_nats' in entry]
    entry = procs.from_first(known[-1] if known else None)
    if entry is None:
        entry = {'iter': it, **validate(model, held_out, cfg, tok, procs)}
        if cfg.sample_tokens:
            entry['sample'] = sample_text(model, cfg, tok, procs, it)
        log.write(**entry)

    if procs.rank == 0:
        sign = '=' if cfg.causal else '<='
        tqdm.write(f"iter {it:5d} | validation {sign} {entry['val_nats']:.3f} nats/token {sign} "
                   f"{entry['val_bits_per_byte']:.3f} +- {entry['val_bits_per_byte_stderr']:.3f} bits/byte")
        if 'sample' in entry:
            tqdm.write(f"           | {entry['sample'][:200]}")
    return entry


def greet(run, it, cfg, model, procs, log):
    """The first line of the log, with settings and versions, and the first line on the terminal."""
    kind = torch.cuda.get_device_name() if procs.device == 'cuda' else procs.device
    numbers = 'bfloat16' if procs.bf16 else 'float32'
    everything, inner = model.num_params(), model.num_params(non_embedding=True)
    log.write(resumed=it, config=vars(cfg), device=kind, processes=procs.world, dtype=numbers,
              torch=torch.__version__, numpy=np.__version__, python=platform.python_version(),
              machine=platform.platform(), model=vars(model.config), parameters=everything)
    if procs.rank == 0:
        spread = f', {procs.world} processes' if procs.world > 1 else ''
        tqdm.write(clean(f'{everything:,} parameters ({inner:,} outside embedding and head), {kind}, {numbers}, '
                         f'{torch.get_num_threads()} threads{spread}; writing to {run}/'))


def main(config):
    cfg, run = SimpleNamespace(**config), Path(config['out_dir'])
    rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    check(cfg, world)
    procs = join_processes(cfg, rank, world)
    source, held_out, tok = open_data(cfg, procs)
    model, net = build(cfg, procs, cfg.vocab_size or tok.vocab_size)
    optimizers = make_optimizers(model, cfg, procs.device)

    with alone_in(run, procs):
        it = start(run, model, optimizers, cfg, tok, procs)
        with noted_signals() as signals, last_words(run), progress_bar(it, cfg, rank) as bar:
            log, meter = Log(run / 'log.jsonl', it, procs), Meter(cfg, model, source, procs)
            greet(run, it, cfg, model, procs, log)
            batches = prefetched(lambda i: questions(source, i, cfg, tok, procs), it)
            if net is not model:                                            # DDP
                settle(net, questions(source, it, cfg, tok, procs), procs)

            while True:
                if it and (it % cfg.eval_interval == 0 or it >= cfg.max_iters):
                    began = time.perf_counter()
                    save_checkpoint(run, it, model, optimizers, cfg, source, procs)
                    entry = report(it, model, held_out, cfg, tok, procs, log)
                    meter.started += time.perf_counter() - began            # not part of the training speed
                stopping = procs.any(bool(signals))
                if it >= cfg.max_iters or stopping:
                    break

                asked = next(batches)
                loss, norm = train_step(net, optimizers, asked, lr_factor(it, cfg), cfg, procs)
                it += 1
                bar.update()
                meter.count(asked, loss)
                if it % cfg.log_interval == 0 or it >= cfg.max_iters:
                    line = meter.read(it, norm, optimizers[-1].param_groups[0]['lr'])
                    log.write(**line)
                    if rank == 0:
                        meter.show(bar, line)

            if stopping and it:
                save_checkpoint(run, it, model, optimizers, cfg, source, procs)
    if world > 1:
        dist.destroy_process_group()
    farewell(run, it, None if it < cfg.max_iters else entry, cfg, rank)

    code = 0
    if it < cfg.max_iters:
        code = 128 + (signals[0][0] if signals else signal.SIGTERM)
    if world > 1:           # gloo's threads outlive their group, and now and then abort Python's own way out
        os._exit(code)
    if code:
        sys.exit(code)


def farewell(run, it, entry, cfg, rank):
    """Says what was saved, and what to type next."""
    words = f'saved iteration {it} in {run}/; go on with the same command and --resume'
    if not it:
        words = 'stopped before the first update'
    if entry:
        after = cfg.then or f'python sample.py {run}'
        words = f"done: {entry['val_bits_per_byte']:.3f} bits/byte in {run}/iter_{it:07d}; next:  {after}"
    if rank == 0:
        print(clean(words), flush=True)


if __name__ == '__main__':
    command(main, globals(), beneath=settings_of_run)
