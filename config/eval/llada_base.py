"""LLaDA-8B-Base, tasks by generation: length, steps and block 1024, greedy.

    python evaluate.py lm_eval LLaDA-8B-Base config/eval/llada_base.py

Source: EVAL.md of the official repository and App. B of the paper (arXiv 2502.09992v3).
"""

task = 'lm_eval'
tasks = ['bbh:3', 'gsm8k:4', 'minerva_math:4', 'humaneval:0', 'mbpp:4']
gen_length = 1024
