"""iLLaDA 8B (arXiv 2606.25331): 7,615,025,152 parameters, 12 T tokens, windows of 8192, 30 % of them split.

Second-hand throughout: the paper's text was not at hand when this was written, only summaries and the code of
the model.
"""

out_dir = 'out/illada_8b'
dataset = 'data/pretrain'       # made by data.py

vocab_size = 155136
seq_len = 8192
n_layer = 32
n_head = 32
n_kv_head = 8                   # grouped-query attention
d_model = 4096
d_ff = 14336
tied = True
rope_theta = 500000.0           # unconfirmed: compare with the config.json of the release
norm_eps = 1e-6                 # unconfirmed, but that of its ancestor Seed-Coder-8B-Base, like rope_theta
rope_fp32 = False               # its code rotates in the dtype of queries and keys
emb_std = 0.0                   # the scheme of LLaDA; iLLaDA's code has another, whose std is unconfirmed

fixed_count = False             # Eq. 3, as in LLaDA
stratified = True
mask_eps = 1e-3
random_split = 0.3              # replaces LLaDA's random length
isolate = True                  # attention does not cross documents

optimizer = 'adamw'
beta1 = 0.9                     # unconfirmed: the paper names no betas; these are SMDM's (arXiv 2410.18514)
beta2 = 0.95                    # unconfirmed, SMDM's
weight_decay = 0.1              # as LLaDA; that norms are not decayed is unconfirmed
grad_clip = 1.0                 # unconfirmed, SMDM's

batch_size = 2                  # for each GPU
global_batch = 640              # unconfirmed: LLaDA's number of tokens
learning_rate = 2e-4
max_iters = 12000000000000 // (640 * 8192)          # 12 T tokens
schedule = 'cosine'             # warm up, hold until the loss plateaus, half a cosine down to 5e-6. That the
                                # warm-up takes 2000 iterations and the cosine begins at 10 T tokens is
                                # unconfirmed
warmup_iters = 2000
decay_iters = 2000000000000 // (640 * 8192)
min_lr_ratio = 0.025

eval_interval = 2000            # also between checkpoints
eval_windows = 512
log_interval = 10
dtype = 'bfloat16'
compile = True
fsdp = -1
act_memory = 0.9                # half the memory of 1.0, by the compiler's plan: not measured
