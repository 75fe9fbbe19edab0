"""Tiny Shakespeare, 1.1 MB. Get it first:  python data.py shakespeare  (or with --input=input.txt from elsewhere)."""

out_dir = 'out/shakespeare'
dataset = 'shakespeare'

# the recipe of docs.py
optimizer = 'muon'
learning_rate = 2e-2
emb_std = 1.0
fixed_count = True
logit_normal = 0.5
complementary = True
decay_iters = 950
