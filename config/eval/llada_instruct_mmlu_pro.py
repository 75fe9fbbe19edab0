"""LLaDA-8B-Instruct, MMLU-Pro.

    python evaluate.py lm_eval LLaDA-8B-Instruct config/eval/llada_instruct_mmlu_pro.py

Source: EVAL.md of the official repository and App. B of the paper (arXiv 2502.09992v3).
"""

task = 'lm_eval'
tasks = ['mmlu_pro']
instruct = True
gen_length = 256
