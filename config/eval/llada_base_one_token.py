"""LLaDA-8B-Base, multiple choice whose answer is one token: one evaluation is exact.

    python evaluate.py lm_eval LLaDA-8B-Base config/eval/llada_base_one_token.py

Source: EVAL.md of the official repository and App. B of the paper (arXiv 2502.09992v3).
"""

task = 'lm_eval'
tasks = ['mmlu:5', 'cmmlu:5', 'ceval-valid:5']
mc_num = 1
