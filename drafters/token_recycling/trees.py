"""Static tree templates: which ranks of successors are tried where.

A template is a list of paths, each a tuple of ranks; node i's parent is its path without the last rank.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from functools import cache

import numpy as np

from specdec.errors import UsageError

# The published 81-node tree "2.2.2": path of the parent -> number of children, always ranks 0..n-1.
_PUBLISHED = {
    "": 8,
    **dict(zip("01234567", (8, 4, 3, 2, 1, 1, 1, 1), strict=True)),
    **dict(zip(("00", "01", "02", "03", "04", "05", "06", "07"), (8, 3, 2, 1, 1, 1, 1, 1), strict=True)),
    **dict(zip(("10", "11", "20", "30", "40", "50"), (2, 1, 1, 1, 1, 1), strict=True)),
    **dict(zip(("000", "001", "002", "003", "004", "010", "020", "100", "200", "300"), (5, 2, *[1] * 8), strict=True)),
    **dict(zip(("0000", "0001", "0002", "0010", "0100", "1000"), (3, 1, 1, 1, 1, 1), strict=True)),
    **dict(zip(("00000", "00010"), (2, 1), strict=True)),
}

# Chance that the target's token is the table's successor of rank r, given that the parent was accepted. Measured with
# the embedded model on training text of all its sources (`make tables`); other models and texts will differ.
RANK_ACCEPTANCE = (0.581, 0.132, 0.055, 0.029, 0.017, 0.010, 0.010, 0.010)
COMMON_ACCEPTANCE = 0.033  # that it is a given one of the commonest tokens, below a token never met; also measured

PUBLISHED_SIZE = 81
CPU_SIZE = 8  # fastest of 5, 8, 12 and 16 nodes on two cores with the embedded model, on training prompts


@cache
def template(size: int, k: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """A template of ``size`` nodes, root included, as (parents int64 [N], ranks int64 [N]).

    81 is the published tree. Other sizes take the nodes most likely to be accepted, where a path of ranks
    (r1, r2, ...) has probability a[r1] * a[r2] * ...; ties go to the shallower node.
    """
    if size < 1:
        raise UsageError(f"tree size {size} must be at least 1 (the root alone)")
    return from_paths(_published() if size == PUBLISHED_SIZE and k >= 8 else _best_first(size, k))


def from_paths(paths: Sequence[tuple[int, ...]]) -> tuple[np.ndarray, np.ndarray]:
    """A template from paths of ranks, the root's () first, parents before children."""
    number = {path: i for i, path in enumerate(paths)}
    for i, path in enumerate(paths):
        if bool(path) is (i == 0) or number.get(path[:-1], i) > i:
            raise UsageError(f"paths[{i}] = {path}: the root () comes first, and every path after its parent")
    parents = np.array([-1] + [number[path[:-1]] for path in paths[1:]], dtype=np.int64)
    ranks = np.array([0] + [path[-1] for path in paths[1:]], dtype=np.int64)
    return parents, ranks


def _published() -> list[tuple[int, ...]]:
    paths = [""]
    for path in paths:  # grows while it is read: breadth first
        paths += [path + str(rank) for rank in range(_PUBLISHED.get(path, 0))]
    return [tuple(map(int, path)) for path in paths]


def _best_first(size: int, k: int) -> list[tuple[int, ...]]:
    paths: list[tuple[int, ...]] = []
    heap: list[tuple[float, int, tuple[int, ...]]] = [(-1.0, 0, ())]
    while len(paths) < size:
        chance, depth, path = heapq.heappop(heap)
        paths.append(path)
        for rank in range(min(k, len(RANK_ACCEPTANCE))):
            heapq.heappush(heap, (chance * RANK_ACCEPTANCE[rank], depth + 1, (*path, rank)))
    return sorted(paths, key=lambda path: (len(path), path))
