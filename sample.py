"""Writes text with a trained or released model, and shows how the canvas fills in.

    python sample.py out/docs                                       # three samples out of nothing
    python sample.py out/docs --prompt="The function returns"       # continues a prompt (repeat --prompt for a batch)
    python sample.py out/docs --prompt="If the file ___ exist" --show
    python sample.py out/docs --remasking=low_confidence --block_length=8 --temperature=0.7 --prompt="Return the"

A ___ in a prompt is a gap: gap_length masks, filled in sight of both sides, which no left-to-right model can do.
The default, random remasking at temperature 1, draws from the model. Low-confidence remasking commits the most
probable tokens first: it looks for the mode, and over a whole canvas with nothing given the mode of a small model is
one phrase again and again. So give it a prompt and small blocks.
"""

import shutil
import sys
import time
from types import SimpleNamespace

import torch

import data
import diffusion
from configurator import command, configure, user_errors
from model import load_model, pick_device

checkpoint = 'out/docs'         # a run or a step of train.py, or a folder of released weights
prompt = []                     # text to continue, or with ___ to fill in; none: unconditional samples
num_samples = 3                 # samples when there is no prompt
gen_length = 0                  # tokens to generate; 0: as many as fit into the context, at most 64
gap_length = 3                  # tokens in each ___
steps = 0                       # denoising steps; 0: one token a step
block_length = 0                # finish blocks of this many tokens from left to right; 0: the whole canvas at once
remasking = 'random'            # which proposals survive a step: 'random' or 'low_confidence'
temperature = 1.0               # 0 takes the most probable token
cfg_scale = 0.0                 # classifier-free guidance away from the canvas without the prompt
threshold = 0.0                 # above 0, with low_confidence: commit every proposal this probable (approximate, fast)
seed = 1337                     # of the noise
show = False                    # draw the canvas after every step
device = 'auto'                 # 'cuda', 'mps' or 'cpu'
dtype = 'auto'                  # 'bfloat16' or 'float32'

GAP = '___'
HIDDEN = '\N{LIGHT SHADE}'      # how a mask looks


def clean(text):
    """Text that cannot move the cursor or change colours: control characters but newline and tab are dropped."""
    return ''.join(c for c in text if c.isprintable() or c in '\n\t')


def prompt_ids(text, tok, gap):
    """Ids of a prompt in which each ___ stands for `gap` masks; the space before a gap belongs to what fills it."""
    if not text.strip():
        raise ValueError('the prompt is empty; leave --prompt out for samples out of nothing')
    ids, parts = [], text.split(GAP)
    for i, part in enumerate(parts):
        last = i == len(parts) - 1
        ids += tok.encode(part if last else part.removesuffix(' ')) + ([] if last else [tok.mask_id] * gap)
    return ids


def make_canvas(cfg, model, tok):
    """-> x, visible, given (B, T) and how many tokens are to be written; refuses what cannot be generated."""
    gaps = any(GAP in p for p in cfg.prompt)
    for key, least in (('num_samples', 1), ('gap_length', 1), ('gen_length', 0), ('steps', 0), ('block_length', 0)):
        if getattr(cfg, key) < least:
            raise ValueError(f'{key} must be {least} or more, got {getattr(cfg, key)}')
    if model.config.causal and gaps:
        raise ValueError(f'an autoregressive model cannot fill a {GAP}: it only sees what stands before')
    if gaps and not all(GAP in p for p in cfg.prompt):
        raise ValueError(f'either all prompts have a {GAP} or none')
    prompts = [prompt_ids(p, tok, cfg.gap_length) for p in cfg.prompt] or [[]] * cfg.num_samples
    for key in ('gen_length', 'gap_length'):
        if getattr(cfg, key) > model.config.seq_len:
            raise ValueError(f'{key} must fit into the context of {model.config.seq_len}, got {getattr(cfg, key)}')
    room = model.config.seq_len - max(len(p) for p in prompts)
    if gaps and cfg.block_length:
        raise ValueError('block_length goes with a prompt to continue, not with gaps')
    new = max(p.count(tok.mask_id) for p in prompts) if gaps else cfg.gen_length or max(1, min(64, room))
    x, visible, given = diffusion.canvas(prompts, 0 if gaps else new, tok.mask_id, tok.pad_id)
    if x.shape[1] > model.config.seq_len:
        raise ValueError(f'prompt and gen_length take {x.shape[1]} tokens, the context holds {model.config.seq_len}')
    if cfg.steps > new:
        raise ValueError(f'steps must not exceed the {new} tokens to generate, got {cfg.steps}')
    if cfg.block_length and new % cfg.block_length:
        raise ValueError(f'block_length must divide the {new} tokens to generate, got {cfg.block_length}')
    diffusion.check_sampler(cfg.steps or new, cfg.temperature, cfg.cfg_scale, cfg.remasking,
                            threshold=cfg.threshold or None)
    if cfg.block_length and (cfg.steps or new) < new // cfg.block_length:
        raise ValueError(f'steps must be at least the {new // cfg.block_length} blocks, got {cfg.steps}')
    return x, visible, given, new


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


def write_text(model, cfg, tok, x, visible, given, new, screen):
    """The filled canvas (B, T) and the number of forward passes, diffusion or autoregressive."""
    noise = [diffusion.keyed_generator(cfg.seed, i, device=x.device) for i in range(len(x))]     # a row stands alone
    if not model.config.causal:
        return diffusion.generate(
            model, x, tok.mask_id, steps=cfg.steps or new, block_length=cfg.block_length or None,
            temperature=cfg.temperature, cfg_scale=cfg.cfg_scale, remasking=cfg.remasking,
            prompt=given, visible=None if visible.all() else visible,
            threshold=cfg.threshold or None, on_step=screen, generator=noise)
    rows, forwards = [], 0
    for row, seen, generator in zip(x, visible, noise):
        start = torch.cat((row.new_tensor([tok.eos_id]), row[seen][:-new]))[None]
        out = diffusion.ar_generate(model, start, new, temperature=cfg.temperature, eos_id=tok.eos_id,
                                    generator=generator)
        rows.append(torch.cat((row[~seen], out.x[0, 1:])))
        forwards += out.n_forward
    return diffusion.Generated(torch.stack(rows), forwards)


def main(config):
    cfg = SimpleNamespace(**config)
    with user_errors():
        where, autocast = pick_device(cfg.device, cfg.dtype)
        model, meta = load_model(cfg.checkpoint, where)
        if meta['tokenizer'] is None:
            raise ValueError(f'{cfg.checkpoint}: no tokenizer.json beside the weights')
        tok = data.get_tokenizer(meta['tokenizer'])
        if tok.mask_id >= model.config.vocab_size or meta['mask_id'] not in (None, tok.mask_id):
            raise ValueError(f'{cfg.checkpoint}: the tokenizer has [MASK] {tok.mask_id}, the weights {meta["mask_id"]}')
        x, visible, given, new = make_canvas(cfg, model, tok)
    screen = Screen(tok, cfg.steps or new) if cfg.show and not model.config.causal else None
    x, visible, given = x.to(where), visible.to(where), given.to(where)
    start = time.perf_counter()
    with autocast:
        out = write_text(model, cfg, tok, x, visible, given, new, screen)
    seconds = time.perf_counter() - start
    for row, seen in zip(out.x.tolist(), visible.tolist()):
        ids = [t for t, shown in zip(row, seen) if shown]
        if tok.eos_id in ids:
            ids = ids[:ids.index(tok.eos_id)]                                           # nothing counts after the end
        print('-' * 80 + '\n' + clean(tok.decode(ids)))
    print('-' * 80)
    print(f'{len(x) * new} tokens in {seconds:.2f} s, {out.n_forward} forward passes '
          f'({cfg.checkpoint}, iteration {meta["iteration"]})', file=sys.stderr)


if __name__ == '__main__':
    command(main, configure(globals(), positional=('checkpoint',)))
