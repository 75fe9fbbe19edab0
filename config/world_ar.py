"""The autoregressive baseline of world.py: the same but for the causal mask, on the same updates and tokens."""

out_dir = 'out/world_ar'
dataset = 'world'
masking = 'response'
causal = True
seq_len = 40
d_model = 128
d_ff = 384
batch_size = 32
max_iters = 2600
schedule = 'cosine'
eval_interval = 650
sample_tokens = 40

# the recipe of docs.py
optimizer = 'muon'              # on the matrices of the blocks
learning_rate = 2e-2            # AdamW's, for embedding, head and norms
emb_std = 1.0
