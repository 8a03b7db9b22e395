"""Draft trees read out of a suffix automaton (SuffixDecoding's speculation, arXiv 2411.04975)."""

from __future__ import annotations

import heapq

import numpy as np

from specdec.drafters.suffix.automaton import Pools, wide
from specdec.jit import njit

LOOK = 32  # edges looked at per state, newest first: what follows a frequent token may be half the vocabulary
# Most edges looked at per call, where a match counts as VISIT of them. Long repetitions have as many matches as tokens,
# all much alike where drafts are unrolled; without, longer drafts come from shorter matches only.
MOST_LOOKS, MOST_LOOKS_UNROLLED, VISIT = 4096, 512, 8


@njit
def speculate(
    pools: Pools,
    state: int,
    length: int,
    live: int,
    budget: int,
    alpha: float,
    offset: float,
    p_min: float,
    novelty: float,
    depth: int,
    ends: np.ndarray,
    tree: bool,
    unroll: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """The best draft over all matches of the current suffix, from the given one down to length 1.

    A match of length p gets min(budget, floor(alpha p + offset)) nodes, likeliest first; a draft's score is the sum
    of their probabilities, that is the tokens it may be expected to gain. Of equal scores the longer match wins.

    Args:
        pools: the automaton.
        state, length: the longest match.
        live: position of the text's end, where the text itself is in the automaton: the suffix that stands there has
            no continuation yet and does not count. -1: count everything.
        budget: most nodes below the root.
        alpha, offset: how the budget grows with the match.
        p_min: least probability of a path.
        novelty: see ``_expand``.
        depth: deepest node.
        ends: int64 [e], tokens nothing follows.
        tree: False follows the most frequent continuation only.
        unroll: a copy that reaches the end of the text goes on from a shorter match: text of period p continues with
            period p.

    Returns:
        parents int64 [n] (-1: the root), tokens int64 [n] and chance float64 [n], a node's probability once its parent
        is accepted; the score.
    """
    parents, tokens, chance = np.empty(budget, np.int64), np.empty(budget, np.int64), np.empty(budget, np.float64)
    best_parents, best_tokens, best_chance = parents.copy(), tokens.copy(), chance.copy()
    best_n, best = 0, 0.0
    looks = MOST_LOOKS_UNROLLED if unroll else MOST_LOOKS
    while state > 0 and looks > 0:
        limit = min(budget, int(np.floor(length * alpha + offset + 1e-6)))
        if limit <= best:  # no probability is above 1, and shorter matches get no more nodes
            break
        n, score, looked = _expand(
            pools, state, length, live, limit, p_min, novelty, depth, ends, tree, unroll, parents, tokens, chance
        )
        looks -= looked + VISIT
        if score > best:
            best_n, best = n, score
            best_parents, parents = parents, best_parents
            best_tokens, tokens = tokens, best_tokens
            best_chance, chance = chance, best_chance
        state = wide(pools.link[state])
        length = wide(pools.slen[state])
    return best_parents[:best_n], best_tokens[:best_n], best_chance[:best_n], best


@njit
def _expand(
    pools: Pools,
    state: int,
    length: int,
    live: int,
    limit: int,
    p_min: float,
    novelty: float,
    depth: int,
    ends: np.ndarray,
    tree: bool,
    unroll: bool,
    parents: np.ndarray,
    tokens: np.ndarray,
    chance: np.ndarray,
) -> tuple[int, float, int]:
    """Best first, at most ``limit`` nodes, below one match; returns nodes, score and edges looked at.

    A continuation seen c times among the n occurrences of a context of m tokens has probability c / (n + novelty / m):
    something new is worth ``novelty`` occurrences after one token, and less the longer the match is.
    """
    # (-probability, -latest end, parent, state, token, context length, depth, chance): of equal probabilities the
    # continuation seen latest goes first
    heap = [(-1.0, 0, -2, state, -1, length, 0, 1.0)]
    n, score, looks = -1, 0.0, 0
    while heap:
        minus, _, parent, at, token, size, level, ratio = heapq.heappop(heap)
        if not tree:
            heap.clear()  # its siblings
        if n >= 0:
            parents[n], tokens[n], chance[n] = parent, token, ratio
            score -= minus
        n += 1
        if n == limit:
            break
        over = level == depth
        for end in ends:
            if token == end:
                over = True
        if over:
            continue
        if unroll and level > 0 and pools.head[at] < 0:  # every occurrence stands at the end of a document
            while pools.head[at] < 0:
                at = wide(pools.link[at])
            if at == 0:
                continue
            size = wide(pools.slen[at])
        seen = float(pools.cnt[at])
        if pools.last_end[at] == live:
            seen -= 1.0
        total = max(seen, 1.0) + novelty / size
        edge, looked = pools.head[at], 0
        while edge >= 0 and looked < LOOK:
            looked += 1
            child = wide(pools.e_dst[edge])
            part = min(1.0, pools.cnt[child] / total)
            if part * -minus >= p_min:
                latest = wide(pools.last_end[child])
                entry = (part * minus, -latest, n - 1, child, wide(pools.e_tok[edge]), size + 1, level + 1, part)
                heapq.heappush(heap, entry)
            edge = pools.e_next[edge]
        looks += looked
    return n, score, looks
