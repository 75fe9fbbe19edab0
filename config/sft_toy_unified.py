"""Fine-tuning as iLLaDA does it, on the data of sft_toy.py: the same masking as in pre-training.

All examples (prompt, answer, one EOS) form one long stream, which is cut into windows. Every token may be
hidden, and then it counts. An answer that is hidden while its whole question is in sight, as somebody asks, is
then a rare case of many. Masks in waves make it up to a hundred and fifty times as frequent: tests/lab/RESULTS.md.
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
logit_normal = 0.5              # not the paper's uniform t: 60 % right instead of 54 after 3200 updates
complementary = True            # not the paper's either, but the objective is the same
waves = 0.5                     # not quite Eq. 14 any more, but a question is often in sight while its answer is hidden
max_iters = 5000                # six epochs (iLLaDA: twelve)
learning_rate = 1e-2
muon_lr = 4e-3
schedule = 'wsd'
warmup_iters = 50
decay_iters = 1500
eval_interval = 2500
sample_tokens = 0

# the recipe of docs.py
optimizer = 'muon'              # on the matrices of the blocks
emb_std = 1.0
fixed_count = True              # Eq. 14
