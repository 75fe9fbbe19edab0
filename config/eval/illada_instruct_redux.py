"""iLLaDA-8B-Instruct, MMLU-Redux (another source has 3 here and 4 for MMLU: unconfirmed).

    python evaluate.py lm_eval iLLaDA-8B-Instruct config/eval/illada_instruct_redux.py

Source: iLLaDA's evaluation script, as read in forks of the official repository.
"""

task = 'lm_eval'
tasks = ['mmlu_redux_generative:5']
instruct = True
gen_length = 4
