"""The autoregressive baseline of docs.py: only the causal mask differs, not tokens or optimizer.

For the same number of tokens, diffusion sees each window twice in an update under two masks. Here none
repeats.
"""

from pathlib import Path

exec(Path(__file__).with_name('docs.py').read_text())       # its settings; those below replace some

out_dir = 'out/docs_ar'
causal = True                   # so the settings of masks and t have no effect
