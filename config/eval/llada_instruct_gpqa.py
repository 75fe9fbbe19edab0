"""LLaDA-8B-Instruct, GPQA: EOS and EoT are written last.

    python evaluate.py lm_eval LLaDA-8B-Instruct config/eval/llada_instruct_gpqa.py

Source: EVAL.md of the official repository and App. B of the paper (arXiv 2502.09992v3).
"""

task = 'lm_eval'
tasks = ['gpqa_main_generative_n_shot']
instruct = True
gen_length = 64
confidence_eos_eot_inf = True
