"""The page of a generation (tests/lab/trace.py), and what else the sampler can do (tests/lab/hooks.py)."""

import json
import re
import runpy
import shutil
import subprocess
from types import SimpleNamespace

import hooks
import pytest
import torch
from helpers import ROOT, script, tiny_model
from test_sample import checkpoint

import data
import diffusion
import evaluate
import sample
from diffusion import SamplingParams

# by its path, because Python has a module of this name as well
trace = runpy.run_path(str(ROOT / 'tests' / 'lab' / 'trace.py'))


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp('run'), 'unified')


# --------------------------------------------------------------------------------------------------- the page


def read_page(path):
    """Return the data of a page: facts, steps, tokens, guesses."""
    text = path.read_text(encoding='utf-8')
    assert text.count('</script>') == 1 and 'http' not in text          # no text can end the script
    return json.loads(re.search('^const data = (.*);', text, re.M)[1])


@pytest.mark.parametrize('more', [[], ['--variable_length', '--block_length=4']])
def test_the_page_holds_every_token_with_the_step_that_wrote_it(run, tmp_path, capsys, more):
    page = tmp_path / 'new' / 'page.html'
    script('tests/lab/trace', run, '--prompt=a </script> b', '--gen_length=8', f'--out={page}', *more)
    assert capsys.readouterr().out.splitlines()[-1] == f'wrote {page}'
    data = read_page(page)
    pieces, born, written, sure = zip(*data['tokens'])
    assert len(pieces) == 13 + 8 and ''.join(pieces[:-8]) == 'a </script> b'
    assert set(written[:-8]) == {0} and sorted(written[-8:]) == list(range(1, 9)) and data['steps'] == 8
    assert set(born) == ({0, 4} if more else {0})
    assert all(0 <= percent <= 100 for percent in sure[-8:]) and set(sure[:-8]) == {None}

    # before each step there are three guesses for each mask of the block
    for step, seen in enumerate(data['guesses']):
        block = [i for i, w in enumerate(written) if w > step and (not more or (w > 4) == (step > 3))]
        assert sorted(map(int, seen)) == block and all(len(best) == 3 for best in seen.values())

    # and what was asked for
    settings = 'temperature 1.0, remasking random, seed 1337'
    if more:
        settings = f'block_length 4, {settings}, variable_length True'
    assert data['facts'] == {'checkpoint': str(run), 'prompt': 'a </script> b', 'settings': settings,
                             'written': '8 tokens in 8 forward passes'}


def test_the_page_explains_itself():
    """Whatever a reader can do is said on it: keys, pointing, and what each look means."""
    page = (ROOT / 'tests' / 'lab' / 'trace.html').read_text(encoding='utf-8')
    legend = re.sub('<[^>]*>', '', page[page.index('</style>'):page.index('<script>')])
    keys = {'" "': 'space plays', 'ArrowLeft': '←', 'ArrowRight': '→', 'Home': 'Home', 'End': 'End'}
    for key, said in keys.items():
        assert f'{key}: ' in page and said in legend
    looks = {'given': 'given', 'mask': 'still hidden', 'now': 'written in this step'}
    for look, said in looks.items():
        assert f'.{look} {{' in page and f'"{look}"' in page and said in legend
    assert 'Point at a token, or tap it' in page


@pytest.mark.parametrize('argv, message', [
    (['--prompt=a', '--prompt=b'], 'one prompt, got 2'), (['--out=tests'], 'tests already exists')])
def test_a_page_that_cannot_be_written(run, tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'tests').mkdir()
    with pytest.raises(SystemExit) as stopped:
        script('tests/lab/trace', run, *argv)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


BROWSER = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)


@pytest.mark.skipif(not BROWSER, reason='no Chromium here')
def test_the_page_in_a_browser(run, tmp_path):
    """It opens on the finished text, and whatever step is chosen has the right number of masks."""
    page = tmp_path / 'a.html'
    script('tests/lab/trace', run, '--prompt=a </script> b', '--gen_length=8', f'--out={page}')
    html = page.read_text(encoding='utf-8')
    last = 'document.querySelector("#text").lastChild.click();'
    press = 'document.onkeydown({key: "ArrowLeft", target: at("text"), preventDefault() {}});'
    cases = (
        ('', 8, 0, 'Point at a token'), (f'move(8); {press}', 7, 1, 'Point at a token'),
        (f'move(8); {last}', 8, 0, 'was written in step '),
        (f'move(3); {last}', 3, 5, ''), (f'move(0); {last}', 0, 8, 'the next guesses are '))
    # one visit: after each act the page is copied to its end
    keep = 'shots.push(document.body.innerHTML);'
    acts = ''.join(f'{act}\n{keep}\n' for act, *_ in cases)
    acts = f'let shots = [];\n{acts}\ndocument.body.innerHTML = shots.join("<hr id=next>");'
    page.write_text(html.replace('draw();\n</script>', f'draw();\n{acts}\n</script>'), encoding='utf-8')
    dumped = subprocess.run(
        [BROWSER, '--headless', '--no-sandbox', '--disable-gpu', '--dump-dom',
         f'--user-data-dir={tmp_path / "profile"}', page.as_uri()],
        capture_output=True, text=True, timeout=60).stdout
    for (act, step, masks, about), drawn in zip(cases, dumped.split('<hr id="next">'), strict=True):
        text = re.search('<p id="text">(.*?)</p>', drawn, re.S)[1]
        assert f'step {step} of 8' in drawn and text.count('class="mask"') == masks, act
        assert about in re.search('<p id="about"[^>]*>(.*?)</p>', drawn, re.S)[1], act
        assert 'a &lt;/script&gt; b' in drawn and 'temperature 1.0' in drawn


def test_characters_of_several_tokens_appear_with_the_last_one():
    tok = data.get_tokenizer('bytes')
    ids = tok.encode('é👍a')
    assert trace['pieces_of'](ids, tok) == ['', 'é', '', '', '', '👍', 'a']
    pieces = trace['pieces_of']([*ids[:1], tok.mask_id, *tok.encode('b')], tok)
    assert pieces == ['\ufffd', '░', 'b']


def test_only_what_may_be_written_is_a_guess():
    """[MASK] and rows of the head without a token never are, however likely. The others add up to 1."""
    tok = data.get_tokenizer('bytes')
    logits = torch.zeros(2, tok.vocab_size + 3)
    logits[:, [tok.mask_id, tok.vocab_size + 1]] = 9.0
    logits[1, ord('a')] = 20.0
    x = torch.tensor([[ord('x'), tok.mask_id, tok.mask_id]])
    noted = trace['Trace'](tok)
    assert noted.look(logits, x, x == tok.mask_id) is logits
    assert noted.guesses[0][2][0] == ['a', 100]
    for p in noted.probabilities.values():
        assert p.sum() == pytest.approx(1) and p[[tok.mask_id, tok.vocab_size + 1]].tolist() == [0, 0]


# ------------------------------------------------------------------------------------------- end of a thought


@pytest.mark.parametrize('row, column, token', [
    ([1, 2, 5, 39, 39, 39], 3, 7), ([1, 2, 7, 39, 39, 39], 3, 8), ([1, 2, 7, 8, 39, 39], 4, None),
    ([1, 7, 39, 39, 39, 39], 2, 7)])                            # a 7 in the prompt is not of the thought
def test_end_think_by_hand(row, column, token):
    """The end is 7 8. The boost goes to 7, after a 7 to 8, and once 7 8 is there to nobody."""
    x = torch.tensor([row])
    logits = torch.zeros(row.count(39), 40)
    expected = logits.clone()
    if token is not None:
        expected[0, token] = 10.0 * ((column - 2 + 1) / 4) ** 2
    hook = hooks.end_think(2, 4, [7, 8], boost=10.0, power=2.0)
    assert torch.equal(hook(logits, x, x == 39), expected)


def test_end_think_ends_a_thought(run):
    r = sample.load(run, sample)
    ids = r.tok.encode('</think>')
    prompts = [r.tok.encode('a'), r.tok.encode('some text')]
    params = SamplingParams(block_length=8)
    options = dict(seeds=[(0,), (1,)], variable_length=True)
    free, _ = sample.generate_text(r.model, prompts, 64, r.tok, params, **options)
    ended, _ = hooks.generate_with_end_think(r.model, prompts, 64, r.tok, params, **options)
    for prompt, a, b in zip(prompts, free, ended):
        assert not hooks.contains(a, ids) and hooks.contains(b, ids) and b[:len(prompt)] == prompt


def test_evaluate_with_an_end_of_thoughts(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sample, 'generate_text', sample.generate_text)  # put back what the script replaces
    (tmp_path / 'a.jsonl').write_text('{"question": "1 + 1?", "answer": "2"}')
    script('tests/lab/hooks', 'exact', run, f'--input={tmp_path / "a.jsonl"}', '--show=1', '--gen_length=64',
           '--variable_length', '--block_length=8')
    assert '</think>' in capsys.readouterr().out


# ------------------------------------------------------------------------------------- gaps of unknown length


def test_an_infill_is_scored_with_its_neighbours(monkeypatch):
    seen = []
    real = diffusion.log_likelihood

    def noted(model, x0, maskable, mask_id, **options):
        seen.append(maskable.nonzero()[:, 0].tolist())
        return real(model, x0, maskable, mask_id, **options)

    monkeypatch.setattr(diffusion, 'log_likelihood', noted)
    model = tiny_model()
    prompt = [39, 1, 2, 3, 4, 39, 39, 5, 6, 7]
    filled = [9, 1, 2, 3, 4, 9, 9, 5, 6, 7]
    assert hooks.infill_score(model, prompt, filled, 39) < 0
    assert hooks.infill_score(model, prompt, filled, 39, neighbours=0) < 0
    assert seen == [[0, 1, 2, 3, 4, 5, 6, 7, 8], [0, 5, 6]]


def test_all_lengths_that_fit_are_tried_and_the_best_comes_first(run, monkeypatch, capsys):
    tried = []

    def score(model, prompt, filled, mask_id, seed):
        n = prompt.count(mask_id)
        tried.append(n)
        assert len(filled) == len(prompt) and mask_id not in filled
        return -abs(n - 5)

    monkeypatch.setattr(hooks, 'infill_score', score)
    cfg = SimpleNamespace(**{**vars(sample), **vars(evaluate), 'checkpoints': [run], 'prompt': ['one ___ x']})
    hooks.gaps(cfg)
    lines = capsys.readouterr().out.splitlines()
    assert tried == list(range(1, 9)) and len(lines) == 9
    assert lines[0] == 'one ___ x' and ' 5 tokens' in lines[1]
    cfg.prompt = ['a' * 91 + '___']
    hooks.gaps(cfg)
    assert tried[8:] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize('prompt', ['without a gap', 'x' * 96 + '___'])
def test_there_must_be_a_gap_that_fits(run, capsys, prompt):
    with pytest.raises(SystemExit):
        script('tests/lab/hooks', 'gaps', run, f'--prompt={prompt}')
    assert 'has no ___' in capsys.readouterr().err
