"""A GPU computes what a CPU computes: logits, losses, gradients, updates, tokens. Skipped without a GPU."""

import pytest
import torch
import torch.distributed as dist
from helpers import seeded, settings_of, tiny_model

import diffusion
import model as models
import train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
GPU = 'cuda'
SHAPE = dict(vocab_size=512, seq_len=64, n_layer=2, n_head=4, n_kv_head=2, d_model=128, d_ff=192)
MASK = 511
X0 = torch.randint(500, (4, 64), generator=seeded(0))


def distance(a, b):
    """Return the relative distance of a from b, in float64 on the CPU."""
    a, b = (z.detach().double().cpu() for z in (a, b))
    assert a.isfinite().all()
    return ((a - b).norm() / b.norm()).item()


def gradients(model):
    return torch.cat([p.grad.flatten().cpu() for p in model.parameters()])


def both():
    """Return a model on the CPU, and the same on the GPU."""
    return tiny_model(**SHAPE), tiny_model(**SHAPE).to(GPU)


# --------------------------------------------------------------------------------------------- the network


def test_logits_in_float32():
    on_cpu, on_gpu = both()
    assert distance(on_gpu(X0.to(GPU)), on_cpu(X0)) < 1e-4


@pytest.mark.parametrize('packed', [False, True])
@pytest.mark.parametrize('bf16, tolerance', [(False, 1e-4), (True, 3e-2)])
def test_loss_and_gradients(packed, bf16, tolerance):
    """Packed in bfloat16, this compares the kernel for segments with a mask in float32 on the CPU."""
    t = torch.full((4,), 0.5)
    u = diffusion.row_noise(0, 0, range(4), 64)
    xt, masked = diffusion.forward_process(X0, t, MASK, u=u)
    weights = diffusion.loss_weights(torch.ones_like(masked), masked, t)
    borders = torch.tensor([0, 20, 64, 128, 150, 151, 192, 256], dtype=torch.int32)
    batch = diffusion.masked_batch(X0, xt, masked, weights, borders if packed else None)

    on_cpu, on_gpu = both()
    loss = diffusion.diffusion_loss(on_cpu, batch)
    loss.backward()
    same = train.loss_of(on_gpu, batch, settings_of(train, device=GPU, bf16=bf16, sharded=False))
    same.backward()
    assert abs(same.item() / loss.item() - 1) < tolerance / 10
    assert distance(gradients(on_gpu), gradients(on_cpu)) < tolerance


def test_a_padded_batch_has_gradients():
    """cuDNN's backward with a mask has returned NaN since torch 2.11."""
    _, model = both()
    n_padding = torch.tensor([0, 10, 20, 40], device=GPU)
    attention_mask = torch.arange(64, device=GPU) >= n_padding[:, None]
    with torch.autocast(GPU, torch.bfloat16):
        logits = model(X0.to(GPU), attention_mask=attention_mask)
    logits.float().logsumexp(-1).sum().backward()
    assert gradients(model).isfinite().all()


# --------------------------------------------------------------------------------------------- the sampler


@pytest.mark.parametrize('settings', [
    dict(), dict(cache='prefix'), dict(cache='dual'), dict(cfg_scale=1.0), dict(threshold=0.01)], ids=str)
def test_the_same_tokens(settings):
    x, _, _ = diffusion.canvas([[1, 2, 3, 4, 5]], 32, MASK, 0)
    params = diffusion.SamplingParams(steps=16, block_length=8, **settings)
    on_cpu, on_gpu = (diffusion.generate(model, x.to(device), MASK, params)
                      for model, device in zip(both(), ('cpu', GPU)))
    assert torch.equal(on_gpu.x.cpu(), on_cpu.x) and on_gpu.n_forward == on_cpu.n_forward


def test_noise_on_the_gpu_fills_the_canvas():
    """The noise of a GPU is not that of a CPU, so this only has to run."""
    x, _, _ = diffusion.canvas([[1, 2, 3, 4, 5]], 32, MASK, 0, GPU)
    params = diffusion.SamplingParams(temperature=1.0, remasking='random')
    out = diffusion.generate(both()[1], x, MASK, params, generator=[diffusion.keyed_generator(1, device=GPU)])
    assert not (out.x == MASK).any()


def test_a_padded_batch_has_the_tokens_of_each_row():
    _, model = both()
    prompts = [[1, 2, 3], list(range(20)), [7] * 11]

    def write(prompts):
        x, attention_mask, _ = diffusion.canvas(prompts, 16, MASK, 0, GPU)
        params = diffusion.SamplingParams(steps=16)
        return diffusion.generate(model, x, MASK, params, attention_mask=attention_mask).x[:, -16:]

    assert torch.equal(write(prompts), torch.cat([write([prompt]) for prompt in prompts]))


def test_the_likelihood():
    """The masks are drawn on the CPU, so they are the same."""
    everything = torch.ones(64, dtype=torch.bool)
    on_cpu, on_gpu = (
        diffusion.log_likelihood(model, X0[0].to(device), everything.to(device), MASK, generator=seeded(1))
        for model, device in zip(both(), ('cpu', GPU)))
    assert on_gpu == pytest.approx(on_cpu, rel=1e-4)


# ------------------------------------------------------------------------------------------------ training


def losses(corpus, **changes):
    """Return the losses of the first 12 updates of a run."""
    settings = dict(
        SHAPE, dataset=str(corpus), batch_size=8, global_batch=8, warmup_iters=2, learning_rate=3e-3,
        muon_lr=1e-2, optimizer='muon', random_split=0.5, device=GPU, bf16=False, sharded=False)
    cfg = settings_of(train, **{**settings, **changes})
    source, _, tok = train.open_data(cfg)
    model, net = train.build(cfg)
    models.init_weights(model, 0, 1.0, device='cpu')
    optimizers = train.make_optimizers(model, cfg)
    result = []
    for it in range(12):
        batches = train.micro_batches(source, it, cfg, tok)
        loss, _ = train.train_step(net, optimizers, batches, train.lr_factor(it, cfg), cfg)
        result.append(loss)
    return result


@pytest.fixture(scope='module')
def cpu_losses(corpus):
    return losses(corpus, device='cpu')


NARROW = dict(bf16=True)
FSDP = dict(sharded=True, fsdp=-1)


@pytest.mark.parametrize('changes, tolerance', [
    (dict(), 1e-3), (NARROW, 2e-2), (dict(NARROW, compile=True), 2e-2), (dict(NARROW, act_memory=0.0), 2e-2),
    (dict(NARROW, compile=True, act_memory=0.5), 2e-2),
    (FSDP, 1e-3), (dict(FSDP, **NARROW), 2e-2), (dict(FSDP, **NARROW, compile=True), 2e-2)], ids=str)
def test_a_run(corpus, cpu_losses, changes, tolerance):
    """Data and noise are made on the CPU, so rows and masks are the same."""
    if 'fsdp' in changes:
        dist.init_process_group('cpu:gloo,cuda:nccl', store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert losses(corpus, **changes) == pytest.approx(cpu_losses, rel=tolerance)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
