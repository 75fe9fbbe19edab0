"""The Transformer: every fast or partial way to call it equals the plain one."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import seeded, tiny_model

import model as models
from configurator import UserError
from model import ModelConfig, Transformer


def random_ids(B=3, T=12, seed=0):
    return torch.randint(40, (B, T), generator=seeded(seed))


def random_positions(seed=1):
    """Return a mask of 3 rows, (3, 12) bool, that is neither empty nor full."""
    return torch.rand(3, 12, generator=seeded(seed)) < 0.4


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=1e-4)


both_kinds = pytest.mark.parametrize('causal', [False, True], ids=['bidirectional', 'causal'])


# ----------------------------------------------------------------------------------------------------- the network


def test_shapes_and_dtypes():
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        model = tiny_model().to(dtype)
        ids = random_ids()
        positions = random_positions()
        logits = model(ids)
        assert logits.shape == (3, 12, 40) and logits.dtype == dtype
        assert model(ids, positions=positions).shape == (positions.sum(), 40)
        ce = model(ids, positions=positions, targets=ids[positions])
        # the loss is never narrower than float32
        assert ce.shape == (positions.sum(),) and ce.dtype == torch.promote_types(dtype, torch.float32)


@both_kinds
def test_who_sees_whom(causal):
    model = tiny_model(causal=causal)
    ids = random_ids()
    changed = ids.clone()
    changed[:, 8] = (changed[:, 8] + 1) % 40
    same = (model(ids) - model(changed)).abs().amax(-1) < 1e-6                          # (B, T)
    assert not same[:, 8:].any()
    assert same[:, :8].all() if causal else not same[:, :8].any()


def test_rope_turns_pairs_by_an_angle_that_grows_with_the_position():
    D, theta = 8, 100.
    positions = torch.tensor([0, 3])
    cos, sin = models.rope_angles(positions, D, theta)
    frequency = torch.tensor([theta ** (-2 * j / D) for j in range(D // 2)])
    close(cos, (positions[:, None] * frequency).cos())

    x = torch.randn(1, 1, 2, D, generator=seeded(0))
    turned = models.apply_rope(x, cos, sin)
    close(turned[0, 0, 0], x[0, 0, 0])                      # position 0 is not turned
    for j in range(D // 2):
        pair = torch.complex(x[0, 0, 1, j], x[0, 0, 1, j + D // 2])
        angle = 3 * frequency[j]
        rotation = torch.complex(angle.cos(), angle.sin())
        close(turned[0, 0, 1, [j, j + D // 2]], torch.view_as_real(pair * rotation))


def test_rope_makes_attention_relative():
    model = tiny_model()
    ids = random_ids()
    shifted = model(F.pad(ids, (5, 0)), attention_mask=torch.arange(17).expand(3, -1) >= 5)
    close(shifted[:, 5:], model(ids), atol=1e-4)


def test_rope_in_the_dtype_of_the_queries():
    """With rope_fp32=False (iLLaDA) bfloat16 angles are coarser. In float32 nothing changes."""
    ids = random_ids()
    wide, narrow = (tiny_model(rope_fp32=kind) for kind in (True, False))
    assert torch.equal(wide(ids), narrow(ids))
    assert not torch.equal(wide.bfloat16()(ids), narrow.bfloat16()(ids))


def test_grouped_queries_equal_repeated_heads():
    grouped, full = tiny_model(n_kv_head=2), tiny_model(n_kv_head=4)
    state = grouped.state_dict()
    for name in state:
        if name.endswith(('attn.k.weight', 'attn.v.weight')):
            state[name] = state[name].view(2, 8, 32).repeat_interleave(2, 0).flatten(0, 1)
    full.load_state_dict(state)
    close(full(random_ids()), grouped(random_ids()))


def test_a_tied_head_is_the_embedding():
    model = tiny_model(tied=True)
    assert model.head is None and 'head.weight' not in model.state_dict()
    untied = tiny_model()
    untied.load_state_dict({**model.state_dict(), 'head.weight': model.embed.weight})
    close(untied(random_ids()), model(random_ids()))


# ------------------------------------------------------------------------------------------------- partial and fast


@both_kinds
def test_positions_and_targets_equal_full_logits(causal):
    for tied in (False, True):
        model = tiny_model(causal=causal, tied=tied).double()
        ids, positions = random_ids(), random_positions()
        targets = random_ids(seed=3)[positions]
        logits = model(ids)[positions]                                                  # (M, V)
        close(model(ids, positions=positions), logits)
        flat = positions.flatten().nonzero()[:, 0]
        close(model(ids, positions=flat), logits)
        ce = F.cross_entropy(logits, targets, reduction='none')
        close(model(ids, positions=flat, targets=targets), ce, atol=1e-10)


def test_only_positions_to_predict_pass_the_last_feed_forward():
    model = tiny_model()
    lengths = []
    model.blocks[-1].ff.register_forward_pre_hook(lambda part, args: lengths.append(len(args[0])))
    model(random_ids(), positions=random_positions())
    assert lengths == [random_positions().sum()]


@pytest.mark.parametrize('dtype', [torch.bool, torch.int64])
@both_kinds
def test_padding_that_is_not_attended_to_changes_nothing(causal, dtype):
    model = tiny_model(causal=causal)
    ids = random_ids(B=2)
    padded = torch.stack((F.pad(ids[0], (4, 0)), F.pad(ids[1, 2:], (6, 0))))            # rows of length 12 and 10
    attention_mask = torch.arange(16) >= torch.tensor([[4], [6]])
    out = model(padded, attention_mask=attention_mask.to(dtype))
    close(out[0, 4:], model(ids[:1])[0], atol=1e-4)
    close(out[1, 6:], model(ids[1:, 2:])[0], atol=1e-4)
    assert out.isfinite().all()


@both_kinds
def test_cache(causal):
    model = tiny_model(causal=causal)
    ids = random_ids()
    full = model(ids)
    kv = model.new_kv(3, 12)
    close(model(ids, kv=kv, kv_positions=torch.arange(12)), full)
    window = torch.arange(5, 9)
    close(model(ids[:, window], kv=kv, kv_positions=window), full[:, window])

    # and what attends to the cache sees its padding as little
    attention_mask = torch.arange(12).expand(3, -1) >= 3
    padded = model(ids, attention_mask=attention_mask)
    kv = model.new_kv(3, 12)
    model(ids, attention_mask=attention_mask, kv=kv, kv_positions=torch.arange(12))
    part = model(ids[:, window], attention_mask=attention_mask, kv=kv, kv_positions=window)
    close(part, padded[:, window], atol=1e-4)


def test_causal_cache_token_by_token():
    model = tiny_model(causal=True)
    ids = random_ids()
    kv = model.new_kv(3, 12)
    steps = [model(ids[:, i:i + 1], kv=kv, kv_positions=torch.tensor([i])) for i in range(12)]
    close(torch.cat(steps, 1), model(ids))


@pytest.mark.parametrize('causal', [False, True])
@pytest.mark.parametrize('lengths', [[5, 1, 10], [100, 1, 59]], ids=['short', 'long'])
def test_packed_segments_equal_separate_ones(causal, lengths):
    model = tiny_model(causal=causal)
    ids = random_ids(B=1, T=sum(lengths))
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    parts = ids.split(lengths, 1)
    packed = model(ids, cu_seqlens=cu_seqlens)
    close(packed, torch.cat([model(part) for part in parts], 1), atol=1e-4)

    gradients = torch.autograd.grad(packed.square().mean(), list(model.parameters()))
    separate = sum(model(part).square().sum() for part in parts) / packed.numel()
    for packed_g, g in zip(gradients, torch.autograd.grad(separate, list(model.parameters()))):
        close(packed_g, g, atol=1e-4)


def test_packed_rows():
    """cu_seqlens counts through the flattened batch, and segments at its end may be empty."""
    model = tiny_model()
    ids = random_ids(B=2)
    out = model(ids, cu_seqlens=torch.tensor([0, 7, 12, 24, 24, 24], dtype=torch.int32))
    close(out[0], torch.cat((model(ids[:1, :7]), model(ids[:1, 7:])), 1)[0], atol=1e-4)
    close(out[1], model(ids[1:])[0], atol=1e-4)


@pytest.mark.parametrize('limit', [1, 40, 300, 2 ** 28])
def test_head_cross_entropy_in_parts_equals_the_whole(limit, monkeypatch):
    """At most `limit` logits exist at a time. Values and gradients do not depend on it."""
    class Vocabulary(torch.Tensor):
        """A weight matrix (V, C) that pretends to have so many rows that `limit` is reached."""

        def __len__(self):
            return 40 * 2 ** 28 // limit

    h = torch.randn(20, 16, generator=seeded(0), dtype=torch.float64).requires_grad_()
    weight = torch.randn(40, 16, generator=seeded(1), dtype=torch.float64).requires_grad_()
    targets = torch.randint(40, (20,), generator=seeded(2))
    w = torch.rand(20, generator=seeded(3))
    calls = []
    monkeypatch.setattr(models, 'checkpoint', lambda f, *args, **options: calls.append(1) or f(*args))

    plain = F.cross_entropy(h @ weight.T, targets, reduction='none')
    ours = models.head_cross_entropy(h, weight.as_subclass(Vocabulary), targets).as_subclass(torch.Tensor)
    close(ours, plain, atol=1e-10)
    gradients = [torch.autograd.grad((w * ce).sum(), (h, weight)) for ce in (ours, plain)]
    for a, b in zip(*gradients):
        close(a, b, atol=1e-10)
    n_parts = math.ceil(20 / max(1, limit // 40))
    assert len(calls) == (n_parts if n_parts > 1 else 0)


def test_recomputed_blocks_have_the_same_gradients():
    gradients = []
    for recompute in (False, True):
        model = tiny_model()
        model.recompute = recompute
        loss = model(random_ids(), positions=random_positions(), targets=random_ids()[random_positions()]).sum()
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    for a, b in zip(*gradients):
        assert torch.equal(a, b)


def test_nothing_to_predict_is_a_loss_of_zero():
    model = tiny_model()
    nothing = torch.zeros(0, dtype=torch.long)
    loss = model(random_ids(), positions=nothing, targets=nothing).sum()
    loss.backward()
    assert loss.item() == 0 and all(p.grad.isfinite().all() for p in model.parameters())


def test_autocast_stays_close_and_losses_stay_float32():
    model = tiny_model()
    ids, positions = random_ids(), random_positions()
    exact = model(ids, positions=positions, targets=ids[positions])
    with torch.autocast('cpu', torch.bfloat16):
        narrow = model(ids, positions=positions, targets=ids[positions])
        assert model(ids).dtype == torch.bfloat16
    assert narrow.dtype == torch.float32 and (narrow - exact).abs().max() < 0.1


def test_attention_in_bfloat16_is_as_exact_as_its_inputs():
    q, k, v = (torch.randn(2, 4, 100, 16, generator=seeded(i)).bfloat16() for i in range(3))
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    close(models.attention(q, k, v).double(), exact, atol=0.004)        # half of the last bit of the result


# ------------------------------------------------------------------------------------------------ sizes and weights


LLADA_8B = dict(vocab_size=126464, n_layer=32, n_head=32, n_kv_head=32, d_model=4096, d_ff=12288)


@pytest.mark.parametrize('shape, total, non_embedding', [
    (LLADA_8B, 8_015_581_184, 6_979_588_096),
    (dict(vocab_size=155136, n_layer=32, n_head=32, n_kv_head=8, d_model=4096, d_ff=14336, tied=True),      # iLLaDA 8B
     7_615_025_152, 6_979_588_096),
    (dict(vocab_size=126464, n_layer=22, n_head=32, n_kv_head=4, d_model=2048, d_ff=5634),                  # LLaDA 1B
     1_487_243_264, 969_246_720),
    (dict(vocab_size=126464, n_layer=28, n_head=32, n_kv_head=8, d_model=4096, d_ff=13440),     # autoregressive twin
     6_834_851_840, 5_798_858_752),
], ids=['llada_8b', 'illada_8b', 'llada_1b', 'ar_7b'])
def test_parameter_counts_of_the_papers(shape, total, non_embedding):
    model = models.empty_model(ModelConfig(seq_len=4096, **shape))
    assert model.num_params() == total and model.num_params(non_embedding=True) == non_embedding


def test_flops_per_token():
    model = models.empty_model(ModelConfig(seq_len=4096, **LLADA_8B))
    assert math.isclose(model.flops_per_token(0.5005), 49.87e9, rel_tol=1e-3)
    assert model.flops_per_token(1.0) - model.flops_per_token(0.5) == 3 * 4096 * 126464


def test_initial_weights_depend_on_name_and_seed_alone():
    a, deeper, other = tiny_model(0), tiny_model(0, n_layer=3), tiny_model(1)
    assert torch.equal(a.blocks[1].ff.up.weight, deeper.blocks[1].ff.up.weight)
    assert not torch.equal(a.blocks[1].ff.up.weight, other.blocks[1].ff.up.weight)
    assert not torch.equal(a.blocks[0].ff.up.weight, a.blocks[1].ff.up.weight)


def test_initial_weights_follow_the_scheme():
    model = models.init_weights(Transformer(ModelConfig(1000, 16, 4, 4, 4, 256, 512)))

    def std(p):
        return p.std().item() / 0.9866                      # of a normal distribution that is cut off at 3 std

    for layer, block in enumerate(model.blocks, 1):
        assert math.isclose(std(block.attn.q.weight), 256 ** -0.5, rel_tol=0.01)
        assert math.isclose(std(block.attn.out.weight), (256 * 2 * layer) ** -0.5, rel_tol=0.01)
        assert math.isclose(std(block.ff.down.weight), (512 * 2 * layer) ** -0.5, rel_tol=0.01)
        assert (block.ff_norm.weight == 1).all()
    assert math.isclose(std(model.embed.weight), 256 ** -0.5, rel_tol=0.01)
    models.init_weights(model, emb_std=0.5)
    assert math.isclose(std(model.embed.weight), 0.5, rel_tol=0.01)


@pytest.mark.parametrize('change, message', [
    (dict(d_model=30), 'd_model / n_head must be an even number'), (dict(n_head=32), 'd_model / n_head')], ids=str)
def test_impossible_shapes(change, message):
    with pytest.raises(UserError, match=message):
        tiny_model(**change)
