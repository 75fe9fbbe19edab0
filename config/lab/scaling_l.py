"""Scaling at equal FLOPs: the largest of three sizes, diffusion. The other files say how they differ from it.

Each of scaling_s, _m and _l gets the same training FLOPs as its _ar twin, as counted by
Transformer.flops_per_token, on less than three epochs of the data. Afterwards:
python tests/lab/experiments.py scaling 'out/scaling_*' --out=scaling.csv
"""

out_dir = 'out/scaling_l'
dataset = 'docs'
n_layer = 4
n_head = 4
n_kv_head = 4
d_model = 192
d_ff = 512
max_iters = 552                 # 1.6e13 FLOPs
schedule = 'cosine'
eval_interval = 100000          # at the end only
sample_tokens = 0

# the recipe of docs.py
optimizer = 'muon'              # on the matrices of the blocks
learning_rate = 2e-2            # AdamW's, for embedding, head and norms
emb_std = 1.0
fixed_count = True              # Eq. 14
logit_normal = 0.5              # see docs.py
complementary = True
