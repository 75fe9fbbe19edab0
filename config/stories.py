"""The model in tests/exercises/stories: it writes stories of the made-up world and answers questions about them.

Like sft_toy.py, on stories and questions together, because a model that sees questions alone forgets to tell stories.
First:  python train.py config/world.py       Afterwards:  python tests/lab/ship.py out/stories --out=FOLDER
"""

from pathlib import Path

exec(Path(__file__).with_name('sft_toy.py').read_text())    # its settings; those below replace some

out_dir = 'out/stories'
dataset = 'stories'
max_iters = 12000               # with 4000 the questions cost it its stories: 54 % without contradictions, not 73
decay_iters = 3000
eval_interval = 3000
