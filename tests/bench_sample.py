"""Measure the speed of samplers that take turns: a plain loop, the exact one, and faster, inexact variants.

    python tests/bench_sample.py                    # random weights, d 256, 4 blocks, V 32,768
    python tests/bench_sample.py --prompt_length=900
    python tests/bench_sample.py --d_model=4096 --n_layer=32 --n_head=32 --d_ff=12288 --vocab_size=126464
    python tests/bench_sample.py --checkpoint=out/sft_toy --gen_length=16 --block_length=8
                                                    # are the answers right?
    python tests/bench_sample.py --checkpoint=out/sft_toy --questions=200 --gen_length=64 --block_length=8 \\
        --batch_size=16 --only='exact, to the last mask;exact'
                                                    # does it pay to stop at the end token?

With random weights: milliseconds per forward pass, tokens per second, tokens per pass, the speed relative to
the first sampler, and the share of tokens that agree with it. (The first one is the plain loop of
reference.py, with every logit at every step.) With a checkpoint: the same for answers to held-out questions,
and how many of them are right. Times are medians of the rounds.
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
    'exact': dict(),
    'exact, 2 tokens per step': dict(each=2),
    'exact, 4 tokens per step': dict(each=4),
    'threshold 0.95': dict(threshold=0.95),
    'threshold 0.9': dict(threshold=0.9),
    'threshold 0.7': dict(threshold=0.7),
    'threshold 0.5': dict(threshold=0.5),
    'prefix': dict(cache='prefix'),
    'dual': dict(cache='dual'),
    'dual, 4 tokens per step': dict(cache='dual', each=4),
    'dual, threshold 0.9': dict(cache='dual', threshold=0.9)}


def params_of(name, cfg):
    """Return the SamplingParams of a sampler."""
    settings = dict(VARIANTS.get(name, {}))
    steps = cfg.gen_length // settings.pop('each', 1)
    return diffusion.SamplingParams(steps=steps, block_length=cfg.block_length, **settings)


def seconds_of(work):
    """Call a function -> what it returns, seconds."""
    started = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - started


def random_model(cfg):
    """Return a model with random weights, on the fastest device."""
    device, dtype = models.pick_device('auto', 'auto')
    shape = dict(
        seq_len=cfg.prompt_length + cfg.gen_length, n_layer=cfg.n_layer, n_head=cfg.n_head,
        n_kv_head=cfg.n_head, d_model=cfg.d_model, d_ff=cfg.d_ff, vocab_size=cfg.vocab_size)
    model = models.empty_model(models.ModelConfig(**shape)).to_empty(device=device).eval()
    models.init_weights(model, emb_std=1.0)
    if device == 'cuda':
        model.to(dtype)
    if cfg.compiled:
        torch._dynamo.config.recompile_limit = 64           # batches and canvases have many shapes
        for block in model.blocks:
            block.compile(mode=cfg.compiled)
    return model


def on_random_weights(cfg, names):
    """Return a function that runs a sampler on random weights -> passes, seconds, tokens, % as the first."""
    model = random_model(cfg)
    mask_id = cfg.vocab_size - 1
    size = (cfg.batch_size, cfg.prompt_length)
    prompts = torch.randint(mask_id, size, generator=torch.Generator().manual_seed(0))
    x, _, _ = diffusion.canvas(prompts.tolist(), cfg.gen_length, mask_id, 0, diffusion.device_of(model))
    first = []                                              # the tokens of the first sampler

    def fill(name):
        params = params_of(name, cfg)
        if name == PLAIN:
            with torch.no_grad():
                filled = reference.plain_generate(
                    model, x, mask_id, steps=params.steps, block_length=cfg.block_length,
                    gen_start=cfg.prompt_length)
            return filled, params.steps
        return diffusion.generate(model, x, mask_id, params, gen_start=cfg.prompt_length)

    def measure(name):
        (filled, passes), seconds = seconds_of(lambda: fill(name))
        first.append(filled)
        same = (filled == first[0])[:, cfg.prompt_length:].double().mean().item()
        return passes, seconds, cfg.batch_size * cfg.gen_length, f'{100 * same:.0f}'

    # the time of a compiler is not a part of the speed
    if cfg.compiled or torch.cuda.is_available():
        for name in names:
            fill(name)
    return measure


def on_a_checkpoint(cfg):
    """Return a function that runs a sampler on held-out questions.

    -> passes, seconds, tokens, % of answers as the first, % that are right, its standard error.
    """
    settings = configure(dict(vars(evaluate)), [])
    settings.update(limit=cfg.questions)
    model = evaluate.load(cfg.checkpoint, SimpleNamespace(**settings))
    items, prompts = evaluate.questions_of(model, SimpleNamespace(**settings))
    seeds = [(k,) for k in range(len(prompts))]             # (at temperature 0 there is no noise)
    original = diffusion.generate
    first = []                                              # the answers of the first sampler

    def to_the_last_mask(*args, **options):
        return original(*args, **{**options, 'until_end': False})

    def measure(name):
        diffusion.generate = to_the_last_mask if name == TO_THE_LAST else original
        (written, passes), seconds = seconds_of(lambda: sample.generate_text(
            model.model, prompts, cfg.gen_length, model.tok, params_of(name, cfg),
            seeds=seeds, batch_size=cfg.batch_size))
        diffusion.generate = original

        texts = [sample.answer_text(row[len(ids):], model.tok) for row, ids in zip(written, prompts)]
        tokens = sum(len(model.tok.encode(text)) + 1 for text in texts)                 # with the end token
        hits = [evaluate.right(text, item) for text, item in zip(texts, items)]
        first.append(texts)
        same = sum(a == b for a, b in zip(texts, first[0])) / len(texts)
        return passes, seconds, tokens, f'{100 * same:.0f}', *evaluate.percent(hits)

    return measure


def summary(rows):
    """Return table rows from (name, passes, seconds, tokens, *more) of all rounds. The first has speed 1."""
    names = list(dict.fromkeys(row[0] for row in rows))
    first = statistics.median(row[2] for row in rows if row[0] == names[0])
    table = []
    for name in names:
        rounds_of_name = [row for row in rows if row[0] == name]
        seconds = statistics.median(row[2] for row in rounds_of_name)
        _, passes, _, tokens, *more = rounds_of_name[0]
        table.append([
            name, passes, f'{1e3 * seconds / passes:.1f}', f'{tokens / seconds:.1f}',
            f'{tokens / passes:.2f}', f'{first / seconds:.2f}', *more])
    return table


def main(cfg):
    torch.set_num_threads(cfg.threads)
    names = [PLAIN, *VARIANTS]
    if cfg.checkpoint:
        names = [*VARIANTS, TO_THE_LAST]
    wanted = cfg.only.split(';') if cfg.only else names
    if not set(wanted) <= set(names):
        raise UserError(f'only: expected some of {"; ".join(names)}; got {cfg.only!r}')
    if cfg.batch_size > 1 and not cfg.checkpoint:
        wanted = [name for name in wanted if name != PLAIN]

    columns = [
        'sampler', 'passes', 'ms per pass', 'tokens/s', 'tokens per pass', 'x the first', 'as the first %']
    measure = on_a_checkpoint(cfg) if cfg.checkpoint else on_random_weights(cfg, wanted)
    rows = []
    for k in range(cfg.rounds):
        for name in wanted:
            passes, seconds, tokens, *more = measure(name)
            rows.append((name, passes, seconds, tokens, *more))
            # the table needs all rounds, which take minutes
            speed = tokens / seconds
            say(f'round {k + 1} of {cfg.rounds} | {name:<26} {passes:5d} passes {speed:8.1f} tokens/s')
    evaluate.table(summary(rows), [*columns, 'right %', '+-'] if cfg.checkpoint else columns)


if __name__ == '__main__':
    run(main, globals())
