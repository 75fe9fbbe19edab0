"""Training speed and memory on this machine, run by hand: whole updates with their data, variants taking turns.

    python tests/bench_train.py                                     # the default toy model
    python tests/bench_train.py --nanogpt=../nanoGPT --n_layer=4 --d_model=128 --d_ff=344 --seq_len=64 --batch_size=12
                                                                    # beside a checkout of karpathy/nanoGPT, at its size
    python tests/bench_train.py --task=memory                       # peak of one update, vocabulary 126,464
    python tests/bench_train.py --task=packing                      # packed against padded batches
    python tests/bench_train.py --task=saving                       # what checkpoints cost
    python tests/bench_train.py --config=config/llada_1b.py --batch_size=4 --only='AdamW, compiled'      # on a GPU

A large model fits on a GPU once: there, one variant a run. Speed is the median of the rounds, and its ratio to the
first row, the official guideline's loop (reference.py). MFU is relative to the fastest matrix product seen in the same
process, and to the data sheet where the device is known.
"""

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
import reference  # noqa: E402

import data  # noqa: E402
import model as models  # noqa: E402
import train  # noqa: E402
from configurator import configure, settings_of  # noqa: E402

task = 'speed'          # 'speed', 'memory', 'packing' or 'saving'
n_layer = 4             # blocks
n_head = 4              # heads
d_model = 192           # width
d_ff = 512              # width inside
seq_len = 128           # tokens in a window
batch_size = 16         # windows in an update
vocab_size = 4096       # rows of embedding and head
seconds = 4.0           # each variant, each round
rounds = 3              # rounds
nanogpt = ''            # a checkout of karpathy/nanoGPT
compiled = True         # also time torch.compile
only = ''               # only variants whose name holds this
act_memory = -1.0       # share of a block's activations kept for backward; -1: as in train.py or the config
config = ''             # a config file of train.py to start from
child = ''              # memory: which variant this process runs

FIELDS = ('n_layer', 'n_head', 'd_model', 'd_ff', 'seq_len', 'batch_size', 'vocab_size', 'act_memory')


def settings_for(cfg, **changes):
    settings = settings_of(vars(train))
    if cfg.config:
        settings = configure(settings, [cfg.config])
    asked = {k: getattr(cfg, k) for k in FIELDS if not cfg.config or getattr(cfg, k) != globals_default[k]}
    if cfg.act_memory < 0:
        asked.pop('act_memory', None)
    settings = SimpleNamespace(**{**settings, 'global_batch': 0, 'fsdp': 0, **asked, **changes})
    settings.n_kv_head = settings.n_head if not cfg.config else settings.n_kv_head
    return settings


def make_corpus(vocab_size, folder):
    """Random bytes, standing in for the tokens of any vocabulary."""
    rng = np.random.default_rng(0)
    texts = [(str(i), {'text': ''.join(map(chr, rng.integers(32, 97, 4000)))}) for i in range(400)]
    data.prepare([texts], folder, 'bytes')
    return data.open_dataset(str(folder))


def ready(settings, corpus):
    """Everything that training needs -> (processes, model, what to call, optimizers, data, tokenizer)."""
    procs = train.join_processes(settings, 0, 1)
    model, net = train.build(settings, procs, settings.vocab_size)
    models.init_weights(model)
    tok = corpus.parts[0].tokenizer()
    source = data.open_source(corpus, 'train', 'unified', tok, settings.seq_len, random_split=settings.random_split)
    return procs, model, net, train.make_optimizers(model, settings, procs.device), source, tok


def our_step(cfg, corpus, **changes):
    """A function that makes one update with our code."""
    settings = settings_for(cfg, **changes)
    procs, _, net, optimizers, source, tok = ready(settings, corpus)
    batches = train.prefetched(lambda it: train.questions(source, it, settings, tok, procs), 0)
    return lambda: train.train_step(net, optimizers, next(batches), 1.0, settings, procs)


def plain_step(cfg, corpus, dtype):
    """A function that makes one update with the guideline's loop."""
    settings = settings_for(cfg, dtype=dtype, compile=False, act_memory=1.0)
    procs, model, _, _, source, _ = ready(settings, corpus)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, foreach=True)
    it, autocast = [0], torch.autocast(procs.device, torch.bfloat16) if dtype == 'bfloat16' else nullcontext()

    def step():
        x0 = source.batch(it[0], range(settings.batch_size), settings.batch_size).x0.to(procs.device)
        ours, models.attention = models.attention, reference.plain_attention
        reference.plain_step(model, optimizer, x0, settings.vocab_size - 1, autocast)
        models.attention = ours
        it[0] += 1

    return step


def nanogpt_step(cfg, path):
    """One update of nanoGPT's train.py on CPU, with its model and optimizer: float32, eager, dropout 0."""
    ours = sys.modules.pop('model')
    sys.path.insert(0, path)
    import model as theirs
    sys.path.pop(0)
    sys.modules['model'] = ours
    net = theirs.GPT(theirs.GPTConfig(n_layer=cfg.n_layer, n_head=cfg.n_head, n_embd=cfg.d_model,
                                      block_size=cfg.seq_len, bias=False, vocab_size=cfg.vocab_size, dropout=0.0))
    optimizer = net.configure_optimizers(0.1, 1e-3, (0.9, 0.99), 'cpu')
    tokens = np.random.default_rng(0).integers(cfg.vocab_size, size=10 ** 6).astype(np.uint16)

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


def sync():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def matmul_ceiling(device, dtype):
    """The fastest product of random matrices measured here, FLOP/s."""
    best = 0.0
    for n in (512, 1024, 2048) if device == 'cpu' else (4096, 8192):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        for _ in range(6):
            sync()
            start = time.perf_counter()
            a @ b
            sync()
            best = max(best, 2 * n ** 3 / (time.perf_counter() - start))
    return best


def alternate(variants, tokens, cfg):
    """Runs the variants in turn, after a warm-up -> {name: tokens per second in each round}."""
    variants = {name: make() for name, make in variants.items() if cfg.only in name}
    if not variants:
        raise SystemExit(f'only: no variant has {cfg.only!r} in its name')
    speed = {name: [] for name in variants}
    for step in variants.values():
        for _ in range(5):
            step()
    for _ in range(cfg.rounds):
        for name, step in variants.items():
            n = 0
            sync()
            start = time.perf_counter()
            while time.perf_counter() - start < cfg.seconds:
                step()
                n += 1
            sync()
            speed[name].append(n * tokens[name] / (time.perf_counter() - start))
    first = statistics.median(next(iter(speed.values())))
    for name, values in speed.items():
        middle = statistics.median(values)
        print(f'{name:<40} {middle:9.0f} tok/s  {middle / first:5.2f}x  '
              f'(spread {min(values):.0f} .. {max(values):.0f})')
    if torch.cuda.is_available():
        print(f'peak memory {peak_bytes() / 1e9:.1f} GB')
    return speed


def speed_task(cfg, corpus):
    settings = settings_for(cfg)
    me = train.join_processes(settings, 0, 1)
    variants = {'guideline loop, float32': lambda: plain_step(cfg, corpus, 'float32')}
    if cfg.nanogpt:
        variants['nanoGPT, float32, eager'] = lambda: nanogpt_step(cfg, cfg.nanogpt)
    if me.bf16:
        variants['guideline loop, bfloat16'] = lambda: plain_step(cfg, corpus, 'bfloat16')
    variants['ours, float32, AdamW'] = lambda: our_step(cfg, corpus, dtype='float32', optimizer='adamw', compile=False)
    if me.bf16:
        variants['ours, bfloat16, AdamW'] = lambda: our_step(cfg, corpus, optimizer='adamw', compile=False)
    variants['ours, as configured'] = lambda: our_step(cfg, corpus, compile=False)
    if cfg.compiled:
        variants['ours, AdamW, compiled'] = lambda: our_step(cfg, corpus, optimizer='adamw', compile=True)
    speed = alternate(variants, dict.fromkeys(variants, settings.batch_size * settings.seq_len), cfg)
    shape = {f: getattr(settings, f) for f in train.SHAPE}
    flops = models.empty_model(models.ModelConfig(settings.vocab_size, **shape)).flops_per_token(0.5)
    best, name = max((statistics.median(v), k) for k, v in speed.items() if k.startswith('ours') or cfg.only)
    ceiling = matmul_ceiling(me.device, torch.bfloat16 if me.bf16 else torch.float32)
    kind = torch.cuda.get_device_name() if me.device == 'cuda' else 'cpu'
    sheet = next((peak for known, peak in train.PEAKS.items() if known in kind), None)
    print(f'{name}: {flops / 1e6:.2f} MFLOP a token, {best * flops / 1e9:.1f} GFLOP/s, {best * flops / ceiling:.1%} of '
          f'the fastest product seen ({ceiling / 1e9:.0f} GFLOP/s)'
          + (f', {best * flops / sheet:.1%} of the data sheet' if sheet else ''))


def used_bytes():
    """Memory in use now."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    return int(Path('/proc/self/statm').read_text().split()[1]) * resource.getpagesize()


def peak_bytes():
    """Peak memory of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


def memory_task(cfg):
    """Peak of one loss and its backward beyond model and gradient (Linux): V 126,464, d 256, 1,024 rows, one block."""
    if not cfg.child:
        seen = {}
        for name in ('plain', 'ours'):
            out = subprocess.run([sys.executable, __file__, '--task=memory', f'--child={name}'], capture_output=True,
                                 text=True, check=True).stdout
            seen[name] = float(out.split()[-1])
            print(f'{name:<6} {seen[name] / 2 ** 20:8.0f} MiB')
        return print(f"ratio  {seen['ours'] / seen['plain']:8.2f}")
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    config = models.ModelConfig(126464, 1024, 1, 4, 4, 256, 768)
    model = models.Transformer(config).to(device)                   # torch's own init makes no large temporaries
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    x0 = torch.randint(126000, (1, 1024), device=device)
    p_mask = torch.full((1, 1024), 0.5, device=device)
    masked = torch.arange(1024, device=device)[None] % 2 == 0
    before = used_bytes()
    if cfg.child == 'plain':
        reference.plain_loss(model, x0, 126336, p_mask=p_mask, masked=masked).backward()
    else:
        xt = torch.where(masked, 126336, x0)
        asked = train.diffusion.question(x0, xt, masked, torch.ones_like(masked), p_mask[:, 0])
        train.diffusion.weighted_loss(model, asked).backward()
    print(peak_bytes() - before)


def packing_task(cfg, corpus):
    """30 % of the windows split in two: packed, or every segment padded to a row of its own. Counts real tokens."""
    settings = settings_for(cfg, random_split=0.3, optimizer='adamw')
    procs, _, net, optimizers, source, tok = ready(settings, corpus)
    T, it = settings.seq_len, [0]

    def step(padded):
        question, = train.questions(source, it[0], settings, tok, procs)
        borders = question.cu_seqlens
        if padded and borders is not None:
            segments = [(a, b) for a, b in zip(borders.tolist(), borders.tolist()[1:]) if a < b]
            flat, wide = question.ids.flatten(), torch.full((len(segments), T), tok.pad_id)
            place = torch.empty(question.ids.numel(), dtype=torch.long)
            for i, (a, b) in enumerate(segments):
                wide[i, :b - a] = flat[a:b]
                place[a:b] = i * T + torch.arange(b - a)
            question = question._replace(ids=wide, rows=place[question.rows])
        if padded is not False:
            question = question._replace(cu_seqlens=None)
        train.train_step(net, optimizers, [question], 1.0, settings, procs)
        it[0] += 1

    variants = {name: lambda padded=padded: lambda: step(padded)
                for name, padded in (('padded', True), ('packed', False), ('no splits at all', None))}
    alternate(variants, dict.fromkeys(variants, settings.batch_size * T), cfg)


def saving_task(cfg, corpus, folder):
    """Seconds for 100 updates of a 65 M-parameter model, without checkpoints and with one every 50."""
    for name, saves in (('no checkpoint', ()), ('every 50', (53, 103))):
        settings = settings_for(cfg, n_layer=12, n_head=8, d_model=512, d_ff=1536, seq_len=128, batch_size=4,
                                vocab_size=24000, optimizer='adamw')
        procs, model, net, optimizers, source, tok = ready(settings, corpus)
        batches = train.prefetched(lambda i, s=source, c=settings, t=tok, p=procs: train.questions(s, i, c, t, p), 0)
        for it in range(105):
            if it == 5:
                start = time.perf_counter()
            train.train_step(net, optimizers, next(batches), 1.0, settings, procs)
            if it in saves:
                train.save_checkpoint(folder / name, it, model, optimizers, settings, source, procs)
        sync()
        taken = time.perf_counter() - start
        print(f'{name:<24} {model.num_params() / 1e6:.1f} M parameters, {taken:6.1f} s for 100 updates')


def main(config):
    cfg = SimpleNamespace(**config)
    print(f'torch {torch.__version__}, {torch.get_num_threads()} threads, '
          f'{torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"}: ' + ' '.join(sys.argv[1:]))
    if cfg.task == 'memory':
        return memory_task(cfg)
    with tempfile.TemporaryDirectory() as folder:
        corpus = make_corpus(cfg.vocab_size, Path(folder) / 'bench')
        if cfg.task == 'saving':
            return saving_task(cfg, corpus, Path(folder))
        (packing_task if cfg.task == 'packing' else speed_task)(cfg, corpus)


globals_default = settings_of(globals())

if __name__ == '__main__':
    main(configure(globals()))
