"""Tiny Shakespeare, 1.1 MB. Get it first:  python data.py shakespeare  (or with --input=input.txt from elsewhere)."""

out_dir = 'out/shakespeare'
dataset = 'shakespeare'
