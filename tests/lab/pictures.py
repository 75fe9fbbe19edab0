"""Draw the pictures: a story being written, the forward process, two runs, the loss by t, and longer runs.

    python tests/lab/pictures.py tests/exercises/stories --gen_length=38    # of README and RESULTS.md
    python tests/lab/pictures.py CHECKPOINT --ar=out/docs_ar --diffusion=out/docs

CHECKPOINT is a model of the made-up stories of worlds.py. The stories that are hidden and measured are drawn
anew, so it has not seen them in training, and no data set is needed. --ar and --diffusion name two runs, whose
logs are drawn. The other settings are those of sample.py.
"""

import math
import random
import sys
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

LAB = Path(__file__).resolve().parent
sys.path[:0] = [str(LAB.parents[1]), str(LAB.parent), str(LAB)]

import command  # noqa: E402
import experiments  # noqa: E402
import worlds  # noqa: E402
from svg import END, LEFT, RIGHT, chart, line, page, place, text  # noqa: E402

import sample  # noqa: E402
from diffusion import forward_process, keyed_generator  # noqa: E402

out = 'tests/lab/pictures'      # the folder for the pictures; those in it are replaced
ar = ''                         # a run of an autoregressive model; '' = the figures of RESULTS.md
diffusion = ''                  # a run of a diffusion model; '' = the figures of RESULTS.md
stories = 256                   # how many stories to measure the loss by t on
remasking = 'low_confidence'    # of the story that is written: the surest guesses first; or 'random'
temperature = 1.0               # of its guesses; 0 writes the same story whatever the seed

# (updates, bits/byte of held-out documentation), from "The first run" in RESULTS.md
FIRST_RUN = {
    'autoregressive': [(400, 1.812), (800, 1.813), (1200, 2.052), (1600, 2.321)],
    'diffusion': [(400, 2.194), (800, 2.011), (1200, 1.877), (1600, 1.805)]}
# (updates, bound / entropy of made-up stories), from "Longer runs" in RESULTS.md
LONGER_RUNS = {
    'uniform t': [(4000, 1.030), (8000, 1.016), (16000, 1.005), (32000, 1.002)],
    'width 0.75': [(4000, 1.012), (8000, 1.006), (16000, 1.002), (32000, 1.001)]}


def draw_stories(run, n, seed):
    """Draw n new stories -> x0 (n, T), maskable (n, T) as in training, and their mean -log p in nats."""
    # in the windows of a text, the EOS of the story before stands where examples have BOS
    start = run.tok.eos_id if run.masking == 'unified' else run.tok.bos_id
    rng = random.Random(f'pictures {seed}')
    drawn = [worlds.story(rng) for _ in range(n)]
    rows = [torch.tensor([start, *run.tok.encode(story), run.tok.eos_id]) for story, _, _ in drawn]
    x0 = pad_sequence(rows, batch_first=True, padding_value=run.tok.eos_id)
    maskable = torch.arange(x0.shape[1]).expand_as(x0) > 0
    return x0, maskable, -sum(log_p for _, log_p, _ in drawn) / n


def canvas(run, cfg, tries=16):
    """Draw how a story is written: the first of some that contradicts itself nowhere, or else the first."""
    x0, _, _ = draw_stories(run, 1, cfg.seed)
    new = cfg.gen_length or x0.shape[1] - 1
    history = []
    rows, _ = sample.generate_text(
        run.model, [x0[0, :1].tolist()] * tries, new, run.tok, sample.sampling_params(cfg, new),
        seeds=[(cfg.seed, k) for k in range(tries)], on_step=lambda x, committed: history.append(committed))
    told = [sample.answer_text(row[1:], run.tok) for row in rows]
    k = next((k for k, story in enumerate(told) if worlds.readings(story)), 0)
    step_of = torch.stack(history)[:, k, 1:].int().argmax(0).tolist()

    # When each step comes, in per cent of the loop. svg.css says how long that is.
    style = ''
    for step in range(len(history)):
        at = 6 + 63 * step / len(history)
        style += (f'@keyframes m{step}{{0%{{opacity:1}}{at:.2f}%{{opacity:0}}}}'
                  f'@keyframes w{step}{{0%{{opacity:0}}{at:.2f}%{{opacity:1}}}}'
                  f'@keyframes n{step}{{{at:.2f}%{{opacity:1}}{at + 9:.2f}%{{opacity:0}}}}\n')
    placed, bottom = place(rows[k][1:], run.tok, 92, 20)
    body = []
    for (word, where), step in zip(placed, step_of):
        mask, written, new = (f'style="animation-name:{name}{step}"' for name in 'mwn')
        body.append(f'<g class="moves jumps" {written}><rect class="new gone moves" {where} {new}/>{word}</g>'
                    f'<rect class="mask gone moves jumps" {where} {mask}/>')
    for kind in ('edge', 'blue bar moves'):
        body.append(f'<rect class="{kind}" x="{LEFT}" y="{bottom + 32:g}" width="{RIGHT - LEFT}" height="4" '
                    'rx="2" style="animation-name:bar"/>')
    body += [text(LEFT, bottom + 62, 't = 1, all is hidden'),
             text(RIGHT, bottom + 62, 't = 0, all is written', more=END)]
    kept = 'one at random' if cfg.remasking == 'random' else 'the surest'
    caption = f'In each of {len(history)} steps the model guesses all masks, and keeps {kept} of its guesses.'
    return page('A model writes a story, in any order', told[k], caption, round(bottom + 100), body, style)


def forward(run, cfg):
    """Draw a story at three levels of noise."""
    x0, maskable, _ = draw_stories(run, 1, cfg.seed)
    ids = x0[0, 1:].tolist()
    u = torch.rand(x0.shape, generator=keyed_generator(cfg.seed))
    body = []
    bottom = 36
    for t in (0.2, 0.5, 0.9):
        _, masked = forward_process(x0, torch.tensor([t]), run.tok.mask_id, maskable, u=u)
        hidden = f'{int(masked.sum())} of {len(ids)} are hidden, weight 1/t = {1 / t:.2g}'
        body += [text(LEFT, bottom + 50, f't = {t}', 'blue', 20, 'font-weight="600"'),
                 text(RIGHT, bottom + 50, hidden, more=END)]
        placed, bottom = place(ids, run.tok, bottom + 86, 19)
        for (word, where), covered in zip(placed, masked[0, 1:]):
            body.append(f'<rect class="mask" {where}/>' if covered else word)
    caption = 'Each token draws a number between 0 and 1, and is hidden if that is less than t.'
    about = sample.answer_text(ids, run.tok)
    return page('The forward process hides a story', about, caption, round(bottom + 52), body)


def crossing(run, cfg):
    """Draw the bits/byte of two runs against their updates."""
    runs = dict(FIRST_RUN)
    for family, name in (('autoregressive', cfg.ar), ('diffusion', cfg.diffusion)):
        if name:
            reports = [entry for entry in experiments.read_log(name) if 'val_bits_per_byte' in entry]
            runs[family] = [(entry['iter'], entry['val_bits_per_byte']) for entry in reports]
    xs, ys = zip(*runs['autoregressive'], *runs['diffusion'])
    labels = 'updates', 'bits/byte of held-out text (≤ is a bound)'
    body, at = chart((0, max(xs)), (min(ys) - 0.05, max(ys)), labels)
    # a curve that ends high has its label on the left, the other one below
    styles = ('autoregressive', 'orange', '=', -14, 6), ('diffusion', 'blue', '≤', 0, 30)
    for family, kind, sign, dx, dy in styles:
        last = f'{family} {sign} {runs[family][-1][1]:.3f}'
        body += curve(runs[family], at, kind, last, -1, dx, dy)
    caption = ('The same Transformer reads the same text again and again, '
               'from left to right or under ever new masks.')
    about = '. '.join(f'{family}: {points}' for family, points in runs.items())
    return page('Who learns more from the same text?', about, caption, 474, body)


def curve(points, at, kind, label, k, dx, dy):
    """Return a line through points, and a label at a distance from the k-th."""
    places = [at(*point) for point in points]
    x, y = places[k]
    return [text(x + dx, y + dy, label, f'{kind} halo', more=END), line(kind, places, 'stroke-width="3"', 5)]


def longer(run, cfg):
    """Draw how far the loss on stories is above their entropy, for two choices of t, against the updates."""
    curves = {t: [(math.log2(n / 4000), 100 * (ratio - 1)) for n, ratio in points] for t, points in LONGER_RUNS.items()}
    xs, ys = zip(*(point for points in curves.values() for point in points))
    body, at = chart((0, max(xs)), (0, max(ys)), ('doublings of 4000 updates', '% of the bound above the entropy'))
    body += curve(curves['uniform t'], at, 'orange', 'uniform t', 1, 100, -10)
    body += curve(curves['width 0.75'], at, 'blue', 'width 0.75', 1, -10, 30)
    caption = 'With uniform t a model needs about twice as many updates for the same loss.'
    about = '. '.join(f'{t}: {points}' for t, points in LONGER_RUNS.items())
    return page('Which t to train on?', about, caption, 474, body)


@torch.no_grad()
def by_t(run, cfg):
    """Draw the nats per hidden token by the share that is hidden, and their mean, the bound of Eq. 6."""
    x0, maskable, entropy = draw_stories(run, cfg.stories, cfg.seed)
    L = x0.shape[1] - 1
    points = []
    for n in range(1, L + 1):
        # tokens are hidden in the same order each time, so that the curve is smooth
        noise = keyed_generator(cfg.seed)
        # halfway between two counts, so that rounding cannot change how many are hidden
        nats = [experiments.hidden_nats(run, *part, (n - 0.5) / L, noise)
                for part in zip(x0.split(64), maskable.split(64))]
        points.append((n / L, torch.cat(nats).mean().item()))
    bound = sum(y for _, y in points) / L
    floor = entropy / L

    labels = 'share of the story that is hidden', 'nats per hidden token'
    body, at = chart((0, 1), (0, max(y for _, y in points)), labels)
    body += [line('orange', [at(0, floor), at(1, floor)], 'stroke-width="2"'),
             line('blue', [at(0, bound), at(1, bound)], 'stroke-width="2" stroke-dasharray="6 5"'),
             text(RIGHT - 10, at(1, floor)[1] + 24, f'entropy = {floor:.2f}', 'orange halo', more=END),
             text(LEFT + 46, at(0, bound)[1] - 10, f'loss ≤ {bound:.2f}, the mean', 'blue halo'),
             line('blue', [at(*point) for point in points], 'stroke-width="3"', 2.5)]
    caption = ('The mean of the curve bounds the loss per token (Eq. 6). '
               'So it cannot be lower than the entropy of the stories.')
    about = ', '.join(f'{x:.2f}: {y:.2f}' for x, y in points)
    return page('The more is hidden, the harder to guess', about, caption, 474, body)


def main(cfg):
    run = sample.load(cfg.checkpoint, cfg)
    experiments.refuse_causal(run, 'the pictures are of a diffusion model, and this one is autoregressive')
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    for draw in (canvas, forward, crossing, by_t, longer):
        svg = draw(run, cfg)
        path = Path(cfg.out) / f'{draw.__name__}.svg'
        path.write_text(svg, encoding='utf-8')
        print(f'{path}: {len(svg.encode()) / 1000:.1f} kB')


if __name__ == '__main__':
    command.run(main, globals(), sample, positional=('checkpoint',))
