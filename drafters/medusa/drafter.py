"""Medusa: heads on the last hidden state, their guesses laid on a static tree (Cai et al., arXiv 2401.10774)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from specdec.drafters.medusa.module import Medusa as MedusaHeads
from specdec.heads import Head, HeadDrafter
from specdec.heads.static import StaticTree, acceptance_table
from specdec.state import DecodeState
from specdec.target import Target
from specdec.tree import DraftTree, Proposal


class Medusa(HeadDrafter[MedusaHeads]):
    """Drafts the top candidates of K heads, which all read the hidden state of the last token in the cache.

    The tree is cut from the checkpoint's own acceptance table for the size asked for.

    Args:
        checkpoint, size: see ``HeadDrafter``.
        chain: the likeliest candidate of each head alone, as batched engines run it.
        acceptance: what the tree is cut from in place of the checkpoint's own table, see ``templates.best_first``.
    """

    name = "medusa"
    summary = "heads on the target's last hidden state, a static tree of their candidates"
    head_class = MedusaHeads

    def __init__(
        self,
        checkpoint: Head | str | Path,
        size: int | None = None,
        chain: bool = False,
        acceptance: Sequence[Sequence[float]] | None = None,
    ):
        super().__init__(checkpoint, size)
        self.chain, self.acceptance = chain, acceptance

    def bind(self, target: Target) -> None:
        super().bind(target)
        ranks = 1 if self.chain else target.vocab_size
        measured = self.acceptance or self.head.config.acceptance
        acceptance = [row[:ranks] for row in acceptance_table(measured, self.head.depths)]
        self._tree = StaticTree(acceptance, self.size)

    def candidates(self, h: torch.Tensor) -> torch.Tensor:
        """int64 [B, K, R], every head's likeliest tokens, likeliest first, from h [B, d]."""
        depths = range(self._tree.topology.max_depth)
        return torch.stack(
            [self.head.output(k)(self.head.state(k, h)).topk(self._tree.width, dim=-1).indices for k in depths], dim=1
        )

    def propose(self, state: DecodeState) -> list[Proposal | None]:
        roots = [int(row.tokens[-1]) for row in state.rows]
        h = self.hidden(state)
        if h is None or len(self._tree.topology) == 1:
            return [Proposal(DraftTree.root(root)) for root in roots]
        ids = self.candidates(h).cpu().numpy()  # [B, K, R]
        return [Proposal(self._tree.fill(root, candidates)) for root, candidates in zip(roots, ids, strict=True)]
