"""Sampling as in iLLaDA's evaluation of the Instruct model on GSM8K: append blocks of 32 until the end.

    python sample.py FOLDER config/sample_illada.py --prompt_file=questions.jsonl

A canvas of fixed length is reported to ruin this model (GSM8K 0.15 to 0.21 instead of 0.89). Its evaluation
also makes "</think>" more and more likely in reasoning tasks (tests/lab/hooks.py). Both were read in forks of
the official repository, not in the repository itself.
"""

gen_length = 2048
steps = 32                      # of a block
block_length = 32
variable_length = True
remasking = 'low_confidence'
temperature = 0.0
