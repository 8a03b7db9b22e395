"""A suffix automaton: every substring of the text so far, how often it occurred, and what followed it.

A state stands for all substrings that end at the same set of positions. Its suffix link leads to the longest of their
suffixes that ends at more positions, so the links from the last state list every suffix of the text that occurred
before, longest first. With several documents it is a generalised automaton: each starts at the root again, and no
substring spans two.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from specdec.jit import njit

HOPS = 256  # states counted per token; a chain of suffix links is longer only in text that repeats itself very often

# entries of Pools.size
STATES, EDGES, LAST, TOKENS = 0, 1, 2, 3


class Pools(NamedTuple):
    """The automaton in flat int32 arrays (``size`` int64). State 0 is the root, the empty string.

    Attributes:
        link: suffix link per state, -1 for the root.
        slen: length of the longest substring of a state.
        first_end, last_end: end (1-based position in the text) of the earliest and the latest occurrence.
        cnt: occurrences.
        head: first edge of a state, -1 for none; edges are listed newest first.
        e_src, e_tok, e_dst, e_next: edges.
        slots: open addressing from (state, token) to an edge, -1 where free; its length is a power of two.
        size: states, edges, the state of the whole current document, tokens.
    """

    link: np.ndarray
    slen: np.ndarray
    first_end: np.ndarray
    last_end: np.ndarray
    cnt: np.ndarray
    head: np.ndarray
    e_src: np.ndarray
    e_tok: np.ndarray
    e_dst: np.ndarray
    e_next: np.ndarray
    slots: np.ndarray
    size: np.ndarray


def _pools(capacity: int) -> Pools:
    """Room for ``capacity`` tokens: at most 2n states and 3n edges."""
    arrays = [np.empty(n * capacity, dtype=np.int32) for n in (2, 2, 2, 2, 2, 2, 3, 3, 3, 3)]
    arrays.append(np.full(1 << (4 * capacity - 1).bit_length(), -1, dtype=np.int32))
    pools = Pools._make([*arrays, np.array([1, 0, 0, 0], dtype=np.int64)])
    for pool, root in zip(pools[:6], (-1, 0, 0, 0, 0, -1), strict=True):
        pool[0] = root
    return pools


class Automaton:
    """Grows by one token at a time; it never forgets.

    About 110 to 130 bytes per token of capacity. Counts are exact for texts whose suffixes have at most 256 states;
    beyond (long runs of repetition) the shortest substrings are counted a little low.

    Args:
        capacity: tokens there is room for; doubled when it is full.
    """

    def __init__(self, capacity: int = 1024):
        self.capacity = max(capacity, 1)
        self.pools = _pools(self.capacity)

    def __len__(self) -> int:
        """Tokens so far, all documents together."""
        return int(self.pools.size[TOKENS])

    def append(self, tokens: np.ndarray) -> None:
        """Continue the current document by ``tokens`` int64 [n]."""
        if len(self) + len(tokens) > self.capacity:
            self._grow(max(2 * self.capacity, len(self) + len(tokens)))
        _append(self.pools, tokens)

    def new_document(self) -> None:
        """What is appended next follows nothing."""
        self.pools.size[LAST] = 0

    def longest_repeat(self) -> tuple[int, int]:
        """State and length of the longest suffix of the document that occurred before; (0, 0) if there is none."""
        state = int(self.pools.link[self.pools.size[LAST]])
        return (state, int(self.pools.slen[state])) if state > 0 else (0, 0)

    def _grow(self, capacity: int) -> None:
        old, self.pools, self.capacity = self.pools, _pools(capacity), capacity
        for before, after in zip(old[:10], self.pools[:10], strict=True):
            after[: len(before)] = before
        self.pools.size[:] = old.size
        _rehash(self.pools)


@njit
def wide(number: Any) -> Any:
    """int64 out of an entry of the pools: variables of compiled code keep one type."""
    return np.int64(number)


@njit
def slot_of(state: int, token: int, slots: int) -> int:
    """Where the search for an edge begins, among ``slots`` (a power of two)."""
    key = (np.uint64(state) << np.uint64(32)) | np.uint64(token)
    key *= np.uint64(0x9E3779B97F4A7C15)
    key ^= key >> np.uint64(29)
    key *= np.uint64(0xBF58476D1CE4E5B9)
    key ^= key >> np.uint64(32)
    return wide(key & np.uint64(slots - 1))


@njit
def _find(pools: Pools, state: int, token: int) -> int:
    """The edge of ``state`` for ``token``, -1 for none."""
    slots = pools.slots
    i = slot_of(state, token, len(slots))
    while slots[i] >= 0:
        edge = slots[i]
        if pools.e_src[edge] == state and pools.e_tok[edge] == token:
            return edge
        i = (i + 1) & (len(slots) - 1)
    return -1


@njit
def _enter(pools: Pools, edge: int) -> None:
    slots = pools.slots
    i = slot_of(pools.e_src[edge], pools.e_tok[edge], len(slots))
    while slots[i] >= 0:
        i = (i + 1) & (len(slots) - 1)
    slots[i] = edge


@njit
def _rehash(pools: Pools) -> None:
    for edge in range(pools.size[EDGES]):
        _enter(pools, edge)


@njit
def _new_edge(pools: Pools, state: int, token: int, target: int, after: int) -> int:
    """A new edge before ``after`` in its state's list; the caller links it in."""
    edge = pools.size[EDGES]
    pools.size[EDGES] += 1
    pools.e_src[edge], pools.e_tok[edge] = state, token
    pools.e_dst[edge], pools.e_next[edge] = target, after
    _enter(pools, edge)
    return edge


@njit
def _new_state(pools: Pools, link: int, slen: int, first_end: int, last_end: int, cnt: int) -> int:
    state = pools.size[STATES]
    pools.size[STATES] += 1
    pools.link[state], pools.slen[state] = link, slen
    pools.first_end[state], pools.last_end[state] = first_end, last_end
    pools.cnt[state], pools.head[state] = cnt, -1
    return state


@njit
def _reach(pools: Pools, p: int, token: int, q: int) -> int:
    """The state of p's longest substring followed by ``token``, where the edge leads to q: q itself or a clone."""
    if pools.slen[q] == pools.slen[p] + 1:
        return q
    # q also holds longer substrings, which do not end where this one now does: split it
    clone = _new_state(pools, pools.link[q], pools.slen[p] + 1, pools.first_end[q], pools.last_end[q], pools.cnt[q])
    tail, edge = -1, pools.head[q]
    while edge >= 0:  # the same edges in the same order
        copy = _new_edge(pools, clone, pools.e_tok[edge], pools.e_dst[edge], -1)
        if tail < 0:
            pools.head[clone] = copy
        else:
            pools.e_next[tail] = copy
        tail, edge = copy, pools.e_next[edge]
    while p >= 0:
        edge = _find(pools, p, token)
        if edge < 0 or pools.e_dst[edge] != q:
            break
        pools.e_dst[edge] = clone
        p = pools.link[p]
    pools.link[q] = clone
    return clone


@njit
def _append(pools: Pools, tokens: np.ndarray) -> None:
    size = pools.size
    for token in tokens:
        size[TOKENS] += 1
        end, p = size[TOKENS], size[LAST]
        edge = _find(pools, p, token)
        if edge >= 0:  # an earlier document began like this one
            cur = _reach(pools, p, token, pools.e_dst[edge])
        else:
            cur = _new_state(pools, 0, pools.slen[p] + 1, end, end, 0)
            while p >= 0 and edge < 0:
                pools.head[p] = _new_edge(pools, p, token, cur, pools.head[p])
                p = pools.link[p]
                if p >= 0:
                    edge = _find(pools, p, token)
            if p >= 0:
                pools.link[cur] = _reach(pools, p, token, pools.e_dst[edge])
        size[LAST] = cur
        # every suffix of the text has one more occurrence
        hops = 0
        while cur > 0 and hops < HOPS:
            pools.cnt[cur] += 1
            pools.last_end[cur] = end
            cur = pools.link[cur]
            hops += 1


@njit
def follow(pools: Pools, tokens: np.ndarray, state: int, length: int) -> tuple[int, int]:
    """Read tokens that are not part of the automaton.

    Args:
        tokens: int64 [n].
        state, length: the longest suffix, of what was read before, that occurs in the automaton.

    Returns:
        The same after ``tokens``.
    """
    for token in tokens:
        edge = _find(pools, state, token)
        while edge < 0 and state > 0:
            state = pools.link[state]
            length = pools.slen[state]
            edge = _find(pools, state, token)
        if edge >= 0:
            state, length = wide(pools.e_dst[edge]), length + 1
    return state, length
