"""How likely a node is to be accepted, given which members propose it and how sure each is.

Two stages, both learned online from every node whose fate is known. First each member is calibrated: its priors fall
into bins, and a bin's acceptance rate is counted. Then the members that propose a node are mixed in the logistic domain
(the gated mixing of the PAQ compressors): p = sigmoid(sum_m w_m logit(p_m)), with a weight vector per set of members.

Shapes: M members, U nodes of the union of their trees.
"""

from __future__ import annotations

import numpy as np

from specdec.jit import njit

BINS = 8  # a prior p falls into bin floor(-2 log2 p), the last one open
DEPTHS = 3  # depth 1, 2, and beyond: a copy that has held once tends to hold
TRUST = 6.0  # a fresh bin weighs as much as so many observations of its prior
MEMORY = 400.0  # observations a bin remembers, so that it follows a text that changes
RATE = 0.02  # step of the mixing weights
LIMIT = 0.98  # probabilities stay within [1 - LIMIT, LIMIT] before their logit is taken


class Mixture:
    """What has been learned about M members.

    Attributes:
        accepted, tried: float64 [M, DEPTHS, BINS].
        weights: float64 [2^M, M], per set of members.
    """

    def __init__(self, members: int):
        self.accepted = np.zeros((members, DEPTHS, BINS))
        self.tried = np.zeros((members, DEPTHS, BINS))
        self.weights = np.zeros((2**members, members))
        for group in range(1, 2**members):
            inside = [m for m in range(members) if group >> m & 1]
            # members that agree say more than their average, though not as much as independent witnesses would
            self.weights[group, inside] = len(inside) ** -0.5

    def priors(self, parents: np.ndarray, raw: np.ndarray) -> np.ndarray:
        """float32 [U], the estimated chance of every node of a union; ``raw`` float32 [U, M], negative: absent."""
        return _priors(self.accepted, self.tried, self.weights, parents, raw)

    def learn(self, parents: np.ndarray, tokens: np.ndarray, raw: np.ndarray, emitted: np.ndarray) -> None:
        """Learn from what the target emitted, int64 [e]: the fate of every child of the path it took is known."""
        _learn(self.accepted, self.tried, self.weights, parents, tokens, raw, emitted)


def union(trees: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Merge trees that share their root.

    Args:
        trees: per member parents int64 [N], tokens int64 [N] and prior float32 [N].

    Returns:
        parents int64 [U], tokens int64 [U], raw float32 [U, M]: each member's prior of a node, -1 where it has none.
    """
    sizes = np.array([len(tokens) for _, tokens, _ in trees])
    parents, tokens, prior = (np.concatenate([tree[i] for tree in trees]) for i in range(3))
    return _union(sizes, parents, tokens, prior)


@njit
def _union(
    sizes: np.ndarray, parents: np.ndarray, tokens: np.ndarray, prior: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    most = len(tokens)
    out_parents = np.empty(most, dtype=np.int64)
    out_tokens = np.empty(most, dtype=np.int64)
    raw = np.full((most, len(sizes)), np.float32(-1.0))
    first = np.full(most, -1, dtype=np.int64)  # first child
    after = np.full(most, -1, dtype=np.int64)  # next sibling
    number = np.empty(most, dtype=np.int64)  # a member's node -> node of the union
    out_parents[0], out_tokens[0] = -1, tokens[0]
    n, start = 1, 0
    for m in range(len(sizes)):
        number[start] = 0
        raw[0, m] = 1.0
        for i in range(start + 1, start + sizes[m]):
            parent = number[start + parents[i]]
            node, last = first[parent], -1
            while node >= 0 and out_tokens[node] != tokens[i]:
                last = node
                node = after[node]
            if node < 0:
                node = n
                n += 1
                out_parents[node], out_tokens[node] = parent, tokens[i]
                if last < 0:
                    first[parent] = node
                else:
                    after[last] = node
            number[i] = node
            raw[node, m] = max(raw[node, m], min(max(prior[i], np.float32(0.0)), np.float32(1.0)))
        start += sizes[m]
    return out_parents[:n], out_tokens[:n], raw[:n]


@njit
def _bin(prior: float) -> int:
    return min(int(-2.0 * np.log2(max(prior, 1e-6))), BINS - 1)


@njit
def _logit(accepted: np.ndarray, tried: np.ndarray, m: int, depth: int, prior: float) -> float:
    """Logit of a member's calibrated prior."""
    d, b = min(depth, DEPTHS) - 1, _bin(prior)
    p = (accepted[m, d, b] + TRUST * prior) / (tried[m, d, b] + TRUST)
    p = min(max(p, 1.0 - LIMIT), LIMIT)
    return np.log(p / (1.0 - p))


@njit
def _depths(parents: np.ndarray) -> np.ndarray:
    depth = np.zeros(len(parents), dtype=np.int64)
    for i in range(1, len(parents)):
        depth[i] = depth[parents[i]] + 1
    return depth


@njit
def _priors(
    accepted: np.ndarray, tried: np.ndarray, weights: np.ndarray, parents: np.ndarray, raw: np.ndarray
) -> np.ndarray:
    depth = _depths(parents)
    out = np.ones(len(parents), dtype=np.float32)
    for i in range(1, len(parents)):
        group = 0
        for m in range(raw.shape[1]):
            if raw[i, m] >= 0.0:
                group |= 1 << m
        x = 0.0
        for m in range(raw.shape[1]):
            if raw[i, m] >= 0.0:
                x += weights[group, m] * _logit(accepted, tried, m, depth[i], raw[i, m])
        out[i] = 1.0 / (1.0 + np.exp(-x))
    return out


@njit
def _learn(
    accepted: np.ndarray,
    tried: np.ndarray,
    weights: np.ndarray,
    parents: np.ndarray,
    tokens: np.ndarray,
    raw: np.ndarray,
    emitted: np.ndarray,
) -> None:
    depth = _depths(parents)
    estimate = _priors(accepted, tried, weights, parents, raw)
    on_path = np.zeros(len(parents), dtype=np.bool_)
    on_path[0] = True
    for i in range(1, len(parents)):
        if not on_path[parents[i]] or depth[i] > len(emitted):
            continue
        hit = tokens[i] == emitted[depth[i] - 1]
        on_path[i] = hit
        group = 0
        for m in range(raw.shape[1]):
            if raw[i, m] >= 0.0:
                group |= 1 << m
        error = (1.0 if hit else 0.0) - estimate[i]
        for m in range(raw.shape[1]):
            if raw[i, m] < 0.0:
                continue
            # a lone member is served by its calibration
            if group != 1 << m:
                weights[group, m] += RATE * error * _logit(accepted, tried, m, depth[i], raw[i, m])
            d, b = min(depth[i], DEPTHS) - 1, _bin(raw[i, m])
            if tried[m, d, b] >= MEMORY:
                accepted[m, d, b] *= 0.5
                tried[m, d, b] *= 0.5
            tried[m, d, b] += 1.0
            if hit:
                accepted[m, d, b] += 1.0
