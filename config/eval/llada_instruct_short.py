"""LLaDA-8B-Instruct, one-letter answers.

    python evaluate.py lm_eval LLaDA-8B-Instruct config/eval/llada_instruct_short.py

Source: EVAL.md of the official repository and App. B of the paper (arXiv 2502.09992v3).
"""

task = 'lm_eval'
tasks = ['mmlu_generative', 'hellaswag']
instruct = True
gen_length = 3
