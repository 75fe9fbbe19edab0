"""LLaDA-8B-Base, multiple choice by Eq. 6 with guidance of 0.5 (Table 1 of the paper has none: --cfg_scale=0).

    python evaluate.py lm_eval LLaDA-8B-Base config/eval/llada_base_guided.py

Source: EVAL.md of the official repository and App. B of the paper (arXiv 2502.09992v3).
"""

task = 'lm_eval'
tasks = ['arc_challenge:0', 'hellaswag:0', 'piqa:0', 'gpqa_main_n_shot:5']
mc_num = 128
cfg_scale = 0.5
