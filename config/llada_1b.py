"""LLaDA 1B, for the scaling experiment (arXiv 2502.09992v3, Sec. 3.1 and App. B.2): 1,487,243,264 parameters.

The paper trains it on up to 461 G tokens. Apart from the peak learning rate and batch, its schedule is not
stated. Layers, heads, widths, vocabulary and context are the paper's. Whatever else does not stand here is
that of the 8B, which is unconfirmed for this size.
"""

from pathlib import Path

exec(Path(__file__).with_name('llada_8b.py').read_text())   # its settings; those below replace some

out_dir = 'out/llada_1b'

n_layer = 22
n_kv_head = 4
d_model = 2048
d_ff = 5634                     # as printed; perhaps a misprint of 5632, which fits tensor cores and rounds
                                # to the same parameter counts: on an H100 --d_ff=5632 makes these products
                                # 2.5 times as fast

batch_size = 8                  # for each GPU
max_iters = 88000               # 461.37 G tokens, the last point of the paper's table
lr_points = [[0, 0], [2000 * 1280 * 4096, 4e-4]]    # unconfirmed: warm up as the 8B does, then hold
fsdp = 0                        # 24 GB of states fit on one GPU: DDP
