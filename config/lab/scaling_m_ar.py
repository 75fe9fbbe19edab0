"""The autoregressive baseline of scaling_m.py, with the same number of FLOPs."""

from pathlib import Path

exec(Path(__file__).with_name('scaling_m.py').read_text())  # its settings; those below replace some

out_dir = 'out/scaling_m_ar'
causal = True                   # so the settings of masks and t have no effect
max_iters = 258                 # 4e12 FLOPs: its head predicts all tokens, not half of them
