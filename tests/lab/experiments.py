"""The experiments of the papers, in minutes; the results are in RESULTS.md. First: python tests/lab/worlds.py

    python tests/lab/experiments.py log out/docs --out=out/docs.csv     # the curves of a run, from its log.jsonl
    python tests/lab/experiments.py by_t out/docs --out=out/by_t.csv    # nats per token, by how much is hidden
    python tests/lab/experiments.py world out/world out/world_ar        # stories: bound against the source, grades
    python tests/lab/experiments.py ahead out/world out/docs            # fewer passes, the same tokens
    python tests/lab/experiments.py commit out/sft_toy --gen_length=8   # how many tokens to write at once
    python tests/lab/experiments.py flood out/sft_toy out/sft_toy_unified   # EOS on canvases longer than the answer
    python tests/lab/experiments.py gaps out/world                      # words left out, length unknown
    python tests/lab/experiments.py reversal out/reversal_facts out/reversal_facts_ar
    python tests/lab/experiments.py curves out/world --out=out/curves.csv   # steps, blocks, temperature, Eq. 5 and 6
    python tests/lab/experiments.py scaling 'out/scaling_*' --out=out/scaling.csv

The settings of sampler and machine are those of evaluate.py. --out writes a .csv and, with matplotlib, a .png.
"""

import glob
import math
import random
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]

import worlds  # noqa: E402

import data  # noqa: E402
import diffusion  # noqa: E402
import evaluate  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
from configurator import Refused, command, settings_of  # noqa: E402

NAMESPACE = {**settings_of(vars(evaluate)), '__doc__': __doc__, '__file__': __file__, 'task': 'world',
             'samples': 512,            # stories to sample (world, curves)
             'candidates': 64,          # reversal: how many halves an autoregressive model has to choose from
             'poems': '',               # reversal: a file of couplets; default: the facts of worlds.py
             'remasking': '',           # default: random for stories, else low_confidence
             'temperature': -1.0}       # default: 1 for stories, else 0


# ----------------------------------------------------------------------------------------------------------
# World: a source of known probability


def story_start(run):
    """What precedes a story: BOS, or the EOS of the previous story."""
    return run.tok.start or [run.tok.eos_id]


def room(run, prompts, cfg):
    """Tokens for an answer."""
    return cfg.gen_length or min(64, run.model.config.seq_len - max(map(len, prompts)))


def written(run, prompts, new, cfg, **settings):
    """evaluate.answers with other settings of the sampler -> (lists of ids, seconds)."""
    began = time.perf_counter()
    ids, _ = evaluate.answers(run, prompts, new, SimpleNamespace(**{**vars(cfg), **settings}))
    return ids, time.perf_counter() - began


def graded(run, cfg, **settings):
    """Samples stories -> (whether each parses, whether each is also consistent: lists of bool; seconds)."""
    how = dict(remasking=cfg.remasking or 'random', temperature=1.0 if cfg.temperature < 0 else cfg.temperature)
    prompts = [story_start(run)] * cfg.samples
    ids, seconds = written(run, prompts, room(run, prompts, cfg), cfg, **{**how, **settings})
    texts = [run.tok.answer(row) for row in ids]
    if cfg.show:
        print(*texts[:cfg.show], sep='\n')
    return [worlds.parses(text) for text in texts], [bool(worlds.readings(text)) for text in texts], seconds


def world(cfg):
    """The bound on held-out stories against the entropy of their source, and the share of samples that are stories."""
    rows = []
    for name in cfg.checkpoints:
        run = evaluate.load(name, cfg)
        dataset = evaluate.dataset_of([run], cfg)
        source = data.open_source(dataset, 'val', 'response', run.tok, run.model.config.seq_len)
        groups, _ = source.held_out(cfg.windows)
        rows_of = [pair for x0, maskable in groups for pair in zip(x0, maskable)]
        ways = [worlds.readings(run.tok.answer(x[m].tolist())) for x, m in rows_of]
        best = torch.tensor([log_p for log_p, in ways]).mean()
        logp = evaluate.log_probs(run, groups, cfg).mean()

        loose, strict, seconds = graded(run, cfg)
        sign = '= ' if run.causal else '<= '
        rows.append([name, f'{-best:.2f}', f'{sign}{-logp:.2f}', f'{sign}{logp / best:.3f}', len(loose),
                     *evaluate.percent(loose), *evaluate.percent(strict), round(seconds, 1)])
    evaluate.table(rows, ['checkpoint', 'source, nats', 'model, nats', 'x the source', 'samples', 'parse %', '+-',
                          'consistent %', '+-', 'seconds'], cfg.out)


# ----------------------------------------------------------------------------------------------------------
# Gaps of unknown length


def words_left_out(texts, n, tok):
    """(prompts, texts) of stories that end like 'has the red drum in the mill.', without the n words before 'in'."""
    found = []
    for text in texts:
        told, _, place = text.rpartition(' in ')
        words = told.rsplit(' ', n)
        if ' has the ' in told.split('. ')[-1] and len(tok.encode(' ' + ' '.join(words[1:]))) == n:
            found.append((f'{words[0]} {sample.GAP} in {place}', text))
    return found


def gaps(cfg):
    """How often a gap of one to three tokens is filled with what was there, by the way its length is chosen."""
    rows = []
    for name in cfg.checkpoints:
        run = evaluate.load(name, cfg)
        tok, config = run.tok, run.model.config
        folder = evaluate.dataset_of([run], cfg).parts[0].folder
        texts = [record['response'] for file in sorted(folder.glob('val_*.jsonl'))
                 for _, record in data.read_records(file)]
        settings = SimpleNamespace(gap_length=0, instruct=False, seed=cfg.seed)

        for n in (1, 2, 3):
            asked = words_left_out(texts, n, tok)[:cfg.limit or 100]
            if not asked:
                raise Refused(f'{folder}: no held-out story tells again what has {n} tokens')
            right = {'known': [], 'best fit': [], 'most probable filling': []}
            for prompt, text in asked:
                tried = sample.lengths_of(prompt, '', tok, settings, config)
                done, _ = diffusion.complete(run.model, tried, 0, tok)
                scores = [filling_alone(run, *pair) for pair in zip(tried, done)]
                kept = {'known': done[n - 1], 'most probable filling': done[scores.index(max(scores))],
                        'best fit': sample.best_fit(run.model, [tried], done, tok, settings)[0][1]}
                for how, row in kept.items():
                    right[how].append(tok.decode(row[len(tok.start):]) == text)
            rows += [[name, n, how, len(hits), *evaluate.percent(hits)] for how, hits in right.items()]
    evaluate.table(rows, ['checkpoint', 'tokens left out', 'length', 'gaps', 'exact %', '+-'], cfg.out)


def filling_alone(run, prompt, filled):
    """Mean log p per token of a filling, without its neighbours."""
    gap = torch.tensor(prompt) == run.tok.mask_id
    logp = diffusion.log_likelihood(run.model, torch.tensor(filled), gap, run.tok.mask_id, mc_num=64)
    return logp / int(gap.sum())


# ----------------------------------------------------------------------------------------------------------
# Speculation without loss: fewer passes, the same tokens


def speculate(model, x, mask_id, n, never=()):
    """What generate writes on a canvas x (1, T), one token per step, low confidence, temperature 0 -> (x, passes).

    Only the first canvas is certain. The n after it guess what it becomes once one, two, ... of its most trusted
    tokens are written; one pass evaluates them all. As long as the token written on a canvas yields the next canvas,
    that one was guessed right and is certain as well.
    """
    rules = diffusion.Rules(0.0, 'low_confidence', [mask_id, *never], [], None)
    canvases, passes = x, 0
    while (canvases[0] == mask_id).any():
        masked = canvases == mask_id
        logits = diffusion.logits_of(model, canvases, masked)
        guess, trust = diffusion.propose(logits, masked, rules)
        after, _ = diffusion.write(canvases, masked, guess, trust, [1] * len(canvases), None)
        passes += 1

        sure = 0
        while sure + 1 < len(canvases) and torch.equal(after[sure], canvases[sure + 1]):
            sure += 1
        left = masked.sum(1).tolist()
        ahead = list(range(min(1, left[sure]), min(n + 1, left[sure]) + 1))     # [0] for a full canvas
        guess, trust = (z.split(left)[sure].repeat(len(ahead)) for z in (guess, trust))
        many = canvases[sure].expand(len(ahead), -1)
        canvases, _ = diffusion.write(many, many == mask_id, guess, trust, ahead, None)
    return canvases[:1], passes


def ahead(cfg):
    """Passes saved by also evaluating guessed canvases, on held-out rows whose last three quarters are hidden."""
    rows = []
    for name in cfg.checkpoints:
        run = evaluate.load(name, cfg)
        dataset = evaluate.dataset_of([run], cfg)
        masking = evaluate.trained_with(run, 'masking', 'unified')
        source = data.open_source(dataset, 'val', masking, run.tok, run.model.config.seq_len)
        groups, _ = source.held_out(cfg.windows or 32)
        never = run.tok.unused(run.model.config.vocab_size)

        exact = []
        for n in (0, 1, 2, 4, 8, 16):
            passes, began, done = 0, time.perf_counter(), []
            for x in (row for x0, _ in groups for row in x0.split(1)):
                hidden = torch.arange(x.shape[1]) >= x.shape[1] // 4
                x = torch.where(hidden, run.tok.mask_id, x).to(run.device)
                with run.autocast, torch.no_grad():
                    written, more = speculate(run.model, x, run.tok.mask_id, n, never)
                passes += more
                done.append(written)
            exact = exact or done
            same = [torch.equal(a, b) for a, b in zip(done, exact)]
            seconds = time.perf_counter() - began
            rows.append([name, n, len(done), passes, *evaluate.percent(same), round(seconds, 1)])
    evaluate.table(rows, ['checkpoint', 'guessed ahead', 'rows', 'passes', 'same tokens %', '+-', 'seconds'], cfg.out)


# ----------------------------------------------------------------------------------------------------------
# Commit rules: how many of the proposals of one pass may be written at once
#
# A rule gets the distributions p (M, V) at the masked positions, and those of the previous pass (None in the first);
# it returns how much it trusts each proposal (M,), and how many of the most trusted ones to write.


def threshold(p, before, least):
    """All at least this probable: what --threshold does (which compares in the dtype of the logits)."""
    sure = p.amax(-1)
    return sure, (sure >= least).sum()


def factor(p, before, most):
    """The n most probable, as long as (n + 1)(1 - p of the last) is below `most` (Fast-dLLM, arXiv 2505.22618)."""
    sure = p.amax(-1)
    doubt = 1 - sure.sort(descending=True).values
    n = torch.arange(1, len(doubt) + 1, device=p.device)
    return sure, ((n + 1) * doubt < most).sum()


def entropy(p, before, most):
    """The most certain, as long as the sum of their entropies minus the largest is at most `most` nats.

    (The entropy bound, arXiv 2505.24857: the sum bounds what they could tell about each other.)
    """
    h = torch.special.entr(p).sum(-1)
    rising = h.sort().values
    return -h, (rising.cumsum(0) - rising <= most).sum()


def still(p, before, most, least=0.9):
    """Those of probability `least` or more that the last pass changed by less than `most` nats, KL(now || before).

    (KLASS, arXiv 2511.05664, which requires this of two passes.)
    """
    sure = p.amax(-1)
    if before is None:
        return sure, 0
    moved = (p * (p.log() - before.log())).sum(-1)
    ready = (sure >= least) & (moved < most)
    return sure + ready, ready.sum()                            # the ready ones before all others


RULES = [
    ('one a pass', threshold, 2.0),
    *(('threshold', threshold, least) for least in (0.99, 0.95, 0.9, 0.8, 0.7, 0.5)),
    *(('factor', factor, most) for most in (0.1, 0.25, 0.5, 1.0)),
    *(('entropy', entropy, most) for most in (-1.0, 0.001, 0.03, 0.1, 0.3, 1.0)),      # -1: one a pass
    *(('0.9 and still', still, most) for most in (0.001, 0.01, 0.1, 1.0))]


def written_by(rule, most, model, x, mask_id, never=()):
    """Fills a canvas x (1, T) at temperature 0, in each pass what a rule allows, at least one token -> (x, passes)."""
    how = diffusion.Rules(0.0, 'low_confidence', [mask_id, *never], [], None)
    passes, last = 0, None
    while (x == mask_id).any():
        masked = x == mask_id
        logits = diffusion.logits_of(model, x, masked)
        guess, _ = diffusion.propose(logits, masked, how)
        p = logits.float().softmax(-1).clamp_min(1e-30)                                 # (M, V)
        p[:, how.never] = 1e-30
        trust, n = rule(p, None if last is None else last[masked[0]], most)

        last = p.new_zeros(x.shape[1], p.shape[1])
        last[masked[0]] = p
        x, _ = diffusion.write(x, masked, guess, trust, [max(1, int(n))], None)
        passes += 1
    return x, passes


def canvases_of(run, cfg):
    """What a run has to write: canvases (1, T), and a function from the finished rows to whether each is right.

    With --gen_length the answers to held-out questions, otherwise the last three quarters of held-out stories, with
    the EOS that pads them.
    """
    tok = run.tok
    if cfg.gen_length:
        items, prompts = evaluate.questions_of(run, cfg)
        masks = [tok.mask_id] * cfg.gen_length
        canvases = [torch.tensor([[*ids, *masks]], device=run.device) for ids in prompts]

        def right(rows):
            answers = [tok.answer(row[len(ids):]) for row, ids in zip(rows, prompts)]
            return [evaluate.right(*pair) for pair in zip(answers, items)]
        return canvases, right

    source = data.open_source(evaluate.dataset_of([run], cfg), 'val', 'response', tok, run.model.config.seq_len)
    groups, _ = source.held_out(cfg.windows or 200)
    canvases = [row.to(run.device) for x0, _ in groups for row in x0.split(1)]
    for x in canvases:
        x[:, x.shape[1] // 4:] = tok.mask_id
    return canvases, lambda rows: [bool(worlds.readings(tok.answer(row[len(tok.start):]))) for row in rows]


def commit(cfg):
    """For every rule for committing many tokens at once: passes, tokens equal to one per pass, and share right."""
    rows = []
    for name in cfg.checkpoints:
        run = evaluate.load(name, cfg)
        never = run.tok.unused(run.model.config.vocab_size)
        canvases, right = canvases_of(run, cfg)
        masks = [x == run.tok.mask_id for x in canvases]
        n_tokens = int(sum(map(torch.sum, masks)))
        exact = []

        for label, rule, most in RULES:
            with run.autocast, torch.no_grad():
                done = [written_by(rule, most, run.model, x, run.tok.mask_id, never) for x in canvases]
            written, passes = [x for x, _ in done], sum(n for _, n in done)
            exact = exact or written
            same = sum(int((x == best)[mask].sum()) for x, best, mask in zip(written, exact, masks))
            rows.append([name, label, most, len(done), passes, f'{n_tokens / passes:.2f}',
                         f'{100 * same / n_tokens:.1f}', *evaluate.percent(right(x[0].tolist() for x in written))])
    evaluate.table(rows, ['checkpoint', 'rule', 'at', 'rows', 'passes', 'tokens a pass', 'same tokens %', 'right %',
                          '+-'], cfg.out)


# ----------------------------------------------------------------------------------------------------------
# EOS flood


def answered(run, items, prompts, new, cfg, **settings):
    """-> (ids written, whether each answer is right, seconds)."""
    how = dict(remasking=cfg.remasking or 'low_confidence', temperature=max(cfg.temperature, 0.0))
    ids, seconds = written(run, prompts, new, cfg, **{**how, **settings})
    return ids, [evaluate.right(run.tok.answer(row), item) for row, item in zip(ids, items)], seconds


def flood(cfg):
    """How much of a canvas is EOS, and what that does to the answers, as gen_length grows."""
    rows = []
    for name in cfg.checkpoints:
        run = evaluate.load(name, cfg)
        if run.causal:
            raise Refused(f'{name}: an autoregressive model has no canvas to flood')
        items, prompts = evaluate.questions_of(run, cfg)
        for new in [cfg.gen_length] if cfg.gen_length else (16, 32, 64, 128):
            ids, hits, _ = answered(run, items, prompts, new, cfg)
            ends = sum(row.count(run.tok.eos_id) for row in ids) / len(ids) / new
            rows.append([name, new, f'{100 * ends:.1f}', *evaluate.percent(hits)])
    evaluate.table(rows, ['checkpoint', 'gen_length', 'EOS % of canvas', 'right %', '+-'], cfg.out)


# ----------------------------------------------------------------------------------------------------------
# Reversal


def halves_of(item, tok):
    """A couplet as ids of its three parts."""
    return [tok.encode(item[part]) for part in ('first', 'join', 'second')]


def fill(run, items, which, cfg):
    """Whether each first or second half is written correctly, given the rest: a list of bool.

    Diffusion gets the statement with masks in place of the half, as many as it has tokens (and one for the EOS after
    a second half). An autoregressive model gets what it can be given: everything before the half; for a first half,
    the second half and the join, as a prompt.
    """
    tok, prompts, wanted, begins = run.tok, [], [], []
    for item in items:
        first, join, second = halves_of(item, tok)
        gap, want = [tok.mask_id] * (len(second) + 1), second
        before, after = [*tok.start, *first, *join], []
        if which == 'first' and run.causal:
            want, before = first, [*tok.start, *second, *join]
        elif which == 'first':
            gap, want, before, after = [tok.mask_id] * len(first), first, tok.start, [*join, *second, tok.eos_id]
        prompts.append(before if run.causal else [*before, *gap, *after])
        wanted.append(want)
        begins.append(len(before))

    longest = max(map(len, wanted), default=1)
    how = dict(temperature=max(cfg.temperature, 0.0), batch_size=cfg.batch_size, seed=cfg.seed)
    if not run.causal:
        how.update(remasking=cfg.remasking or 'low_confidence', steps=cfg.steps)
    with run.autocast:
        rows, _ = diffusion.complete(run.model, prompts, longest, tok, **how)
    return [row[at:at + len(want)] == want for row, at, want in zip(rows, begins, wanted)]


def ranked(run, items, cfg):
    """Whether a model ranks the right first half highest among `candidates`, by the likelihood of whole statements."""
    tok, rng, hits = run.tok, random.Random(cfg.seed), []
    pool = sorted({item['first'] for item in items})
    for item in items:
        others = [first for first in pool if first != item['first']]
        choices = [item['first'], *rng.sample(others, min(cfg.candidates, len(pool)) - 1)]
        pairs = []
        for first in choices:
            statement = sum(halves_of({**item, 'first': first}, tok), [])
            pairs.append(([*tok.start, *statement, tok.eos_id], len(tok.start)))
        scores = evaluate.score_pairs(run, pairs, cfg)
        hits.append(scores.index(max(scores)) == 0)
    return hits


def reversal(cfg):
    """Memorised couplets: which half is written, given the other one?"""
    items, rows = worlds.poems_of(cfg.poems) if cfg.poems else worlds.facts(), []
    items = [items[i] for i in data.evenly(len(items), cfg.limit)]
    seen, unseen = ([item for item in items if item['seen'] == truth] for truth in (True, False))
    once = [item for item in seen if not item['both']]          # never stated the other way round
    for name in cfg.checkpoints:
        run = evaluate.load(name, cfg)
        some = [seen[i] for i in data.evenly(len(seen), 128)] if run.causal else []
        columns = (fill(run, seen, 'second', cfg), fill(run, seen, 'first', cfg), fill(run, once, 'first', cfg),
                   ranked(run, some, cfg), fill(run, unseen, 'second', cfg))
        rows.append([name, len(seen), *(' +- '.join(evaluate.percent(hits)) if hits else '' for hits in columns)])
    print('earlier half: diffusion fills it in; an autoregressive model is given the later half and the join, which '
          'is no true statement\none way: the same where nothing states the two in the other order\nranked: the '
          f'earlier half among {cfg.candidates}, by likelihood\nunstated: the later half of a statement that only its '
          'reverse implies', file=sys.stderr)
    evaluate.table(rows, ['checkpoint', 'statements', 'later half %', 'earlier half %', 'earlier, one way %',
                          'earlier, ranked %', 'unstated %'], cfg.out)


# ----------------------------------------------------------------------------------------------------------
# Curves: what each setting of the sampler costs and gains


def sweeps(new):
    """(name of the sweep, setting, the sampler's settings) for canvases of `new` tokens."""
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
    """Quality against every setting of the sampler, and the spread of Eq. 5 and Eq. 6 against the number of draws.

    Quality: share of consistent stories for a model of the synthetic world, otherwise share of right answers.
    """
    rows = []
    for name in cfg.checkpoints:
        run = evaluate.load(name, cfg)
        if run.causal:
            raise Refused(f'{name}: these are settings of diffusion samplers, the model is autoregressive')
        dataset = evaluate.dataset_of([run], cfg)
        stories = dataset.parts[0].folder.name == 'world'
        items, prompts = ([], [story_start(run)]) if stories else evaluate.questions_of(run, cfg)
        new = room(run, prompts, cfg)
        for sweep, x, settings in sweeps(new):
            settings = {'temperature': 1.0, **settings}
            if stories and 'cfg_scale' in settings:             # no prompt to guide by
                continue
            if stories:
                _, hits, seconds = graded(run, cfg, **settings)
            else:
                _, hits, seconds = answered(run, items, prompts, new, cfg, **settings)
            rows.append([name, sweep, x, *evaluate.percent(hits), round(len(hits) * new / seconds)])
        rows += likelihood_spread(run, cfg, dataset)
    evaluate.table(rows, ['checkpoint', 'sweep', 'setting', '%', '+-', 'tokens/s'], cfg.out)
    points = [(row[1].split(',')[0], f'{row[0]}, {row[1]}', row[2], float(row[3]), float(row[4])) for row in rows]
    draw(cfg, points, '%, or standard deviation')


def likelihood_spread(run, cfg, dataset, repeats=16):
    """Standard deviation in nats of the estimates of log p of one held-out row, by the forms of Eq. 5 and Eq. 6."""
    masking = evaluate.trained_with(run, 'masking', 'unified')
    source = data.open_source(dataset, 'val', masking, run.tok, run.model.config.seq_len)
    groups, _ = source.held_out(1)
    x0, maskable = (z[0].to(run.device) for z in groups[0])
    rows = []
    for label, estimate in (('Eq. 5', diffusion.log_likelihood_eq5), ('Eq. 6', diffusion.log_likelihood)):
        for n in (4, 16, 64, 256):
            began, got = time.perf_counter(), []
            for k in range(repeats):
                noise = diffusion.keyed_generator(cfg.seed, n, k, device=run.device)
                with run.autocast:
                    got.append(estimate(run.model, x0, maskable, run.tok.mask_id, mc_num=n, generator=noise,
                                        batch_size=cfg.batch_size))
            spread, rate = torch.tensor(got).std().item(), repeats * n * len(x0) / (time.perf_counter() - began)
            error = spread / math.sqrt(2 * repeats - 2)
            rows.append([run.name, f'draws, {label}: sd of log p', n, round(spread, 3), round(error, 3), round(rate)])
    return rows


# ----------------------------------------------------------------------------------------------------------
# Scaling: what compute buys


def scaling(cfg):
    """Bound against training FLOPs of runs, a power law for each family, and how much more compute diffusion needs."""
    rows, families = [], {}
    for name in [found for pattern in cfg.checkpoints for found in sorted(glob.glob(pattern)) or [pattern]]:
        run = evaluate.load(name, cfg)
        kind, share = ('autoregressive', 1.0) if run.causal else ('diffusion', 0.5)
        reports = [line for line in train.read_log(Path(name) / 'log.jsonl') if 'val_nats' in line]
        if not reports:
            raise Refused(f'{name}: no run of train.py, or stopped before its first validation')
        end, settings = reports[-1], SimpleNamespace(**run.meta['config'])
        bits, error = end['val_bits_per_byte'], end['val_bits_per_byte_stderr']
        tokens = end['iter'] * train.update_size(settings) * settings.seq_len
        flops = tokens * run.model.flops_per_token(share)
        families.setdefault(kind, []).append((flops, bits, error))
        rows.append([name, kind, f'{run.model.num_params(non_embedding=True):,}', f'{tokens:,}', f'{flops:.3g}',
                     f'{bits:.4f}', f'{error:.4f}'])
    evaluate.table(rows, ['run', 'family', 'N (non-embedding)', 'tokens', 'FLOPs', 'bits/byte', '+-'], cfg.out)

    fits = {}
    for kind, points in families.items():
        x, y = (torch.tensor([math.log10(point[i]) for point in points], dtype=torch.float64) for i in (0, 1))
        if len(set(x.tolist())) > 1:
            slope = float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())
            fits[kind] = slope, float(y.mean() - slope * x.mean())
            print(f'{kind}: bits/byte = {10 ** fits[kind][1]:.3g} * FLOPs^{slope:.4f} ({len(points)} points)')
    if len(fits) == 2:
        (a, b), (c, d) = fits['autoregressive'], fits['diffusion']
        for flops in sorted({point[0] for point in families['autoregressive']}):
            needed = 10 ** ((a * math.log10(flops) + b - d) / c)
            print(f'what the autoregressive fit reaches with {flops:.2g} FLOPs, the diffusion fit reaches with '
                  f'{needed:.2g}: {needed / flops:.3g} times as many')
    points = [('training FLOPs', kind, *point) for kind, points in families.items() for point in points]
    draw(cfg, points, 'bits/byte', logs=('training FLOPs',))


def draw(cfg, points, label, logs=('draws',)):
    """Plots points (panel, series, x, y, error) to a .png beside cfg.out, if matplotlib is installed."""
    if not cfg.out:
        print('(--out=FILE writes a table, and with matplotlib a figure)', file=sys.stderr)
        return
    try:
        import matplotlib
    except ImportError:
        print('no figure: pip install matplotlib', file=sys.stderr)
        return
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    panels = {}
    for panel, series, *point in points:
        panels.setdefault(panel, {}).setdefault(series, []).append(point)
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4), squeeze=False, layout='constrained')
    for axis, (panel, lines) in zip(axes[0], panels.items()):
        for series, line in lines.items():
            x, y, error = zip(*sorted(line))
            axis.errorbar(x, y, yerr=[0 if math.isnan(e) else e for e in error], marker='o', capsize=2, label=series)
        axis.set(xlabel=panel, ylabel=label)
        if panel in logs and min(point[1] for line in lines.values() for point in line) > 0:
            axis.set(xscale='log', yscale='log')
        axis.legend(fontsize=7)
    path = Path(cfg.out).with_suffix('.png')
    figure.savefig(path, dpi=120)
    print(f'drawn in {path}', file=sys.stderr)


def log(cfg):
    """Training loss and held-out bound of runs, by tokens seen, from log.jsonl."""
    rows, points = [], []
    for name in cfg.checkpoints:
        entries = train.read_log(Path(name) / 'log.jsonl')
        if not entries:
            raise Refused(f'{name}: no log.jsonl of a run')
        tokens = {entry['iter']: entry['tokens'] for entry in entries if 'loss' in entry}
        for entry in entries:
            seen = tokens.get(entry.get('iter'))
            if 'val_nats' in entry and seen:
                rows.append([name, entry['iter'], seen, entry['val_nats'], entry['val_nats_stderr']])
                points.append(('tokens', f'{name}: held out', seen, entry['val_nats'], entry['val_nats_stderr']))
            elif 'loss' in entry:
                points.append(('tokens', f'{name}: training', seen, entry['loss'], 0.0))
    evaluate.table(rows, ['run', 'iteration', 'tokens', 'held out, nats/token', '+-'], cfg.out)
    draw(cfg, points, 'nats/token')


def by_t(cfg):
    """Nats per hidden token, by the share of its window that is hidden."""
    rows, points = [], []
    for name in cfg.checkpoints:
        run = evaluate.load(name, cfg)
        if run.causal:
            raise Refused(f'{name}: an autoregressive model hides nothing')
        masking = evaluate.trained_with(run, 'masking', 'unified')
        dataset = evaluate.dataset_of([run], cfg)
        source = data.open_source(dataset, 'val', masking, run.tok, run.model.config.seq_len)
        groups, _ = source.held_out(cfg.windows or 128)

        for t in (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0):
            nats, noise = [], diffusion.keyed_generator(cfg.seed, t)
            for x0, maskable in groups:
                ratios = torch.full((len(x0),), t)
                _, masked = diffusion.forward_process(x0, ratios, run.tok.mask_id, maskable, noise, exact=True)
                with run.autocast, torch.no_grad():
                    logp = diffusion.masked_log_prob(run.model, x0.to(run.device), masked.to(run.device),
                                                     run.tok.mask_id, batch_size=cfg.batch_size)
                nats.append(-logp.cpu() / masked.sum(1))
            nats = torch.cat(nats)
            mean, error = nats.mean().item(), nats.std().item() / len(nats) ** 0.5
            rows.append([name, t, len(nats), f'{mean:.3f}', f'{error:.3f}'])
            points.append(('share hidden', name, t, mean, error))
    evaluate.table(rows, ['checkpoint', 'share hidden', 'rows', 'nats a hidden token', '+-'], cfg.out)
    draw(cfg, points, 'nats a hidden token')


TASKS = {f.__name__: f for f in (log, by_t, world, flood, gaps, ahead, commit, reversal, curves, scaling)}


def main(config):
    cfg = SimpleNamespace(**config)
    if cfg.task not in TASKS or not cfg.checkpoints:
        raise Refused(f'want one of {", ".join(TASKS)}, then checkpoints; got {cfg.task!r} and {cfg.checkpoints}')
    evaluate.check(SimpleNamespace(**{**config, 'task': 'exact', 'remasking': config['remasking'] or 'random',
                                      'temperature': max(config['temperature'], 0.0)}))
    TASKS[cfg.task](cfg)


if __name__ == '__main__':
    command(main, NAMESPACE, positional=('task', 'checkpoints'))
