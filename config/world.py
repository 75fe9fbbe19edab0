"""Made-up stories of known probability (tests/lab/worlds.py): 1 M parameters, fluent in minutes.

First:  python tests/lab/worlds.py       One story per row, after BOS.
Afterwards:  python tests/lab/experiments.py world out/world
"""

out_dir = 'out/world'
dataset = 'world'
masking = 'response'
seq_len = 40
d_model = 128
d_ff = 384
batch_size = 32
logit_normal = 0.75             # wider than in docs.py, because a story begins wholly hidden: tests/lab/RESULTS.md
max_iters = 4000
schedule = 'cosine'
eval_interval = 1000
sample_tokens = 40

# the recipe of docs.py
optimizer = 'muon'              # on the matrices of the blocks
learning_rate = 2e-2            # AdamW's, for embedding, head and norms
emb_std = 1.0
fixed_count = True              # Eq. 14
complementary = True
