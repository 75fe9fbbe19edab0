"""Measure the speed of samplers that take turns: a plain loop, the exact one, and faster, inexact variants.

    python tests/bench_sample.py                            # random weights, d 256, 4 blocks, V 32,768
    python tests/bench_sample.py --prompt_length=900
    python tests/bench_sample.py --checkpoint=out/sft_toy --gen_length=16 --block_length=8      # is it right?
    python tests/bench_sample.py --checkpoint=out/sft_toy --questions=200 --gen_length=64 --block_length=8 \\
        --batch_size=16 --only='exact, to the last mask;exact'      # does it pay to stop at the end token?

With random weights: milliseconds per forward pass, tokens per second, tokens per pass, the speed relative to
the first sampler (the plain loop of reference.py, with every logit at every step), and the share of tokens
that agree with it. With a checkpoint: the same for answers to held-out questions, and how many are right.
Times are medians of the rounds.
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
import sample  # noqa: E402
from configurator import UserError, configure, run, say  # noqa: E402

checkpoint = ''         # a run trained on examples; '' = random weights
questions = 100         # how many of its held-out questions
prompt_length = 100     # tokens before the answer (random weights)
gen_length = 128        # tokens to write; for a checkpoint take the length of an answer, such as 16
block_length = 32       # for a checkpoint take 8
n_layer = 4             # blocks
n_head = 8              # attention heads
d_model = 256           # width of the residual stream
d_ff = 688              # width inside the SwiGLU
vocab_size = 32768      # rows of embedding and head
batch_size = 1          # prompts in one forward pass (the plain loop takes one)
only = ''               # the samplers to measure, by name, with ; between them ('' = all)
compiled = ''           # torch.compile each block: 'default' or another of its modes
threads = 1             # of torch
rounds = 3              # how often each sampler runs

PLAIN = 'plain loop'                                # of random weights
TO_THE_LAST = 'exact, to the last mask'             # of a checkpoint
# settings of the sampler; each is the number of tokens per step
VARIANTS = {
    'exact': dict(), 'exact, 2 tokens per step': dict(each=2), 'exact, 4 tokens per step': dict(each=4),
    'threshold 0.95': dict(threshold=0.95), 'threshold 0.9': dict(threshold=0.9),
    'threshold 0.7': dict(threshold=0.7), 'threshold 0.5': dict(threshold=0.5),
    'prefix': dict(cache='prefix'), 'dual': dict(cache='dual'),
    'dual, 4 tokens per step': dict(cache='dual', each=4),
    'dual, threshold 0.9': dict(cache='dual', threshold=0.9)}


def params_of(name, cfg):
    """Return the SamplingParams of a sampler."""
    settings = dict(VARIANTS.get(name, {}))
    steps = cfg.gen_length // settings.pop('each', 1)
    return diffusion.SamplingParams(steps=steps, block_length=cfg.block_length, **settings)


def measure(write, names, cfg):
    """Call write(name) -> n_forward, tokens, what it wrote, more cells, in rounds -> rows of the table."""
    seconds = {name: [] for name in names}
    rows = {}
    for _ in range(cfg.rounds):
        for name in names:
            started = time.perf_counter()
            passes, tokens, written, *more = write(name)
            seconds[name].append(time.perf_counter() - started)
            first = rows[names[0]][2] if rows else written
            same = sum(a == b for a, b in zip(written, first)) / len(written)
            rows[name] = passes, tokens, written, f'{100 * same:.0f}', *more

    table = []
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    for name, (passes, tokens, _, *cells) in rows.items():
        took = medians[name]
        numbers = 1e3 * took / passes, tokens / took, tokens / passes, medians[names[0]] / took
        table.append([name, passes, *(f'{number:.2f}' for number in numbers), *cells])
    return table


def on_random_weights(cfg):
    """Return a function that fills canvases with random weights by a sampler."""
    device, dtype = models.pick_device('auto', 'auto')
    seq_len = cfg.prompt_length + cfg.gen_length
    shape = models.ModelConfig(
        cfg.vocab_size, seq_len, cfg.n_layer, cfg.n_head, cfg.n_head, cfg.d_model, cfg.d_ff)
    model = models.empty_model(shape).to_empty(device=device).eval()
    models.init_weights(model, emb_std=1.0)
    if device == 'cuda':
        model.to(dtype)
    if cfg.compiled:
        torch._dynamo.config.recompile_limit = 64           # batches and canvases have many shapes
        for block in model.blocks:
            block.compile(mode=cfg.compiled)

    mask_id = cfg.vocab_size - 1
    size = (cfg.batch_size, cfg.prompt_length)
    prompts = torch.randint(mask_id, size, generator=torch.Generator().manual_seed(0))
    x, _, _ = diffusion.canvas(prompts.tolist(), cfg.gen_length, mask_id, 0, device)
    start = dict(gen_start=cfg.prompt_length)

    @torch.no_grad()
    def write(name):
        params = params_of(name, cfg)
        if name == PLAIN:
            passes = params.steps
            filled = reference.plain_generate(
                model, x, mask_id, steps=passes, block_length=cfg.block_length, **start)
        else:
            filled, passes = diffusion.generate(model, x, mask_id, params, **start)
        return passes, cfg.batch_size * cfg.gen_length, filled[:, cfg.prompt_length:].flatten().tolist()

    return write


def on_a_checkpoint(cfg):
    """Return a function that answers held-out questions by a sampler."""
    settings = SimpleNamespace(**configure(dict(vars(evaluate)), []))
    settings.limit = cfg.questions
    model = evaluate.load(cfg.checkpoint, settings)
    items, prompts = evaluate.questions_of(model, settings)
    seeds = [(k,) for k in range(len(prompts))]             # (at temperature 0 there is no noise)
    original = diffusion.generate
    first = []                                              # the answers of the first sampler

    def to_the_last_mask(*args, **options):
        return original(*args, **{**options, 'until_end': False})

    def write(name):
        diffusion.generate = to_the_last_mask if name == TO_THE_LAST else original
        written, passes = sample.generate_text(
            model.model, prompts, cfg.gen_length, model.tok, params_of(name, cfg),
            seeds=seeds, batch_size=cfg.batch_size)
        texts = [sample.answer_text(row[len(ids):], model.tok) for row, ids in zip(written, prompts)]
        tokens = sum(len(model.tok.encode(text)) + 1 for text in texts)         # with the end token
        return passes, tokens, texts, *evaluate.percent(list(map(evaluate.right, texts, items)))

    return write


def main(cfg):
    torch.set_num_threads(cfg.threads)
    names = [*VARIANTS, TO_THE_LAST] if cfg.checkpoint else [PLAIN, *VARIANTS]
    if cfg.batch_size > 1 and not cfg.checkpoint:
        names.remove(PLAIN)
    wanted = cfg.only.split(';') if cfg.only else names
    if not set(wanted) <= set(names):
        raise UserError(f'only: expected some of {"; ".join(names)}; got {cfg.only!r}')

    write = on_a_checkpoint(cfg) if cfg.checkpoint else on_random_weights(cfg)
    # the time of a compiler is not a part of the speed
    if cfg.compiled or torch.cuda.is_available():
        list(map(write, wanted))
    rows = measure(write, wanted, cfg)
    columns = ['sampler', 'passes', 'ms/pass', 'tokens/s', 'tokens per pass', 'x the first', 'as the first %']
    evaluate.table(rows, [*columns, 'right %', '+-'][:len(rows[0])])


if __name__ == '__main__':
    run(main, globals())
