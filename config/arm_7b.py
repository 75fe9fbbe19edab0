"""ARM 7B: the autoregressive baseline of LLaDA 8B (arXiv 2502.09992v3, App. B.2): 6,834,851,840 parameters."""

out_dir = 'out/arm_7b'
dataset = 'data/pretrain'       # made by data.py
causal = True

vocab_size = 126464
seq_len = 4096
n_layer = 28
n_head = 32
n_kv_head = 8
d_model = 4096
d_ff = 13440
rope_theta = 500000.0           # unconfirmed
norm_eps = 1e-5                 # unconfirmed
emb_std = 0.0                   # 1/sqrt(d_model), with the scheme named in the released config ("mitchell"): that
                                # pre-training used it is unconfirmed

optimizer = 'adamw'
beta1 = 0.9                     # unconfirmed: the paper names no betas; these are SMDM's (arXiv 2410.18514)
beta2 = 0.95                    # unconfirmed, SMDM's
weight_decay = 0.1              # LLaDA Sec. 2.2
grad_clip = 1.0                 # unconfirmed, SMDM's

batch_size = 4                  # for each GPU
global_batch = 4224             # App. B.2, chosen by grid search with the learning rate
learning_rate = 4.2e-4
max_iters = 128000              # 2214.59 G tokens, the last point of the paper's table
schedule = 'points'             # unconfirmed
lr_points = [[0, 0], [2000 * 4224 * 4096, 4.2e-4]]

eval_interval = 1000
eval_windows = 512
log_interval = 10
dtype = 'bfloat16'
compile = True
fsdp = -1
act_memory = 0.9                # half the memory of 1.0, by the compiler's plan: not measured
