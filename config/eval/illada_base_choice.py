"""iLLaDA-8B-Base, multiple choice by confidence, with a visible EOS after the choice.

    python evaluate.py lm_eval iLLaDA-8B-Base config/eval/illada_base_choice.py

Source: iLLaDA's evaluation script, as read in forks of the official repository.
"""

task = 'lm_eval'
tasks = ['arc_challenge:0', 'hellaswag:0']
method = 'confidence'
pad_eos = True
add_bos = True
