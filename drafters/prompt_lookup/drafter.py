"""The drafter: copy what followed earlier occurrences of the last n tokens."""

from __future__ import annotations

from typing import Literal

import numpy as np

from specdec.contracts import Drafter
from specdec.drafters.prompt_lookup.index import FIRST_ROOM, NgramIndex, continuations
from specdec.errors import UsageError
from specdec.jit import njit
from specdec.state import DecodeState
from specdec.tables.trees import select, trie
from specdec.target import Target
from specdec.tree import DraftTree, Proposal, Topology

# Chance that one copy has the next token right after a match of 1, 2, ... tokens, accepted draft tokens counted; the
# last entry holds for longer ones. Measured on training text of the embedded model, with its tokenizer.
MATCH_ACCEPTANCE = (0.15, 0.26, 0.39, 0.48, 0.52, 0.56, 0.60, 0.66, 0.71, 0.75, 0.79, 0.82, 0.84, 0.86, 0.88, 0.90)
_RATE = np.array(MATCH_ACCEPTANCE)
REACH = len(MATCH_ACCEPTANCE)  # tokens a match is followed backwards
LOOK = 64  # occurrences that pick="longest" compares
CUDA_SIZE = 64  # columns a GPU verifies about as fast as one
CUDA_MIN_PROB, CPU_MIN_PROB = 0.01, 0.1


class PromptLookup(Drafter):
    """A tree of copies from the text so far.

    Every row has an index of its own (``index.NgramIndex``: 24 to 40 bytes a token with the default lengths), which
    ends with the request. With ``candidates=1`` the draft is a plain chain of ``copy`` tokens.

    Args:
        max_ngram: longest suffix looked for.
        min_ngram: shortest; 1 matches almost always and is almost always wrong.
        copy: most tokens drafted below each other.
        pick: which occurrences of the longest suffix are copied. "latest"; "longest": of the last 64 those whose
            match goes furthest back; "leftmost": the published algorithm, a single full copy from the first one.
        candidates: most occurrences copied into one tree.
        size: most nodes, root included; None: 1 + copy on a CPU and for a chain, up to 64 on a GPU.
        min_prob: a node is drafted if the chance of reaching it is at least this; None: 0 for a chain, otherwise 0.1
            on a CPU and 0.01 on a GPU.

    Raises:
        UsageError: an option out of range.
    """

    name = "prompt-lookup"
    summary = "copies what followed the last n tokens earlier in the text"
    tolerates_gaps = True

    def __init__(
        self,
        max_ngram: int = 3,
        min_ngram: int = 2,
        copy: int = 10,
        pick: Literal["latest", "longest", "leftmost"] = "latest",
        candidates: int = 4,
        size: int | None = None,
        min_prob: float | None = None,
    ):
        if not 1 <= min_ngram <= max_ngram:
            raise UsageError(f"min_ngram={min_ngram} and max_ngram={max_ngram}: need 1 <= min_ngram <= max_ngram")
        if copy < 1:
            raise UsageError(f"copy={copy} must be at least 1")
        if pick not in ("latest", "longest", "leftmost"):
            raise UsageError(f"pick={pick!r} must be 'latest', 'longest' or 'leftmost'")
        if candidates < 1:
            raise UsageError(f"candidates={candidates} must be at least 1")
        if size is not None and size < 1:
            raise UsageError(f"size={size} must be at least 1 (the root alone)")
        if min_prob is not None and not 0 <= min_prob <= 1:
            raise UsageError(f"min_prob={min_prob} must be between 0 and 1")
        self.max_ngram, self.min_ngram, self.copy, self.pick = max_ngram, min_ngram, copy, pick
        self.candidates = 1 if pick == "leftmost" else candidates
        self.size, self.min_prob = size, min_prob
        self._resolve(cuda=True)
        self._indexes: dict[int, NgramIndex] = {}

    def _resolve(self, cuda: bool) -> None:
        """Fill in what depends on the device."""
        chain = self.candidates == 1
        tree = min(1 + self.candidates * self.copy, max(CUDA_SIZE, 1 + self.copy))
        self.budget = self.size or (tree if cuda else 1 + self.copy)
        self._floor = self.min_prob
        if self._floor is None:
            self._floor = 0.0 if chain else CUDA_MIN_PROB if cuda else CPU_MIN_PROB

    def bind(self, target: Target) -> None:
        self._resolve(target.device.type == "cuda")
        # every compiled function once, on a text that matches
        toy = np.zeros(self.max_ngram + self.copy + 1, dtype=np.int64)
        index = self._index(len(toy))
        index.append(toy)
        self._tree(index, toy, np.zeros(0, dtype=np.int64), self.copy)

    def _index(self, room: int) -> NgramIndex:
        return NgramIndex(self.min_ngram, self.max_ngram, room, earliest=self.pick == "leftmost")

    def begin(self, state: DecodeState) -> None:
        self._ends = np.array(sorted(state.eos), dtype=np.int64)
        self._indexes = {}
        for row in state.rows:
            index = self._index(min(row.max_length, len(row.tokens) + FIRST_ROOM))
            index.append(row.tokens)
            self._indexes[row.index] = index

    def propose(self, state: DecodeState) -> list[Proposal | None]:
        proposals: list[Proposal | None] = []
        for b, row in enumerate(state.rows):
            index = self._indexes[row.index]
            index.append(row.tokens)
            proposals.append(Proposal(self._tree(index, row.tokens, self._ends, state.depth_left(b))))
        return proposals

    def _tree(self, index: NgramIndex, text: np.ndarray, ends: np.ndarray, depth: int) -> DraftTree:
        if self.pick == "leftmost":
            found, lengths = index.leftmost(text, self.copy)
        else:
            look = self.candidates if self.pick == "latest" else max(LOOK, self.candidates)
            found, lengths = index.latest(text, self.candidates, look, REACH)
        root, depth = int(text[-1]), min(depth, self.copy)
        if depth == 0 or len(found) == 0:
            return DraftTree.root(root)
        rate = _RATE[np.minimum(lengths, REACH) - 1]
        # the longest match counts as one copy, a shorter one as less
        parents, tokens, weight = trie(root, continuations(text, found, depth), rate / rate[0])
        prior = _prior(parents, weight, int(lengths[0]), _RATE)
        parents, tokens, prior = select(parents, tokens, prior, ends, depth, self.budget, self._floor)
        return DraftTree(Topology(parents), tokens, prior=prior)

    def end(self, state: DecodeState) -> None:
        self._indexes = {}


@njit
def _prior(parents: np.ndarray, weight: np.ndarray, length: int, rate: np.ndarray) -> np.ndarray:
    """Chance of every node once its parent is accepted, float32 [N].

    Measured: s copies that agree multiply the odds of a single one by s^2; where only s of the m copies at the parent
    go on alike, the chance is smaller by (s / m)^1.5; a match whose draft was accepted is a longer match.

    Args:
        parents, weight: from ``trie``.
        length: of the longest match at the root.
        rate: ``MATCH_ACCEPTANCE``.
    """
    prior = np.ones(len(parents), dtype=np.float32)
    level = np.zeros(len(parents), dtype=np.int64)
    for i in range(1, len(parents)):
        parent = parents[i]
        level[i] = level[parent] + 1
        single = rate[min(length + level[parent], len(rate)) - 1]
        odds = weight[i] ** 2 * single / (1 - single)
        prior[i] = odds / (1 + odds) * (weight[i] / weight[parent]) ** 1.5
    return prior
