"""Train a mask predictor (or, with --causal, the autoregressive baseline), on a laptop or on many GPUs.

    python train.py config/docs.py                          # a small model in minutes, on two cores
    python train.py config/docs.py --resume                 # continue from the newest checkpoint in out_dir
    torchrun --nproc-per-node=8 train.py config/llada_8b.py --dataset=data/my

The defaults are the objective of LLaDA (arXiv 2502.09992v3), Eq. 3, or Eq. 5 with masking = 'response'. Data
and noise of a row depend on seed, iteration, row and global_batch alone. So any number of processes trains on
the same rows, and on a CPU a resumed run ends with the same bits (a GPU may add in another order).
"""

import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError

import data
import diffusion
import model as models
from configurator import UserError, run, say

# --- run
out_dir = 'out/docs'            # folder for checkpoints (iter_*/), log.jsonl, and settings.py with all settings
resume = False                  # continue from the newest checkpoint in out_dir
init_from = ''                  # start from the weights of this checkpoint or released folder, at iteration 0
seed = 1337                     # of the weights, the order of the data, and the noise
# --- data
dataset = 'docs'                # the name of a folder in data/, any other folder, or a mixture 'a:0.7,b:0.3'
masking = 'unified'             # 'unified': windows of text, any token may be hidden (pre-training; iLLaDA's SFT)
                                # 'response': examples whose prompt is never hidden (LLaDA's SFT)
# (the next three are for windows; with causal only random_length counts)
random_length = 0.0             # share of windows of which only a random length is kept (LLaDA: 0.01)
random_split = 0.0              # share of windows cut in two, without attention across the cut (iLLaDA: 0.3)
isolate = False                 # if True, attention stays within a document of a window (iLLaDA's packing)
pad_group = 0                   # examples that are padded to one length; 0 = all of an update
# --- model (the fields of model.ModelConfig)
seq_len = 128                   # tokens in a training window
n_layer = 4                     # blocks
n_head = 4                      # attention heads
n_kv_head = 4                   # key/value heads; fewer than n_head is grouped-query attention
d_model = 192                   # width of the residual stream
d_ff = 512                      # width inside the SwiGLU
vocab_size = 0                  # rows of embedding and head; 0 = as many as the tokenizer of the data has
rope_theta = 10000.0            # base of the rotary frequencies (LLaDA: 500000, with a context of 4096)
norm_eps = 1e-5                 # of RMSNorm
rope_fp32 = True                # rotate queries and keys in float32 (LLaDA); False = in their dtype (iLLaDA)
tied = False                    # if True, the head shares the embedding matrix (iLLaDA)
causal = False                  # if True, train the autoregressive baseline
emb_std = 0.0                   # std of the initial embedding; 0 = 1/sqrt(d_model), as in LLaDA's config
# --- objective
fixed_count = False             # False = hide each token with probability t, weight 1/t (Eq. 3)
                                # True = hide exactly l = ceil(tL) of L tokens, weight L/l (Eq. 14)
stratified = True               # True = one t in each of B equal slices; False = independent, as in LLaDA
mask_eps = 1e-3                 # the smallest t (not used with fixed_count)
logit_normal = 0.0              # 0 = t is uniform; > 0: t = sigmoid(logit_normal * normal), not in the papers
waves = 0.0                     # > 0 (with fixed_count): masks come in stretches, not singly; not in the papers
complementary = False           # if True, each row comes twice, under complementary masks (not in the papers)
# --- optimizer
optimizer = 'adamw'             # 'adamw', or 'muon' for the matrices of the blocks with AdamW for the rest
learning_rate = 1e-3            # AdamW's peak
muon_lr = 5e-3                  # Muon's peak
beta1 = 0.9                     # of AdamW
beta2 = 0.95                    # of AdamW
weight_decay = 0.1              # on matrices; with Muon only on those of the blocks
grad_clip = 1.0                 # largest gradient norm; 0 = no clipping
# --- schedule
max_iters = 1600                # optimizer updates
batch_size = 16                 # windows in one forward pass of one process (a micro-batch)
global_batch = 0                # windows in one update, over all processes and micro-batches; 0 = batch_size
schedule = 'wsd'                # warm up, hold, decay linearly; 'cosine' = decay along half a cosine;
                                # 'points' = linear between lr_points
warmup_iters = 50               # linear from 0
decay_iters = 0                 # the last iterations, in which the rate decays; 0 = all after the warm-up
min_lr_ratio = 0.0              # the final learning rate as a fraction of the peak
lr_points = []                  # for 'points': [[tokens, rate], ...]
# --- reports
eval_interval = 400             # iterations between checkpoints, each with its validation bound and a sample
eval_windows = 256              # validation windows in that bound (all if there are fewer)
eval_draws = 4                  # masks drawn for each of them
log_interval = 10               # iterations between lines of the log
keep_last = 2                   # how many checkpoints to keep; 0 = all
sample_tokens = 64              # length of the sample shown with each checkpoint; 0 = none
# --- machine
device = 'auto'                 # 'cuda', 'mps' or 'cpu'; auto takes the first that is available
dtype = 'auto'                  # 'bfloat16' or 'float32' for activations; auto = bfloat16 where hardware has it
compile = False                 # torch.compile each block (on a CPU it needs a C++ compiler and half a minute)
fsdp = 0                        # 0 = DDP; -1 = shard over all processes; k = shard in groups of k, replicate between
act_memory = 1.0                # share of a block's activations that is kept for backward; 0 = only its input
                                # (values in between need --compile)

ALLOWED = {'masking': ('unified', 'response'), 'optimizer': ('adamw', 'muon'), 'schedule': ('wsd', 'cosine', 'points')}
RANK = int(os.environ.get('RANK', 0))                   # of this process; torchrun sets both
WORLD = int(os.environ.get('WORLD_SIZE', 1))
# dense bfloat16 FLOP/s by the data sheets, for MFU (SXM unless named)
PEAKS = {'H100 PCIe': 756e12, 'H100': 989e12, 'H200': 989e12, 'H800': 989e12, 'A100': 312e12, 'A800': 312e12}


def check(cfg, world=WORLD):
    """Raise UserError for settings that contradict each other."""
    size = cfg.global_batch
    # a pair of rows must not be torn apart
    if cfg.complementary and size % 2:
        raise UserError(f'complementary masks need an even global_batch, got {size} (or pass --complementary=false)')
    if cfg.pad_group % cfg.batch_size:
        raise UserError(f'pad_group must be 0 or a multiple of batch_size {cfg.batch_size}, got {cfg.pad_group}')
    # every process makes whole micro-batches, and belongs to a whole group of FSDP
    each = cfg.batch_size * world
    if size % each or world % max(1, min(cfg.fsdp, world)):
        raise UserError(f'global_batch {size} must divide into {world} processes of batch_size {cfg.batch_size} '
                        f'({size - size % each or each} would), and these into groups of fsdp {cfg.fsdp}')


# ----------------------------------------------------------------------------------------------------------
# One update: micro-batches with their noise, forward, backward, step


def micro_batches(source, it, cfg, tok):
    """Build this rank's micro-batches for update `it`, a list of diffusion.MaskedBatch on the CPU."""
    size = cfg.global_batch
    if cfg.masking == 'response':
        form = dict(normalize='sequence', normalizer=size)                          # Eq. 5: 1/(b L')
    else:
        # (L is the full length, also of a window that random_length has cut)
        form = dict(normalize='token', normalizer=size * cfg.seq_len)               # Eq. 3: 1/(b L)

    # the rows of this rank, one micro-batch after the other
    batches = []
    for start in range(RANK * cfg.batch_size, size, WORLD * cfg.batch_size):
        rows = range(start, start + cfg.batch_size)
        x0, maskable, cu_seqlens = source.batch(it, rows, size)
        if cfg.causal:
            batches.append(diffusion.ar_batch(x0, maskable, bos_id=tok.eos_id, **form))
            continue

        # hide tokens, and weight the loss of each
        t, u = draw_noise(it, rows, x0.shape[1], cfg)
        xt, masked = diffusion.forward_process(
            x0, t, tok.mask_id, maskable, fixed_count=cfg.fixed_count, u=u)
        weights = diffusion.loss_weights(maskable, masked, t, fixed_count=cfg.fixed_count, **form)
        batches.append(diffusion.masked_batch(x0, xt, masked, weights, cu_seqlens))
    return batches


def draw_noise(it, rows, T, cfg):
    """Draw mask ratios t (B,) and noise u (B, T) for some rows of update `it`."""
    # the count form has no 1/t that could explode
    eps = 0.0 if cfg.fixed_count else cfg.mask_eps
    copies = 2 if cfg.complementary else 1
    t = diffusion.sample_t(
        cfg.global_batch // copies, eps, stratified=cfg.stratified,
        logit_normal=cfg.logit_normal, generator=diffusion.keyed_generator(cfg.seed, it))
    drawn = [row // copies for row in rows]
    t = t[drawn]
    # a wave through the noise of each row, so that often a whole question is in sight and its answer hidden
    noise = diffusion.row_noise(cfg.seed, it, drawn, T + 2)
    u, frequency, start = noise.split((T, 1, 1), dim=1)
    turns = (1 + 7 * frequency) * torch.arange(T) / T + start
    wave = cfg.waves * torch.cos(2 * math.pi * turns)
    u = u + cfg.fixed_count * wave

    if cfg.complementary:
        # noise that is turned around is as likely, and hides what the row before shows
        odd = torch.tensor(rows) % 2 == 1
        t[odd] = 1 + eps - t[odd]
        u[odd] = 1 - u[odd]
    return t, u


def autocast(cfg):
    """Return the context of a forward pass: bfloat16 if set. (FSDP casts by a policy of its own.)"""
    return torch.autocast(cfg.device, torch.bfloat16, enabled=cfg.bf16 and not cfg.sharded)


def loss_of(net, batch, cfg):
    """Return the loss of a micro-batch, a scalar on the device."""
    batch = batch._make(z if z is None else z.to(cfg.device, non_blocking=True) for z in batch)
    with autocast(cfg):
        return diffusion.diffusion_loss(net, batch)


def train_step(net, optimizers, batches, factor, cfg):
    """Make one update -> this rank's part of the loss in nats, gradient norm. Stop if it is not finite."""
    # several micro-batches add up to one update, so that any batch fits into memory
    total = 0.
    for i, batch in enumerate(batches):
        # DDP exchanges gradients in the last micro-batch only
        if hasattr(net, 'require_backward_grad_sync'):
            net.require_backward_grad_sync = i == len(batches) - 1
        loss = loss_of(net, batch, cfg)
        (loss * WORLD).backward()               # DDP and FSDP average over ranks, but our weights are for a sum
        total += loss.detach()
    # the norm is that of all gradients, on whatever rank they are
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), cfg.grad_clip or math.inf)
    norm = norm.full_tensor() if hasattr(norm, 'full_tensor') else norm
    norm = norm.item()                          # the only point of an update where the host waits for the device
    if not math.isfinite(norm):
        last = [None, *models.list_checkpoints(cfg.out_dir)][-1]
        raise UserError(f'stopped before an update: loss {float(total)}, gradient norm {norm}; '
                        f'the last good checkpoint: {last}')
    step(optimizers, factor)
    return float(total), norm


def step(optimizers, factor):
    """Update the weights with their gradients, at this fraction of the peak learning rates."""
    for optimizer in optimizers:
        # Muon and AdamW have different peaks, but one schedule
        for group in optimizer.param_groups:
            group['lr'] = optimizer.defaults['lr'] * factor
        optimizer.step()
        optimizer.zero_grad()


def lr_factor(it, cfg):
    """Return the learning rate of update `it` (from 0) as a fraction of the peak."""
    if cfg.schedule == 'points':
        # two points at the same number of tokens are a jump
        tokens, rates = zip(*cfg.lr_points)
        seen = (it + 1) * cfg.global_batch * cfg.seq_len
        return float(np.interp(seen, tokens, rates)) / cfg.learning_rate
    # 1) warm up
    if it < cfg.warmup_iters:
        return (it + 1) / cfg.warmup_iters
    # 2) hold, until only decay_iters remain, 3) decay to min_lr_ratio
    after_warmup = max(cfg.max_iters - cfg.warmup_iters, 1)
    decay_iters = min(cfg.decay_iters or after_warmup, after_warmup)
    height = min(1.0, (cfg.max_iters - it) / decay_iters)
    if cfg.schedule == 'cosine':
        height = 0.5 - 0.5 * math.cos(math.pi * height)
    return cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * height


def make_optimizers(model, cfg):
    """Return [AdamW], or [Muon for the matrices of the blocks, AdamW for the rest], at their peaks."""
    # Muon is for hidden matrices; embedding, head and norms stay with AdamW
    optimizers = []
    weight_decay = cfg.weight_decay
    matrices = []
    if cfg.optimizer == 'muon':
        # (nor can a matrix be divided that has fewer rows than there are ranks)
        matrices = [p for p in model.blocks.parameters() if p.dim() == 2 and len(p) >= WORLD]
        optimizers.append(torch.optim.Muon(
            matrices, lr=cfg.muon_lr, momentum=0.95, weight_decay=weight_decay, adjust_lr_fn='match_rms_adamw'))
        weight_decay = 0.0
    taken = set(matrices)
    rest = [p for p in model.parameters() if p not in taken]
    # norms are not decayed
    groups = [{'params': [p for p in rest if p.dim() == 2], 'weight_decay': weight_decay},
              {'params': [p for p in rest if p.dim() < 2], 'weight_decay': 0.0}]
    # fused: one kernel for many parameters
    optimizers.append(torch.optim.AdamW(
        groups, lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2), fused=True))
    return optimizers


# ----------------------------------------------------------------------------------------------------------
# Processes, and the model spread over them


def join_processes(cfg):
    """Join the other processes, if torchrun has started any."""
    if WORLD == 1:
        return
    if cfg.device == 'cuda':
        # one process per GPU
        torch.cuda.set_device(int(os.environ['LOCAL_RANK']))
    # After a restart the group must not find the addresses of the last one, which torchrun's store still
    # holds. (Each node counts its own restarts, so this works on one node. For more see config/llada_8b.py.)
    one_node = os.environ.get('LOCAL_WORLD_SIZE') == str(WORLD)
    attempt = os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') if one_node else '0'
    store = dist.PrefixStore(attempt, next(dist.rendezvous('env://'))[0])
    backend = 'cpu:gloo,cuda:nccl' if cfg.device == 'cuda' else 'gloo'
    dist.init_process_group(backend, store=store, rank=RANK, world_size=WORLD)


def all_reduce(x):
    """Sum a CPU tensor over all ranks, in place."""
    if WORLD > 1:
        dist.all_reduce(x)
    return x


def broadcast(value=None):
    """Return the value of rank 0 on all ranks. So all wait for rank 0."""
    box = [value]
    if WORLD > 1:
        dist.broadcast_object_list(box)
    return box[0]


def build(cfg):
    """Make the model, its weights still empty, and spread it over the ranks -> model, what to call in training."""
    # the settings of the model have the names of its fields
    shape = {field.name: getattr(cfg, field.name) for field in fields(models.ModelConfig)}
    model = models.empty_model(models.ModelConfig(**shape))
    # a model that does not fit into memory may take minutes to fail, so this is said first
    if RANK == 0:
        print(f'{model.num_params():,} parameters ({model.num_params(non_embedding=True):,} outside embedding and '
              f'head), {cfg.device}, {"bfloat16" if cfg.bf16 else "float32"}, {WORLD} processes', flush=True)

    # 1) compile the blocks; a share of the activations can be kept only by the compiler
    if cfg.compile:
        from torch._functorch import config as functorch
        functorch.activation_memory_budget = cfg.act_memory or 1.0
        models.compile_blocks(model)
    model.recompute = cfg.act_memory == 0 or (cfg.act_memory < 1 and not cfg.compile)

    # 2) shard the parameters (FSDP2), over all ranks or in groups (HSDP)
    if cfg.sharded:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
        mesh = init_device_mesh(cfg.device, (WORLD,))
        if 0 < cfg.fsdp < WORLD:
            sizes = (WORLD // cfg.fsdp, cfg.fsdp)
            mesh = init_device_mesh(cfg.device, sizes, mesh_dim_names=('replicate', 'shard'))

        # inputs are not cast, because rotary angles stay in float32
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if cfg.bf16 else None,
            reduce_dtype=torch.float32, cast_forward_inputs=False)
        for part in (*model.blocks, model):
            fully_shard(part, mesh=mesh, mp_policy=policy)

    # 3) now the parameters get memory; several processes without shards replicate them (DDP)
    model.to_empty(device=cfg.device)
    if WORLD == 1 or cfg.sharded:
        return model, model
    return model, torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)


# ----------------------------------------------------------------------------------------------------------
# Reports


def held_out_bound(model, held_out, cfg, tok):
    """Measure the bound (causal: the exact value) on held-out rows, shared among the ranks -> dict for the log."""
    rows, n_bytes = held_out
    logp = torch.zeros(len(rows), dtype=torch.float64)

    # FSDP needs all ranks in each forward pass, so a rank that has run out of rows repeats the last one
    for start in range(0, len(rows), WORLD):
        i = min(start + RANK, len(rows) - 1)
        with autocast(cfg):
            value = diffusion.score_row(
                model, *rows[i], tok.mask_id, tok.eos_id, key=(0, i),
                mc_num=cfg.eval_draws, batch_size=cfg.eval_draws)
        if start + RANK < len(rows):
            logp[i] = value

    # each rank has filled in its own rows, so the sum has them all
    all_reduce(logp)
    names = ('val_nats', 'val_nats_stderr', 'val_bits_per_byte', 'val_bits_per_byte_stderr')
    return dict(zip(names, diffusion.nats_and_bits(logp, rows, n_bytes)))


@torch.compiler.set_stance('force_eager')                   # the sampler's shapes are not worth compiling
def sample_text(model, it, cfg, tok):
    """Write a sample, on one line, that is drawn from the model: temperature 1, random remasking."""
    # a text begins after the end of another, an example with BOS
    first = tok.bos_id if cfg.masking == 'response' else tok.eos_id
    x, _, _ = diffusion.canvas([[first]], cfg.sample_tokens, tok.mask_id, tok.pad_id, cfg.device)
    options = dict(
        suppress=tok.unused(model.config.vocab_size),
        generator=diffusion.keyed_generator(cfg.seed, it, device=cfg.device))
    with autocast(cfg):
        if cfg.causal:
            x, _ = diffusion.ar_generate(model, x[:, :1], cfg.sample_tokens, **options)
        else:
            params = diffusion.SamplingParams(temperature=1.0, remasking='random')
            x, _ = diffusion.generate(model, x, tok.mask_id, params, **options)
    text = tok.decode(x[0, 1:].tolist())
    return ' '.join(text.split())


def report(model, it, held_out, cfg, tok):
    """Log and print the validation bound and a sample."""
    entry = held_out_bound(model, held_out, cfg, tok)
    entry['sample'] = sample_text(model, it, cfg, tok)
    log(cfg, iter=it, **entry)
    if RANK == 0:
        sign = '=' if cfg.causal else '<='
        print(f"iter {it} | validation {sign} {entry['val_nats']:.3f} nats/token "
              f"{sign} {entry['val_bits_per_byte']:.3f} +- {entry['val_bits_per_byte_stderr']:.3f} bits/byte")
        print(f"     {entry['sample']}")


def progress(it, counted, norm, seconds, model, cfg):
    """Log and print the mean loss and the speed since the last line."""
    # losses of ranks are parts of a sum, so they add up
    sums = torch.tensor(counted, dtype=torch.float64).sum(0)
    loss, tokens = all_reduce(sums).tolist()
    rate = tokens / seconds
    entry = {'loss': loss / len(counted), 'grad_norm': norm, 'tokens_per_second': rate}
    entry['lr'] = cfg.learning_rate * lr_factor(it - 1, cfg)
    line = f"iter {it}/{cfg.max_iters} | loss {entry['loss']:.3f} | {rate / 1e3:.1f}k tok/s"

    # memory, and which share of the peak FLOP/s went into the model (MFU)
    if cfg.device == 'cuda':
        entry['gb'] = torch.cuda.max_memory_allocated() / 1e9
        name = torch.cuda.get_device_name()
        peaks = [peak for kind, peak in PEAKS.items() if kind in name]
        if peaks:
            # about half of the tokens are masked, and only those need the head
            flops = model.flops_per_token(1.0 if cfg.causal else 0.5) * rate
            entry['mfu'] = flops / WORLD / peaks[0]
            line += f" | MFU {entry['mfu']:.1%}"
    log(cfg, iter=it, tokens=it * cfg.global_batch * cfg.seq_len, **entry)
    if RANK == 0:
        minutes = (cfg.max_iters - it) * seconds / len(counted) / 60
        print(f'{line} | {minutes:.1f} min left', flush=True)


def log(cfg, **entry):
    """Append a line to log.jsonl. (After a resume some iterations come twice; the last one counts.)"""
    if RANK == 0:
        with Path(cfg.out_dir, 'log.jsonl').open('a') as file:
            print(json.dumps(entry), file=file)


# ----------------------------------------------------------------------------------------------------------
# Checkpoints: a folder in the released layout, with state.json and optimizer/ beside the weights


def optimizer_state(model, optimizers):
    """Return every tensor of the optimizers by name, in place and sharded as it is."""
    # AdamW keeps two moments and a step count for each parameter, Muon a momentum
    state = {}
    for name, p in model.named_parameters():
        for optimizer in optimizers:
            for key, value in optimizer.state.get(p, {}).items():
                state[f'{name}.{key}'] = value
    return state


def save_checkpoint(it, model, optimizers, cfg, tok):
    """Write out_dir/iter_N under another name, rename it when it is complete, then remove the oldest ones."""
    # a run that is killed here leaves `iter_unfinished`, which the next save removes
    final = Path(cfg.out_dir, f'iter_{it:07d}')
    unfinished = Path(cfg.out_dir, 'iter_unfinished')
    if RANK == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
    broadcast()                                             # wait for the folder

    # rank 0 writes the weights, and each rank its part of the optimizer's state
    writer = dcp.HuggingFaceStorageWriter(str(unfinished / 'optimizer'), save_distributed=True)
    try:
        models.save_model(model, unfinished, vars(tok))
        dcp.save(optimizer_state(model, optimizers), storage_writer=writer)
    except (OSError, SafetensorError, dcp.CheckpointException) as error:
        raise UserError(f'{unfinished} could not be written: {error}') from None
    broadcast()                                             # wait for all files

    if RANK == 0:
        tok.save(unfinished)
        sha256 = {str(file.relative_to(unfinished)): models.file_sha256(file)
                  for file in unfinished.rglob('*') if file.is_file()}
        state = {'iteration': it, 'settings': settings_of(cfg), 'sha256': sha256}
        (unfinished / 'state.json').write_text(json.dumps(state, indent=1))
        shutil.rmtree(final, ignore_errors=True)            # a damaged one that was passed over
        unfinished.rename(final)
        for old in models.list_checkpoints(cfg.out_dir)[:-cfg.keep_last]:       # none for 0
            if old < final:                                 # a damaged one may count as newer
                shutil.rmtree(old, ignore_errors=True)
    broadcast()


def newest_undamaged(out_dir):
    """Return the newest checkpoint of a run whose checksums are right, and its state.json."""
    # a damaged one is written again when the run gets there
    for folder in reversed(models.list_checkpoints(out_dir)):
        try:
            return folder, models.read_state(folder)
        except (UserError, OSError) as error:
            say(f'passing over {folder}: {error}')
    models.newest_checkpoint(out_dir)                       # says what is there instead
    raise UserError(f'{out_dir}: no undamaged checkpoint in it')


def load_checkpoint(model, optimizers, cfg, tok):
    """Continue from the newest undamaged checkpoint in out_dir -> its iteration."""
    folder, state = broadcast(newest_undamaged(cfg.out_dir) if RANK == 0 else None)
    before = state['settings']
    # a CPU is timed for it, and might take the other one today (sharded parameters have theirs already)
    if cfg.dtype == 'auto' and not cfg.sharded:
        cfg.dtype = before['dtype']
        cfg.bf16 = cfg.dtype == 'bfloat16'
    now = settings_of(cfg)
    # with another architecture nothing fits; with another batch, data and schedule would jump
    fixed = ['optimizer', 'global_batch', *(field.name for field in fields(models.ModelConfig))]
    for name in fixed:
        if before[name] != now[name]:
            raise UserError(f'cannot resume {folder} with {name} {now[name]}, the run has {before[name]}')
    data.check_same(data.get_tokenizer(folder), tok, folder, cfg.dataset)
    changed = [f'{name} {before[name]} -> {now[name]}' for name in now if now[name] != before.get(name)]
    if changed and RANK == 0:
        say(f'resuming {folder} with other settings: {", ".join(changed)}')
    # an optimizer creates its state in a step, so make one of size 0
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    step(optimizers, 0.0)
    models.read_tensors(folder, models.released_parameters(model))
    models.read_tensors(folder / 'optimizer', optimizer_state(model, optimizers))
    return state['iteration']


def settings_of(cfg):
    """Return the settings as a dict, without what `main` has added and what may differ when a run resumes."""
    added = ('bf16', 'sharded', 'resume', 'out_dir', 'device')
    return {name: value for name, value in vars(cfg).items() if name not in added}


def load_init_weights(model, cfg, tok):
    """Copy the weights of cfg.init_from, if architecture and tokenizer are the same."""
    # without its values, because each rank reads its own part of them
    start, meta = models.load_model(cfg.init_from, 'meta')
    data.check_same(data.tokenizer_of(meta), tok, cfg.init_from, cfg.dataset)
    # another context is fine, because rotary positions set no limit, and so is the autoregressive twin
    if replace(start.config, seq_len=cfg.seq_len, causal=cfg.causal) != model.config:
        raise UserError(f'init_from: {cfg.init_from} is {start.config}, the settings say {model.config}')
    names = models.released_parameters(start)
    models.read_tensors(Path(meta['folder']), dict(zip(names, model.parameters())))


def init_or_resume(model, optimizers, cfg, tok):
    """Fill the model from a checkpoint, from other weights, or at random -> the iteration to continue from."""
    # torchrun replaces a process that died (--max-restarts), and all of them start again
    restarts = int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0))
    restarted = all_reduce(torch.tensor(restarts))
    exists = broadcast(bool(models.list_checkpoints(cfg.out_dir)))
    if cfg.resume or (exists and restarted):
        return load_checkpoint(model, optimizers, cfg, tok)
    if exists:
        raise UserError(f'{cfg.out_dir} already holds a run; continue it with --resume, or choose another --out_dir')

    if cfg.init_from:
        load_init_weights(model, cfg, tok)
    else:
        # drawn on the CPU they are the same on every device, but for 8B that would take minutes
        where = 'cpu' if model.num_params() < 3e9 else None
        models.init_weights(model, cfg.seed, cfg.emb_std, device=where)
    return 0


# ----------------------------------------------------------------------------------------------------------
# The run


def catch_signals():
    """Return a list that receives Ctrl-C, SIGTERM and SIGHUP, so that the loop can save before it ends."""
    # only noted here: the loop must not end in the middle of an update
    received = []

    def note(number, frame):
        received.append(number)
        # the next one ends the process at once (but under torchrun it may be the same one, repeated)
        if WORLD == 1:
            signal.signal(number, signal.SIG_DFL)
        # the terminal was closed, so printing would fail
        if number == getattr(signal, 'SIGHUP', None):
            sys.stdout = sys.stderr = open(os.devnull, 'w')

    for name in ('SIGINT', 'SIGTERM', 'SIGHUP'):
        number = getattr(signal, name, None)                # Windows has no SIGHUP
        # what is ignored stays so, as SIGHUP under nohup
        if number and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, note)
    return received


def announce(it, model, cfg):
    """Write all settings to settings.py and to the log, and say what is about to run."""
    if RANK:
        return
    # so `python train.py out/docs/settings.py --resume` continues a run, whatever its flags were
    settings = dict(settings_of(cfg), out_dir=cfg.out_dir)
    lines = [f'{name} = {value!a}\n' for name, value in settings.items()]
    Path(cfg.out_dir, 'settings.py').write_text(''.join(lines))
    # the first line of the log says what it takes to repeat the run
    device = torch.cuda.get_device_name() if cfg.device == 'cuda' else cfg.device
    log(cfg, resumed=it, config=settings, parameters=model.num_params(), device=device,
        processes=WORLD, torch=torch.__version__)
    begun = f'resumed from iteration {it}; ' if it else ''
    print(f'{begun}writing to {cfg.out_dir}/')


def open_data(cfg):
    """Open the data set -> rows to train on, held-out rows, tokenizer."""
    if RANK == 0:
        data.open_dataset(cfg.dataset)                      # makes 'docs' on first use
    broadcast()
    dataset = data.open_dataset(cfg.dataset)
    tok = dataset.parts[0].tokenizer()
    if 0 < cfg.vocab_size < tok.vocab_size:
        raise UserError(f'vocab_size must hold the {tok.vocab_size} tokens of {cfg.dataset}, got {cfg.vocab_size}')
    source = data.open_source(
        dataset, 'train', cfg.masking, tok, cfg.seq_len, cfg.seed,
        random_length=cfg.random_length, random_split=cfg.random_split, isolate=cfg.isolate,
        copies=2 if cfg.complementary else 1, pad_group=cfg.pad_group)
    val = data.open_source(dataset, 'val', cfg.masking, tok, cfg.seq_len)
    return source, val.held_out(cfg.eval_windows), tok


def main(cfg):
    cfg.global_batch = cfg.global_batch or cfg.batch_size
    cfg.complementary = cfg.complementary and not cfg.causal
    check(cfg)
    cfg.device, dtype = models.pick_device(cfg.device, cfg.dtype)
    cfg.sharded = WORLD > 1 and cfg.fsdp != 0

    # data, model, optimizers, and where they stand
    join_processes(cfg)
    # each CPU is timed for it, and all must agree
    cfg.bf16 = broadcast(dtype == torch.bfloat16)
    source, held_out, tok = open_data(cfg)
    cfg.vocab_size = cfg.vocab_size or tok.vocab_size
    model, net = build(cfg)
    optimizers = make_optimizers(model, cfg)
    it = init_or_resume(model, optimizers, cfg, tok)
    cfg.dtype = 'bfloat16' if cfg.bf16 else 'float32'
    Path(cfg.out_dir).mkdir(parents=True, exist_ok=True)
    announce(it, model, cfg)
    if net is not model:
        # DDP reorders its gradient buckets after the first backward pass, so one is discarded. Without it, a
        # resumed run would begin with a sum of gradients in another order, to other last bits.
        loss_of(net, micro_batches(source, it, cfg, tok)[0], cfg).backward()
        net.zero_grad()

    signals = catch_signals()
    stopping = False
    # loss and tokens of each update since the last line of the log
    started = time.perf_counter()
    counted = []

    while it < cfg.max_iters and not stopping:
        batches = micro_batches(source, it, cfg, tok)
        loss, norm = train_step(net, optimizers, batches, lr_factor(it, cfg), cfg)
        it += 1
        counted.append((loss, sum(batch.xt.numel() for batch in batches)))

        # all ranks stop after the same update, whichever of them got the signal
        stopping = bool(all_reduce(torch.tensor(len(signals))))
        due = it % cfg.eval_interval == 0 or it == cfg.max_iters
        # the first update has a line of the log, too, so that a slow run does not seem to hang
        if it > 1 and it % cfg.log_interval and not due and not stopping:
            continue
        seconds = time.perf_counter() - started
        progress(it, counted, norm, seconds, model, cfg)
        if due or stopping:
            save_checkpoint(it, model, optimizers, cfg, tok)
        if due:
            # after the save, because FSDP leaves some parameters gathered when no backward pass follows
            report(model, it, held_out, cfg, tok)
        started = time.perf_counter()
        counted = []

    finish(it, signals, cfg)


def finish(it, signals, cfg):
    """Say what was saved and what to type next, and end the process."""
    done = it >= cfg.max_iters
    if RANK == 0:
        hint = shlex.join(['python', 'sample.py', cfg.out_dir]) if done else 'the same command with --resume'
        question = data.a_question(cfg.dataset)
        if done and question:
            hint += f' --chat    and say, for example: {question}'
        print(f'saved iteration {it} of {cfg.max_iters} in {cfg.out_dir}/; next:  {hint}', flush=True)
    # the exit code says which signal ended it
    number = signals[0] if signals else signal.SIGTERM      # of another rank
    code = 0 if done else 128 + number
    if WORLD > 1:
        dist.destroy_process_group()
        os._exit(code)                                      # gloo's threads sometimes abort Python's own way out
    if code:
        sys.exit(code)


if __name__ == '__main__':
    run(main, globals())
