"""The adjacency matrix: for every token the k successors the target last predicted after it.

A token never met has no row yet. The published code drafts k copies of token 0 below it, and gains by that, since the
rows of whatever the tree holds are learned. Here the k commonest tokens of the text stand in below such a root: they
teach as much, and are sometimes right.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from specdec.jit import njit


class AdjacencyTable:
    """A [V, k] of successor ids with a mark for rows never written.

    Attributes:
        successors: int32 [V, k], most likely first.
        seen: bool [V].
        counts: int64 [V], how often a token was committed.
        common: int64 [k], the tokens of the largest counts, largest first; -1 where there are fewer.
    """

    def __init__(self, vocab_size: int, k: int):
        self.successors = np.zeros((vocab_size, k), dtype=np.int32)
        self.seen = np.zeros(vocab_size, dtype=np.bool_)
        self.counts = np.zeros(vocab_size, dtype=np.int64)
        self.common = np.full(k, -1, dtype=np.int64)

    @property
    def filled(self) -> bool:
        return bool(self.seen.any())

    def arrays(self) -> dict[str, np.ndarray]:
        return {"successors": self.successors, "seen": self.seen, "counts": self.counts}

    def facts(self) -> dict[str, Any]:
        return {"k": self.successors.shape[1]}

    def fill(self, arrays: dict[str, np.ndarray], facts: dict[str, Any]) -> None:
        successors, seen, counts = arrays["successors"], arrays["seen"], arrays["counts"]
        if facts["k"] != self.successors.shape[1]:
            raise ValueError(f"it holds k={facts['k']} successors per token, this drafter k={self.successors.shape[1]}")
        for name, array in self.arrays().items():
            if arrays[name].shape != array.shape or arrays[name].dtype != array.dtype:
                raise ValueError(
                    f"{name} is {arrays[name].dtype} {arrays[name].shape}, not {array.dtype} {array.shape}"
                )
        if successors.min() < 0 or successors.max() >= len(seen):
            raise ValueError("a successor is no token id")
        self.successors[:], self.seen[:], self.counts[:] = successors, seen, counts
        self._rank()

    def merge(self, other: AdjacencyTable) -> None:
        """Rows never written here are taken from the other table; ours are newer and stay."""
        new = other.seen & ~self.seen
        self.successors[new] = other.successors[new]
        self.seen |= new
        self.counts += other.counts
        self._rank()

    def _rank(self) -> None:
        best = np.argsort(-self.counts, kind="stable")[: len(self.common)]
        self.common[:] = np.where(self.counts[best] > 0, best, -1)

    def count(self, tokens: np.ndarray) -> None:
        """Committed tokens, int64 [n]."""
        _count(self.counts, self.common, tokens)

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
            parents int64 [M], tokens int64 [M] and ranks int64 [M] of the nodes that exist, M <= N. Below a root never
            met stand the commonest tokens, with rank k; below other rows never written, or an end token, nothing.
        """
        return _fill_tree(self.successors, self.seen, self.common, root, parents, ranks, ends)


@njit
def _update(successors: np.ndarray, seen: np.ndarray, tokens: np.ndarray, top: np.ndarray) -> None:
    for i in range(len(tokens)):
        token = tokens[i]
        seen[token] = True
        for j in range(successors.shape[1]):
            successors[token, j] = top[i, j]


@njit
def _count(counts: np.ndarray, common: np.ndarray, tokens: np.ndarray) -> None:
    for token in tokens:
        counts[token] += 1
        at = len(common) - 1  # its place in the ranking, or the last one
        for j in range(len(common)):
            if common[j] == token:
                at = j
        if common[at] != token:
            if common[at] >= 0 and counts[common[at]] >= counts[token]:
                continue
            common[at] = token
        while at > 0 and (common[at - 1] < 0 or counts[common[at - 1]] < counts[token]):
            common[at - 1], common[at] = token, common[at - 1]
            at -= 1


@njit
def _fill_tree(
    successors: np.ndarray,
    seen: np.ndarray,
    common: np.ndarray,
    root: int,
    parents: np.ndarray,
    ranks: np.ndarray,
    ends: np.ndarray,
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
        if parent < 0:
            continue
        token, rank = -1, ranks[i]
        if seen[tokens[parent]]:
            token = successors[tokens[parent], rank]
        elif parent == 0:
            token, rank = common[rank], len(common)
        if token < 0:
            continue
        over = False
        for end in ends:
            if tokens[parent] == end:
                over = True
        if over:
            continue
        number[i], out_parents[m], tokens[m], out_ranks[m] = m, parent, token, rank
        m += 1
    return out_parents[:m], tokens[:m], out_ranks[:m]
