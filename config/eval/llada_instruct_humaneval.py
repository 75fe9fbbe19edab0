"""LLaDA-8B-Instruct, HumanEval: EOS is never written.

    python evaluate.py lm_eval LLaDA-8B-Instruct config/eval/llada_instruct_humaneval.py

Source: EVAL.md of the official repository and App. B of the paper (arXiv 2502.09992v3).
"""

task = 'lm_eval'
tasks = ['humaneval_instruct']
instruct = True
gen_length = 512
logits_eos_inf = True
