"""Where the last tokens of a text stood before, without scanning it.

An occurrence is named by its end: the n-gram is ``text[end - n : end]`` and its continuation begins at ``text[end]``.
"""

from __future__ import annotations

import numpy as np

from specdec.jit import njit

# new tokens a row has room for at first; a longer one doubles its room
FIRST_ROOM = 1 << 16


class NgramIndex:
    """For every position of a growing text, an earlier occurrence of the n-grams that end there.

    An open-addressing table per n leads from an n-gram's hash to one of its ends; the n-gram itself is read back from
    the text and compared, so equal hashes do no harm. Memory: 4 bytes per token and n for ``before`` and 8 to 16 for
    the table.

    Args:
        min_n, max_n: lengths of n-gram, both included.
        room: tokens to make room for.
        earliest: point to an n-gram's earliest occurrence, not to its latest one before.

    Attributes:
        n: tokens indexed so far.
        before: int32 [max_n - min_n + 1, room]; ``before[i, end - 1]`` is the end of an earlier occurrence of the
            (min_n + i)-gram that ends at ``end``, 0 for none. Followed on, it leads to ever earlier ones.
    """

    multiplier = 0x5851F42D4C957F2D  # of the hash; with 0 all n-grams collide

    def __init__(self, min_n: int, max_n: int, room: int, earliest: bool = False):
        self.min_n, self.max_n, self.earliest = min_n, max_n, earliest
        self.n = 0
        self._allocate(max(room, 1))

    def append(self, text: np.ndarray) -> None:
        """Index what ``text`` int64 [n] has gained since the last call; O(max_n) per new token."""
        room = self.before.shape[1]
        if len(text) > room:
            self._allocate(max(2 * room, len(text)))  # and everything is indexed again
        _append(text, self.n, self.min_n, self._slots, self.before, self.earliest, self.multiplier)
        self.n = len(text)

    def _allocate(self, room: int) -> None:
        levels = self.max_n - self.min_n + 1
        # zeros of this size are pages that exist once written
        self.before = np.zeros((levels, room), dtype=np.int32)
        self._slots = np.zeros((levels, 1 << (2 * room - 1).bit_length()), dtype=np.int32)
        self.n = 0

    def latest(self, text: np.ndarray, count: int, look: int, reach: int) -> tuple[np.ndarray, np.ndarray]:
        """Earlier occurrences of the longest suffix of ``text`` that has any.

        Args:
            text: int64 [n], all of it appended.
            count: most occurrences wanted.
            look: how many to look at, latest first.
            reach: how far a match is followed backwards, beyond max_n too.

        Returns:
            ends int64 [m] and lengths int64 [m] of the matches, longest first, the later one on a tie; m <= count.
        """
        return _latest(text, self.min_n, self.before, count, look, reach)

    def leftmost(self, text: np.ndarray, copy: int) -> tuple[np.ndarray, np.ndarray]:
        """The published rule, for an index of earliest occurrences: as ``latest``, m <= 1.

        The longest suffix counts whose leftmost occurrence has ``copy`` tokens behind it and ends before the suffix
        begins.
        """
        return _leftmost(text, self.min_n, self.before, copy)


@njit
def _append(
    text: np.ndarray,
    start: int,
    min_n: int,
    slots: np.ndarray,
    before: np.ndarray,
    earliest: bool,
    multiplier: int,
) -> None:
    mask = slots.shape[1] - 1
    for end in range(start + 1, len(text) + 1):
        key = 0
        for n in range(1, min(min_n + before.shape[0], end + 1)):
            # the hash of the last n tokens out of that of the last n - 1
            key = (key ^ (text[end - n] + 1)) * multiplier
            key ^= key >> 32
            level = n - min_n
            if level < 0:
                continue
            slot = key & mask
            found = slots[level, slot]
            while found > 0:
                i = 1
                while i <= n and text[found - i] == text[end - i]:
                    i += 1
                if i > n:
                    break
                slot = (slot + 1) & mask
                found = slots[level, slot]
            before[level, end - 1] = found
            if found == 0 or not earliest:
                slots[level, slot] = end


@njit
def _latest(
    text: np.ndarray, min_n: int, before: np.ndarray, count: int, look: int, reach: int
) -> tuple[np.ndarray, np.ndarray]:
    n = len(text)
    ends = np.empty(count, dtype=np.int64)
    lengths = np.empty(count, dtype=np.int64)
    m = 0
    for level in range(before.shape[0] - 1, -1, -1):
        end = np.int64(before[level, n - 1])
        for _ in range(look):
            if end == 0:
                break
            size = min_n + level
            while size < reach and size < end and text[end - 1 - size] == text[n - 1 - size]:
                size += 1
            # insert behind everything at least as long
            at = m
            while at > 0 and lengths[at - 1] < size:
                at -= 1
            if at < count:
                m = min(m + 1, count)
                for i in range(m - 1, at, -1):
                    ends[i], lengths[i] = ends[i - 1], lengths[i - 1]
                ends[at], lengths[at] = end, size
            end = np.int64(before[level, end - 1])
        if m > 0:
            break
    return ends[:m], lengths[:m]


@njit
def _leftmost(text: np.ndarray, min_n: int, before: np.ndarray, copy: int) -> tuple[np.ndarray, np.ndarray]:
    n = len(text)
    ends = np.empty(1, dtype=np.int64)
    lengths = np.empty(1, dtype=np.int64)
    for level in range(before.shape[0] - 1, -1, -1):
        end, size = before[level, n - 1], min_n + level
        # where the leftmost occurrence stands too late, all the others do
        if end > 0 and end + copy <= n and end < n - size:
            ends[0], lengths[0] = end, size
            return ends, lengths
    return ends[:0], lengths[:0]


@njit
def continuations(text: np.ndarray, ends: np.ndarray, length: int) -> np.ndarray:
    """What followed each occurrence, int64 [m, length].

    A copy that runs into the end of the text goes round: text of period p continues with period p.
    """
    n = len(text)
    paths = np.empty((len(ends), length), dtype=np.int64)
    for row, end in enumerate(ends):
        for i in range(length):
            paths[row, i] = text[end + i] if end + i < n else paths[row, i - (n - end)]
    return paths
