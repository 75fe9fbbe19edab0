"""The autoregressive baseline of scaling_l.py, with the same number of FLOPs."""

from pathlib import Path

exec(Path(__file__).with_name('scaling_l.py').read_text())  # its settings; those below replace some

out_dir = 'out/scaling_l_ar'
causal = True                   # so the settings of masks and t have no effect
max_iters = 473                 # 1.6e13 FLOPs: its head predicts all tokens, not half of them
