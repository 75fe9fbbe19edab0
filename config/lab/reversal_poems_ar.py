"""The autoregressive baseline of reversal_poems.py: only the causal mask differs."""

from pathlib import Path

exec(Path(__file__).with_name('reversal_poems.py').read_text())# its settings; those below replace some

out_dir = 'out/reversal_poems_ar'
causal = True                   # so the settings of masks and t have no effect
