"""Numbers about a checkpoint, each with its standard error.

    python evaluate.py bound out/docs out/docs_ar               # side by side, on the same windows
    python evaluate.py bound out/docs --split=train --draws=32

bound: nats per token and bits per byte of held-out text. For a diffusion model this is an upper bound on its
cross-entropy (Eq. 6 of LLaDA, arXiv 2502.09992v3), written <=; for the autoregressive baseline it is exact, written =.
Do not read the two as the same kind of number: the true likelihood of the diffusion model is better than its bound.
"""

import math
import sys
import time
from types import SimpleNamespace

import torch
from tqdm import tqdm

import data
import diffusion
from configurator import command, configure, user_errors
from model import open_model

task = 'bound'                  # what to measure: 'bound'
checkpoints = []                # runs or steps of train.py, or folders of released weights
dataset = ''                    # a data set; default: the one that the first checkpoint was trained on
split = 'val'                   # 'val' or 'train'
windows = 0                     # how many windows of text, evenly spread; 0: all
seq_len = 0                     # tokens in a window; 0: the shortest context among the checkpoints
draws = 16                      # masks drawn for each window (Eq. 6), stratified
batch_size = 64                 # windows in one forward pass
seed = 1                        # of the masks
device = 'auto'                 # 'cuda', 'mps' or 'cpu'
dtype = 'auto'                  # 'bfloat16' or 'float32'


def load_all(cfg):
    """The checkpoints and the one corpus they are measured on: -> ([(name, model, meta, autocast)], corpus, tok)."""
    if cfg.task != 'bound':
        raise ValueError(f"task must be 'bound', got {cfg.task!r}")
    if not cfg.checkpoints:
        raise ValueError('name at least one checkpoint:  python evaluate.py bound out/docs')
    for key, least in (('draws', 1), ('batch_size', 1), ('windows', 0), ('seq_len', 0), ('seed', 0)):
        if not least <= getattr(cfg, key) < 2 ** 31:
            raise ValueError(f'{key} must be {least} or more, and below 2^31, got {getattr(cfg, key)}')
    loaded = []
    for name in cfg.checkpoints:
        model, meta, _, autocast = open_model(name, cfg.device, cfg.dtype)
        loaded.append((name, model, meta, autocast))
    trained_on = (loaded[0][2]['config'] or {}).get('dataset', '')
    if not (cfg.dataset or trained_on):
        raise ValueError('these weights do not say what they were trained on: give --dataset')
    corpus = data.open_dataset(cfg.dataset or trained_on)
    if cfg.split not in corpus.splits:
        raise ValueError(f"split must be one of {', '.join(corpus.splits)}, got {cfg.split!r}")
    tok = data.corpus_tokenizer(corpus)
    probe = 'The quick brown fox: 1234\n\n    def f(x) ...'
    for name, _, meta, _ in loaded:
        theirs = data.tokenizer_for(meta)
        if theirs.encode(probe) != tok.encode(probe) or theirs.mask_id != tok.mask_id:
            raise ValueError(f'{name}: its tokenizer is not the one of {corpus.folder}')
    return loaded, corpus, tok


def bound(model, x0, tok, cfg, autocast, name):
    """Log-probabilities of windows x0 (N, T): exact for a causal model, else the bound of Eq. 6 -> (N,) float64."""
    parts = []
    for i, x in enumerate(tqdm(x0.split(cfg.batch_size), desc=name, disable=None, leave=False)):
        maskable = torch.ones_like(x, dtype=torch.bool)
        with autocast:
            if model.config.causal:
                parts.append(diffusion.ar_log_prob(model, x, maskable, bos_id=tok.eos_id))
            else:
                parts.append(diffusion.bound_per_row(model, x, maskable, tok.mask_id, draws=cfg.draws, seed=cfg.seed,
                                                     batch_size=cfg.batch_size, first=i * cfg.batch_size))
    return torch.cat(parts).cpu()


def main(config):
    cfg = SimpleNamespace(**config)
    with user_errors():
        loaded, corpus, tok = load_all(cfg)
        T = cfg.seq_len or min(model.config.seq_len for _, model, _, _ in loaded)
        x0 = data.all_windows(corpus, cfg.split, T, cfg.windows or None).to(loaded[0][1].embed.weight.device)
    per_byte = 1 / math.log(2) / data.bytes_per_token(corpus, cfg.split)
    print(f'{corpus.folder}, split {cfg.split}: {len(x0)} windows of {T} tokens, {cfg.draws} masks each',
          file=sys.stderr)
    width = max(len(name) for name in cfg.checkpoints)
    print(f'{"checkpoint":<{width}}  {"iteration":>9}  {"objective":<14}  {"nats/token":>18}  {"bits/byte":>18}  '
          f'{"seconds":>7}')
    for name, model, meta, autocast in loaded:
        start = time.perf_counter()
        nats = -bound(model, x0, tok, cfg, autocast, name) / T
        mean, stderr = nats.mean().item(), nats.std().item() / len(nats) ** 0.5 if len(nats) > 1 else math.nan
        sign, kind = (' =', 'autoregressive') if model.config.causal else ('<=', 'diffusion')
        print(f'{name:<{width}}  {meta["iteration"] or "":>9}  {kind:<14}  {sign} {mean:.4f} +- {stderr:.4f}'
              f'  {sign} {mean * per_byte:.4f} +- {stderr * per_byte:.4f}  {time.perf_counter() - start:7.1f}')


if __name__ == '__main__':
    command(main, configure(globals(), positional=('task', 'checkpoints')))
