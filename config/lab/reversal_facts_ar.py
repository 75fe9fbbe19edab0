"""The autoregressive baseline of reversal_facts.py: only the causal mask differs."""

from pathlib import Path

exec(Path(__file__).with_name('reversal_facts.py').read_text())# its settings; those below replace some

out_dir = 'out/reversal_facts_ar'
causal = True                   # so the settings of masks and t have no effect
