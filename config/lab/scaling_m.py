"""Scaling at equal FLOPs: the middle of the three sizes, diffusion. See scaling_l.py."""

from pathlib import Path

exec(Path(__file__).with_name('scaling_l.py').read_text())  # its settings; those below replace some

out_dir = 'out/scaling_m'
n_layer = 3
n_head = 4
n_kv_head = 4
d_model = 128
d_ff = 384
max_iters = 326                 # 4e12 FLOPs
