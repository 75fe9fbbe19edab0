"""Fine-tuning as iLLaDA does it, on the data of sft_toy.py: the same masking as in pre-training.

All examples (prompt, answer, one EOS) are one long stream, windows are cut from it, every token may be hidden and is in
the loss. An answer given the whole question is then a rare case of many, so it takes more updates than sft_toy.py.
First:  python train.py config/world.py       Afterwards:
python tests/lab/experiments.py flood out/sft_toy out/sft_toy_unified
"""

out_dir = 'out/sft_toy_unified'
init_from = 'out/world'
dataset = 'instruct'
random_split = 0.3              # as in pre-training; that SFT does it too is unconfirmed
seq_len = 128
d_model = 128
d_ff = 384
batch_size = 24
logit_normal = 0.0              # answers begin at t = 1: uniform t, as in the paper
max_iters = 3200
learning_rate = 1e-2
muon_lr = 4e-3
schedule = 'wsd'
warmup_iters = 50
decay_iters = max_iters // 10
min_lr_ratio = 0.1
eval_interval = 800
sample_tokens = 0
then = 'python tests/lab/experiments.py flood out/sft_toy out/sft_toy_unified'
