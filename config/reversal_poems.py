"""The reversal experiment on couplets: learn them by heart, then give the next line for one, or the one before.

Takes a local file of couplets, [{"first", "second"}, ...], such as the poems of the official repository:
python data.py --input=poem_data.json --out=data/poems --tokenizer=chars
Afterwards:  python evaluate.py reversal out/reversal_poems out/reversal_poems_ar
"""

out_dir = 'out/reversal_poems'
dataset = 'data/poems'
masking = 'response'
seq_len = 32
d_model = 128
d_ff = 384
batch_size = 64
max_iters = 2000
eval_interval = 500
sample_tokens = 20
then = 'python evaluate.py reversal out/reversal_poems'
