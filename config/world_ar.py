"""The autoregressive baseline of world.py: only the causal mask differs."""

from pathlib import Path

exec(Path(__file__).with_name('world.py').read_text())      # its settings; those below replace some

out_dir = 'out/world_ar'
causal = True                   # so the settings of masks and t have no effect
