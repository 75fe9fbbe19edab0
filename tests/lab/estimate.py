"""Estimate what a config would cost: parameters, memory, updates, days. Nothing is allocated.

    python tests/lab/estimate.py config/llada_8b.py --gpus=320
"""

import sys
from dataclasses import fields
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import model as models  # noqa: E402
import train  # noqa: E402
from configurator import UserError, run  # noqa: E402

# beside the settings of train.py
gpus = 1                        # how many GPUs
gpu_gb = 80                     # memory of each
# 12 layers of the 8B reached 0.44 on one H100 (RESULTS.md), and LLaDA's 130,000 H800 hours correspond to 0.248
assumed_mfu = 0.4               # share of the peak FLOP/s that training reaches


def memory(cfg, model):
    """Return what a run needs on each GPU, a list of (GB, what)."""
    n = model.num_params()
    block = model.num_params(non_embedding=True) / cfg.n_layer
    sharded = cfg.fsdp != 0 and cfg.gpus > 1
    shards = 1
    if sharded:
        shards = cfg.gpus if cfg.fsdp < 0 else cfg.fsdp
    # of the bfloat16 copies, only a few blocks exist at a time if parameters are sharded
    copies = 2 * n
    if sharded:
        copies = 2 * (n - block * cfg.n_layer) + 12 * block

    # Activations of a layer in units of d_model * 2 bytes per token, as the compiler's plan for a GPU keeps them.
    # act_memory below 1 first recomputes attention and one product of seven, then more. Four runs on an H100
    # (RESULTS.md) stayed 14 to 29 % below the sum of this table.
    rows = cfg.batch_size * cfg.seq_len
    all_of_a_layer = 28
    units = all_of_a_layer
    if cfg.compile:
        all_of_a_layer = 24.5
        units = np.interp(cfg.act_memory, [0, 0.2, 0.5, 0.9, 0.99, 1], [1, 3, 6, 10, 11, 24.5])
    elif cfg.act_memory < 1:
        units = 1
    units = units * cfg.n_layer
    if units == cfg.n_layer:
        units += all_of_a_layer                             # the one layer that is being recomputed

    # logits in float32, their log-softmax and its gradient, for as many rows as exist at a time
    head_rows = min(2 ** 28 // model.config.vocab_size, rows)
    head = model.config.vocab_size * (head_rows * 10 + cfg.d_model * 6)
    optimizer = 8 if cfg.optimizer == 'adamw' else 5        # bytes per parameter; Muon has one number, not two
    return [
        (4 * n / shards / 1e9, 'parameters, float32'),
        (4 * n / shards / 1e9, 'gradients, float32'),
        (optimizer * n / shards / 1e9, 'optimizer'),
        (copies / 1e9, 'bfloat16 copies and shards in flight'),
        (head / 1e9, 'logits and gradient of the head'),
        (units * rows * cfg.d_model * 2 / 1e9, 'activations'),
        (5.0, 'CUDA, NCCL, fragmentation')]


def main(cfg):
    if cfg.gpus < 1:
        raise UserError(f'gpus must be at least 1, got {cfg.gpus}')
    cfg.global_batch = cfg.global_batch or cfg.batch_size
    train.check(cfg, world=cfg.gpus)
    shape = {field.name: getattr(cfg, field.name) for field in fields(models.ModelConfig)}
    shape['vocab_size'] = cfg.vocab_size or 2 ** 15
    model = models.empty_model(models.ModelConfig(**shape))

    print(f'parameters        {model.num_params():,} '
          f'({model.num_params(non_embedding=True):,} outside embedding and head)')
    parts = memory(cfg, model)
    for gb, what in parts:
        print(f'{gb:9.1f} GB      {what}')
    total = sum(gb for gb, _ in parts)
    fits = 'fits' if total <= cfg.gpu_gb * 2 ** 30 / 1e9 else 'does not fit'
    print(f'{total:9.1f} GB      on each of {cfg.gpus} GPUs: {fits} into {cfg.gpu_gb} GiB')

    update = cfg.global_batch * cfg.seq_len
    passes = cfg.global_batch // cfg.batch_size // cfg.gpus
    tokens = cfg.max_iters * update
    flops = model.flops_per_token(1.0 if cfg.causal else 0.5) * tokens
    seconds = flops / (cfg.gpus * train.PEAKS['H100'] * cfg.assumed_mfu)
    print(f'update            {update:,} tokens: {cfg.gpus} GPUs x {passes} passes x {cfg.batch_size} windows')
    print(f'run               {cfg.max_iters:,} updates, {tokens / 1e9:,.1f} G tokens, {flops:.2e} FLOP')
    print(f'time              {seconds / 86400:,.1f} days, {seconds * cfg.gpus / 3600:,.0f} GPU hours, if '
          f'{cfg.assumed_mfu:.0%} of 989 TFLOP/s are reached')


if __name__ == '__main__':
    run(main, {**vars(train), **globals()})
