"""The Transformer: every fast or partial way of asking it equals the plain one."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import tiny_model

import model as M
from model import ModelConfig, Transformer


def ids_of(model, B=3, W=12, seed=0):
    return torch.randint(model.config.vocab_size, (B, W), generator=torch.Generator().manual_seed(seed))


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=1e-4)


def test_rows_and_positions():
    model = tiny_model()
    ids = ids_of(model)
    full = model(ids)
    rows = torch.rand(3, 12, generator=torch.Generator().manual_seed(1)) < 0.4
    seen = []
    model.blocks[-1].ff.register_forward_pre_hook(lambda part, args: seen.append(len(args[0])))
    close(model(ids, rows=rows), full[rows])
    assert seen == [rows.sum()]                                                         # no others in the last block
    close(model(ids, pos=torch.arange(12) + 100), full, atol=1e-3)                      # rotary positions are relative


def test_attention_is_bidirectional_and_causal_is_not():
    for causal in (False, True):
        model = tiny_model(causal=causal)
        ids = ids_of(model)
        changed = ids.clone()
        changed[:, 8] = (changed[:, 8] + 1) % 40
        same = (model(ids) - model(changed)).abs().amax(-1)[:, :8] < 1e-6
        assert same.all() if causal else not same.any()


def test_hidden_padding_does_not_exist():
    model = tiny_model()
    ids = ids_of(model, B=1)
    padded = torch.cat((torch.zeros(1, 4, dtype=torch.long), ids), 1)
    visible = torch.arange(16)[None] >= 4
    close(model(padded, visible=visible)[:, 4:], model(ids), atol=1e-4)
    assert model(padded, visible=visible).isfinite().all()
    causal = tiny_model(causal=True)
    out = causal(padded, visible=visible)
    assert out.isfinite().all()
    close(out[:, 4:], causal(ids), atol=1e-4)


@pytest.mark.parametrize('causal', [False, True])
def test_cache(causal):
    model = tiny_model(causal=causal)
    ids = ids_of(model)
    kv = model.new_kv(3, 12)
    full = model(ids, pos=torch.arange(12), kv=kv)
    close(full, model(ids))
    window = torch.arange(5, 9)
    close(model(ids[:, window], pos=window, kv=kv), full[:, window])                    # stale rows that are not stale
    if causal:                                                                          # one column at a time
        kv = model.new_kv(3, 12)
        steps = [model(ids[:, i:i + 1], pos=torch.tensor([i]), kv=kv) for i in range(12)]
        close(torch.cat(steps, 1), full)


@pytest.mark.parametrize('causal', [False, True])
@pytest.mark.parametrize('lengths', [[5, 1, 10], [200, 1, 323]], ids=['short', 'long'])
def test_packed_equals_separate(causal, lengths):
    model = tiny_model(causal=causal)
    ids = ids_of(model, B=1, W=sum(lengths))
    cu = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    packed = model(ids, cu_seqlens=cu)
    close(packed, torch.cat([model(part) for part in ids.split(lengths, 1)], 1))
    packed.square().sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    sum(model(part).square().sum() for part in ids.split(lengths, 1)).backward()
    for g, p in zip(grads, model.parameters()):
        close(g, p.grad, atol=1e-3 * g.abs().max().item() + 1e-3)
    two_rows, n = ids.view(2, -1), ids.numel()                                          # borders count row by row
    close(model(two_rows, cu_seqlens=torch.tensor([0, n // 2, n, n], dtype=torch.int32)), model(two_rows))
    with pytest.raises(ValueError, match='must end at'):
        model(two_rows, cu_seqlens=torch.tensor([0, n // 2], dtype=torch.int32))


def test_grouped_queries_equal_repeated_heads():
    grouped, full = tiny_model(n_kv_head=2), tiny_model(n_kv_head=4)
    state = grouped.state_dict()
    for name in list(state):
        if name.endswith(('attn.k.weight', 'attn.v.weight')):
            state[name] = state[name].view(2, 8, 32).repeat_interleave(2, 0).flatten(0, 1)
    full.load_state_dict(state)
    close(full(ids_of(full)), grouped(ids_of(full)))


@pytest.mark.parametrize('n_kv, kind', list(itertools.product((4, 2), ('plain', 'hidden', 'causal'))))
def test_explicit_attention_equals_the_fused_kernel(n_kv, kind):
    """On CPU in bfloat16 short canvases take three plain lines instead of the kernel."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, 24, 16, generator=g).requires_grad_() for h in (4, n_kv, n_kv))
    options = {'hidden': dict(may_see=(torch.arange(24) >= 5)[None, None, None].expand(2, 1, 24, 24)),
               'causal': dict(causal=True)}.get(kind, {})
    want = M.attention(q, k, v, **options)                                              # float32: SDPA
    want.square().sum().backward()
    grads = [z.grad.clone() for z in (q, k, v)]
    short = [z.detach().bfloat16().requires_grad_() for z in (q, k, v)]
    got = M.attention(*short, **options)
    got.float().square().sum().backward()
    torch.testing.assert_close(got.float(), want, atol=0.03, rtol=0.03)
    for a, b in zip(short, grads):
        assert F.cosine_similarity(a.grad.float().flatten(), b.flatten(), 0) > 0.999


def test_attention_in_bfloat16_is_as_accurate_as_the_fused_kernel():
    """Scores are not rounded before the softmax: against float64, in training (plain lines) and without a gradient."""
    g = torch.Generator().manual_seed(0)
    for W, D in ((100, 48), (256, 128), (300, 64)):
        q, k, v = ((4 if i == 0 else 1) * torch.randn(2, 4, W, D, generator=g) for i in range(3))
        narrow = [z.bfloat16() for z in (q, k, v)]
        exact = F.scaled_dot_product_attention(*(z.double() for z in narrow))
        fused = (F.scaled_dot_product_attention(*narrow) - exact).square().mean().sqrt()
        for grad in (False, True):
            ours = M.attention(*(z.requires_grad_(grad) for z in narrow)).detach()
            assert (ours - exact).square().mean().sqrt() < (1.5 if grad else 1.01) * fused


def test_fused_loss_equals_logits_and_cross_entropy():
    for tied in (False, True):
        model = tiny_model(tied=tied).double()
        ids = ids_of(model)
        rows = torch.rand(3, 12, generator=torch.Generator().manual_seed(2)) < 0.5
        targets, w = ids_of(model, seed=3)[rows], torch.rand(int(rows.sum()), dtype=torch.float64)
        want = (F.cross_entropy(model(ids)[rows], targets, reduction='none') * w).sum()
        want.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters()}
        for chunk in (None, 1, 7, 1000):
            model.zero_grad()
            h = {}
            handle = model.norm.register_forward_hook(lambda m, i, out: h.update(x=out))    # noqa: B023
            model(ids, rows=rows)
            handle.remove()
            head = model.embed.weight if tied else model.head.weight
            loss = M.weighted_cross_entropy(h['x'], head, targets, w, chunk=chunk)
            loss.backward()
            assert abs(loss.item() - want.item()) < 1e-10
            for name, p in model.named_parameters():
                torch.testing.assert_close(p.grad, grads[name], atol=1e-10, rtol=1e-8)
        loss = model(ids, rows=rows, targets=targets, weights=w)
        assert abs(loss.item() - want.item()) < 1e-10


@pytest.mark.skipif(not hasattr(F, 'linear_cross_entropy'), reason='torch 2.13 has it')
def test_fused_loss_equals_torchs_own():
    g = torch.Generator().manual_seed(0)
    h, weight = torch.randn(50, 16, generator=g).requires_grad_(), torch.randn(300, 16, generator=g).requires_grad_()
    targets, w = torch.randint(300, (50,), generator=g), torch.rand(50, generator=g)
    for loss in ((F.linear_cross_entropy(h, weight, targets, reduction='none') * w).sum(),
                 M.weighted_cross_entropy(h, weight, targets, w, chunk=16)):
        grads = torch.autograd.grad(loss, (h, weight))
        if 'want' not in locals():
            want, want_grads = loss, grads
    assert abs(loss - want) < 1e-4
    for a, b in zip(grads, want_grads):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_no_masked_row_is_no_loss():
    model = tiny_model()
    rows = torch.zeros(3, 12, dtype=torch.bool)
    loss = model(ids_of(model), rows=rows, targets=torch.zeros(0, dtype=torch.long), weights=torch.zeros(0))
    loss.backward()
    assert loss.item() == 0 and all(p.grad.isfinite().all() for p in model.parameters())


def test_bfloat16_autocast_stays_close_and_losses_stay_float32():
    model = tiny_model()
    ids = ids_of(model)
    rows = torch.ones_like(ids, dtype=torch.bool)
    args = dict(rows=rows, targets=ids.flatten(), weights=torch.full((36,), 1 / 36))
    want = model(ids, **args)
    with torch.autocast('cpu', torch.bfloat16):
        got = model(ids, **args)
    assert got.dtype == torch.float32 and abs(got - want) < 0.05


def test_parameter_counts_of_the_papers():
    """LLaDA 8B and iLLaDA 8B to the digit (App. B.2; FFN of the 1B models is 5632 or 5634, the totals cannot tell)."""
    table = [
        (dict(vocab_size=126464, n_layer=32, n_head=32, n_kv_head=32, d_model=4096, d_ff=12288),
         8015581184, 6979588096),
        (dict(vocab_size=155136, n_layer=32, n_head=32, n_kv_head=8, d_model=4096, d_ff=14336, tied=True),
         7615025152, 6979588096),
        (dict(vocab_size=126464, n_layer=22, n_head=32, n_kv_head=4, d_model=2048, d_ff=5634), 1487243264, 969246720),
        (dict(vocab_size=126464, n_layer=28, n_head=32, n_kv_head=8, d_model=4096, d_ff=13440), 6834851840, 5798858752),
    ]
    for shape, total, non_embedding in table:
        with torch.device('meta'):
            model = Transformer(ModelConfig(seq_len=4096, **shape))
        assert model.num_params() == total and model.num_params(non_embedding=True) == non_embedding
    with torch.device('meta'):
        llada = Transformer(ModelConfig(seq_len=4096, **table[0][0]))
    assert abs(llada.flops_per_token(0.5005) / 1e9 - 49.87) < 0.02


def test_initial_weights_depend_on_name_and_seed_alone():
    a, b, c = tiny_model(0), tiny_model(0, n_layer=3), tiny_model(1)
    assert torch.equal(a.blocks[1].ff.up.weight, b.blocks[1].ff.up.weight)
    assert not torch.equal(a.blocks[1].ff.up.weight, c.blocks[1].ff.up.weight)
    assert not torch.equal(a.blocks[0].ff.up.weight, a.blocks[1].ff.up.weight)


@pytest.mark.parametrize('change, says', [
    (dict(n_layer=0), 'n_layer'), (dict(d_model=30), 'd_model / n_head'), (dict(n_kv_head=3), 'n_kv_head'),
    (dict(vocab_size=2.5), 'vocab_size'), (dict(rope_theta=-1.0), 'rope_theta'),
])
def test_bad_shapes(change, says):
    with pytest.raises(ValueError, match=says):
        tiny_model(**change)
