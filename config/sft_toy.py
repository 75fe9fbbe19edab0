"""Fine-tuning as LLaDA does it (Eq. 5; Sec. 2.3, App. B.1), on instructions about the made-up world.

Each row is one example, whose prompt is never hidden. Of a dialogue one turn is drawn. EOS pads to the
longest row of the update, and is hidden and counted like the answer. The learning rate warms up, holds, and
falls to a tenth over the last quarter (over the last tenth, as in the paper, sorting stayed at 97 %).
First:  python train.py config/world.py       Afterwards:  python sample.py out/sft_toy --chat --gen_length=16
"""

out_dir = 'out/sft_toy'
init_from = 'out/world'
dataset = 'instruct'
masking = 'response'
seq_len = 96
d_model = 128
d_ff = 384
batch_size = 32
max_iters = 8000
learning_rate = 1e-2
muon_lr = 4e-3
schedule = 'wsd'
warmup_iters = 50
decay_iters = max_iters // 4
min_lr_ratio = 0.1
eval_interval = 2000
sample_tokens = 0

# the recipe of docs.py
optimizer = 'muon'              # on the matrices of the blocks
emb_std = 1.0
fixed_count = True              # Eq. 14
