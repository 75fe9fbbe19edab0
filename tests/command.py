"""Run a script that takes over the settings of other scripts, and explain all of them with --help."""

import sys
from pathlib import Path

import configurator


def run(main, namespace, *bases, positional=()):
    """Run main with the settings of a script's globals() and of the modules `bases`. The earlier one wins."""
    merged = {}
    for base in reversed(bases):
        merged.update(vars(base))
    merged.update(namespace)
    if '--help' in sys.argv:
        text = help_text(merged, namespace, bases, positional)
        main, merged, positional = lambda cfg: print(text), {}, ()
        sys.argv[1:] = []
    configurator.run(main, merged, positional)


def help_text(merged, namespace, bases, positional):
    """Return the help of a script, and then that of the settings it takes over, from the files they stand in."""
    left = configurator.configure(merged, [])
    own = {name: left.pop(name) for name in configurator.configure(dict(namespace), [])}
    parts = [configurator.help_text(namespace, own, positional)]
    for base in bases:
        names = configurator.configure(dict(vars(base)), [])
        taken = {name: left.pop(name) for name in names if name in left}
        # only its settings: without a docstring, the line of usage is the third one
        text = configurator.help_text({'__file__': base.__file__}, taken, ())
        parts.append(f'and from {Path(base.__file__).name}:\n' + '\n'.join(text.splitlines()[3:]))
    return '\n\n'.join(parts)
