"""Measure training speed and memory on this machine: whole updates with their data, variants taking turns.

    python tests/bench_train.py config/docs.py                      # settings of train.py, and those below
    python tests/bench_train.py --nanogpt=../nanoGPT --n_layer=4 --d_model=128 --d_ff=344 \\
        --seq_len=64 --batch_size=12                                # beside karpathy/nanoGPT, at its size
    python tests/bench_train.py --task=memory                       # peak of one update, vocabulary 126,464
    python tests/bench_train.py --task=packing                      # packed against padded batches
    python tests/bench_train.py --task=saving                       # what checkpoints cost
    python tests/bench_train.py config/llada_1b.py --batch_size=4 --only='AdamW, compiled'      # on a GPU

A large model fits on a GPU once, so there take one variant per run. An update is one micro-batch. Speed is
the median of the rounds, and its ratio is to the first row, the loop of the official guideline
(reference.py). MFU is relative to the fastest matrix product seen in the same process, and to the data sheet
if the device is in train.PEAKS.
"""

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import fields
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
import command  # noqa: E402
import reference  # noqa: E402

import data  # noqa: E402
import diffusion  # noqa: E402
import model as models  # noqa: E402
import train  # noqa: E402
from configurator import UserError, say  # noqa: E402

task = 'speed'          # speed, memory, packing or saving
seconds = 4.0           # how long each variant runs in each round
rounds = 3              # how many rounds
nanogpt = ''            # a checkout of karpathy/nanoGPT
compiled = True         # if True, also measure with torch.compile
only = ''               # only variants whose name contains this
child = ''              # (memory: which variant this process measures)

TASKS = ('speed', 'memory', 'packing', 'saving')


def settings(cfg, **changes):
    """Return the settings as train.main completes them, with some changes. An update is one micro-batch."""
    cfg = SimpleNamespace(**{**vars(cfg), 'fsdp': 0, **changes})
    cfg.global_batch = cfg.batch_size
    cfg.vocab_size = cfg.vocab_size or 4096
    cfg.complementary = cfg.complementary and not cfg.causal
    train.check(cfg)
    cfg.device, compute = models.pick_device(cfg.device, cfg.dtype)
    cfg.bf16 = compute == torch.bfloat16
    cfg.sharded = False
    return cfg


def random_data(folder):
    """Prepare random bytes as a data set. They stand in for the tokens of any vocabulary."""
    rng = np.random.default_rng(0)
    texts = [bytes(rng.integers(32, 97, 4000).tolist()).decode() for _ in range(400)]
    records = [(f'text {i}', {'text': text}) for i, text in enumerate(texts)]
    data.prepare([records], folder, 'bytes')
    return data.open_dataset(str(folder))


def ready(cfg, dataset):
    """Return what training needs: model, what to call in training, optimizers, source of rows, tokenizer."""
    model, net = train.build(cfg)
    models.init_weights(model)
    tok = dataset.parts[0].tokenizer()
    source = data.open_source(
        dataset, 'train', 'unified', tok, cfg.seq_len,
        random_split=cfg.random_split, copies=2 if cfg.complementary else 1)
    return model, net, train.make_optimizers(model, cfg), source, tok


# ----------------------------------------------------------------------------------------------------------
# The variants: functions that return a function that makes one update


def our_step(cfg, dataset, **changes):
    """Make updates as train.py does, with some changes to the settings."""
    cfg = settings(cfg, **changes)
    _, net, optimizers, source, tok = ready(cfg, dataset)
    iterations = count()

    def step():
        batches = train.micro_batches(source, next(iterations), cfg, tok)
        train.train_step(net, optimizers, batches, 1.0, cfg)

    return step


def guideline_step(cfg, dataset, dtype):
    """Make updates as the official guideline words them (reference.py)."""
    cfg = settings(cfg, dtype=dtype, compile=False, act_memory=1.0)
    model, _, _, source, _ = ready(cfg, dataset)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, foreach=True)
    iterations = count()

    def step():
        x0, _, _ = source.batch(next(iterations), range(cfg.batch_size), cfg.batch_size)
        ours = models.attention
        models.attention = reference.plain_attention
        reference.plain_step(model, optimizer, x0.to(cfg.device), cfg.vocab_size - 1, train.autocast(cfg))
        models.attention = ours

    return step


def nanogpt_step(cfg, path):
    """Make nanoGPT's model and optimizer: on a CPU, in float32, not compiled, without dropout."""
    # its file is called model.py as well
    ours = sys.modules.pop('model')
    sys.path.insert(0, path)
    import model as theirs
    sys.path.pop(0)
    sys.modules['model'] = ours
    net = theirs.GPT(theirs.GPTConfig(
        n_layer=cfg.n_layer, n_head=cfg.n_head, n_embd=cfg.d_model, block_size=cfg.seq_len, bias=False,
        vocab_size=cfg.vocab_size, dropout=0.0))
    optimizer = net.configure_optimizers(0.1, 1e-3, (0.9, 0.99), 'cpu')
    tokens = np.random.default_rng(0).integers(cfg.vocab_size, size=10 ** 6).astype(np.uint16)

    def windows(starts):
        return torch.stack([torch.from_numpy(tokens[i:i + cfg.seq_len].astype(np.int64)) for i in starts])

    def step():
        starts = torch.randint(len(tokens) - cfg.seq_len, (cfg.batch_size,))
        _, loss = net(windows(starts), windows(starts + 1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    return step


# ----------------------------------------------------------------------------------------------------------
# Speed


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def fastest_product(device, dtype):
    """Return the speed of the fastest product of two random matrices, in FLOP/s."""
    best = 0.0
    for n in (512, 1024, 2048) if device == 'cpu' else (4096, 8192):
        a = torch.randn(n, n, device=device).to(dtype)
        b = torch.randn(n, n, device=device).to(dtype)
        for _ in range(6):
            synchronize()
            start = time.perf_counter()
            a @ b
            synchronize()
            best = max(best, 2 * n ** 3 / (time.perf_counter() - start))
    return best


def alternate(variants, cfg):
    """Run the variants in turn after a warm-up, and print their speeds -> {name: median of tokens/s}."""
    steps = {name: make() for name, make in variants.items() if cfg.only in name}
    if not steps:
        raise UserError(f'only: no variant has {cfg.only!r} in its name, there are: {"; ".join(variants)}')
    for step in steps.values():
        for _ in range(5):
            step()

    speeds = {name: [] for name in steps}
    for k in range(cfg.rounds):
        for name, step in steps.items():
            n = 0
            synchronize()
            start = time.perf_counter()
            while time.perf_counter() - start < cfg.seconds:
                step()
                n += 1
            synchronize()
            speed = n * cfg.batch_size * cfg.seq_len / (time.perf_counter() - start)
            speeds[name].append(speed)
            say(f'round {k + 1} of {cfg.rounds} | {name:<40} {speed:9.0f} tok/s')

    medians = {name: statistics.median(values) for name, values in speeds.items()}
    first = next(iter(medians.values()))
    for name, values in speeds.items():
        print(f'{name:<40} {medians[name]:9.0f} tok/s  {medians[name] / first:5.2f}x  '
              f'(spread {min(values):.0f} .. {max(values):.0f})')
    if torch.cuda.is_available():
        print(f'peak memory {peak_bytes() / 1e9:.1f} GB')
    return medians


def speed_task(cfg, dataset):
    """Compare the speed of whole updates, and print what share of the machine's speed that is."""
    cfg = settings(cfg)
    variants = {'guideline loop, float32': lambda: guideline_step(cfg, dataset, 'float32')}
    if cfg.nanogpt:
        variants['nanoGPT, float32, eager'] = lambda: nanogpt_step(cfg, cfg.nanogpt)
    if cfg.bf16:
        variants['guideline loop, bfloat16'] = lambda: guideline_step(cfg, dataset, 'bfloat16')
    eager = dict(optimizer='adamw', compile=False)
    variants['ours, float32, AdamW'] = lambda: our_step(cfg, dataset, **eager, dtype='float32')
    if cfg.bf16:
        variants['ours, bfloat16, AdamW'] = lambda: our_step(cfg, dataset, **eager)
    variants['ours, as configured'] = lambda: our_step(cfg, dataset, compile=False)
    if cfg.compiled:
        variants['ours, AdamW, compiled'] = lambda: our_step(cfg, dataset, optimizer='adamw', compile=True)
    medians = alternate(variants, cfg)

    shape = {field.name: getattr(cfg, field.name) for field in fields(models.ModelConfig)}
    flops = models.empty_model(models.ModelConfig(**shape)).flops_per_token(0.5)
    name = max((name for name in medians if name.startswith('ours') or cfg.only), key=medians.get)
    reached = medians[name] * flops
    ceiling = fastest_product(cfg.device, torch.bfloat16 if cfg.bf16 else torch.float32)
    print(f'{name}: {flops / 1e6:.2f} MFLOP per token, {reached / 1e9:.1f} GFLOP/s, {reached / ceiling:.1%} '
          f'of the fastest product seen ({ceiling / 1e9:.0f} GFLOP/s)')
    if cfg.device == 'cuda':
        device_name = torch.cuda.get_device_name()
        peaks = [train.PEAKS[known] for known in train.PEAKS if known in device_name]
        if peaks:
            print(f'{reached / peaks[0]:.1%} of the data sheet')


# ----------------------------------------------------------------------------------------------------------
# The other tasks


def used_bytes():
    """Return the memory in use now. (On a CPU this needs Linux.)"""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    return int(Path('/proc/self/statm').read_text().split()[1]) * resource.getpagesize()


def peak_bytes():
    """Return the peak memory of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory_task(cfg):
    """Print the peak of a loss and its backward pass, beyond model and gradient (512 masks in 1,024)."""
    if not cfg.child:
        peaks = {}
        for name in ('guideline', 'ours'):
            argv = [sys.executable, __file__, '--task=memory', f'--child={name}']
            printed = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
            peaks[name] = float(printed.split()[-1])
            print(f'{name:<10} {peaks[name] / 2 ** 20:8.0f} MiB', flush=True)
        print(f"ratio      {peaks['ours'] / peaks['guideline']:8.2f}")
        return

    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    shape = dict(vocab_size=126464, seq_len=1024, n_layer=1, n_head=4, n_kv_head=4, d_model=256, d_ff=768)
    model = models.Transformer(models.ModelConfig(**shape)).to(device)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    x0 = torch.randint(126000, (1, 1024), device=device)
    masked = torch.arange(1024, device=device)[None] % 2 == 0
    t = torch.full((1,), 0.5, device=device)
    mask_id = 126336

    before = used_bytes()
    if cfg.child == 'guideline':
        loss = reference.plain_loss(model, x0, mask_id, p_mask=t.expand(1, 1024), masked=masked)
    else:
        weights = diffusion.loss_weights(torch.ones_like(masked), masked, t)
        batch = diffusion.masked_batch(x0, torch.where(masked, mask_id, x0), masked, weights)
        loss = diffusion.diffusion_loss(model, batch)
    loss.backward()
    print(peak_bytes() - before)


def padded(batch, tok, T):
    """Give each segment of a packed batch a row of its own."""
    borders = batch.cu_seqlens.tolist()
    segments = [(start, end) for start, end in zip(borders, borders[1:]) if start < end]
    flat = batch.xt.flatten()
    xt = torch.full((len(segments), T), tok.pad_id)
    moved_to = torch.empty(len(flat), dtype=torch.long)
    for i, (start, end) in enumerate(segments):
        xt[i, :end - start] = flat[start:end]
        moved_to[start:end] = i * T + torch.arange(end - start)
    return batch._replace(xt=xt, positions=moved_to[batch.positions], cu_seqlens=None)


def packing_task(cfg, dataset):
    """Split 30 % of the windows in two. Compare packing with padding each segment to a row (real tokens)."""
    cfg = settings(cfg, random_split=0.3, optimizer='adamw')
    _, net, optimizers, source, tok = ready(cfg, dataset)
    iterations = count()

    def step(how):
        batch, = train.micro_batches(source, next(iterations), cfg, tok)
        if how == 'padded' and batch.cu_seqlens is not None:
            batch = padded(batch, tok, cfg.seq_len)
        if how == 'no splits at all':
            batch = batch._replace(cu_seqlens=None)
        train.train_step(net, optimizers, [batch], 1.0, cfg)

    names = ('padded', 'packed', 'no splits at all')
    alternate({name: lambda name=name: lambda: step(name) for name in names}, cfg)


def saving_task(cfg, dataset, folder):
    """Print the seconds for 100 updates of 65 M parameters, without checkpoints and with one every 50."""
    shape = dict(n_layer=12, n_head=8, n_kv_head=8, d_model=512, d_ff=1536, batch_size=4, vocab_size=24000)
    cfg = settings(cfg, **shape, optimizer='adamw', out_dir=str(folder / 'run'))
    (folder / 'run').mkdir()
    for name, save_after in (('no checkpoint', ()), ('every 50', (55, 105))):
        model, net, optimizers, source, tok = ready(cfg, dataset)
        for it in range(1, 106):
            train.train_step(net, optimizers, train.micro_batches(source, it, cfg, tok), 1.0, cfg)
            if it in save_after:
                train.save_checkpoint(it, model, optimizers, cfg, tok)
            if it == 5:
                start = time.perf_counter()
        synchronize()
        taken = time.perf_counter() - start
        millions = model.num_params() / 1e6
        print(f'{name:<24} {millions:.1f} M parameters, {taken:6.1f} s for 100 updates', flush=True)


def main(cfg):
    if cfg.task not in TASKS:
        raise UserError(f'task must be one of {", ".join(TASKS)}, got {cfg.task!r}')
    if cfg.task == 'memory':
        memory_task(cfg)
        return
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else 'cpu'
    print(f'torch {torch.__version__}, {torch.get_num_threads()} threads, {device}:', *sys.argv[1:])
    with tempfile.TemporaryDirectory() as folder:
        dataset = random_data(Path(folder) / 'bench')
        if cfg.task == 'saving':
            saving_task(cfg, dataset, Path(folder))
        elif cfg.task == 'packing':
            packing_task(cfg, dataset)
        else:
            speed_task(cfg, dataset)


if __name__ == '__main__':
    command.run(main, globals(), train)
