"""A GPU computes what a CPU computes: logits, losses, gradients, updates, tokens. Skipped without a GPU."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from helpers import seeded, small_corpus, tiny_model

import diffusion
import model as models
import train
from configurator import configure

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
GPU = 'cuda'
SHAPE = dict(vocab_size=512, seq_len=64, n_layer=2, n_head=4, n_kv_head=2, d_model=128, d_ff=192)
MASK = 511


def distance(a, b):
    """Return the relative distance of a from b, in float64 on the CPU."""
    a = a.detach().double().cpu()
    b = b.detach().double().cpu()
    assert a.isfinite().all()
    return ((a - b).norm() / b.norm()).item()


def gradients(model):
    return torch.cat([p.grad.flatten().cpu() for p in model.parameters()])


def copy_on_gpu(model):
    copy = models.Transformer(model.config).to(GPU).eval()
    copy.load_state_dict(model.state_dict())
    return copy


# ----------------------------------------------------------------------------------------------------- the network


def test_logits_in_float32():
    model = tiny_model(**SHAPE)
    ids = torch.randint(500, (3, 64))
    assert distance(copy_on_gpu(model)(ids.to(GPU)), model(ids)) < 1e-4


@pytest.mark.parametrize('packed', [False, True])
@pytest.mark.parametrize('bf16, tolerance', [(False, 1e-4), (True, 3e-2)])
def test_loss_and_gradients(packed, bf16, tolerance):
    """Packed in bfloat16, this compares the kernel for segments with a mask in float32 on the CPU."""
    x0 = torch.randint(500, (4, 64), generator=seeded(0))
    t = torch.full((4,), 0.5)
    u = diffusion.row_noise(0, 0, range(4), 64)
    xt, masked = diffusion.forward_process(x0, t, MASK, u=u)
    weights = diffusion.loss_weights(torch.ones_like(masked), masked, t)
    borders = [0, 20, 64, 128, 150, 151, 192, 256]
    cu_seqlens = torch.tensor(borders, dtype=torch.int32) if packed else None
    batch = diffusion.masked_batch(x0, xt, masked, weights, cu_seqlens)

    model = tiny_model(**SHAPE)
    copy = copy_on_gpu(model)
    loss = diffusion.diffusion_loss(model, batch)
    loss.backward()
    cfg = SimpleNamespace(device=GPU, bf16=bf16, sharded=False)
    same = train.loss_of(copy, batch, cfg)
    same.backward()
    assert abs(same.item() / loss.item() - 1) < tolerance / 10
    assert distance(gradients(copy), gradients(model)) < tolerance


def test_a_padded_batch_has_gradients():
    """cuDNN's backward with a mask has returned NaN since torch 2.11."""
    model = copy_on_gpu(tiny_model(**SHAPE))
    ids = torch.randint(500, (3, 64), device=GPU)
    n_padding = torch.tensor([0, 20, 40], device=GPU)
    attention_mask = torch.arange(64, device=GPU) >= n_padding[:, None]
    with torch.autocast(GPU, torch.bfloat16):
        logits = model(ids, attention_mask=attention_mask)
    logits.float().logsumexp(-1).sum().backward()
    assert gradients(model).isfinite().all()


# ----------------------------------------------------------------------------------------------------- the sampler


@pytest.mark.parametrize('settings', [
    dict(), dict(cache='prefix'), dict(cache='dual'), dict(cfg_scale=1.0), dict(threshold=0.01)], ids=str)
def test_the_same_tokens(settings):
    model = tiny_model(**SHAPE)
    x, _, _ = diffusion.canvas([[1, 2, 3, 4, 5]], 32, MASK, 0)
    params = diffusion.SamplingParams(steps=16, block_length=8, **settings)
    on_cpu = diffusion.generate(model, x, MASK, params)
    on_gpu = diffusion.generate(copy_on_gpu(model), x.to(GPU), MASK, params)
    assert torch.equal(on_gpu.x.cpu(), on_cpu.x) and on_gpu.n_forward == on_cpu.n_forward


def test_noise_on_the_gpu_fills_the_canvas():
    """The noise of a GPU is not that of a CPU, so this only has to run."""
    model = copy_on_gpu(tiny_model(**SHAPE))
    x, _, _ = diffusion.canvas([[1, 2, 3, 4, 5]], 32, MASK, 0, GPU)
    params = diffusion.SamplingParams(temperature=1.0, remasking='random')
    out = diffusion.generate(model, x, MASK, params, generator=[diffusion.keyed_generator(1, device=GPU)])
    assert not (out.x == MASK).any()


def test_a_padded_batch_has_the_tokens_of_each_row():
    model = copy_on_gpu(tiny_model(**SHAPE))
    prompts = [[1, 2, 3], list(range(20)), [7] * 11]
    params = diffusion.SamplingParams(steps=16)
    x, attention_mask, _ = diffusion.canvas(prompts, 16, MASK, 0, GPU)
    together = diffusion.generate(model, x, MASK, params, attention_mask=attention_mask).x
    for row, prompt in zip(together, prompts):
        x, _, _ = diffusion.canvas([prompt], 16, MASK, 0, GPU)
        alone = diffusion.generate(model, x, MASK, params).x
        assert torch.equal(row[-16:], alone[0, -16:])


def test_the_likelihood():
    """The masks are drawn on the CPU, so they are the same."""
    model = tiny_model(**SHAPE)
    x0 = torch.randint(500, (64,), generator=seeded(0))
    everything = torch.ones(64, dtype=torch.bool)
    on_cpu = diffusion.log_likelihood(model, x0, everything, MASK, generator=seeded(1))
    on_gpu = diffusion.log_likelihood(
        copy_on_gpu(model), x0.to(GPU), everything.to(GPU), MASK, generator=seeded(1))
    assert on_gpu == pytest.approx(on_cpu, rel=1e-4)


# ------------------------------------------------------------------------------------------------------- training


def losses(folder, device, n=12, bf16=False, sharded=False, **changes):
    """Return the losses of the first updates of a run."""
    settings = configure(dict(vars(train)), [])
    settings.update(SHAPE, dataset=str(folder), batch_size=8, global_batch=8, warmup_iters=2, learning_rate=3e-3,
                    muon_lr=1e-2, optimizer='muon', random_split=0.5, device=device, bf16=bf16, sharded=sharded)
    cfg = SimpleNamespace(**{**settings, **changes})
    source, _, tok = train.open_data(cfg)
    model, net = train.build(cfg)
    models.init_weights(model, 0, 1.0, device='cpu')
    optimizers = train.make_optimizers(model, cfg)
    result = []
    for it in range(n):
        batches = train.micro_batches(source, it, cfg, tok)
        loss, _ = train.train_step(net, optimizers, batches, train.lr_factor(it, cfg), cfg)
        result.append(loss)
    return torch.tensor(result)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return small_corpus(tmp_path_factory.mktemp('corpus') / 'small')


@pytest.fixture(scope='module')
def cpu_losses(folder):
    return losses(folder, 'cpu')


@pytest.mark.parametrize('changes, tolerance', [
    (dict(), 1e-3), (dict(bf16=True), 2e-2), (dict(bf16=True, compile=True), 2e-2),
    (dict(bf16=True, act_memory=0.0), 2e-2), (dict(bf16=True, compile=True, act_memory=0.5), 2e-2)], ids=str)
def test_a_run(folder, cpu_losses, changes, tolerance):
    """Data and noise are made on the CPU, so rows and masks are the same."""
    on_gpu = losses(folder, GPU, **changes)
    assert (on_gpu / cpu_losses - 1).abs().max() < tolerance, (on_gpu, cpu_losses)


@pytest.mark.parametrize('changes, tolerance', [
    (dict(), 1e-3), (dict(bf16=True), 2e-2), (dict(bf16=True, compile=True), 2e-2)], ids=str)
def test_fsdp_on_one_gpu(folder, cpu_losses, changes, tolerance):
    backend = 'cpu:gloo,cuda:nccl' if GPU == 'cuda' else 'gloo'
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        on_gpu = losses(folder, GPU, sharded=True, fsdp=-1, **changes)
    finally:
        dist.destroy_process_group()
    assert (on_gpu / cpu_losses - 1).abs().max() < tolerance, (on_gpu, cpu_losses)
