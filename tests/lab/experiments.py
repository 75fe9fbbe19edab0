"""Repeat the experiments of the papers in minutes. The results are in RESULTS.md.

    python tests/lab/worlds.py                                          # first: makes the data
    python tests/lab/experiments.py log out/docs --out=out/docs.csv     # the curves of a run, from its log
    python tests/lab/experiments.py by_t out/docs --out=out/by_t.csv    # nats per token by share hidden
    python tests/lab/experiments.py world out/world out/world_ar        # bound against the source, grades
    python tests/lab/experiments.py ahead out/world out/docs            # fewer passes, the same tokens
    python tests/lab/experiments.py commit out/sft_toy --gen_length=8   # how many tokens to commit at once
    python tests/lab/experiments.py flood out/sft_toy out/sft_toy_unified       # EOS on long canvases
    python tests/lab/experiments.py gaps out/world                      # words left out, length unknown
    python tests/lab/experiments.py reversal out/reversal_facts out/reversal_facts_ar
    python tests/lab/experiments.py curves out/world --out=out/curves.csv       # each setting of the sampler
    python tests/lab/experiments.py scaling 'out/scaling_*' --out=out/scaling.csv

The other settings are those of evaluate.py. --out writes a .csv and, if matplotlib is installed, a .png.
"""

import glob
import json
import math
import random
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

LAB = Path(__file__).resolve().parent
sys.path[:0] = [str(LAB.parents[1]), str(LAB.parent), str(LAB)]

import command  # noqa: E402
import hooks  # noqa: E402
import reference  # noqa: E402
import worlds  # noqa: E402

import data  # noqa: E402
import diffusion  # noqa: E402
import evaluate  # noqa: E402
import sample  # noqa: E402
from configurator import UserError, say  # noqa: E402
from diffusion import SamplingParams  # noqa: E402

task = ''                       # one of the experiments above
samples = 512                   # world, curves: how many stories to sample
candidates = 64                 # reversal: how many halves an autoregressive model chooses from
poems = ''                      # reversal: a file of couplets; '' = the facts of worlds.py
remasking = 'auto'              # 'random', 'low_confidence'; 'auto' = random for stories, else low_confidence
temperature = -1.0              # of the guesses; -1 = 1 if remasking is random, else 0


# ----------------------------------------------------------------------------------------------------------
# What several experiments need


def runs(cfg):
    """Open the checkpoints one after the other."""
    for name in cfg.checkpoints:
        yield evaluate.load(name, cfg)


def held_out(run, cfg, limit, masking=''):
    """Return the held-out rows of a run's data set, [(x0 (T,), maskable (T,)), ...].

    limit: how many, 0 = all. masking: which tokens are maskable, '' = as in training.
    """
    dataset = evaluate.dataset_of([run], cfg)
    source = data.open_source(dataset, 'val', masking or run.masking, run.tok, run.model.config.seq_len)
    return source.held_out(limit)[0]


def write(run, prompts, new, cfg, answers=True, **changes):
    """Write `new` tokens after prompts, with `changes` to the settings -> lists of new ids, seconds."""
    cfg = SimpleNamespace(**{**vars(cfg), **changes})
    params = sample.sampling_params(cfg, new, answers)
    seeds = [(cfg.seed, k) for k in range(len(prompts))]
    started = time.perf_counter()
    rows, _ = sample.generate_text(
        run.model, prompts, new, run.tok, params, seeds=seeds, batch_size=cfg.batch_size)
    seconds = time.perf_counter() - started
    return [row[len(ids):] for row, ids in zip(rows, prompts)], seconds


def grade_stories(run, cfg, **changes):
    """Sample stories -> whether each parses, whether each is also consistent (lists of bool), seconds."""
    # a story begins after BOS, or after the EOS of the story before
    prompts = [run.start or [run.tok.eos_id]] * cfg.samples
    new = sample.tokens_to_append(prompts, run, cfg)
    rows, seconds = write(run, prompts, new, cfg, answers=False, **changes)
    texts = [sample.answer_text(row, run.tok) for row in rows]
    if cfg.show:
        print(*texts[:cfg.show], sep='\n')
    parse = [worlds.parses(text) for text in texts]
    consistent = [bool(worlds.readings(text)) for text in texts]
    return parse, consistent, seconds


def answer(run, items, prompts, new, cfg, **changes):
    """Answer questions -> the ids that were written, whether each answer is right (list of bool), seconds."""
    rows, seconds = write(run, prompts, new, cfg, **changes)
    hits = []
    for row, item in zip(rows, items):
        hits.append(evaluate.right(sample.answer_text(row, run.tok), item))
    return rows, hits, seconds


def add(table, row):
    """Append a row to a table, and show it at once, because the whole table may take an hour."""
    table.append(row)
    say(' | '.join(map(str, row)))


def refuse_causal(run, why):
    """Raise UserError if a model is autoregressive."""
    if run.model.config.causal:
        raise UserError(f'{run.name}: {why}')


# ----------------------------------------------------------------------------------------------------------
# World: a source of known probability


def world(cfg):
    """Compare the bound on held-out stories with the entropy of their source, and grade what is written."""
    table = []
    for run in runs(cfg):
        source = []
        model = []
        for i, (x0, maskable) in enumerate(held_out(run, cfg, cfg.windows, 'response')):
            log_p, = worlds.readings(sample.answer_text(x0[maskable].tolist(), run.tok))
            source.append(log_p)
            model.append(evaluate.score_row(run, x0, maskable, cfg, cfg.draws, key=(i,)))
        source = sum(source) / len(source)
        model = sum(model) / len(model)

        parse, consistent, seconds = grade_stories(run, cfg)
        sign = '=' if run.model.config.causal else '<='
        add(table, [
            run.name, f'{-source:.2f}', f'{sign} {-model:.2f}', f'{sign} {model / source:.3f}', len(parse),
            *evaluate.percent(parse), *evaluate.percent(consistent), round(seconds, 1)])
    columns = ['checkpoint', 'source, nats', 'model, nats', 'x the source', 'samples', 'parse %', '+-',
               'consistent %', '+-', 'seconds']
    evaluate.table(table, columns, cfg.out)


# ----------------------------------------------------------------------------------------------------------
# Gaps of unknown length


def leave_out(text, n, tok):
    """Put ___ for the n words before the place in a story that ends like '... has the red drum in the mill.'

    Return None if it ends otherwise, or if these words are not n tokens.
    """
    story, _, place = text.rpartition(' in ')
    before, *words = story.rsplit(' ', n)
    gap = ''.join(f' {word}' for word in words)
    if ' has the ' not in story.split('. ')[-1] or len(tok.encode(gap)) != n:
        return None
    return f'{before} ___ in {place}'


def gaps(cfg):
    """Fill gaps of one to three tokens, and count how often that restores the text, by choice of length."""
    table = []
    for run in runs(cfg):
        mask_id = run.tok.mask_id
        folder = evaluate.dataset_of([run], cfg).parts[0].folder
        texts = []
        for file in sorted(folder.glob('val_*.jsonl')):
            texts += [record['response'] for _, record in data.read_records(file)]

        for n in (1, 2, 3):
            questions = [(text, leave_out(text, n, run.tok)) for text in texts]
            questions = [(text, prompt) for text, prompt in questions if prompt][:cfg.limit or 100]
            if not questions:
                raise UserError(f'{folder}: no held-out story tells again what has {n} tokens')

            hits = {'known': [], 'best fit': [], 'most probable filling': []}
            for text, prompt in questions:
                found = hooks.fill_gaps(run, prompt, cfg)               # (score, ids, filled), best first
                fillings = {ids.count(mask_id): filled for _, ids, filled in found}
                alone = []
                for _, ids, filled in found:
                    alone.append(hooks.infill_score(run.model, ids, filled, mask_id, neighbours=0))
                kept = (fillings[n], found[0][2], found[alone.index(max(alone))][2])
                for how, filled in zip(hits, kept):
                    hits[how].append(run.tok.decode(filled[len(run.start):]) == text)
            for how, right in hits.items():
                add(table, [run.name, n, how, len(right), *evaluate.percent(right)])
    evaluate.table(table, ['checkpoint', 'tokens left out', 'length', 'gaps', 'exact %', '+-'], cfg.out)


# ----------------------------------------------------------------------------------------------------------
# Speculation without loss: fewer passes, the same tokens


@torch.no_grad()
def speculate(model, x, mask_id, n, never=()):
    """Write what generate writes at one token per step -> x (1, T), number of forward passes.

    (On a canvas x (1, T), low confidence, temperature 0.) Only the first canvas is certain. The n canvases
    after it are guesses: what it becomes if one, two, ... of its most confident tokens are committed. One
    pass evaluates all. If the token that is committed on a canvas yields the next canvas, then that one was
    guessed right, so it is certain as well.
    """
    never = [mask_id, *never]
    canvases = x
    n_forward = 0
    while (canvases[0] == mask_id).any():
        masked = canvases == mask_id
        logits = model(canvases, positions=masked)
        guess, confidence = diffusion.propose(logits, masked, SamplingParams(), never, [], None)
        after, _ = diffusion.commit(canvases, masked, guess, confidence, [1] * len(canvases))
        n_forward += 1

        # how many of the guessed canvases are right
        k = 0
        while k + 1 < len(canvases) and torch.equal(after[k], canvases[k + 1]):
            k += 1
        n_masked = masked.sum(1).tolist()
        most = min(n + 1, n_masked[k])
        ahead = list(range(min(1, most), most + 1))         # ([0] if the canvas is full)

        # the next canvases follow from the last certain one
        many = canvases[k].expand(len(ahead), -1)
        guess = guess.split(n_masked)[k].repeat(len(ahead))
        confidence = confidence.split(n_masked)[k].repeat(len(ahead))
        canvases, _ = diffusion.commit(many, many == mask_id, guess, confidence, ahead)
    return canvases[:1], n_forward


def ahead(cfg):
    """Count the passes that guessed canvases save, on held-out rows whose last three quarters are hidden."""
    table = []
    for run in runs(cfg):
        never = run.tok.unused(run.model.config.vocab_size)
        rows = [x0 for x0, _ in held_out(run, cfg, cfg.windows or 32)]
        expected = []
        for n in (0, 1, 2, 4, 8, 16):
            written = []
            passes = 0
            started = time.perf_counter()
            for x0 in rows:
                x = hide_three_quarters(x0, run)
                x, n_forward = speculate(run.model, x, run.tok.mask_id, n, never)
                passes += n_forward
                written.append(x)
            seconds = time.perf_counter() - started
            expected = expected or written
            same = [torch.equal(a, b) for a, b in zip(written, expected)]
            add(table, [run.name, n, len(rows), passes, *evaluate.percent(same), round(seconds, 1)])
    columns = ['checkpoint', 'guessed ahead', 'rows', 'passes', 'same tokens %', '+-', 'seconds']
    evaluate.table(table, columns, cfg.out)


def hide_three_quarters(x0, run):
    """Hide the last three quarters of a row, (T,) -> canvas (1, T)."""
    x = x0[None].to(diffusion.device_of(run.model), copy=True)
    x[:, x.shape[1] // 4:] = run.tok.mask_id
    return x


# ----------------------------------------------------------------------------------------------------------
# Rules for committing many tokens at once
#
# A rule gets the distributions p (M, V) at the masked positions, and those of the pass before (None in the
# first). It returns its confidence in each guess (M,), and how many of the most confident ones to commit.


def by_threshold(p, before, least):
    """Commit all guesses of at least this probability, as --threshold does in the dtype of the logits."""
    confidence = p.amax(-1)
    return confidence, (confidence >= least).sum()


def by_factor(p, before, most):
    """Commit the n most probable, if (n + 1)(1 - p of the last) < most (Fast-dLLM, arXiv 2505.22618)."""
    confidence = p.amax(-1)
    doubt = 1 - confidence.sort(descending=True).values
    n = torch.arange(1, len(doubt) + 1, device=p.device)
    return confidence, ((n + 1) * doubt < most).sum()


def by_entropy(p, before, most):
    """Commit the most certain, as long as their entropies without the largest add up to at most `most` nats.

    (The entropy bound, arXiv 2505.24857. This sum bounds what the tokens could tell about each other.)
    """
    h = torch.special.entr(p).sum(-1)
    rising = h.sort().values
    return -h, (rising.cumsum(0) - rising <= most).sum()


def by_change(p, before, most, least=0.9):
    """Commit guesses of probability `least` that the last pass changed by less than `most` nats.

    The change is KL(now || before). (KLASS, arXiv 2511.05664, asks this of two passes.)
    """
    confidence = p.amax(-1)
    if before is None:
        return confidence, 0
    change = (p * (p.log() - before.log())).sum(-1)
    ready = (confidence >= least) & (change < most)
    return confidence + ready, ready.sum()                  # the ready ones come before all others


RULES = [
    ('one per pass', by_threshold, 2.0),
    *(('threshold', by_threshold, least) for least in (0.99, 0.95, 0.9, 0.8, 0.7, 0.5)),
    *(('factor', by_factor, most) for most in (0.1, 0.25, 0.5, 1.0)),
    *(('entropy', by_entropy, most) for most in (-1.0, 0.001, 0.03, 0.1, 0.3, 1.0)),      # -1 is one per pass
    *(('0.9 and unchanged', by_change, most) for most in (0.001, 0.01, 0.1, 1.0))]


@torch.no_grad()
def generate_by_rule(rule, most, model, x, mask_id, never=()):
    """Fill a canvas x (1, T) at temperature 0 -> x, number of forward passes.

    Each pass commits what the rule allows, and at least one token.
    """
    never = [mask_id, *never]
    n_forward = 0
    before = None
    while (x == mask_id).any():
        masked = x == mask_id
        logits = model(x, positions=masked)
        guess, _ = diffusion.propose(logits, masked, SamplingParams(), never, [], None)
        # what is never written keeps its share of the softmax, as in the sampler; by_change takes logarithms
        p = logits.float().softmax(-1).clamp_min(1e-30)                                 # (M, V)
        p[:, never] = 1e-30
        confidence, n = rule(p, None if before is None else before[masked[0]], most)

        before = p.new_zeros(x.shape[1], p.shape[1])
        before[masked[0]] = p
        x, _ = diffusion.commit(x, masked, guess, confidence, [max(1, int(n))])
        n_forward += 1
    return x, n_forward


def canvases_of(run, cfg):
    """Return what a run has to write, canvases (1, T), and a function rows of ids -> whether each is right.

    With --gen_length these are the answers to held-out questions, otherwise the last three quarters of
    held-out stories with the EOS that pads them.
    """
    tok = run.tok
    if not cfg.gen_length:
        stories = held_out(run, cfg, cfg.windows or 200, 'response')
        canvases = [hide_three_quarters(x0, run) for x0, _ in stories]

        def consistent(rows):
            return [bool(worlds.readings(sample.answer_text(row[len(run.start):], tok))) for row in rows]
        return canvases, consistent

    items, prompts = evaluate.questions_of(run, cfg)
    device = diffusion.device_of(run.model)
    canvases = [torch.tensor([ids + [tok.mask_id] * cfg.gen_length], device=device) for ids in prompts]

    def right(rows):
        texts = [sample.answer_text(row[len(ids):], tok) for row, ids in zip(rows, prompts)]
        return [evaluate.right(text, item) for text, item in zip(texts, items)]
    return canvases, right


def commit(cfg):
    """Count passes, tokens equal to those of one per pass, and right results, for each rule."""
    table = []
    for run in runs(cfg):
        mask_id = run.tok.mask_id
        never = run.tok.unused(run.model.config.vocab_size)
        canvases, right = canvases_of(run, cfg)
        masks = [x == mask_id for x in canvases]
        n_tokens = sum(int(masked.sum()) for masked in masks)
        expected = []
        for label, rule, most in RULES:
            written = []
            passes = 0
            for x in canvases:
                x, n_forward = generate_by_rule(rule, most, run.model, x, mask_id, never)
                passes += n_forward
                written.append(x)
            expected = expected or written
            same = sum(int((x == y)[masked].sum()) for x, y, masked in zip(written, expected, masks))
            hits = right([x[0].tolist() for x in written])
            add(table, [
                run.name, label, most, len(hits), passes, f'{n_tokens / passes:.2f}',
                f'{100 * same / n_tokens:.1f}', *evaluate.percent(hits)])
    columns = [
        'checkpoint', 'rule', 'at', 'rows', 'passes', 'tokens per pass', 'same tokens %', 'right %', '+-']
    evaluate.table(table, columns, cfg.out)


# ----------------------------------------------------------------------------------------------------------
# EOS flood


def flood(cfg):
    """Measure how much of a canvas is EOS, and what that does to the answers, as gen_length grows."""
    table = []
    for run in runs(cfg):
        refuse_causal(run, 'an autoregressive model has no canvas to flood')
        items, prompts = evaluate.questions_of(run, cfg)
        for new in [cfg.gen_length] if cfg.gen_length else (16, 32, 64, 128):
            rows, hits, _ = answer(run, items, prompts, new, cfg)
            ends = sum(row.count(run.tok.eos_id) for row in rows) / len(rows) / new
            add(table, [run.name, new, f'{100 * ends:.1f}', *evaluate.percent(hits)])
    evaluate.table(table, ['checkpoint', 'gen_length', 'EOS % of canvas', 'right %', '+-'], cfg.out)


# ----------------------------------------------------------------------------------------------------------
# Reversal


def fill_halves(run, items, half, cfg):
    """Write the 'first' or 'second' half of couplets -> whether each is right, a list of bool.

    Diffusion gets the statement with masks in place of the half, as many as it has tokens (and one for the
    EOS after a second half). An autoregressive model gets what it can be given, all that is before the half.
    For a first half that is the second half and the join, as a prompt.
    """
    tok = run.tok
    causal = run.model.config.causal
    prompts = []
    expected = []
    starts = []
    for item in items:
        first, join, second = (tok.encode(item[part]) for part in ('first', 'join', 'second'))
        if half == 'second':
            want = second
            before = run.start + first + join
            after = []
            gap = [tok.mask_id] * (len(second) + 1)
        else:
            want = first
            before = run.start + second + join if causal else run.start
            after = join + second + [tok.eos_id]
            gap = [tok.mask_id] * len(first)
        prompts.append(before if causal else before + gap + after)
        expected.append(want)
        starts.append(len(before))

    new = max(map(len, expected)) if causal else 0
    params = sample.sampling_params(cfg, new)
    seeds = [(cfg.seed, k) for k in range(len(prompts))]
    rows, _ = sample.generate_text(
        run.model, prompts, new, tok, params, seeds=seeds, batch_size=cfg.batch_size)
    return [row[start:start + len(want)] == want for row, start, want in zip(rows, starts, expected)]


def rank_first_halves(run, items, cfg):
    """Return for each item whether its first half is the likeliest of `candidates`, by whole statements."""
    tok = run.tok
    rng = random.Random(cfg.seed)
    every_first = sorted({item['first'] for item in items})
    hits = []
    for item in items:
        others = [first for first in every_first if first != item['first']]
        choices = [item['first'], *rng.sample(others, min(cfg.candidates - 1, len(others)))]
        scores = []
        for first in choices:
            statement = tok.encode(first) + tok.encode(item['join']) + tok.encode(item['second'])
            scores.append(evaluate.score(run, [], [*statement, tok.eos_id], cfg))
        hits.append(scores.index(max(scores)) == 0)
    return hits


def reversal(cfg):
    """Test on memorised couplets which half a model can write, given the other one."""
    items = worlds.poems_of(cfg.poems) if cfg.poems else worlds.facts()
    items = [items[i] for i in data.evenly_spaced(len(items), cfg.limit)]
    seen = [item for item in items if item['seen']]
    unseen = [item for item in items if not item['seen']]
    one_way = [item for item in seen if not item['both']]

    table = []
    for run in runs(cfg):
        columns = {
            'later half %': (fill_halves, seen, 'second'),
            'earlier half %': (fill_halves, seen, 'first'),
            'earlier, one way %': (fill_halves, one_way, 'first'),
            'unstated %': (fill_halves, unseen, 'second')}
        row = [run.name, len(seen)]
        for f, questions, half in columns.values():
            row.append(' +- '.join(evaluate.percent(f(run, questions, half, cfg))) if questions else '')
        ranked = ''
        if run.model.config.causal:
            some = [seen[i] for i in data.evenly_spaced(len(seen), 128)]
            ranked = ' +- '.join(evaluate.percent(rank_first_halves(run, some, cfg)))
        add(table, [*row, ranked])

    say('earlier half: diffusion fills it in; an autoregressive model is given the later half and the join, '
        'which is no true statement\n'
        'one way: the same where no other statement has the two in the opposite order\n'
        'unstated: the later half of a statement that only its reverse implies\n'
        f'ranked: the earlier half among {cfg.candidates}, by likelihood')
    evaluate.table(table, ['checkpoint', 'statements', *columns, 'earlier, ranked %'], cfg.out)


# ----------------------------------------------------------------------------------------------------------
# Curves: what each setting of the sampler costs and gains


def sweeps(new):
    """Yield (name of the sweep, value, settings of the sampler), for canvases of `new` tokens."""
    for how in ('random', 'low_confidence'):
        for n in sorted({max(1, new * k // 16) for k in (1, 2, 4, 8, 16)}):
            yield f'steps, {how}', n, dict(remasking=how, steps=n)
    for n in range(1, new + 1):
        if new % n == 0:
            yield 'block_length, low_confidence', n, dict(remasking='low_confidence', block_length=n)
    for how in ('random', 'low_confidence'):
        for t in (0.25, 0.5, 0.75, 1.0, 1.25):
            yield f'temperature, {how}', t, dict(remasking=how, temperature=t)
    for w in (0.0, 0.5, 1.0, 2.0):
        yield 'cfg_scale, low_confidence', w, dict(remasking='low_confidence', cfg_scale=w)


def curves(cfg):
    """Measure quality against each setting of the sampler, and the spread of Eq. 5 and 6 against masks drawn.

    Quality is the share of consistent stories for a model of the synthetic world, otherwise that of right
    answers.
    """
    table = []
    for run in runs(cfg):
        refuse_causal(run, 'these are settings of diffusion samplers, but the model is autoregressive')
        on_stories = evaluate.dataset_of([run], cfg).parts[0].folder.name == 'world'
        items, prompts = ([], [run.start]) if on_stories else evaluate.questions_of(run, cfg)
        new = sample.tokens_to_append(prompts, run, cfg)
        for sweep, value, settings in sweeps(new):
            settings = {'temperature': 1.0, **settings}
            if not on_stories:
                _, hits, seconds = answer(run, items, prompts, new, cfg, **settings)
            elif 'cfg_scale' not in settings:               # a story has no prompt to guide by
                _, hits, seconds = grade_stories(run, cfg, **settings)
            else:
                continue
            add(table, [run.name, sweep, value, *evaluate.percent(hits), round(len(hits) * new / seconds)])
        table += likelihood_spread(run, cfg)

    evaluate.table(table, ['checkpoint', 'sweep', 'setting', '%', '+-', 'tokens/s'], cfg.out)
    points = []
    for name, sweep, value, mean, error, _ in table:
        points.append((sweep.split(',')[0], f'{name}, {sweep}', value, float(mean), float(error)))
    draw(cfg, points, '%, or standard deviation')


def likelihood_spread(run, cfg, repeats=16):
    """Return table rows: the standard deviation in nats of estimates of log p of one held-out row."""
    (x0, maskable), = held_out(run, cfg, 1)
    device = diffusion.device_of(run.model)
    x0 = x0.to(device)
    maskable = maskable.to(device)
    table = []
    estimates = {'Eq. 5': reference.log_likelihood_bernoulli, 'Eq. 6': diffusion.log_likelihood}
    for label, estimate in estimates.items():
        for n in (4, 16, 64, 256):
            values = []
            started = time.perf_counter()
            for k in range(repeats):
                noise = diffusion.keyed_generator(cfg.seed, n, k)
                values.append(estimate(run.model, x0, maskable, run.tok.mask_id, mc_num=n, generator=noise))
            rate = repeats * n * len(x0) / (time.perf_counter() - started)
            spread = torch.tensor(values).std().item()
            error = spread / math.sqrt(2 * repeats - 2)
            sweep = f'draws, {label}: sd of log p'
            add(table, [run.name, sweep, n, round(spread, 3), round(error, 3), round(rate)])
    return table


# ----------------------------------------------------------------------------------------------------------
# Scaling: what compute buys


def scaling(cfg):
    """Fit a power law bits/byte = a FLOPs^b to the runs of each family, and compare the two families."""
    table = []
    families = {}
    names = []
    for pattern in cfg.checkpoints:
        names += sorted(glob.glob(pattern)) or [pattern]
    for name in names:
        run = evaluate.load(name, cfg)
        reports = [entry for entry in read_log(name) if 'val_nats' in entry]
        if not reports:
            raise UserError(f'{name}: its log has no validation; let it run until the first one')
        last = reports[-1]
        settings = run.meta['settings']
        bits = last['val_bits_per_byte']
        error = last['val_bits_per_byte_stderr']
        tokens = last['iter'] * settings['global_batch'] * settings['seq_len']
        # about half of the tokens are masked, and only those need the head
        causal = run.model.config.causal
        flops = tokens * run.model.flops_per_token(1.0 if causal else 0.5)
        family = 'autoregressive' if causal else 'diffusion'
        families.setdefault(family, []).append((flops, bits, error))
        table.append([
            name, family, f'{run.model.num_params(non_embedding=True):,}', f'{tokens:,}', f'{flops:.3g}',
            f'{bits:.4f}', f'{error:.4f}'])
    columns = ['run', 'family', 'N (non-embedding)', 'tokens', 'FLOPs', 'bits/byte', '+-']
    evaluate.table(table, columns, cfg.out)

    # straight lines through the logarithms
    lines = {}
    for family, points in families.items():
        x = torch.tensor([math.log10(flops) for flops, _, _ in points], dtype=torch.float64)
        y = torch.tensor([math.log10(bits) for _, bits, _ in points], dtype=torch.float64)
        if x.unique().numel() > 1:
            slope = float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())
            offset = float(y.mean()) - slope * float(x.mean())
            lines[family] = slope, offset
            print(f'{family}: bits/byte = {10 ** offset:.3g} * FLOPs^{slope:.4f} ({len(points)} points)')
    if len(lines) == 2:
        a, b = lines['autoregressive']
        c, d = lines['diffusion']
        for flops in sorted({flops for flops, _, _ in families['autoregressive']}):
            needed = 10 ** ((a * math.log10(flops) + b - d) / c)
            print(f'what the autoregressive line reaches with {flops:.2g} FLOPs, the diffusion line reaches '
                  f'with {needed:.2g}: {needed / flops:.3g} times as many')

    points = []
    for family, measured in families.items():
        points += [('training FLOPs', family, *point) for point in measured]
    draw(cfg, points, 'bits/byte', log_axes=('training FLOPs',))


# ----------------------------------------------------------------------------------------------------------
# Curves of training


def read_log(name):
    """Return the entries of a run's log.jsonl in order. If an iteration comes twice, the last one counts."""
    entries = {}
    with open(Path(name) / 'log.jsonl', encoding='utf-8') as lines:
        for entry in map(json.loads, lines):
            if 'iter' in entry:
                entries[entry['iter'], 'val_nats' in entry] = entry
    return [entries[key] for key in sorted(entries)]


def log(cfg):
    """Print the held-out bound of runs by tokens seen, and draw it with the training loss."""
    table = []
    points = []
    for name in cfg.checkpoints:
        entries = read_log(name)
        tokens = {entry['iter']: entry['tokens'] for entry in entries if 'loss' in entry}
        for entry in entries:
            seen = tokens.get(entry['iter'])
            if 'loss' in entry:
                points.append(('tokens', f'{name}: training', seen, entry['loss'], 0.0))
            elif seen:
                nats = entry['val_nats']
                error = entry['val_nats_stderr']
                table.append([name, entry['iter'], seen, f'{nats:.4f}', f'{error:.4f}'])
                points.append(('tokens', f'{name}: held out', seen, nats, error))
    evaluate.table(table, ['run', 'iteration', 'tokens', 'held out, nats/token', '+-'], cfg.out)
    draw(cfg, points, 'nats/token')


@torch.no_grad()
def hidden_nats(run, x0, maskable, t, generator):
    """Hide the share t of each row: x0, maskable (B, T) -> nats per hidden token of each row, (B,)."""
    device = diffusion.device_of(run.model)
    xt, masked = diffusion.forward_process(
        x0, torch.full((len(x0),), t), run.tok.mask_id, maskable, fixed_count=True, generator=generator)
    ce = run.model(xt.to(device), positions=masked.to(device), targets=x0[masked].to(device)).cpu()
    sums = torch.zeros(len(x0)).index_add(0, masked.nonzero()[:, 0], ce)
    return sums / masked.sum(1)


def by_t(cfg):
    """Measure nats per hidden token, by the share of its window that is hidden."""
    table = []
    points = []
    for run in runs(cfg):
        refuse_causal(run, 'an autoregressive model hides nothing')
        rows = held_out(run, cfg, cfg.windows or 128)
        for t in (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0):
            noise = diffusion.keyed_generator(cfg.seed, t)
            nats = torch.cat([hidden_nats(run, x0[None], maskable[None], t, noise) for x0, maskable in rows])
            mean = nats.mean().item()
            error = nats.std().item() / len(nats) ** 0.5
            add(table, [run.name, t, len(nats), f'{mean:.3f}', f'{error:.3f}'])
            points.append(('share hidden', run.name, t, mean, error))
    evaluate.table(table, ['checkpoint', 'share hidden', 'rows', 'nats per hidden token', '+-'], cfg.out)
    draw(cfg, points, 'nats per hidden token')


def draw(cfg, points, label, log_axes=('draws',)):
    """Draw points (panel, series, x, y, error) to a .png beside cfg.out, if matplotlib is installed."""
    if not cfg.out:
        say('(--out=FILE writes a table, and with matplotlib a figure)')
        return
    try:
        import matplotlib
    except ImportError:
        say('no figure, because matplotlib is missing: pip install matplotlib')
        return
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    panels = {}
    for panel, series, *point in points:
        panels.setdefault(panel, {}).setdefault(series, []).append(point)

    size = (5 * len(panels), 4)
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, layout='constrained')
    for axis, (panel, lines) in zip(axes[0], panels.items()):
        for series, line in lines.items():
            x, y, errors = zip(*sorted(line))
            errors = [0 if math.isnan(error) else error for error in errors]
            axis.errorbar(x, y, yerr=errors, marker='o', capsize=2, label=series)
        axis.set(xlabel=panel, ylabel=label)
        if panel in log_axes:
            axis.set(xscale='log', yscale='log')
        axis.legend(fontsize=7)
    path = Path(cfg.out).with_suffix('.png')
    figure.savefig(path, dpi=120)
    say(f'drawn in {path}')


TASKS = {f.__name__: f for f in (log, by_t, world, flood, gaps, ahead, commit, reversal, curves, scaling)}
ALLOWED = {}                    # not those of evaluate.py


def main(cfg):
    if cfg.task not in TASKS or not cfg.checkpoints:
        raise UserError(f'expected one of {", ".join(TASKS)}, and then checkpoints; '
                        f'got {cfg.task!r} and {cfg.checkpoints}')
    TASKS[cfg.task](cfg)


if __name__ == '__main__':
    command.run(main, globals(), evaluate, positional=('task', 'checkpoints'))
