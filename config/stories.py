"""The model in tests/exercises/stories: it writes stories of the made-up world and answers questions about them.

Like sft_toy.py, on stories and questions together, because a model that sees questions alone forgets to tell stories.
First:  python train.py config/world.py       Afterwards:  python tests/lab/ship.py out/stories --out=FOLDER
"""

from pathlib import Path

exec(Path(__file__).with_name('sft_toy.py').read_text())    # its settings; those below replace some

out_dir = 'out/stories'
dataset = 'stories'
max_iters = 4000
decay_iters = 1000
eval_interval = 1000
