"""LLaDA-8B-Instruct, MBPP: EOS and EoT are written last.

    python evaluate.py lm_eval LLaDA-8B-Instruct config/eval/llada_instruct_mbpp.py

Source: EVAL.md of the official repository and App. B of the paper (arXiv 2502.09992v3).
"""

task = 'lm_eval'
tasks = ['mbpp_instruct']
instruct = True
gen_length = 256
confidence_eos_eot_inf = True
