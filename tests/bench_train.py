"""Training speed, by hand: whole steps (data, noise, forward, backward, clipping, update), variants alternated.

    python tests/bench_train.py                                     # nanoGPT's CPU size: 4 layers, 4 heads,
                                                                    # 128 wide, T 64, batch 12
    python tests/bench_train.py --nanogpt=../nanoGPT                # and a checkout of karpathy/nanoGPT, same process
    python tests/bench_train.py --d_model=192 --d_ff=512 --batch_size=32

Prints tokens per second, median of the rounds, and the ratio to the first row.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import train  # noqa: E402
from configurator import configure, settings_of  # noqa: E402
from model import ModelConfig, Transformer, init_weights, pick_device  # noqa: E402

n_layer = 4             # blocks
n_head = 4              # heads
d_model = 128           # width
d_ff = 344              # 3 x 344 x 128 weights are nanoGPT's 2 x 512 x 128
seq_len = 64            # tokens in a window
batch_size = 12         # windows in a step
seconds = 4.0           # each variant, each round
rounds = 3              # rounds
nanogpt = ''            # a checkout of karpathy/nanoGPT
compiled = True         # also time torch.compile


def our_step(cfg, corpus, **changes):
    """A function that makes one update of ours, and a label."""
    asked = {k: getattr(cfg, k) for k in ('n_layer', 'n_head', 'd_model', 'd_ff', 'seq_len', 'batch_size')}
    settings = SimpleNamespace(**{**settings_of(vars(train)), **asked, **changes})
    settings.n_kv_head = settings.n_head
    device, autocast = pick_device(settings.device, settings.dtype)
    shape = {f: getattr(settings, f)
             for f in ('seq_len', 'n_layer', 'n_head', 'n_kv_head', 'd_model', 'd_ff', 'causal')}
    tok = data.corpus_tokenizer(corpus)
    model = init_weights(Transformer(ModelConfig(tok.vocab_size, **shape)).to(device))
    if settings.compile:
        for block in model.blocks:
            block.compile()
    optimizers, count = train.make_optimizers(model, settings, device), [0]

    def step():
        train.train_step(model, optimizers, corpus, settings, count[0], tok, device, autocast)
        count[0] += 1

    return step


def nanogpt_step(cfg, path, vocab_size):
    """One update of nanoGPT's train.py on CPU, with its model and optimizer: float32, eager, dropout 0."""
    sys.modules.pop('model', None)
    sys.path.insert(0, path)
    import model as theirs
    sys.path.pop(0)
    net = theirs.GPT(theirs.GPTConfig(n_layer=cfg.n_layer, n_head=cfg.n_head, n_embd=cfg.d_model,
                                      block_size=cfg.seq_len, bias=False, vocab_size=vocab_size, dropout=0.0))
    optimizer = net.configure_optimizers(0.1, 1e-3, (0.9, 0.99), 'cpu')
    tokens = np.random.default_rng(0).integers(vocab_size, size=10 ** 6).astype(np.uint16)

    def step():
        ix = torch.randint(len(tokens) - cfg.seq_len, (cfg.batch_size,))
        x = torch.stack([torch.from_numpy(tokens[i:i + cfg.seq_len].astype(np.int64)) for i in ix])
        y = torch.stack([torch.from_numpy(tokens[i + 1:i + 1 + cfg.seq_len].astype(np.int64)) for i in ix])
        _, loss = net(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    return step


def main(config):
    cfg = SimpleNamespace(**config)
    folder = Path(tempfile.mkdtemp()) / 'bench'
    rng = np.random.default_rng(0)
    data.prepare([(str(i), ''.join(map(chr, rng.integers(32, 97, 4000)))) for i in range(50)], folder, 'bytes')
    corpus = data.open_corpus(folder)
    V = corpus.manifest['vocab_size']
    variants = {}
    if cfg.nanogpt:
        variants['nanoGPT, float32, eager'] = nanogpt_step(cfg, cfg.nanogpt, V)
    variants['float32, AdamW, eager'] = our_step(cfg, corpus, dtype='float32', optimizer='adamw')
    variants['auto dtype, AdamW, eager'] = our_step(cfg, corpus, optimizer='adamw')
    variants['auto dtype, Muon, eager'] = our_step(cfg, corpus)
    variants['auto dtype, AdamW, eager, causal'] = our_step(cfg, corpus, optimizer='adamw', causal=True)
    if cfg.compiled:
        variants['auto dtype, AdamW, compiled'] = our_step(cfg, corpus, optimizer='adamw', compile=True)
        variants['auto dtype, Muon, compiled'] = our_step(cfg, corpus, compile=True)
    speed = {name: [] for name in variants}
    for step in variants.values():
        for _ in range(5):
            step()
    for _ in range(cfg.rounds):
        for name, step in variants.items():
            n, start = 0, time.perf_counter()
            while time.perf_counter() - start < cfg.seconds:
                step()
                n += 1
            speed[name].append(n * cfg.batch_size * cfg.seq_len / (time.perf_counter() - start))
    first = statistics.median(next(iter(speed.values())))
    print(f'torch {torch.__version__}, {torch.get_num_threads()} threads, vocabulary {V}, '
          f'{cfg.rounds} x {cfg.seconds} s each')
    for name, values in speed.items():
        middle = statistics.median(values)
        print(f'{name:<34} {middle:9.0f} tok/s  {middle / first:5.2f}x  '
              f'(spread {min(values):.0f} .. {max(values):.0f})')


if __name__ == '__main__':
    main(configure(globals()))
