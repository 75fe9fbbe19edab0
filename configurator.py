"""Settings of a script: its commented globals, a config file, the command line; later wins.

    python train.py config/docs.py --batch_size=16 --compile true
    python train.py --help                                          # every key, its default and its comment

And how every script behaves: errors of one line, clean exits, a log, a lock on its folder.

The feel is nanoGPT's: a setting is a global variable with a comment, a config file assigns to the same names. But
nothing is executed: files are parsed, and may hold literals and arithmetic on numbers and known names. An unknown
name or a wrong type is an error, in a file as on the command line; all errors are reported together, exit code 2.
"""

import ast
import difflib
import io
import json
import math
import operator
import os
import signal
import sys
import time
import tokenize
from contextlib import contextmanager
from pathlib import Path

KINDS = (bool, int, float, str, list)
TRUTH = {'true': True, '1': True, 'false': False, '0': False}
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
             ast.FloorDiv: operator.floordiv}


def settings_of(namespace):
    """The settings among a script's globals: lower-case names of a plain type (bool, int, float, str, list)."""
    return {k: v for k, v in namespace.items() if k.islower() and not k.startswith('_') and type(v) in KINDS}


def configure(namespace, argv=None, positional=()):
    """Applies config files and flags to the settings in a script's globals() and returns them: name -> value.

    Arguments ending in .py are config files; other bare words go to the names in `positional`, in turn (a list takes
    the rest). Exits with code 2 and one line per problem; with code 0 after --help.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    settings = settings_of(namespace)
    if '-h' in argv or '--help' in argv:
        print(_help(namespace, settings, positional))
        sys.exit(0)
    problems, bare = [], list(positional)
    final = {k: list(v) if isinstance(v, list) else v for k, v in settings.items()}
    while argv:
        word = argv.pop(0)
        if word.startswith('--'):
            key, equals, text = word[2:].partition('=')
            key = key.replace('-', '_')                             # people type --prompt-file
            if not equals:
                switch = isinstance(settings.get(key), bool)
                if not argv or argv[0].startswith('--') or switch and argv[0].lower() not in TRUTH:
                    argv.insert(0, 'true' if switch else '')        # --resume stands for --resume=true
                text = argv.pop(0)
            _assign(final, settings, key, text, f'--{key}', problems)
        elif word.endswith('.py'):
            _read_file(Path(word), final, settings, problems)
        elif bare:
            if isinstance(settings[bare[0]], list):
                final[bare[0]].append(word)
            else:
                final[bare.pop(0)] = word
        else:
            problems.append(f'{word}: want a config file (.py) or --key=value')
    if problems:
        fail('\n'.join(problems))
    namespace.update(final)
    return final


def _read_file(path, final, settings, problems):
    """Applies the assignments of one config file; nothing in it runs."""
    try:
        tree = ast.parse(path.read_text(encoding='utf-8-sig'))
    except OSError as e:
        return problems.append(f'{path}: {e.strerror or e}')
    except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
        return problems.append(f'{path}:{getattr(e, "lineno", None) or 1}: {getattr(e, "msg", e) or "nested too deep"}')
    for node in tree.body:
        where = f'{path}:{node.lineno}'
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            continue                                                                    # a docstring
        if not (isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)):
            problems.append(f'{where}: a config file holds only lines of the form  name = value')
            continue
        try:
            value = _evaluate(node.value, final)
        except (ValueError, ArithmeticError, RecursionError) as e:
            problems.append(f'{where}: {e}')
            continue
        _assign(final, settings, node.targets[0].id, value, where, problems)


def _evaluate(node, names, depth=0):
    """The value of an expression of literals, + - * / // on numbers, and known names."""
    if depth > 50:
        raise ValueError('expression too deep')
    if isinstance(node, ast.Constant) and type(node.value) in KINDS:
        return node.value
    if isinstance(node, ast.Name):
        if node.id in names:
            return names[node.id]
        raise ValueError(f'{node.id!r} is not a known name')
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_evaluate(e, names, depth + 1) for e in node.elts]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        value = _number(_evaluate(node.operand, names, depth + 1))
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        left, right = (_number(_evaluate(side, names, depth + 1)) for side in (node.left, node.right))
        return OPERATORS[type(node.op)](left, right)
    raise ValueError(f'only literals, known names and + - * / // are allowed, got {type(node).__name__}')


def _number(value):
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f'arithmetic wants numbers, got {value!r}')
    return value


def _assign(final, settings, key, value, where, problems):
    """Stores a value (from a file) or a text (from a flag) under its key, in the type of the default."""
    if key not in settings:
        near = difflib.get_close_matches(key, settings, n=3)
        hint = f'; did you mean {" or ".join(near)}?' if near else ''
        return problems.append(f'{where}: no setting is called {key!r}{hint}')
    kind, flag = type(settings[key]), where.startswith('--')
    if flag and settings[key] == []:                # a list that is empty by default collects texts, one a flag
        return final[key].append(value)
    try:
        final[key] = _parse(value, kind) if flag else _convert(value, kind)
    except (KeyError, ValueError, SyntaxError, ArithmeticError, RecursionError, MemoryError):
        problems.append(f'{where}: {key} wants {kind.__name__}, got {str(value)[:60]!r}')


def _parse(text, kind):
    """A flag's text as a value of the given type."""
    if kind is str:
        return text
    if kind is bool:
        return TRUTH[text.lower()]
    return _convert(_evaluate(ast.parse(text.strip(), mode='eval').body, {}), kind)


def _convert(value, kind):
    """int is fine for float, and a whole float (1e6) for int; nothing else changes type."""
    if kind is float and type(value) is int:
        return float(value)
    if kind is int and type(value) is float and value.is_integer():
        return int(value)
    if type(value) is not kind or kind is float and not math.isfinite(value):
        raise ValueError
    return value


def _help(namespace, settings, positional):
    """The docstring of the script, then every setting with its default and the comment on its line."""
    comments = {}
    source = Path(namespace.get('__file__') or '')
    if source.is_file():
        text = source.read_text(encoding='utf-8')
        name = None
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.NAME and token.start[1] == 0:
                name = token.string
            elif token.type == tokenize.COMMENT and token.start[1] > 0 and name in settings:
                comments.setdefault(name, token.string.lstrip('# '))
    width = max((len(k) + len(repr(v)) for k, v in settings.items()), default=0) + 6
    lines = [f'  --{k}={v!r}'.ljust(width) + comments.get(k, '') for k, v in settings.items()]
    bare = ' '.join(f'[{name}]' for name in positional)
    doc, words = (namespace.get('__doc__') or '').strip(), f'; bare words: {bare}' if bare else ''
    return f'{doc}\n\nsettings (config files *.py, then flags{words}):\n' + '\n'.join(lines)


def fail(message, code=2):
    """One clear line on stderr, then out. Of many processes the first speaks; another if it is alone in its trouble."""
    if os.environ.get('RANK', '0') != '0':
        time.sleep(3)                                               # by then torchrun has ended this process
        message = f"process {os.environ['RANK']}: {message}"
    print(message, file=sys.stderr, flush=True)
    sys.exit(code)


@contextmanager
def user_errors():
    """Around the code that reads what the user gave: its ValueError or OSError becomes one line, not a traceback."""
    try:
        yield
    except BrokenPipeError:
        raise                                                       # nobody is left to read it: see command
    except (ValueError, OSError, OverflowError, MemoryError, RuntimeError) as e:       # the last: torch cannot allocate
        named = isinstance(e, OSError) and e.strerror and e.filename
        fail(f'{e.filename}: {e.strerror}' if named else str(e) or type(e).__name__)


class Stop:
    """Ctrl-C and SIGTERM ask for a checkpoint after the running update; Ctrl-C three seconds later leaves at once.

    (Not sooner, and not SIGTERM: torchrun passes on what the terminal or SLURM has sent to every process already.)
    """

    def __enter__(self):
        self.signal = None
        self.before = {number: signal.signal(number, self.ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def ask(self, number, frame):
        if self.signal is None:
            self.signal, self.since = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self.since > 3:
            os._exit(128 + number)


@contextmanager
def alone(run):
    """Holds a lock on the run folder (where the system has such locks): a second run in it is refused."""
    with (run / '.lock').open('w') as file:
        try:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            pass                                                            # Windows
        except BlockingIOError:
            fail(f'{run}: another process is training here')
        except OSError:
            pass                                                            # a file system without locks
        yield


class Log:
    """log.jsonl: one object a line, flushed at once. On resume, lines of iterations to be repeated are dropped."""

    def __init__(self, path, iteration, writes=True):
        self.path, self.lines, self.file = path, [], None
        if not writes:                                              # only rank 0 does
            return
        if iteration is not None and path.is_file():
            for line in path.read_text(encoding='utf-8', errors='replace').splitlines():
                try:
                    entry = json.loads(line)
                except (ValueError, RecursionError):
                    continue                                                # a line cut by a kill
                at = entry.get('iter', 0) if isinstance(entry, dict) else None
                if isinstance(at, int) and at <= iteration:
                    self.lines.append(entry)
        aside = path.with_suffix('.tmp')
        aside.write_text(''.join(json.dumps(entry) + '\n' for entry in self.lines), encoding='utf-8')
        os.replace(aside, path)
        self.file = path.open('a', encoding='utf-8')

    def write(self, **entry):
        self.lines.append(entry)
        if self.file:
            self.file.write(json.dumps(entry) + '\n')
            self.file.flush()

    def bound_at(self, it):
        """The validation entry of an iteration, if it is already in the log."""
        return next((e for e in self.lines if e.get('iter') == it and 'val_nats' in e), None)


def command(main, config):
    """main(config) as a well-behaved command: no traceback for Ctrl-C or a closed pipe, any text on any terminal."""
    sys.stdout.reconfigure(errors='replace')
    try:
        main(config)
        sys.stdout.flush()
    except KeyboardInterrupt:
        fail('interrupted', 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())      # or Python complains once more at exit
        sys.exit(141)
