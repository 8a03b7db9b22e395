"""Draft trees out of paths and scores, in Numba.

A tree is ``parents`` int64 [N] (-1 for the root, node 0; parents precede children), ``tokens`` int64 [N] and ``prior``
float32 [N], the chance that a node is accepted once its parent is.
"""

from __future__ import annotations

import numpy as np

from specdec.jit import njit


@njit
def trie(root: int, paths: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Merge paths that begin alike.

    Args:
        root: token of node 0.
        paths: int64 [P, L], token paths below the root; a negative token ends a path early.
        weights: float64 [P], how much each path counts.

    Returns:
        parents int64 [M], tokens int64 [M], weight float64 [M]: the sum over the paths through a node.
    """
    most = 1 + paths.size
    parents = np.empty(most, dtype=np.int64)
    tokens = np.empty(most, dtype=np.int64)
    weight = np.zeros(most, dtype=np.float64)
    first = np.full(most, -1, dtype=np.int64)  # first child
    after = np.full(most, -1, dtype=np.int64)  # next sibling
    parents[0], tokens[0] = -1, root
    n = 1
    for p in range(paths.shape[0]):
        node = 0
        weight[0] += weights[p]
        for d in range(paths.shape[1]):
            token = paths[p, d]
            if token < 0:
                break
            child, last = first[node], -1
            while child >= 0 and tokens[child] != token:
                last = child
                child = after[child]
            if child < 0:
                child = n
                n += 1
                parents[child], tokens[child] = node, token
                if last < 0:
                    first[node] = child
                else:
                    after[last] = child
            weight[child] += weights[p]
            node = child
    return parents[:n], tokens[:n], weight[:n]


@njit
def select(
    parents: np.ndarray,
    tokens: np.ndarray,
    prior: np.ndarray,
    ends: np.ndarray,
    depth: int,
    budget: int,
    floor: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The nodes most likely to be accepted, likeliest first.

    A node's chance is the product of ``prior`` (clipped to 1) along its path, so parents come before children.

    Args:
        parents, tokens, prior: a tree.
        ends: int64 [e], tokens nothing follows.
        depth: deepest node allowed.
        budget: most nodes, root included.
        floor: least chance of a node.

    Returns:
        parents, tokens, prior of the tree that is left; the root always is.
    """
    n = len(parents)
    chance = np.zeros(n, dtype=np.float64)
    level = np.zeros(n, dtype=np.int64)
    chance[0] = 1.0
    for i in range(1, n):
        parent = parents[i]
        level[i] = level[parent] + 1
        over = level[i] > depth
        if parent > 0:
            for end in ends:
                if tokens[parent] == end:
                    over = True
        if not over:
            chance[i] = chance[parent] * min(float(prior[i]), 1.0)
    order = np.argsort(-chance, kind="mergesort")  # stable: on a tie the parent stays before its child
    number = np.full(n, -1, dtype=np.int64)
    out_parents = np.empty(min(n, budget), dtype=np.int64)
    out_tokens = np.empty(min(n, budget), dtype=np.int64)
    out_prior = np.empty(min(n, budget), dtype=np.float32)
    m = 0
    for i in order:
        if i > 0 and (m == budget or chance[i] <= 0.0 or chance[i] < floor):
            break
        number[i] = m
        out_parents[m] = -1 if i == 0 else number[parents[i]]
        out_tokens[m] = tokens[i]
        out_prior[m] = 1.0 if i == 0 else min(float(prior[i]), 1.0)
        m += 1
    return out_parents[:m], out_tokens[:m], out_prior[:m]
