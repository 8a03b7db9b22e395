"""Medusa: heads on the last hidden state, their guesses laid on a static tree (Cai et al., arXiv 2401.10774)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from specdec.drafters.medusa.module import Medusa as MedusaHeads
from specdec.heads import Head, HeadDrafter
from specdec.state import DecodeState
from specdec.target import Target
from specdec.templates import Template, best_first
from specdec.tree import DraftTree, Proposal, Topology

# before a checkpoint has measured its own: the reference log's 7B heads, top-1 and top-5, spread over the ranks
_ACCEPTANCE = ((0.56, 0.11, 0.05, 0.03, 0.03), (0.32, 0.12, 0.06, 0.03, 0.03), (0.20, 0.11, 0.05, 0.03, 0.03))


class Medusa(HeadDrafter[MedusaHeads]):
    """Drafts the top candidates of K heads, which all read the hidden state of the last token in the cache.

    The tree is cut from the checkpoint's own acceptance table for the size asked for.

    Args:
        checkpoint, size: see ``HeadDrafter``.
        chain: the likeliest candidate of each head alone, as batched engines run it.
    """

    name = "medusa"
    summary = "heads on the target's last hidden state, a static tree of their candidates"
    head_class = MedusaHeads

    def __init__(self, checkpoint: Head | str | Path, size: int | None = None, chain: bool = False):
        super().__init__(checkpoint, size)
        self.chain = chain

    def bind(self, target: Target) -> None:
        super().bind(target)
        measured = self.head.config.acceptance or _ACCEPTANCE
        self._acceptance = [row[:1] if self.chain else row for row in measured][: self.head.depths]
        parents, self._ranks = self._template(self.size)
        self._topology = Topology(parents)
        self._width = max(map(len, self._acceptance))
        table = np.zeros((len(self._acceptance) + 1, self._width), dtype=np.float32)
        for k, row in enumerate(self._acceptance):
            table[k + 1, : len(row)] = row
        self._prior = table[self._topology.depth, self._ranks]
        self._prior[0] = 1.0

    def _template(self, size: int) -> Template:
        return best_first(self._acceptance, size)

    def candidates(self, h: torch.Tensor) -> torch.Tensor:
        """int64 [B, K, R], every head's likeliest tokens, likeliest first, from h [B, d]."""
        depths = range(self._topology.max_depth)
        return torch.stack(
            [self.head.output(k)(self.head.state(k, h)).topk(self._width, dim=-1).indices for k in depths], dim=1
        )

    def propose(self, state: DecodeState) -> list[Proposal | None]:
        roots = [int(row.tokens[-1]) for row in state.rows]
        h = self.hidden(state)
        if h is None or not self._topology.max_depth:
            return [Proposal(DraftTree.root(root)) for root in roots]
        ids = self.candidates(h).cpu().numpy()  # [B, K, R]
        depth, ranks = self._topology.depth, self._ranks
        proposals: list[Proposal | None] = []
        for root, row in zip(roots, ids, strict=True):
            tokens = row[depth - 1, ranks]  # node 0 reads some entry, and is overwritten
            tokens[0] = root
            proposals.append(Proposal(DraftTree(self._topology, tokens, prior=self._prior)))
        return proposals
