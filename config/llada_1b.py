"""LLaDA 1B, for the scaling experiment (arXiv 2502.09992v3, Sec. 3.1 and App. B.2): 1,487,243,264 parameters.

The paper trains it on up to 461 G tokens. Apart from the peak learning rate and batch, its schedule is not stated.
"""

out_dir = 'out/llada_1b'
dataset = 'data/pretrain'       # made by data.py

vocab_size = 126464
seq_len = 4096
n_layer = 22
n_head = 32
n_kv_head = 4
d_model = 2048
d_ff = 5634                     # as printed; perhaps a misprint of 5632, which fits tensor cores and rounds to the same
                                # parameter counts: on an H100 --d_ff=5632 makes these products 2.5 times as fast
rope_theta = 500000.0           # unconfirmed for this size
norm_eps = 1e-5                 # unconfirmed for this size
emb_std = 0.0                   # 1/sqrt(d_model), with the scheme named in the released config ("mitchell"): that
                                # pre-training used it is unconfirmed

fixed_count = False             # Bernoulli masks and weight 1/t (Eq. 3, Alg. 1)
stratified = True               # LLaDA draws t i.i.d.; the same mean with less noise and a steadier number of masks
mask_eps = 1e-3                 # the official guideline
random_length = 0.01            # App. B.1: 1 % of the data have a random length uniform in [1, 4096]

optimizer = 'adamw'
beta1 = 0.9                     # unconfirmed: the paper names no betas; these are SMDM's (arXiv 2410.18514)
beta2 = 0.95                    # unconfirmed, SMDM's
weight_decay = 0.1              # LLaDA Sec. 2.2
grad_clip = 1.0                 # unconfirmed, SMDM's

batch_size = 8                  # for each GPU
global_batch = 1280
learning_rate = 4e-4
max_iters = 88000               # 461.37 G tokens, the last point of the paper's table
schedule = 'points'             # unconfirmed: warm up as the 8B does, then hold
lr_points = [[0, 0], [2000 * 1280 * 4096, 4e-4]]

eval_interval = 1000
eval_windows = 512
log_interval = 10
dtype = 'bfloat16'
compile = True
fsdp = 0                        # 24 GB of states fit on one GPU: DDP
act_memory = 0.9                # half the memory of 1.0, by the compiler's plan: not measured
