"""Tiny Shakespeare, 1.1 MB, trained like docs.py.

First:  python data.py shakespeare       (or with --input=input.txt, if you have the file)
"""

from pathlib import Path

exec(Path(__file__).with_name('docs.py').read_text())       # its settings; those below replace some

out_dir = 'out/shakespeare'
dataset = 'shakespeare'
