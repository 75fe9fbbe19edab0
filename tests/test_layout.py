"""The shape of the project, read off the syntax trees: who imports whom, how long and how dense things may get."""

import ast
import doctest
import importlib
import inspect
import io
import re
import subprocess
import tokenize

import pytest
from helpers import ROOT

GROUND, ROOMS, TOP = ('configurator',), ('data', 'model', 'diffusion'), ('train', 'sample', 'evaluate')
FILES = GROUND + ROOMS + TOP
TEXTS = {name: (ROOT / f'{name}.py').read_text(encoding='utf-8') for name in FILES}
TREES = {name: ast.parse(text) for name, text in TEXTS.items()}
FUNCTIONS = [(name, node) for name, tree in TREES.items() for node in ast.walk(tree)
             if isinstance(node, ast.FunctionDef)]
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


@pytest.mark.parametrize('name', FILES)
def test_import_graph(name):
    """The ground floor imports nothing of ours, a room the ground floor (diffusion not even that), the top both."""
    allowed = {**dict.fromkeys(GROUND + ('diffusion',), ()), **dict.fromkeys(('data', 'model'), GROUND)}
    imported = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    assert imported & set(FILES) <= set(allowed.get(name, GROUND + ROOMS))


def test_the_ground_floor_is_no_drawer():
    public = {node.name for node in TREES['configurator'].body
              if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith('_')}
    assert public == {'Refused', 'Damaged', 'settings_of', 'configure', 'refuse', 'out_of_range', 'command', 'refusing',
                      'fail', 'say', 'clean', 'read_json', 'write_manifest', 'read_manifest', 'file_sha256',
                      'facts_sha256', 'special_tokens', 'copy_tokenizer', 'own_tokenizer', 'alone', 'before_torch'}


# ------------------------------------------------------------------------------------------------- size and density


def doc_lines(tree):
    """The lines of all docstrings."""
    lines = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node) is not None:
            lines |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines


def tokens_by_line(name):
    """Names, numbers, operators and strings outside docstrings and comments: line -> how many."""
    doc, count, inside = doc_lines(TREES[name]), {}, 0
    for token in tokenize.generate_tokens(io.StringIO(TEXTS[name]).readline):
        kind = tokenize.tok_name[token.type]
        if kind == 'FSTRING_END':                               # from Python 3.12 on an f-string comes in pieces
            inside -= 1
        if kind in ('NAME', 'NUMBER', 'OP', 'STRING', 'FSTRING_START') and not inside and token.start[0] not in doc:
            count[token.start[0]] = count.get(token.start[0], 0) + 1
        if kind == 'FSTRING_START':
            inside += 1
    return count


def test_size():
    tokens = {name: sum(tokens_by_line(name).values()) for name in FILES}
    lines = {name: len(text.splitlines()) for name, text in TEXTS.items()}
    assert sum(tokens.values()) <= 39_260
    assert sum(lines.values()) <= 5_515, lines


@pytest.mark.parametrize('name', FILES)
def test_density(name):
    """A line says one thing."""
    count = tokens_by_line(name)
    assert sum(count.values()) / len(count) <= (12.7 if name == 'diffusion' else 11.5)


def test_long_lines():
    lines = [line for text in TEXTS.values() for line in text.splitlines()]
    assert sum(len(line) > 110 for line in lines) <= 0.02 * len(lines)


def test_functions_are_short_and_have_few_parameters():
    many = {'generate', 'generate_variable_length', 'diffusion_loss', 'forward', 'complete', 'log_likelihood',
            'log_likelihood_eq5', 'log_likelihood_ordered', 'confidence_score', 'bound_per_row'}
    for name, node in FUNCTIONS:
        assert node.end_lineno - node.lineno < 60, f'{name}.{node.name}'
        parameters = [arg for arg in node.args.args + node.args.kwonlyargs if arg.arg != 'self']
        assert len(parameters) <= 7 or node.name in many, f'{name}.{node.name}'


def test_a_reader_can_breathe():
    """A blank line or a comment within every 12 lines of a function."""
    for name, node in FUNCTIONS:
        lines, doc, since = TEXTS[name].splitlines(), doc_lines(TREES[name]), 0
        for number in range(node.lineno, node.end_lineno + 1):
            line = lines[number - 1].strip()
            quiet = not line or line.startswith('#') or number in doc
            since = 0 if quiet else since + 1
            assert since <= 12, f'{name}.{node.name}, line {number}'


def test_no_knots():
    """No comprehension in another, no ternary in another or over several lines, no call for its side effect in a value,
    no arithmetic on comparisons."""
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            inside = [inner for inner in ast.walk(node) if inner is not node]
            where = f'{name}.py:{getattr(node, "lineno", 0)}'
            if isinstance(node, COMPREHENSIONS):
                assert not any(isinstance(inner, COMPREHENSIONS) for inner in inside), where
            if isinstance(node, ast.IfExp):
                assert node.lineno == node.end_lineno, where
                assert not any(isinstance(inner, ast.IfExp) for inner in inside), where
            if isinstance(node, (ast.Return, ast.Assign)) and isinstance(node.value, ast.Call):
                call = node.value.func
                kept = ast.unparse(call).startswith('np.') or not isinstance(call, ast.Attribute)
                assert kept or call.attr not in ('append', 'extend', 'update'), where
            if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Mult, ast.Pow)):
                assert not isinstance(node.left, ast.Compare) and not isinstance(node.right, ast.Compare), where


def test_the_path_of_the_readme_is_short():
    """What it names for one update and one sample are at most 400 lines, and all of it is on that path."""
    readme = (ROOT / 'README.md').read_text(encoding='utf-8')
    path = readme[readme.index('The path of one update'):readme.index('Change the weight in')]
    names = re.findall(r'`(\w+)\.([\w.]+)`', path)
    total = 0
    for module, name in names:
        thing = importlib.import_module(module)
        for part in name.split('.'):
            thing = getattr(thing, part)
        total += len(inspect.getsource(thing).splitlines())
    assert len(names) == 20 and total <= 400, total


def test_main_of_train_is_a_story():
    main, = (node for name, node in FUNCTIONS if name == 'train' and node.name == 'main')
    assert main.end_lineno - main.lineno < 60
    for name in ('train', 'evaluate'):
        assert 'if masking ==' not in TEXTS[name] and 'if cfg.masking ==' not in TEXTS[name].replace(
            "if cfg.masking == 'response' else []", '')


# ------------------------------------------------------------------------------------------------------- the rest


def test_top_level():
    listed = subprocess.run(['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True).stdout.split()
    top = {f.split('/')[0] for f in listed} if listed else {f.name for f in ROOT.iterdir()} - {'data', 'out'}
    allowed = {f'{name}.py' for name in TREES}
    allowed |= {'config', 'tests', 'README.md', 'requirements.txt', 'pyproject.toml', 'LICENSE'}
    assert {f for f in top if not f.startswith('.') and f != '__pycache__'} <= allowed


def test_nothing_is_executed_or_unpickled():
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                call = ast.unparse(node.func)
                assert call not in ('eval', 'exec', '__import__') and 'pickle' not in call, f'{name}: {call}'
                if call == 'torch.load':
                    assert any(k.arg == 'weights_only' and k.value.value is True for k in node.keywords)


@pytest.mark.parametrize('name', TOP + ('data',))
def test_scripts_prepare_for_torch(name):
    """OpenMP reads its environment when torch is loaded, and Ctrl-C comes when it likes."""
    text = TEXTS[name]
    at = text.index("if __name__ == '__main__':\n    before_torch()")
    assert at < text.index('import torch') if 'import torch' in text else at < text.index('import data')


def test_what_the_user_has_set_counts(monkeypatch):
    import configurator
    monkeypatch.setattr('signal.signal', lambda *handler: None)
    for told, spins in (({}, '1000'), ({'OMP_WAIT_POLICY': 'ACTIVE'}, None), ({'GOMP_SPINCOUNT': '7'}, '7')):
        monkeypatch.setattr('os.environ', dict(told))
        configurator.before_torch()
        assert configurator.os.environ.get('GOMP_SPINCOUNT') == spins


@pytest.mark.parametrize('name', ROOMS)
def test_examples_in_docstrings(name):
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert not failed and (tried or name != 'diffusion')


def test_public_functions_are_documented():
    for name, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith('_') and node.name != 'main':
                assert ast.get_docstring(node), f'{name}.{node.name}'


def test_equations_in_the_readme_are_in_the_code():
    """Each row of the README's table of equations names a function; that function, or what it calls, bears the tag."""
    readme = (ROOT / 'README.md').read_text(encoding='utf-8')
    rows = re.findall(r'^\| (Eq\. [\d-]+|Alg\. \d)[^|]*\|[^|]*\| `(\w+)\.(\w+)`', readme, re.M)
    assert len(rows) >= 5
    for tag, module, function in rows:
        node = next(n for n in TREES[module].body if isinstance(n, ast.FunctionDef) and n.name == function)
        assert tag in ast.get_source_segment(TEXTS[module], node), f'{tag} is not in {module}.{function}'


def test_configs_set_only_known_keys():
    import evaluate
    import sample
    import train
    from configurator import configure, settings_of
    for file in sorted((ROOT / 'config').glob('*.py')):
        if file.name.startswith(('sample_', 'eval_')):
            script = sample if file.name.startswith('sample_') else evaluate
            configure(settings_of(vars(script)), [str(file)])
            continue
        settings = configure(settings_of(vars(train)), [str(file)])
        assert settings['out_dir'].startswith('out/')
        if file.name == 'docs.py':                                  # this file is the default
            assert all(getattr(train, k) == v for k, v in settings.items())
