"""The autoregressive baseline of reversal_facts.py: the same but for the causal mask, same updates and tokens."""

out_dir = 'out/reversal_facts_ar'
dataset = 'facts'
masking = 'response'
causal = True
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
