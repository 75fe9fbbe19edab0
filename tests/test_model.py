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


IDS = random_ids()
POSITIONS = torch.rand(3, 12, generator=seeded(1)) < 0.4        # neither empty nor full
both_kinds = pytest.mark.parametrize('causal', [False, True], ids=['bidirectional', 'causal'])


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=1e-4)


# ---------------------------------------------------------------------------------------------- the network


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
def test_logits_are_as_wide_as_the_weights_and_losses_at_least_float32(dtype):
    model = tiny_model().to(dtype)
    logits = model(IDS)
    assert logits.shape == (3, 12, 40) and logits.dtype == dtype
    ce = model(IDS, positions=POSITIONS, targets=IDS[POSITIONS])
    assert ce.shape == (POSITIONS.sum(),) and ce.dtype == torch.promote_types(dtype, torch.float32)


@both_kinds
def test_who_sees_whom(causal):
    model = tiny_model(causal=causal)
    changed = IDS.clone()
    changed[:, 8] = (changed[:, 8] + 1) % 40
    same = (model(IDS) - model(changed)).abs().amax(-1) < 1e-6                      # (B, T)
    assert not same[:, 8:].any()
    assert same[:, :8].all() if causal else not same[:, :8].any()


def test_rope_makes_attention_relative():
    model = tiny_model()
    shifted = model(F.pad(IDS, (5, 0)), attention_mask=torch.arange(17).expand(3, -1) >= 5)
    close(shifted[:, 5:], model(IDS), atol=1e-4)


@pytest.mark.parametrize('rope_fp32', [True, False])
def test_angles_are_exact_and_then_as_wide_as_the_release_has_them(rope_fp32, monkeypatch):
    """With rope_fp32=False (iLLaDA) a model in bfloat16 rounds cos and sin, but never the position."""
    seen = []
    real = models.apply_rope
    monkeypatch.setattr(models, 'apply_rope', lambda x, *angles: seen.append(angles) or real(x, *angles))
    model = tiny_model(rope_fp32=rope_fp32).bfloat16()
    assert model(random_ids(1, 400)).dtype == torch.bfloat16
    dtype = torch.float32 if rope_fp32 else torch.bfloat16
    for cos, sin in seen:
        assert torch.equal(cos[300, 0], torch.tensor(300.).cos().to(dtype)) and sin.dtype == dtype


def test_grouped_queries_equal_repeated_heads():
    grouped, full = tiny_model(n_kv_head=2), tiny_model(n_kv_head=4)
    state = grouped.state_dict()
    for name in state:
        if name.endswith(('attn.k.weight', 'attn.v.weight')):
            state[name] = state[name].view(2, 8, 32).repeat_interleave(2, 0).flatten(0, 1)
    full.load_state_dict(state)
    close(full(IDS), grouped(IDS))


# ----------------------------------------------------------------------------------------- partial and fast


@both_kinds
@pytest.mark.parametrize('tied', [False, True])
def test_positions_and_targets_equal_full_logits(causal, tied):
    model = tiny_model(causal=causal, tied=tied).double()
    targets = random_ids(seed=3)[POSITIONS]
    logits = model(IDS)[POSITIONS]                                                  # (M, V)
    close(model(IDS, positions=POSITIONS), logits)
    flat = POSITIONS.flatten().nonzero()[:, 0]
    close(model(IDS, positions=flat), logits)
    ce = F.cross_entropy(logits, targets, reduction='none')
    close(model(IDS, positions=flat, targets=targets), ce, atol=1e-10)


def test_only_positions_to_predict_pass_the_last_feed_forward():
    model = tiny_model()
    lengths = []
    model.blocks[-1].ff.register_forward_pre_hook(lambda part, args: lengths.append(len(args[0])))
    model(IDS, positions=POSITIONS)
    assert lengths == [POSITIONS.sum()]


@pytest.mark.parametrize('dtype', [torch.bool, torch.int64])
@both_kinds
def test_padding_that_is_not_attended_to_changes_nothing(causal, dtype):
    model = tiny_model(causal=causal)
    padded = torch.stack((F.pad(IDS[0], (4, 0)), F.pad(IDS[1, 2:], (6, 0))))        # rows of length 12 and 10
    attention_mask = torch.arange(16) >= torch.tensor([[4], [6]])
    out = model(padded, attention_mask=attention_mask.to(dtype))
    close(out[0, 4:], model(IDS[:1])[0], atol=1e-4)
    close(out[1, 6:], model(IDS[1:2, 2:])[0], atol=1e-4)
    # even padding attends to something, because a softmax over nothing is NaN in some kernels
    pattern = model.attention_pattern(model.embed(padded), None, None, attention_mask, None)
    assert pattern['attn_mask'].any(-1).all() and out.isfinite().all()


@both_kinds
@pytest.mark.parametrize('n_padding', [0, 3])
def test_a_window_with_a_cache_equals_the_whole(causal, n_padding):
    model = tiny_model(causal=causal)
    attention_mask = torch.arange(12).expand(3, -1) >= n_padding
    options = dict(kv=model.new_kv(3, 12), attention_mask=attention_mask if n_padding else None)
    full = model(IDS, attention_mask=attention_mask)
    close(model(IDS, kv_positions=torch.arange(12), **options), full)
    window = torch.arange(5, 9)
    close(model(IDS[:, window], kv_positions=window, **options), full[:, window])


@both_kinds
def test_packed_segments_equal_separate_ones(causal):
    """cu_seqlens counts through the flattened batch, and segments at its end may be empty."""
    model = tiny_model(causal=causal)
    out = model(IDS, cu_seqlens=torch.tensor([0, 7, 8, 12, 24, 36, 36, 36], dtype=torch.int32))
    separate = [model(part) for part in IDS[:1].split([7, 1, 4], 1)]
    close(out[0], torch.cat(separate, 1)[0], atol=1e-4)
    close(out[1:], model(IDS[1:]), atol=1e-4)


@pytest.mark.parametrize('size', [1, 7, 20])
def test_the_head_in_chunks_has_the_same_values_and_gradients(size):
    h = torch.randn(20, 16, generator=seeded(0), dtype=torch.float64).requires_grad_()
    weight = torch.randn(40, 16, generator=seeded(1), dtype=torch.float64).requires_grad_()
    targets = torch.randint(40, (20,), generator=seeded(2))
    plain = F.cross_entropy(h @ weight.T, targets, reduction='none')
    ours = models.chunked_cross_entropy(h, weight, targets, size)
    close(ours, plain, atol=1e-10)
    w = torch.rand(20, generator=seeded(3))
    for a, b in zip(*(torch.autograd.grad((w * ce).sum(), (h, weight)) for ce in (ours, plain))):
        close(a, b, atol=1e-10)


def test_no_more_than_2_to_the_28_logits_exist_at_a_time(monkeypatch):
    sizes = []
    monkeypatch.setattr(models, 'chunked_cross_entropy', lambda *args: sizes.append(args[-1]))
    with torch.device('meta'):
        for M in (256, 257):
            models.head_cross_entropy(torch.empty(M, 4), torch.empty(2 ** 20, 4), torch.empty(M).long())
    assert sizes == [256]


def test_nothing_to_predict_is_a_loss_of_zero():
    model = tiny_model()
    nothing = torch.zeros(0, dtype=torch.long)
    loss = model(IDS, positions=nothing, targets=nothing).sum()
    loss.backward()
    assert loss.item() == 0 and all(p.grad.isfinite().all() for p in model.parameters())


def test_autocast_stays_close_and_losses_stay_float32():
    model = tiny_model()
    exact = model(IDS, positions=POSITIONS, targets=IDS[POSITIONS])
    with torch.autocast('cpu', torch.bfloat16):
        narrow = model(IDS, positions=POSITIONS, targets=IDS[POSITIONS])
        assert model(IDS).dtype == torch.bfloat16
    assert narrow.dtype == torch.float32 and (narrow - exact).abs().max() < 0.1


def test_attention_in_bfloat16_is_rounded_only_at_the_end():
    q, k, v = (torch.randn(2, 4, 100, 16, generator=seeded(i)).bfloat16() for i in range(3))
    exact = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    assert torch.equal(models.attention(q, k, v), exact.bfloat16())


# ---------------------------------------------------------------------------------------- sizes and weights


def test_flops_per_token_of_llada_8b():
    """(Parameter counts are compared with the papers in test_train.py, by the config files.)"""
    model = models.empty_model(ModelConfig(126464, 4096, 32, 32, 32, 4096, 12288))
    assert math.isclose(model.flops_per_token(0.5005), 49.87e9, rel_tol=1e-3)
    assert model.flops_per_token(1.0) - model.flops_per_token(0.5) == 3 * 4096 * 126464


def test_initial_weights_depend_on_name_and_seed_alone():
    a, deeper, other = tiny_model(0), tiny_model(0, n_layer=3), tiny_model(1)
    assert torch.equal(a.blocks[1].ff.up.weight, deeper.blocks[1].ff.up.weight)
    assert not torch.equal(a.blocks[1].ff.up.weight, other.blocks[1].ff.up.weight)
    assert not torch.equal(a.blocks[0].ff.up.weight, a.blocks[1].ff.up.weight)


def test_initial_weights_follow_the_scheme():
    model = models.init_weights(Transformer(ModelConfig(1000, 16, 4, 4, 4, 256, 512)))

    def check(p, std):
        # a normal distribution that is cut off at 3 std has 0.9866 of it
        assert math.isclose(p.std().item() / 0.9866, std, rel_tol=0.01)

    for layer, block in enumerate(model.blocks, 1):
        check(block.attn.q.weight, 256 ** -0.5)
        check(block.attn.out.weight, (256 * 2 * layer) ** -0.5)
        check(block.ff.down.weight, (512 * 2 * layer) ** -0.5)
        assert (block.ff_norm.weight == 1).all()
    check(model.embed.weight, 256 ** -0.5)
    check(models.init_weights(model, emb_std=0.5).embed.weight, 0.5)


@pytest.mark.parametrize('change, message', [
    (dict(d_model=30), 'd_model / n_head must be an even number'), (dict(n_head=32), 'd_model / n_head')], ids=str)
def test_impossible_shapes(change, message):
    with pytest.raises(UserError, match=message):
        tiny_model(**change)
