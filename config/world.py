"""Made-up stories whose exact probability is known (data.STORY): a million parameters, fluent in three CPU minutes.

One story a row, after BOS. Afterwards:  python evaluate.py world out/world
"""

out_dir = 'out/world'
dataset = 'world'
masking = 'response'
seq_len = 37
d_model = 128
d_ff = 384
batch_size = 32
max_iters = 2600
eval_interval = 650
sample_tokens = 37
then = 'python evaluate.py world out/world'
