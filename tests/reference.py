"""Second opinions, as plain as can be: the paper's formulas that no script needs, and loops without any trick.

The tests compare nanoLLaDA with them, and the benchmarks measure how much faster it is.
"""

import torch
import torch.nn.functional as F

# ----------------------------------------------------------------------------------------------------------
# Two more ways to compute log p(x0), for models that are called as in diffusion.py


@torch.no_grad()
def log_likelihood_bernoulli(model, x0, maskable, mask_id, *, mc_num=128, generator=None):
    """Estimate the bound on log p in the form of Eq. 5: x0 (T,) int64, maskable (T,) bool -> float.

    t is uniform, each token is hidden with probability t, and the weight is 1/t. The mean is that of Eq. 6
    (diffusion.log_likelihood), but the variance is far larger: where Eq. 6 fixes the number of hidden tokens and its
    weight fits that number, here a small t may hide many tokens, and all of them get the weight 1/t.
    """
    t = 1 - torch.rand(mc_num, generator=generator)                                     # (N,) in (0, 1]
    hide = torch.rand(mc_num, len(x0), generator=generator) < t[:, None]
    masked = maskable & hide.to(x0.device)                                              # (N, T)

    logits = model(torch.where(masked, mask_id, x0))                                    # (N, T, V)
    logp = logits.log_softmax(-1).gather(-1, x0.expand_as(masked)[..., None])[..., 0]   # (N, T)
    per_mask = torch.where(masked, logp, 0.).sum(1)                                     # (N,)
    return float((per_mask.cpu() / t).mean())                                           # Eq. 5


@torch.no_grad()
def log_likelihood_ordered(model, x0, maskable, mask_id, order=None):
    """Return log p by the chain rule along one order: x0 (T,) int64, maskable (T,) bool -> float.

    order: the maskable positions in the order in which they are revealed (default: from left to right). Eq. 15 is the
    mean over all orders. If the model is a consistent distribution, then every order gives the same number.
    """
    hidden = maskable.clone()
    total = 0.
    for position in maskable.nonzero()[:, 0] if order is None else order:
        xt = torch.where(hidden, mask_id, x0)
        logp = model(xt[None])[0, position].log_softmax(-1)                             # (V,)
        total += logp[x0[position]].item()                                              # Eq. 15
        hidden[position] = False
    return total


# ----------------------------------------------------------------------------------------------------------
# The training step as the official guideline words it: logits of every position, and nothing fused


def plain_loss(model, x0, mask_id, *, eps=1e-3, p_mask=None, masked=None):
    """Return the loss of Eq. 3, x0 (B, T) int64 -> (). The noise is drawn unless p_mask, masked (B, T) are given."""
    b, l = x0.shape                                                                     # noqa: E741
    if p_mask is None:
        t = torch.rand(b, device=x0.device)
        p_mask = ((1 - eps) * t + eps)[:, None].repeat(1, l)
    if masked is None:
        masked = torch.rand((b, l), device=x0.device) < p_mask

    # all logits are computed, and those of the visible tokens are thrown away
    logits = model(torch.where(masked, mask_id, x0))
    token_loss = F.cross_entropy(logits[masked].float(), x0[masked], reduction='none') / p_mask[masked]
    return token_loss.sum() / (b * l)


def plain_step(model, optimizer, x0, mask_id, autocast):
    """Make one update (loss, backward, clipping, step of the optimizer) -> loss, a float."""
    with autocast:
        loss = plain_loss(model, x0, mask_id)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def plain_attention(q, k, v, *, attn_mask=None, causal=False, cu_seqlens=None):
    """Attend like model.attention, but always by torch's own kernel in the dtype of q."""
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, is_causal=causal, enable_gqa=grouped)


def plain_generate(model, x, mask_id, *, steps, block_length, gen_start):
    """Fill the masks of x (1, T) from gen_start on, by low-confidence remasking at temperature 0 -> x (1, T).

    Block by block from left to right, with the logits of every position at every step.
    """
    x = x.clone()
    blocks = range(gen_start, x.shape[1], block_length)
    steps_per_block = steps // len(blocks)
    for start in blocks:
        end = start + block_length
        n_masked = (x[:, start:end] == mask_id).sum().item()
        for step in range(steps_per_block):
            # 1. guess every token, but never [MASK] itself
            logits = model(x)
            logits[..., mask_id] = -torch.inf
            confidence, guess = logits.softmax(-1).max(-1)                              # (1, T), (1, T)

            # 2. only masks of this block may be written, and the remainder of the division comes first
            confidence[x != mask_id] = -torch.inf
            confidence[:, end:] = -torch.inf
            n = n_masked // steps_per_block + (step < n_masked % steps_per_block)
            best = confidence[0].topk(n).indices
            x[0, best] = guess[0, best]
    return x
