"""LLaDA 8B (arXiv 2502.09992v3, App. B.2): 8,015,581,184 parameters, 2.3 T tokens, 0.13 M H800 hours.

    torchrun --nnodes=40 --nproc-per-node=8 ... train.py config/llada_8b.py --dataset=data/my
    python tests/lab/estimate.py config/llada_8b.py --gpus=320

The authors' data are not public; they describe 61 % English, 28 % code, 11 % Chinese, which would be
dataset = 'data/en:0.61,data/code:0.28,data/zh:0.11'. On 256 GPUs batches of 4 do not divide 1280 windows: use
5, or 160 or 320 GPUs. With SLURM (out_dir on a file system that all nodes see):

    #!/bin/bash
    #SBATCH --nodes=40 --ntasks-per-node=1 --gpus-per-node=8 --signal=TERM@600 --requeue
    HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    ls out/llada_8b/iter_*/state.json >/dev/null 2>&1 && RESUME=--resume
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1     # restarted groups meet in a new store
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=500       # seconds for the last save (torch 2.11 kills after 30)
    srun torchrun --nnodes=$SLURM_NNODES --nproc-per-node=8 --rdzv-id=$SLURM_JOB_ID --rdzv-backend=c10d \\
         --rdzv-endpoint=$HEAD:29500 --max-restarts=3 \\
         train.py config/llada_8b.py --dataset=data/my $RESUME

(torchrun itself ends with code 1 after SIGTERM, so look for the line "saved iteration". A save of 8B may take
minutes, because rank 0 reads the 96 GB again for their checksums.)
"""

out_dir = 'out/llada_8b'
dataset = 'data/pretrain'       # made by data.py

vocab_size = 126464             # App. B.2; the highest id in use is 126348
seq_len = 4096
n_layer = 32
n_head = 32
n_kv_head = 32                  # plain multi-head attention: a KV cache would not help
d_model = 4096
d_ff = 12288
rope_theta = 500000.0           # config.json of the release
norm_eps = 1e-5                 # config.json of the release
emb_std = 0.0                   # 1/sqrt(d_model), with the scheme named in the released config ("mitchell").
                                # That pre-training used it is unconfirmed

fixed_count = False             # Bernoulli masks and weight 1/t (Eq. 3, Alg. 1)
stratified = True               # LLaDA draws t i.i.d.; this has the same mean with less noise
mask_eps = 1e-3                 # the official guideline
random_length = 0.01            # App. B.1: 1 % of the data have a random length uniform in [1, 4096]

optimizer = 'adamw'
beta1 = 0.9                     # unconfirmed: the paper names no betas; these are SMDM's (arXiv 2410.18514)
beta2 = 0.95                    # unconfirmed, SMDM's
weight_decay = 0.1              # LLaDA Sec. 2.2
grad_clip = 1.0                 # unconfirmed, SMDM's

batch_size = 4                  # for each GPU
global_batch = 1280             # 320 GPUs, or fewer with accumulation
learning_rate = 4e-4
max_iters = 2300000000000 // (1280 * 4096)          # 2.3 T tokens: 438,690 updates
schedule = 'points'             # up to 4e-4 in 2000 iterations; 1e-4 from 1.2 T tokens; from 2 T down to 1e-5
lr_points = [[0, 0], [2000 * 1280 * 4096, 4e-4], [1.2e12, 4e-4],
             [1.2e12, 1e-4], [2.0e12, 1e-4], [2.3e12, 1e-5]]

eval_interval = 2000            # also between checkpoints
eval_windows = 512
log_interval = 10
dtype = 'bfloat16'
compile = True
fsdp = -1                       # 8 for HSDP within nodes of 8
act_memory = 0.9                # half the memory of 1.0, by the compiler's plan: not measured
