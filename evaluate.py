"""Measure checkpoints, each number with its standard error.

    python evaluate.py bound out/docs out/docs_ar               # held-out text, side by side
    python evaluate.py exact out/sft_toy                        # held-out questions, answered word for word
    python evaluate.py choice out/docs --input=questions.jsonl --method=confidence
    python evaluate.py lm_eval LLaDA-8B-Base config/eval/llada_base.py      # pip install lm_eval

bound: nats per token and bits per byte. For a diffusion model this is an upper bound on its cross-entropy
(Eq. 6 of LLaDA, arXiv 2502.09992v3), written <=. For an autoregressive model it is exact, written =. Do not
read the two as the same kind of number. The experiments of the papers are in tests/lab/experiments.py.
"""

import csv
import json
import re
from collections import Counter, defaultdict
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm import tqdm

import configurator
import data
import diffusion
import sample
from configurator import UserError, say
from model import newest_checkpoint

task = 'bound'                  # bound, exact, choice or lm_eval
checkpoints = []                # runs of train.py, their checkpoints, or folders of released weights
dataset = ''                    # a data set; '' = the one that the first checkpoint was trained on
input = []                      # files of questions or choices (repeat, or patterns)
                                # Without any, exact asks what the data set of the model holds out.
windows = 0                     # windows or examples (bound), evenly spaced; 0 = all
limit = 0                       # questions, evenly spaced (lm_eval: the first ones); 0 = all
# --- likelihood
seq_len = 0                     # tokens in a window (bound); 0 = the shortest context among the checkpoints
draws = 16                      # masks for each window (bound)
mc_num = 128                    # masks for each choice (choice, lm_eval): Eq. 6
method = 'likelihood'           # of choice and lm_eval: 'likelihood' (Eq. 6) or 'confidence' (iLLaDA)
add_bos = False                 # if True, plain prompts begin with BOS (iLLaDA)
                                # Those of a model that was trained with masking = 'response' always do.
pad_eos = False                 # if True, a visible EOS follows what is scored, but is not scored (iLLaDA)
# --- sampler, as in sample.py
gen_length = 0                  # tokens for an answer; 0 = what the context leaves, at most 64
steps = 0                       # denoising steps (of one block with variable_length); 0 = one token per step
block_length = 0                # 0 = the whole canvas is one block
variable_length = False         # if True, append blocks one by one
remasking = 'low_confidence'    # or 'random'
temperature = 0.0               # of the guesses
cfg_scale = 0.0                 # classifier-free guidance; likelihoods are guided as well
logits_eos_inf = False          # if True, EOS is never written
confidence_eos_eot_inf = False  # if True, EOS and EoT are written last
threshold = 0.0                 # > 0: commit all guesses at least this probable; 0 = off
cache = ''                      # 'prefix' or 'dual'; '' = no cache
instruct = False                # if True, put questions into the chat template
extract = ''                    # exact: a regular expression; its last match in answer and output is compared
stop = []                       # exact, lm_eval: an answer ends before these texts
# --- lm_eval
tasks = []                      # its tasks or .yaml files, each with an optional :N for N-shot prompts
unsafe_code = False             # if True, tasks may run what the model wrote (HumanEval): in a sandbox only
# --- machine and output
batch_size = 64                 # rows in one forward pass
seed = 1                        # of masks and samples
device = 'auto'                 # 'cuda', 'mps' or 'cpu'
dtype = 'auto'                  # 'bfloat16' or 'float32'
compile = False                 # torch.compile each block
out = ''                        # also write the table to this .csv
show = 0                        # how many of the answers to print (exact)


# ----------------------------------------------------------------------------------------------------------
# Checkpoints, rows of files, tables


def load(name, cfg):
    """Open a checkpoint -> sample.Run."""
    run = sample.load(name, cfg)
    # a chat template has a beginning of its own
    if cfg.instruct:
        run = run._replace(start=[])
    elif cfg.add_bos:
        run = run._replace(start=[run.tok.bos_id])
    return run


def dataset_of(runs, cfg):
    """Open the data set that checkpoints are measured on. UserError if its tokenizer is not theirs."""
    name = cfg.dataset or runs[0].meta['settings'].get('dataset')
    if not name:
        raise UserError('released weights do not say what they were trained on; give --dataset')

    # ids of another tokenizer would give a number, and it would mean nothing
    dataset = data.open_dataset(name)
    tok = dataset.parts[0].tokenizer()
    for run in runs:
        data.check_same(run.tok, tok, run.name, name)
    return dataset


def read_items(files, accept, cfg):
    """Read the rows of files as accept(row) makes them, `limit` of them, evenly spaced -> list of dicts."""
    # the name of the file stays with each row, because results are told apart by it
    items = []
    for path in data.files_of(','.join(files)):
        for _, item in data.read_records(path, accept):
            if item:
                items.append(item | {'file': Path(path).stem})
    if not items:
        raise UserError('no questions; give --input=FILE')
    return [items[i] for i in data.evenly_spaced(len(items), cfg.limit)]


def percent(hits):
    """Return the mean of booleans and its standard error, in per cent, as texts."""
    numbers = diffusion.mean_and_error(100 * torch.tensor(hits).double())
    return [f'{number:.1f}' for number in numbers]


SHARES = ['checkpoint', 'task', 'questions', 'right %', '+-']


def shares(name, labels, hits):
    """Return a row with the columns SHARES for each label, and one for all: the share of hits among them."""
    # in the order in which the labels come
    groups = defaultdict(list)
    for label, hit in zip(labels, hits):
        groups[label].append(hit)
    if len(groups) > 1:
        groups['all'] = hits
    return [[name, label, len(group), *percent(group)] for label, group in groups.items()]


def table(rows, columns, out=''):
    """Print rows of cells under the names of their columns, and write them to the file `out` as well."""
    # a column is as wide as its widest cell
    lines = [columns, *rows]
    widths = [max(map(len, map(str, cells))) for cells in zip(*lines)]
    for line in lines:
        print('  '.join(str(cell).ljust(width) for cell, width in zip(line, widths)))
    if out:
        with open(out, 'w', newline='', encoding='utf-8') as file:
            csv.writer(file).writerows(lines)


# ----------------------------------------------------------------------------------------------------------
# Likelihood of held-out text


def score_row(run, x0, maskable, cfg, n_masks, key):
    """Call diffusion.score_row with the settings of a script -> float."""
    # masks depend on the key alone, so all models get the same
    return diffusion.score_row(
        run.model, x0, maskable, run.tok.mask_id, run.tok.eos_id, key=(cfg.seed, *key),
        cfg_scale=cfg.cfg_scale, mc_num=n_masks, batch_size=cfg.batch_size)


def bound(cfg):
    """Print nats per token and bits per byte of held-out text."""
    runs = [load(name, cfg) for name in cfg.checkpoints]
    # windows of text, or the responses of examples if all models were trained on these
    on_examples = all(run.masking == 'response' for run in runs)
    masking = 'response' if on_examples else 'unified'
    # all see the same windows, so these must fit into the shortest context
    seq_len = cfg.seq_len or min(run.model.config.seq_len for run in runs)
    source = data.open_source(dataset_of(runs, cfg), 'val', masking, runs[0].tok, seq_len)
    rows, n_bytes = source.held_out(cfg.windows)
    say(f'{len(rows)} rows, {cfg.draws} masks each')

    lines = []
    scores = []
    for run in runs:
        logp = []
        for i, (x0, maskable) in enumerate(tqdm(rows, run.name, disable=None)):
            logp.append(score_row(run, x0, maskable, cfg, cfg.draws, key=(i,)))
        logp = torch.tensor(logp, dtype=torch.float64)
        scores.append(logp)

        # The difference on the same windows and masks is far more precise than either number, because what
        # makes a window hard makes it hard for both.
        numbers = diffusion.nats_and_bits(logp, rows, n_bytes)
        numbers += diffusion.nats_and_bits(logp - scores[0], rows, n_bytes)[2:]
        numbers = [f'{number:.4f}' for number in numbers]
        sign = '=' if run.model.config.causal else '<='
        lines.append([run.name, run.meta['iteration'] or '', sign, *numbers])

    # the difference is shown only if there is something to differ from
    columns = ['checkpoint', 'iteration', '', 'nats/token', '+-', 'bits/byte', '+-']
    if len(runs) > 1:
        columns += ['above the first', '+-']
    table([line[:len(columns)] for line in lines], columns, cfg.out)


# ----------------------------------------------------------------------------------------------------------
# Multiple choice: which continuation is likelier?


def as_choice(row):
    """Return {"question" or "context", "choices", "answer"} as context, choices, number of the right one."""
    # a question gets the usual form, and a context is taken as it is
    context = row.get('context')
    if context is None:
        context = f"Question: {row['question']}\nAnswer:"
    choices = row['choices']
    answer = row['answer']
    # the answer may be one of the choices, or its number from 0
    if answer in choices:
        answer = choices.index(answer)
    if answer not in range(len(choices)):
        raise ValueError(f'the answer {answer!r} is none of the {len(choices)} choices')
    return {'context': context, 'choices': choices, 'answer': answer}


def encode_pair(context, continuation, run):
    """Encode two texts as one -> ids of the first, ids of the second, which gets the blanks in between."""
    # as one text, because that is how the model has seen text
    ids = run.tok.encode(context + continuation)
    alone = run.tok.encode(context.rstrip())
    n = min(len(alone), len(ids) - 1)
    # a token that reaches over the border belongs to the second
    while alone[:n] != ids[:n]:
        n -= 1
    return ids[:n], ids[n:]


def score(run, before, after, cfg):
    """Score ids `after` as a continuation of ids `before` -> float: log p, its bound, or confidence."""
    device = diffusion.device_of(run.model)
    # a visible EOS tells the model that the text is complete (iLLaDA)
    end = [run.tok.eos_id] * cfg.pad_eos
    room = run.model.config.seq_len - len(run.start) - len(after) - len(end)
    if room < 0:
        raise UserError(f'{len(after)} tokens to score are more than the context of {run.name} holds')
    # what does not fit is the beginning, which matters least
    context = run.start + before[max(0, len(before) - room):]

    # only the continuation is maskable: its score is conditioned on all the rest
    x0 = torch.tensor(context + after + end, device=device)
    maskable = torch.zeros_like(x0, dtype=torch.bool)
    maskable[len(context):len(context) + len(after)] = True
    if cfg.method == 'confidence' and not run.model.config.causal:
        return diffusion.confidence_score(
            run.model, x0, maskable, run.tok.mask_id, cfg_scale=cfg.cfg_scale)

    # the choices of a question share their masks, so they differ by what they say and not by luck
    return score_row(run, x0, maskable, cfg, cfg.mc_num, before)


def choice(cfg):
    """Print accuracy on multiple choice, by score (acc) and by score per byte (acc_norm)."""
    items = read_items(cfg.input, as_choice, cfg)
    rows = []
    for name in cfg.checkpoints:
        run = load(name, cfg)
        plain = []
        per_byte = []
        for item in tqdm(items, name, disable=None):
            space = ' ' if item['context'] else ''
            pairs = [encode_pair(item['context'], space + text, run) for text in item['choices']]
            scores = [score(run, *pair, cfg) for pair in pairs]

            # a long choice is less likely just because it is long; of equal scores the first counts
            relative = [number / len(text.encode()) for number, text in zip(scores, item['choices'])]
            plain.append(scores.index(max(scores)) == item['answer'])
            per_byte.append(relative.index(max(relative)) == item['answer'])

        files = [item['file'] for item in items]
        rows += shares(f'{name}, acc', files, plain)
        rows += shares(f'{name}, acc_norm', files, per_byte)
    table(rows, SHARES, cfg.out)


# ----------------------------------------------------------------------------------------------------------
# Answers that can be checked


def as_question(row):
    """Return a record of data.py, {} without an answer. "accept" may be a regular expression for it."""
    record = data.as_record(row)
    return {'accept': '', 'task': '', **record} if 'messages' in record else {}


def value(text):
    """Return the number that a text says, or the text itself.

    >>> value('$1,080.00'), value('1080.'), value('1/2')
    (1080.0, 1080.0, '1/2')
    """
    # people write a minus sign in many ways, and a currency behind it; <5 and 5½ are other numbers than 5
    text = re.sub('[−–—‐‑﹣－]', '-', text.strip())
    text = re.sub('-[\\s$€£]+', '-', text)
    number = re.fullmatch(r'[^\w.<>≤≥-]*(-?[\d,]*\.?\d+)[^\d½⅓⅔¼¾]*', text)
    return float(number[1].replace(',', '')) if number else text


def right(text, item, extract=''):
    """Tell whether an answer is right: as "accept" says, by the last match of `extract`, or word for word."""
    # a base model may go on with a question of its own
    text = text.split('\nQuestion:')[0].strip()
    wanted = item['messages'][-1]['content'].strip()
    if item['accept']:
        return bool(re.fullmatch(item['accept'], text))
    if not extract:
        return text == wanted

    # "$18" and "18" are the same answer
    found = re.findall(extract, text.replace('$', ''))
    wanted = re.findall(extract, wanted.replace('$', ''))
    if not wanted:
        raise UserError(f'extract: {extract!r} finds nothing in a right answer')
    return bool(found) and value(found[-1]) == value(wanted[-1])


def questions_of(run, cfg):
    """Return questions and their prompts (ids), from cfg.input or what the data set of a run holds out."""
    files = cfg.input
    if not files:
        folder = dataset_of([run], cfg).parts[0].folder
        files = sorted(map(str, folder.glob('val_*.jsonl')))
    items = read_items(files, as_question, cfg)

    # A model that was trained on conversations gets one. Otherwise a question has the form that is usual for
    # base models.
    prompts = []
    chat = cfg.instruct or not cfg.input or run.masking == 'response'
    for item in items:
        *history, _ = item['messages']
        if chat or len(history) > 1:
            prompts.append(run.tok.encode_chat(history))
        else:
            text = f"Question: {history[0]['content']}\nAnswer:"
            prompts.append(run.start + run.tok.encode(text))
    return items, prompts


def answers(run, prompts, cfg):
    """Return the texts that a run writes after prompts, lists of ids."""
    # all at once, because generate_text puts prompts of similar length into a batch
    new = sample.tokens_to_append(prompts, run, cfg)
    rows = sample.write(run, prompts, new, cfg)
    return [sample.answer_text(row[len(ids):], run.tok, cfg.stop) for ids, row in zip(prompts, rows)]


def exact(cfg):
    """Print the share of questions that are answered right, by the "task" that a question may have."""
    rows = []
    for name in cfg.checkpoints:
        run = load(name, cfg)
        items, prompts = questions_of(run, cfg)
        # right or wrong, and the first few to look at
        hits = []
        for item, text in zip(items, answers(run, prompts, cfg)):
            hit = right(text, item, cfg.extract)
            if len(hits) < cfg.show:
                wanted = item['messages'][-1]['content']
                print(f'{"right" if hit else "WRONG"}: {text!r}, expected {wanted!r}')
            hits.append(hit)
        rows += shares(name, [item['task'] for item in items], hits)
    table(rows, SHARES, cfg.out)


# ----------------------------------------------------------------------------------------------------------
# lm-evaluation-harness: any of its tasks, by likelihood or by generation


class Harness:
    """Answer the requests of lm_eval. Its class LM is mixed in below, because few have it installed."""

    # a key of its cache, which is not used here
    tokenizer_name = 'nanollada'

    def __init__(self, run, cfg):
        super().__init__()
        self.run = run
        self.cfg = cfg

    def loglikelihood(self, requests, disable_tqdm=False):
        """Score [(context, continuation)] -> [(score, is_greedy)].

        is_greedy: would the model itself write this? That takes a forward pass per token, so it is computed
        only if a document has a single continuation, as in LAMBADA. Otherwise it is False, because the
        accuracy of multiple choice does not need it.
        """
        run = self.run
        n_continuations = Counter((request.task_name, request.doc_id) for request in requests)
        results = []
        for request in tqdm(requests, run.name, disable=None):
            context, continuation = request.args
            # both are encoded as one text, unless a chat template stands between them
            if self.cfg.instruct:
                before = self.encode(context)
                after = run.tok.encode(continuation)
            else:
                before, after = encode_pair(context, continuation, run)

            rows = []
            prompt = run.start + before
            if n_continuations[request.task_name, request.doc_id] == 1:
                rows, _ = sample.generate_text(
                    run.model, [prompt], len(after), run.tok, diffusion.SamplingParams(), seeds=[(0,)])
            results.append((score(run, before, after, self.cfg), rows == [prompt + after]))
        return results

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """Refuse to score whole texts, because lm_eval would print a bound as if it were a perplexity."""
        raise UserError('lm_eval would call a bound a perplexity; use the task `bound` of evaluate.py instead')

    def generate_until(self, requests, disable_tqdm=False):
        """Continue [(context, generation arguments)] -> [text up to a stop string]."""
        # requests of a task come together, and all of them have the same arguments
        results = []
        for arguments, group in groupby(requests, lambda request: request.args[1]):
            cfg = self.sampler(**arguments)
            # a prompt that is too long loses its beginning, but not BOS
            start = self.run.start
            room = self.run.model.config.seq_len - cfg.gen_length - len(start)
            prompts = [start + self.encode(request.args[0])[-room:] for request in group]
            results += answers(self.run, prompts, cfg)
        return results

    def sampler(self, until=(), do_sample=False, temperature=0.0, max_gen_toks=256, num_beams=1, **unknown):
        """Return the settings with the generation arguments of a task. Our gen_length, if set, overrides."""
        if unknown or num_beams > 1:
            raise UserError(f'a task asks the sampler for {sorted(unknown) or "num_beams"}, which it does not have')
        cfg = SimpleNamespace(**vars(self.cfg))
        cfg.stop = [*cfg.stop, *([until] if isinstance(until, str) else until)]
        # half of a small context at most, so that there is room for a prompt
        cfg.gen_length = cfg.gen_length or min(max_gen_toks, self.run.model.config.seq_len // 2)
        if do_sample:
            cfg.temperature = temperature
        return cfg

    def encode(self, context):
        """Return the ids of a prompt, which may be messages from apply_chat_template."""
        if self.cfg.instruct:
            return self.run.tok.encode_chat(json.loads(context))
        return self.run.tok.encode(context)

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        """Return messages for `encode`, because the special tokens of a template are no text."""
        return json.dumps(chat_history)


def lm_eval(cfg):
    """Print lm_eval's own tables for its tasks. The settings of the papers are in config/eval/."""
    try:
        from lm_eval import simple_evaluate
        from lm_eval.api.model import LM
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import make_table
    except ImportError:
        raise UserError('this task needs one more package: pip install lm_eval') from None

    # a task may be a .yaml file of your own, which lm_eval finds by its folder
    if not cfg.tasks:
        raise UserError('lm_eval needs --tasks=NAME, or a file such as config/eval/llada_base.py')
    folders = {str(Path(task).parent) for task in cfg.tasks if '.yaml' in task}
    manager = TaskManager(include_path=sorted(folders) or None)
    for name in cfg.checkpoints:
        model = type('NanoLLaDA', (Harness, LM), {})(load(name, cfg), cfg)
        for task in cfg.tasks:
            # gsm8k:4 puts four solved examples before each question
            file, _, shots = task.partition(':')
            results = simple_evaluate(
                model, tasks=[Path(file).name.removesuffix('.yaml')], task_manager=manager,
                num_fewshot=int(shots) if shots else None, limit=cfg.limit or None,
                apply_chat_template=cfg.instruct, fewshot_as_multiturn=cfg.instruct,
                random_seed=cfg.seed, confirm_run_unsafe_code=cfg.unsafe_code)
            print(name)
            print(make_table(results))


# ----------------------------------------------------------------------------------------------------------

TASKS = {f.__name__: f for f in (bound, exact, choice, lm_eval)}
ALLOWED = {'task': TASKS, 'method': ('likelihood', 'confidence')}


def main(cfg):
    if not cfg.checkpoints:
        raise UserError('name at least one checkpoint:  python evaluate.py bound out/docs')
    # a missing checkpoint is found now, and not after the others have been measured
    for name in cfg.checkpoints:
        newest_checkpoint(name)
    TASKS[cfg.task](cfg)


if __name__ == '__main__':
    configurator.run(main, globals(), positional=('task', 'checkpoints'))
