"""iLLaDA-8B-Instruct, MBPP, with reasoning. Tasks in _reasoning are from its own harness: give their .yaml.

    python tests/lab/hooks.py lm_eval iLLaDA-8B-Instruct config/eval/illada_instruct_mbpp.py

(tests/lab/hooks.py makes "</think>" more and more likely, as the authors do; evaluate.py runs it without.)
Source: iLLaDA's evaluation script, as read in forks of the official repository.
"""

task = 'lm_eval'
tasks = ['mbpp_reasoning:0']
gen_length = 2048
instruct = True
variable_length = True
block_length = 16
steps = 16                      # of a block
