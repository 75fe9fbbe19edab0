"""The default: what `python train.py` does without a flag (tests/test_layout.py checks that the two agree).

A LLaDA-style model on the documentation that ships with every Python, on two CPU cores. Its departures from
the paper, and what each is worth at this size, are in tests/lab/RESULTS.md: Muon on the matrices of the blocks, the
count form of the loss, mask ratios concentrated around one half, complementary pairs of masks.
"""

out_dir = 'out/docs'
dataset = 'docs'
