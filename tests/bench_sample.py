"""Sampling speed, run by hand: the plain loop, the exact sampler and faster, inexact variants, taking turns.

    python tests/bench_sample.py                                    # random weights, d 256, 4 blocks, V 32,768
    python tests/bench_sample.py --prompt_length=900
    python tests/bench_sample.py --checkpoint=out/sft_toy --questions=100       # trained: are the answers still right?
    python tests/bench_sample.py --checkpoint=out/sft_toy --questions=200 --gen_length=64 --block_length=8 \\
        --batch_size=16 --only='exact, to the last mask;exact'                  # does it pay to stop at the end?
    python tests/bench_sample.py --d_model=4096 --n_layer=32 --n_head=32 --d_ff=12288 --vocab_size=126464   # on a GPU

On random weights: milliseconds per forward pass, tokens per second, tokens per pass, the share of tokens that agree
with the first sampler's, and the speed relative to the plain loop (reference.py: every logit, every step), medians of
the rounds. On a checkpoint: the same for answers to held-out questions, and how many are right. One thread by default.
"""

import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
import reference  # noqa: E402

import diffusion  # noqa: E402
import evaluate  # noqa: E402
import model as models  # noqa: E402
from configurator import configure, settings_of  # noqa: E402

checkpoint = ''         # a run trained on examples; default: random weights
questions = 100         # how many of its held-out questions
prompt_length = 100     # tokens before the answer (random weights)
gen_length = 128        # tokens to write; for a checkpoint take the length of an answer, say 16
block_length = 32       # for a checkpoint take 8
n_layer = 4             # blocks
n_head = 8              # heads
d_model = 256           # width
d_ff = 688              # width inside
vocab_size = 32768      # rows of embedding and head
batch_size = 1          # prompts at a time (the plain loop takes one)
only = ''               # the samplers to try, by name, split by ';' (default: all)
compiled = ''           # torch.compile each block: 'default' or another of its modes
threads = 1             # of torch
rounds = 3              # rounds

VARIANTS = {            # arguments of generate besides steps and blocks; each: tokens per step
    'exact': {}, 'exact, 2 tokens a step': dict(each=2), 'exact, 4 tokens a step': dict(each=4),
    'threshold 0.95': dict(threshold=0.95), 'threshold 0.9': dict(threshold=0.9),
    'threshold 0.7': dict(threshold=0.7), 'threshold 0.5': dict(threshold=0.5),
    'prefix': dict(cache='prefix'), 'dual': dict(cache='dual'), 'roll': dict(cache='roll'),
    'dual, 4 tokens a step': dict(cache='dual', each=4), 'roll, 4 tokens a step': dict(cache='roll', each=4),
    'dual, threshold 0.9': dict(cache='dual', threshold=0.9),
    'roll, threshold 0.9': dict(cache='roll', threshold=0.9)}
LAST = 'exact, to the last mask'                                # of a checkpoint


def rated(rows):
    """Rows [name, passes, seconds, tokens, agreement] of all rounds -> table rows; the speed of the first is 1.0 x."""
    names, out = list(dict.fromkeys(row[0] for row in rows)), []
    for name in names:
        mine = [row for row in rows if row[0] == name]
        seconds = statistics.median(row[2] for row in mine)
        first = statistics.median(row[2] for row in rows if row[0] == names[0])
        _, passes, _, tokens, *more = mine[0]
        out.append([name, passes, f'{1e3 * seconds / passes:.1f}', f'{tokens / seconds:.1f}', f'{tokens / passes:.2f}',
                    f'{first / seconds:.2f}', *more])
    return out


def on_random_weights(cfg):
    shape = dict(seq_len=cfg.prompt_length + cfg.gen_length, n_layer=cfg.n_layer, n_head=cfg.n_head,
                 n_kv_head=cfg.n_head, d_model=cfg.d_model, d_ff=cfg.d_ff, vocab_size=cfg.vocab_size)
    device, bf16 = models.pick_device('auto', 'auto')
    model = models.empty_model(models.ModelConfig(**shape)).to_empty(device=device).eval()
    models.init_weights(model, emb_std=1.0)
    if device == 'cuda':
        model.bfloat16()
    if cfg.compiled:
        for block in model.blocks:
            block.compile(mode=cfg.compiled)
    mask = cfg.vocab_size - 1
    size = cfg.batch_size, cfg.prompt_length
    prompts = torch.randint(mask, size, generator=torch.Generator().manual_seed(0)).tolist()
    x, _, _ = diffusion.canvas(prompts, cfg.gen_length, mask, 0, device)
    names = cfg.only.split(';') if cfg.only else ['plain loop', *VARIANTS]
    if cfg.compiled or device == 'cuda':                        # compilers and planners are not a part of the speed
        for name in names:
            one_run(model, x, mask, name, cfg)
    rows = []

    for _ in range(cfg.rounds):
        for name in names:
            began = time.perf_counter()
            out, passes = one_run(model, x, mask, name, cfg)
            if device == 'cuda':
                torch.cuda.synchronize()
            seconds = time.perf_counter() - began
            exact = out if name == names[0] else exact                                  # noqa: F821
            same = (out == exact)[:, cfg.prompt_length:].double().mean().item()
            rows.append([name, passes, seconds, cfg.batch_size * cfg.gen_length, f'{100 * same:.0f}'])
    return rated(rows)


@torch.no_grad()
def one_run(model, x, mask, name, cfg):
    """-> (the filled canvas, passes)."""
    asked = {} if name == 'plain loop' else dict(VARIANTS[name])
    steps = cfg.gen_length // asked.pop('each', 1)
    how = dict(steps=steps, block_length=cfg.block_length, gen_start=cfg.prompt_length)
    if name == 'plain loop':
        return reference.plain_generate(model, x.clone(), mask, **how), steps
    return diffusion.generate(model, x, mask, **how, **asked)


def on_a_checkpoint(cfg):
    asked = SimpleNamespace(**{**settings_of(vars(evaluate)), 'limit': cfg.questions})
    run = evaluate.load(cfg.checkpoint, asked)
    items, prompts = evaluate.questions_of(run, asked)
    names = cfg.only.split(';') if cfg.only else list(VARIANTS)
    generate, rows = diffusion.generate, []

    def to_the_last(*args, **options):
        return generate(*args, **{**options, 'until_end': False})

    for _ in range(cfg.rounds):
        for name in names:
            how = {} if name == LAST else dict(VARIANTS[name])
            diffusion.generate = to_the_last if name == LAST else generate
            steps = cfg.gen_length // how.pop('each', 1)
            began = time.perf_counter()
            with run.autocast, torch.no_grad():
                done, passes = diffusion.complete(
                    run.model, prompts, cfg.gen_length, run.tok, steps=steps, batch_size=cfg.batch_size,
                    block_length=cfg.block_length, remasking='low_confidence', **how)
            seconds = time.perf_counter() - began
            texts = [run.tok.answer(row[len(ids):]) for row, ids in zip(done, prompts)]
            exact = texts if name == names[0] else exact                                # noqa: F821
            tokens = sum(len(run.tok.encode(text)) + 1 for text in texts)               # and its end token
            right = [evaluate.right(text, item) for text, item in zip(texts, items)]
            same = sum(a == b for a, b in zip(texts, exact)) / len(texts)
            rows.append([name, passes, seconds, tokens, f'{100 * same:.0f}', *evaluate.percent(right)])
    return rated(rows)


def main():
    cfg = SimpleNamespace(**configure(globals()))
    torch.set_num_threads(cfg.threads)
    known = [*VARIANTS, LAST if cfg.checkpoint else 'plain loop']
    if cfg.only and not set(cfg.only.split(';')) <= set(known):
        raise SystemExit(f'only: known are {"; ".join(known)}; got {cfg.only!r}')
    columns = ['sampler', 'passes', 'ms a pass', 'tokens/s', 'tokens a pass', 'x the first', 'as the first %']
    if cfg.checkpoint:
        evaluate.table(on_a_checkpoint(cfg), [*columns, 'right %', '+-'])
    else:
        evaluate.table(on_random_weights(cfg), columns)


if __name__ == '__main__':
    main()
