"""Write a page that replays a generation: what was written when, how sure, and what else was likely.

    python tests/lab/trace.py out/docs --prompt="If the file ___ exist" --out=out/trace.html

Open the page in a browser. It is one file that loads nothing else, and the text in it is data and cannot
become markup. The settings are those of sample.py, but there is one prompt at most.
"""

import json
import sys
from pathlib import Path

LAB = Path(__file__).resolve().parent
sys.path[:0] = [str(LAB.parents[1]), str(LAB.parent)]

import command  # noqa: E402

import diffusion  # noqa: E402
import sample  # noqa: E402
from configurator import UserError  # noqa: E402

out = 'out/trace.html'          # the page to write, a new file
HIDDEN = '░'                    # how a mask looks
NEVER = 10 ** 9                 # the step that writes what was not written


def pieces_of(ids, tok):
    """Return what each id adds to the text. A character of several tokens appears with its last one."""
    pieces = []
    waiting = []
    for i, token in enumerate(ids):
        if token == tok.mask_id:
            pieces.append(HIDDEN)
            continue
        waiting.append(token)
        text = tok.decode(waiting)

        # U+FFFD at the end is half a character, and its other half may be the next token
        last = i + 1 == len(ids) or ids[i + 1] == tok.mask_id
        if text.endswith('\ufffd') and len(waiting) < 4 and not last:
            pieces.append('')
        else:
            pieces.append(text)
            waiting = []
    return pieces


class Trace:
    """Note what happens to one row, as on_step of a generation whose adjust is `look`."""

    def __init__(self, tok):
        self.tok = tok
        self.step = 0
        self.ids = []
        self.born = []                                      # for each position: the step before it appeared,
        self.written = []                                   # the step that wrote it (0: it was given),
        self.sure = []                                      # and how probable it was then, in per cent
        self.guesses = []                                   # of each step: position -> [[text, per cent]]
        self.probabilities = {}                             # position -> (V,), of the step that is going on

    def look(self, logits, x, masked):
        """Note the three most probable tokens for every mask of the row. Changes nothing."""
        positions = masked[0].nonzero()[:, 0].tolist()
        never = [self.tok.mask_id, *self.tok.unused(logits.shape[-1])]
        probabilities = diffusion.forbid(logits.float(), never).softmax(-1)             # (M, V)
        self.probabilities = dict(zip(positions, probabilities))

        best = probabilities.topk(3)
        guesses = {}
        for position, ids, values in zip(positions, best.indices.tolist(), best.values.tolist()):
            texts = [self.tok.decode([i]) for i in ids]
            guesses[position] = [[text, round(100 * p)] for text, p in zip(texts, values)]
        self.guesses.append(guesses)
        return logits

    def __call__(self, x, committed):
        """Note which tokens of the row a step has written."""
        self.step += 1
        self.ids = x[0].tolist()
        # a new block, or in the first step the whole canvas
        for position in range(len(self.born), len(self.ids)):
            hidden = position in self.probabilities or self.ids[position] == self.tok.mask_id
            self.born.append(self.step - 1)
            self.written.append(NEVER if hidden else 0)
            self.sure.append(None)

        for position in committed[0].nonzero()[:, 0].tolist():
            p = self.probabilities[position][self.ids[position]].item()
            self.written[position] = self.step
            self.sure[position] = round(100 * p)

    def page(self, facts):
        """Return the page as a text. facts: what it says of the run, a dict of texts."""
        tokens = list(zip(pieces_of(self.ids, self.tok), self.born, self.written, self.sure))
        data = dict(facts=facts, steps=self.step, tokens=tokens, guesses=self.guesses)
        # so that no text can end the script
        text = json.dumps(data).replace('<', '\\u003c')
        html = (LAB / 'trace.html').read_text(encoding='utf-8')
        return html.replace('DATA', text, 1)


def settings_of(params, cfg):
    """Return the settings of the sampler that are not off, as one line."""
    used = dict(vars(params), seed=cfg.seed, variable_length=cfg.variable_length)
    return ', '.join(f'{name} {value}' for name, value in used.items() if value or name == 'temperature')


def main(cfg):
    if Path(cfg.out).exists():
        raise UserError(f'{cfg.out} already exists, choose another name')
    if len(cfg.prompt) > 1:
        raise UserError(f'a page shows one prompt, got {len(cfg.prompt)}')
    run = sample.load(cfg.checkpoint, cfg)
    if run.model.config.causal:
        raise UserError(f'{cfg.checkpoint} is autoregressive, and writes from left to right')

    prompt = cfg.prompt[0] if cfg.prompt else run.start
    ids = sample.encode_prompt(prompt, run, cfg)
    new = sample.tokens_to_append([ids], run, cfg)
    params = sample.sampling_params(cfg, new, cfg.instruct or run.masking != 'unified')
    trace = Trace(run.tok)
    _, n_forward = sample.generate_text(
        run.model, [ids], new, run.tok, params, seeds=[(cfg.seed, 0)], variable_length=cfg.variable_length,
        stop=cfg.stop, adjust=trace.look, on_step=trace)

    n_tokens = len(trace.ids) - len(ids) + ids.count(run.tok.mask_id)
    page = trace.page({
        'checkpoint': cfg.checkpoint,
        'prompt': cfg.prompt[0] if cfg.prompt else '(none)',
        'written': f'{n_tokens} tokens in {n_forward} forward passes',
        'settings': settings_of(params, cfg)})
    Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
    Path(cfg.out).write_text(page, encoding='utf-8')
    print(f'wrote {cfg.out}')


if __name__ == '__main__':
    command.run(main, globals(), sample, positional=('checkpoint',))
