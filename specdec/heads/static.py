"""Static draft trees: one shape for all steps, cut from a head's acceptance table."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from specdec.templates import best_first
from specdec.tree import DraftTree, Topology

# Before a checkpoint has measured its own: top-1 and top-5 of Medusa's 7B heads (its published log), spread over ranks.
# The last row stands for all deeper ones.
_UNMEASURED = ((0.56, 0.11, 0.05, 0.03, 0.03), (0.32, 0.12, 0.06, 0.03, 0.03), (0.20, 0.11, 0.05, 0.03, 0.03))


def acceptance_table(measured: Sequence[Sequence[float]] | None, depths: int) -> list[Sequence[float]]:
    """[K][R], a checkpoint's own table, or a rough one for ``depths`` = K where it has none."""
    if measured is not None:
        return list(measured[:depths])
    return [_UNMEASURED[min(k, len(_UNMEASURED) - 1)] for k in range(depths)]


class StaticTree:
    """The nodes most likely to be accepted, filled with each depth's ranked candidates.

    Args:
        acceptance: see ``templates.best_first``; [] gives the root alone.
        size: most nodes, root included.

    Attributes:
        topology: shape, N nodes.
        ranks: int64 [N], which of its depth's candidates a node carries.
        prior: float32 [N], the chance that a node is accepted given its parent; 1 for the root.
        width: candidates needed per depth.
    """

    def __init__(self, acceptance: Sequence[Sequence[float]], size: int):
        parents, self.ranks = best_first(acceptance, size)
        self.topology = Topology(parents)
        self.width = int(self.ranks.max()) + 1
        nodes = zip(self.topology.depth[1:], self.ranks[1:], strict=True)
        self.prior = np.array([1.0, *(acceptance[depth - 1][rank] for depth, rank in nodes)], dtype=np.float32)

    def fill(self, root: int, ids: np.ndarray) -> DraftTree:
        """The tree of candidates int64 [K, width], likeliest first, below ``root``."""
        tokens = ids[self.topology.depth - 1, self.ranks]  # node 0 reads some entry, and is overwritten
        tokens[0] = root
        return DraftTree(self.topology, tokens, prior=self.prior)

    def last(self) -> np.ndarray:
        """float64 [N], the chance that a node is the last one accepted, if depths are independent."""
        chance = self.prior.astype(np.float64)
        for v in range(1, len(chance)):
            chance[v] *= chance[self.topology.above[v]]
        last = chance.copy()
        np.subtract.at(last, self.topology.above[1:], chance[1:])
        return last
