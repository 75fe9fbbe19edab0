"""The autoregressive baseline of docs.py: the same Transformer but for the causal mask, same tokens and optimizer.

(With the same number of tokens diffusion sees each window twice in an update, under two masks; here none repeats.)
"""

out_dir = 'out/docs_ar'
dataset = 'docs'
causal = True

# the recipe of docs.py
optimizer = 'muon'              # on the matrices of the blocks
learning_rate = 2e-2            # AdamW's, for embedding, head and norms
emb_std = 1.0
decay_iters = 950
