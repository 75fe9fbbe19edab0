"""The reversal experiment on made-up facts ("Nilo is the mother of Rasi"): memorise, then fill in either end.

Half of the 64 pairs are stated in both directions, and a quarter in each direction only. Diffusion is asked
for the later and for the earlier name of the statements it has seen, and for the statements it has not seen.
First:  python tests/lab/worlds.py       Afterwards:
python tests/lab/experiments.py reversal out/reversal_facts out/reversal_facts_ar
"""

out_dir = 'out/reversal_facts'
dataset = 'facts'
masking = 'response'
seq_len = 28
d_model = 128
d_ff = 384
batch_size = 64
max_iters = 1500
schedule = 'cosine'
eval_interval = 500
sample_tokens = 28

# the recipe of docs.py
optimizer = 'muon'              # on the matrices of the blocks
learning_rate = 2e-2            # AdamW's, for embedding, head and norms
emb_std = 1.0
fixed_count = True              # Eq. 14
