"""The ground floor: the settings of a script, and one-line errors for what the user gave.

    python train.py config/docs.py --batch_size=16 --compile    # globals, then files, then flags: later wins
    python train.py --help                                      # every key, its default and its comment

The feel is nanoGPT's: a setting is a global variable with a comment, and a config file assigns to the same
names. But nothing is executed: files are parsed, and may hold literals and arithmetic on numbers and known
names. An unknown name or a wrong type is an error, in a file as on the command line; all are shown together.
"""

import ast
import difflib
import hashlib
import json
import math
import operator
import os
import re
import shutil
import signal
import sys
import time
from contextlib import contextmanager, suppress
from copy import deepcopy
from pathlib import Path

KINDS = (bool, int, float, str, list)
TRUTH = {'true': True, '1': True, 'false': False, '0': False}
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
             ast.FloorDiv: operator.floordiv, ast.USub: operator.neg, ast.UAdd: operator.pos}
UNREADABLE = (ValueError, SyntaxError, ArithmeticError, RecursionError, MemoryError)    # of an expression


class Refused(ValueError):
    """What the user typed or gave cannot be used. `command` shows it without a traceback, exit code 2.

    Any other exception is a bug, and keeps its traceback.
    """


# ----------------------------------------------------------------------------------------------------------
# Settings


def settings_of(namespace):
    """The settings among a script's globals: lower-case names of a type in KINDS."""
    return {name: value for name, value in namespace.items()
            if name.islower() and not name.startswith('_') and type(value) in KINDS}


def configure(namespace, argv=None, positional=(), beneath=None):
    """Applies config files and flags to the settings in a script's globals() and returns them: name -> value.

    Arguments ending in .py are config files; other bare words go to the names in `positional`, in turn (a
    list takes the rest). beneath(settings) -> settings that replace the defaults, but not what is typed.
    Exits with code 2 and one line per problem; with code 0 after --help.
    """
    words = sys.argv[1:] if argv is None else argv
    defaults = settings_of(namespace)
    if '-h' in words or '--help' in words:
        print(_help(namespace, defaults, positional))
        sys.exit(0)

    values = _typed(words, defaults, defaults, positional)
    if beneath is not None:
        values = _typed(words, {**defaults, **beneath(values)}, defaults, positional)
    namespace.update(values)
    return values


def _typed(words, ground, defaults, positional):
    """Applies the words of a command line to the settings `ground`, in the types of the defaults."""
    values, problems = deepcopy(ground), []
    words, bare, begun = list(words), list(positional), set()
    while words:
        word = words.pop(0)

        if word.startswith('--'):
            key, text = _flag(word, words, defaults)
            if defaults.get(key) == []:                             # an empty default collects texts, one per flag
                before = values[key] if key in begun else []        # the first replaces what a file says
                values[key] = [*before, text]
                begun.add(key)
            else:
                problems += _assign(values, defaults, key, text, f'--{key}', _parse)

        elif word.endswith('.py'):
            problems += _read_file(Path(word), values, defaults)
        elif not bare:
            problems.append(f'{word}: want a config file (.py) or --key=value')
        elif isinstance(values[bare[0]], list):
            values[bare[0]].append(word)
        else:
            values[bare.pop(0)] = word

    if problems:
        fail('\n'.join(problems))
    return values


def _flag(word, rest, defaults):
    """--key=value, --key value or, for a switch, --key alone -> key, text; a value is taken off `rest`."""
    key, equals, text = word[2:].partition('=')
    key = key.replace('-', '_')                                     # people type --prompt-file
    if equals:
        return key, text

    switch = isinstance(defaults.get(key), bool)
    value_follows = rest and not rest[0].startswith('--')
    if value_follows and (not switch or rest[0].lower() in TRUTH):
        return key, rest.pop(0)
    return key, 'true' if switch else ''


def _read_file(path, values, defaults):
    """Applies the assignments of one config file; nothing in it runs. Yields problems, a sentence each."""
    try:
        tree = ast.parse(path.read_text(encoding='utf-8-sig'), str(path))
    except OSError as error:
        yield f'{path}: {error.strerror or error}'
        return
    except UNREADABLE as error:
        line = getattr(error, 'lineno', None) or 1
        yield f'{path}:{line}: {getattr(error, "msg", error) or "nested too deep"}'
        return

    for node in tree.body:
        where = f'{path}:{node.lineno}'
        if isinstance(node, ast.Expr) and isinstance(getattr(node.value, 'value', None), str):
            continue                                                # a docstring
        if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Name) or node.targets[1:]:
            yield f'{where}: a config file holds only lines of the form  name = value'
            continue

        try:
            value = _evaluate(node.value, values)
        except UNREADABLE as error:
            yield f'{where}: {error}'
            continue
        yield from _assign(values, defaults, node.targets[0].id, value, where, _convert)


def _evaluate(node, names, depth=0):
    """The value of an expression of literals, + - * / // on numbers, and known names."""
    if depth > 50:
        raise ValueError('expression too deep')

    if isinstance(node, ast.Constant) and type(node.value) in KINDS:
        return node.value
    if isinstance(node, ast.Name):
        if node.id not in names:
            raise ValueError(f'{node.id!r} is not a known name')
        return names[node.id]

    operate = OPERATORS.get(type(getattr(node, 'op', None)))
    if not operate and not isinstance(node, (ast.List, ast.Tuple)):
        raise ValueError(f'only literals, known names and + - * / // are allowed, got {type(node).__name__}')
    parts = [part for part in ast.iter_child_nodes(node) if isinstance(part, ast.expr)]
    values = [_evaluate(part, names, depth + 1) for part in parts]
    if not operate:
        return values

    for value in values:
        if type(value) not in (int, float):
            raise ValueError(f'arithmetic wants numbers, got {value!r}')
    return operate(*values)


def _assign(values, defaults, key, value, where, convert):
    """Stores a value (from a file) or a text (from a flag) under its key, in the type of the default.

    Yields what is wrong with it, if anything.
    """
    if key not in defaults:
        near = difflib.get_close_matches(key, defaults, n=3)
        hint = f'; did you mean {" or ".join(near)}?' if near else ''
        yield f'{where}: no setting is called {key!r}{hint}'
        return

    kind = type(defaults[key])
    try:
        values[key] = convert(value, kind)
    except UNREADABLE:
        yield f'{where}: {key} wants {kind.__name__}, got {str(value)[:60]!r}'


def _parse(text, kind):
    """A flag's text as a value of the given type."""
    if kind is str:
        return text
    if kind is bool:
        return _convert(TRUTH.get(text.lower()), bool)
    return _convert(_evaluate(ast.parse(text.strip(), mode='eval').body, {}), kind)


def _convert(value, kind):
    """int is fine for float, and a whole float (1e6) for int; nothing else changes type."""
    if {kind, type(value)} == {int, float} and int(value) == value:
        return kind(value)
    if type(value) is not kind or kind is float and not math.isfinite(value):
        raise ValueError(value)
    return value


def refuse(wrong):
    """Raises Refused with all problems, a list of sentences, one per line; does nothing if it is empty."""
    if wrong:
        raise Refused('\n'.join(wrong))


def out_of_range(cfg, ranges):
    """A sentence for each invalid setting; ranges: (keys, what they must be, whether a value fits)."""
    wrong = []
    for keys, says, fits in ranges:
        for key in keys.split():
            value = getattr(cfg, key)
            if not fits(value):
                wrong.append(f'{key} must be {says}, got {value!r}')
    return wrong


def _help(namespace, defaults, positional):
    """The docstring of the script, then every setting with its default and the comment on its line."""
    source = Path(namespace.get('__file__') or '')
    text = source.read_text(encoding='utf-8') if source.is_file() else ''
    comments = dict(re.findall(r'^(\w+) = .*?  # (.*)', text, re.M))

    shown = {name: f'  --{name}={value!r}' for name, value in defaults.items()}
    width = max(map(len, shown.values()), default=0) + 2
    table = [flag.ljust(width) + comments.get(name, '') for name, flag in shown.items()]
    words = ''.join(f' [{name}]' for name in positional)
    doc = (namespace.get('__doc__') or '').strip()
    return '\n'.join([doc, '', f'usage: [config files *.py]{words} [--key=value ...]', *table])


# ----------------------------------------------------------------------------------------------------------
# The outermost layer of a script


def before_torch():
    """What a script does before importing torch, which takes seconds and reads the environment."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)                # Ctrl-C ends it without a traceback
    if 'OMP_WAIT_POLICY' not in os.environ:             # on busy cores, threads that wait long should sleep
        os.environ.setdefault('GOMP_SPINCOUNT', '1000')


def command(main, namespace, positional=(), beneath=None):
    """Runs main(settings), and shows user errors as one line on stderr, exit code 2.

    These are Refused and an OSError that names a file. Ctrl-C (130) and a closed pipe (141) end quietly.
    positional, beneath: see configure.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:           # see before_torch
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdin = sys.stdin or open(os.devnull)                       # somebody closed it
    sys.stdout = sys.stdout or open(os.devnull, 'w')
    sys.stderr = sys.stderr or open(os.devnull, 'w')

    if hasattr(sys.stdout, 'reconfigure'):
        sys.stdout.reconfigure(errors='replace')                    # any text on any terminal
    try:
        main(configure(namespace, positional=positional, beneath=beneath))
        sys.stdout.flush()
    except Refused as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail('interrupted', 130)

    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())      # or Python complains at exit
        sys.exit(141)
    except OSError as error:
        if not (error.filename and error.strerror):
            raise
        fail(f'{error.filename}: {error.strerror}')


@contextmanager
def refusing():
    """Wraps a check of user input by code that does not know Refused: its ValueError becomes Refused."""
    try:
        yield
    except ValueError as error:
        raise Refused(str(error)) from None


def fail(message, code=2):
    """One clear line on stderr, then exit. Of many processes rank 0 speaks, or the one alone in trouble."""
    if os.environ.get('RANK', '0') != '0':
        time.sleep(3)                                               # by then torchrun has ended this process
        message = f"process {os.environ['RANK']}: {message}"
    say(message)
    sys.exit(code)


def say(text):
    """A line on stderr, for everything that is not a result."""
    print(clean(str(text)), file=sys.stderr, flush=True)


# control characters but \n and \t, marks of writing direction, half a surrogate pair
UNSEEN = r'[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]'


def clean(text):
    """Text that cannot move the cursor or change colours or direction: control characters are dropped."""
    return re.sub(UNSEEN, '', text)


# ----------------------------------------------------------------------------------------------------------
# Folders and files that several modules read


class Damaged(Refused):
    """A file is not what was once written."""


@contextmanager
def alone(lock):
    """Holds a lock file (where the system has such locks): a second process is refused."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open('w') as file:
        try:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.fstat(file.fileno()).st_nlink:
                raise BlockingIOError                           # its owner has just left, and removed it
        except BlockingIOError:
            raise Refused(f'{lock}: another process is at work here') from None
        except (ImportError, OSError):
            pass                                                # Windows; a file system without locks

        try:
            yield
        finally:
            with suppress(OSError):
                lock.unlink()


def read_json(path):
    """The JSON object in a file, or {} if there is no file."""
    path = Path(path)
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding='utf-8-sig')))
    except (ValueError, TypeError, RecursionError) as error:
        raise Damaged(f'{path}: not a JSON object ({type(error).__name__}: {error})') from None


def write_manifest(folder, facts):
    """Completes a folder: writes manifest.json, with `facts` and the checksums of all files and of itself."""
    path, aside = folder / 'manifest.json', folder / 'manifest.tmp'
    files = {file.name: file_sha256(file) for file in sorted(folder.iterdir()) if file != path}
    manifest = {**facts, 'files': files}
    manifest['sha256'] = facts_sha256(manifest)
    aside.write_text(json.dumps(manifest, indent=1), encoding='utf-8')
    os.replace(aside, path)
    return manifest


def read_manifest(folder, share=(0, 1)):
    """The manifest of a complete folder -> dict. Damaged if it, or a file it lists, is not what was written.

    share (k, n): verify the k-th file and every n-th after it, for n processes; None: no file.
    """
    manifest = read_json(folder / 'manifest.json')
    told = manifest.pop('sha256', None)
    if told != facts_sha256(manifest):
        raise Damaged(f'{folder / "manifest.json"}: damaged (its sha256 is not the one it bears)')

    files = [] if share is None else sorted(manifest['files'])[share[0]::share[1]]
    for file in (folder / name for name in files):
        if not file.is_file() or file_sha256(file) != manifest['files'][file.name]:
            raise Damaged(f'{file}: missing or damaged (its sha256 is not the one in the manifest)')
    return manifest


def file_sha256(path):
    """Checksum of a file of any size."""
    total = hashlib.sha256()
    with Path(path).open('rb') as file:
        while part := file.read(1 << 20):
            total.update(part)
    return total.hexdigest()


def facts_sha256(facts):
    """Checksum of whatever JSON can hold."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


ROLES = ('mask', 'eos', 'pad', 'bos', 'eot')            # special tokens whose ids go with weights
# What each special token is called: in LLaDA's release, in its guideline, elsewhere
NAMES = {'bos': ('<|startoftext|>', '<s>', '<|begin_of_text|>'),
         'eos': ('<|endoftext|>', '</s>', '<|end_of_text|>'),
         'mask': ('<|mdm_mask|>', '<[MASK]>', '[MASK]', '<mask>'),
         'start_header': ('<|start_header_id|>', '<start_id>'),
         'end_header': ('<|end_header_id|>', '<end_id>'),
         'eot': ('<|eot_id|>', '<eot_id>'),
         'pad': ()}


def special_tokens(path):
    """Special tokens of a tokenizer.json and the tokenizer_config.json beside it -> name: id, and role: id."""
    config = read_json(path.with_name('tokenizer_config.json'))
    ids, roles = {}, {}
    try:
        for number, token in (config.get('added_tokens_decoder') or {}).items():
            ids[token['content']] = int(number)
        for token in read_json(path).get('added_tokens') or []:
            ids[token['content']] = token['id']

        for role, usual in NAMES.items():
            told = config.get(f'{role}_token')
            told = told['content'] if isinstance(told, dict) else told
            found = [ids[name] for name in (told, *usual) if name in ids]
            if found:
                roles[role] = found[0]

    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise Refused(f'{path}: its list of added tokens is broken ({type(error).__name__}: {error})') from None
    return ids, roles


TOKENIZER_FILES = ('.json', '.tiktoken')                # endings of a spec of data.get_tokenizer


def copy_tokenizer(spec, folder):
    """Copies the file of a tokenizer, and the configuration beside it, into a folder -> the folder's spec.

    (The name of a well-known tokenizer, or 'bytes', has no file, and stays.)
    """
    source = Path(spec or '')
    if source.suffix not in TOKENIZER_FILES:
        return spec
    copied = shutil.copyfile(source, folder / f'tokenizer{source.suffix}')
    beside = source.with_name('tokenizer_config.json')
    if beside.is_file():
        shutil.copyfile(beside, folder / beside.name)
    return copied.name


def own_tokenizer(spec, folder):
    """A spec returned by copy_tokenizer, as one that can be opened from anywhere."""
    return str(folder / spec) if spec.endswith(TOKENIZER_FILES) else spec
