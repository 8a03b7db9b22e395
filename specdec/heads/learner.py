"""A head as something to be trained: a module from texts to a loss."""

from __future__ import annotations

import torch
from torch import nn

from specdec.errors import UsageError
from specdec.heads.checkpoint import Head
from specdec.heads.loss import HeadLoss, head_loss
from specdec.target import Target

OBJECTIVES = ("teacher", "labels")


class Learner(nn.Module):
    """What an optimiser sees: the head's parameters, and no other.

    Args:
        head: float32, will be attached to ``target``.
        target: frozen.
        objective: "teacher" or "labels"; None: the method's own.
        decay: weight of a depth over the one before; None: the method's own.

    Raises:
        UsageError: unknown objective, or a decay outside (0, 1].
        CompatibilityError: see ``Head.attach``.
    """

    def __init__(self, head: Head, target: Target, objective: str | None = None, decay: float | None = None):
        super().__init__()
        self.objective = head.objective if objective is None else objective
        self.decay = head.decay if decay is None else decay
        if self.objective not in OBJECTIVES:
            raise UsageError(f"objective={self.objective!r} must be one of {', '.join(OBJECTIVES)}")
        if not 0 < self.decay <= 1:
            raise UsageError(f"decay={self.decay} must be above 0 and at most 1")
        head.attach(target)
        self.head = head
        self._target = [target]  # in a list, so that its weights are not this module's
        target.model.requires_grad_(False)

    @property
    def target(self) -> Target:
        return self._target[0]

    def forward(self, input_ids: torch.Tensor, loss_mask: torch.Tensor) -> HeadLoss:
        """Sums over the learned positions of int64 and bool [B, S]."""
        final, drafts = self.head.along(self.target, input_ids, loss_mask)
        return head_loss(drafts, final, self.head.shared.output, input_ids, loss_mask, self.objective, self.decay)
