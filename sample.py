"""Writes text with a trained or released model: continues, fills gaps, answers, chats; shows how the canvas fills in.

    python sample.py out/docs                                       # three samples out of nothing
    python sample.py out/docs --prompt="The function returns"       # continues a prompt (repeat --prompt for a batch)
    python sample.py out/docs --prompt="If the file ___ exist" --show
    python sample.py out/docs --prompt_file=- --out=out/answers.jsonl < prompts.txt
    python sample.py LLaDA-8B-Instruct config/sample_llada.py --chat
    python sample.py out/docs --num_samples=1 --html=out/trace.html     # a page to scrub through the steps

A ___ in a prompt is a gap: gap_length masks, filled in sight of both sides, which no left-to-right model can do.
The default, random remasking at temperature 1, draws from the model. Low-confidence remasking commits the most
probable tokens first: it looks for the mode, and over a whole canvas with nothing given the mode of a small model is
one phrase again and again. So give it a prompt and small blocks. What LLaDA and iLLaDA use: README.md, "Settings".
"""

import json
import re
import shutil
import sys
import time
import unicodedata
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

from tqdm import tqdm

import data
import diffusion
from configurator import command, configure, user_errors
from model import open_model

# --- what to write
checkpoint = 'out/docs'         # a run or a step of train.py, or a folder of released weights
prompt = []                     # text to continue, or with ___ to fill in; none: unconditional samples
prompt_file = ''                # more prompts: .txt (one a line), .jsonl ("prompt", "messages" or "ids"), - is stdin
instruct = False                # put each prompt into the chat template as a user's message
chat = False                    # talk: /reset forgets, /quit or Ctrl-D leaves, Ctrl-C breaks off an answer
num_samples = 3                 # samples when there is no prompt
gen_length = 0                  # tokens to generate; 0: as many as fit into the context, at most 64
gap_length = 3                  # tokens in each ___
stop = []                       # text is cut before this string (repeat for more)
# --- sampler
steps = 0                       # denoising steps, with variable_length those of one block; 0: one token a step
block_length = 0                # finish blocks of this many tokens from left to right; 0: the whole canvas at once
variable_length = False         # blocks come into being one by one, until the end is written (iLLaDA)
remasking = 'random'            # which proposals survive a step: 'random' or 'low_confidence'
temperature = 1.0               # 0 takes the most probable token
cfg_scale = 0.0                 # classifier-free guidance away from the canvas without the prompt
logits_eos_inf = False          # EOS is never written
confidence_eos_eot_inf = False  # EOS and EoT are written last
threshold = 0.0                 # above 0, with low_confidence: commit every proposal this probable (approximate, fast)
cache = ''                      # 'prefix', 'dual' or 'roll': keep keys and values between steps (approximate, fast)
think_boost = 0.0               # above 0: make "</think>" likelier as the text grows (iLLaDA's evaluation: 100)
think_power = 3.0               # how late that sets in
seed = 1337                     # of the noise
# --- machine and output
batch_size = 8                  # prompts in one forward pass
out = ''                        # also write one JSON object per prompt to this new file: text, ids, settings
show = False                    # draw the canvas after every step
html = ''                       # write a new page to scrub through the steps of one prompt
device = 'auto'                 # 'cuda', 'mps' or 'cpu'
dtype = 'auto'                  # 'bfloat16' or 'float32'; auto: released weights as they are stored
mask_id = -1                    # id of [MASK] where neither the weights nor their tokenizer tell

GAP = '___'
HIDDEN = '\N{LIGHT SHADE}'      # how a mask looks


def clean(text):
    """Text that cannot move the cursor or change colours: control characters but newline and tab are dropped."""
    steer = {*range(0x202A, 0x202F), *range(0x2066, 0x206A)}                            # those that turn the direction
    return ''.join(c for c in text
                   if c in '\n\t' or unicodedata.category(c) not in ('Cc', 'Cs') and ord(c) not in steer)


def prompt_ids(text, tok, gap):
    """Ids of a prompt in which each ___ stands for `gap` masks; the space before a gap belongs to what fills it."""
    if not text.strip():
        raise ValueError('the prompt is empty (without any prompt, samples come out of nothing)')
    ids, parts = list(tok.start), text.split(GAP)
    for i, part in enumerate(parts):
        last = i == len(parts) - 1
        ids += tok.encode(part if last else part.removesuffix(' ')) + ([] if last else [tok.mask_id] * gap)
    return ids


def read_prompts(name):
    """The prompts of a file or of stdin, text lines or JSON with "prompt", "messages" or "ids": [(where, it)]."""
    path, found = Path(name), []
    raw = sys.stdin.buffer.read() if name == '-' else path.read_bytes()
    for number, line in enumerate(raw.split(b'\n'), 1):
        where = f'{"stdin" if name == "-" else path}:{number}'
        try:
            line = line.decode('utf-8-sig').strip('\r')
            if not line.strip():
                continue
            entry = json.loads(line) if path.suffix == '.jsonl' or name == '-' and line.startswith('{') else line
        except (ValueError, RecursionError) as e:
            raise ValueError(f'{where}: not UTF-8 text or JSON ({e})') from None
        if isinstance(entry, dict):
            entry = next((entry[key] for key in ('prompt', 'messages', 'ids') if key in entry), None)
        kind = ('text' if isinstance(entry, str) else 'list' if isinstance(entry, list) and entry else None)
        if kind == 'list' and not (all(type(i) is int for i in entry) or all(
                isinstance(m, dict) and isinstance(m.get('role'), str) and isinstance(m.get('content'), str)
                for m in entry)):
            kind = None
        if kind is None:
            raise ValueError(f'{where}: want "prompt" (text), "messages" (role and content) or "ids" (whole numbers)')
        found.append((where, entry))
    if not found:
        raise ValueError(f'{name}: no prompt in it')
    return found


def to_ids(entry, cfg, tok, vocab_size):
    """One prompt (text, messages or ids) -> ids, with masks for its gaps."""
    if isinstance(entry, list) and isinstance(entry[0], int):
        if not all(0 <= i < vocab_size for i in entry):
            raise ValueError(f'ids of a prompt must lie between 0 and {vocab_size - 1}, '
                             f'got {min(entry)} .. {max(entry)}')
        return entry
    if isinstance(entry, list) or cfg.instruct:
        ids = tok.encode_chat(entry if isinstance(entry, list) else [{'role': 'user', 'content': entry}])
        if max(ids) >= vocab_size:
            raise ValueError('the chat template needs tokens that this model does not have')
        return ids
    return prompt_ids(entry, tok, cfg.gap_length)


def check(cfg, seq_len, prompts, mask, causal):
    """Refuses what cannot be generated, before the first forward pass -> how many tokens are to be written."""
    gaps = any(mask in p for p in prompts)
    for key, least in (('gap_length', 1), ('gen_length', 0), ('steps', 0), ('block_length', 0), ('batch_size', 1),
                       ('think_boost', 0)):
        if getattr(cfg, key) < least:
            raise ValueError(f'{key} must be {least} or more, got {getattr(cfg, key)}')
    if not all(isinstance(text, str) and text for text in cfg.stop):
        raise ValueError(f'stop must hold texts that are not empty, got {cfg.stop}')
    if causal and (gaps or cfg.variable_length):
        raise ValueError(f'an autoregressive model cannot fill a {GAP}: it only sees what stands before' if gaps else
                         'variable_length is a way of sampling diffusion models')
    if gaps and not all(mask in p for p in prompts):
        raise ValueError(f'either all prompts have a {GAP} or none')
    if gaps and (cfg.block_length or cfg.variable_length or cfg.gen_length or cfg.stop):
        raise ValueError('block_length, variable_length, gen_length and stop are for prompts to continue, not gaps')
    for key in ('gen_length', 'gap_length'):
        if getattr(cfg, key) > seq_len:
            raise ValueError(f'{key} must fit into the context of {seq_len}, got {getattr(cfg, key)}')
    longest = max(map(len, prompts))
    new = max(p.count(mask) for p in prompts) if gaps else cfg.gen_length or max(1, min(64, seq_len - longest))
    if cfg.variable_length and not cfg.gen_length:
        new -= new % (cfg.block_length or 1)
    if longest + (0 if gaps else new) > seq_len:
        raise ValueError(f'prompt and gen_length take {longest + new} tokens, the context holds {seq_len}')
    if cfg.block_length and (not new or new % cfg.block_length):
        raise ValueError(f'block_length must divide the {new} tokens to generate, got {cfg.block_length}')
    if cfg.variable_length and not cfg.block_length:
        raise ValueError('variable_length needs a block_length')
    least, most = (1, cfg.block_length) if cfg.variable_length else (new // (cfg.block_length or new), new)
    if cfg.steps > most:
        raise ValueError(f'steps must not exceed the {most} tokens to generate, got {cfg.steps}')
    if cfg.steps and cfg.steps < least:
        raise ValueError(f'steps must be at least the {least} blocks, got {cfg.steps}')
    return new


class Screen:
    """Draws the first row of the canvas after each step: in place on a terminal, else as a few plain lines."""

    def __init__(self, tok, total):
        self.tok, self.total, self.step, self.drawn = tok, total, 0, 0
        self.live = sys.stdout.isatty()

    def __call__(self, x, committed):
        self.step += 1
        if not self.live and self.step != self.total and (self.step - 1) % max(1, self.total // 8):
            return
        pieces, shown = [], 0
        for token, new in zip(x[0].tolist(), committed[0].tolist()):
            piece = (HIDDEN if token == self.tok.mask_id
                     else clean(self.tok.decode([token])).replace('\n', '\N{RETURN SYMBOL}'))
            shown += len(piece)
            pieces.append(f'\x1b[1;32m{piece}\x1b[0m' if new and self.live else piece)
        width = shutil.get_terminal_size().columns
        if self.live and self.drawn:
            sys.stdout.write(f'\x1b[{self.drawn}F\x1b[J')                           # back to where the last frame began
        print(f'{self.step:4d} | ' + ''.join(pieces), flush=True)
        self.drawn = -(-(shown + 7) // width)
        if self.live:
            time.sleep(0.05)


class Trace:
    """Keeps when each position of the first row came into being and when it was written: what --html draws."""

    def __init__(self, tok):
        self.tok, self.step, self.ids, self.born, self.written = tok, 0, [], [], []

    def __call__(self, x, committed):
        self.step, self.ids = self.step + 1, x[0].tolist()
        for i, (token, now) in enumerate(zip(self.ids, committed[0].tolist())):
            if i == len(self.born):                                 # a new block, or the whole canvas at the first step
                self.born.append(self.step - 1)
                self.written.append(10 ** 9 if token == self.tok.mask_id or now else 0)
            if now:
                self.written[i] = self.step

    def page(self, title):
        """The page: one file without anything from elsewhere; the text is data, and cannot become markup."""
        tokens = [[clean(self.tok.decode([i])), b, w] for i, b, w in zip(self.ids, self.born, self.written)]
        told = {'TITLE': title, 'STEPS': self.step, 'TOKENS': tokens}
        return re.sub('|'.join(told), lambda m: json.dumps(told[m[0]]).replace('<', '\\u003c'), PAGE)


PAGE = """<!doctype html><meta charset="utf-8"><title>nanoLLaDA</title>
<style>body{font:16px/1.7 sans-serif;max-width:50em;margin:2em auto} input{width:100%} #text{white-space:pre-wrap}
.now{background:#bfb} .given{color:#777} .mask{background:#ddd;color:#ddd}</style>
<h3 id="title"></h3><input id="bar" type="range" min="0" value="0"><p id="step"></p><div id="text"></div>
<script>
const title = TITLE, steps = STEPS, tokens = TOKENS, at = id => document.getElementById(id);
function draw() {
  const k = Number(at("bar").value);
  at("step").textContent = "step " + k + " of " + steps;
  at("text").replaceChildren(...tokens.filter(t => t[1] <= k).map(([piece, born, written]) => {
    const span = document.createElement("span");
    span.textContent = written <= k ? piece : "\\u2591\\u2591";
    span.className = written > k ? "mask" : written === 0 ? "given" : written === k ? "now" : "";
    span.title = written > steps ? "never written" : "written in step " + written;
    return span;
  }));
}
at("title").textContent = title; at("bar").max = steps; at("bar").oninput = draw; draw();
</script>
"""


def sampler_settings(cfg, tok, vocab_size, new):
    """The arguments that generate and generate_variable_length share, checked."""
    adjust = None
    if cfg.think_boost:
        ids = [] if cfg.think_power <= 0 else tok.encode('</think>')
        if not ids:
            raise ValueError(f'think_power must be above 0, got {cfg.think_power}')
        adjust = diffusion.end_think(ids, new, cfg.think_boost, cfg.think_power)
    shared = dict(temperature=cfg.temperature, cfg_scale=cfg.cfg_scale, remasking=cfg.remasking,
                  cache=cfg.cache or None, logits_eos_inf=cfg.logits_eos_inf,
                  confidence_eos_eot_inf=cfg.confidence_eos_eot_inf, threshold=cfg.threshold or None)
    diffusion.check_sampler(cfg.steps or new or 1, eos_id=tok.eos_id, **shared)
    return dict(shared, adjust=adjust, suppress=tok.unused(vocab_size))


def write(model, cfg, tok, prompts, new, noise, screen=None):
    """Continues (or fills) a batch of prompts, lists of ids -> (list of ids with the prompt, forward passes)."""
    def stop(ids):
        return tok.eot_id in ids or any(s in tok.decode(ids) for s in cfg.stop)
    return diffusion.complete(model, prompts, new, tok, steps=cfg.steps, block_length=cfg.block_length, stop=stop,
                              variable_length=cfg.variable_length, generator=noise, on_step=screen,
                              **sampler_settings(cfg, tok, model.config.vocab_size, new))


def finished(ids, prompt, tok, stop):
    """(the prompt's text and what was written, what was written alone): up to its end token or stop string."""
    ends = {tok.eos_id, tok.eot_id} - {None}
    if tok.mask_id in prompt:                                       # in a gap an end means nothing: what follows stands
        kept = [i for i, before in zip(ids, prompt) if before != tok.mask_id or i not in ends]
        return (tok.decode(kept[len(tok.start) * (prompt[:1] == tok.start):]),) * 2
    new = data.answer_text(ids[len(prompt):], tok, stop)            # nothing counts after the end
    before = prompt[len(tok.start) * (prompt[:1] == tok.start):]    # BOS is no text
    return tok.decode(before) + new, new


def talk(model, cfg, tok, autocast):
    """Multi-turn conversation on the terminal. The oldest turns go when the context is full."""
    messages, turn, seq_len, vocab_size = [], 0, model.config.seq_len, model.config.vocab_size
    print(f'/reset forgets the conversation, /quit leaves; answers of at most {cfg.gen_length} tokens', file=sys.stderr)
    while True:
        try:
            text = input('> ').strip()
        except (EOFError, KeyboardInterrupt):
            return print()
        if text in ('/quit', '/exit'):
            return
        if text in ('', '/reset'):
            messages = messages if text == '' else []
            continue
        kept = [*messages, {'role': 'user', 'content': text}]
        ids = to_ids(kept, cfg, tok, vocab_size)
        while len(ids) + cfg.gen_length > seq_len and len(kept) > 1:
            kept = kept[2:]
            ids = to_ids(kept, cfg, tok, vocab_size)
        start = time.perf_counter()
        noise = [diffusion.keyed_generator(cfg.seed, turn, device=model.embed.weight.device)]
        try:
            new = check(cfg, seq_len, [ids], tok.mask_id, model.config.causal)
            if len(kept) <= len(messages):
                dropped = (len(messages) + 1 - len(kept)) // 2
                print(f'(the context of {seq_len} tokens is full: {dropped} oldest turn(s) forgotten)', file=sys.stderr)
            screen = Screen(tok, new) if cfg.show and not model.config.causal else None
            with autocast:
                rows, forwards = write(model, cfg, tok, [ids], new, noise, screen)
        except KeyboardInterrupt:
            print('\n(broken off)', file=sys.stderr)
            continue
        except ValueError as e:
            print(e, file=sys.stderr)
            continue
        answer, turn = finished(rows[0], ids, tok, cfg.stop)[1].strip(), turn + 1
        messages = [*kept, {'role': 'assistant', 'content': answer}]
        print(clean(answer), flush=True)
        seconds, made = time.perf_counter() - start, len(rows[0]) - len(ids)
        print(f'({made} tokens, {made / seconds:.1f} tokens/s, {forwards} forward passes)', file=sys.stderr)


def prepare(cfg):
    """Loads everything and refuses what does not go together: -> model, meta, tok, autocast, given, prompts, new."""
    model, meta, _, autocast = open_model(cfg.checkpoint, cfg.device, cfg.dtype)
    tok = data.tokenizer_for(meta, None if cfg.mask_id < 0 else cfg.mask_id)
    config = model.config
    for role in data.ROLES:
        special = getattr(tok, f'{role}_id')
        if special is not None and not 0 <= special < config.vocab_size:
            raise ValueError(f'{cfg.checkpoint}: {role} is {special}, the vocabulary has {config.vocab_size} tokens')
        if role != 'mask' and special == tok.mask_id:
            raise ValueError(f'{cfg.checkpoint}: mask and {role} are both {special}')
    given = [('--prompt', p) for p in cfg.prompt] + (read_prompts(cfg.prompt_file) if cfg.prompt_file else [])
    if cfg.chat:
        if given or cfg.out:
            raise ValueError('chat takes its prompts from the keyboard: leave out prompt, prompt_file and out')
        given = [('chat', [{'role': 'user', 'content': 'x'}])]
        cfg.gen_length = cfg.gen_length or min(128, config.seq_len // 2)
    if cfg.instruct and not given:
        raise ValueError('instruct needs a prompt')
    if not 0 < cfg.num_samples < 10 ** 6 or not all(isinstance(p, (str, list)) for _, p in given):
        raise ValueError(f'num_samples lies in 1 .. 999999 and prompts are texts, got {cfg.num_samples}, {cfg.prompt}')
    prompts = [] if given else [list(tok.start)] * cfg.num_samples
    for where, entry in given:
        try:
            prompts.append(to_ids(entry, cfg, tok, config.vocab_size))
        except ValueError as e:
            raise ValueError(f'{where}: {e}') from None
    new = check(cfg, config.seq_len, prompts, tok.mask_id, config.causal)
    if cfg.html and (len(prompts) != 1 or config.causal or cfg.chat):
        raise ValueError('html shows one prompt (or --num_samples=1) of a diffusion model')
    sampler_settings(cfg, tok, config.vocab_size, new)
    return model, meta, tok, autocast, [entry for _, entry in given] or [None] * cfg.num_samples, prompts, new


def main(config):
    cfg = SimpleNamespace(**config)
    with user_errors():
        model, meta, tok, autocast, given, prompts, new = prepare(cfg)
        if cfg.chat:
            if hasattr(sys.stdin, 'reconfigure'):
                sys.stdin.reconfigure(errors='replace')
            return talk(model, cfg, tok, autocast)
        for key in ('out', 'html'):
            path = Path(getattr(cfg, key) or ' ')
            if path.exists():
                raise ValueError(f'{path}: is there already; choose another --{key}')
            path.parent.mkdir(parents=True, exist_ok=True)
    start, made, forwards, where = time.perf_counter(), 0, 0, model.embed.weight.device
    with user_errors(), ExitStack() as stack:
        file = None
        for i in tqdm(range(0, len(prompts), cfg.batch_size), disable=None if len(prompts) > cfg.batch_size else True):
            part = prompts[i:i + cfg.batch_size]
            noise = [diffusion.keyed_generator(cfg.seed, i + k, device=where) for k in range(len(part))]    # row by row
            watch = [Screen(tok, cfg.steps or new)] if cfg.show and not model.config.causal else []
            watch += [Trace(tok)] if cfg.html else []
            with autocast:
                rows, n_forward = write(model, cfg, tok, part, new, noise,
                                        (lambda *step, watch=watch: [each(*step) for each in watch]) if watch else None)
            if cfg.html:
                title = f'{cfg.checkpoint}, {n_forward} forward passes'
                Path(cfg.html).write_text(watch[-1].page(title), encoding='utf-8')
            forwards += n_forward
            for entry, ids, row in zip(given[i:], part, rows):
                made += ids.count(tok.mask_id) or len(row) - len(ids)
                text, answer = finished(row, ids, tok, cfg.stop)
                print('-' * 80 + '\n' + clean(answer if cfg.instruct or isinstance(entry, list) else text), flush=True)
                if cfg.out:                                         # made when there is something to write
                    file = file or stack.enter_context(open(cfg.out, 'x', encoding='utf-8', errors='backslashreplace'))
                    print(json.dumps({'prompt': entry, 'text': answer, 'ids': row, 'settings': config},
                                     ensure_ascii=False), file=file, flush=True)
        print('-' * 80, flush=True)
    seconds = time.perf_counter() - start
    print(f'{made} tokens in {seconds:.2f} s, {made / seconds:.1f} tokens/s, {forwards} forward passes '
          f'({cfg.checkpoint}, iteration {meta["iteration"]}, {model.embed.weight.dtype}, {where})', file=sys.stderr)


if __name__ == '__main__':
    command(main, configure(globals(), positional=('checkpoint',)))
