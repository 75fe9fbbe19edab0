"""LLaDA-8B-Instruct, ARC-C.

    python evaluate.py lm_eval LLaDA-8B-Instruct config/eval/llada_instruct_arc.py

Source: EVAL.md of the official repository and App. B of the paper (arXiv 2502.09992v3).
"""

task = 'lm_eval'
tasks = ['arc_challenge_chat']
instruct = True
gen_length = 512
