"""The kernels that a GPU spends a training step in, one by one, run by hand: products, attention, the head.

    python tests/bench_kernels.py                               # shapes of LLaDA 8B and 1B, 4096 tokens in a window
    python tests/bench_kernels.py --tokens=8192

Each row: milliseconds (median of ten, after three), TFLOP/s, and for the head peak memory beyond its inputs. Attention
counts the full square. Random data: on zeros a GPU is faster.
"""

import statistics
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]
import evaluate  # noqa: E402
import model as models  # noqa: E402
from configurator import configure  # noqa: E402

tokens = 16384          # rows of the products
seq_len = 4096          # of attention
parts = 'products attentions heads'     # what to time
head_rows = 8192        # hidden tokens that the head reads out
vocab_size = 126464     # LLaDA's


def timed(work, *, rounds=10):
    """Milliseconds of one call, and the memory it took at its peak in GB."""
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, taken = torch.cuda.memory_allocated(), []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        taken.append(start.elapsed_time(end))
    return statistics.median(taken), (torch.cuda.max_memory_allocated() - before) / 1e9


def random(*shape, grad=False):
    return torch.randn(*shape, device='cuda', dtype=torch.bfloat16).requires_grad_(grad)


def row(name, work, flops, memory=''):
    """One line of the table; a kernel that this torch or card does not have says so."""
    try:
        ms, peak = timed(work)
    except RuntimeError as error:
        return [name, '', str(error).splitlines()[0][:60], '']
    return [name, f'{ms:.3f}', f'{flops / ms / 1e9:.0f}', f'{peak:.1f}' if memory else '']


def products(cfg):
    for m, k, n in ((8192, 8192, 8192), (cfg.tokens, 4096, 12288), (cfg.tokens, 12288, 4096), (cfg.tokens, 4096, 4096),
                    (cfg.tokens, 2048, 5632), (cfg.tokens, 2048, 5634), (cfg.head_rows, 4096, cfg.vocab_size),
                    (356, 4096, 12288), (160, 4096, 12288), (32, 4096, 12288)):
        a, w = random(m, k), random(n, k)
        yield row(f'{m} x {k} x {n}', partial(F.linear, a, w), 2 * m * k * n)


def attend(q, k, v, backend):
    """torch's attention by one backend, or by the one it chooses."""
    with sdpa_kernel(backend) if backend else nullcontext():
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])


def both_ways(name, work, flops):
    """The rows of forward, and of forward and backward, which needs 2.5 times as many FLOPs again."""
    yield row(f'{name}, forward', lambda: work().detach(), flops)
    yield row(f'{name}, both', lambda: work().sum().backward(), 3.5 * flops)


def attentions(cfg):
    T = cfg.seq_len
    backends = {'default': None, 'cudnn': SDPBackend.CUDNN_ATTENTION, 'flash': SDPBackend.FLASH_ATTENTION,
                'efficient': SDPBackend.EFFICIENT_ATTENTION}
    for B, H, kv, D in ((4, 32, 32, 128), (4, 32, 4, 64), (4, 16, 4, 128)):
        q, k, v = random(B, H, T, D, grad=True), random(B, kv, T, D, grad=True), random(B, kv, T, D, grad=True)
        for name, backend in backends.items():
            shape = f'{name}, ({B}, {H}/{kv}, {T}, {D})'
            yield from both_ways(shape, partial(attend, q, k, v, backend), 4 * B * H * T * T * D)

    B, H, D = 4, 32, 128
    for pieces in (1, 4):
        q, k, v = (random(B * T, H, D, grad=True) for _ in range(3))
        borders = torch.arange(0, B * T + 1, T // pieces, dtype=torch.int32, device='cuda')
        yield from both_ways(f'varlen, ({B}, {H}, {T}, {D}), {pieces} a window',
                             partial(varlen_attn, q, k, v, borders, borders, T, T), 4 * B * H * T * T * D / pieces)


def plain_head(h, weight, hidden, targets, weights, every):
    """Logits of every row and most of them thrown away, or of the hidden rows at once."""
    logits = F.linear(h, weight.bfloat16())[hidden] if every else F.linear(h[hidden], weight.bfloat16())
    (F.cross_entropy(logits.float(), targets, reduction='none') * weights).sum().backward()


def our_head(h, weight, hidden, targets, weights, chunk, ce):
    models.weighted_cross_entropy(h[hidden], weight, targets, weights, chunk, ce).backward()


def heads(cfg):
    """Loss and gradients of the rows that are hidden: half of 2 x head_rows."""
    M, V = cfg.head_rows, cfg.vocab_size
    ways = {'ours': models.cross_entropy_and_gradient,
            'ours, compiled': torch.compile(models.cross_entropy_and_gradient)}
    for C in (2048, 4096):
        h, weight = random(2 * M, C, grad=True), torch.randn(V, C, device='cuda') * C ** -0.5
        hidden = torch.arange(2 * M, device='cuda') % 2 == 0
        targets = torch.randint(V, (M,), device='cuda')
        given = h, weight.requires_grad_(), hidden, targets, torch.rand(M, device='cuda') / (2 * M)

        flops = 6 * M * V * C
        yield row(f'd {C}: every logit, then the hidden rows', partial(plain_head, *given, True), 2 * flops, 'peak')
        yield row(f'd {C}: hidden rows, all at once', partial(plain_head, *given, False), flops, 'peak')
        for name, ce in ways.items():
            for chunk in (1024, 2048, 4096, 8192):
                yield row(f'd {C}: {name}, {chunk} rows at a time', partial(our_head, *given, chunk, ce), flops, 'peak')


def main():
    cfg = SimpleNamespace(**configure(globals()))
    if not torch.cuda.is_available():
        raise SystemExit('these kernels need a GPU: none here')
    print(f'torch {torch.__version__}, {torch.cuda.get_device_name()}: ' + ' '.join(sys.argv))
    for part in cfg.parts.split():
        evaluate.table(list(globals()[part](cfg)), [part, 'ms', 'TFLOP/s', 'GB'])


if __name__ == '__main__':
    main()
