"""Sampling as iLLaDA's evaluation does for GSM8K on the Instruct model: variable length, blocks of 32 in 32 steps each.

The end-think boost is for its reasoning tasks (B = 100, power 3; HumanEval: power 1). Read in forks of the official
repository, not in the repository itself.

    python sample.py FOLDER config/sample_illada.py --prompt_file=questions.jsonl
"""

gen_length = 2048
steps = 32                      # of a block
block_length = 32
variable_length = True
remasking = 'low_confidence'
temperature = 0.0
think_boost = 100.0
think_power = 3.0
