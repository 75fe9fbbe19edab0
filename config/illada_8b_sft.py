"""Fine-tuning iLLaDA 8B (arXiv 2606.25331): 25 B tokens, 12 epochs, masked like pre-training, packed.

    python data.py --input='sft/*.jsonl' --out=data/sft --tokenizer=iLLaDA-8B-Base/tokenizer.json
    torchrun --nnodes=32 --nproc-per-node=8 ... train.py config/illada_8b_sft.py --init_from=iLLaDA-8B-Base

Second-hand throughout, like config/illada_8b.py. The chat template is the one that comes with its tokenizer.
Network, optimizer and machine are those of pre-training.
"""

from pathlib import Path

exec(Path(__file__).with_name('illada_8b.py').read_text())  # its settings; those below replace some

out_dir = 'out/illada_8b_sft'
init_from = 'iLLaDA-8B-Base'
dataset = 'data/sft'            # prompt, response, EOS, all in one stream, in which any token may be hidden
random_split = 0.3              # as in pre-training (split windows are packed); unconfirmed for fine-tuning
isolate = False                 # True: attention does not cross into the next example; unconfirmed too

global_batch = 512              # unconfirmed: no source names the batch
max_iters = 12 * 25000000000 // (512 * 8192)        # 12 epochs of 25 B tokens
learning_rate = 5e-6
schedule = 'wsd'                # warm up to 5e-6, constant, linear to 5e-7 over the last 10 %
warmup_iters = 50               # unconfirmed, LLaDA's
decay_iters = max_iters // 10
min_lr_ratio = 0.1

eval_windows = 256
sample_tokens = 0
