"""Settings of a script, in nanoGPT's way: global variables, config files and flags. The last one wins.

    python train.py config/docs.py --batch_size=16 --compile
    python train.py --help                          # every setting, its default and its comment

A setting is a global variable of the script in lower case. A config file is Python that assigns to the same
names. It is executed, so run only those that you trust. (A helper variable in it begins with an underscore.)
"""

import difflib
import errno
import json
import os
import re
import runpy
import sys
import time
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

KINDS = (bool, int, float, str, list)
SWITCH = {'true': True, '1': True, 'false': False, '0': False}


class UserError(ValueError):
    """Say in one line that the input of the user cannot be used: `run` prints it without a traceback."""


def configure(namespace, argv=None, positional=()):
    """Apply config files and flags to the settings in a script's globals() and return them, name -> value.

    A word that ends in .py is a config file. Other bare words go to the settings named in `positional`, one
    each; a list takes all that remain. Raises UserError for an unknown name or a wrong type.
    """
    # upper case, underscores and functions are no settings
    defaults = {name: value for name, value in namespace.items()
                if name.islower() and not name.startswith('_') and type(value) in KINDS}
    settings = deepcopy(defaults)
    words = list(sys.argv[1:] if argv is None else argv)
    unfilled = list(positional)
    lists = {}

    # before anything is checked, so that help is always to be had
    if '--help' in words:
        print(help_text(namespace, defaults, positional))
        sys.exit(0)

    while words:
        word = words.pop(0)
        if word.startswith('--'):
            name, text = split_flag(word, words, defaults)
        elif word.endswith('.py'):
            read_config(word, settings, defaults)
            continue
        elif unfilled:
            name, text = unfilled[0], word
            if type(defaults[name]) is not list:
                unfilled.pop(0)
        else:
            raise UserError(f'{word}: expected a config file (.py) or --name=value')

        if type(defaults[name]) is list:
            lists.setdefault(name, []).append(text)
        else:
            settings[name] = parse(text, type(defaults[name]), f'--{name}')

    # --prompt=a --prompt=b collects both, and replaces what a config file has set
    settings.update(lists)
    # a script may list the words that a setting can be
    for name, words in namespace.get('ALLOWED', {}).items():
        if settings[name] not in words:
            raise UserError(f'{name} must be one of {", ".join(words)}, got {settings[name]!r}')
    namespace.update(settings)
    return settings


def read_config(path, settings, defaults):
    """Execute a config file with the settings so far as its globals, and take over what it assigns."""
    # the file may use what it sets, and what other files have set before it
    result = runpy.run_path(path, init_globals=deepcopy(settings))
    for name, value in result.items():
        # imports and functions of the file are no settings
        if name.startswith('_') or name not in defaults and type(value) not in KINDS:
            continue
        known_name(name, defaults, path)
        settings[name] = convert(value, type(defaults[name]), f'{path}: {name}')


def split_flag(word, words, defaults):
    """Split --name=value, or --name value, or --name alone (a switch) -> name, text."""
    name, equals, text = word[2:].partition('=')
    name = name.replace('-', '_')                           # people type --prompt-file
    known_name(name, defaults, word)
    is_switch = type(defaults[name]) is bool
    if equals:
        return name, text
    if words and not words[0].startswith('--') and (not is_switch or words[0].lower() in SWITCH):
        return name, words.pop(0)
    if not is_switch:
        raise UserError(f'{word} needs a value')
    return name, 'true'


def known_name(name, defaults, where):
    """Raise UserError if no setting has this name, with the names that come close."""
    if name not in defaults:
        # most mistakes are a letter or two, or the initials of a name, such as --lr
        near = difflib.get_close_matches(name, defaults)
        near += [known for known in defaults if re.sub('(?<=[a-z])[a-z]*_?', '', known) == name]
        hint = f' (did you mean {" or ".join(near)}?)' if near else ''
        raise UserError(f'{where}: unknown setting {name!r}{hint}')


def parse(text, kind, where):
    """Turn the text of a flag into a value of this type."""
    # a flag is always a text, and the default says what is meant
    value = text
    if kind is bool:
        value = SWITCH.get(text.lower(), text)
    elif kind in (int, float):
        try:
            value = int(text) if text.isdecimal() else float(text)
        except ValueError:
            pass                                            # still a text, so convert refuses it
    return convert(value, kind, where)


def convert(value, kind, where):
    """Accept an int for a float, and a whole float such as 1e6 for an int; change no other type."""
    if {kind, type(value)} == {int, float} and value == value // 1:
        return kind(value)
    if type(value) is not kind:
        raise UserError(f'{where} must be of type {kind.__name__}, got {value!r}')
    return value


def help_text(namespace, defaults, positional):
    """Return the docstring of the script, then each setting with its default and the comment beside it."""
    # the comments beside the settings are the manual
    source = Path(namespace['__file__']).read_text(encoding='utf-8')
    # a comment may go on in the next lines, which are then moved to its column
    comments = dict(re.findall(r'^(\w+) = .*?  # (.*(?:\n {20,}# .*)*)', source, re.M))
    words = ''.join(f' [{name}]' for name in positional)
    lines = [(namespace.get('__doc__') or '').strip(), '', f'usage: [config.py ...]{words} [--name=value ...]']
    lines += [f'  --{name}={value!r}'.ljust(36) + comments.get(name, '') for name, value in defaults.items()]
    return re.sub(r'\n {20,}#', '\n' + ' ' * 35, '\n'.join(lines))


def run(main, namespace, positional=()):
    """Call main with the settings as attributes. A mistake of the user becomes one line and exit code 2."""
    sys.stdout.reconfigure(errors='replace')                # a plain ASCII terminal shows ? instead of failing
    try:
        main(SimpleNamespace(**configure(namespace, positional=positional)))
        sys.stdout.flush()
    except (UserError, FloatingPointError) as error:
        die(error)
    except KeyboardInterrupt:
        die('interrupted', 130)
    except BrokenPipeError:
        os._exit(141)                                       # as in `python sample.py | head`: nobody reads on
    except OSError as error:
        # a missing or unreadable file names itself, and a disk may be full; any other OSError is a bug
        if not error.filename and error.errno not in (errno.ENOSPC, errno.EFBIG):
            raise
        die(f'{error.filename or "the disk"}: {error.strerror}')


def die(message, code=2):
    """Print one line and exit. Other ranks wait, because torchrun usually ends them before they repeat it."""
    if os.environ.get('RANK', '0') != '0':
        time.sleep(3)
    say(message)
    sys.exit(code)


def say(text):
    """Print a line to stderr, where everything goes that is not a result."""
    print(text, file=sys.stderr, flush=True)


def read_json(path):
    """Return the JSON object in a file, {} if there is no such file."""
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise UserError(f'{path}: not a JSON object ({error})') from None
