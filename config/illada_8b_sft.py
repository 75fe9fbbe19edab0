"""Fine-tuning iLLaDA 8B (arXiv 2606.25331): 25 B tokens, 12 epochs, masked like pre-training, packed.

    python data.py --input='sft/*.jsonl' --out=data/sft --tokenizer=iLLaDA-8B-Base/tokenizer.json
    torchrun --nnodes=32 --nproc-per-node=8 ... train.py config/illada_8b_sft.py --init_from=iLLaDA-8B-Base

Second-hand throughout, like config/illada_8b.py. The chat template is the one that comes with its tokenizer.
"""

out_dir = 'out/illada_8b_sft'
init_from = 'iLLaDA-8B-Base'
dataset = 'data/sft'            # prompt, response, one EOS; all examples form one stream, any token may be hidden
random_split = 0.3              # as in pre-training (split windows are packed); unconfirmed for fine-tuning
isolate = False                 # True: attention does not cross from one example into the next; unconfirmed too

vocab_size = 155136
seq_len = 8192
n_layer = 32
n_head = 32
n_kv_head = 8
d_model = 4096
d_ff = 14336
tied = True
rope_theta = 500000.0           # unconfirmed: read it from the release's config.json
norm_eps = 1e-6                 # unconfirmed: likewise, see illada_8b.py
rope_fp32 = False

fixed_count = False
stratified = True
mask_eps = 1e-3

optimizer = 'adamw'
beta1 = 0.9                     # unconfirmed, SMDM's
beta2 = 0.95                    # unconfirmed, SMDM's
weight_decay = 0.1
grad_clip = 1.0                 # unconfirmed, SMDM's

batch_size = 2                  # for each GPU
global_batch = 512              # unconfirmed: no source names the batch
max_iters = 12 * 25000000000 // (512 * 8192)        # 12 epochs of 25 B tokens
learning_rate = 5e-6
schedule = 'wsd'                # warm up to 5e-6, constant, linear to 5e-7 over the last 10 %
warmup_iters = 50               # unconfirmed, LLaDA's
decay_iters = max_iters // 10
min_lr_ratio = 0.1

eval_interval = 1000
log_interval = 10
sample_tokens = 0
dtype = 'bfloat16'
compile = True
fsdp = -1
act_memory = 0.9                # half the memory of 1.0, by the compiler's plan: not measured
