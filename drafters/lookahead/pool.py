"""The n-gram pool: for every token the last G different continuations of N - 1 tokens.

Shapes: V vocabulary, N n-gram size, G guesses per key, M n-grams.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from specdec.jit import njit


class Pool:
    """Continuations [V, G, N - 1], per key the newest first; a G + 1st one drops the oldest.

    It never grows: 4 V G (N - 1) bytes, 36 MB for V = 152k, G = 15, N = 5. Pages without a key that was seen are never
    touched, so the system does not provide them.

    Attributes:
        successors: int32 [V, G, N - 1].
        count: int32 [V], entries in use per key.
    """

    def __init__(self, vocab_size: int, guesses: int, ngram: int):
        self.successors = np.zeros((vocab_size, guesses, ngram - 1), dtype=np.int32)
        self.count = np.zeros(vocab_size, dtype=np.int32)

    @property
    def filled(self) -> bool:
        return bool(self.count.any())

    def arrays(self) -> dict[str, np.ndarray]:
        """Only the keys that were seen: keys int32 [K] ascending, count int32 [K], successors int32 [K, G, N - 1]."""
        keys = np.flatnonzero(self.count).astype(np.int32)
        return {"keys": keys, "count": self.count[keys], "successors": self.successors[keys]}

    def facts(self) -> dict[str, Any]:
        return {"ngram": self.successors.shape[2] + 1, "guesses": self.successors.shape[1]}

    def fill(self, arrays: dict[str, np.ndarray], facts: dict[str, Any]) -> None:
        ours = self.facts()
        if {name: facts[name] for name in ours} != ours:
            raise ValueError(
                f"it holds {facts['guesses']} guesses of {facts['ngram']}-grams per token, this drafter "
                f"{ours['guesses']} of {ours['ngram']}-grams"
            )
        keys, count, successors = arrays["keys"], arrays["count"], arrays["successors"]
        vocab_size, guesses, length = self.successors.shape
        shapes = (keys.shape, count.shape, successors.shape)
        if keys.ndim != 1 or shapes != (keys.shape, keys.shape, (len(keys), guesses, length)):
            raise ValueError(f"keys, count and successors have shapes {shapes}, which do not belong together")
        if any(array.dtype != np.int32 for array in (keys, count, successors)):
            raise ValueError("an array is not int32")
        if len(keys):
            if keys[0] < 0 or keys[-1] >= vocab_size or (np.diff(keys) <= 0).any():
                raise ValueError("keys are not token ids in ascending order")
            if count.min() < 1 or count.max() > guesses:
                raise ValueError(f"a count is not in 1..{guesses}")
            if successors.min() < 0 or successors.max() >= vocab_size:
                raise ValueError("a successor is no token id")
        self.count[:] = 0
        self.count[keys], self.successors[keys] = count, successors

    def merge(self, other: Pool) -> None:
        """Take over the other pool's guesses as older than all of ours, as far as there is room."""
        _merge(self.successors, self.count, other.successors, other.count)

    def insert(self, ngrams: np.ndarray) -> None:
        """Put in n-grams int64 [M, N], key first; one that is there already becomes its key's newest."""
        _insert(self.successors, self.count, ngrams)

    def feed(self, tokens: np.ndarray, fed: int) -> None:
        """Put in every n-gram of a text int64 [n] that ends at or behind position ``fed``."""
        _feed(self.successors, self.count, tokens, fed)

    def guesses(self, key: int) -> np.ndarray:
        """Continuations of a token, int64 [P, N - 1], P <= G, the newest first."""
        return self.successors[key, : self.count[key]].astype(np.int64)


@njit
def _put(successors: np.ndarray, count: np.ndarray, ngram: np.ndarray) -> None:
    key, known = ngram[0], count[ngram[0]]
    at = 0
    while at < known:
        same = True
        for i in range(successors.shape[2]):
            if successors[key, at, i] != ngram[i + 1]:
                same = False
                break
        if same:
            break
        at += 1
    if at == known:
        if known < successors.shape[1]:
            count[key] = known + 1
        else:
            at -= 1  # full: the oldest goes
    for slot in range(at, 0, -1):
        for i in range(successors.shape[2]):
            successors[key, slot, i] = successors[key, slot - 1, i]
    for i in range(successors.shape[2]):
        successors[key, 0, i] = ngram[i + 1]


@njit
def _insert(successors: np.ndarray, count: np.ndarray, ngrams: np.ndarray) -> None:
    for i in range(len(ngrams)):
        _put(successors, count, ngrams[i])


@njit
def _feed(successors: np.ndarray, count: np.ndarray, tokens: np.ndarray, fed: int) -> None:
    n = successors.shape[2] + 1
    for end in range(max(fed, n - 1), len(tokens)):
        _put(successors, count, tokens[end - n + 1 : end + 1])


@njit
def _merge(successors: np.ndarray, count: np.ndarray, others: np.ndarray, other_count: np.ndarray) -> None:
    for key in range(len(count)):
        for slot in range(other_count[key]):
            room = count[key]
            if room == successors.shape[1]:
                break
            known = False
            for have in range(room):
                same = True
                for i in range(successors.shape[2]):
                    if successors[key, have, i] != others[key, slot, i]:
                        same = False
                        break
                known = known or same
            if not known:
                for i in range(successors.shape[2]):
                    successors[key, room, i] = others[key, slot, i]
                count[key] = room + 1
