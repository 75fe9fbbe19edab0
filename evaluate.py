"""Numbers about checkpoints, each with its standard error.

    python evaluate.py bound out/docs out/docs_ar               # held-out text, side by side, same windows
    python evaluate.py exact out/sft_toy                        # held-out questions, answered word for word
    python evaluate.py choice out/docs --input=questions.jsonl --method=confidence
    python evaluate.py lm_eval LLaDA-8B-Base config/eval_llada_base.py      # pip install lm_eval

bound: nats per token and bits per byte. For a diffusion model this is an upper bound on its cross-entropy
(Eq. 6 of LLaDA, arXiv 2502.09992v3), written <=; for the autoregressive baseline it is exact, written =. Do
not read the two as the same kind of number. The experiments of the papers: tests/lab/experiments.py.
"""

from configurator import before_torch

if __name__ == '__main__':
    before_torch()

import csv
import json
import math
import re
import time
from collections import Counter, defaultdict, namedtuple
from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm import tqdm

import data
import diffusion
from configurator import Refused, clean, command, out_of_range, refuse, refusing, say
from model import open_model, weights_in

task = 'bound'                  # bound, exact, choice or lm_eval
checkpoints = []                # runs or steps of train.py, or folders of released weights
dataset = ''                    # a data set; default: the one that the first checkpoint was trained on
split = 'val'                   # 'val' or 'train' (bound)
input = []                    # files of questions or choices (repeat, or patterns); exact: default held-out ones
windows = 0                     # windows or examples (bound), evenly spread; 0: all (of a mixture, 1000)
limit = 0                       # how many questions, evenly spread; 0: all
# --- likelihood
seq_len = 0                     # tokens in a window (bound); 0: the shortest context among the checkpoints
draws = 16                      # masks for each window (bound), stratified
mc_num = 128                    # masks for each choice (choice, lm_eval): Eq. 6
method = 'likelihood'           # of choice and lm_eval: 'likelihood' (Eq. 6) or 'confidence' (iLLaDA)
same_masks = True               # choices of a question share their masks: far less noise between them
add_bos = False                 # begin plain prompts with BOS (iLLaDA); runs trained on examples always do
pad_eos = False                 # a visible EOS follows what is scored, and is not scored itself (iLLaDA)
# --- sampler
gen_length = 0                  # tokens for an answer; 0: what the context leaves, at most 64
steps = 0                       # denoising steps (of one block with variable_length); 0: one token per step
block_length = 0                # 0: the whole canvas at once
variable_length = False         # append blocks one by one
remasking = 'low_confidence'    # or 'random'
temperature = 0.0               # of the proposals
cfg_scale = 0.0                 # classifier-free guidance; likelihoods are guided as well
logits_eos_inf = False          # EOS is never written
confidence_eos_eot_inf = False  # EOS and EoT are written last
threshold = 0.0                 # above 0: commit every proposal at least this probable
cache = ''                      # 'prefix', 'dual' or 'roll': see sample.py
think_boost = 0.0               # see sample.py
think_power = 3.0               # see sample.py
instruct = False                # put questions into the chat template
extract = ''                    # exact: a regular expression; its last match in answer and output is compared
stop = []                       # exact, lm_eval: an answer ends before these strings
# --- lm_eval
tasks = []                 # lm_eval tasks or .yaml files of some, each with an optional :N for N-shot prompts
unsafe_code = False             # let tasks run code that the model wrote (HumanEval, MBPP): in a sandbox only
# --- machine and output
batch_size = 64                 # rows in one forward pass
seed = 1                        # of masks and samples
device = 'auto'                 # 'cuda', 'mps' or 'cpu'
dtype = 'auto'                  # 'bfloat16' or 'float32'
compile = False                 # torch.compile each block
mask_id = -1                    # id of [MASK] if neither the weights nor their tokenizer name it
out = ''                        # also write what is printed as .csv
show = 0                        # how many of the answers to print

Run = namedtuple('Run', 'name model meta tok device autocast causal')


def check(cfg):
    """Refuses invalid settings."""
    wrong = out_of_range(cfg, (
        ('limit windows seq_len seed gen_length show', 'in 0 .. 2^31', lambda v: 0 <= v < 2 ** 31),
        ('draws mc_num batch_size', 'in 1 .. 9999', lambda v: 1 <= v < 10 ** 4),
        ('task', f'one of {", ".join(TASKS)}', lambda v: v in TASKS),
        ('method', 'one of likelihood, confidence', lambda v: v in ('likelihood', 'confidence')),
        ('split', 'one of train, val', lambda v: v in ('train', 'val'))))

    if not cfg.checkpoints:
        wrong.append('name at least one checkpoint:  python evaluate.py bound out/docs')
    for name in cfg.tasks:
        if not re.fullmatch(r'[^:]+(:\d+)?', str(name)):
            wrong.append(f'tasks must be of the form NAME or NAME:N, got {name!r}')
    if cfg.out and not cfg.out.endswith('.csv'):
        wrong.append(f'out must end in .csv, got {cfg.out}')
    refuse(wrong)

    with refusing():
        diffusion.sampler_of(cfg)
        check_pattern('extract', cfg.extract)


def check_pattern(name, pattern):
    """ValueError unless it is a regular expression."""
    try:
        re.compile(pattern)
    except (re.error, TypeError, OverflowError) as error:
        raise ValueError(f'{name}: not a regular expression ({error})') from None


def load(name, cfg):
    """A checkpoint and everything that belongs to it -> Run."""
    model, meta, where, autocast = open_model(name, cfg.device, cfg.dtype, cfg.compile)
    tok = data.tokenizer_for(meta, cfg.mask_id if cfg.mask_id >= 0 else None)
    if cfg.add_bos:
        if tok.bos_id is None:
            raise Refused(f'{name}: add_bos, but no file tells the id of BOS')
        tok.start = [tok.bos_id]
    return Run(name, model, meta, tok, where, autocast, model.config.causal)


def trained_with(run, key, otherwise=''):
    """A setting of the training run; released weights do not say."""
    return (run.meta['config'] or {}).get(key, otherwise)


def dataset_of(runs, cfg):
    """The data set that checkpoints are measured on, made with their tokenizer."""
    name = cfg.dataset or trained_with(runs[0], 'dataset')
    if not name:
        raise Refused('these weights do not say what they were trained on: give --dataset')
    dataset = data.open_dataset(name)
    for run in runs:
        data.check_same(run.tok, dataset.parts[0].tokenizer(), run.name, name)
    return dataset


def items_of(files, limit, accept):
    """The rows of files or patterns as accept(row) makes them, `limit` of them, evenly spread."""
    found = []
    for path in data.files_of(files):
        found += [{**item, 'file': Path(path).stem} for _, item in data.read_records(path, accept)]
    return [found[i] for i in data.evenly(len(found), limit)]


def percent(hits):
    """A list of 0 and 1 as per cent: [mean, standard error]."""
    n, mean = len(hits), sum(hits) / len(hits)
    error = math.sqrt(mean * (1 - mean) / (n - 1)) if n > 1 else math.nan
    return [f'{100 * mean:.1f}', f'{100 * error:.1f}']


def table(rows, columns, out=''):
    """Prints rows (lists of cells) under their columns; writes them to `out` as .csv too."""
    def shown(cell):
        return f'{cell:.4g}' if isinstance(cell, float) else str(cell)

    lines = [list(map(shown, row)) for row in [columns, *rows]]
    widths = [max(map(len, column)) for column in zip(*lines)]
    for first, *others in lines:
        right = [cell.rjust(width) for cell, width in zip(others, widths[1:])]
        print(clean('  '.join([first.ljust(widths[0]), *right])))

    if out:
        path = Path(out)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open('w', newline='', encoding='utf-8') as file:
            csv.writer(file).writerows([columns, *rows])
        say(f'written to {path}')


# ----------------------------------------------------------------------------------------------------------
# Likelihood of held-out text


def log_probs(run, groups, cfg):
    """log p of the maskable tokens of the rows of groups (x0, maskable): exact if causal, else Eq. 6 -> (N,)."""
    n, parts = cfg.batch_size, []
    batches = [pair for x0, maskable in groups for pair in zip(x0.split(n), maskable.split(n))]
    for x, m in tqdm(batches, desc=run.name, disable=None, leave=False):
        before = sum(map(len, parts))
        with run.autocast:
            part = diffusion.log_prob_rows(run.model, x.to(run.device), m.to(run.device), run.tok, draws=cfg.draws,
                                           first=before, seed=cfg.seed, batch_size=n)
        parts.append(part.cpu())
    return torch.cat(parts)


def bound(cfg):
    """Nats per token and bits per byte of held-out windows, or of the responses of held-out examples."""
    runs = [load(name, cfg) for name in cfg.checkpoints]
    dataset, tok = dataset_of(runs, cfg), runs[0].tok
    on_examples = all(trained_with(run, 'masking') == 'response' for run in runs)
    masking = 'response' if on_examples else 'unified'
    T = cfg.seq_len or min(run.model.config.seq_len for run in runs)
    source = data.open_source(dataset, cfg.split, masking, tok, T)
    groups, n_bytes = source.held_out(cfg.windows)
    n_tokens = torch.cat([maskable.sum(1) for _, maskable in groups])
    say(f'{cfg.split}: {len(n_tokens)} rows of up to {groups[-1][0].shape[1]} tokens, {cfg.draws} masks each')

    rows, logps, paired = [], [], []
    for run in runs:
        began = time.perf_counter()
        logps.append(log_probs(run, groups, cfg))
        seconds = round(time.perf_counter() - began, 1)
        kind, sign = ('autoregressive', ' =') if run.causal else ('diffusion', '<=')
        numbers = diffusion.nats_and_bits(logps[-1], n_tokens, n_bytes)
        if len(runs) > 1:                               # on the same windows and masks: far more precise than either
            paired = ['above the first', '+-']
            numbers += diffusion.nats_and_bits(logps[-1] - logps[0], n_tokens, n_bytes)[2:]
        cells = [f'{number:.4f}' for number in numbers]
        rows.append([f'{run.name} ({kind})', run.meta['iteration'] or '', sign, *cells, seconds])

    columns = ['checkpoint', 'iteration', '', 'nats/token', '+-', 'bits/byte', '+-', *paired, 'seconds']
    table(rows, columns, cfg.out)


# ----------------------------------------------------------------------------------------------------------
# Multiple choice: which continuation is likelier?


def as_choice(row):
    """{"question" or "context", "choices", "answer": a number from 0, or the choice itself}, checked."""
    choices, answer = row.get('choices'), row.get('answer')
    context = row.get('context', row.get('question'))
    if not isinstance(context, str):
        raise ValueError('want a text as "question" or "context"')
    if 'context' not in row:
        context = f'Question: {context}\nAnswer:'
    texts = choices if isinstance(choices, list) else []
    if len(texts) < 2 or not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f'want "choices", two or more texts that are not empty, got {json.dumps(choices)[:60]}')

    if answer in choices:
        answer = choices.index(answer)
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise ValueError(f'the "answer" {answer!r} is none of the {len(choices)} choices')
    return {'context': context, 'choices': choices, 'answer': answer}


def encode_pair(context, continuation, tok):
    """Ids of both, encoded as one text, and how many are the context's; blanks between go to the second."""
    if not continuation:
        ids = [*tok.start, *tok.encode(context)]
        return ids, len(ids)
    alone, ids = tok.encode(context.rstrip()), tok.encode(context + continuation)
    n = min(len(alone), len(ids) - 1)
    while alone[:n] != ids[:n]:
        n -= 1
    return [*tok.start, *ids], len(tok.start) + n


def score_pairs(run, pairs, cfg):
    """Scores of continuations, [(ids, length of the context)] -> list of float: log p, its bound, or confidence.

    A pair longer than the model's context length loses the beginning of its context.
    """
    tok, scores = run.tok, []
    end = [tok.eos_id] * cfg.pad_eos
    T = run.model.config.seq_len - len(end)

    for ids, n in tqdm(pairs, desc=f'{run.name}: scoring', disable=None, leave=False):
        new = ids[n:]
        if not new:                                         # log p of nothing
            scores.append(0.0)
            continue
        context = tok.cut(ids[:n], T - len(new))
        if len(context) + len(new) > T:
            raise Refused(f'a continuation has {len(new)} tokens, the context of {run.name} holds {T}')
        x0 = torch.tensor([*context, *new, *end], device=run.device)
        maskable = torch.zeros_like(x0, dtype=torch.bool)
        maskable[len(context):len(context) + len(new)] = True

        with run.autocast:
            if run.causal:
                score = diffusion.ar_log_likelihood(run.model, x0, maskable, bos_id=tok.eos_id)
            elif cfg.method == 'confidence':
                score = diffusion.confidence_score(run.model, x0, maskable, tok.mask_id, cfg_scale=cfg.cfg_scale)

            else:
                key = ids[:n] if cfg.same_masks else ids
                noise = diffusion.keyed_generator(cfg.seed, *key, device=run.device)
                score = diffusion.log_likelihood(
                    run.model, x0, maskable, tok.mask_id, mc_num=cfg.mc_num,
                    generator=noise, cfg_scale=cfg.cfg_scale, batch_size=cfg.batch_size)
        scores.append(score)
    return scores


def choice(cfg):
    """Accuracy on multiple choice, by score and by score per byte; for comparison, by fewest tokens."""
    items, rows = items_of(cfg.input, cfg.limit, as_choice), []
    if not items:
        raise Refused('choice needs --input=FILE')
    by = 'confidence' if cfg.method == 'confidence' else f'Eq. 6, {cfg.mc_num} masks'
    for name in cfg.checkpoints:
        run, hits = load(name, cfg), defaultdict(list)

        for item in items:
            space = ' ' if item['context'] else ''
            pairs = [encode_pair(item['context'], space + text, run.tok) for text in item['choices']]
            scores = score_pairs(run, pairs, cfg)
            relative = [score / len(text.encode()) for score, text in zip(scores, item['choices'])]
            few = [n - len(ids) for ids, n in pairs]
            right = [best.index(max(best)) == item['answer'] for best in (scores, relative, few)]
            hits[item['file']].append(right)

        for file, answers in with_all(hits):
            plain, per_byte, fewest = zip(*answers)
            kind = 'exact' if run.causal else by
            rows.append([run.name, kind, file, len(answers), *percent(plain), *percent(per_byte)])
            rows.append([run.name, 'fewest tokens', file, len(answers), *percent(fewest), '', ''])

    chances = [1 / len(item['choices']) for item in items]
    rows.append(['random guess', '', '', len(items), percent(chances)[0], '', '', ''])
    table(rows, ['checkpoint', 'score', 'file', 'questions', 'acc %', '+-', 'acc_norm %', '+-'], cfg.out)


def with_all(groups):
    """The items of a dict of lists; if there are several, also all of them together."""
    if len(groups) > 1:
        groups = {**groups, 'all': sum(groups.values(), [])}
    return groups.items()


# ----------------------------------------------------------------------------------------------------------
# Answers that can be checked


def answers(run, prompts, new, cfg):
    """Completes prompts, lists of ids -> (what was written after each, lists of ids; forward passes)."""
    with refusing():
        diffusion.check_steps(new, cfg)
    longest, seq_len = max(map(len, prompts)) + new, run.model.config.seq_len
    if longest > 8 * seq_len:
        raise Refused(f'{run.name}: gen_length: {longest} tokens, the context holds {seq_len}')
    if longest > seq_len:
        say(f'{run.name}: up to {longest} tokens, longer than the {seq_len} of training')

    with run.autocast:
        rows, n = diffusion.complete(run.model, prompts, new, run.tok, seed=cfg.seed, batch_size=cfg.batch_size,
                                     **diffusion.sampler_of(cfg))
    return [row[len(ids):] for row, ids in zip(rows, prompts)], n


def as_question(row):
    """A record that ends in an answer, checked: see data.as_record; "accept" is a regular expression."""
    row = data.as_record(row)
    if 'messages' not in row:
        raise ValueError('want "prompt" and "response", "question" and "answer", or "messages" with an answer')
    check_pattern('"accept"', row.setdefault('accept', ''))
    return row


def value(text):
    """What a text says: a number ($1,080.00 is 1080, and so is 1080.), or itself."""
    number = re.fullmatch(r'[^\w.-]*(-?[\d,]*\.?\d+)\D*', text)
    return float(number[1].replace(',', '')) if number else text.strip()


def right(text, item, extract=''):
    """Whether an answer is right: as "accept" says, by what `extract` finds last in both, or word for word."""
    text = text.split('\nQuestion:')[0].strip()                 # a base model may go on with a question of its own
    want = item['messages'][-1]['content'].strip()
    if item['accept']:
        return bool(re.fullmatch(item['accept'], text))
    if not extract:
        return text == want
    found, wanted = (re.findall(extract, t.replace('$', '')) for t in (text, want))
    if not wanted:
        raise Refused(f'extract: {extract!r} finds nothing in the answer {want[-60:]!r}')
    return bool(found) and value(str(found[-1])) == value(str(wanted[-1]))


def questions_of(run, cfg):
    """(questions, their prompts as ids) for a run: its own held-out examples, unless there is an input."""
    files = cfg.input
    if not files:
        folder = dataset_of([run], cfg).parts[0].folder
        files = sorted(map(str, folder.glob('val_*.jsonl')))
        if not files:
            raise Refused(f'{folder}: no held-out examples; give --input=FILE, or a model trained on some')

    items, prompts = items_of(files, cfg.limit, as_question), []
    chat = cfg.instruct or not cfg.input or trained_with(run, 'masking') == 'response'
    for item in items:
        *history, asked, _ = item['messages']
        if chat or history:
            prompts.append(run.tok.encode_begun([*history, asked]))
        else:
            prompts.append([*run.tok.start, *run.tok.encode(f"Question: {asked['content']}\nAnswer:")])
    return items, prompts


def exact(cfg):
    """Share of questions that are answered right, by "task"."""
    rows = []
    for name in cfg.checkpoints:
        run = load(name, cfg)
        items, prompts = questions_of(run, cfg)
        new = cfg.gen_length or min(64, run.model.config.seq_len - max(map(len, prompts)))
        began = time.perf_counter()
        ids, n = answers(run, prompts, new, cfg)
        rate = sum(map(len, ids)) / (time.perf_counter() - began)

        by_task = defaultdict(list)
        for i, (row, item) in enumerate(zip(ids, items)):
            text = run.tok.answer(row, cfg.stop)
            hit = right(text, item, cfg.extract)
            by_task[str(item.get('task', 'all'))].append(hit)
            if i < cfg.show:
                want = item['accept'] or item['messages'][-1]['content']
                print(f'{"right" if hit else "WRONG"}: {text!r}, want {want!r}')

        rows += [[run.name, kind, len(hits), *percent(hits)] for kind, hits in with_all(by_task)]
        say(f'{run.name}: canvases of {new} tokens, {rate:.0f} tokens/s, {n} forward passes')
    table(rows, ['checkpoint', 'task', 'questions', 'right %', '+-'], cfg.out)


# ----------------------------------------------------------------------------------------------------------
# lm-evaluation-harness: any of its tasks, by likelihood or by generation


class Harness:
    """What lm_eval asks of a model (its lm_eval.api.model.LM is mixed in below); requests are lm_eval's."""

    def __init__(self, run, cfg):
        super().__init__()
        self.run, self.cfg = run, cfg

    def loglikelihood(self, requests, disable_tqdm=False):
        """[(context, continuation)] -> [(log p, its bound, or confidence; is_greedy)].

        is_greedy, whether the model itself would write this, takes a forward pass per token: it is computed only
        where a document has one continuation (LAMBADA); with several, no metric uses it.
        """
        pairs, tok = [], self.run.tok
        for request in requests:
            context, continuation = request.args
            if self.cfg.instruct:
                before = self.conversation(context)
                pairs.append(([*before, *tok.encode(continuation)], len(before)))
            else:
                pairs.append(encode_pair(context, continuation, tok))

        documents = [(request.task_name, request.doc_id) for request in requests]
        many, scores = Counter(documents), score_pairs(self.run, pairs, self.cfg)
        return [(score, many[document] == 1 and self.greedy(*pair))
                for document, pair, score in zip(documents, pairs, scores)]

    def greedy(self, ids, n):
        """Whether the model, at temperature 0 and one token per step, writes ids[n:] after ids[:n]."""
        new, tok = len(ids) - n, self.run.tok
        context = tok.cut(ids[:n], self.run.model.config.seq_len - new)
        with self.run.autocast:
            (row,), _ = diffusion.complete(self.run.model, [context], new, tok)
        return row[len(context):] == ids[n:]

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """[(text,)] -> [log p or its bound], over windows of the model's context that do not overlap."""
        out, start = [], self.run.tok.start
        T = self.run.model.config.seq_len - len(start) - self.cfg.pad_eos
        for request in requests:
            ids = self.run.tok.encode(request.args[0])
            windows = [([*start, *ids[i:i + T]], len(start)) for i in range(0, len(ids), T)]
            out.append(sum(score_pairs(self.run, windows, self.cfg)))
        return out

    def generate_until(self, requests, disable_tqdm=False):
        """[(context, see wishes)] -> [text up to a stop string]; a long context is cut at its beginning."""
        run, T, block = self.run, self.run.model.config.seq_len, self.cfg.block_length or 1
        asked = defaultdict(dict)                      # (length, stop strings, temperature) -> number: prompt
        for number, request in enumerate(requests):
            context, wish = request.args
            want, until, temperature = self.wishes(**wish)
            new = max(block, min(want, T // 2) // block * block)
            ids = [*run.tok.start, *run.tok.encode(context)]
            if self.cfg.instruct:
                ids = self.conversation(context)

            kept = run.tok.cut(ids, T - new)
            if len(kept) + new > T:
                raise Refused(f'block_length {block} leaves no room for a prompt in a context of {T} tokens')
            if new < want or kept != ids:
                say(f'a context of {T} tokens: {new} of {want} will be written, and {len(ids) - len(kept)} of the '
                    'prompt are left out')
            asked[new, until, temperature][number] = kept

        out = [''] * len(requests)
        for (new, until, temperature), prompts in asked.items():
            stop = [*until, *self.cfg.stop]
            cfg = SimpleNamespace(**{**vars(self.cfg), 'stop': stop, 'temperature': temperature})
            rows, _ = answers(run, list(prompts.values()), new, cfg)
            for number, row in zip(prompts, rows):
                out[number] = run.tok.answer(row, stop)
        return out

    def wishes(self, until=(), do_sample=False, temperature=1.0, top_p=1.0, top_k=0, **lengths):
        """What a task asks of generation -> (tokens, stop strings, temperature), or Refused."""
        unknown = lengths.keys() - {'max_gen_toks', 'max_new_tokens', 'max_tokens'}
        if unknown or do_sample and (top_p != 1 or top_k):
            raise Refused(f'a task asks for what no sampler here has: {sorted(unknown) or "top_p, top_k"}')
        until = [until] if isinstance(until, str) else until or ()
        until = tuple(filter(None, until))                  # an empty one would end every answer at once
        want = self.cfg.gen_length or max(lengths.values(), default=256)
        return want, until, float(temperature) if do_sample else self.cfg.temperature

    def conversation(self, context):
        """Ids of messages as apply_chat_template has left them; any other context is a user's."""
        try:
            messages = json.loads(context)
        except ValueError:
            messages = [{'role': 'user', 'content': context}]
        if not isinstance(messages, list) or not context:
            messages = []
        return self.run.tok.encode_begun(messages)

    @property
    def tokenizer_name(self):
        return self.run.tok.spec.replace('/', '__')

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        """The messages as they are: `conversation` makes ids of them, as template tokens are not text."""
        return json.dumps(chat_history)


def harness(run, cfg):
    """A run as an lm_eval.api.model.LM."""
    from lm_eval.api.model import LM
    return type('NanoLLaDA', (Harness, LM), {})(run, cfg)


def lm_eval(cfg):
    """Tasks of lm-evaluation-harness; the papers' settings for them are config/eval_*.py."""
    if not cfg.tasks:
        raise Refused('lm_eval needs --tasks=NAME, or a file such as config/eval_llada_base.py')
    rows, manager = [], task_manager(cfg.tasks)
    for name in cfg.checkpoints:
        lm = harness(load(name, cfg), cfg)
        for task in cfg.tasks:
            rows += [[name, *row] for row in results_of(lm, task, manager, cfg)]
    table(rows, ['checkpoint', 'task', 'metric', 'value', '+-'], cfg.out)


def task_manager(tasks):
    """lm_eval's index of tasks, with those of our .yaml files; unknown tasks are refused."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise Refused(f'this task needs one more package: pip install lm_eval ({error})') from None

    files = [task.partition(':')[0] for task in tasks]
    folders = {str(Path(file).parent) for file in files if file.endswith('.yaml')}
    manager = TaskManager(include_path=sorted(folders) or None)
    unknown = [file for file in files if task_name(file) not in manager.all_tasks]
    refuse([f'tasks: lm_eval knows no {file!r}' for file in unknown])
    return manager


def task_name(file):
    """What lm_eval calls a task, given by its name or as a .yaml file."""
    return Path(file).name.removesuffix('.yaml')


def results_of(lm, task, manager, cfg):
    """One task, with an optional :N for N-shot prompts -> rows [task, metric, value, standard error]."""
    import lm_eval

    name, _, shots = task.partition(':')
    result = lm_eval.simple_evaluate(
        model=lm, tasks=[task_name(name)], task_manager=manager,
        num_fewshot=int(shots) if shots else None, limit=cfg.limit or None,
        apply_chat_template=cfg.instruct, fewshot_as_multiturn=cfg.instruct,
        random_seed=cfg.seed, bootstrap_iters=100, confirm_run_unsafe_code=cfg.unsafe_code)

    rows = []
    for entry, numbers in result['results'].items():
        for key, value in numbers.items():
            if isinstance(value, float) and '_stderr' not in key:
                error = numbers.get(key.replace(',', '_stderr,'), '')
                rows.append([entry, key.removesuffix(',none'), f'{value:.4f}', str(error)])
    return rows


TASKS = {f.__name__: f for f in (bound, exact, choice, lm_eval)}


def main(config):
    cfg = SimpleNamespace(**config)
    check(cfg)
    for name in cfg.checkpoints:
        weights_in(name)                            # refuses a missing one before the first is measured
    TASKS[cfg.task](cfg)


if __name__ == '__main__':
    command(main, globals(), positional=('task', 'checkpoints'))
