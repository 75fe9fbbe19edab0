"""LLaDA-8B-Base, WinoGrande by Eq. 6.

    python evaluate.py lm_eval LLaDA-8B-Base config/eval/llada_base_winogrande.py

Source: EVAL.md of the official repository and App. B of the paper (arXiv 2502.09992v3).
"""

task = 'lm_eval'
tasks = ['winogrande:5']
mc_num = 128
