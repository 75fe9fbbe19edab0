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
then = 'python evaluate.py bound out/world out/world_ar'
