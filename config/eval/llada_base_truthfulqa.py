"""LLaDA-8B-Base, TruthfulQA by Eq. 6 with guidance of 2 (Table 1 of the paper has none: --cfg_scale=0).

    python evaluate.py lm_eval LLaDA-8B-Base config/eval/llada_base_truthfulqa.py

Source: EVAL.md of the official repository and App. B of the paper (arXiv 2502.09992v3).
"""

task = 'lm_eval'
tasks = ['truthfulqa_mc2:0']
mc_num = 128
cfg_scale = 2.0
