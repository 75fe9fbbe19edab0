"""Sampling as the official chat script of LLaDA-8B-Instruct does: 128 tokens and steps, blocks of 32, greedy.

    python sample.py FOLDER config/sample_llada.py --chat
"""

gen_length = 128
steps = 128
block_length = 32
remasking = 'low_confidence'
temperature = 0.0
instruct = True
