"""iLLaDA-8B-Base, HumanEval: pure diffusion.

    python evaluate.py lm_eval iLLaDA-8B-Base config/eval/illada_base_humaneval.py

Source: iLLaDA's evaluation script, as read in forks of the official repository.
"""

task = 'lm_eval'
tasks = ['humaneval']
gen_length = 512
