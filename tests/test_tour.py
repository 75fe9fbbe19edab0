"""tests/exercises/tour.ipynb: every cell runs, what is saved is in order, and what its texts promise is true.

    python tests/test_tour.py               # runs the notebook from the top, and saves it with its outputs

Do that when the weights or a cell have changed. It needs no Jupyter.
"""

import ast
import contextlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / 'tests' / 'exercises' / 'tour.ipynb'
WEIGHTS = NOTEBOOK.parent / 'stories'
needs_weights = pytest.mark.skipif(not WEIGHTS.is_dir(), reason='tests/exercises/stories is not there')


# ----------------------------------------------------------------------------------------------------------
# Run a notebook


def read_notebook():
    return json.loads(NOTEBOOK.read_text(encoding='utf-8'))


def code_cells(notebook):
    return [cell for cell in notebook['cells'] if cell['cell_type'] == 'code']


def source(cell):
    return ''.join(cell['source'])


@contextlib.contextmanager
def as_in_jupyter():
    """Be in the notebook's folder, and undo afterwards what its cells set for the whole process."""
    folder, path, grad, threads = os.getcwd(), sys.path[:], torch.is_grad_enabled(), torch.get_num_threads()
    os.chdir(NOTEBOOK.parent)
    try:
        yield
    finally:
        os.chdir(folder)
        sys.path[:] = path
        torch.set_grad_enabled(grad)
        torch.set_num_threads(threads)


def execute(notebook):
    """Run the code cells in order, in one namespace, and put their outputs into them -> the namespace."""
    namespace = {'__name__': '__main__'}
    with as_in_jupyter():
        for number, cell in enumerate(code_cells(notebook), 1):
            printed, value = run_cell(source(cell), cell['id'], namespace)
            cell['execution_count'] = number
            cell['outputs'] = outputs_of(printed, value, number)
    return namespace


def run_cell(text, name, namespace):
    """Run a cell -> what it printed, and the value of its last line if that is an expression, as in Jupyter."""
    tree = ast.parse(text)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    value = None
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(tree, f'cell {name}', 'exec'), namespace)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), f'cell {name}', 'eval'), namespace)
    return printed.getvalue(), value


def outputs_of(printed, value, number):
    """Return what a cell has printed, and its value if it has one, as the notebook format wants them."""
    outputs = []
    if printed:
        outputs.append({'name': 'stdout', 'output_type': 'stream', 'text': printed.splitlines(keepends=True)})
    if value is not None:
        shown = {'text/plain': repr(value).splitlines(keepends=True)}
        if hasattr(value, '_repr_svg_'):
            shown['image/svg+xml'] = value._repr_svg_().splitlines(keepends=True)
        outputs.append({'data': shown, 'execution_count': number, 'metadata': {}, 'output_type': 'execute_result'})
    return outputs


def main():
    notebook = read_notebook()
    execute(notebook)
    # as Jupyter writes it, so that only what has changed differs if it is saved there
    text = json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True)
    NOTEBOOK.write_text(text + '\n', encoding='utf-8')
    print(f'{NOTEBOOK}: ran and saved {len(code_cells(notebook))} cells')


# ----------------------------------------------------------------------------------------------------------
# What is saved


def test_the_file_is_a_notebook_of_format_4():
    notebook = read_notebook()
    assert notebook.keys() == {'cells', 'metadata', 'nbformat', 'nbformat_minor'}
    assert (notebook['nbformat'], notebook['nbformat_minor']) == (4, 5)
    assert notebook['metadata']['kernelspec'].keys() == {'display_name', 'language', 'name'}
    assert notebook['metadata']['language_info']['name'] == 'python'

    common = {'cell_type', 'id', 'metadata', 'source'}
    fields = {'markdown': common, 'code': common | {'execution_count', 'outputs'}}
    for cell in notebook['cells']:
        assert cell.keys() == fields[cell['cell_type']]
        assert re.fullmatch('[A-Za-z0-9_-]{1,64}', cell['id']) and isinstance(cell['metadata'], dict)
        assert cell['source'] and all(line.endswith('\n') for line in cell['source'][:-1])
    assert len({cell['id'] for cell in notebook['cells']}) == len(notebook['cells'])


def test_every_cell_is_saved_with_its_output_and_without_an_error():
    cells = code_cells(read_notebook())
    assert [cell['execution_count'] for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        kinds = [output['output_type'] for output in cell['outputs']]
        assert kinds and set(kinds) <= {'stream', 'execute_result'}, cell['id']
        for output in cell['outputs']:
            assert output.get('name', 'stdout') == 'stdout'                             # no warnings


def test_it_is_small_and_says_nothing_of_the_machine():
    text = NOTEBOOK.read_text(encoding='utf-8')
    assert len(text.encode()) <= 150_000
    assert str(ROOT) not in text and str(Path.home()) + '/' not in text


def test_cells_are_short_and_stand_between_texts():
    cells = read_notebook()['cells']
    assert [cell['cell_type'] for cell in cells] == ['markdown', 'code'] * (len(cells) // 2) + ['markdown']
    for cell in code_cells(read_notebook()):
        lines = source(cell).splitlines()
        assert len(lines) <= 12 and max(map(len, lines)) <= 110, cell['id']


# ----------------------------------------------------------------------------------------------------------
# What a reader sees who runs it


def test_it_finds_the_project_from_its_own_folder():
    first = source(code_cells(read_notebook())[0])
    ran = subprocess.run([sys.executable, '-c', first], cwd=NOTEBOOK.parent, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert 'diffusion.py' in ran.stdout


@pytest.fixture(scope='module')
def played():
    """Return the notebook after a run of all cells, and its variables."""
    notebook = read_notebook()
    return notebook, execute(notebook)


@needs_weights
def test_every_cell_runs_and_shows_what_was_saved(played):
    """The same kinds of output. (Figures may differ in their last digits on another processor.)"""
    def shapes(notebook):
        return [[(output['output_type'], sorted(output.get('data', ()))) for output in cell['outputs']]
                for cell in code_cells(notebook)]

    assert shapes(played[0]) == shapes(read_notebook())


@needs_weights
def test_the_texts_are_right_about_learning_and_likelihood(played):
    _, seen = played
    # a neighbour decides: of ten colours one is left
    i, = seen['tok'].encode(' red')
    p, q = (seen[name].softmax(-1)[i] for name in ('hidden_logits', 'revealed_logits'))
    assert 0.03 < p < 0.3 and q > 0.9

    # the more is hidden, the harder it is, and the loss is the mean over t
    nats = list(seen['nats'].values())
    assert nats[0] < nats[4] < nats[-1]
    mean = sum(nats) / len(nats)
    assert mean == pytest.approx(seen['entropy'], rel=0.15)
    for values in seen['losses'].values():
        assert sum(values) / len(values) == pytest.approx(mean, rel=0.1)

    # Eq. 6 scatters less with more masks, around a number near the truth
    spread = {name: torch.tensor([v for _, v in points]).std() for name, points in seen['estimates'].items()}
    assert spread['4 masks'] > 2 * spread['64 masks'] > 0
    assert seen['bound'] == pytest.approx(seen['truth'], abs=3)
    # contradictions cost several nats, another colour does not
    as_it_is, colour, *contradictions = seen['scores'].values()
    assert abs(colour - as_it_is) < 2 and max(contradictions) < as_it_is - 3

    # every order gives nearly the same sum
    assert all(value == pytest.approx(seen['truth'], abs=6) for value in seen['sums'].values())


@needs_weights
def test_the_texts_are_right_about_writing(played):
    _, seen = played
    tok = seen['tok']

    def probability(logits, word):
        i, = tok.encode(f' {word}')
        return logits.softmax(-1)[i].item()

    # random remasking contradicts itself more if it hurries, and low confidence seeks the mode
    (good, texts, begins), (hurried, *_), (_, _, low), (_, mode, _) = seen['results'].values()
    assert hurried < good and texts > 20 and mode == 1
    assert max(low.values()) > max(begins.values()) and len(begins) >= 2
    # the three orders: one token of each place per step, and only the last one is a line
    places = {name: [position for position, _ in points] for name, points in seen['pictures'].items()}
    assert all(sorted(order) == places['left to right'] for order in places.values())
    assert places['random'] != places['left to right'] != places['low confidence']

    # guidance leaves the day alone, and makes the name of the prompt more probable
    gus = [probability(seen['guided'][scale][1], 'Gus') for scale in (-1.0, 0.0, 0.5)]
    assert gus[0] < gus[1] < gus[2]
    days = [probability(seen['guided'][scale][0], 'Monday') for scale in (-1.0, 0.0, 0.5)]
    assert max(days) - min(days) < 0.1
    # a gap needs both sides, and a brother is about twice as probable as a friend
    (colour, left, both), (_, relative_left, relative), (name, *_) = seen['filled'].values()
    assert colour == name == seen['text']
    assert probability(left, 'red') < 0.3 and probability(both, 'red') > 0.9
    assert 1.2 < probability(relative, 'brother') / probability(relative, 'friend') < 6
    assert probability(relative_left, 'sister') > 0.2 > probability(relative, 'sister')


if __name__ == '__main__':
    main()
