"""The reversal experiment on couplets: memorise them, then give the line after or before a given one.

Takes a local file of couplets, [{"first", "second"}, ...], such as the poems of the official repository:
python tests/lab/worlds.py --poems=poem_data.json
Afterwards:
python tests/lab/experiments.py reversal out/reversal_poems out/reversal_poems_ar --poems=poem_data.json
"""

out_dir = 'out/reversal_poems'
dataset = 'data/poems'
masking = 'response'
seq_len = 32
d_model = 128
d_ff = 384
batch_size = 64
max_iters = 2000
schedule = 'cosine'
eval_interval = 500
sample_tokens = 20

# the recipe of docs.py
optimizer = 'muon'              # on the matrices of the blocks
learning_rate = 2e-2            # AdamW's, for embedding, head and norms
emb_std = 1.0
fixed_count = True              # Eq. 14
