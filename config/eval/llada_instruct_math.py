"""LLaDA-8B-Instruct, GSM8K, Math and IFEval: EOS and EoT are written last.

    python evaluate.py lm_eval LLaDA-8B-Instruct config/eval/llada_instruct_math.py

Source: EVAL.md of the official repository and App. B of the paper (arXiv 2502.09992v3).
"""

task = 'lm_eval'
tasks = ['gsm8k', 'minerva_math', 'ifeval']
instruct = True
gen_length = 512
confidence_eos_eot_inf = True
