"""Growing a draft tree by the drafter's own confidence (EAGLE-2, arXiv 2406.16858).

Level by level the ``width`` best nodes are expanded; of all candidates the likeliest are kept. Everything stays on the
device until ``trees``, which reads it once.

Shapes: B rows, W frontier width, V' draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from specdec.tree import DraftTree, Topology


class Growth:
    """A tree per row, being grown.

    Args:
        logits: [B, V'], after the root.
        width: nodes expanded per level, and children asked of each.
        ids: int64 [V'], target tokens of the draft vocabulary; None: the same.

    Attributes:
        tokens: int64 [B, W], target tokens of the frontier.
        parent: int64 [B, W], place of each frontier node's parent in the frontier before (0 for the root).
        visible: bool [B, W, levels * W], which of the frontiers' nodes so far, oldest first, each frontier node sees:
            ancestors and itself.
    """

    def __init__(self, logits: Tensor, width: int, ids: Tensor | None = None):
        self.width, self._ids = min(width, logits.shape[-1]), ids
        score, token = self._best(logits[:, None])  # [B, 1, W]
        rows = score.shape[0]
        self._scores, self._tokens = [score[:, 0]], [token[:, 0]]  # per level [B, M]
        self._parents = [torch.full_like(token[:, 0], -1)]  # candidate's number of its parent, -1 the root
        self._priors = [score[:, 0].exp()]
        self._count = self.width  # candidates so far
        self._number = torch.arange(self.width, device=logits.device).expand(rows, -1)  # of frontier nodes
        self._frontier = score[:, 0]
        self.tokens = token[:, 0]
        self.parent = torch.zeros_like(self.tokens)
        self.visible = torch.eye(self.width, dtype=torch.bool, device=logits.device).expand(rows, -1, -1)

    def _best(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The likeliest children [B, n, W] and their log probabilities, in float32: half precision makes ties."""
        score, token = logits.float().log_softmax(-1).topk(self.width, dim=-1)
        return score, token if self._ids is None else self._ids[token]

    def extend(self, logits: Tensor) -> None:
        """A level deeper: ``logits`` [B, W, V'] after the frontier's nodes become the next frontier."""
        W = self.width
        score, token = self._best(logits)  # [B, W, W]
        total = (self._frontier[..., None] + score).flatten(1)  # [B, W * W]
        parent = self._number[..., None].expand(-1, -1, W).flatten(1)
        self._scores.append(total)
        self._tokens.append(token.flatten(1))
        self._parents.append(parent)
        self._priors.append(score.exp().flatten(1))
        self._frontier, place = total.topk(W, dim=-1)  # [B, W]
        self.tokens = self._tokens[-1].gather(1, place)
        self.parent = place // W
        self._number = self._count + place
        self._count += W * W
        before = self.visible.gather(1, self.parent[..., None].expand(-1, -1, self.visible.shape[-1]))
        own = torch.eye(W, dtype=torch.bool, device=before.device).expand(before.shape[0], -1, -1)
        self.visible = torch.cat([before, own], dim=-1)

    def trees(self, roots: Sequence[int], size: int) -> list[DraftTree]:
        """Per row the ``size`` likeliest nodes, root included, closed under parents."""
        scores = torch.cat(self._scores, 1)
        # stable: of equal scores the earlier, so shallower, candidate wins, and parents come before their children
        best = scores.sort(dim=-1, descending=True, stable=True).indices[:, : size - 1].sort(dim=-1).values
        picked = torch.stack([best] + [torch.cat(x, 1).gather(1, best) for x in (self._tokens, self._parents)])
        number, tokens, parents = picked.cpu().numpy()  # [B, size - 1] each
        prior = torch.cat(self._priors, 1).gather(1, best).cpu().numpy()
        made = []
        for b, root in enumerate(roots):
            # a candidate's place among those kept; node 0 is the root
            above = np.searchsorted(number[b], parents[b]) + 1
            above[parents[b] < 0] = 0
            made.append(
                DraftTree(
                    Topology(np.concatenate([[-1], above])),
                    np.concatenate([[root], tokens[b]]),
                    prior=np.concatenate([[1.0], prior[b]]).astype(np.float32),
                )
            )
        return made
