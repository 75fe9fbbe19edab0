"""Trains a mask predictor (or, with --causal=true, the autoregressive baseline) from scratch.

    python train.py                                     # the default: config/docs.py, minutes on two CPU cores
    python train.py config/docs_ar.py                   # the same Transformer, left to right
    python train.py config/shakespeare.py --max_iters=500
    python train.py --resume                            # goes on where the newest checkpoint of out_dir stopped

The objective is Eq. 3 of LLaDA (arXiv 2502.09992v3). Data and noise of a row are functions of (seed, iteration, row):
a run that was stopped and resumed ends with the same bits as one that was not.
"""

import json
import math
import os
import platform
import shutil
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

import data
import diffusion
from configurator import command, configure, fail, user_errors
from model import (
    ModelConfig,
    Transformer,
    file_sha256,
    find_checkpoints,
    init_weights,
    load_model,
    pick_device,
    read_checkpoint,
)

# --- run
out_dir = 'out/docs'            # checkpoints (iter_*/) and log.jsonl
resume = False                  # continue from the newest checkpoint in out_dir
init_from = ''                  # start from weights of this checkpoint or released folder (new optimizer, iteration 0)
seed = 1337                     # of the weights, the order of the data, and the noise
# --- data
dataset = 'docs'                # a name that `python data.py` lists, or a folder that it wrote
verify_data = True              # check the sha256 of every shard at the start (1-2 GB/s)
# --- model (the fields of model.ModelConfig)
seq_len = 128                   # tokens in a training window
n_layer = 4                     # blocks
n_head = 4                      # attention heads
n_kv_head = 4                   # key/value heads; fewer is grouped-query attention
d_model = 192                   # width of the residual stream
d_ff = 512                      # width inside the SwiGLU
rope_theta = 10000.0            # base of the rotary frequencies (500000 in LLaDA, whose context is 4096)
norm_eps = 1e-5                 # of RMSNorm
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
# --- schedule, in iterations
max_iters = 1500                # optimizer updates
batch_size = 16                 # windows in one forward pass
grad_accum = 1                  # forward passes in one update
schedule = 'cosine'             # 'cosine', or 'wsd': warm up, stay, decay linearly over the last decay_iters
warmup_iters = 50               # linear from 0
decay_iters = 300               # wsd only
min_lr_ratio = 0.0              # the last learning rate as a part of the peak
# --- reports
eval_interval = 250             # iterations between checkpoints, each with its validation bound and a sample
eval_windows = 256              # validation windows in that bound (all, if there are fewer)
eval_draws = 4                  # masks drawn for each of them
log_interval = 10               # iterations between lines of log.jsonl
keep_last = 2                   # newest checkpoints to keep, besides the best
sample_tokens = 64              # length of the sample shown at each evaluation; 0 shows none
# --- machine
device = 'auto'                 # 'cuda', 'mps' or 'cpu'; auto takes the first there is
dtype = 'auto'                  # 'bfloat16' or 'float32' for activations; auto: bfloat16 where the hardware has it
compile = False                 # torch.compile each block (on CPU needs a C++ compiler and half a minute)

# ---------------------------------------------------------------------------------------------------------------------


def check(cfg):
    """Ranges of the settings; raises ValueError with every problem, one a line."""
    wrong = []
    for key in ('seq_len', 'max_iters', 'batch_size', 'grad_accum', 'eval_interval', 'eval_windows', 'eval_draws',
                'log_interval', 'keep_last', 'learning_rate', 'muon_lr'):
        if not getattr(cfg, key) > 0:
            wrong.append(f'{key} must be above 0, got {getattr(cfg, key)}')
    for key in ('seed', 'warmup_iters', 'decay_iters', 'grad_clip', 'weight_decay', 'sample_tokens', 'emb_std',
                'locality'):
        if not getattr(cfg, key) >= 0:
            wrong.append(f'{key} must be 0 or more, got {getattr(cfg, key)}')
    for key in ('mask_eps', 'min_lr_ratio', 'beta1', 'beta2'):
        if not 0 <= getattr(cfg, key) < 1:
            wrong.append(f'{key} must lie in [0, 1), got {getattr(cfg, key)}')
    for key, allowed in (('optimizer', ('muon', 'adamw')), ('schedule', ('cosine', 'wsd'))):
        if getattr(cfg, key) not in allowed:
            wrong.append(f'{key} must be one of {", ".join(allowed)}, got {getattr(cfg, key)!r}')
    if cfg.seed >= 2 ** 63 or not cfg.out_dir:
        wrong.append(f'seed must be below 2^63 and out_dir not empty, got {cfg.seed} and {cfg.out_dir!r}')
    if cfg.tied and cfg.emb_std:
        wrong.append(f'a tied head is as large as the embedding: set emb_std=0, got {cfg.emb_std}')
    if cfg.init_from and cfg.resume:
        wrong.append('init_from starts a new run, resume continues one: give only one of them')
    if wrong:
        raise ValueError('\n'.join(wrong))


def lr_factor(it, cfg):
    """The learning rate of update `it` (0-based) as a part of the peak: a pure function, so nothing need be saved."""
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


def micro_batches(corpus, cfg, it, mask_id):
    """Data and noise of update `it`, in grad_accum pieces: (x0, maskable, t, masked), all made on the host.

    Row r of the global batch is sample it * batch + r of the data stream, with the noise of (seed, it, r): splitting
    the batch in another way changes nothing.
    """
    size = cfg.batch_size * cfg.grad_accum
    t = None
    if not cfg.causal:
        generator = diffusion.keyed_generator(cfg.seed, it)
        t = diffusion.sample_t(size, 0.0 if cfg.count_form else cfg.mask_eps, cfg.stratified, generator)
    for start in range(0, size, cfg.batch_size):
        rows = range(start, start + cfg.batch_size)
        x0, maskable, _ = data.batch(corpus, 'train', [it * size + r for r in rows], cfg.seq_len, cfg.seed)
        if cfg.causal:
            yield x0, maskable, None, None
            continue
        u = diffusion.row_noise(cfg.seed, it, rows, cfg.seq_len)
        part = t[start:start + cfg.batch_size]
        _, masked = diffusion.forward_process(x0, part, mask_id, maskable, exact=cfg.count_form, u=u)
        yield x0, maskable, part, masked


def train_step(model, optimizers, corpus, cfg, it, tok, device, autocast):
    """One update -> (loss in nats per token, gradient norm). If either is not finite, it stops before the update."""
    total = cfg.batch_size * cfg.grad_accum * cfg.seq_len                        # b * L of Eq. 3, over the global batch
    loss = 0.0
    for piece in micro_batches(corpus, cfg, it, tok.mask_id):
        x0, maskable, t, masked = (None if z is None else z.to(device) for z in piece)
        with autocast:
            if cfg.causal:
                part = diffusion.ar_loss(model, x0, maskable, bos_id=tok.eos_id, total=total)
            else:
                part = diffusion.diffusion_loss(model, x0, maskable, tok.mask_id, t=t, masked=masked,
                                                exact=cfg.count_form, total=total)      # Eq. 3
        part.backward()
        loss += part.item()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf).item()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise FloatingPointError(f'iteration {it + 1}: loss {loss}, gradient norm {norm}; no update was made')
    for o in optimizers:
        for group in o.param_groups:
            group['lr'] = group['peak'] * lr_factor(it, cfg)
        o.step()
        o.zero_grad(set_to_none=True)
    return loss, norm


@torch.no_grad()
def validate(model, windows, cfg, tok, device, autocast):
    """Nats per token on the validation windows and its standard error: exact for the baseline, else the bound Eq. 6."""
    model.eval()
    x0, maskable = windows.to(device), torch.ones_like(windows, dtype=torch.bool, device=device)
    with autocast:
        if cfg.causal:
            logp = torch.cat([diffusion.ar_log_prob(model, x, m, bos_id=tok.eos_id)
                              for x, m in zip(x0.split(64), maskable.split(64))]).cpu()
        else:
            logp = diffusion.bound_per_row(model, x0, maskable, tok.mask_id, draws=cfg.eval_draws, batch_size=64)
    model.train()
    nats = -logp / windows.shape[1]
    return nats.mean().item(), (nats.std() / len(nats) ** 0.5).item() if len(nats) > 1 else math.nan


def sample_text(model, cfg, tok, device, autocast, it):
    """A sample on one line: random remasking at temperature 1 draws from the model, where low-confidence would not."""
    generator, n = diffusion.keyed_generator(cfg.seed, it, device=device), min(cfg.sample_tokens, cfg.seq_len)
    model.eval()
    with autocast:
        if cfg.causal:
            start = torch.full((1, 1), tok.eos_id, device=device)
            x = diffusion.ar_generate(model, start, n, generator=generator).x[:, 1:]
        else:
            x = torch.full((1, n), tok.mask_id, device=device)
            x = diffusion.generate(model, x, tok.mask_id, steps=n, temperature=1.0, remasking='random',
                                   generator=generator).x
    model.train()
    text = tok.decode(x[0].tolist())
    return ''.join(c if c.isprintable() else '\\n' if c == '\n' else ' ' for c in text)


def save_checkpoint(run, it, model, optimizers, cfg, tok, corpus):
    """Writes run/iter_N aside and renames it when complete: a folder with that name is whole, or not there."""
    final = run / f'iter_{it:07d}'
    aside = run / f'{final.name}.tmp'
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        torch.save(model.state_dict(), aside / 'model.pt')
        torch.save([o.state_dict() for o in optimizers], aside / 'optim.pt')
    except (OSError, RuntimeError) as e:                                    # torch has its own words for a full disk
        shutil.rmtree(aside, ignore_errors=True)
        raise OSError(f'{final}: could not be written ({str(e).splitlines()[0][:100]})') from None
    spec = corpus.manifest['tokenizer']
    if spec.endswith('.json'):
        shutil.copyfile(corpus.folder / spec, aside / 'tokenizer.json')
    files = {f.name: file_sha256(f) for f in sorted(aside.iterdir())}
    manifest = {'format': 'nanollada 1', 'iteration': it, 'tokens': it * cfg.batch_size * cfg.grad_accum * cfg.seq_len,
                'model': vars(model.config), 'config': vars(cfg), 'tokenizer': spec, 'files': files,
                'ids': {f'{k}_id': getattr(tok, f'{k}_id') for k in ('mask', 'eos', 'pad', 'bos')}}
    (aside / 'manifest.json').write_text(json.dumps(manifest, indent=1), encoding='utf-8')
    shutil.rmtree(final, ignore_errors=True)
    os.replace(aside, final)
    return final


def load_checkpoint(run, model, optimizers, device):
    """Restores the newest undamaged checkpoint of a run -> its iteration and settings; says which it passes over."""
    for folder in reversed(find_checkpoints(run)):
        try:
            manifest = read_checkpoint(folder)
        except ValueError as e:
            print(f'passing over {folder}: {e}', file=sys.stderr)
            os.replace(folder, folder.with_name(folder.name + '.damaged'))      # its iteration will be saved anew
            continue
        ours = vars(model.config)
        differ = [f'{k} {v} here, {ours[k]} asked' for k, v in manifest['model'].items() if ours.get(k) != v]
        if differ:
            raise ValueError(f'{folder}: another architecture ({"; ".join(differ)})')
        model.load_state_dict(torch.load(folder / 'model.pt', map_location=device, weights_only=True))
        for o, state in zip(optimizers, torch.load(folder / 'optim.pt', map_location=device, weights_only=True)):
            given = [{k: v for k, v in group.items() if k != 'params'} for group in o.param_groups]
            try:
                o.load_state_dict(state)
            except ValueError as e:
                raise ValueError(f'{folder}: made with another optimizer ({e})') from None
            for group, now in zip(o.param_groups, given):
                group.update(now)                                           # what is set now counts
        return manifest['iteration'], manifest['config']
    raise FileNotFoundError(f'{run}: no checkpoint to resume from')


def prune(run, keep_last):
    """Removes checkpoints but the newest and the best (best.json); never the one that best.json names."""
    best = json.loads((run / 'best.json').read_text())['iteration'] if (run / 'best.json').is_file() else None
    for folder in find_checkpoints(run)[:-keep_last]:
        if int(folder.name[5:]) != best:
            shutil.rmtree(folder)


class Log:
    """log.jsonl: one object a line, flushed at once. On resume, lines of iterations to be repeated are dropped."""

    def __init__(self, path, iteration):
        self.path, self.lines = path, []
        if iteration is not None and path.is_file():
            for line in path.read_text(encoding='utf-8', errors='replace').splitlines():
                try:
                    entry = json.loads(line)
                except (ValueError, RecursionError):
                    continue                                                # a line cut by a kill
                at = entry.get('iter', 0) if isinstance(entry, dict) else None
                if isinstance(at, int) and at <= iteration:
                    self.lines.append(entry)
        aside = path.with_suffix('.tmp')
        aside.write_text(''.join(json.dumps(entry) + '\n' for entry in self.lines), encoding='utf-8')
        os.replace(aside, path)
        self.file = path.open('a', encoding='utf-8')

    def write(self, **entry):
        self.lines.append(entry)
        self.file.write(json.dumps(entry) + '\n')
        self.file.flush()

    def bound_at(self, it):
        """The validation entry of an iteration, if it is already in the log."""
        return next((e for e in self.lines if e.get('iter') == it and 'val_nats' in e), None)


@contextmanager
def alone(run):
    """Holds a lock on the run folder (where the system has such locks): a second run in it is refused."""
    with (run / '.lock').open('w') as file:
        try:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            pass                                                            # Windows
        except OSError:
            fail(f'{run}: another process is training here')
        yield


class Stop:
    """Ctrl-C and SIGTERM ask for a checkpoint after the running update; a second one leaves at once."""

    def __enter__(self):
        self.signal = None
        self.before = {number: signal.signal(number, self.ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def ask(self, number, frame):
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = number


def prepare_run(cfg):
    """Everything that can be refused is refused here, before the first file is written."""
    check(cfg)
    device, autocast = pick_device(cfg.device, cfg.dtype)
    run = Path(cfg.out_dir)
    if find_checkpoints(run) and not cfg.resume:
        raise ValueError(f'{run} already holds a run: continue it with --resume, or choose another --out_dir')
    corpus = data.open_dataset(cfg.dataset, cfg.verify_data)
    tok = data.corpus_tokenizer(corpus)
    shape = {f: getattr(cfg, f) for f in ('seq_len', 'n_layer', 'n_head', 'n_kv_head', 'd_model', 'd_ff', 'rope_theta',
                                          'norm_eps', 'tied', 'causal')}
    model = Transformer(ModelConfig(vocab_size=corpus.manifest['vocab_size'], **shape))
    if cfg.init_from:
        start, _ = load_model(cfg.init_from, dtype=torch.float32)
        if start.config != model.config:
            raise ValueError(f'init_from: {cfg.init_from} is {start.config}, the settings say {model.config}')
        model.load_state_dict(start.state_dict())
    else:
        init_weights(model, cfg.seed, cfg.emb_std or None, cfg.locality)
    model.to(device)                                                # filled on the host: the same on every device
    optimizers = make_optimizers(model, cfg, device)
    it, before = load_checkpoint(run, model, optimizers, device) if cfg.resume else (0, vars(cfg))
    for key, value in vars(cfg).items():
        if key != 'resume' and before.get(key) != value:
            print(f'resuming with another {key}: {value!r}, it was {before.get(key)!r}', file=sys.stderr)
    windows = data.all_windows(corpus, 'val', cfg.seq_len, cfg.eval_windows)
    data.batch(corpus, 'train', [0], cfg.seq_len, cfg.seed)                             # too little text shows here
    run.mkdir(parents=True, exist_ok=True)
    return device, autocast, run, corpus, tok, model, optimizers, it, windows


def report(it, model, optimizers, run, corpus, cfg, tok, windows, device, autocast, log, bar):
    """A checkpoint, its validation bound, a sample; then old checkpoints go."""
    if not (run / f'iter_{it:07d}').exists():
        save_checkpoint(run, it, model, optimizers, cfg, tok, corpus)
    entry, scale = log.bound_at(it), 1 / math.log(2) / data.bytes_per_token(corpus, 'val')
    if entry is None:
        nats, stderr = validate(model, windows, cfg, tok, device, autocast)
        entry = {'iter': it, 'val_nats': nats, 'val_nats_stderr': stderr, 'val_bits_per_byte': nats * scale,
                 'val_bits_per_byte_stderr': stderr * scale}
        if cfg.sample_tokens:
            entry['sample'] = sample_text(model, cfg, tok, device, autocast, it)
        log.write(**entry)
    sign = '=' if cfg.causal else '<='
    bar.write(f"iter {it:5d} | validation {sign} {entry['val_nats']:.3f} nats/token {sign} "
              f"{entry['val_bits_per_byte']:.3f} +- {entry['val_bits_per_byte_stderr']:.3f} bits/byte")
    if entry.get('sample'):
        bar.write(f"           | {entry['sample'][:200]}")
    best = min((e for e in log.lines if 'val_nats' in e), key=lambda e: e['val_nats'])
    aside = run / 'best.tmp'
    aside.write_text(json.dumps({'iteration': best['iter'], 'val_nats': best['val_nats']}), encoding='utf-8')
    os.replace(aside, run / 'best.json')
    prune(run, cfg.keep_last)
    return entry


def start_log(run, it, cfg, model, device, autocast):
    """Opens log.jsonl, with a first line of settings and versions, and tells the terminal what is about to run."""
    log = Log(run / 'log.jsonl', it if cfg.resume else None)
    if log.lines:
        log.write(resumed=it, config=vars(cfg))
    else:
        log.write(config=vars(cfg), model=vars(model.config), parameters=model.num_params(), device=device,
                  dtype='bfloat16' if isinstance(autocast, torch.autocast) else 'float32', torch=torch.__version__,
                  numpy=np.__version__, python=platform.python_version(), machine=platform.platform())
    print(f'{model.num_params():,} parameters ({model.num_params(non_embedding=True):,} outside embedding and head), '
          f'{device}, {log.lines[0].get("dtype")}, {torch.get_num_threads()} threads; writing to {run}/')
    return log


def main(config):
    cfg = SimpleNamespace(**config)
    with user_errors():
        device, autocast, run, corpus, tok, model, optimizers, it, windows = prepare_run(cfg)
    if cfg.compile:
        for block in model.blocks:
            block.compile()
    with alone(run), Stop() as stop:
        log = start_log(run, it, cfg, model, device, autocast)
        try:
            it, entry = loop(it, cfg, model, optimizers, run, corpus, tok, windows, device, autocast, log, stop)
        except (FloatingPointError, OSError) as e:
            kept = find_checkpoints(run)
            last = f'the last good checkpoint is {kept[-1]}' if kept else 'there is no checkpoint yet'
            fail(f'stopped: {e}; {last}', 1)
    if entry is None:
        print(f'saved iteration {it} in {run}/; go on with the same command and --resume' if it
              else 'stopped before the first update')
        sys.exit(128 + stop.signal)
    print(f"done: {entry['val_bits_per_byte']:.3f} bits/byte in {run}/iter_{it:07d}; "
          f'look at it:  python sample.py {run}')


def loop(it, cfg, model, optimizers, run, corpus, tok, windows, device, autocast, log, stop):
    """Updates from iteration `it` to the end -> (iteration, last report), or (iteration, None) if asked to stop."""
    tokens = cfg.batch_size * cfg.grad_accum * cfg.seq_len
    per_byte = 1 / math.log(2) / data.bytes_per_token(corpus, 'train')                 # nats per token -> bits per byte
    smooth, since, started = None, it, time.perf_counter()
    with tqdm(total=cfg.max_iters, initial=it, disable=None, dynamic_ncols=True,
              bar_format='{desc} | eta {remaining}') as bar:
        while True:
            if it % cfg.eval_interval == 0 and it or it == cfg.max_iters:
                entry = report(it, model, optimizers, run, corpus, cfg, tok, windows, device, autocast, log, bar)
                since, started = it, time.perf_counter()
            if it >= cfg.max_iters:
                return it, entry
            if stop.signal is not None:
                if it and not (run / f'iter_{it:07d}').exists():
                    save_checkpoint(run, it, model, optimizers, cfg, tok, corpus)
                    prune(run, cfg.keep_last)
                return it, None
            loss, norm = train_step(model, optimizers, corpus, cfg, it, tok, device, autocast)
            it += 1
            smooth = loss if smooth is None else 0.95 * smooth + 0.05 * loss
            bar.update()
            if it % cfg.log_interval == 0 or it == cfg.max_iters:
                rate = (it - since) * tokens / (time.perf_counter() - started)
                lr = optimizers[-1].param_groups[0]['lr']
                log.write(iter=it, tokens=it * tokens, loss=loss, grad_norm=norm, lr=lr, tokens_per_second=round(rate))
                line = f'loss {smooth:.3f} | {smooth * per_byte:.3f} bits/byte | lr {lr:.2e} | {rate / 1e3:.1f}k tok/s'
                bar.set_description_str(f'iter {it}/{cfg.max_iters} | {line}')
                if bar.disable and it % (10 * cfg.log_interval) == 0:
                    eta = (cfg.max_iters - it) * tokens / rate / 60
                    print(f'iter {it}/{cfg.max_iters} | {line} | eta {eta:.1f} min', flush=True)


if __name__ == '__main__':
    command(main, configure(globals()))
