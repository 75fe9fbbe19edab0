"""Scaling at equal FLOPs: the smallest of the three sizes, diffusion. See scaling_l.py."""

from pathlib import Path

exec(Path(__file__).with_name('scaling_l.py').read_text())  # its settings; those below replace some

out_dir = 'out/scaling_s'
n_layer = 2
n_head = 2
n_kv_head = 2
d_model = 64
d_ff = 192
max_iters = 301                 # 1e12 FLOPs
