"""tests/lab/pictures.py draws what was written, hidden and measured, so that any browser can show it."""

import json
import math
import re
import xml.etree.ElementTree as ET
from types import SimpleNamespace

import experiments
import pictures
import pytest
import svg
import torch
import worlds
from helpers import ROOT, script, seeded, tiny_model

import data
import diffusion
import model as models
import sample
from configurator import configure

NAMES = ('canvas', 'forward', 'crossing', 'by_t', 'longer')
ELEMENTS = {'svg', 'title', 'desc', 'style', 'rect', 'g', 'text', 'polyline', 'circle'}


def settings(**changes):
    namespace = {**vars(sample), **vars(pictures)}
    return SimpleNamespace(**{**configure(namespace, []), 'temperature': 0.0, **changes})


@pytest.fixture(scope='module')
def tok(tmp_path_factory):
    """A token for each word of the stories."""
    folder = tmp_path_factory.mktemp('words')
    worlds.words_of_the_world(folder)
    return data.get_tokenizer(str(folder))


def run_of(f, tok):
    """Make a sample.Run of a function ids (B, T) -> logits (B, T, V)."""
    predictor = diffusion.plain(f)
    predictor.config = SimpleNamespace(causal=False, vocab_size=tok.vocab_size)
    return sample.Run('a function', predictor, {}, tok, [tok.bos_id], 'response')


def story_of(tok, seed):
    """Return a story as text, and as ids with BOS and EOS."""
    x0, _, _ = pictures.draw_stories(run_of(None, tok), 1, seed)
    return tok.decode(x0[0].tolist(), skip_special_tokens=True), x0[0]


def read(picture):
    """Return the root of a picture, if it has nothing in it that README may not show."""
    assert len(picture.encode()) <= 60_000
    root = ET.fromstring(picture)
    for element in root.iter():
        assert element.tag.removeprefix('{http://www.w3.org/2000/svg}') in ELEMENTS
        assert not any('href' in name or name.startswith('on') for name in element.attrib)
    others = picture.replace('xmlns="http://www.w3.org/2000/svg"', '')
    assert not re.search(r'http|url\(|@import|@font-face|<!', others)
    assert '@media (prefers-color-scheme: dark)' in others
    assert root.get('viewBox') == f'0 0 {root.get("width")} {root.get("height")}'
    return root


def elements(root, name, kind=''):
    """Return the elements of a name that have a class."""
    found = root.iter('{http://www.w3.org/2000/svg}' + name)
    return [e for e in found if not kind or kind in e.get('class', '').split()]


def words_of(root):
    return [e.text for e in elements(root, 'text', 'code')]


def labels_of(root):
    return [e.text for e in elements(root, 'text')]


# ------------------------------------------------------------------------------------------------ all of them


def test_a_random_model_gets_its_four_pictures(tok, tmp_path, capsys):
    folder = tmp_path / 'model'
    model = tiny_model(vocab_size=tok.vocab_size, seq_len=40)
    models.save_model(model, folder, {f'{role}_id': getattr(tok, f'{role}_id') for role in models.ROLES})
    tok.save(folder)
    out = tmp_path / 'new' / 'pictures'
    script('tests/lab/pictures', folder, f'--out={out}', '--stories=3', '--remasking=random')
    said = capsys.readouterr().out
    for name in NAMES:
        root = read((out / f'{name}.svg').read_text(encoding='utf-8'))
        assert f'{name}.svg: ' in said and bool(words_of(root)) == (name in ('canvas', 'forward'))


@pytest.mark.parametrize('name', NAMES)
def test_the_pictures_of_the_project(name):
    root = read((ROOT / 'tests' / 'lab' / 'pictures' / f'{name}.svg').read_text(encoding='utf-8'))
    if name in ('canvas', 'forward'):
        story = root.find('{*}desc').text
        assert worlds.readings(story) and set(words_of(root)) <= {'EOS', *re.findall(r'\w+|\.', story)}


def test_an_autoregressive_model_is_refused(tok, tmp_path, capsys):
    model = tiny_model(vocab_size=tok.vocab_size, causal=True)
    models.save_model(model, tmp_path, {f'{role}_id': getattr(tok, f'{role}_id') for role in models.ROLES})
    tok.save(tmp_path)
    with pytest.raises(SystemExit):
        script('tests/lab/pictures', tmp_path, f'--out={tmp_path / "pictures"}')
    assert 'this one is autoregressive' in capsys.readouterr().err and not (tmp_path / 'pictures').exists()


# ----------------------------------------------------------------------------------------------- each of them


@pytest.mark.parametrize('steps', [0, 13])
def test_words_appear_in_the_order_in_which_they_were_written(tok, steps):
    """A model that knows a story, and is the surer of a word the later it stands, writes it from the end."""
    story, ids = story_of(tok, 5)
    T = len(ids)
    logits = torch.nn.functional.one_hot(ids, tok.vocab_size) * torch.linspace(5, 12, T)[:, None]
    picture = pictures.canvas(run_of(lambda x: logits.expand(len(x), -1, -1), tok), settings(steps=steps))
    root = read(picture)
    assert root.find('{*}desc').text == story and ''.join(words_of(root)) == story.replace(' ', '') + 'EOS'

    written = [e.get('style').removeprefix('animation-name:') for e in elements(root, 'g', 'moves')]
    n = steps or T - 1
    assert written == [f'w{(T - 2 - i) * n // (T - 1)}' for i in range(T - 1)]
    assert f'In each of {n} steps' in ' '.join(labels_of(root))

    # a word comes when its mask goes, one step after the other, and then the story stands for a while
    times = re.findall(r'@keyframes ([mw]\d+){0%{opacity:[01]}([\d.]+)%', picture)
    gone, come = ([float(at) for name, at in times if name[0] == kind] for kind in 'mw')
    assert gone == come == sorted(set(come)) and len(come) == n and come[-1] < 70
    masks = elements(root, 'rect', 'mask')
    assert [mask.get('style') for mask in masks] == [f'animation-name:m{name[1:]}' for name in written]
    assert [mask.get('x') for mask in masks] == [word[0].get('x') for word in elements(root, 'g', 'moves')]


def test_a_story_without_contradictions_is_preferred(tok):
    """One sample of 16 is a story. In the others each third word is "mill"."""
    story, ids = story_of(tok, 5)
    good = torch.nn.functional.one_hot(ids, tok.vocab_size) * 40.0
    logits = good.repeat(16, 1, 1)
    logits[:, ::3, tok.encode(' mill')[0]] = 80
    logits[11] = good
    run = run_of(lambda x: logits, tok)
    assert read(pictures.canvas(run, settings())).find('{*}desc').text == story


def test_the_forward_process_hides_more_and_more_of_a_story(tok):
    story, ids = story_of(tok, 2)
    root = read(pictures.forward(run_of(None, tok), settings(seed=2)))
    assert root.find('{*}desc').text == story
    counts = [int(label.split()[0]) for label in labels_of(root) if 'are hidden' in label]
    assert len(counts) == 3 and counts == sorted(counts)
    assert len(elements(root, 'rect', 'mask')) == sum(counts)
    assert len(words_of(root)) == 3 * (len(ids) - 1) - sum(counts)

    # the places are those of the whole story, and what can be seen at a large t can be seen at a smaller one
    shown = {0.2: set(), 0.5: set(), 0.9: set()}
    for e in elements(root, 'text', 'code'):
        y = float(e.get('y'))
        above = [label for label in elements(root, 'text', 'blue') if float(label.get('y')) < y][-1]
        t = float(above.text.removeprefix('t = '))
        shown[t].add((e.get('x'), round(y - float(above.get('y'))), e.text))
    assert shown[0.9] <= shown[0.5] <= shown[0.2]
    assert [len(ids) - 1 - len(places) for places in shown.values()] == counts
    assert [label[-3:] for label in labels_of(root) if 'weight' in label] == ['= 5', '= 2', '1.1']


def test_the_curves_of_two_runs_are_those_of_their_logs(tok, tmp_path):
    for name, bits in (('a', (2.5, 2.0, 2.25)), ('d', (3.0, 2.5, 1.75))):
        (tmp_path / name).mkdir()
        lines = [{'iter': 10 * k, 'val_nats': 1.0, 'val_bits_per_byte': b} for k, b in enumerate(bits, 1)]
        lines.insert(1, {'iter': 15, 'loss': 9.0})
        (tmp_path / name / 'log.jsonl').write_text('\n'.join(map(json.dumps, lines)))
    root = read(pictures.crossing(None, settings(ar=str(tmp_path / 'a'), diffusion=str(tmp_path / 'd'))))
    labels = labels_of(root)
    assert 'autoregressive = 2.250' in labels and 'diffusion ≤ 1.750' in labels
    dots = [(float(dot.get('cx')), float(dot.get('cy'))) for dot in elements(root, 'circle')]
    (a10, a20, a30), (d10, d20, d30) = dots[:3], dots[3:]
    assert a10[0] == d10[0] and a20[0] - a10[0] == pytest.approx(a30[0] - a20[0], abs=0.2)
    # up is worse, and equal numbers are equally high
    assert a10[1] == d20[1] and d10[1] < a10[1] < a30[1] < a20[1] < d30[1]


def test_the_figures_of_the_first_run_are_in_the_results():
    results = (ROOT / 'tests' / 'lab' / 'RESULTS.md').read_text(encoding='utf-8')
    section = results.split('## The first run')[1].split('\n## ')[0]
    for family, points in pictures.FIRST_RUN.items():
        assert [x for x, _ in points] == [400, 800, 1200, 1600], family
        assert all(f'{bits:.3f}' in section for _, bits in points), family


def test_the_figures_of_longer_runs_are_in_the_results():
    results = (ROOT / 'tests' / 'lab' / 'RESULTS.md').read_text(encoding='utf-8')
    rows = results.split('**Longer runs.**')[1].replace('*', '').splitlines()
    for name, points in pictures.LONGER_RUNS.items():
        row, = (row for row in rows if row.startswith(f'| {name} |'))
        assert re.findall(r'<= ([\d.]+)', row) == [f'{ratio:.3f}' for _, ratio in points], name
    # one dot for each, and less is lower
    root = read(pictures.longer(None, settings()))
    heights = [float(dot.get('cy')) for dot in elements(root, 'circle')]
    ratios = [ratio for points in pictures.LONGER_RUNS.values() for _, ratio in points]
    order = sorted(range(len(ratios)), key=ratios.__getitem__)
    assert [heights[k] for k in order] == sorted(heights, reverse=True)


def test_the_loss_by_t_of_a_model_that_knows_nothing(tok):
    """It needs log V nats for each token, whatever is hidden."""
    run = run_of(lambda x: torch.zeros(*x.shape, tok.vocab_size), tok)
    root = read(pictures.by_t(run, settings(stories=5, seed=3)))
    labels = labels_of(root)
    assert f'loss ≤ {math.log(tok.vocab_size):.2f}, the mean' in labels
    x0, maskable, entropy = pictures.draw_stories(run, 5, 3)
    assert f'entropy = {entropy / 39:.2f}' in labels and maskable.sum(1).tolist() == [39] * 5
    heights = {dot.get('cy') for dot in elements(root, 'circle')}
    assert len(elements(root, 'circle')) == 39 and len(heights) == 1


def test_new_stories_and_their_entropy(tok):
    x0, maskable, entropy = pictures.draw_stories(run_of(None, tok), 40, 0)
    told = [tok.decode(row.tolist(), skip_special_tokens=True) for row in x0]
    log_p = [worlds.readings(story)[0] for story in told]
    assert entropy == pytest.approx(-sum(log_p) / 40) and len(set(told)) == 40
    assert (x0[:, 0] == tok.bos_id).all() and (x0[:, -1] == tok.eos_id).all()
    assert torch.equal(maskable, torch.arange(x0.shape[1]).expand_as(x0) > 0)


@pytest.mark.parametrize('t', [0.2, 0.7, 1.0])
def test_nats_of_a_batch_are_those_of_its_rows(t):
    model = tiny_model()
    run = SimpleNamespace(model=model, tok=SimpleNamespace(mask_id=39))
    x0 = torch.randint(0, 39, (3, 16), generator=seeded(1))
    maskable = torch.arange(16) >= torch.tensor([[0], [4], [9]])
    with torch.no_grad():
        got = experiments.hidden_nats(run, x0, maskable, t, seeded(2))
        xt, masked = diffusion.forward_process(
            x0, torch.full((3,), t), 39, maskable, fixed_count=True, generator=seeded(2))
        for b in range(3):
            logp = model(xt[b:b + 1])[0].log_softmax(-1)[masked[b], x0[b][masked[b]]]
            assert got[b] == pytest.approx(-logp.mean().item(), rel=1e-5)


# ----------------------------------------------------------------------------------------------------- pieces


def test_lines_end_before_the_margin(tok):
    story, ids = story_of(tok, 0)
    placed, bottom = svg.place(ids[1:].tolist(), tok, 100, 20)
    boxes = [ET.fromstring(f'<a {where}/>') for _, where in placed]
    lefts, widths, tops = ([float(box.get(name)) for box in boxes] for name in ('x', 'width', 'y'))
    assert min(lefts) == svg.LEFT + 1 and max(x + w for x, w in zip(lefts, widths)) <= svg.RIGHT
    assert tops == sorted(tops) and bottom == tops[-1] + 20 == 100 + 34 * (len(set(tops)) - 1)
    # within a line a full stop touches its word, and between words there is a blank of 12
    words = [ET.fromstring(word).text for word, _ in placed]
    for k in range(1, len(words)):
        if tops[k] == tops[k - 1]:
            gap = lefts[k] - lefts[k - 1] - 12 * len(words[k - 1])
            assert gap == pytest.approx(0 if words[k] == '.' else 12)
        else:
            assert lefts[k] == svg.LEFT + 1 and words[k] != '.'


@pytest.mark.parametrize('low, high', [
    (0, 1), (0, 1600), (1.755, 2.321), (0, 1.32), (-3, 17), (0.001, 0.0042), (0, 9e6)])
def test_an_axis_has_round_numbers_around_its_values(low, high):
    ticks, place = svg.axis(low, high, 100, 20)
    assert 3 <= len(ticks) <= 7 and ticks[0] <= low < ticks[1] and ticks[-2] < high <= ticks[-1]
    steps = [b - a for a, b in zip(ticks, ticks[1:])]
    assert max(steps) == pytest.approx(min(steps))
    assert f'{steps[0]:.0e}'[0] in '1245'
    assert [place(ticks[0]), place(ticks[-1])] == pytest.approx([100, 20])
    assert place((ticks[0] + ticks[-1]) / 2) == pytest.approx(60)


def test_whatever_is_written_is_no_markup():
    page = svg.page('a', 'b & <script>', 'c', 10, [svg.text(1, 2, '</text>\x00\x1b<script>"')])
    root = read(page)
    assert root.find('{*}desc').text == 'b & <script>'
    assert '</text>··<script>"' in labels_of(root)
