"""Static draft trees by rank: which of a depth's ranked candidates are tried where.

A template is (parents int64 [N], ranks int64 [N]): node i carries the candidate of rank ``ranks[i]`` for its depth, or
of its parent's list, as the method has it. Node 0 is the root, its rank means nothing.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

from specdec.errors import UsageError

Paths = list[tuple[int, ...]]
Template = tuple[np.ndarray, np.ndarray]


def from_paths(paths: Sequence[tuple[int, ...]]) -> Template:
    """A template from paths of ranks, the root's () first, parents before children."""
    number = {path: i for i, path in enumerate(paths)}
    for i, path in enumerate(paths):
        if bool(path) is (i == 0) or number.get(path[:-1], i) > i:
            raise UsageError(f"paths[{i}] = {path}: the root () comes first, and every path after its parent")
    parents = np.array([-1] + [number[path[:-1]] for path in paths[1:]], dtype=np.int64)
    ranks = np.array([0] + [path[-1] for path in paths[1:]], dtype=np.int64)
    return parents, ranks


def best_first(acceptance: Sequence[Sequence[float]], size: int) -> Template:
    """The ``size`` nodes most likely to be accepted, root included (Medusa, arXiv 2401.10774, section 2.3.3).

    Args:
        acceptance: [K][R], chance that the target's token at depth k + 1 is the candidate of rank r, given that the
            parent was accepted. A path of ranks (r1, r2, ...) has the product; ties go to the shallower node.
        size: most nodes; there are fewer when K and R are used up.
    """
    if size < 1:
        raise UsageError(f"tree size {size} must be at least 1 (the root alone)")
    paths: Paths = []
    heap: list[tuple[float, int, tuple[int, ...]]] = [(-1.0, 0, ())]
    while heap and len(paths) < size:
        chance, depth, path = heapq.heappop(heap)
        paths.append(path)
        if depth < len(acceptance):
            for rank, share in enumerate(acceptance[depth]):
                if share > 0:
                    heapq.heappush(heap, (chance * share, depth + 1, (*path, rank)))
    return from_paths(sorted(paths, key=lambda path: (len(path), path)))


def chances(acceptance: Sequence[Sequence[float]], template: Template) -> np.ndarray:
    """float64 [N], how likely each node is accepted, if ``acceptance`` holds and depths are independent.

    Their sum is what a step yields on average, bonus included.
    """
    parents, ranks = template
    chance, depth = np.ones(len(parents)), np.zeros(len(parents), dtype=int)
    for i in range(1, len(parents)):
        depth[i] = depth[parents[i]] + 1
        chance[i] = chance[parents[i]] * acceptance[depth[i] - 1][ranks[i]]
    return chance
