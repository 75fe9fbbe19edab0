"""The first run: a LLaDA-style model on the documentation that ships with every Python, on two CPU cores.

    python train.py config/docs.py

The defaults of train.py are the paper's objective. What differs here makes minutes on a laptop worth while,
and tests/lab/RESULTS.md has what each line gains. The validation bound is that of the paper (Eq. 6) in any
case.
"""

out_dir = 'out/docs'
dataset = 'docs'

optimizer = 'muon'              # on the matrices of the blocks, where AdamW needs far more updates
muon_lr = 5e-3
learning_rate = 2e-2            # AdamW's, for embedding, head and norms
emb_std = 1.0                   # a large embedding, which goes with that rate
fixed_count = True              # Eq. 14: exactly l of L tokens are hidden. The same objective with less noise
logit_normal = 0.5              # more of middle t, so the training loss is no longer the reported bound
complementary = True            # every window twice in an update, under masks that complement each other
max_iters = 1600
decay_iters = 950               # linear to 0
