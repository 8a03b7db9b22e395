"""Prompt lookup: copy what followed an earlier occurrence of the last n tokens.

The method of apoorvumang/prompt-lookup-decoding and of transformers' ``prompt_lookup_num_tokens``.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from specdec.contracts import Drafter
from specdec.errors import UsageError
from specdec.jit import njit
from specdec.state import DecodeState
from specdec.tree import DraftTree, Proposal


@njit
def find_copy(tokens: np.ndarray, max_n: int, min_n: int, copy: int, latest: bool) -> np.ndarray:
    """Tokens that followed an earlier occurrence of the longest suffix of at most ``max_n`` tokens.

    Args:
        tokens: int64 [n].
        max_n, min_n: lengths of suffix to look for, longest first.
        copy: most tokens to copy.
        latest: take the latest occurrence, and where the copy runs into the end of the text, go round: text of
            period p continues with period p. Otherwise the reference's rule: the leftmost occurrence that has
            ``copy`` tokens behind it.

    Returns:
        int64 [m], m <= copy; empty without a match.
    """
    n = len(tokens)
    for size in range(min(max_n, n - 1), min_n - 1, -1):
        # e: one past the earlier occurrence's end, so that tokens[e - size : e] equals the suffix
        for step in range(n - size):
            e = n - 1 - step if latest else size + step
            if not latest and (e + copy > n or e >= n - size):
                break
            same = True
            for i in range(1, size + 1):
                if tokens[e - i] != tokens[n - i]:
                    same = False
                    break
            if same:
                out = np.empty(copy, dtype=np.int64)
                for i in range(copy):
                    out[i] = tokens[e + i] if e + i < n else out[i - (n - e)]
                return out
    return np.empty(0, dtype=np.int64)


class PromptLookup(Drafter):
    """A chain copied from the text so far.

    Args:
        max_ngram: longest suffix looked for.
        min_ngram: shortest; 1 matches almost always and is almost always wrong.
        copy: tokens drafted.
        pick: "latest" occurrence, or "leftmost" with a full copy (the published algorithm).
    """

    name = "prompt-lookup"
    summary = "copies what followed the last n tokens earlier in the text"

    def __init__(
        self, max_ngram: int = 3, min_ngram: int = 2, copy: int = 10, pick: Literal["latest", "leftmost"] = "latest"
    ):
        if not 1 <= min_ngram <= max_ngram:
            raise UsageError(f"min_ngram={min_ngram} and max_ngram={max_ngram}: need 1 <= min_ngram <= max_ngram")
        if copy < 1:
            raise UsageError(f"copy={copy} must be at least 1")
        if pick not in ("latest", "leftmost"):
            raise UsageError(f"pick={pick!r} must be 'latest' or 'leftmost'")
        self.max_ngram, self.min_ngram, self.copy, self.pick = max_ngram, min_ngram, copy, pick
        self.budget = copy + 1

    def propose(self, state: DecodeState) -> list[Proposal | None]:
        return [self._row(state, b) for b in range(len(state.rows))]

    def _row(self, state: DecodeState, b: int) -> Proposal:
        tokens = state.rows[b].tokens
        root = int(tokens[-1])
        if state.depth_left(b) == 0:
            return Proposal(DraftTree.root(root))
        drafted = find_copy(tokens, self.max_ngram, self.min_ngram, self.copy, self.pick == "latest")
        drafted = drafted[: state.depth_left(b)].tolist()
        end = next((i + 1 for i, token in enumerate(drafted) if token in state.eos), len(drafted))
        return Proposal(DraftTree.chain(root, drafted[:end]))
