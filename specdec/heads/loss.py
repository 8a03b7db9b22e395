"""What heads are trained on: their distributions against the target's, all depths at once, a few rows at a time.

Shapes: B rows, S positions, K depths, n positions looked at together, V vocabulary, V' draft vocabulary, d hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specdec.heads.shared import Drafts, Output

ROWS = 128  # positions whose logits are alive at once: [128, V] and not [B * S, V]


@dataclass(frozen=True)
class HeadLoss:
    """Sums over positions, per depth.

    Attributes:
        total: the weighted sum of all, differentiable.
        loss: float [K], nats.
        hits: [K], positions where the head's likeliest token is the target's own.
        count: [K], positions looked at.
    """

    total: Tensor
    loss: Tensor
    hits: Tensor
    count: Tensor


def head_loss(
    drafts: Drafts,
    final: Tensor,
    output: Output,
    ids: Tensor,
    mask: Tensor,
    objective: str,
    decay: float,
) -> HeadLoss:
    """Cross-entropy of every depth, weighted by decay^k, plus the drafts' auxiliary loss.

    Depth k at position i is compared with the target at m = i + k + 1, where m + 1 is a token to be learned. A head of
    a reduced vocabulary imitates the target renormalised over it, at positions where the target's likeliest token is in
    it; the others count as misses (EAGLE-3).

    Args:
        drafts: see ``Drafts``.
        final: [B, S, d], the target's final hidden states.
        output: the target's own.
        ids, mask: int64 and bool [B, S].
        objective: imitate the target's distribution, or the text.
        decay: lambda.
    """
    learned = mask[:, 1:].nonzero()  # (row, m) pairs
    results = []
    for k, (state, own) in enumerate(zip(drafts.states, drafts.outputs, strict=True)):
        results.append((state, own, decay**k, k + 1))
    inputs = [t for state, own, _, _ in results for t in (state, own.weight, own.bias)]
    total, loss, hits, count = _Distil.apply(results, final, output, ids, learned, drafts.where, objective, *inputs)
    if drafts.auxiliary is not None:
        total = total + drafts.auxiliary
    return HeadLoss(total, loss, hits, count)


class _Distil(torch.autograd.Function):
    """Sum of cross-entropies with all gradients made in the forward pass, so that no logits outlive their chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        depths: Sequence[tuple[Tensor, Output, float, int]],
        final: Tensor,
        output: Output,
        ids: Tensor,
        learned: Tensor,
        where: Tensor | None,
        objective: str,
        *inputs: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        K = len(depths)
        unique = {id(t): torch.zeros_like(t) for t in inputs if t is not None and t.requires_grad}
        grads = [unique.get(id(t)) for t in inputs]  # depths that share a matrix add into one gradient
        loss, hits, count = (final.new_zeros(K, dtype=torch.float32) for _ in range(3))
        vocabularies = {id(own.ids): _places(own.ids, output.weight.shape[0]) for _, own, _, _ in depths}
        for chunk in learned.split(ROWS):
            b, m = chunk.unbind(1)
            teacher = output(final[b, m]).float()  # [n, V]
            best = teacher.argmax(-1)
            p = teacher.softmax(-1)
            for k, (state, own, weight, shift) in enumerate(depths):
                there = m >= shift  # the head stands at i = m - shift
                if where is not None:
                    there = there & where[b, (m - shift).clamp_min(0)]
                rows = slice(None) if bool(there.all()) else there
                bi, mi = b[rows], m[rows]
                if len(bi) == 0:
                    continue
                x = state[bi, mi - shift]  # [n, d']
                z = own(x).float()  # [n, V']
                lse = z.logsumexp(-1, keepdim=True)
                place = vocabularies[id(own.ids)]
                if objective == "labels":
                    label = ids[bi, mi + 1] if place is None else place[ids[bi, mi + 1]]
                    valid = label >= 0
                    q = torch.nn.functional.one_hot(label.clamp_min(0), z.shape[-1]).to(z.dtype)
                else:
                    q = p[rows] if own.ids is None else teacher[rows][:, own.ids].softmax(-1)
                    valid = bi >= 0 if place is None else place[best[rows]] >= 0
                guess = z.argmax(-1) if own.ids is None else own.ids[z.argmax(-1)]
                loss[k] += ((lse[:, 0] - torch.linalg.vecdot(q, z)) * valid).sum()
                hits[k] += (guess == best[rows]).sum()
                count[k] += len(bi)
                slope = None if own.cap is None else 1 - (z / own.cap) ** 2
                dz = z.sub_(lse).exp_().sub_(q).mul_(weight * own.scale * valid[:, None])  # d total / d logits
                dz = (dz if slope is None else dz * slope).to(own.weight.dtype)
                dx, dw, db = grads[3 * k : 3 * k + 3]
                if dx is not None:
                    dx[bi, mi - shift] = (dz @ own.weight).to(dx.dtype)
                if dw is not None:
                    dw.addmm_(dz.T, x.to(dz.dtype))
                if db is not None:
                    db += dz.sum(0)
        ctx.save_for_backward(*[unique.pop(id(t), None) for t in inputs])  # each gradient once
        weights = loss.new_tensor([weight for _, _, weight, _ in depths])
        ctx.mark_non_differentiable(loss, hits, count)
        return (loss * weights).sum(), loss, hits, count

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (None if g is None else g * grads[0] for g in ctx.saved_tensors)
        return (None, None, None, None, None, None, None, *scaled)


def _places(ids: Tensor | None, vocab_size: int) -> Tensor | None:
    """int64 [V], where each token stands in the draft vocabulary, -1 outside; None when it is the whole."""
    if ids is None:
        return None
    place = torch.full((vocab_size,), -1, dtype=torch.long, device=ids.device)
    place[ids] = torch.arange(len(ids), device=ids.device)
    return place
