"""The autoregressive baseline of docs.py: the same Transformer but for the causal mask, as many tokens, same optimizer.

(Of those tokens diffusion sees each window twice in an update, under two masks: here every window is another.)
"""

out_dir = 'out/docs_ar'
dataset = 'docs'
causal = True
