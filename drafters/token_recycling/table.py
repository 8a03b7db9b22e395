"""The adjacency matrix: for every token the k successors the target last predicted after it."""

from __future__ import annotations

from typing import Any

import numpy as np

from specdec.jit import njit


class AdjacencyTable:
    """A [V, k] of successor ids with a mark for rows never written.

    Attributes:
        successors: int32 [V, k], most likely first.
        seen: bool [V].
    """

    def __init__(self, vocab_size: int, k: int):
        self.successors = np.zeros((vocab_size, k), dtype=np.int32)
        self.seen = np.zeros(vocab_size, dtype=np.bool_)

    @property
    def filled(self) -> bool:
        return bool(self.seen.any())

    def arrays(self) -> dict[str, np.ndarray]:
        return {"successors": self.successors, "seen": self.seen}

    def facts(self) -> dict[str, Any]:
        return {"k": self.successors.shape[1]}

    def fill(self, arrays: dict[str, np.ndarray], facts: dict[str, Any]) -> None:
        successors, seen = arrays["successors"], arrays["seen"]
        if facts["k"] != self.successors.shape[1]:
            raise ValueError(f"it holds k={facts['k']} successors per token, this drafter k={self.successors.shape[1]}")
        if successors.shape != self.successors.shape or seen.shape != self.seen.shape:
            raise ValueError(f"successors has shape {successors.shape}, not {self.successors.shape}")
        if successors.min() < 0 or successors.max() >= len(seen):
            raise ValueError("a successor is no token id")
        self.successors[:], self.seen[:] = successors, seen

    def merge(self, other: AdjacencyTable) -> None:
        """Rows never written here are taken from the other table; ours are newer and stay."""
        new = other.seen & ~self.seen
        self.successors[new] = other.successors[new]
        self.seen |= new

    def update(self, tokens: np.ndarray, top: np.ndarray) -> None:
        """Overwrite the rows of ``tokens`` int64 [n] with ``top`` int [n, k]; a later duplicate wins."""
        _update(self.successors, self.seen, tokens, top)

    def fill_tree(
        self, root: int, parents: np.ndarray, ranks: np.ndarray, ends: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Read a tree out of the table.

        Args:
            root: token of node 0.
            parents, ranks: int64 [N], the template.
            ends: int64 [e], tokens nothing follows.

        Returns:
            parents int64 [M], tokens int64 [M] and ranks int64 [M] of the nodes that exist, M <= N: below a row never
            written, or below an end token, there is nothing.
        """
        return _fill_tree(self.successors, self.seen, root, parents, ranks, ends)


@njit
def _update(successors: np.ndarray, seen: np.ndarray, tokens: np.ndarray, top: np.ndarray) -> None:
    for i in range(len(tokens)):
        token = tokens[i]
        seen[token] = True
        for j in range(successors.shape[1]):
            successors[token, j] = top[i, j]


@njit
def _fill_tree(
    successors: np.ndarray, seen: np.ndarray, root: int, parents: np.ndarray, ranks: np.ndarray, ends: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    n = len(parents)
    number = np.full(n, -1, dtype=np.int64)  # template node -> node of this tree
    out_parents = np.empty(n, dtype=np.int64)
    tokens = np.empty(n, dtype=np.int64)
    out_ranks = np.empty(n, dtype=np.int64)
    number[0], out_parents[0], tokens[0], out_ranks[0] = 0, -1, root, 0
    m = 1
    for i in range(1, n):
        parent = number[parents[i]]
        if parent < 0 or not seen[tokens[parent]]:
            continue
        over = False
        for end in ends:
            if tokens[parent] == end:
                over = True
        if over:
            continue
        number[i], out_parents[m], out_ranks[m] = m, parent, ranks[i]
        tokens[m] = successors[tokens[parent], ranks[i]]
        m += 1
    return out_parents[:m], tokens[:m], out_ranks[:m]
