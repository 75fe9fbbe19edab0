"""Measure the two most expensive parts of a training step one by one: attention and the head.

    python tests/bench_kernels.py                           # shapes of LLaDA 8B on a GPU, of docs on a CPU
    python tests/bench_kernels.py --parts=attentions --seq_len=8192

Each row has milliseconds (a median), TFLOP/s, and on a GPU the peak memory beyond the inputs in GB. The FLOPs
of attention are those of the full square. The data are random, because on zeros a GPU is faster.
"""

import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.benchmark import Timer

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
import reference  # noqa: E402

import model as models  # noqa: E402
from configurator import UserError, run  # noqa: E402

parts = 'attentions heads'              # what to measure
seq_len = 0                             # of attention; 0 = 4096 on a GPU, 128 on a CPU
head_rows = 0                           # masked tokens, for which the head predicts; 0 = 8192 or 1024
vocab_size = 0                          # 0 = LLaDA's 126464 on a GPU, 4096 on a CPU
seconds = 1.0                           # how long each kernel runs

GPU = torch.cuda.is_available()
DEVICE = 'cuda' if GPU else 'cpu'
NARROW = torch.bfloat16 if GPU else torch.float32


def row(name, work, flops, cfg):
    """Print a line of the table. If this torch or device does not have the kernel, say so."""
    try:
        work()
        memory = ''
        if GPU:
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            work()
            memory = f'{(torch.cuda.max_memory_allocated() - before) / 1e9:6.1f}'
        timer = Timer('work()', globals=dict(work=work), num_threads=torch.get_num_threads())
        took = timer.blocked_autorange(min_run_time=cfg.seconds).median
        print(f'{name:<56} {1e3 * took:9.3f} {flops / took / 1e12:9.2f} {memory}', flush=True)
    except RuntimeError as error:
        print(f'{name:<56} {str(error).splitlines()[0][:60]}')


def both_directions(name, work, flops, cfg):
    """Print forward, and forward with backward, which has 2.5 times as many FLOPs again."""
    row(f'{name}, forward', lambda: work().detach(), flops, cfg)
    row(f'{name}, both', lambda: work().sum().backward(), 3.5 * flops, cfg)


def random(*shape, dtype=NARROW):
    return torch.randn(*shape, device=DEVICE, dtype=dtype).requires_grad_()


def attentions(cfg):
    """Compare torch's kernel in the dtype of its inputs with ours, which is float32 on a CPU."""
    T = cfg.seq_len
    for B, H, kv, D in ((4, 32, 32, 128), (4, 32, 4, 64)) if GPU else ((16, 4, 4, 48), (4, 8, 2, 64)):
        flops = 4 * B * H * T * T * D
        for dtype in (torch.bfloat16,) if GPU else (torch.bfloat16, torch.float32):
            q, k, v = (random(B, heads, T, D, dtype=dtype) for heads in (H, kv, kv))
            shape = f'{dtype}, ({B}, {H}/{kv}, {T}, {D})'
            for name, f in (('torch', reference.plain_attention), ('ours', models.attention)):
                both_directions(f'{name}, {shape}', partial(f, q, k, v), flops, cfg)
        # the kernel for segments
        if GPU:
            cu_seqlens = torch.arange(0, B * T + 1, T // 4, dtype=torch.int32, device=DEVICE)
            work = partial(models.packed_attention, q, k, v, cu_seqlens)
            both_directions(f'packed, 4 per window, {shape}', work, flops / 4, cfg)


def heads(cfg):
    """Predict the masked rows, one half of all, and compute the gradients."""
    M, V = cfg.head_rows, cfg.vocab_size
    masked = torch.arange(2 * M, device=DEVICE) % 2 == 0
    targets = torch.randint(V, (M,), device=DEVICE)

    def every_logit(h, weight):
        return F.cross_entropy(F.linear(h, weight)[masked].float(), targets)

    def ours(h, weight):
        return models.head_cross_entropy(h[masked], weight, targets).mean()

    for C in (2048, 4096) if GPU else (192,):
        h = random(2 * M, C)
        weight = random(V, C, dtype=torch.float32)
        for name, f, factor in (('every logit, then the masked rows', every_logit, 2), ('ours', ours, 1),
                                ('ours, compiled', torch.compile(ours), 1)):
            def work(f=f, h=h, weight=weight):
                f(h, weight.to(NARROW)).backward()

            row(f'd {C}: {name}', work, factor * 6 * M * V * C, cfg)


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
    for part in cfg.parts.split():
        dict(attentions=attentions, heads=heads)[part](cfg)


if __name__ == '__main__':
    run(main, globals())
