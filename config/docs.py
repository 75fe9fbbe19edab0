"""The default: what `python train.py` does without a flag (tests/test_layout.py holds the two together).

A LLaDA-style model on the documentation that every Python carries, on two CPU cores. What the paper does not do, and
what each is worth at this size, is in tests/lab/RESULTS.md: Muon on the matrices of the blocks, the count form
of the loss, mask ratios that crowd about one half, masks in pairs that complete each other.
"""

out_dir = 'out/docs'
dataset = 'docs'
