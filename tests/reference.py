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


def plain_generate(model, x, mask_id, *, steps, block_length, gen_start):
    """Low-confidence remasking at temperature 0, plain: the logits of every position, at every step.

    x (1, T) with masks from gen_start on -> x without. What bench_sample.py measures diffusion.generate against.
    """
    blocks = range(gen_start, x.shape[1], block_length)
    each = steps // len(blocks)
    for start in blocks:
        todo = (x[:, start:start + block_length] == mask_id).sum().item()
        for step in range(each):
            masked = x == mask_id
            logits = model(x)
            logits[..., mask_id] = -torch.inf
            guess = logits.argmax(-1)
            sure = logits.softmax(-1).gather(-1, guess[..., None])[..., 0]
            sure[~masked] = -torch.inf
            sure[:, start + block_length:] = -torch.inf
            n = todo // each + (step < todo % each)
            best = sure[0].topk(n).indices
            x[0, best] = guess[0, best]
    return x
