"""ARM 7B: the autoregressive baseline of LLaDA 8B (arXiv 2502.09992v3, App. B.2): 6,834,851,840 parameters.

Layers, heads, widths, vocabulary and context are the paper's. Whatever else does not stand here is that of
llada_8b.py, which is unconfirmed for this model.
"""

from pathlib import Path

exec(Path(__file__).with_name('llada_8b.py').read_text())   # its settings; those below replace some

out_dir = 'out/arm_7b'
causal = True                   # so the settings of masks and t have no effect
random_length = 0.0             # whole windows

n_layer = 28
n_kv_head = 8
d_ff = 13440

global_batch = 4224             # App. B.2, chosen by grid search with the learning rate
learning_rate = 4.2e-4
max_iters = 128000              # 2214.59 G tokens, the last point of the paper's table
lr_points = [[0, 0], [2000 * 4224 * 4096, 4.2e-4]]  # unconfirmed
