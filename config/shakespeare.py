"""Tiny Shakespeare, 1.1 MB, trained like docs.py.

First:
curl -O https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt
python data.py --input=input.txt --out=data/shakespeare
"""

from pathlib import Path

exec(Path(__file__).with_name('docs.py').read_text())       # its settings; those below replace some

out_dir = 'out/shakespeare'
dataset = 'shakespeare'
