"""Write text with a trained or released model: continue it, fill gaps, answer, chat, and watch the canvas.

    python sample.py out/docs                                       # three samples without a prompt
    python sample.py out/docs --prompt="The function returns"       # continue (repeat --prompt for more)
    python sample.py out/docs --prompt="If the file ___ exist" --show
    python sample.py out/docs --prompt_file=prompts.txt --out=out/answers.jsonl
    python sample.py LLaDA-8B-Instruct config/sample_llada.py --chat

A ___ in a prompt is a gap. It is filled with both sides in view, which no left-to-right model can do.

Low-confidence remasking commits the most probable tokens first. Over a whole canvas without a prompt, a small
model then writes one phrase again and again, so give it a prompt and small blocks (--block_length=8).
"""

import json
import re
import sys
import time
from collections import namedtuple
from dataclasses import fields
from itertools import count, groupby

import torch
from tqdm import tqdm

import configurator
import data
import diffusion
from configurator import UserError, say
from model import open_model

# --- what to write
checkpoint = 'out/docs'         # a run of train.py, one of its checkpoints, or a folder of released weights
prompt = []                     # text to continue, or with ___ to fill in (repeat for more); none = samples
prompt_file = ''                # more prompts: a .txt (one per line), or a .jsonl (prompt, messages or ids)
instruct = False                # if True, a prompt is what the user says in a chat
chat = False                    # talk: /reset forgets, /quit or Ctrl-D leaves, Ctrl-C interrupts an answer
num_samples = 0                 # how many samples of each prompt; 0 = one, or three if there is no prompt
gen_length = 0                  # tokens to append; 0 = what the context leaves, at most 64 (in a chat 128)
gap_length = 3                  # tokens in each ___ (tests/lab/hooks.py looks for the best length)
stop = []                       # an answer ends before this text (repeat for more)
# --- sampler
steps = 0                       # denoising steps (variable_length: of each block); 0 = one token per step
block_length = 0                # finish blocks of this many tokens from left to right; 0 = one block
variable_length = False         # if True, append blocks one by one until the end is written (iLLaDA)
remasking = 'auto'              # 'random', 'low_confidence'; 'auto' = low_confidence to answer, else random
                                # Random draws from the model, low_confidence seeks the most probable text.
                                # Answers are what is written with chat or instruct, by released weights, and
                                # by models that were trained on examples (masking = 'response').
temperature = -1.0              # of the guesses; 0 = the most probable token; -1 = 1 if random, else 0
cfg_scale = 0.0                 # classifier-free guidance away from the canvas without the prompt; 0 = none
logits_eos_inf = False          # if True, EOS is never written
confidence_eos_eot_inf = False  # if True, EOS and EoT are written last
threshold = 0.0                 # > 0: commit all guesses at least this probable (fast, inexact); 0 = off
cache = ''                      # 'prefix' or 'dual': reuse keys and values (fast, inexact); '' = no cache
seed = 1337                     # of the noise
# --- machine and output
batch_size = 8                  # prompts in one forward pass
out = ''                        # also write prompt, text, ids and settings to this new .jsonl
show = False                    # if True, draw the canvas after every step
device = 'auto'                 # 'cuda', 'mps' or 'cpu'; auto = the first that is available
dtype = 'auto'                  # 'bfloat16' or 'float32'; auto = released weights as they are stored
compile = False                 # torch.compile each block (half a minute; then up to twice as fast on a GPU)


# ----------------------------------------------------------------------------------------------------------
# A checkpoint, and prompts as ids

# start: the ids that a plain prompt begins with. masking: as in training, None for released weights.
Run = namedtuple('Run', 'name model meta tok start masking')


def load(name, cfg):
    """Open a checkpoint with the settings of a script -> Run."""
    model, meta = open_model(name, cfg.device, cfg.dtype, cfg.compile)
    tok = data.tokenizer_of(meta)
    masking = meta['settings'].get('masking')
    # in training an example begins with BOS, but a window begins anywhere in a text
    start = [tok.bos_id] if masking == 'response' else []
    return Run(name, model, meta, tok, start, masking)


def read_prompts(name):
    """Return the prompts in a file: each is a text, a list of messages, or a list of ids."""
    # all forms at once, because a file may mix texts, messages and ids
    prompts = []
    for _, found in data.read_records(name, prompts_in):
        prompts += filter(None, found)                      # without empty lines
    return prompts


def prompts_in(row):
    """Return the prompts in a row of a file. (data.py takes all of a .txt for one row.)"""
    if 'text' in row:
        return data.as_text(row['text']).splitlines()
    return [row.get('messages') or row.get('ids') or data.as_text(row.get('prompt'))]


def encode_prompt(prompt, run, cfg):
    """Turn a prompt (a text, messages, or ids) into ids, with gap_length masks for each ___ of a text."""
    tok = run.tok
    if prompt == '':
        raise UserError('the prompt is empty; leave it out to draw samples without a prompt')
    if isinstance(prompt, str) and cfg.instruct:
        prompt = [{'role': 'user', 'content': prompt}]

    ids = prompt
    if isinstance(prompt, str):
        # The blank before a gap belongs to what fills it, because in most vocabularies a word is one token
        # together with the blank before it.
        before, *others = re.split(' ?_{3,}', prompt)
        ids = run.start + tok.encode(before)
        for part in others:
            ids += [tok.mask_id] * cfg.gap_length
            ids += tok.encode(part)
    elif prompt and isinstance(prompt[0], dict):
        ids = tok.encode_chat(prompt)

    # an index outside the embedding would end in a long message from the GPU
    vocab_size = run.model.config.vocab_size
    if not all(0 <= i < vocab_size for i in ids):
        raise UserError(f'ids must lie in 0..{vocab_size - 1}, got {min(ids)}..{max(ids)}')
    return ids


def tokens_to_append(prompts, run, cfg):
    """Return how many tokens to append to prompts, 0 if they have gaps. UserError if they do not fit."""
    config = run.model.config
    gaps = [run.tok.mask_id in ids for ids in prompts]
    if any(gaps) and config.causal:
        raise UserError('an autoregressive model does not see what follows a gap, so it cannot fill a ___')
    if any(gaps) != all(gaps):
        raise UserError('prompts with a ___ are filled and the others continued, so they need a run each')

    # the longest prompt decides, because all share one canvas
    longest = max(map(len, prompts))
    room = max(1, config.seq_len - longest)
    # at most 64 unless asked for, because each token costs a forward pass over the whole canvas
    new = 0 if any(gaps) else cfg.gen_length or min(64, room)
    if longest + new > config.seq_len:
        raise UserError(f'the context holds {config.seq_len} tokens, but the longest prompt has {longest}, and {new} '
                        'are to be written; shorten the prompt or gen_length')
    return new


# ----------------------------------------------------------------------------------------------------------
# Ids in, ids out. evaluate.py gets its answers from here as well.


def sampling_params(cfg, new, answers=True):
    """Turn the settings of a script into diffusion.SamplingParams, for `new` tokens (0: gaps only).

    answers: what remasking 'auto' means. Raises UserError for invalid values and blocks that do not divide.
    """
    # a setting cannot be None, so 0 and '' stand for the defaults of SamplingParams
    values = {field.name: getattr(cfg, field.name) or field.default
              for field in fields(diffusion.SamplingParams)}
    if cfg.remasking == 'auto':
        values['remasking'] = 'low_confidence' if answers else 'random'
    if cfg.temperature == -1:
        values['temperature'] = 1.0 if values['remasking'] == 'random' else 0.0
    if new == 0:
        # gaps are anywhere, so there are no blocks from left to right
        values['block_length'] = None
    if cfg.variable_length and not 1 <= cfg.block_length <= new:
        raise UserError(f'variable_length fills no ___ and needs a block_length in 1..{new}, got {cfg.block_length}')

    try:
        params = diffusion.SamplingParams(**values)
        if not cfg.variable_length:
            # a dry run, because the sampler itself knows best whether blocks and steps divide
            diffusion.block_plan(torch.zeros(1, new), 0, None, params)
    except ValueError as error:
        raise UserError(error) from None
    return params


def generate_text(model, prompts, gen_length, tok, params,
                  *, seeds, batch_size=64, **options):
    """Append gen_length tokens to prompts, lists of ids, and fill their gaps -> lists of ids, n_forward.

    What is returned begins with the prompt. seeds: a tuple of integers for each prompt. Its noise depends on
    them alone, so a batch gets the same answers as single prompts. options: of generate_batch.
    """
    device = diffusion.device_of(model)
    # answers are put back in the order in which the prompts came
    written = list(prompts)
    n_forward = 0

    # Similar lengths come together, so that there is little padding. The answers do not depend on it.
    order = sorted(range(len(prompts)), key=lambda k: len(prompts[k]))
    starts = range(0, len(order), batch_size)
    for start in tqdm(starts, disable=len(starts) < 2 or None):
        # the numbers of the prompts in this batch
        batch = order[start:start + batch_size]
        rows = [prompts[k] for k in batch]
        noise = [diffusion.keyed_generator(*seeds[k], device=device) for k in batch]
        rows, n = generate_batch(model, rows, gen_length, tok, params, generator=noise, **options)
        n_forward += n
        for k, row in zip(batch, rows):
            written[k] = row
    return written, n_forward


def generate_batch(model, prompts, gen_length, tok, params,
                   *, variable_length=False, stop=(), **options):
    """Do what generate_text does, for prompts that form one batch.

    variable_length: append blocks until EOS, EoT or one of the texts `stop` is written. options: generator,
    adjust and on_step of diffusion.generate, of which a causal model takes only the generator.
    """
    # a head may have more rows than the vocabulary has tokens
    device = diffusion.device_of(model)
    never = [tok.mask_id, *tok.unused(model.config.vocab_size)]

    # 1) from left to right. The EOS that ends a text also begins the next one, as in training.
    if model.config.causal:
        rows = [[tok.eos_id, *ids] for ids in prompts]
        x, attention_mask, _ = diffusion.canvas(rows, 0, tok.mask_id, tok.eos_id, device)
        x, n = diffusion.ar_generate(
            model, x, gen_length, attention_mask=attention_mask, suppress=never,
            temperature=params.temperature, generator=options['generator'])
        return [ids + row[-gen_length:].tolist() for ids, row in zip(prompts, x)], n

    # 2) block after block, on a canvas that grows until every row has ended (what would be cut off has ended)
    options.update(eot_id=tok.eot_id, suppress=never)
    if variable_length:
        return diffusion.generate_variable_length(
            model, prompts, tok.mask_id, tok.eos_id, params, max_length=gen_length,
            stop=lambda ids: answer_text(ids, tok, stop) != tok.decode(ids), **options)

    # 3) on a canvas of given length. Padding is never attended to, so any token but [MASK] will do.
    x, attention_mask, _ = diffusion.canvas(prompts, gen_length, tok.mask_id, tok.eos_id, device)
    x, n = diffusion.generate(
        model, x, tok.mask_id, params, attention_mask=attention_mask, eos_id=tok.eos_id,
        until_end=gen_length > 0, **options)
    return [row[real].tolist() for row, real in zip(x, attention_mask)], n


def answer_text(ids, tok, stop=()):
    """Return the text of generated ids, up to the first EOS, EoT or stop text."""
    for end in (tok.eos_id, tok.eot_id):
        if end in ids:
            ids = ids[:ids.index(end)]
    text = tok.decode(ids)
    # whichever stop text comes first ends it
    for mark in filter(None, stop):
        text = text.partition(mark)[0]
    return text


# ----------------------------------------------------------------------------------------------------------
# The script


def screen(tok):
    """Return an on_step that draws the canvas after every step, on a terminal in place."""
    steps = count(1)

    def draw(x, committed):
        in_place = sys.stdout.isatty()
        text = f'{next(steps):4d} | '
        # The last row of a batch has no padding. Its tokens are decoded in runs, because half a character
        # cannot be shown.
        pairs = zip(x[-1].tolist(), committed[-1].tolist())
        for (hidden, new), group in groupby(pairs, lambda pair: (pair[0] == tok.mask_id, pair[1])):
            ids = [i for i, _ in group]
            piece = '░' * len(ids) if hidden else tok.decode(ids).replace('\n', '⏎')
            text += f'\x1b[1;32m{piece}\x1b[0m' if new and in_place else piece

        # on an empty screen, and a small model is too fast to watch
        print('\x1b[H\x1b[J' + text if in_place else text)
        time.sleep(0.05 * in_place)

    return draw


def write(run, prompts, new, cfg, first=0, answers=True, show=False):
    """Call generate_text with the settings of a script -> lists of ids. first: number of prompt 0."""
    params = sampling_params(cfg, new, answers)
    on_step = screen(run.tok) if show else None
    # the number of a prompt decides on its noise, whatever else is in its batch
    seeds = [(cfg.seed, first + k) for k in range(len(prompts))]
    started = time.perf_counter()
    rows, n_forward = generate_text(
        run.model, prompts, new, run.tok, params, seeds=seeds, batch_size=cfg.batch_size,
        variable_length=cfg.variable_length, stop=cfg.stop, on_step=on_step)

    # on stderr, so that stdout holds nothing but text
    seconds = time.perf_counter() - started
    say(f'{n_forward} forward passes in {seconds:.2f} s')
    return rows


def talk(run, cfg):
    """Chat on the terminal, until /quit or Ctrl-D."""
    # what has been said is kept here, and sent to the model anew with each question
    messages = []
    say('/reset forgets the conversation, /quit leaves')
    while True:
        try:
            text = input('> ').strip()
        except (EOFError, KeyboardInterrupt):
            return
        if text == '/quit':
            return

        if text == '/reset':
            messages = []
        elif text:
            # a question that fails, or whose answer is interrupted, is forgotten
            try:
                messages = reply([*messages, {'role': 'user', 'content': text}], run, cfg)
            except (UserError, KeyboardInterrupt) as error:
                say(str(error) or '(interrupted)')


def reply(messages, run, cfg):
    """Print an answer to the last of the messages -> the messages with the answer."""
    # there must be room for an answer, however long the conversation has become
    seq_len = run.model.config.seq_len
    cfg.gen_length = cfg.gen_length or min(128, seq_len // 2)
    ids = run.tok.encode_chat(messages)
    while len(messages) > 1 and len(ids) + cfg.gen_length > seq_len:
        say('(the context is full, so the oldest turn is dropped)')
        messages = messages[2:]
        ids = run.tok.encode_chat(messages)

    new = tokens_to_append([ids], run, cfg)
    row, = write(run, [ids], new, cfg, show=cfg.show)
    answer = answer_text(row[len(ids):], run.tok, cfg.stop).strip()
    print(answer)
    return [*messages, {'role': 'assistant', 'content': answer}]


def main(cfg):
    run = load(cfg.checkpoint, cfg)
    if cfg.chat:
        talk(run, cfg)
        return

    given = cfg.prompt
    if cfg.prompt_file:
        given = given + read_prompts(cfg.prompt_file)
    num_samples = cfg.num_samples or (1 if given else 3)
    given = (given or [run.start]) * num_samples
    prompts = [encode_prompt(prompt, run, cfg) for prompt in given]
    new = tokens_to_append(prompts, run, cfg)
    if run.model.config.causal:
        say('an autoregressive model writes from left to right: of the sampler only the temperature counts')
    answers = cfg.instruct or run.masking != 'unified'

    if cfg.out:
        open(cfg.out, 'x').close()                          # fails if there is such a file
    # in batches, so that an answer is on the screen and in the file before the next ones are written
    for i in range(0, len(prompts), cfg.batch_size):
        part = prompts[i:i + cfg.batch_size]
        rows = write(run, part, new, cfg, first=i, answers=answers, show=cfg.show)
        for prompt, ids, row in zip(given[i:], part, rows):
            # of a conversation only the answer is shown, of a text all of it
            text = answer_text(row[len(ids):], run.tok, cfg.stop)
            if isinstance(prompt, str) and not cfg.instruct:
                # (an EOS in a gap ends nothing, so it is skipped)
                text = run.tok.decode(row[:len(ids)], skip_special_tokens=True) + text
            print('-' * 80 + '\n' + text)

            # opened for each line, so that an interrupted run keeps the ones before
            if cfg.out:
                line = {'prompt': prompt, 'text': text, 'ids': row, 'settings': vars(cfg)}
                with open(cfg.out, 'a', encoding='utf-8') as file:
                    print(json.dumps(line, ensure_ascii=False), file=file)


if __name__ == '__main__':
    configurator.run(main, globals(), positional=('checkpoint',))
