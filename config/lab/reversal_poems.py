"""The reversal experiment on couplets: memorise them, then give the line after or before a given one.

Takes a local file of couplets, [{"first", "second"}, ...], such as the poems of the official repository:
python tests/lab/worlds.py --poems=poem_data.json
Afterwards:
python tests/lab/experiments.py reversal out/reversal_poems out/reversal_poems_ar --poems=poem_data.json
"""

from pathlib import Path

exec(Path(__file__).with_name('reversal_facts.py').read_text())# its settings; those below replace some

out_dir = 'out/reversal_poems'
dataset = 'data/poems'
seq_len = 32
max_iters = 2000
sample_tokens = 20
