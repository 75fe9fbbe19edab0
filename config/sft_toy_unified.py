"""Fine-tuning as iLLaDA does it, on the data of sft_toy.py: the same masking as in pre-training.

All examples (prompt, answer, one EOS) are one long stream, windows are cut from it, every token may be hidden and is in
the loss; attention stays within an example. (Whether iLLaDA's SFT also splits 30 % of the windows is unconfirmed.)
First:  python train.py config/world.py       Afterwards:  python evaluate.py flood out/sft_toy out/sft_toy_unified
"""

out_dir = 'out/sft_toy_unified'
init_from = 'out/world'
dataset = 'instruct'
isolate = True
seq_len = 128
d_model = 128
d_ff = 384
batch_size = 24
max_iters = 2400
learning_rate = 1e-2
muon_lr = 4e-3
schedule = 'wsd'
warmup_iters = 50
decay_iters = max_iters // 10
min_lr_ratio = 0.1
eval_interval = 600
sample_tokens = 0
then = 'python evaluate.py flood out/sft_toy out/sft_toy_unified'
