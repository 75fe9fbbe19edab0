"""Measure training speed and memory on this machine: whole updates with their data, variants taking turns.

    python tests/bench_train.py config/docs.py              # the settings of train.py, and those below
    python tests/bench_train.py --task=memory               # peak of one update, vocabulary 126,464
    python tests/bench_train.py --task=packing              # packed against padded batches
    python tests/bench_train.py config/llada_1b.py --batch_size=4 --only='AdamW, compiled'      # on a GPU
    python tests/bench_train.py --nanogpt=../nanoGPT --n_layer=4 --d_model=128 --d_ff=344 --seq_len=64 \\
        --batch_size=12                                   # beside a checkout of karpathy/nanoGPT, at its size

A large model fits on a GPU once, so there take one variant per run. An update is one micro-batch. Speed is
the median of the rounds, and its ratio is to the first row, the loop of the guideline (reference.py).
MFU is relative to the fastest matrix product seen in the same process.
"""

import resource
import statistics
import subprocess
import sys
import tempfile
import time
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

task = 'speed'          # 'speed', 'memory' or 'packing'
seconds = 4.0           # how long each variant runs in each round
rounds = 3              # how many rounds
nanogpt = ''            # a checkout of karpathy/nanoGPT
compiled = True         # if True, also measure with torch.compile
only = ''               # only variants whose name contains this
child = ''              # (memory: which variant this process measures)

GPU = torch.cuda.is_available()


# --------------------------------------------------------------------------------------------------------
# The variants: functions that make an `update` for `alternate`


def ready(cfg, dataset, **changes):
    """Return what an update of one micro-batch needs: settings, model, optimizers, rows, tokenizer."""
    cfg = SimpleNamespace(**{**vars(cfg), 'fsdp': 0, 'sharded': False, **changes})
    cfg.global_batch = cfg.batch_size
    cfg.vocab_size = cfg.vocab_size or 4096
    cfg.complementary = cfg.complementary and not cfg.causal
    train.check(cfg)
    cfg.device, compute = models.pick_device(cfg.device, cfg.dtype)
    cfg.bf16 = compute == torch.bfloat16
    model, _ = train.build(cfg)
    models.init_weights(model)
    tok = dataset.parts[0].tokenizer()
    source = data.open_source(
        dataset, 'train', 'unified', tok, cfg.seq_len,
        random_split=cfg.random_split, copies=2 if cfg.complementary else 1)
    return cfg, model, train.make_optimizers(model, cfg), source, tok


def our_update(cfg, dataset, change=lambda batch, tok: batch, **changes):
    cfg, model, optimizers, source, tok = ready(cfg, dataset, **changes)
    iterations = count()

    def update():
        batch, = train.micro_batches(source, next(iterations), cfg, tok)
        train.train_step(model, optimizers, [change(batch, tok)], 1.0, cfg)

    return update


def guideline_update(cfg, dataset, dtype):
    cfg, model, _, source, _ = ready(cfg, dataset, dtype=dtype, compile=False, act_memory=1.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, foreach=True)
    iterations = count()

    def update():
        x0, _, _ = source.batch(next(iterations), range(cfg.batch_size), cfg.batch_size)
        ours = models.attention
        models.attention = reference.plain_attention
        reference.plain_step(model, optimizer, x0.to(cfg.device), cfg.vocab_size - 1, train.autocast(cfg))
        models.attention = ours

    return update


def nanogpt_update(cfg):
    """Make nanoGPT's model and optimizer: on a CPU, in float32, not compiled, without dropout."""
    # its file is called model.py as well
    ours = sys.modules.pop('model')
    sys.path.insert(0, cfg.nanogpt)
    import model as theirs
    sys.path.pop(0)
    sys.modules['model'] = ours
    vocab_size = cfg.vocab_size or 4096
    net = theirs.GPT(theirs.GPTConfig(
        n_layer=cfg.n_layer, n_head=cfg.n_head, n_embd=cfg.d_model, block_size=cfg.seq_len, bias=False,
        vocab_size=vocab_size, dropout=0.0))
    optimizer = net.configure_optimizers(0.1, 1e-3, (0.9, 0.99), 'cpu')
    tokens = np.random.default_rng(0).integers(vocab_size, size=10 ** 6).astype(np.uint16)

    def update():
        starts = torch.randint(len(tokens) - cfg.seq_len, (cfg.batch_size,)).tolist()
        windows = torch.from_numpy(np.stack([tokens[i:i + cfg.seq_len + 1] for i in starts]).astype(np.int64))
        _, loss = net(windows[:, :-1], windows[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    return update


# --------------------------------------------------------------------------------------------------------
# The tasks


def alternate(variants, cfg):
    """Run the variants in turn after a warm-up, and print their speed -> {name: median of tokens/s}."""
    updates = {name: make() for name, make in variants.items() if cfg.only in name}
    if not updates:
        raise UserError(f'only: no variant has {cfg.only!r} in its name, there are: {"; ".join(variants)}')
    for update in updates.values():
        for _ in range(5):
            update()

    speeds = {name: [] for name in updates}
    for _ in range(cfg.rounds):
        for name, update in updates.items():
            n = 0
            start = time.perf_counter()
            while time.perf_counter() - start < cfg.seconds:
                update()                                    # it ends with a number that the host waits for
                n += 1
            speeds[name].append(n * cfg.batch_size * cfg.seq_len / (time.perf_counter() - start))

    medians = {name: statistics.median(values) for name, values in speeds.items()}
    first = next(iter(medians.values()))
    for name, values in speeds.items():
        print(f'{name:<40} {medians[name]:9.0f} tok/s  {medians[name] / first:5.2f}x  '
              f'(spread {min(values):.0f} .. {max(values):.0f})')
    if GPU:
        print(f'peak memory {torch.cuda.max_memory_allocated() / 1e9:.1f} GB')
    return medians


def fastest_product(device, dtype):
    """Return the speed of the fastest product of two random matrices, in FLOP/s."""
    best = 0.0
    for n in (512, 1024, 2048) if device == 'cpu' else (4096, 8192):
        a = torch.randn(n, n, device=device).to(dtype)
        for _ in range(6):
            start = time.perf_counter()
            (a @ a)[0, 0].item()
            best = max(best, 2 * n ** 3 / (time.perf_counter() - start))
    return best


def speed(cfg, dataset):
    """Compare the guideline's loop, nanoGPT and ours, in float32, in bfloat16 where it is fast, compiled."""
    resolved, model, *_ = ready(cfg, dataset)
    variants = {'guideline loop, float32': lambda: guideline_update(cfg, dataset, 'float32')}
    if cfg.nanogpt:
        variants['nanoGPT, float32, eager'] = lambda: nanogpt_update(cfg)
    eager = dict(optimizer='adamw', compile=False)
    variants['ours, float32, AdamW'] = lambda: our_update(cfg, dataset, **eager, dtype='float32')
    if resolved.bf16:
        variants['guideline loop, bfloat16'] = lambda: guideline_update(cfg, dataset, 'bfloat16')
        variants['ours, bfloat16, AdamW'] = lambda: our_update(cfg, dataset, **eager)
    variants['ours, as configured'] = lambda: our_update(cfg, dataset, compile=False)
    if cfg.compiled:
        variants['ours, AdamW, compiled'] = lambda: our_update(cfg, dataset, optimizer='adamw', compile=True)
    medians = alternate(variants, cfg)

    flops = model.flops_per_token(0.5)
    name = max((name for name in medians if name.startswith('ours') or cfg.only), key=medians.get)
    reached = medians[name] * flops
    ceiling = fastest_product(resolved.device, torch.bfloat16 if resolved.bf16 else torch.float32)
    print(f'{name}: {flops / 1e6:.2f} MFLOP per token, {reached / 1e9:.1f} GFLOP/s, '
          f'{reached / ceiling:.1%} of the fastest product seen ({ceiling / 1e9:.0f} GFLOP/s)')


def packing(cfg, dataset):
    """Compare windows of which 30 % are split in two, packed, with each segment padded to its own row."""
    def padded(batch, tok):
        if batch.cu_seqlens is None:
            return batch
        limits = batch.cu_seqlens.long().unique()           # without empty segments
        segments = batch.xt.flatten().tensor_split(limits[1:-1])
        xt = torch.nn.utils.rnn.pad_sequence(segments, batch_first=True, padding_value=tok.pad_id)
        segment = torch.bucketize(batch.positions, limits[1:], right=True)
        moved = segment * xt.shape[1] + batch.positions - limits[segment]
        return batch._replace(xt=xt, positions=moved, cu_seqlens=None)

    changes = {'padded': padded, 'packed': lambda batch, tok: batch,
               'no splits at all': lambda batch, tok: batch._replace(cu_seqlens=None)}
    split = dict(random_split=0.3, optimizer='adamw')
    alternate({name: lambda change=change: our_update(cfg, dataset, change, **split)
               for name, change in changes.items()}, cfg)


def memory(cfg):
    """Print the peak of a loss and its backward pass beyond the model, 512 of 1,024 tokens masked."""
    if not cfg.child:
        for name in ('guideline', 'ours'):
            command = [sys.executable, __file__, '--task=memory', f'--child={name}']
            printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            print(f'{name:<10} {float(printed.split()[-1]) / 2 ** 20:8.0f} MiB')
        return

    def peak():
        if GPU:
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    device = 'cuda' if GPU else 'cpu'
    shape = models.ModelConfig(126464, 1024, 1, 4, 4, 256, 768)
    model = models.Transformer(shape).to(device)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    x0 = torch.randint(126000, (1, 1024), device=device)
    masked = torch.arange(1024, device=device)[None] % 2 == 0
    t = torch.full((1,), 0.5, device=device)
    mask_id = 126336
    before = peak()
    if cfg.child == 'guideline':
        loss = reference.plain_loss(model, x0, mask_id, p_mask=t.expand(1, 1024), masked=masked)
    else:
        weights = diffusion.loss_weights(torch.ones_like(masked), masked, t)
        batch = diffusion.masked_batch(x0, torch.where(masked, mask_id, x0), masked, weights)
        loss = diffusion.diffusion_loss(model, batch)
    loss.backward()
    print(peak() - before)


def main(cfg):
    if cfg.task not in TASKS:
        raise UserError(f'task must be one of {", ".join(TASKS)}, got {cfg.task!r}')
    if cfg.task == 'memory':
        memory(cfg)
        return
    device = torch.cuda.get_device_name() if GPU else 'cpu'
    print(f'torch {torch.__version__}, {torch.get_num_threads()} threads, {device}:', *sys.argv[1:])
    with tempfile.TemporaryDirectory() as folder:
        # random bytes stand in for the tokens of any vocabulary
        rng = np.random.default_rng(0)
        texts = [bytes(rng.integers(32, 97, 4000).tolist()).decode() for _ in range(400)]
        records = [(f'text {i}', {'text': text}) for i, text in enumerate(texts)]
        data.prepare([records], f'{folder}/bench', 'bytes')
        dataset = data.open_dataset(f'{folder}/bench')
        dict(speed=speed, packing=packing)[cfg.task](cfg, dataset)


if __name__ == '__main__':
    command.run(main, globals(), train)
