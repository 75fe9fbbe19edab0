"""Numbers about checkpoints, each with its standard error.

    python evaluate.py bound out/docs out/docs_ar               # held-out text, side by side, on the same windows
    python evaluate.py world out/world out/world_ar             # share of samples that are stories, by their grammar
    python evaluate.py exact out/sft_toy                        # held-out questions, answered word for word
    python evaluate.py flood out/sft_toy out/sft_toy_unified    # EOS on canvases that are longer than the answer
    python evaluate.py choice out/docs --input=arc.json --method=confidence         # multiple choice
    python evaluate.py reversal out/reversal_facts out/reversal_facts_ar
    python evaluate.py curves out/world                         # steps, blocks, temperature, guidance, Eq. 5 and Eq. 6
    python evaluate.py scaling 'out/scaling_*'                  # bound against FLOPs
    python evaluate.py lm_eval LLaDA-8B-Base --preset=llada-base --tasks=gsm8k      # pip install lm_eval

bound: nats per token and bits per byte. For a diffusion model this is an upper bound on its cross-entropy (Eq. 6 of
LLaDA, arXiv 2502.09992v3), written <=; for the autoregressive baseline it is exact, written =; for made-up stories the
entropy of their source is known, which no model can beat. Do not read <= and = as the same kind of number.

Some 860 lines, more than a file should have: eight small tasks and a harness share how a checkpoint is loaded, asked
and reported, and would each be a file of their own if there were room for files.
"""

import csv
import glob
import json
import math
import random
import re
import string
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm import tqdm

import data
import diffusion
from configurator import command, configure, user_errors
from model import find_checkpoints, open_model

task = 'bound'                  # bound, world, exact, flood, choice, reversal, curves, scaling or lm_eval
checkpoints = []                # runs or steps of train.py, or folders of released weights
dataset = ''                    # a data set; default: the one that the first checkpoint was trained on
split = 'val'                   # 'val' or 'train' (bound)
input = []                      # files of questions, choices or couplets (repeat, or patterns); default: see the task
on_error = 'stop'               # what a bad line of an input does: 'stop', or 'skip' and be counted
windows = 0                     # how many windows of text, or examples (bound), evenly spread; 0: all
limit = 0                       # how many questions or couplets, evenly spread; 0: all
samples = 256                   # stories to sample (world, curves)
# --- likelihood
seq_len = 0                     # tokens in a window (bound); 0: the shortest context among the checkpoints
draws = 16                      # masks for each window (bound), stratified
mc_num = 128                    # masks for each choice (choice, lm_eval): Eq. 6
method = 'likelihood'           # of choice and lm_eval: 'likelihood' (Eq. 6) or 'confidence' (iLLaDA)
add_bos = False                 # begin plain prompts with BOS (iLLaDA); runs trained on examples always do
pad_eos = False                 # confidence: an EOS stands in sight behind the choice (iLLaDA)
# --- sampler
gen_length = 0                  # tokens for an answer; 0: what the context leaves, at most 64
steps = 0                       # denoising steps, with variable_length those of one block; 0: one token a step
block_length = 0                # 0: the whole canvas at once
variable_length = False         # blocks come into being one by one
remasking = ''                  # 'low_confidence' or 'random'; '': random for world, else low_confidence
temperature = -1.0              # -1: 1 for world and curves, else 0
cfg_scale = 0.0                 # classifier-free guidance; likelihoods are guided as well
logits_eos_inf = False          # EOS is never written
confidence_eos_eot_inf = False  # EOS and EoT are written last
threshold = 0.0                 # above 0: commit every proposal this probable
think_boost = 0.0               # see sample.py
think_power = 3.0               # see sample.py
instruct = False                # put questions into the chat template
extract = ''                    # exact: a regular expression; its last match in answer and output is compared
stop = []                       # exact, lm_eval: an answer ends before these strings
candidates = 64                 # reversal: how many halves an autoregressive model has to choose among
# --- lm_eval
preset = ''                     # settings of a paper: llada-base, llada-instruct, illada-base or illada-instruct
tasks = []                      # names of lm_eval tasks, or their .yaml files
num_fewshot = -1                # examples in the prompt; -1: as the preset or the task says
unsafe_code = False             # let tasks run the code that the model wrote (HumanEval, MBPP): in a sandbox only
# --- machine and output
batch_size = 64                 # rows in one forward pass
seed = 1                        # of masks and samples
device = 'auto'                 # 'cuda', 'mps' or 'cpu'
dtype = 'auto'                  # 'bfloat16' or 'float32'
out = ''                        # also write what is printed as .csv; curves and scaling draw a .png (matplotlib)
show = 0                        # print so many of the answers

SAMPLER = ('steps', 'block_length', 'variable_length', 'remasking', 'temperature', 'cfg_scale', 'logits_eos_inf',
           'confidence_eos_eot_inf', 'threshold')


def check(cfg):
    """Ranges of the settings; ValueError with every problem, one a line."""
    wrong = [f'{key} must be {least} or more, and below 2^31, got {getattr(cfg, key)}'
             for least, keys in ((0, 'limit windows seq_len seed gen_length steps block_length show'),
                                 (1, 'draws mc_num batch_size'), (2, 'samples candidates')) for key in keys.split()
             if not least <= getattr(cfg, key) < 2 ** 31]
    for key, allowed in (('task', TASKS), ('method', ('likelihood', 'confidence')), ('on_error', ('stop', 'skip')),
                         ('split', ('train', 'val')),
                         ('preset', ('', *presets()))):
        if getattr(cfg, key) not in allowed:
            wrong.append(f'{key} must be one of {", ".join(filter(None, allowed))}, got {getattr(cfg, key)!r}')
    if not cfg.checkpoints:
        wrong.append('name at least one checkpoint:  python evaluate.py bound out/docs')
    if cfg.variable_length and not cfg.block_length:
        wrong.append('variable_length needs a block_length')
    if not all(cfg.stop):
        wrong.append(f'stop must hold texts that are not empty, got {cfg.stop}')
    if cfg.temperature != -1 and cfg.temperature < 0:
        wrong.append(f'temperature must be 0 or more (-1: the default of the task), got {cfg.temperature}')
    try:
        re.compile(cfg.extract)
    except re.error as e:
        wrong.append(f'extract: not a regular expression ({e})')
    if wrong:
        raise ValueError('\n'.join(wrong))


def load(name, cfg):
    """A checkpoint -> namespace: name, model, meta, tok, autocast, kind, forward sign."""
    model, meta, where, autocast = open_model(name, cfg.device, cfg.dtype)
    tok = data.tokenizer_for(meta)
    if cfg.add_bos and tok.bos_id is None:
        raise ValueError(f'{name}: add_bos, but no file tells the id of BOS')
    tok.start = [tok.bos_id] if cfg.add_bos else tok.start
    return SimpleNamespace(name=name, model=model, meta=meta, tok=tok, autocast=autocast, device=where,
                           causal=model.config.causal, sign=' =' if model.config.causal else '<=',
                           kind='autoregressive' if model.config.causal else 'diffusion')


def corpus_of(loaded, cfg):
    """The corpus that checkpoints are measured on, made with their tokenizer."""
    trained_on = (loaded[0].meta['config'] or {}).get('dataset', '')
    if not (cfg.dataset or trained_on):
        raise ValueError('these weights do not say what they were trained on: give --dataset')
    corpus = data.open_dataset(cfg.dataset or trained_on)
    for run in loaded:
        data.same_tokenizer(run.tok, data.corpus_tokenizer(corpus), run.name, corpus.folder)
    return corpus


def items_of(cfg, default=None):
    """The records of the input files (or of `default`), a list. Bad lines stop, or are reported and counted."""
    names = [name for pattern in cfg.input for name in sorted(glob.glob(pattern)) or [pattern]] or [default]
    if names == [None]:
        raise ValueError(f'{cfg.task} needs --input=FILE')
    bad, found = [], []

    def complain(message):
        if cfg.on_error == 'stop':
            raise ValueError(message)
        bad.append(print(f'skipped {message}', file=sys.stderr))

    for name in names:
        found += [item for _, item in data.read_file(name, complain, NEEDS[cfg.task])]
    if bad:
        print(f'{len(bad)} bad lines were left out, {len(found)} are used', file=sys.stderr)
    return spread(found, cfg.limit)


def spread(items, n):
    """n of the items, evenly; all of them for 0."""
    return [items[i * len(items) // n] for i in range(n)] if 0 < n < len(items) else items


def share(hits):
    """(mean, standard error) of a list of 0 and 1."""
    n, mean = len(hits), sum(hits) / len(hits)
    return mean, math.sqrt(mean * (1 - mean) / (n - 1)) if n > 1 else math.nan


def table(rows, cfg, columns):
    """Prints rows (lists of cells) under their columns; writes them to cfg.out as .csv too."""
    cells = [[f'{c:.4g}' if isinstance(c, float) else str(c) for c in row] for row in [columns, *rows]]
    width = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    for row in cells:
        print('  '.join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, width))))
    if cfg.out:
        path = Path(cfg.out).with_suffix('.csv')
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open('w', newline='', encoding='utf-8') as file:
            csv.writer(file).writerows([columns, *rows])
        print(f'written to {path}', file=sys.stderr)


def answer(run, prompts, new, cfg, **other):
    """Completes prompts, lists of ids -> (what was written after each, lists of ids; forward passes; seconds).

    Which noise a prompt meets depends on its number alone, not on its neighbours in the batch.
    """
    tok, vocab_size, start = run.tok, run.model.config.vocab_size, time.perf_counter()
    settings = {**{key: getattr(cfg, key) for key in SAMPLER}, **other}
    settings.update(threshold=settings['threshold'] or None, remasking=settings['remasking'] or 'low_confidence')
    if new < 1:
        raise ValueError(f'{run.name}: a prompt fills the context of {run.model.config.seq_len} tokens, none are left')
    if settings['block_length'] and new % settings['block_length']:
        raise ValueError(f"block_length must divide gen_length, got {settings['block_length']} and {new}")
    if cfg.think_boost:
        settings['adjust'] = diffusion.end_think(tok.encode('</think>'), new, cfg.think_boost, cfg.think_power)
    longest, seq_len = max(map(len, prompts)) + new, run.model.config.seq_len
    if longest > seq_len:
        print(f'{run.name}: canvases of up to {longest} tokens, longer than the {seq_len} of training', file=sys.stderr)
    out, forwards, order = [None] * len(prompts), 0, sorted(range(len(prompts)), key=lambda i: len(prompts[i]))

    def ended(ids):
        return tok.eot_id in ids or any(s in tok.decode(ids) for s in cfg.stop)

    for i in tqdm(range(0, len(order), cfg.batch_size), desc=f'{run.name}: sampling', disable=None, leave=False):
        part = order[i:i + cfg.batch_size]
        noise = [diffusion.keyed_generator(cfg.seed, k, device=run.device) for k in part]
        with run.autocast:
            rows, n = diffusion.complete(run.model, [prompts[k] for k in part], new, tok, generator=noise, stop=ended,
                                         suppress=tok.unused(vocab_size), **settings)
        forwards += n
        for k, row in zip(part, rows):
            out[k] = row[len(prompts[k]):]
    return out, forwards, time.perf_counter() - start


# ---------------------------------------------------------------------------------------------------------------------
# Likelihood of held-out text


def log_probs(run, x0, maskable, cfg):
    """log p of the maskable tokens of each row (N, T): exact for a causal model, else the bound of Eq. 6 -> (N,)."""
    parts = []
    for i in tqdm(range(0, len(x0), cfg.batch_size), desc=run.name, disable=None, leave=False):
        x, m = (z[i:i + cfg.batch_size].to(run.device) for z in (x0, maskable))
        with run.autocast:
            parts.append(diffusion.ar_log_prob(run.model, x, m, bos_id=run.tok.eos_id) if run.causal else
                         diffusion.bound_per_row(run.model, x, m, run.tok.mask_id, draws=cfg.draws, seed=cfg.seed,
                                                 batch_size=cfg.batch_size, first=i))
    return torch.cat(parts).cpu()


def source_log_probs(x0, maskable, tok):
    """Exact log p of rows that are made-up stories, (N,), or None if they are not."""
    out = []
    for x, m in zip(x0, maskable):
        ways = data.world_readings(data.answer_text(x[m].tolist(), tok))
        if len(ways) != 1:
            return None
        out.append(ways[0])
    return torch.tensor(out, dtype=torch.float64)


def bound(cfg):
    """Nats per token and bits per byte of held-out windows, or of the responses of held-out examples."""
    loaded = [load(name, cfg) for name in cfg.checkpoints]
    corpus, tok = corpus_of(loaded, cfg), loaded[0].tok
    T = cfg.seq_len or min(run.model.config.seq_len for run in loaded)
    masking = {(run.meta['config'] or {}).get('masking', 'unified') for run in loaded}
    if masking == {'response'}:
        x0, maskable = data.all_examples(corpus, cfg.split, T, tok.eos_id, cfg.windows)
    else:
        x0 = data.all_windows(corpus, cfg.split, T, cfg.windows or None)
        maskable = torch.ones_like(x0, dtype=torch.bool)
    print(f'{corpus.folder}, split {cfg.split}: {len(x0)} rows of {x0.shape[1]} tokens, {cfg.draws} masks each',
          file=sys.stderr)
    n_bytes = x0.shape[1] * data.bytes_per_token(corpus, cfg.split) if masking != {'response'} else \
        sum(len(data.answer_text(x[m].tolist(), tok).encode()) for x, m in zip(x0, maskable)) / len(x0)
    rows, source = [], source_log_probs(x0, maskable, tok) if masking == {'response'} else None
    if source is not None:
        rows.append(['the source itself', '', ' =', *nats_and_bits(source, maskable, n_bytes), '1 x', ''])
    for run in loaded:
        start = time.perf_counter()
        logp = log_probs(run, x0, maskable, cfg)
        rows.append([f'{run.name} ({run.kind})', run.meta['iteration'] or '', run.sign,
                     *nats_and_bits(logp, maskable, n_bytes),
                     '' if source is None else f'{logp.mean() / source.mean():.3f} x',
                     round(time.perf_counter() - start, 1)])
    table(rows, cfg, ['checkpoint', 'iteration', '', 'nats/token', '+-', 'bits/byte', '+-', 'of the source', 'seconds'])


def nats_and_bits(logp, maskable, n_bytes):
    """[nats per token, standard error, bits per byte, standard error], with four digits after the point."""
    nats, bits = -logp / maskable.sum(1), -logp / n_bytes / math.log(2)
    return [f'{x:.4f}' for z in (nats, bits) for x in (z.mean(), z.std() / len(z) ** 0.5 if len(z) > 1 else math.nan)]


def world(cfg):
    """How many sampled stories the grammar accepts, and in how many names, pronouns and colours agree as well."""
    rows = []
    for name in cfg.checkpoints:
        run = load(name, cfg)
        new = cfg.gen_length or min(64, run.model.config.seq_len - len(story_start(run)))
        loose, strict, seconds, texts = graded(run, cfg, new)
        rows.append([f'{run.name} ({run.kind})', len(texts),
                     *(f'{100 * x:.1f}' for z in (loose, strict) for x in share(z)), round(seconds, 1)])
        print(*texts[:cfg.show], sep='\n', end='\n' * bool(cfg.show))
    table(rows, cfg, ['checkpoint', 'samples', 'parse %', '+-', 'consistent %', '+-', 'seconds'])


def story_start(run):
    """What stands before a story: BOS, or the end of the story before."""
    return run.tok.start or [run.tok.eos_id]


def graded(run, cfg, new, **settings):
    """Samples stories of at most `new` tokens -> (accepted by the grammar, consistent too, seconds, texts)."""
    config = {'remasking': cfg.remasking or 'random', **settings}
    ids, _, seconds = answer(run, [story_start(run)] * cfg.samples, new, cfg, **config)
    texts = [data.answer_text(row, run.tok) for row in ids]
    return [[bool(data.world_readings(t, strict)) for t in texts] for strict in (False, True)] + [seconds, texts]


# ---------------------------------------------------------------------------------------------------------------------
# Multiple choice: which continuation is likelier?


def as_choice(item):
    """A question with choices -> {'context', 'choices', 'gold'}; the shapes of ARC, PIQA, HellaSwag and BLiMP, and

    {"question", "choices": [...], "answer": a number from 0, a letter, or the choice itself}.
    """
    def need(key, kind=str):
        value = item.get(key)
        if isinstance(value, bool) or not isinstance(value, kind) or value in ('', []):
            raise ValueError(f'"{key}" is missing or of another kind, got {json.dumps(value)[:60]}')
        return value

    if 'sentence_good' in item:                                                                     # BLiMP
        return {'context': '', 'choices': [need('sentence_good'), need('sentence_bad')], 'gold': 0}
    labels = string.ascii_uppercase
    if 'goal' in item:                                                                              # PIQA
        context, choices, gold = f"Question: {need('goal')}\nAnswer:", [need('sol1'), need('sol2')], need('label', int)
    elif 'endings' in item:                                                                         # HellaSwag
        context, choices, gold = need('ctx'), need('endings', list), int(need('label', (int, str)))
    else:
        context, choices = f"Question: {need('question')}\nAnswer:", need('choices', (list, dict))
        gold = need('answerKey') if 'answerKey' in item else need('answer', (int, str))
        if isinstance(choices, dict):                                                               # ARC
            labels, choices = choices.get('label'), choices.get('text')
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c.strip() for c in choices):
        raise ValueError(f'want two or more choices that are not empty, got {json.dumps(choices)[:60]}')
    if isinstance(gold, str):
        named = list(labels[:len(choices)]) if len(labels) >= len(choices) else []
        gold = named.index(gold) if gold in named else choices.index(gold) if gold in choices else -1
    if not 0 <= gold < len(choices):
        raise ValueError(f'the answer {item.get("answerKey", item.get("answer", item.get("label")))!r} is none of the '
                         f'{len(choices)} choices')
    return {'context': context, 'choices': choices, 'gold': gold}


def encode_pair(context, continuation, tok):
    """Ids of both, and how many belong to the context: encoded as one text, blanks between them to the continuation."""
    blanks = len(context) - len(context.rstrip())
    context, continuation = context[:len(context) - blanks], context[len(context) - blanks:] + continuation
    before, ids = tok.encode(context), tok.encode(context + continuation)
    n = next((i for i, (a, b) in enumerate(zip(before, ids)) if a != b), min(len(before), len(ids) - 1))
    return [*tok.start, *ids], len(tok.start) + n


def score_pairs(run, pairs, cfg):
    """Scores of continuations, [(ids, length of the context)] -> list of float: log p, its bound, or confidence.

    What is longer than the model's context loses the beginning of its own context.
    """
    T, tok = run.model.config.seq_len - (cfg.pad_eos and not run.causal), run.tok
    x0s, maskables = [], []
    for ids, n in pairs:
        if len(ids) - n > T:
            raise ValueError(f'a continuation has {len(ids) - n} tokens, the context of {run.name} holds {T}')
        n, ids = max(0, n - max(0, len(ids) - T)), ids[-T:]
        x0s.append(torch.tensor(ids, device=run.device))
        maskables.append(torch.arange(len(ids), device=run.device) >= n)
    options, out = dict(batch_size=cfg.batch_size, cfg_scale=cfg.cfg_scale), []
    generator = diffusion.keyed_generator(cfg.seed, device=run.device)
    group = max(1, 64 * cfg.batch_size // cfg.mc_num)
    for i in tqdm(range(0, len(x0s), group), desc=f'{run.name}: scoring', disable=None, leave=False):
        x, m = x0s[i:i + group], maskables[i:i + group]
        with run.autocast:
            if run.causal:                                          # padding behind the end changes nothing before it
                x, m = (torch.nn.utils.rnn.pad_sequence(z, batch_first=True) for z in (x, m))
                out += diffusion.ar_log_prob(run.model, x, m, bos_id=tok.eos_id, batch_size=cfg.batch_size).tolist()
            elif cfg.method == 'confidence':
                eos_id = tok.eos_id if cfg.pad_eos else None
                out += diffusion.confidence_scores(run.model, x, m, tok.mask_id, eos_id=eos_id, **options)
            else:
                out += diffusion.log_likelihoods(run.model, x, m, tok.mask_id, mc_num=cfg.mc_num, generator=generator,
                                                 **options)
    return out


def choice(cfg):
    """Accuracy on multiple choice, by score and by score per byte of the choice."""
    items, rows = items_of(cfg), []
    for name in cfg.checkpoints:
        run, start = load(name, cfg), time.perf_counter()
        pairs = [encode_pair(item['context'], f" {c}" if item['context'] else c, run.tok)
                 for item in items for c in item['choices']]
        scores, plain, per_byte = iter(score_pairs(run, pairs, cfg)), [], []
        for item in items:
            s = [next(scores) for _ in item['choices']]
            n = [s_i / len(c.encode()) for s_i, c in zip(s, item['choices'])]
            plain.append(s.index(max(s)) == item['gold'])
            per_byte.append(n.index(max(n)) == item['gold'])
        seconds = time.perf_counter() - start
        by = 'exact' if run.causal else cfg.method if cfg.method == 'confidence' else f'Eq. 6, {cfg.mc_num} masks'
        rows.append([run.name, by, len(items), *(f'{100 * x:.1f}' for hits in (plain, per_byte) for x in share(hits)),
                     f'{len(items) / seconds:.1f}'])
    random_guess = 100 * sum(1 / len(item['choices']) for item in items) / len(items)
    table([*rows, ['random guess', '', len(items), f'{random_guess:.1f}', '', f'{random_guess:.1f}', '', '']], cfg,
          ['checkpoint', 'score', 'questions', 'acc %', '+-', 'acc_norm %', '+-', 'questions/s'])


# ---------------------------------------------------------------------------------------------------------------------
# Answers that can be checked


def as_question(item):
    """A question with a known answer -> {'history' or 'text', 'answer', 'accept', 'task'}."""
    if 'question' in item and 'answer' in item:                                                     # GSM8K
        item = {**item, 'prompt': item['question'], 'response': item['answer']}
    data.check_record(item)
    accept, plain = item.get('accept', ''), 'messages' not in item
    if 'first' in item or plain and 'prompt' not in item or not plain and item['messages'][-1]['role'] != 'assistant':
        raise ValueError('want "prompt" and "response", "question" and "answer", or "messages" that end with an answer')
    try:
        re.compile(accept)
    except (re.error, TypeError, OverflowError) as e:
        raise ValueError(f'"accept" is not a regular expression ({e})') from None
    return {'history': [{'role': 'user', 'content': item['prompt']}] if plain else item['messages'][:-1],
            'text': f"Question: {item['prompt']}\nAnswer:" if plain else None, 'task': str(item.get('task', 'all')),
            'answer': (item['response'] if plain else item['messages'][-1]['content']).strip(), 'accept': accept}


def right(text, item, extract):
    """Whether an answer is right: as `accept` says, by what `extract` finds last in both, or word for word."""
    text = text.strip()
    if item['accept']:
        return bool(re.fullmatch(item['accept'], text))
    if not extract:
        return text == item['answer']
    found = [re.findall(extract, t) for t in (text, item['answer'])]
    if not found[1]:
        raise ValueError(f'extract: {extract!r} finds nothing in the answer {item["answer"][-60:]!r}')
    return bool(found[0]) and found[0][-1] == found[1][-1]


def questions_of(cfg, run):
    """(questions, their prompts as ids) for a run: its own held-out examples, unless there is an input."""
    held_out = None if cfg.input else corpus_of([run], cfg).folder / 'val.jsonl'
    if held_out and not held_out.is_file():
        raise ValueError(f'{held_out}: no such file; {cfg.task} wants a model trained on examples, or --input=FILE')
    items = items_of(cfg, held_out)
    chat = cfg.instruct or not cfg.input or (run.meta['config'] or {}).get('masking') == 'response'
    return items, [run.tok.encode_chat(item['history']) if chat or item['text'] is None else
                   [*run.tok.start, *run.tok.encode(item['text'])] for item in items]


def exact(cfg):
    """Share of questions that are answered right, by task."""
    rows = []
    for name in cfg.checkpoints:
        run = load(name, cfg)
        items, prompts = questions_of(cfg, run)
        new = cfg.gen_length or min(64, run.model.config.seq_len - max(map(len, prompts)))
        ids, forwards, seconds = answer(run, prompts, new, cfg)
        texts = [data.answer_text(row, run.tok, cfg.stop) for row in ids]
        hits = [right(text, item, cfg.extract) for text, item in zip(texts, items)]
        for text, hit, item in list(zip(texts, hits, items))[:cfg.show]:
            print(f'{"right" if hit else "WRONG"}: {text!r}, want {item["accept"] or item["answer"]!r}')
        kinds = sorted({item['task'] for item in items})
        for kind in (*kinds, *(['all'] if len(kinds) > 1 else [])):
            part = [hit for hit, item in zip(hits, items) if kind in (item['task'], 'all')]
            rows.append([run.name, kind, len(part), *(f'{100 * x:.1f}' for x in share(part))])
        print(f'{run.name}: canvases of {new} tokens, {sum(map(len, ids)) / seconds:.0f} tokens/s, {forwards} forward '
              'passes', file=sys.stderr)
    table(rows, cfg, ['checkpoint', 'task', 'questions', 'right %', '+-'])


def flood(cfg):
    """How much of a canvas is EOS, and what that does to the answers, at growing gen_length."""
    rows = []
    for name in cfg.checkpoints:
        run = load(name, cfg)
        if run.causal:
            raise ValueError(f'{name}: an autoregressive model has no canvas to flood')
        items, prompts = questions_of(cfg, run)
        for new in (16, 32, 64, 128) if not cfg.gen_length else (cfg.gen_length,):
            ids, _, _ = answer(run, prompts, new, cfg)
            hits = [right(data.answer_text(row, run.tok), item, cfg.extract) for row, item in zip(ids, items)]
            ends = [sum(i == run.tok.eos_id for i in row) / new for row in ids]
            rows.append([run.name, new, f'{100 * sum(ends) / len(ends):.1f}', *(f'{100 * x:.1f}' for x in share(hits))])
    table(rows, cfg, ['checkpoint', 'gen_length', 'EOS % of canvas', 'right %', '+-'])


def as_couplet(item):
    """A couplet as it is: "first", "second", perhaps "join"."""
    if 'first' not in data.check_record(item):
        raise ValueError(f'want "first" and "second", got the keys {list(item)[:9]}')
    return item


def halves_of(item, tok):
    """A couplet as ids of its three parts."""
    return [tok.encode(part) for part in data.couplet(item)]


def fill(run, items, which, cfg):
    """Whether the first or second half is written, given the rest: a list of bool.

    Diffusion gets the statement with masks in place of the half: as many as it has tokens (and one for the EOS after a
    second half). An autoregressive model is given what it can be given: all that stands before; for a first half the
    second one and the join, as a prompt.
    """
    tok, prompts, wanted, shown = run.tok, [], [], []
    for item in items:
        first, join, second = halves_of(item, tok)
        if which == 'second':
            prompts.append([*tok.start, *first, *join] + ([] if run.causal else [tok.mask_id] * (len(second) + 1)))
            wanted.append(second)
        elif run.causal:
            prompts.append([*tok.start, *second, *join])
            wanted.append(first)
        else:
            prompts.append([*tok.start, *[tok.mask_id] * len(first), *join, *second, tok.eos_id])
            wanted.append(first)
        shown.append(len(tok.start) + (len(first) + len(join) if which == 'second' else 0))
    if not items:
        return []
    if run.causal:
        ids, _, _ = answer(run, prompts, max(map(len, wanted)), cfg)
        return [row[:len(want)] == want for row, want in zip(ids, wanted)]
    with run.autocast:
        hits = []
        for i in range(0, len(prompts), cfg.batch_size):
            rows, _ = diffusion.complete(run.model, prompts[i:i + cfg.batch_size], 0, tok, steps=cfg.steps,
                                         temperature=cfg.temperature, remasking=cfg.remasking or 'low_confidence')
            hits += [row[at:at + len(want)] == want for row, at, want in zip(rows, shown[i:], wanted[i:])]
    return hits


def ranked(run, items, which, cfg):
    """Whether an autoregressive model finds the half among `candidates`, by the likelihood of whole statements."""
    tok, rng, hits = run.tok, random.Random(cfg.seed), []
    pool = sorted({item[which] for item in items})
    for item in items:
        others = rng.sample([c for c in pool if c != item[which]], min(cfg.candidates, len(pool)) - 1)
        choices = [item[which], *others]
        pairs = [([*tok.start, *sum(halves_of({**item, which: c}, tok), []), tok.eos_id], len(tok.start))
                 for c in choices]
        scores = score_pairs(run, pairs, cfg)
        hits.append(scores.index(max(scores)) == 0)
    return hits


def reversal(cfg):
    """Couplets learned by heart: which half is written, given the other one?"""
    items, rows = None, []
    for name in cfg.checkpoints:
        run = load(name, cfg)
        if items is None:
            folder = Path('given') if cfg.input else corpus_of([run], cfg).folder
            items = items_of(cfg, folder / 'val.jsonl') if folder.name != 'facts' else \
                random.Random(cfg.seed).sample(list(data.facts()), cfg.limit or 128)
        seen, unseen = ([item for item in items if item.get('seen', True) == truth] for truth in (True, False))
        once = [item for item in seen if not item.get('both')]      # nowhere said the other way round
        cells = [share(hits) if hits else None for hits in (
            fill(run, seen, 'second', cfg), fill(run, seen, 'first', cfg), fill(run, once, 'first', cfg),
            ranked(run, spread(seen, 128), 'first', cfg) if run.causal else None,
            fill(run, unseen, 'second', cfg) if unseen else None)]
        rows.append([f'{run.name} ({run.kind})', len(seen),
                     *('' if c is None else f'{100 * c[0]:.1f} +- {100 * c[1]:.1f}' for c in cells)])
    print('earlier half: diffusion fills it in; an autoregressive model is given the later half and the join, which is '
          'no true statement\none way: the same where nothing states the two in the other order\nranked: the earlier '
          f'half among {cfg.candidates}, by likelihood\nunstated: the later half of a statement that only its reverse '
          'implies', file=sys.stderr)
    table(rows, cfg, ['checkpoint', 'statements', 'later half %', 'earlier half %', 'earlier, one way %',
                      'earlier, ranked %', 'unstated %'])


# ---------------------------------------------------------------------------------------------------------------------
# Curves: what a setting of the sampler costs and brings; what compute brings


def curves(cfg):
    """Quality against every setting of the sampler, and the spread of Eq. 5 and Eq. 6 against the number of draws.

    Quality: share of consistent stories for a model of the made-up world, else share of right answers.
    """
    rows = []
    for name in cfg.checkpoints:
        run = load(name, cfg)
        if run.causal:
            raise ValueError(f'{name}: these are settings of diffusion samplers, the model is autoregressive')
        corpus = corpus_of([run], cfg)                              # missing? better now than after an hour
        stories = corpus.folder.name == 'world'
        items, prompts = ([], [story_start(run)]) if stories else questions_of(cfg, run)
        new = cfg.gen_length or min(64, run.model.config.seq_len - max(map(len, prompts)))
        hows, plain = ('random', 'low_confidence'), dict(remasking='low_confidence', steps=0, block_length=0)
        points = [(f'steps, {how}', n, dict(remasking=how, steps=n))
                  for how in hows for n in sorted({max(1, new * k // 16) for k in (1, 2, 4, 8, 16)})]
        points += [('block_length, low_confidence', n, dict(block_length=n)) for n in range(1, new + 1) if new % n == 0]
        points += [(f'temperature, {how}', t, dict(remasking=how, temperature=t))
                   for how in hows for t in (0.25, 0.5, 0.75, 1.0, 1.25)]
        points += [('cfg_scale, low_confidence', w, dict(cfg_scale=w)) for w in (0.0, 0.5, 1.0, 2.0) if not stories]
        for sweep, x, settings in points:
            settings = {**plain, **settings}
            if stories:
                _, hits, seconds, _ = graded(run, cfg, new, **settings)
            else:
                ids, _, seconds = answer(run, prompts, new, cfg, **settings)
                hits = [right(data.answer_text(row, run.tok), item, cfg.extract) for row, item in zip(ids, items)]
            rows.append([name, sweep, x, *(round(100 * z, 2) for z in share(hits)), round(len(hits) * new / seconds)])
        rows += likelihood_spread(run, cfg, corpus)
    table(rows, cfg, ['checkpoint', 'sweep', 'setting', '%', '+-', 'tokens/s'])
    draw(cfg, [((row[0], row[1]), row[2], row[3], row[4]) for row in rows], ('setting', '%, or standard deviation'))


def likelihood_spread(run, cfg, corpus, repeats=16):
    """Standard deviation in nats of the estimates of log p of one held-out row, by the forms of Eq. 5 and Eq. 6."""
    if corpus.rows.get('val'):
        rows = data.all_examples(corpus, 'val', run.model.config.seq_len, run.tok.eos_id, 1)
        x0, maskable = (z[0].to(run.device) for z in rows)
    else:
        x0 = data.all_windows(corpus, 'val', run.model.config.seq_len, 1)[0].to(run.device)
        maskable = torch.ones_like(x0, dtype=torch.bool)
    rows = []
    for label, estimate in (('Eq. 5', diffusion.log_likelihood_eq5), ('Eq. 6', diffusion.log_likelihood)):
        for n in (4, 16, 64, 256):
            start, got = time.perf_counter(), []
            for k in range(repeats):
                noise = diffusion.keyed_generator(cfg.seed, n, k, device=run.device)
                with run.autocast:
                    got.append(estimate(run.model, x0, maskable, run.tok.mask_id, mc_num=n, generator=noise,
                                        batch_size=cfg.batch_size))
            spread_of = torch.tensor(got).std().item()
            rows.append([run.name, f'{label}: sd of log p by draws', n, round(spread_of, 3),
                         round(spread_of / math.sqrt(2 * repeats - 2), 3),
                         round(repeats * n * len(x0) / (time.perf_counter() - start))])
    return rows


def draw(cfg, points, labels, logs=False):
    """points (series or (panel, series), x, y, error) as a .png beside cfg.out, if matplotlib is installed."""
    if not cfg.out:
        return print('(--out=FILE writes a table, and with matplotlib a figure)', file=sys.stderr)
    try:
        import matplotlib
    except ImportError:
        return print('no figure: pip install matplotlib', file=sys.stderr)
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    sweeps = {}
    for series, x, y, e in points:
        panel, label = (series[1].split(',')[0].split(':')[-1], ', '.join(series)) if len(series) == 2 else ('', series)
        sweeps.setdefault(panel, {}).setdefault(label, []).append((x, y, e))
    figure, axes = plt.subplots(1, len(sweeps), figsize=(5 * len(sweeps), 4), squeeze=False, layout='constrained')
    for axis, (panel, lines) in zip(axes[0], sweeps.items()):
        for label, line in lines.items():
            x, y, e = zip(*sorted(line))
            axis.errorbar(x, y, yerr=[0 if math.isnan(v) else v for v in e], marker='o', capsize=2, label=label)
        axis.set(xlabel=panel.strip() or labels[0], ylabel=labels[1])
        if (logs or 'draws' in panel) and min(p[1] for line in lines.values() for p in line) > 0:
            axis.set(xscale='log', yscale='log')
        axis.legend(fontsize=7)
    path = Path(cfg.out).with_suffix('.png')
    figure.savefig(path, dpi=120)
    print(f'drawn in {path}', file=sys.stderr)


def scaling(cfg):
    """Bound against training FLOPs of runs, a power law for each family, and the compute that diffusion needs more."""
    rows, families = [], {}
    for name in [n for pattern in cfg.checkpoints for n in sorted(glob.glob(pattern)) or [pattern]]:
        if not find_checkpoints(name):
            raise ValueError(f'{name}: no run of train.py')
        run = load(name, cfg)
        lines = (Path(name) / 'log.jsonl').read_text(encoding='utf-8').splitlines()
        bounds = [json.loads(line) for line in lines if '"val_nats"' in line and line.endswith('}')]
        if not bounds:
            raise ValueError(f'{name}: this run was stopped before its first validation')
        entry, settings = bounds[-1], run.meta['config']
        tokens = entry['iter'] * (settings['global_batch'] or settings['batch_size']) * settings['seq_len']
        flops = tokens * run.model.flops_per_token(1.0 if run.causal else 0.5)
        families.setdefault(run.kind, []).append((flops, entry['val_bits_per_byte'], entry['val_bits_per_byte_stderr']))
        rows.append([name, run.kind, f'{run.model.num_params(non_embedding=True):,}', f'{tokens:,}', f'{flops:.3g}',
                     f"{run.sign} {entry['val_bits_per_byte']:.4f}", f"{entry['val_bits_per_byte_stderr']:.4f}"])
    table(rows, cfg, ['run', 'family', 'N (non-embedding)', 'tokens', 'FLOPs', 'bits/byte', '+-'])
    fits = {}
    for kind, points in families.items():
        if len({p[0] for p in points}) < 2:
            continue
        x, y = (torch.tensor([math.log10(p[i]) for p in points], dtype=torch.float64) for i in (0, 1))
        slope = float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())
        fits[kind] = slope, float(y.mean() - slope * x.mean())
        print(f'{kind}: bits/byte = {10 ** fits[kind][1]:.3g} * FLOPs^{slope:.4f} ({len(points)} points)')
    if len(fits) == 2:
        (a, b), (c, d) = fits['autoregressive'], fits['diffusion']
        for flops in sorted({p[0] for p in families['autoregressive']}):
            needed = 10 ** ((a * math.log10(flops) + b - d) / c)
            print(f'what the autoregressive fit reaches with {flops:.2g} FLOPs, the diffusion fit reaches with '
                  f'{needed:.2g}: {needed / flops:.3g} times as many')
    draw(cfg, [(kind, *p) for kind, points in families.items() for p in points], ('training FLOPs', 'bits/byte'), True)


# ---------------------------------------------------------------------------------------------------------------------
# lm-evaluation-harness: any of its tasks, by likelihood or by generation

# The papers' settings for tasks (with their number of examples): EVAL.md of LLaDA and App. B of the paper; iLLaDA's
# evaluation script, as read in forks of the official repository (one reader has lengths 3 and 4 exchanged).
PRESETS = """
llada-base       bbh:3 gsm8k:4 minerva_math:4 humaneval:0 mbpp:4                 gen_length=1024
llada-base       arc_challenge:0 hellaswag:0 piqa:0 gpqa_main_n_shot:5           cfg_scale=0.5
llada-base       truthfulqa_mc2:0                                                cfg_scale=2.0
llada-base       winogrande:5                                                    cfg_scale=0.0
llada-base       mmlu:5 cmmlu:5 ceval-valid:5                                    mc_num=1
llada-instruct   mmlu_generative hellaswag                                       gen_length=3
llada-instruct   mmlu_pro                                                        gen_length=256
llada-instruct   arc_challenge_chat                                              gen_length=512
llada-instruct   gsm8k minerva_math ifeval                                       gen_length=512 confidence_eos_eot_inf=1
llada-instruct   gpqa_main_generative_n_shot                                     gen_length=64 confidence_eos_eot_inf=1
llada-instruct   mbpp_instruct                                                   gen_length=256 confidence_eos_eot_inf=1
llada-instruct   humaneval_instruct                                              gen_length=512 logits_eos_inf=1
illada-base      arc_challenge:0 hellaswag:0                                     method=confidence pad_eos=1 add_bos=1
illada-base      mmlu:5 cmmlu:5                                                  mc_num=1 pad_eos=1 add_bos=1
illada-base      bbh minerva_math mbpp gsm8k_cot:8            gen_length=1024 variable_length=1 block_length=32 steps=32
illada-base      humaneval                                                       gen_length=512
illada-instruct  mmlu_redux_generative:5                                         gen_length=4
illada-instruct  mmlu_generative:5                                               gen_length=3
illada-instruct  minerva_math:0 mmlu_pro_reasoning:0        gen_length=4096 variable_length=1 block_length=32 steps=32 \
                                                                                 think_boost=100 think_power=3
illada-instruct  gsm8k_cot_reasoning:0                      gen_length=2048 variable_length=1 block_length=32 steps=32 \
                                                                                 think_boost=100 think_power=3
illada-instruct  humaneval_reasoning:0                      gen_length=2048 variable_length=1 block_length=32 steps=32 \
                                                                                 think_boost=100 think_power=1
illada-instruct  mbpp_reasoning:0                           gen_length=2048 variable_length=1 block_length=16 steps=16 \
                                                                                 think_boost=100 think_power=3
"""


def presets():
    """The table above as preset -> task -> settings, with num_fewshot where the paper gives it."""
    out = {}
    for name, *words in (line.split() for line in PRESETS.replace('\\\n', ' ').strip().splitlines()):
        pairs = dict(w.split('=') for w in words if '=' in w)
        settings = {k: v if k == 'method' else type(globals()[k])(float(v)) for k, v in pairs.items()}
        for task, _, shots in (w.partition(':') for w in words if '=' not in w):
            out.setdefault(name, {})[task] = {**settings, **({'num_fewshot': int(shots)} if shots else {})}
    return out


class Harness:
    """What lm_eval asks of a model (its lm_eval.api.model.LM is mixed in by `harness`); requests carry .args."""

    def setup(self, run, cfg):
        self.run, self.cfg = run, cfg
        return self

    def loglikelihood(self, requests, disable_tqdm=False):
        """[(context, continuation)] -> [(log p, its bound, or confidence; is_greedy)].

        is_greedy is not asked of a diffusion model (it would need one forward pass a token) and always False.
        """
        pairs = []
        for context, continuation in (r.args for r in requests):
            before = self.conversation(context) if self.cfg.instruct else []
            pairs.append(([*before, *self.run.tok.encode(continuation)], len(before)) if before else
                         encode_pair(context, continuation, self.run.tok))
        return [(s, False) for s in score_pairs(self.run, pairs, self.cfg)]

    def conversation(self, context):
        """Ids of messages as apply_chat_template has left them; what the assistant has begun to say is left open."""
        messages = json.loads(context)
        begun = messages.pop()['content'] if messages[-1]['role'] == 'assistant' else ''
        return [*self.run.tok.encode_chat(messages), *self.run.tok.encode(begun)]

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """[(text,)] -> [log p or its bound], over windows of the model's context that do not overlap."""
        out, T = [], self.run.model.config.seq_len - len(self.run.tok.start)
        for r in requests:
            ids = self.run.tok.encode(r.args[0])
            windows = [([*self.run.tok.start, *ids[i:i + T]], len(self.run.tok.start)) for i in range(0, len(ids), T)]
            out.append(sum(score_pairs(self.run, windows, self.cfg)))
        return out

    def generate_until(self, requests, disable_tqdm=False):
        """[(context, {'until', 'max_gen_toks'})] -> [text up to a stop string]; contexts are cut on the left."""
        run, T, block, asked = self.run, self.run.model.config.seq_len, self.cfg.block_length or 1, []
        for context, wish in (r.args for r in requests):
            until = wish.get('until') or []
            until = (until,) if isinstance(until, str) else tuple(until)
            want = self.cfg.gen_length or wish.get('max_gen_toks') or 256
            new = max(block, min(want, T // 2) // block * block)
            ids = self.conversation(context) if self.cfg.instruct else [*run.tok.start, *run.tok.encode(context)]
            if new < want or len(ids) > T - new:
                print(f'a context of {T} tokens: {new} of {want} will be written, and the first '
                      f'{max(0, len(ids) - T + new)} of the prompt are left out', file=sys.stderr)
            asked.append((ids[-(T - new):], new, until))
        answers = [None] * len(asked)
        for new, until in sorted({(n, u) for _, n, u in asked}):    # those that go on and end alike
            part = [i for i, (_, n, u) in enumerate(asked) if (n, u) == (new, until)]
            cfg = SimpleNamespace(**{**vars(self.cfg), 'stop': [*until, *self.cfg.stop]})
            rows, _, _ = answer(run, [asked[i][0] for i in part], new, cfg)
            for i, row in zip(part, rows):
                answers[i] = data.answer_text(row, run.tok, cfg.stop)
        return answers

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        """The messages as they are: generate_until makes ids of them, for a template's tokens are not text."""
        return json.dumps(chat_history)

    @property
    def tokenizer_name(self):
        return self.run.tok.spec.replace('/', '__')


def harness(run, cfg):
    """The model of a run as an lm_eval.api.model.LM."""
    try:
        from lm_eval.api.model import LM
    except ImportError:
        raise ValueError('this task needs one more package: pip install lm_eval') from None
    return type('NanoLLaDA', (Harness, LM), {})().setup(run, cfg)


def lm_eval(cfg):
    """Tasks of lm-evaluation-harness, each with the settings of the preset."""
    known = presets().get(cfg.preset, {})
    if not cfg.tasks:
        raise ValueError(f'lm_eval needs --tasks=NAME ; the preset knows: {", ".join(known) or "nothing"}')
    strange = [name for name in cfg.tasks if known and name not in known]
    if strange:
        raise ValueError(f'preset {cfg.preset} knows no settings for {", ".join(strange)}; it knows {", ".join(known)}')
    rows = []
    for name in cfg.checkpoints:
        for wanted in cfg.tasks:
            settings = SimpleNamespace(**{**vars(cfg), **known.get(wanted, {})})
            settings.instruct = cfg.instruct or cfg.preset.endswith('instruct')
            lm = harness(load(name, settings), settings)
            import lm_eval as library
            from lm_eval.tasks import TaskManager
            file = Path(wanted)
            manager = TaskManager(include_path=str(file.parent) if file.suffix == '.yaml' else None)
            shots = cfg.num_fewshot if cfg.num_fewshot >= 0 else known.get(wanted, {}).get('num_fewshot')
            result = library.simple_evaluate(
                model=lm, tasks=[file.stem if file.suffix == '.yaml' else wanted], num_fewshot=shots,
                limit=cfg.limit or None, task_manager=manager, apply_chat_template=settings.instruct,
                bootstrap_iters=100, random_seed=cfg.seed, fewshot_as_multiturn=settings.instruct,
                confirm_run_unsafe_code=cfg.unsafe_code)
            for entry, numbers in result['results'].items():
                rows += [[name, entry, key.replace(',none', ''), f'{value:.4f}', str(numbers.get(
                    key.replace(',', '_stderr,'), ''))] for key, value in numbers.items()
                    if isinstance(value, float) and '_stderr' not in key]
    table(rows, cfg, ['checkpoint', 'task', 'metric', 'value', '+-'])


TASKS = {f.__name__: f for f in (bound, world, exact, flood, choice, reversal, curves, scaling, lm_eval)}
NEEDS = {'choice': as_choice, 'exact': as_question, 'flood': as_question, 'curves': as_question,
         'reversal': as_couplet}


def main(config):
    cfg = SimpleNamespace(**config)
    with user_errors():
        check(cfg)
        if cfg.temperature < 0:
            cfg.temperature = 1.0 if cfg.task in ('world', 'curves') else 0.0
        TASKS[cfg.task](cfg)


if __name__ == '__main__':
    command(main, configure(globals(), positional=('task', 'checkpoints')))
