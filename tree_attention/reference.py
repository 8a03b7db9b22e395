"""Tree attention in plain torch: what the kernel is checked against. Slow, exact in float64."""

from __future__ import annotations

import torch

from specdec.tree_attention.step import Step


def tree_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    step: Step,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of a step's columns over each row's prefix and each other.

    Args:
        query: [B, Hq, C, D], any float dtype; everything is computed in it.
        key: [B, Hkv, >= base + S, D], same dtype. Columns a row does not see may hold anything, NaN included.
        value: [B, Hkv, >= base + S, E].
        step: who sees whom.
        scale: scores are ``scale * q . k``.
        softcap: then ``softcap * tanh(score / softcap)`` (Gemma 2, arXiv 2408.00118).
        sinks: [Hq], one more logit per head that joins the softmax and carries no value (gpt-oss).

    Returns:
        [B, C, Hq, E] contiguous, as transformers' attention functions return it.
    """
    rows, heads, columns, _ = query.shape
    width = step.base + step.seen
    visible = step.visible()[:, None]  # [B, 1, C, width]
    unseen = ~visible.any(dim=2)[..., None]  # [B, 1, width, 1]
    group = heads // key.shape[1]
    k = key[:, :, :width].masked_fill(unseen, 0).repeat_interleave(group, dim=1)
    v = value[:, :, :width].masked_fill(unseen, 0).repeat_interleave(group, dim=1)
    scores = scale * query @ k.transpose(2, 3)  # [B, Hq, C, width]
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        more = sinks.to(query.dtype)[None, :, None, None].expand(rows, heads, columns, 1)
        scores = torch.cat([scores, more], dim=3)
    weights = scores.softmax(dim=3)[..., :width]
    return (weights @ v).transpose(1, 2).contiguous()
