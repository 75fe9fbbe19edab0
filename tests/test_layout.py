"""The shape of the project: who imports whom, how large and dense the files are, how much runs in one update.

A ceiling is never raised to fit a feature. The feature pays by what it removes.
"""

import ast
import doctest
import functools
import io
import subprocess
import sys
import tokenize
from importlib import import_module
from pathlib import Path

import pytest
from helpers import ROOT, checkpoint, script

import diffusion
from configurator import configure

# ----------------------------------------------------------------------------------------------------------
# The ceilings. Where the code is not there yet, a comment says what the goal is.

ROOM = {'configurator', 'data', 'diffusion', 'model'}
IMPORTS = {
    'configurator': set(), 'diffusion': set(), 'model': {'configurator'}, 'data': {'configurator'},
    'train': ROOM, 'sample': ROOM, 'evaluate': ROOM | {'sample'}}
FILES = tuple(IMPORTS)

# tokens (names, numbers, operators, strings; no docstrings, no comments), lines, tokens per line with code
CEILINGS = {
    'configurator': (1120, 189, 10.0),              # goal: 1000 tokens
    'diffusion': (4140, 717, 10.0),                 # goal: 620 lines
    'model': (4440, 716, 10.0),                     # goal: 3900, 620
    'data': (5660, 856, 10.0),                      # goal: 5200, 750
    'train': (4460, 692, 10.0),                     # goal: 620 lines
    'sample': (2300, 620, 10.0),
    'evaluate': (3080, 620, 10.0)}
ALL_TOKENS = 25_000
ALL_LINES = 4036                                    # goal 3700
COMMENTS = 0.10             # at least; lines that are a comment, as a share of all lines
GUARDS = 0.05               # raise, assert and except, as a share of the tokens
LONG_LINES = 0.02           # share of lines with more than 110 columns
COLUMNS = 120
PAUSE = 20                  # lines of a function without a blank line or a comment. Goal 12
# functions that run, and their tokens
PATH = {'update': (28, 2900), 'step': (17, 1700)}

# they take the options of a sampler or of a forward pass
MANY_PARAMETERS = {'forward', 'log_likelihood', 'generate', 'generate_variable_length', 'generate_text'}

TEXTS = {name: (ROOT / f'{name}.py').read_text(encoding='utf-8') for name in FILES}
TREES = {name: ast.parse(text) for name, text in TEXTS.items()}
FUNCTIONS = [
    (name, node) for name in FILES for node in ast.walk(TREES[name]) if isinstance(node, ast.FunctionDef)]
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
every_file = pytest.mark.parametrize('name', FILES)


# ----------------------------------------------------------------------------------------------------------
# Who imports whom


@every_file
def test_imports(name):
    imported = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split('.')[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split('.')[0])
    ours = {path.stem for path in ROOT.glob('**/*.py') if not {'venv', '.venv'} & set(path.parts)}
    assert imported & ours <= IMPORTS[name]


def test_top_level():
    tracked = subprocess.run(['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True).stdout.split()
    top = {path.split('/')[0] for path in tracked if not path.startswith('.')}
    assert top <= {f'{name}.py' for name in FILES} | {
        'config', 'tests', 'README.md', 'requirements.txt', 'pyproject.toml', 'LICENSE'}


# ----------------------------------------------------------------------------------------------------------
# How large, how dense


def docstring_lines(name):
    lines = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node):
            lines |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines


@functools.cache
def tokens_by_line(name):
    """Count names, numbers, operators and strings in lines with code -> dict from line to count."""
    counts = {}
    docstrings = docstring_lines(name)
    f_strings = 0                                     # which we are in; since Python 3.12 they come in pieces
    for token in tokenize.generate_tokens(io.StringIO(TEXTS[name]).readline):
        kind = tokenize.tok_name[token.type]
        f_strings -= kind == 'FSTRING_END'
        line = token.start[0]
        counted = kind in ('NAME', 'NUMBER', 'OP', 'STRING', 'FSTRING_START')
        if counted and not f_strings and line not in docstrings:
            counts[line] = counts.get(line, 0) + 1
        f_strings += kind == 'FSTRING_START'
    return counts


def tokens_of(name, node):
    """Count the tokens of a syntax tree's node."""
    return sum(n for line, n in tokens_by_line(name).items() if node.lineno <= line <= node.end_lineno)


def count_tokens(name):
    """Count the tokens of a file."""
    return sum(tokens_by_line(name).values())


@every_file
def test_size_and_density(name):
    most_tokens, most_lines, tokens_per_line = CEILINGS[name]
    assert count_tokens(name) <= most_tokens and len(TEXTS[name].splitlines()) <= most_lines
    assert count_tokens(name) / len(tokens_by_line(name)) <= tokens_per_line


def test_all_files_together_are_small_their_lines_short_and_some_are_comments():
    lines = [line for text in TEXTS.values() for line in text.splitlines()]
    assert sum(map(count_tokens, FILES)) <= ALL_TOKENS and len(lines) <= ALL_LINES
    assert max(len(line) for line in lines) <= COLUMNS
    assert sum(len(line) > 110 for line in lines) <= LONG_LINES * len(lines)
    assert sum(line.strip().startswith('#') for line in lines) >= COMMENTS * len(lines)


def test_guards_are_few():
    tokens = 0
    for name, tree in TREES.items():
        kinds = (ast.Raise, ast.Assert, ast.ExceptHandler)
        guards = [node for node in ast.walk(tree) if isinstance(node, kinds)]
        # an `if` that only raises counts as a whole
        guards += [node for node in ast.walk(tree) if isinstance(node, ast.If) and not node.orelse
                   and all(isinstance(child, ast.Raise) for child in node.body)]
        lines = {line for node in guards for line in range(node.lineno, node.end_lineno + 1)}
        tokens += sum(n for line, n in tokens_by_line(name).items() if line in lines)
    assert tokens <= GUARDS * sum(map(count_tokens, FILES))


@every_file
def test_functions(name):
    lines = TEXTS[name].splitlines()
    docstrings = docstring_lines(name)
    for node in (node for file, node in FUNCTIONS if file == name):
        assert node.end_lineno - node.lineno < 60, node.name
        parameters = [arg for arg in node.args.args + node.args.kwonlyargs if arg.arg != 'self']
        assert len(parameters) <= 7 or node.name in MANY_PARAMETERS, node.name

        without_pause = 0
        for number in range(node.lineno, node.end_lineno + 1):
            line = lines[number - 1].strip()
            pause = not line or line.startswith('#') or number in docstrings
            without_pause = 0 if pause else without_pause + 1
            assert without_pause <= PAUSE, f'{node.name}, line {number}'


@every_file
def test_public_functions_are_documented(name):
    for node in TREES[name].body:
        if isinstance(node, ast.FunctionDef) and node.name != 'main':
            assert ast.get_docstring(node), node.name


@every_file
def test_no_knots(name):
    """No comprehension in another one, no ternary in another one or over several lines."""
    for node in ast.walk(TREES[name]):
        inside = [inner for inner in ast.walk(node) if inner is not node]
        if isinstance(node, COMPREHENSIONS):
            assert not any(isinstance(inner, COMPREHENSIONS) for inner in inside), node.lineno
        if isinstance(node, ast.IfExp):
            assert node.lineno == node.end_lineno, node.lineno
            assert not any(isinstance(inner, ast.IfExp) for inner in inside), node.lineno


@every_file
def test_nothing_is_executed_or_unpickled(name):
    """Except config files, which configurator runs as nanoGPT does."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Call):
            call = ast.unparse(node.func)
            assert call not in ('eval', 'exec', '__import__') and 'pickle' not in call
            assert 'runpy' not in call or name == 'configurator'
            if call == 'torch.load':
                assert 'weights_only=True' in ast.unparse(node)


# ----------------------------------------------------------------------------------------------------------
# How many functions a reader must open to follow one update and one denoising step


def functions_between(marker, event, *command):
    """Run a script -> the functions of ours that run from the third to the fourth `event` of a function."""
    times = 0
    seen = set()

    def watch(frame, what, arg):
        nonlocal times
        code = frame.f_code
        if code.co_filename.startswith(str(ROOT)):
            if what == 'call' and times == 3:
                seen.add((Path(code.co_filename).stem, code.co_firstlineno))
            times += (code.co_name, what) == (marker, event)

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        script(*command)
    finally:
        sys.setprofile(before)
    assert times > 3
    return seen


TINY = ('--n_layer=2 --n_head=2 --n_kv_head=2 --d_model=32 --d_ff=64 --seq_len=32 --batch_size=4 --max_iters=4 '
        '--global_batch=8 --eval_windows=4 --eval_draws=1 --sample_tokens=0 --device=cpu --dtype=float32').split()


@pytest.mark.parametrize('part', PATH)
def test_the_path_of_an_update_and_of_a_denoising_step_is_short(part, corpus, tmp_path):
    if part == 'update':
        # from the end of one optimizer step to the end of the next
        where = f'--dataset={corpus}', f'--out_dir={tmp_path}'
        seen = functions_between('step', 'return', 'train', *TINY, *where)
    else:
        # from one forward pass to the next
        run = checkpoint(tmp_path / 'run', 'unified')
        seen = functions_between('guided_logits', 'call', 'sample', run, '--prompt=the', '--gen_length=8')

    path = {}
    for name, node in FUNCTIONS:
        first = min([node.lineno] + [decorator.lineno for decorator in node.decorator_list])
        if (name, first) in seen:
            path[f'{name}.{node.name}, line {first}'] = tokens_of(name, node)
    functions, tokens = PATH[part]
    assert len(path) <= functions and sum(path.values()) <= tokens, path


# ----------------------------------------------------------------------------------------------------------
# What is said elsewhere


def test_examples_in_docstrings():
    failed, tried = doctest.testmod(diffusion)
    assert tried >= 8 and not failed


@pytest.mark.parametrize('file', sorted((ROOT / 'config').rglob('*.py')), ids=lambda file: file.stem)
def test_configs_set_what_exists(file):
    kinds = {'eval': 'evaluate', 'sample': 'sample'}        # by folder, or by the beginning of the name
    kind = kinds.get(file.parent.name) or kinds.get(file.stem.split('_')[0], 'train')
    settings = configure(dict(vars(import_module(kind))), [str(file)])
    assert kind != 'train' or settings['out_dir'].startswith('out/')
