"""iLLaDA-8B-Base, tasks by generation: variable length, blocks of 32 in 32 steps.

    python evaluate.py lm_eval iLLaDA-8B-Base config/eval/illada_base.py

Source: iLLaDA's evaluation script, as read in forks of the official repository.
"""

task = 'lm_eval'
tasks = ['bbh', 'minerva_math', 'mbpp', 'gsm8k_cot:8']
gen_length = 1024
variable_length = True
block_length = 32
steps = 32                      # of a block
