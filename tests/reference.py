"""The training step as the official guideline words it, plain: full logits, eager, autograd's own everything.

What train.py is measured against (bench_train.py), and a second opinion on its loss (test_train.py).
"""

import torch
import torch.nn.functional as F


def plain_loss(model, x0, mask_id, *, eps=1e-3, p_mask=None, masked=None):
    """Eq. 3 with every row's logits made and most thrown away: x0 (B, T) -> (). Noise is drawn unless it is given."""
    b, l = x0.shape                                                                     # noqa: E741
    if p_mask is None:
        p_mask = ((1 - eps) * torch.rand(b, device=x0.device) + eps)[:, None].repeat(1, l)
    if masked is None:
        masked = torch.rand((b, l), device=x0.device) < p_mask
    logits = model(torch.where(masked, mask_id, x0))
    token_loss = F.cross_entropy(logits[masked].float(), x0[masked], reduction='none') / p_mask[masked]
    return token_loss.sum() / (b * l)


def plain_step(model, optimizer, x0, mask_id, autocast):
    """One update: loss, backward, clipping, AdamW."""
    with autocast:
        loss = plain_loss(model, x0, mask_id)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def plain_attention(q, k, v, *, causal=False, hidden=None, cu_seqlens=None):
    """model.attention without its choice of kernels: torch's own, always."""
    mask = None if hidden is None else ~hidden
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)
