"""The autoregressive baseline of docs.py: the same Transformer but for the causal mask, same tokens, same optimizer."""

out_dir = 'out/docs_ar'
dataset = 'docs'
causal = True
