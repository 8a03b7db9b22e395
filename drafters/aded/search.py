"""Growing a draft tree out of the tri-gram table.

Both searches read a row as P(c | a, b) = w(c) / sum of w * n / (n + 0.4), n being how often the row was written: a
successor seen once, and nothing else, is not yet certain. Both write a tree as parents int64 [N] (-1 for the root),
tokens int64 [N] and prior float32 [N], parents before children.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from specdec.drafters.aded.table import SLOTS, Rows, find
from specdec.jit import njit

SIMULATIONS = 150
# Of tokens drafted from rows with one successor, 67, 92 and 97 % were right at n = 1, 2 and 3 with the embedded model
# on training text; n / (n + 0.4) says 71, 83 and 88 %.
DOUBT = 0.4
C1, C2 = 32.0, 8.0  # PUCT's constants
TOP = 24  # sequences taken from a searched tree, the root's own empty one included

_13, _7, _17, _11 = np.uint64(13), np.uint64(7), np.uint64(17), np.uint64(11)


class Scratch(NamedTuple):
    """The search tree, allocated once. One entry per node [n].

    Attributes:
        token, parent, depth: int32.
        row: int32, the row of the node's bigram (parent's token, token); -1: the table has none, -2: not looked up.
        first, children: int32, its children are ``first .. first + children``.
        visits: int32, N.
        value: float64, W.
        share: float32, P(token | its bigram).
        weight: float32, the P of the PUCT score: ``share``, or the raw weight.
        worth: float32, what stepping here adds to the value of a simulation.
        offer: float64, chance of the likeliest child not yet in the tree (best-first); ``chance``: of the node itself.
        kept: bool, in the draft tree.
    """

    token: np.ndarray
    parent: np.ndarray
    depth: np.ndarray
    row: np.ndarray
    first: np.ndarray
    children: np.ndarray
    visits: np.ndarray
    value: np.ndarray
    share: np.ndarray
    weight: np.ndarray
    worth: np.ndarray
    chance: np.ndarray
    offer: np.ndarray
    kept: np.ndarray


def scratch(nodes: int) -> Scratch:
    """Room for a search tree of ``nodes`` nodes; a Monte-Carlo search wants ``monte_carlo_nodes``."""
    kinds = {"value": np.float64, "chance": np.float64, "offer": np.float64, "kept": np.bool_}
    kinds |= dict.fromkeys(("share", "weight", "worth"), np.float32)
    return Scratch(*(np.zeros(nodes, dtype=kinds.get(name, np.int32)) for name in Scratch._fields))


def monte_carlo_nodes(simulations: int) -> int:
    """Most nodes of a Monte-Carlo search: every simulation expands one node, and the best are drawn out by one."""
    return 1 + simulations * SLOTS + TOP


def generator(seed: int, stream: int) -> np.ndarray:
    """State uint64 [1] of a private xorshift generator."""
    return np.random.SeedSequence((seed, stream)).generate_state(1, np.uint64) | np.uint64(1)


@njit
def _uniform(state: np.ndarray) -> float:
    x = state[0]
    x ^= x << _13
    x ^= x >> _7
    x ^= x << _17
    state[0] = x
    return np.float64(x >> _11) * 2.0**-53


@njit
def _total(t: Rows, row: int) -> float:
    total = 0.0
    for j in range(t.used[row]):
        total += t.weight[row, j]
    return total


@njit
def _divisor(t: Rows, row: int) -> float:
    """P(c | a, b) is the weight of c divided by this."""
    return _total(t, row) * (1.0 + DOUBT / t.mass[row])


@njit
def _plant(t: Rows, s: Scratch, vocab_size: int, before: int, root: int) -> None:
    """Make node 0."""
    _add(s, 0, 0, root, 1.0)
    s.parent[0], s.depth[0] = -1, 0
    s.row[0] = find(t, before * vocab_size + root)


@njit
def _add(s: Scratch, n: int, parent: int, token: int, share: float) -> None:
    """Make node n."""
    s.token[n], s.parent[n], s.share[n] = token, parent, share
    s.depth[n] = s.depth[parent] + 1
    s.row[n] = -2
    s.first[n] = s.children[n] = s.visits[n] = 0
    s.value[n] = 0.0


@njit
def _row(t: Rows, s: Scratch, node: int, vocab_size: int) -> int:
    """The row of a node's bigram, looked up when first needed."""
    if s.row[node] == -2:
        s.row[node] = find(t, int(s.token[s.parent[node]]) * vocab_size + s.token[node])
    return int(s.row[node])


@njit
def _tree(s: Scratch, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The sub-tree of ``nodes``, which stand parents first."""
    n = len(nodes)
    parents, tokens = np.empty(n, dtype=np.int64), np.empty(n, dtype=np.int64)
    prior = np.empty(n, dtype=np.float32)
    for i in range(n):
        parents[i] = -1
        for j in range(i):
            if nodes[j] == s.parent[nodes[i]]:
                parents[i] = j
        tokens[i], prior[i] = s.token[nodes[i]], s.share[nodes[i]]
    return parents, tokens, prior


# ---- best first ---------------------------------------------------------------------------------------------------


@njit
def best_first(
    t: Rows, s: Scratch, vocab_size: int, before: int, root: int, depth: int, budget: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The ``budget`` nodes of the largest product of P along their paths, largest first.

    Args:
        t: the table.
        s: scratch of at least ``budget`` nodes.
        before, root: the last two tokens.
        depth: deepest node.
        budget: most nodes, root included.
    """
    _plant(t, s, vocab_size, before, root)
    s.chance[0] = 1.0
    _offer(t, s, 0, depth, vocab_size)
    n = 1
    while n < budget:
        best = np.argmax(s.offer[:n])  # the first, on a tie
        if s.offer[best] <= 0.0:
            break
        _add(s, n, best, t.token[s.row[best], s.children[best]], s.offer[best] / s.chance[best])
        s.chance[n] = s.offer[best]
        s.children[best] += 1
        _offer(t, s, best, depth, vocab_size)
        _offer(t, s, n, depth, vocab_size)
        n += 1
    parents, tokens, prior = np.empty(n, dtype=np.int64), np.empty(n, dtype=np.int64), np.empty(n, dtype=np.float32)
    for i in range(n):
        parents[i], tokens[i], prior[i] = s.parent[i], s.token[i], s.share[i]
    return parents, tokens, prior


@njit
def _offer(t: Rows, s: Scratch, node: int, depth: int, vocab_size: int) -> None:
    s.offer[node] = 0.0
    if s.depth[node] == depth:
        return
    row, j = _row(t, s, node, vocab_size), s.children[node]
    if row >= 0 and j < t.used[row]:
        s.offer[node] = s.chance[node] * t.weight[row, j] / _divisor(t, row)


# ---- Monte-Carlo tree search --------------------------------------------------------------------------------------


@njit
def monte_carlo(
    t: Rows,
    s: Scratch,
    state: np.ndarray,
    vocab_size: int,
    before: int,
    root: int,
    depth: int,
    simulations: int,
    c1: float,
    c2: float,
    published: bool,
) -> int:
    """Grow a search tree by PUCT and return its number of nodes.

    The value of a simulation is 1 + the sum of P(c | a, b) along its path. ``published``: the score's P is the raw
    weight, and the value adds the weight of b after (a, b), as in the released code, which nearly always is 0.

    Args:
        t: the table.
        s: scratch of at least ``monte_carlo_nodes(simulations)`` nodes; the tree is left in it.
        state: of ``generator``.
        before, root: the last two tokens.
        depth: tokens in a simulation.
    """
    _plant(t, s, vocab_size, before, root)
    n = 1
    for _ in range(simulations):
        node, value = 0, 1.0
        while s.children[node] > 0:  # select
            node = _best_child(s, node, c1, c2)
            value += s.worth[node]
        if s.depth[node] < depth and _row(t, s, node, vocab_size) >= 0:  # expand, and step into the heaviest
            n = _expand(t, s, n, node, published)
            node = int(s.first[node])
            value += s.worth[node]
        before_last, last = 0, int(s.token[node])
        for step in range(s.depth[node], depth):  # roll out
            row = _row(t, s, node, vocab_size) if step == s.depth[node] else find(t, before_last * vocab_size + last)
            if row < 0:
                break
            j = _draw(t, row, state)
            # the release looks up the bigram's own second token in place of its successor
            value += _weight_of(t, row, last) if published else t.weight[row, j] / _divisor(t, row)
            before_last, last = last, int(t.token[row, j])
        while node >= 0:  # back up
            s.visits[node] += 1
            s.value[node] += value
            node = int(s.parent[node])
    return n


@njit
def _scale(n_par: int, c1: float, c2: float) -> float:
    """What P / (1 + N) is multiplied by: (c1 + ln((N_par + c2 + 1) / c2)) * sqrt(N_par)."""
    return (c1 + np.log((n_par + c2 + 1) / c2)) * np.sqrt(n_par)


@njit
def _best_child(s: Scratch, node: int, c1: float, c2: float) -> int:
    """The child of the largest U = W/N + scale * P / (1 + N)."""
    scale = _scale(s.visits[node], c1, c2)
    best, best_u = -1, -1.0
    for child in range(s.first[node], s.first[node] + s.children[node]):
        n = s.visits[child]
        if n == 0:
            return child  # U is infinite
        u = s.value[child] / n + scale * s.weight[child] / (1 + n)
        if u > best_u:
            best, best_u = child, u
    return best


@njit
def _expand(t: Rows, s: Scratch, n: int, node: int, published: bool) -> int:
    """Make all children of a node; returns the number of nodes."""
    row, last = s.row[node], int(s.token[node])
    divisor = _divisor(t, row)
    s.first[node], s.children[node] = n, t.used[row]
    released = _weight_of(t, row, last) if published else 0.0
    for j in range(t.used[row]):
        _add(s, n, node, t.token[row, j], t.weight[row, j] / divisor)
        s.weight[n] = t.weight[row, j] if published else s.share[n]
        s.worth[n] = released if published else s.share[n]
        n += 1
    return n


@njit
def _weight_of(t: Rows, row: int, token: int) -> float:
    for j in range(t.used[row]):
        if t.token[row, j] == token:
            return np.float64(t.weight[row, j])
    return 0.0


@njit
def _draw(t: Rows, row: int, state: np.ndarray) -> int:
    """The slot of a successor, drawn in proportion to the weights."""
    left = _uniform(state) * _total(t, row)
    last = t.used[row] - 1
    for j in range(last):
        left -= t.weight[row, j]
        if left < 0.0:
            return j
    return last


@njit
def extract(
    t: Rows, s: Scratch, n: int, vocab_size: int, budget: int, published: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The draft tree of a searched tree of n nodes.

    The 24 most visited nodes, the root among them, are each drawn out by their heaviest successor. Then the least
    visited leaves are dropped until ``budget`` nodes are left. ``published``: whole sequences are dropped before they
    are merged, as long as they cost more than ``budget - 1``; a sequence costs as many as it has different tokens, and
    the costliest goes first.

    Returns:
        parents, tokens, prior; most visited first.
    """
    s.kept[:n] = True
    best = _most_visited(s, n, TOP)
    s.kept[:n] = False
    s.kept[0] = True
    tips = np.zeros(len(best), dtype=np.int64)  # last node of each sequence
    for k in range(1, len(best)):
        node = best[k]
        tips[k] = node
        if s.children[node] > 0:
            tips[k] = s.first[node]
        elif _row(t, s, node, vocab_size) >= 0:
            row = s.row[node]
            tips[k] = n
            _add(s, n, node, t.token[row, 0], t.weight[row, 0] / _divisor(t, row))
            s.kept[n] = False
            n += 1
    if published:
        _drop_costliest(s, tips, budget - 1)
    for tip in tips:
        node = tip
        while not s.kept[node]:
            s.kept[node] = True
            node = int(s.parent[node])
    return _tree(s, _most_visited(s, n, budget))


@njit
def _most_visited(s: Scratch, n: int, most: int) -> np.ndarray:
    """The kept nodes of the most visits, at most ``most``; ties go to the earlier node, so parents come first.

    A parent has at least its child's visits, so this is what dropping the least visited leaf again and again leaves.
    """
    best = np.empty(most, dtype=np.int64)
    m = 0
    for node in range(n):
        if not s.kept[node] or (m == most and s.visits[node] <= s.visits[best[m - 1]]):
            continue
        at = m if m < most else most - 1
        m = at + 1
        while at > 0 and s.visits[best[at - 1]] < s.visits[node]:
            best[at] = best[at - 1]
            at -= 1
        best[at] = node
    return best[:m]


@njit
def _drop_costliest(s: Scratch, tips: np.ndarray, most: int) -> None:
    """Set tips to 0, the empty sequence, until the sequences cost at most ``most``; on a tie the least visited goes."""
    cost = np.zeros(len(tips), dtype=np.int64)
    for k in range(len(tips)):
        for earlier in range(k):  # the same sequence twice counts once
            if tips[earlier] == tips[k]:
                tips[k] = 0
        node = tips[k]
        while node > 0:
            cost[k] += 1
            other = int(s.parent[node])
            while other > 0:
                if s.token[other] == s.token[node]:
                    cost[k] -= 1
                    break
                other = int(s.parent[other])
            node = int(s.parent[node])
    while cost.sum() > most:
        worst = 0
        for k in range(len(tips)):
            if cost[k] >= cost[worst]:
                worst = k
        tips[worst] = cost[worst] = 0
