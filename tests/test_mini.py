"""tests/exercises/mini_llada.py, the page that a reader begins with, agrees with the code that it points to."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import MASK, ROOT, T, seeded

sys.path.append(str(Path(__file__).resolve().parent / 'exercises'))

import mini_llada as mini  # noqa: E402
from checks import MODEL, P, frequencies, total_variation  # noqa: E402

import diffusion  # noqa: E402

FILE = ROOT / 'tests' / 'exercises' / 'mini_llada.py'


@pytest.fixture
def network():
    """A random network over 20 words."""
    torch.manual_seed(0)
    return mini.Transformer(20).eval()


def some_texts(n):
    return torch.randint(2, 20, (n, mini.T), generator=seeded(0))


def test_its_loss_is_that_of_diffusion_py(network):
    x0 = some_texts(6)
    # small and large mask ratios, and a row in which nothing is hidden
    t = torch.tensor([1e-6, 0.01, 0.3, 0.5, 0.9, 1.0])
    u = torch.rand(x0.shape, generator=seeded(1))
    xt, masked = diffusion.forward_process(x0, t, mini.MASK, u=u)
    weights = diffusion.loss_weights(torch.ones_like(masked), masked, t)
    batch = diffusion.masked_batch(x0, xt, masked, weights)

    losses = [mini.loss_of(network, x0, t, u), diffusion.diffusion_loss(diffusion.plain(network), batch)]
    torch.testing.assert_close(*losses)
    gradients = [torch.autograd.grad(loss, list(network.parameters())) for loss in losses]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize('n_given', [0, 4])
def test_its_sampler_is_generate_simple_token_for_token(network, n_given):
    for given in some_texts(20)[:, :n_given]:
        n = mini.T - n_given
        x = torch.cat((given, torch.full((n,), mini.MASK)))
        expected = diffusion.generate_simple(diffusion.plain(network), given, n, mini.MASK, steps=n)
        assert torch.equal(mini.fill(network, x[None])[0], expected)


def test_it_fills_gaps_of_different_sizes_one_word_per_text_and_step(network):
    x = some_texts(3)
    x[0, 2:6] = x[1, 7] = x[2] = mini.MASK
    steps = []
    filled = mini.fill(network, x, temperature=1.0, watch=steps.append)
    left = [(step == mini.MASK).sum(1).tolist() for step in steps]
    assert left == [[max(0, n - k) for n in (4, 1, mini.T)] for k in range(1, mini.T + 1)]
    assert torch.equal(filled[x != mini.MASK], x[x != mini.MASK])


def test_at_temperature_1_it_samples_what_the_model_knows(monkeypatch):
    monkeypatch.setattr(mini, 'MASK', MASK)
    torch.manual_seed(0)
    texts = mini.fill(MODEL, torch.full((20000, T), MASK), temperature=1.0)
    assert total_variation(frequencies(texts), P) < 0.02


@pytest.mark.slow
def test_its_data_are_first_lines_of_docstrings():
    x0, vocabulary = mini.tokenize(mini.first_lines())
    assert len(x0) > 500 and 300 < len(vocabulary) < 3000
    assert x0.shape[1] == mini.T and not (x0 == mini.MASK).any()
    texts = {mini.to_text(row, vocabulary) for row in x0}
    assert len(texts) == len(x0) and any(re.fullmatch('return the .*', text) for text in texts)
    # a text that has ended does not begin again
    assert not ((x0[:, :-1] == mini.END) & (x0[:, 1:] != mini.END)).any()


def test_it_learns_and_can_be_watched(capsys):
    torch.manual_seed(0)
    x0 = torch.tensor([[2, 3, 4, 5, 1, 1, 1, 1, 1, 1], [6, 7, 8, 9, 1, 1, 1, 1, 1, 1]])
    network = mini.Transformer(10)
    mini.train(network, x0, updates=200, B=16)
    assert 'update  200: loss' in capsys.readouterr().out
    # the two texts are known by heart, so one word is enough to tell which of them is meant
    for text in x0:
        x = torch.full((1, mini.T), mini.MASK)
        x[0, 2] = text[2]
        assert torch.equal(mini.fill(network, x)[0], text)


def test_it_needs_torch_only_and_importing_it_does_nothing():
    imported = set()
    for node in ast.walk(ast.parse(FILE.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split('.')[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split('.')[0])
    assert imported - set(sys.stdlib_module_names) == {'torch'}
    out = subprocess.run([sys.executable, '-c', 'import mini_llada'], cwd=FILE.parent, capture_output=True, text=True)
    assert (out.returncode, out.stdout, out.stderr) == (0, '', '')


def test_the_places_that_it_names_exist():
    places = re.findall(r'(\w+)\.py: ([\w, ]+)$', FILE.read_text(encoding='utf-8'), re.MULTILINE)
    assert len(places) == 5
    for file, names in places:
        source = (ROOT / f'{file}.py').read_text(encoding='utf-8')
        for name in names.split(', '):
            assert re.search(rf'^(def|class) {name}\b', source, re.MULTILINE), (file, name)
