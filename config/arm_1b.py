"""ARM 1B: the autoregressive twin of llada_1b.py, same Transformer, same data (arXiv 2502.09992v3, App. B.2)."""

out_dir = 'out/arm_1b'
dataset = 'data/pretrain'       # made by data.py
causal = True

vocab_size = 126464
seq_len = 4096
n_layer = 22
n_head = 32
n_kv_head = 4
d_model = 2048
d_ff = 5634                     # see llada_1b.py
rope_theta = 500000.0           # unconfirmed
norm_eps = 1e-5                 # unconfirmed
emb_std = 0.0                   # 1/sqrt(d_model), with the scheme named in the released config ("mitchell"): that
                                # pre-training used it is unconfirmed

optimizer = 'adamw'
beta1 = 0.9                     # unconfirmed: the paper names no betas; these are SMDM's (arXiv 2410.18514)
beta2 = 0.95                    # unconfirmed, SMDM's
weight_decay = 0.1              # LLaDA Sec. 2.2
grad_clip = 1.0                 # unconfirmed, SMDM's

batch_size = 8                  # for each GPU
global_batch = 1280
learning_rate = 4e-4
max_iters = 26400               # 138.41 G tokens, the last point of the paper's table
schedule = 'points'             # unconfirmed
lr_points = [[0, 0], [2000 * 1280 * 4096, 4e-4]]

eval_interval = 1000
eval_windows = 512
log_interval = 10
dtype = 'bfloat16'
compile = True
fsdp = 0
act_memory = 0.9                # half the memory of 1.0, by the compiler's plan: not measured
