"""What a config would cost: parameters, memory, updates, days. Nothing is allocated; every number is calculated.

    python tests/lab/estimate.py config/llada_8b.py --gpus=320
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import model as models  # noqa: E402
import train  # noqa: E402
from configurator import Refused, command, settings_of  # noqa: E402

NAMESPACE = {**settings_of(vars(train)), '__doc__': __doc__, '__file__': __file__,
             'gpus': 1,                 # how many
             'gpu_gb': 80,              # memory of each
             'assumed_mfu': 0.4}        # share of the peak FLOPs: 12 layers of the 8B reached 0.44 on one H100
                                        # (RESULTS.md); LLaDA's 130,000 H800 hours correspond to 0.248


def needs(cfg, model, gpus):
    """What a run on `gpus` GPUs needs: a list of (what, GB on each GPU), from above.

    Activations are counted in units of d_model * 2 bytes per token and layer, as the compiler's plan for a GPU keeps
    them: 24.5 if all are kept, but 10 with act_memory 0.9, which recomputes attention and one product of seven, 6 with
    0.5, 3 with 0.2, 1 with 0 (and one block recomputed); without compile 28. Four runs on an H100 (RESULTS.md), each
    update one pass, peaked at 14 to 29 % less than this sum, and within 8 % of it without its last term and the
    gradients, which then take the place of activations.
    """
    c, n, block = model.config, model.num_params(), model.num_params(non_embedding=True) / model.config.n_layer
    shard = 1
    if cfg.fsdp and gpus > 1:
        shard = gpus if cfg.fsdp < 0 else cfg.fsdp
    units = full = 28
    if cfg.compile:
        units, full = np.interp(cfg.act_memory, [0, 0.2, 0.5, 0.9, 0.99, 1], [1, 3, 6, 10, 11, 24.5]), 24.5
    elif cfg.act_memory < 1:
        units = 1
    rows = cfg.batch_size * cfg.seq_len
    kept = units * c.n_layer + (full if units == 1 else 0)
    copies = 2 * (n - block * c.n_layer) + 12 * block if shard > 1 else 2 * n
    return [('parameters, float32', 4 * n / shard / 1e9),
            ('gradients, float32', 4 * n / shard / 1e9),
            ('optimizer', (8 if cfg.optimizer == 'adamw' else 5) * n / shard / 1e9),
            ('bfloat16 copies and shards in flight', copies / 1e9),
            ('logits and gradient of the head', c.vocab_size * (min(2048, rows) * 8 + c.d_model * 6) / 1e9),
            ('activations', kept * rows * c.d_model * 2 / 1e9),
            ('CUDA, NCCL, fragmentation', 5.0)]


def main(config):
    cfg = SimpleNamespace(**config)
    if cfg.gpus < 1:
        raise Refused(f'gpus must be above 0, got {cfg.gpus}')
    train.check(cfg, cfg.gpus)
    shape = {name: getattr(cfg, name) for name in train.SHAPE}
    model = models.empty_model(models.ModelConfig(vocab_size=cfg.vocab_size or 2 ** 15, **shape))
    windows, outside = train.update_size(cfg), model.num_params(non_embedding=True)
    size, parts = windows * cfg.seq_len, needs(cfg, model, cfg.gpus)

    print(f'parameters        {model.num_params():,} ({outside:,} outside embedding and head)')
    for what, gb in parts:
        print(f'{gb:9.1f} GB      {what}')
    total = sum(gb for _, gb in parts)
    verdict = 'fits into' if total <= cfg.gpu_gb * 2 ** 30 / 1e9 else 'does not fit into'
    flops = model.flops_per_token(1.0 if cfg.causal else 0.5) * cfg.max_iters * size
    seconds = flops / (cfg.gpus * 989e12 * cfg.assumed_mfu)
    passes = windows // cfg.batch_size // cfg.gpus
    print(f'{total:9.1f} GB      on each of {cfg.gpus} GPUs: {verdict} {cfg.gpu_gb} GiB\n'
          f'update            {size:,} tokens: {cfg.gpus} GPUs x {passes} passes x {cfg.batch_size} windows\n'
          f'run               {cfg.max_iters:,} updates, {cfg.max_iters * size / 1e9:,.1f} G tokens, {flops:.2e} FLOP\n'
          f'time              {seconds / 86400:,.1f} days, {seconds * cfg.gpus / 3600:,.0f} GPU hours at '
          f'{cfg.assumed_mfu:.0%} of 989 TFLOP/s (assumed)')


if __name__ == '__main__':
    command(main, NAMESPACE)
