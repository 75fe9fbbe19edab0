"""Scaling at equal FLOPs, the middle of three sizes, the autoregressive baseline.

Each of scaling_s, _m, _l gets the same training FLOPs as its _ar twin, counted by Transformer.flops_per_token,
on less than three epochs of the data. Afterwards:
python tests/lab/experiments.py scaling 'out/scaling_*' --out=scaling.csv
"""

out_dir = 'out/scaling_m_ar'
dataset = 'docs'
causal = True
n_layer = 3
n_head = 4
n_kv_head = 4
d_model = 128
d_ff = 384
max_iters = 258                 # 4e12 FLOPs
schedule = 'cosine'
eval_interval = 100000          # at the end only
sample_tokens = 0

# the recipe of docs.py
optimizer = 'muon'              # on the matrices of the blocks
learning_rate = 2e-2            # AdamW's, for embedding, head and norms
emb_std = 1.0
