"""Fine-tuning LLaDA 8B (arXiv 2502.09992v3, Sec. 2.3 and App. B.1): 4.5 M pairs, 3 epochs, Eq. 5.

    python data.py --input='sft/*.jsonl' --out=data/sft --tokenizer=LLaDA-8B-Instruct/tokenizer.json
    torchrun --nnodes=16 --nproc-per-node=8 ... train.py config/llada_8b_sft.py --init_from=LLaDA-8B-Base

(The tokenizer of Instruct names the chat tokens, that of Base does not.) The authors' pairs are not public.
Network, optimizer and machine are those of pre-training.
"""

from pathlib import Path

exec(Path(__file__).with_name('llada_8b.py').read_text())   # its settings; those below replace some

out_dir = 'out/llada_8b_sft'
init_from = 'LLaDA-8B-Base'     # or a run of config/llada_8b.py
dataset = 'data/sft'            # made by data.py, from "messages" or "prompt" and "response"
masking = 'response'            # Eq. 5: the prompt is never hidden
random_length = 0.0             # of windows only
pad_group = 2                   # EOS pads to the longest row of a GPU, and is hidden and counted (App. B.1
                                # says "mini-batch"; that this is meant is unconfirmed)

batch_size = 2                  # for each GPU
global_batch = 256
max_iters = 3 * 4500000 // 256  # 3 epochs of 4.5 M pairs: 52,734 updates
learning_rate = 2.5e-5
schedule = 'wsd'                # linear from 0 in 50 iterations, constant, linear to 2.5e-6 in the last 10 %
lr_points = []
warmup_iters = 50
decay_iters = max_iters // 10
min_lr_ratio = 0.1

eval_windows = 256
sample_tokens = 0
