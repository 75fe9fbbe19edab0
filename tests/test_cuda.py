"""On a GPU the same things come out as on a CPU: logits, losses, gradients, updates, tokens. Skipped without one."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from helpers import small_corpus, tiny_model

import diffusion
import model as M
import train
from configurator import settings_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
SHAPE = dict(vocab_size=512, seq_len=64, n_layer=2, n_head=4, n_kv_head=2, d_model=128, d_ff=192)
ONE = train.Processes(rank=0, world=1, device='cuda', bf16=False, sharded=False)


def distance(a, b):
    """Relative to b, in float64 on the host."""
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    assert a.isfinite().all()
    return ((a - b).norm() / b.norm()).item()


def gradients(model):
    return torch.cat([p.grad.flatten().cpu() for p in model.parameters()])


def on_the_card(model):
    """A copy of a model, on the GPU."""
    other = M.Transformer(model.config).to('cuda')
    other.load_state_dict(model.state_dict())
    return other


def some_question(cu_seqlens=None):
    x0 = torch.randint(500, (4, 64), generator=torch.Generator().manual_seed(0))
    t = torch.full((4,), 0.5)
    xt, masked = diffusion.forward_process(x0, t, 511, exact=True, u=diffusion.row_noise(0, 0, range(4), 64))
    return diffusion.question(x0, xt, masked, torch.ones_like(masked), t, cu_seqlens=cu_seqlens)


def test_logits_in_float32():
    model, ids = tiny_model(**SHAPE), torch.randint(500, (3, 64))
    assert distance(on_the_card(model)(ids.cuda()), model(ids)) < 1e-4


@pytest.mark.parametrize('packed', [False, True])
@pytest.mark.parametrize('bf16, close', [(False, 1e-4), (True, 3e-2)])
def test_loss_and_gradients(packed, bf16, close):
    """Packed in bfloat16: the kernel for segments, against a mask in float32 on the CPU."""
    borders = torch.tensor([0, 20, 64, 128, 150, 151, 192, 256], dtype=torch.int32) if packed else None
    asked, model = some_question(borders), tiny_model(**SHAPE)
    other = on_the_card(model)
    loss = diffusion.weighted_loss(model, asked)
    loss.backward()
    with torch.autocast('cuda', torch.bfloat16, enabled=bf16):
        same = diffusion.weighted_loss(other, ONE.here(asked))
    same.backward()
    assert abs(same.item() / loss.item() - 1) < close / 10
    assert distance(gradients(other), gradients(model)) < close


def test_a_padded_batch_has_gradients():
    """A mask in training, which cuDNN once answered by NaN."""
    model = on_the_card(tiny_model(**SHAPE))
    ids = torch.randint(500, (3, 64), device='cuda')
    visible = torch.arange(64, device='cuda') >= torch.tensor([0, 20, 40], device='cuda')[:, None]
    with torch.autocast('cuda', torch.bfloat16):
        model(ids, visible=visible).float().logsumexp(-1).sum().backward()
    assert gradients(model).isfinite().all()


@pytest.mark.parametrize('how', [dict(), dict(cache='prefix'), dict(cache='dual'), dict(cache='roll'),
                                 dict(cfg_scale=1.0), dict(threshold=0.01), dict(temperature=0.0, remasking='random')])
def test_the_same_tokens(how):
    """Float32 and the noise of neither: where randomness enters, only that it runs and fills the canvas."""
    model = tiny_model(**SHAPE).eval()
    x, _, _ = diffusion.canvas([[1, 2, 3, 4, 5]], 32, 511, 0)
    options = dict(steps=16, block_length=8, **how)
    here, n = diffusion.generate(model, x, 511, **options)
    there, m = diffusion.generate(on_the_card(model).eval(), x.cuda(), 511, **options)
    assert (there != 511).all()
    if how.get('remasking') != 'random':
        assert n == m and torch.equal(here, there.cpu())


def test_a_padded_batch_has_the_tokens_of_each_row():
    model = on_the_card(tiny_model(**SHAPE)).eval()
    prompts = [[1, 2, 3], list(range(20)), [7] * 11]
    x, visible, _ = diffusion.canvas(prompts, 16, 511, 0, 'cuda')
    together, _ = diffusion.generate(model, x, 511, steps=16, visible=visible)
    for row, prompt in zip(together, prompts):
        alone, _, _ = diffusion.canvas([prompt], 16, 511, 0, 'cuda')
        assert torch.equal(row[-16:], diffusion.generate(model, alone, 511, steps=16).x[0, -16:])


def losses(corpus_folder, procs, n=12, **changes):
    """Of the first updates of a run."""
    cfg = SimpleNamespace(**{
        **settings_of(vars(train)), **SHAPE, 'dataset': str(corpus_folder), 'batch_size': 8, 'warmup_iters': 2,
        'learning_rate': 3e-3, 'muon_lr': 1e-2, 'random_split': 0.5, **changes})
    source, _, tok = train.open_data(cfg, procs)
    model, net = train.build(cfg, procs, cfg.vocab_size)
    M.init_weights(model, 0, 1.0, device='cpu')
    optimizers = train.make_optimizers(model, cfg, procs.device)
    done = [train.train_step(net, optimizers, train.questions(source, it, cfg, tok, procs), train.lr_factor(it, cfg),
                             cfg, procs)[0] for it in range(n)]
    return torch.stack(done).cpu()


@pytest.fixture(scope='module')
def corpus_folder(tmp_path_factory):
    return small_corpus(tmp_path_factory.mktemp('corpus') / 'small')


@pytest.fixture(scope='module')
def cpu_losses(corpus_folder):
    return losses(corpus_folder, train.Processes(0, 1, 'cpu', False, False))


@pytest.mark.parametrize('changes, bf16, close', [
    (dict(), False, 1e-3), (dict(), True, 2e-2), (dict(compile=True), True, 2e-2), (dict(act_memory=0.0), True, 2e-2),
    (dict(compile=True, act_memory=0.5), True, 2e-2)])
def test_a_run(corpus_folder, cpu_losses, changes, bf16, close):
    """The same losses as on a CPU in float32; noise is made on the host, so rows and masks are the same."""
    mine = losses(corpus_folder, train.Processes(0, 1, 'cuda', bf16, False), **changes)
    assert (mine / cpu_losses - 1).abs().max() < close, (mine, cpu_losses)


@pytest.mark.parametrize('changes, close', [(dict(dtype='float32'), 1e-3), (dict(), 2e-2), (dict(compile=True), 2e-2)])
def test_fsdp_on_one_card(corpus_folder, cpu_losses, changes, close):
    dist.init_process_group('cpu:gloo,cuda:nccl', store=dist.HashStore(), rank=0, world_size=1)
    try:
        procs = train.Processes(0, 1, 'cuda', changes.get('dtype') != 'float32', True)
        mine = losses(corpus_folder, procs, fsdp=-1, **changes)
    finally:
        dist.destroy_process_group()
    assert (mine / cpu_losses - 1).abs().max() < close, (mine, cpu_losses)
