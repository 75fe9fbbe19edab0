"""iLLaDA-8B-Instruct, MMLU (another source has 4 here and 3 for MMLU-Redux: unconfirmed).

    python evaluate.py lm_eval iLLaDA-8B-Instruct config/eval/illada_instruct_short.py

Source: iLLaDA's evaluation script, as read in forks of the official repository.
"""

task = 'lm_eval'
tasks = ['mmlu_generative:5']
instruct = True
gen_length = 3
