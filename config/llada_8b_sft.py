"""Fine-tuning LLaDA 8B (arXiv 2502.09992v3, Sec. 2.3 and App. B.1): 4.5 M pairs, 3 epochs, Eq. 5.

    python data.py --input='sft/*.jsonl' --out=data/sft --tokenizer=LLaDA-8B-Instruct/tokenizer.json
    torchrun --nnodes=16 --nproc-per-node=8 ... train.py config/llada_8b_sft.py --init_from=LLaDA-8B-Base

(The tokenizer of Instruct names the chat tokens, that of Base does not.) The authors' pairs are not public.
"""

out_dir = 'out/llada_8b_sft'
init_from = 'LLaDA-8B-Base'     # or a run of config/llada_8b.py
dataset = 'data/sft'            # made by data.py, from "messages" or "prompt" and "response"
masking = 'response'            # Eq. 5: the prompt is never hidden
pad_group = 2                   # EOS pads to the longest of the rows of a GPU, is hidden and counted (App. B.1 says
                                # "mini-batch"; that this is meant is unconfirmed)

vocab_size = 126464
seq_len = 4096
n_layer = 32
n_head = 32
n_kv_head = 32
d_model = 4096
d_ff = 12288
rope_theta = 500000.0
norm_eps = 1e-5

fixed_count = False             # Bernoulli masks and weight 1/t
stratified = True               # LLaDA draws t i.i.d.
mask_eps = 1e-3                 # the official guideline

optimizer = 'adamw'
beta1 = 0.9                     # unconfirmed, SMDM's
beta2 = 0.95                    # unconfirmed, SMDM's
weight_decay = 0.1
grad_clip = 1.0                 # unconfirmed, SMDM's

batch_size = 2                  # for each GPU
global_batch = 256
max_iters = 3 * 4500000 // 256  # 3 epochs of 4.5 M pairs: 52,734 updates
learning_rate = 2.5e-5
schedule = 'wsd'                # linear from 0 in 50 iterations, constant, linear to 2.5e-6 over the last 10 %
warmup_iters = 50
decay_iters = max_iters // 10
min_lr_ratio = 0.1

eval_interval = 1000
log_interval = 10
sample_tokens = 0
dtype = 'bfloat16'
compile = True
fsdp = -1
act_memory = 0.9                # half the memory of 1.0, by the compiler's plan: not measured
