"""Writes text with a trained or released model: continues, fills gaps, answers, chats, shows the canvas.

    python sample.py out/docs                                       # three unconditional samples
    python sample.py out/docs --prompt="The function returns"       # continues (repeat --prompt for a batch)
    python sample.py out/docs --prompt="If the file ___ exist" --show
    python sample.py out/docs --prompt_file=- --out=out/answers.jsonl < prompts.txt
    python sample.py LLaDA-8B-Instruct config/sample_llada.py --chat
    python sample.py out/docs --num_samples=1 --html=out/trace.html     # a page to scrub through the steps

A ___ in a prompt is a gap: gap_length masks, filled with both sides in view, which no left-to-right model can
do. By default answers (chat, instruct, released weights, models trained on examples) use low-confidence remasking
at temperature 0, anything else random remasking at temperature 1, which draws from the model. Low-confidence
remasking commits the most probable tokens first: it seeks the mode, and over a whole canvas without a prompt the
mode of a small model is one phrase again and again. So give it a prompt and small blocks.
"""

from configurator import before_torch

if __name__ == '__main__':
    before_torch()

import codecs
import json
import math
import re
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from tqdm import tqdm

import data
import diffusion
from configurator import Refused, clean, command, out_of_range, refuse, refusing, say
from model import open_model

# --- what to write
checkpoint = 'out/docs'         # a run or a step of train.py, or a folder of released weights
prompt = []                     # text to continue, or with ___ to fill in; none: unconditional samples
prompt_file = ''                # more prompts: .txt (one per line), .jsonl ("prompt", "messages", "ids"), - is stdin
instruct = False                # put each prompt into the chat template as a user's message
chat = False                    # talk: /reset forgets, /quit or Ctrl-D leaves, Ctrl-C interrupts an answer
num_samples = 3                 # samples when there is no prompt
gen_length = 0                  # tokens to generate; 0: as many as fit into the context, at most 64
gap_length = 3                  # tokens in each ___; 0: tries 1 to 8, and keeps what fits best
stop = []                       # text is cut before this string (repeat for more)
# --- sampler
steps = 0                       # denoising steps (of one block with variable_length); 0: one token per step
block_length = 0                # finish blocks of this many tokens from left to right; 0: the whole canvas
variable_length = False         # append blocks one by one until the end is written (iLLaDA)
remasking = ''                  # which proposals survive a step: 'random' or 'low_confidence'; '': see below
temperature = math.nan          # 0 takes the most probable token; nan: see below
cfg_scale = 0.0                 # classifier-free guidance away from the canvas without the prompt
logits_eos_inf = False          # EOS is never written
confidence_eos_eot_inf = False  # EOS and EoT are written last
threshold = 0.0                 # above 0, low_confidence: commit every proposal at least this probable (fast, inexact)
cache = ''                      # 'prefix', 'dual' or 'roll': cache keys and values (fast, inexact)
think_boost = 0.0               # above 0: make "</think>" more and more likely (iLLaDA's evaluation: 100)
think_power = 3.0               # how late that sets in
seed = 1337                     # of the noise
# --- machine and output
batch_size = 8                  # prompts in one forward pass
out = ''                        # also write one JSON object per prompt to this new file: text, ids, settings
show = False                    # draw the canvas after every step
html = ''                       # write a new HTML page to scrub through the steps of one prompt
device = 'auto'                 # 'cuda', 'mps' or 'cpu'
dtype = 'auto'                  # 'bfloat16' or 'float32'; auto: released weights as they are stored
compile = False                 # torch.compile each block: half a minute, then up to twice as fast on a GPU
mask_id = -1                    # id of [MASK] if neither the weights nor their tokenizer name it

GAP = '___'
HIDDEN = '\N{LIGHT SHADE}'      # how a mask looks


# ----------------------------------------------------------------------------------------------------------
# Prompts


def read_prompts(name):
    """The prompts of a file or of stdin, [(where, text, messages or ids)]: text lines, or JSON objects."""
    if name != '-' and not name.endswith(('.txt', '.jsonl')):
        raise Refused(f'prompt_file must be a .txt, a .jsonl or - for stdin, got {name}')
    raw, found = sys.stdin.buffer.read() if name == '-' else Path(name).read_bytes(), []

    for number, line in enumerate(raw.removeprefix(codecs.BOM_UTF8).split(b'\n'), 1):
        where = f'{"stdin" if name == "-" else name}:{number}'
        try:
            entry = line.decode().rstrip('\r')
            if not entry.strip():
                continue
            if name.endswith('.jsonl') or name == '-' and entry.startswith('{'):
                entry = json.loads(entry)
        except UnicodeDecodeError as error:
            raise Refused(f'{where}: not UTF-8 (byte {line[error.start]})') from None
        except (ValueError, RecursionError) as error:
            raise Refused(f'{where}: not JSON ({error})') from None

        if isinstance(entry, dict):
            entry = entry.get('prompt', entry.get('messages', entry.get('ids')))
        found.append((where, entry))
    if not found:
        raise Refused(f'{name}: no prompt in it')
    return found


def to_ids(entry, where, tok, cfg, vocab_size, gap):
    """A prompt (text, messages or ids) as ids, with `gap` masks for each ___ of a text."""
    if isinstance(entry, str) and not entry.strip():
        raise Refused(f'{where}: the prompt is empty (without any prompt, samples come out of nothing)')
    if not entry or not isinstance(entry, (str, list)):
        raise Refused(f'{where}: want "prompt" (text), "messages" (role and content) or "ids"')
    if isinstance(entry, str) and cfg.instruct:
        entry = [{'role': 'user', 'content': entry}]

    if isinstance(entry, str):
        *parts, last = re.split(f'{GAP}_*', entry)          # any run of three or more is one gap
        ids = list(tok.start)
        for part in parts:                                  # the blank before a gap belongs to what fills it
            ids += [*tok.encode(part.removesuffix(' ')), *[tok.mask_id] * gap]
        ids += tok.encode(last)

    elif all(type(i) is int for i in entry):
        ids = entry
    else:
        try:
            messages = list(map(data.as_message, entry))
        except ValueError as error:
            raise Refused(f'{where}: {error}') from None
        ids = tok.encode_begun(messages)

    if not all(0 <= i < vocab_size for i in ids):
        raise Refused(f'{where}: ids must lie between 0 and {vocab_size - 1}, got {min(ids)} .. {max(ids)}')
    return ids


def lengths_of(entry, where, tok, cfg, config):
    """The ids of a prompt, one list for each length to try for its gaps."""
    lengths = [cfg.gap_length] if cfg.gap_length else range(1, 9)
    first, *more = [to_ids(entry, where, tok, cfg, config.vocab_size, n) for n in lengths]
    return [first, *(ids for ids in more if first != ids and len(ids) <= config.seq_len)]


def best_fit(model, variants, rows, tok, cfg):
    """The best completion of each prompt over the gap lengths tried: [(prompt, what it became), ...].

    variants: for each prompt, its ids at each length. rows: all of them completed, in order.
    """
    rows, kept = iter(rows), []
    for tried in variants:
        pairs = list(zip(tried, rows))                          # (in this order: no row is lost)
        if len(pairs) > 1:
            pairs.sort(key=lambda pair: diffusion.fit(model, *pair, tok.mask_id, seed=cfg.seed))
        kept.append(pairs[-1])
    return kept


def plan(cfg, prompts, tok, config):
    """How many tokens to write after a prompt or into its gaps; Refused if that is impossible."""
    n_gaps, length = [ids.count(tok.mask_id) for ids in prompts], max(map(len, prompts))
    new = max(n_gaps)                                           # none: see below

    if new and not all(n_gaps):
        raise Refused(f'either all prompts have a {GAP} or none')
    if config.causal and (new or cfg.variable_length):
        raise Refused(f'an autoregressive model cannot fill a {GAP} or grow a canvas: it sees what stands before')
    if new and (cfg.block_length or cfg.variable_length or cfg.gen_length or cfg.stop):
        raise Refused('block_length, variable_length, gen_length and stop are for prompts to continue, not gaps')

    if not new:
        new = cfg.gen_length or max(1, min(64, config.seq_len - length))
        if cfg.variable_length and not cfg.gen_length:
            new -= new % cfg.block_length
        length += new
    if length > config.seq_len:
        raise Refused(f'gen_length: prompt and answer take {length} tokens, the context holds {config.seq_len}')
    with refusing():
        diffusion.check_steps(new, cfg)
    return new


# ----------------------------------------------------------------------------------------------------------
# Pictures


def pieces_of(ids, tok):
    """What each id adds to the text shown: a character made of several tokens appears with the last."""
    decoder = codecs.getincrementaldecoder('utf-8')('replace')
    return [HIDDEN if i == tok.mask_id else clean(decoder.decode(tok.decode_bytes([i]))) for i in ids]


class Screen:
    """Draws the longest row of the canvas after each step: in place on a terminal, else a few plain lines."""

    def __init__(self, tok, total):
        self.tok, self.total, self.step, self.drawn = tok, total, 0, 0
        self.live = sys.stdout.isatty()

    def __call__(self, x, committed):
        self.step += 1
        ids, begin = x[-1].tolist(), f'{self.step:4d} | '       # the last row of a batch has no padding
        pieces = [piece.replace('\n', '\N{RETURN SYMBOL}') for piece in pieces_of(ids, self.tok)]
        plain = begin + ''.join(pieces)
        if not self.live:
            if self.tok.mask_id not in ids or (self.step - 1) % max(1, self.total // 8) == 0:
                print(plain, flush=True)
            return

        for i in committed[-1].nonzero()[:, 0].tolist():
            pieces[i] = f'\x1b[1;32m{pieces[i]}\x1b[0m'
        if self.drawn:
            sys.stdout.write(f'\x1b[{self.drawn}F\x1b[J')       # back to where the last frame began
        print(begin + ''.join(pieces), flush=True)
        self.drawn = -(-len(plain) // shutil.get_terminal_size().columns)
        time.sleep(0.05)


class Trace:
    """What --html draws: when each position of the first row appeared and was written, how sure, what else.

    Serves as on_step of a run whose adjust is `look`.
    """

    def __init__(self, tok):
        self.tok, self.step, self.ids = tok, 0, []
        self.marks = []                                         # for each position: [born, written, how sure]
        self.guesses, self.chances = [], {}                     # before each step; position -> p (V,)

    def look(self, logits, x, masked):
        """A hook for `adjust`: notes the three likeliest tokens for every mask of the first row."""
        places = masked[0].nonzero()[:, 0].tolist()
        never = [self.tok.mask_id, *self.tok.unused(logits.shape[-1])]
        chances = diffusion.forbid(logits[:len(places)].float(), never).softmax(-1)
        self.chances, best = dict(zip(places, chances)), chances.topk(3)
        self.guesses.append({})
        for i, ids, shares in zip(places, best.indices.tolist(), best.values.tolist()):
            texts = [clean(self.tok.decode([token])) for token in ids]
            self.guesses[-1][i] = [[text, round(100 * share)] for text, share in zip(texts, shares)]
        return logits

    def __call__(self, x, committed):
        self.step, self.ids = self.step + 1, x[0].tolist()
        for i in range(len(self.marks), len(self.ids)):         # a new block, or all of it at the first step
            hidden = i in self.chances or self.ids[i] == self.tok.mask_id
            self.marks.append([self.step - 1, 10 ** 9 if hidden else 0, None])
        for i in committed[0].nonzero()[:, 0].tolist():
            sure = self.chances[i][self.ids[i]].item()
            self.marks[i][1:] = self.step, round(100 * sure)

    def page(self, title):
        """The page, one self-contained file; the text is data, and cannot become markup."""
        tokens = [(piece, *mark) for piece, mark in zip(pieces_of(self.ids, self.tok), self.marks)]
        told = {'TITLE': title, 'STEPS': self.step, 'TOKENS': tokens, 'GUESSES': self.guesses}
        return re.sub('|'.join(told), lambda m: json.dumps(told[m[0]]).replace('<', '\\u003c'), PAGE)


def both(*watchers):
    """One on_step that calls several; None among them is skipped."""
    def on_step(x, committed):
        for watch in filter(None, watchers):
            watch(x, committed)

    return on_step


PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>nanoLLaDA</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root { color-scheme: light dark }
body { font: 16px/1.8 system-ui, sans-serif; max-width: 50em; margin: 1.5em auto; padding: 0 1em }
h3 { overflow-wrap: anywhere } button { font: inherit; min-width: 5em } #bar { width: 100% }
#text { white-space: pre-wrap; overflow-wrap: anywhere }
.given { opacity: .6 } .now { outline: 2px solid #2a8; border-radius: 2px }
.mask { color: transparent; background: #8886; border-radius: 2px }
</style>
<h3 id="title"></h3>
<p><button id="play">play</button> <label>colour <select id="hue"><option value="">none</option>
<option value="step">by step</option><option value="sure">by confidence</option></select></label></p>
<div id="step"></div>
<input id="bar" type="range" min="0" value="0" aria-label="step"><p id="text"></p><p id="about">&nbsp;</p>
<script>
const title = TITLE, steps = STEPS, tokens = TOKENS, guesses = GUESSES, at = id => document.getElementById(id);
let timer = 0;
function about(i, k) {
  const [piece, born, written, sure] = tokens[i], next = (guesses[k] || {})[i];
  if (written === 0) return "given";
  if (written <= k) return "written in step " + written + (sure === null ? "" : ", " + sure + " % sure");
  if (!next) return "not looked at in this step";
  return "next guesses: " + next.map(([text, share]) => JSON.stringify(text) + " " + share + " %").join(", ");
}
function draw() {
  const k = Number(at("bar").value), hue = at("hue").value;
  at("step").textContent = "step " + k + " of " + steps;
  at("play").textContent = timer ? "pause" : "play";
  at("text").replaceChildren(...tokens.flatMap(([piece, born, written, sure], i) => {
    if (born > k) return [];
    const span = document.createElement("span");
    span.textContent = piece;                     // a mask is as wide as what will stand there: nothing jumps
    span.className = written > k ? "mask" : written === 0 ? "given" : written === k ? "now" : "";
    const angle = hue === "step" ? 270 * written / steps : 1.2 * sure;
    if ((hue === "step" || hue && sure !== null) && written > 0 && written <= k)
      span.style.background = "hsl(" + angle + " 70% 50% / .35)";
    span.onmouseenter = span.onclick = () => { at("about").textContent = about(i, k); };
    return [span];
  }));
}
function move(n) { at("bar").value = Number(at("bar").value) + n; draw(); }
function play() {
  if (Number(at("bar").value) === steps) at("bar").value = 0;
  timer = timer ? clearInterval(timer) || 0 : setInterval(() => {
    if (Number(at("bar").value) === steps) timer = clearInterval(timer) || 0;
    move(1);
  }, Math.max(60, 6000 / steps));
  draw();
}
document.onkeydown = event => {
  const act = { " ": play, ArrowRight: () => move(1), ArrowLeft: () => move(-1) }[event.key];
  if (act && event.target === document.body) { event.preventDefault(); act(); }
};
at("title").textContent = title; at("bar").max = steps;
at("bar").oninput = draw; at("hue").onchange = draw; at("play").onclick = play; draw();
</script>
"""

# ----------------------------------------------------------------------------------------------------------
# Writing


def texts_of(ids, prompt, tok, stop):
    """(the text of prompt and answer, that of the answer alone), up to an end token or stop string."""
    start = len(tok.start) if prompt[:1] == tok.start else 0        # BOS is not text
    if tok.mask_id not in prompt:
        answer = tok.answer(ids[len(prompt):], stop)                # nothing counts after the end
        return tok.decode(prompt[start:]) + answer, answer

    ends = (tok.eos_id, tok.eot_id)                                 # in a gap they end nothing
    kept = [i for i, before in zip(ids, prompt) if before != tok.mask_id or i not in ends]
    text = tok.decode(kept[start:])
    return text, text


def talk(model, cfg, tok, autocast, how):
    """Multi-turn conversation on the terminal. The oldest turns are dropped when the context is full."""
    messages, turn, config = [], 0, model.config
    cfg.gen_length = cfg.gen_length or min(128, config.seq_len // 2)
    plan(cfg, [tok.encode_chat([{'role': 'user', 'content': 'x'}])], tok, config)
    say(f'/reset forgets the conversation, /quit leaves; at most {cfg.gen_length} tokens')

    while True:
        try:
            text = input('> ').strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if text in ('/quit', '/exit'):
            return

        if text == '/reset':
            messages = []
        if text in ('', '/reset'):
            continue

        kept = [*messages, {'role': 'user', 'content': text}]
        ids = tok.encode_chat(kept)
        while len(ids) + cfg.gen_length > config.seq_len and len(kept) > 1:
            kept = kept[2:]
            ids = tok.encode_chat(kept)
        if len(kept) <= len(messages):
            say(f'(the context of {config.seq_len} tokens is full: forgot the oldest turns)')

        try:
            began = time.perf_counter()
            new = plan(cfg, [ids], tok, config)
            watch = Screen(tok, cfg.steps or new) if cfg.show and not config.causal else None
            with autocast:
                (row,), n = diffusion.complete(model, [ids], new, tok, first=turn, on_step=watch, **how)

        except KeyboardInterrupt:
            say('\n(broken off)')
            continue
        except Refused as error:
            say(error)
            continue

        _, answer = texts_of(row, ids, tok, cfg.stop)
        messages = [*kept, {'role': 'assistant', 'content': answer.strip()}]
        turn += 1
        print(clean(answer.strip()), flush=True)
        made, seconds = len(row) - len(ids), time.perf_counter() - began
        say(f'({made} tokens, {made / seconds:.1f} tokens/s, {n} forward passes)')


def new_file(name):
    """The path of a file that must not exist yet; None for ''."""
    if not name:
        return None
    path = Path(name)
    if path.exists():
        raise Refused(f'{path}: is there already; choose another name')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    path.unlink()                       # it is writable, and exists only once something is in it
    return path


def check(cfg):
    """Refuses invalid settings."""
    wrong = out_of_range(cfg, (
        ('batch_size num_samples', 'in 1 .. 999999', lambda v: 1 <= v < 10 ** 6),
        ('gap_length', 'in 0 .. 999999', lambda v: 0 <= v < 10 ** 6),
        ('gen_length', '0 or more', lambda v: v >= 0)))
    refuse(wrong)
    if cfg.chat and (cfg.prompt or cfg.prompt_file or cfg.out or cfg.html):
        raise Refused('chat takes its prompts from the keyboard: leave out prompt, prompt_file, out and html')
    if cfg.instruct and not (cfg.prompt or cfg.prompt_file or cfg.chat):
        raise Refused('instruct needs a prompt')
    sampler(cfg, answers=True)


def sampler(cfg, answers):
    """Settings for diffusion.complete; by default answers seek the mode, and samples are drawn."""
    remasking, temperature = ('low_confidence', 0.0) if answers else ('random', 1.0)
    if not math.isnan(cfg.temperature):
        temperature = cfg.temperature
    told = {**vars(cfg), 'remasking': cfg.remasking or remasking, 'temperature': temperature}
    with refusing():
        return dict(diffusion.sampler_of(SimpleNamespace(**told)), seed=cfg.seed, batch_size=cfg.batch_size)


def main(config):
    cfg = SimpleNamespace(**config)
    check(cfg)
    model, meta, where, autocast = open_model(cfg.checkpoint, cfg.device, cfg.dtype, cfg.compile)
    tok = data.tokenizer_for(meta, cfg.mask_id if cfg.mask_id >= 0 else None)
    trained = meta['config'] or {'masking': 'response'}         # released weights do not say how
    how = sampler(cfg, cfg.chat or cfg.instruct or trained['masking'] == 'response')
    if cfg.chat:
        if meta['examples'] == 0:
            say('(this model has seen texts, never a conversation: do not expect answers)')
        talk(model, cfg, tok, autocast, how)
        return

    given = [('--prompt', text) for text in cfg.prompt]
    if cfg.prompt_file:
        given += read_prompts(cfg.prompt_file)
    variants = [lengths_of(entry, at, tok, cfg, model.config) for at, entry in given]
    if not given:
        given = [('', None)] * cfg.num_samples
        variants = [[list(tok.start)]] * cfg.num_samples
    prompts = [ids for tried in variants for ids in tried]
    new = plan(cfg, prompts, tok, model.config)

    if model.config.causal and (cfg.html or cfg.show) or cfg.html and len(prompts) != 1:
        raise Refused('html and show are for a diffusion model, html for one prompt (or --num_samples=1), with '
                      'gaps of known length')
    page, out = new_file(cfg.html), new_file(cfg.out)
    trace = Trace(tok) if page else None

    began, made, forwards = time.perf_counter(), 0, 0
    # (gaps of unknown length one by one: a prompt's noise depends on its number, not on its neighbours)
    starts = range(0, len(variants), cfg.batch_size if cfg.gap_length else 1)
    for i in tqdm(starts, disable=None if len(starts) > 1 else True):
        tried = variants[i:i + starts.step]
        screen = Screen(tok, cfg.steps or new) if cfg.show else None
        with autocast:
            rows, n = diffusion.complete(model, sum(tried, []), new, tok, first=i, on_step=both(trace, screen),
                                         adjust=trace and trace.look, **how)
            kept = best_fit(model, tried, rows, tok, cfg)
        forwards += n

        for (_, entry), (ids, row) in zip(given[i:], kept):
            made += ids.count(tok.mask_id) or len(row) - len(ids)
            text, answer = texts_of(row, ids, tok, cfg.stop)
            if cfg.instruct or isinstance(entry, list):
                text = answer
            print('-' * 80 + '\n' + clean(text), flush=True)
            if out:
                line = {'prompt': entry, 'text': answer, 'ids': row, 'settings': {**config, **how}}
                with out.open('a', encoding='utf-8', errors='backslashreplace') as file:
                    print(json.dumps(line, ensure_ascii=False), file=file)

    print('-' * 80, flush=True)
    if page:
        page.write_text(trace.page(f'{cfg.checkpoint}, {forwards} forward passes'), encoding='utf-8')
    seconds = time.perf_counter() - began
    say(f'{made} tokens in {seconds:.2f} s, {made / seconds:.1f} tokens/s, {forwards} forward passes '
        f'({cfg.checkpoint}, iteration {meta["iteration"]}, {model.embed.weight.dtype}, {where})')


if __name__ == '__main__':
    command(main, globals(), positional=('checkpoint',))
