"""iLLaDA-8B-Instruct, Math, MMLU-Pro, with reasoning. Tasks in _reasoning are from its own harness: give their .yaml.

    python tests/lab/hooks.py lm_eval iLLaDA-8B-Instruct config/eval/illada_instruct_math.py

(tests/lab/hooks.py makes "</think>" more and more likely, as the authors do; evaluate.py runs it without.)
Source: iLLaDA's evaluation script, as read in forks of the official repository.
"""

task = 'lm_eval'
tasks = ['minerva_math:0', 'mmlu_pro_reasoning:0']
gen_length = 4096
instruct = True
variable_length = True
block_length = 32
steps = 32                      # of a block
