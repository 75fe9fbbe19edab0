"""ARM 1B: the autoregressive twin of llada_1b.py, on the same data (arXiv 2502.09992v3, App. B.2)."""

from pathlib import Path

exec(Path(__file__).with_name('llada_1b.py').read_text())   # its settings; those below replace some

out_dir = 'out/arm_1b'
causal = True                   # so the settings of masks and t have no effect
random_length = 0.0             # whole windows
max_iters = 26400               # 138.41 G tokens, the last point of the paper's table
