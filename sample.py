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
from dataclasses import fields, replace
from itertools import count, groupby, takewhile
from pathlib import Path

import torch
from tqdm import tqdm

import data
import diffusion
from configurator import UserError, run, say
from model import open_model

# --- what to write
checkpoint = 'out/docs'         # a run of train.py, one of its checkpoints, or a folder of released weights
prompt = []                     # text to continue, or with ___ to fill in (repeat for more); none = samples
prompt_file = ''                # more prompts: .txt (a line each), .jsonl ("prompt", "messages" or "ids"), - = stdin
instruct = False                # if True, a prompt is what the user says in a chat
chat = False                    # talk: /reset forgets, /quit or Ctrl-D leaves, Ctrl-C interrupts an answer
num_samples = 3                 # how many samples, if there is no prompt
gen_length = 0                  # tokens to append; 0 = what the context leaves, at most 64 (in a chat 128)
gap_length = 3                  # tokens in each ___ (tests/lab/hooks.py looks for the best length)
stop = []                       # an answer ends before this text (repeat for more)
# --- sampler
steps = 0                       # denoising steps (variable_length: of each block); 0 = one token per step
block_length = 0                # finish blocks of this many tokens from left to right; 0 = one block
variable_length = False         # if True, append blocks one by one until the end is written (iLLaDA)
remasking = 'auto'              # which guesses a step keeps: 'random' or 'low_confidence'; 'auto' = as it fits
                                # random draws from the model, low_confidence seeks the most probable text.
                                # auto is low_confidence for answers (chat, instruct, released weights, models
                                # trained on examples), and random for everything else.
temperature = -1.0              # of the guesses; 0 = the most probable token; -1 = 1 for random, else 0
cfg_scale = 0.0                 # classifier-free guidance away from the canvas without the prompt; 0 = none
logits_eos_inf = False          # if True, EOS is never written
confidence_eos_eot_inf = False  # if True, EOS and EoT are written last
threshold = 0.0                 # > 0: commit all guesses at least this probable (fast, inexact); 0 = off
cache = ''                      # 'prefix' or 'dual': reuse keys and values (fast, inexact); '' = no cache
seed = 1337                     # of the noise
# --- machine and output
batch_size = 8                  # prompts in one forward pass
out = ''                        # also write an object per prompt (prompt, text, ids, settings) to this new .jsonl
show = False                    # if True, draw the canvas after every step
device = 'auto'                 # 'cuda', 'mps' or 'cpu'; auto = the first that is available
dtype = 'auto'                  # 'bfloat16' or 'float32'; auto = released weights as they are stored
compile = False                 # torch.compile each block (half a minute; then up to twice as fast on a GPU)
mask_id = -1                    # id of [MASK]; -1 = what the weights or their tokenizer say


# ----------------------------------------------------------------------------------------------------------
# A checkpoint, and prompts as ids

Run = namedtuple('Run', 'name model meta tok start masking')


def load(name, cfg):
    """Open a checkpoint with the settings of a script -> Run.

    start: the ids that a plain prompt begins with. masking: as in training, None for released weights.
    """
    model, meta = open_model(name, cfg.device, cfg.dtype, cfg.compile)
    tok = data.tokenizer_of(meta, None if cfg.mask_id < 0 else cfg.mask_id)
    masking = (meta['settings'] or {}).get('masking')
    # in training an example begins with BOS, but a window begins anywhere in a text
    start = [tok.bos_id] if masking == 'response' else []
    return Run(name, model, meta, tok, start, masking)


def read_prompts(name):
    """Return the prompts in a file, or in stdin if it is called -: texts, lists of messages, or lists of ids."""
    if name.endswith('.jsonl'):
        return [prompt for _, prompt in data.read_records(name, as_prompt)]
    if name == '-':
        text = sys.stdin.read()
    else:
        text = '\n'.join(row['text'] for _, row in data.read_records(name, dict))
    return [line for line in text.splitlines() if line.strip()]


def as_prompt(row):
    """Return the prompt in an object of a .jsonl. Raises ValueError if there is none."""
    if 'messages' in row:
        return list(map(data.as_message, row['messages']))
    if 'ids' in row:
        return list(map(int, row['ids']))
    if 'prompt' in row:
        return data.as_text(row['prompt'])
    raise ValueError('expected "prompt", "messages" or "ids"')


def encode_prompt(prompt, run, gap_length=3, instruct=False):
    """Turn a prompt (a text, messages, or ids) into ids, with gap_length masks for each ___ of a text."""
    tok = run.tok
    if prompt == '':
        raise UserError('the prompt is empty; leave it out to draw samples')
    if isinstance(prompt, str) and instruct:
        prompt = [{'role': 'user', 'content': prompt}]

    ids = prompt
    if isinstance(prompt, str):
        # the blank before a gap belongs to what fills it
        before, *others = re.split(' ?_{3,}', prompt)
        ids = run.start + tok.encode(before)
        for part in others:
            ids += [tok.mask_id] * max(1, gap_length)
            ids += tok.encode(part)
    elif prompt and isinstance(prompt[0], dict):
        ids = tok.encode_chat(prompt)

    last_id = run.model.config.vocab_size - 1
    if ids and not 0 <= min(ids) <= max(ids) <= last_id:
        raise UserError(f'ids must lie in 0..{last_id}, got {min(ids)}..{max(ids)}')
    return ids


def tokens_to_append(prompts, run, cfg):
    """Return how many tokens to append to prompts, 0 if they have gaps. Raises UserError if the context is short."""
    config = run.model.config
    with_gaps = [ids for ids in prompts if run.tok.mask_id in ids]
    if with_gaps and config.causal:
        raise UserError('an autoregressive model does not see what follows a gap, so it cannot fill a ___')
    if with_gaps and len(with_gaps) < len(prompts):
        raise UserError('either all prompts have a ___, or none')

    longest = max(map(len, prompts))
    new = 0
    if not with_gaps:
        new = cfg.gen_length or max(1, min(64, config.seq_len - longest))
    if longest + new > config.seq_len:
        raise UserError(f'a prompt of {longest} tokens and {new} more exceed the context of {config.seq_len}; '
                        'shorten the prompt or gen_length')
    return new


# ----------------------------------------------------------------------------------------------------------
# Ids in, ids out. evaluate.py gets its answers from here as well.


def sampling_params(cfg, new, answers=True):
    """Turn the settings of a script into diffusion.SamplingParams, for `new` tokens. 0 and '' mean its defaults.

    answers: what remasking 'auto' means. Raises UserError for invalid values, and for blocks that do not divide.
    """
    values = {}
    for field in fields(diffusion.SamplingParams):
        values[field.name] = getattr(cfg, field.name) or field.default
    if cfg.remasking == 'auto':
        values['remasking'] = 'low_confidence' if answers else 'random'
    if cfg.temperature == -1:
        values['temperature'] = 1.0 if values['remasking'] == 'random' else 0.0
    if cfg.variable_length and not 1 <= cfg.block_length <= new:
        raise UserError(f'variable_length needs a block_length in 1..{new}, got {cfg.block_length}')

    try:
        params = diffusion.SamplingParams(**values)
        if not cfg.variable_length:
            # if blocks do not divide, the sampler complains now and not after an hour
            diffusion.block_plan(torch.zeros(1, new), 0, None, params)
    except ValueError as error:
        raise UserError(error) from None
    return params


def generate_text(model, prompts, gen_length, tok, params,
                  *, batch_size=64, seeds=None, **options):
    """Append gen_length tokens to prompts, or fill their gaps: lists of ids -> lists of ids, n_forward.

    The ids that are returned begin with the prompt. seeds: a tuple of integers for each prompt (default: its number).
    The noise of a prompt depends on it alone, so a batch writes what its prompts get one by one. options: of
    generate_batch.
    """
    device = diffusion.device_of(model)
    seeds = seeds or [(k,) for k in range(len(prompts))]
    written = list(prompts)
    n_forward = 0

    # similar lengths together, so that there is little padding
    order = sorted(range(len(prompts)), key=lambda k: len(prompts[k]))
    starts = range(0, len(order), batch_size)
    for start in tqdm(starts, 'generating', disable=len(starts) < 2 or None, leave=False):
        batch = order[start:start + batch_size]
        noise = [diffusion.keyed_generator(*seeds[k], device=device) for k in batch]
        rows, n = generate_batch(model, [prompts[k] for k in batch], gen_length, tok, params,
                                 generator=noise, **options)
        n_forward += n
        for k, row in zip(batch, rows):
            written[k] = row
    return written, n_forward


@torch.no_grad()
def generate_batch(model, prompts, gen_length, tok, params,
                   *, variable_length=False, stop=(), **options):
    """Do what generate_text does, for prompts that form one batch.

    variable_length: append blocks until EOS, EoT or one of the texts in `stop` is written. options: generator,
    adjust and on_step of diffusion.generate, of which a causal model takes only the generator.
    """
    device = diffusion.device_of(model)
    never = [tok.mask_id, *tok.unused(model.config.vocab_size)]

    # 1) from left to right. The EOS that ends a text also begins the next one, as in training.
    if model.config.causal:
        rows = [[tok.eos_id, *ids] for ids in prompts]
        x, attention_mask, _ = diffusion.canvas(rows, 0, tok.mask_id, tok.eos_id, device)
        x, n = diffusion.ar_generate(
            model, x, gen_length, attention_mask=attention_mask, eos_id=tok.eos_id, suppress=never,
            temperature=params.temperature, generator=options['generator'])
        return [ids + row[-gen_length:].tolist() for ids, row in zip(prompts, x)], n

    # 2) block after block, on a canvas that grows
    options.update(eot_id=tok.eot_id, suppress=never)
    if variable_length:
        return diffusion.generate_variable_length(
            model, prompts, tok.mask_id, tok.eos_id, params, max_length=gen_length,
            stop=lambda ids: answer_text(ids, tok, stop) != tok.decode(ids), **options)

    # 3) a canvas of given length. All gaps are one block, wherever they are.
    gaps = any(tok.mask_id in ids for ids in prompts)
    if gaps:
        params = replace(params, block_length=None)
        gen_length = 0
    # padding is never attended to, so it can be any token but [MASK]
    x, attention_mask, _ = diffusion.canvas(prompts, gen_length, tok.mask_id, tok.eos_id, device)
    x, n = diffusion.generate(
        model, x, tok.mask_id, params, attention_mask=attention_mask, eos_id=tok.eos_id,
        until_end=not gaps, **options)
    return [row[real].tolist() for row, real in zip(x, attention_mask)], n


def answer_text(ids, tok, stop=()):
    """Return the text of generated ids, up to the first EOS, EoT or stop text."""
    ends = (tok.eos_id, tok.eot_id)
    text = tok.decode(list(takewhile(lambda i: i not in ends, ids)))
    for mark in stop:
        text = text.partition(mark)[0]
    return text


# ----------------------------------------------------------------------------------------------------------
# The script


def screen(tok, n_steps):
    """Return an on_step that draws the canvas: on a terminal each step in place, else about ten lines."""
    every = max(1, n_steps // 8)
    steps = count()

    def draw(x, committed):
        step = next(steps)
        in_place = sys.stdout.isatty()
        text = f'{step + 1:4d} | '
        # The last row of a batch has no padding. Tokens are decoded in runs, because some characters are several.
        pairs = zip(x[-1].tolist(), committed[-1].tolist())
        for (hidden, new), run in groupby(pairs, lambda pair: (pair[0] == tok.mask_id, pair[1])):
            ids = [i for i, _ in run]
            piece = '░' * len(ids) if hidden else tok.decode(ids).replace('\n', '⏎')
            text += f'\x1b[1;32m{piece}\x1b[0m' if new and in_place else piece

        if in_place:
            print('\x1b[H\x1b[J' + text, flush=True)        # on an empty screen
            time.sleep(0.05)
        elif step % every == 0 or tok.mask_id not in x[-1]:
            print(text, flush=True)

    return draw


def write(run, prompts, new, params, cfg, first=0):
    """Call generate_text with the settings of this script, and say how fast it was. first: number of prompt 0."""
    on_step = screen(run.tok, cfg.steps or new) if cfg.show else None
    seeds = [(cfg.seed, first + k) for k in range(len(prompts))]
    started = time.perf_counter()
    rows, n_forward = generate_text(
        run.model, prompts, new, run.tok, params, batch_size=cfg.batch_size, seeds=seeds,
        variable_length=cfg.variable_length, stop=cfg.stop, on_step=on_step)

    seconds = time.perf_counter() - started
    n_tokens = sum(len(row) - len(ids) + ids.count(run.tok.mask_id) for ids, row in zip(prompts, rows))
    say(f'{n_tokens} tokens in {seconds:.2f} s, {n_tokens / seconds:.1f} tokens/s, {n_forward} forward passes')
    return rows


def talk(run, cfg):
    """Chat on the terminal, until /quit or Ctrl-D."""
    cfg.gen_length = cfg.gen_length or min(128, run.model.config.seq_len // 2)
    params = sampling_params(cfg, cfg.gen_length)
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
            try:
                messages = reply([*messages, {'role': 'user', 'content': text}], run, params, cfg)
            except (UserError, KeyboardInterrupt) as error:
                say(str(error) or '(interrupted)')


def reply(messages, run, params, cfg):
    """Answer the last of the messages on the terminal -> the messages, with the answer."""
    ids = run.tok.encode_chat(messages)
    while len(messages) > 1 and len(ids) + cfg.gen_length > run.model.config.seq_len:
        say('(the context is full, so the oldest turn is dropped)')
        messages = messages[2:]
        ids = run.tok.encode_chat(messages)

    new = tokens_to_append([ids], run, cfg)
    row, = write(run, [ids], new, params, cfg, first=len(messages))
    answer = answer_text(row[len(ids):], run.tok, cfg.stop).strip()
    print(answer, flush=True)
    return [*messages, {'role': 'assistant', 'content': answer}]


def main(cfg):
    if Path(cfg.out).is_file():
        raise UserError(f'{cfg.out} already exists, choose another name')
    run = load(cfg.checkpoint, cfg)
    if cfg.chat:
        talk(run, cfg)
        return

    given = cfg.prompt
    if cfg.prompt_file:
        given = given + read_prompts(cfg.prompt_file)
    if not given:
        given = [run.start] * cfg.num_samples
    prompts = [encode_prompt(prompt, run, cfg.gap_length, cfg.instruct) for prompt in given]
    new = tokens_to_append(prompts, run, cfg)
    params = sampling_params(cfg, new, answers=cfg.instruct or run.masking != 'unified')

    # in batches, so that an answer is on the screen and in the file before the next ones are written
    for i in range(0, len(prompts), cfg.batch_size):
        part = prompts[i:i + cfg.batch_size]
        rows = write(run, part, new, params, cfg, first=i)
        for prompt, ids, row in zip(given[i:], part, rows):
            text = answer_text(row[len(ids):], run.tok, cfg.stop)
            if isinstance(prompt, str) and not cfg.instruct:
                # an EOS in a gap ends nothing, so it is skipped
                text = run.tok.decode(row[:len(ids)], skip_special_tokens=True) + text
            print('-' * 80 + '\n' + text, flush=True)

            if cfg.out:
                line = {'prompt': prompt, 'text': text, 'ids': row, 'settings': vars(cfg)}
                with open(cfg.out, 'a', encoding='utf-8') as file:
                    print(json.dumps(line, ensure_ascii=False), file=file)


if __name__ == '__main__':
    run(main, globals(), positional=('checkpoint',))
