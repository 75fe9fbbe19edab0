"""Estimate what a config would cost: parameters, updates, days, and the memory of each GPU.

    python tests/lab/estimate.py config/llada_8b.py --gpus=320
    python tests/lab/estimate.py config/llada_1b.py --gpus=8 --batch_size=16 --act_memory=1

The memory is the peak of one real update of train.py, as torch's memory tracker counts it. The tensors have
shapes but no data, and this process is rank 0 of as many as there are GPUs, of which the others do not exist.
So it needs no GPU, little memory, and about half a minute for 8B. The flag --vocab_size says how large the
vocabulary is, if neither the config nor a prepared data set does.
"""

import sys
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]

import command  # noqa: E402
import reference  # noqa: E402

import data  # noqa: E402
import diffusion  # noqa: E402
import model as models  # noqa: E402
import train  # noqa: E402
from configurator import UserError, say  # noqa: E402

gpus = 1                        # how many GPUs
gpu_gb = 80                     # GiB of memory of each
overhead_gb = 5.0               # GB that CUDA, NCCL and fragmentation take, which is assumed
assumed_vocab = 4096            # vocabulary, if neither the config nor a prepared data set says it
assumed_mfu = 0.4               # share of the peak FLOP/s that training reaches. 12 layers of the 8B reached
                                # 0.44 on one H100 (RESULTS.md), and LLaDA's 130,000 H800 hours are 0.248.

# what MemTracker calls the parts of the memory, and what they are
PARTS = {
    'Parameter': 'parameters: shards, and what is gathered for the moment',
    'Gradient': 'gradients',
    'Optstate': 'state of the optimizer',
    'Activation': 'activations',
    'Temp': 'temporary, in the backward pass'}


# ----------------------------------------------------------------------------------------------------------
# Memory: one update on tensors without data


@contextmanager
def fake_machine(world):
    """Let this process be rank 0 of `world` processes, with tensors that take no memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
    from torch.distributed import device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore
    empty_model = models.empty_model
    init_device_mesh = device_mesh.init_device_mesh

    def fake_model(config):
        # to_empty can move shards from 'meta' to fake memory, but not whole parameters
        if world > 1:
            return empty_model(config)
        model = models.Transformer(config)
        model.to_empty = lambda device: model
        return model

    def real_mesh(*args, **options):
        # the mesh reads the ranks in it, so they must be numbers
        with unset_fake_temporarily():
            return init_device_mesh(*args, **options)

    dist.init_process_group('fake', store=FakeStore(), rank=0, world_size=world)
    with ExitStack() as stack:
        stack.callback(dist.destroy_process_group)
        stack.enter_context(patch.object(train, 'WORLD', world))
        stack.enter_context(patch.object(models, 'empty_model', fake_model))
        stack.enter_context(patch.object(device_mesh, 'init_device_mesh', real_mesh))
        stack.enter_context(FakeTensorMode())
        yield


def keep_as_compiled(blocks, share):
    """Let blocks keep for the backward pass what torch.compile with this share of activations would keep.

    The compiler's plan for a block is executed operation by operation. (What stands between two operations
    that a compiler would fuse exists for a moment here.)
    """
    from functorch.compile import aot_function, min_cut_rematerialization_partition, nop
    from torch._functorch import config
    from torch.nn.utils.stateless import _reparametrize_module
    plans = {}

    def forward(block, x, rope, kv, kv_positions, pattern, positions=None):
        def compute(params, x, cos, sin, *positions):
            with _reparametrize_module(block, params):
                return models.Block.forward(block, x, (cos, sin), None, None, pattern, *positions)

        # parameters are inputs of a plan, so all blocks share one, but the last one, which gets `positions`
        inputs = [x, *rope] if positions is None else [x, *rope, positions]
        if len(inputs) not in plans:
            plans[len(inputs)] = aot_function(
                compute, fw_compiler=nop, partition_fn=min_cut_rematerialization_partition)
        with config.patch(activation_memory_budget=share):
            return plans[len(inputs)](dict(block.named_parameters()), *inputs)

    for block in blocks:
        block.forward = partial(forward, block)


def peak_memory(cfg):
    """Make updates on one of train.WORLD processes, and track the last one -> bytes at its peak, by part."""
    from torch.distributed._tools.mem_tracker import MemTracker
    world = train.WORLD
    compiled = cfg.compile and cfg.act_memory > 0
    changes = dict(device='cpu', compile=False, sharded=world > 1, bf16=cfg.dtype != 'float32')
    # the plan of the compiler decides what is recomputed, not train.build
    if compiled:
        changes['act_memory'] = 1.0
    share = cfg.act_memory
    cfg = SimpleNamespace(**{**vars(cfg), **changes})

    # half of the tokens are hidden, or all of them are predicted from left to right
    B, T = cfg.batch_size, cfg.seq_len
    M = B * T if cfg.causal else B * T // 2
    ids = torch.zeros(B, T, dtype=torch.long)
    positions = torch.arange(M)
    batch = diffusion.MaskedBatch(ids, positions, torch.zeros_like(positions), torch.ones(M), None)

    # attention as on a GPU, where its inputs are not cast to float32 (and documents of a window need no mask)
    with patch.object(models, 'attention', reference.plain_attention):
        model, net = train.build(cfg)
        optimizers = train.make_optimizers(model, cfg)
        if compiled:
            keep_as_compiled(model.blocks, share)

        # the first update makes the plans and the optimizer's state
        train.loss_of(net, batch, cfg).backward()
        train.step(optimizers, 0.0)
        if cfg.keeps_gradients:
            train.loss_of(net, batch, cfg).backward()
        # (without the step: AdamW is fused, and Muon takes one matrix at a time)
        tracker = MemTracker()
        tracker.track_external(model, *optimizers)
        with tracker:
            train.loss_of(net, batch, cfg).backward()
    peak, = tracker.get_tracker_snapshot('peak').values()           # of the one device
    return {part: peak[part] for part in PARTS}


# ----------------------------------------------------------------------------------------------------------
# The script


def vocabulary(cfg):
    """Return the number of rows of embedding and head, and where this number is from."""
    if cfg.vocab_size:
        return cfg.vocab_size, 'vocab_size is set'
    name, _, _ = cfg.dataset.partition(':')
    try:
        corpus = data.Corpus(name)
    except UserError:
        return cfg.assumed_vocab, f'assumed, because {name} is not prepared; --vocab_size=N sets it'
    return corpus.tokenizer().vocab_size, f'that of {corpus.folder}'


def print_memory(cfg, passes):
    """Print what a GPU holds at the peak of an update."""
    world = cfg.gpus if cfg.fsdp else 1
    # gradients of the micro-batch before, or the buckets of DDP
    cfg.keeps_gradients = passes > 1 or world < cfg.gpus
    say('(following an update of this code, on tensors without data)')
    with fake_machine(world):
        parts = peak_memory(cfg)

    for part, what in PARTS.items():
        print(f'{parts[part] / 1e9:9.2f} GB      {what}')
    total = sum(parts.values()) / 1e9 + cfg.overhead_gb
    fits = 'fits' if total <= cfg.gpu_gb * 2 ** 30 / 1e9 else 'does not fit'
    print(f'{cfg.overhead_gb:9.2f} GB      CUDA, NCCL, fragmentation (assumed)')
    print(f'{total:9.2f} GB      on each of {cfg.gpus} GPUs at the peak of an update: '
          f'{fits} into {cfg.gpu_gb} GiB')


def main(cfg):
    if cfg.gpus < 1:
        raise UserError(f'gpus must be at least 1, got {cfg.gpus}')
    cfg.global_batch = cfg.global_batch or cfg.batch_size
    train.check(cfg, world=cfg.gpus)
    cfg.vocab_size, source = vocabulary(cfg)
    shape = {field.name: getattr(cfg, field.name) for field in fields(models.ModelConfig)}
    model = models.empty_model(models.ModelConfig(**shape))

    # what is trained, on how much, for how long
    update = cfg.global_batch * cfg.seq_len
    passes = cfg.global_batch // cfg.batch_size // cfg.gpus
    tokens = cfg.max_iters * update
    flops = model.flops_per_token(1.0 if cfg.causal else 0.5) * tokens
    peak = train.PEAKS['H100']
    seconds = flops / (cfg.gpus * peak * cfg.assumed_mfu)
    print(f'parameters        {model.num_params():,} '
          f'({model.num_params(non_embedding=True):,} outside embedding and head)')
    print(f'vocabulary        {cfg.vocab_size:,} ({source})')
    print(f'update            {update:,} tokens: '
          f'{cfg.gpus} GPUs x {passes} passes x {cfg.batch_size} windows')
    print(f'run               {cfg.max_iters:,} updates, {tokens:,} tokens, {flops:.2e} FLOP')
    print(f'time              {seconds / 86400:,.2f} days, {seconds * cfg.gpus / 3600:,.2f} GPU hours, if '
          f'{cfg.assumed_mfu:.0%} of {peak / 1e12:.0f} TFLOP/s are reached', flush=True)
    print_memory(cfg, passes)


if __name__ == '__main__':
    command.run(main, globals(), train)
