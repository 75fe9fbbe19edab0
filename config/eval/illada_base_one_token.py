"""iLLaDA-8B-Base, multiple choice whose answer is one token.

    python evaluate.py lm_eval iLLaDA-8B-Base config/eval/illada_base_one_token.py

Source: iLLaDA's evaluation script, as read in forks of the official repository.
"""

task = 'lm_eval'
tasks = ['mmlu:5', 'cmmlu:5']
mc_num = 1
pad_eos = True
add_bos = True
