"""Measure the kernels of a training step one by one: matrix products, attention, the head.

    python tests/bench_kernels.py                               # shapes of LLaDA on a GPU, docs on a CPU
    python tests/bench_kernels.py --parts=attentions --seq_len=8192

Each row has milliseconds (median of ten, after three), TFLOP/s, and for the head on a GPU the peak memory
beyond its inputs. The FLOPs of attention are those of the full square. The data are random, because on zeros
a GPU is faster.
"""

import statistics
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
import reference  # noqa: E402

import model as models  # noqa: E402
from configurator import UserError, run  # noqa: E402

parts = 'products attentions heads'     # what to measure, with blanks between
seq_len = 0             # of attention; 0 = 4096 on a GPU, 128 on a CPU
head_rows = 0           # masked tokens, for which the head predicts; 0 = 8192 on a GPU, 1024 on a CPU
vocab_size = 0          # 0 = LLaDA's 126464 on a GPU, 4096 on a CPU
rounds = 10             # how often each kernel runs

GPU = torch.cuda.is_available()
DEVICE = 'cuda' if GPU else 'cpu'


def milliseconds(work):
    """Return how long a call takes, on a GPU by its own clock."""
    if not GPU:
        start = time.perf_counter()
        work()
        return 1e3 * (time.perf_counter() - start)
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def measure(work, rounds):
    """Return milliseconds of one call, and its peak memory in GB (on a GPU)."""
    for _ in range(3):
        work()
    before = 0
    if GPU:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    times = [milliseconds(work) for _ in range(rounds)]
    peak = torch.cuda.max_memory_allocated() - before if GPU else 0
    return statistics.median(times), peak / 1e9


def row(name, work, flops, cfg, memory=False):
    """Print a line of the table. If this torch or device does not have the kernel, say so."""
    try:
        ms, peak = measure(work, cfg.rounds)
    except RuntimeError as error:
        print(f'{name:<56} {str(error).splitlines()[0][:60]}')
        return
    gb = f'{peak:6.1f}' if memory and GPU else ''
    print(f'{name:<56} {ms:9.3f} {flops / ms / 1e9:9.2f} {gb}', flush=True)


def random(*shape, dtype=torch.bfloat16, grad=False):
    """Return normal noise on the device."""
    return torch.randn(*shape, device=DEVICE, dtype=dtype).requires_grad_(grad)


def products(cfg):
    """Multiply matrices (m, k) and (k, n)."""
    shapes = [(2048, 192, 512), (2048, 512, 192), (2048, 192, 192), (cfg.head_rows, 192, cfg.vocab_size)]
    if GPU:
        shapes = [
            (8192, 8192, 8192), (16384, 4096, 12288), (16384, 12288, 4096), (16384, 4096, 4096),
            (16384, 2048, 5632), (16384, 2048, 5634), (cfg.head_rows, 4096, cfg.vocab_size),
            (356, 4096, 12288), (160, 4096, 12288), (32, 4096, 12288)]
    for dtype in (torch.bfloat16,) if GPU else (torch.bfloat16, torch.float32):
        for m, k, n in shapes:
            work = partial(F.linear, random(m, k, dtype=dtype), random(n, k, dtype=dtype))
            row(f'{m} x {k} x {n}, {dtype}', work, 2 * m * k * n, cfg)


def attentions(cfg):
    """Attend to all T positions, by each of torch's kernels on a GPU."""
    T = cfg.seq_len
    if not GPU:
        # model.attention computes in float32 on a CPU, because this was faster. Is it here?
        for B, H, kv, D in ((16, 4, 4, 48), (4, 8, 2, 64)):
            shape = f'({B}, {H}/{kv}, {T}, {D})'
            for dtype in (torch.bfloat16, torch.float32):
                q, k, v = (random(B, heads, T, D, dtype=dtype, grad=True) for heads in (H, kv, kv))
                for name, f in (('torch', reference.plain_attention), ('ours', models.attention)):
                    work = partial(f, q, k, v)
                    both_directions(f'{name}, {dtype}, {shape}', work, 4 * B * H * T * T * D, cfg)
        return

    backends = {'default': None, 'cudnn': SDPBackend.CUDNN_ATTENTION, 'flash': SDPBackend.FLASH_ATTENTION,
                'efficient': SDPBackend.EFFICIENT_ATTENTION}
    for B, H, kv, D in ((4, 32, 32, 128), (4, 32, 4, 64), (4, 16, 4, 128)):
        q, k, v = (random(B, heads, T, D, grad=True) for heads in (H, kv, kv))
        for name, backend in backends.items():
            work = partial(by_backend, q, k, v, backend)
            both_directions(f'{name}, ({B}, {H}/{kv}, {T}, {D})', work, 4 * B * H * T * T * D, cfg)

    B, H, D = 4, 32, 128
    q, k, v = (random(B, H, T, D, grad=True) for _ in range(3))
    for n in (1, 4):
        cu_seqlens = torch.arange(0, B * T + 1, T // n, dtype=torch.int32, device=DEVICE)
        work = partial(models.packed_attention, q, k, v, cu_seqlens)
        both_directions(f'packed, ({B}, {H}, {T}, {D}), {n} per window', work, 4 * B * H * T * T * D / n, cfg)


def by_backend(q, k, v, backend):
    """Attend by one of torch's kernels, or by the one that torch chooses."""
    with sdpa_kernel(backend) if backend else nullcontext():
        return reference.plain_attention(q, k, v)


def both_directions(name, work, flops, cfg):
    """Print forward, and forward with backward, which has 2.5 times as many FLOPs again."""
    row(f'{name}, forward', lambda: work().detach(), flops, cfg)
    row(f'{name}, both', lambda: work().sum().backward(), 3.5 * flops, cfg)


def heads(cfg):
    """Predict the masked rows, one half of all, and compute the gradients."""
    M, V = cfg.head_rows, cfg.vocab_size
    dtype = torch.bfloat16 if GPU else torch.float32
    masked = torch.arange(2 * M, device=DEVICE) % 2 == 0
    targets = torch.randint(V, (M,), device=DEVICE)

    def every_logit(h, weight):
        logits = F.linear(h, weight.to(dtype))[masked]
        return F.cross_entropy(logits.float(), targets, reduction='none')

    def of_masked_rows(h, weight):
        return F.cross_entropy(F.linear(h[masked], weight.to(dtype)).float(), targets, reduction='none')

    def ours(h, weight):
        return models.head_cross_entropy(h[masked], weight.to(dtype), targets)

    for C in (2048, 4096) if GPU else (192,):
        h = random(2 * M, C, dtype=dtype, grad=True)
        weight = (random(V, C, dtype=torch.float32) * C ** -0.5).requires_grad_()
        for name, f, factor in (('every logit, then the masked rows', every_logit, 2),
                                ('masked rows, all at once', of_masked_rows, 1),
                                ('ours (in chunks, if they are many)', ours, 1),
                                ('ours, compiled', torch.compile(ours), 1)):
            work = partial(backward_of, f, h, weight)
            row(f'd {C}: {name}', work, factor * 6 * M * V * C, cfg, memory=True)


def backward_of(f, h, weight):
    """Compute the mean loss and its gradients."""
    f(h, weight).mean().backward()


PARTS = {f.__name__: f for f in (products, attentions, heads)}


def main(cfg):
    parts = cfg.parts.split()
    if not set(parts) <= set(PARTS):
        raise UserError(f'parts: expected some of {", ".join(PARTS)}; got {cfg.parts!r}')
    cfg.seq_len = cfg.seq_len or (4096 if GPU else 128)
    cfg.head_rows = cfg.head_rows or (8192 if GPU else 1024)
    cfg.vocab_size = cfg.vocab_size or (126464 if GPU else 4096)
    name = torch.cuda.get_device_name() if GPU else f'cpu, {torch.get_num_threads()} threads'
    print(f'torch {torch.__version__}, {name}:', *sys.argv[1:])
    print(f'{"":<56} {"ms":>9} {"TFLOP/s":>9} {"GB" if GPU else "":>6}')
    for part in parts:
        PARTS[part](cfg)


if __name__ == '__main__':
    run(main, globals())
