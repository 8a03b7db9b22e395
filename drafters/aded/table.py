"""The tri-gram table: for every bigram (a, b) up to 16 successors c with weights, about P(c | a, b).

A bigram's key is ``a * V + b``. Keys lead to rows through a hash of open addressing with linear probing. Zero means
empty everywhere, so that a new table costs no memory before it is used.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from specdec.jit import njit

SLOTS = 16  # successors kept per bigram
CORPUS_SLOTS = 12  # successors kept per bigram after counting a corpus, as published
_LOOKS = 8  # rows among which the oldest makes room
_NOTHING = 1e-9  # a successor that has decayed to less is dropped

_A, _B = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_30, _27, _31 = np.uint64(30), np.uint64(27), np.uint64(31)


class Rows(NamedTuple):
    """The arrays of a table: R rows of S = 16 slots, H = 2^p >= R / 0.6 entries of the hash.

    Attributes:
        entry_key: int64 [H], key + 1; 0: empty.
        entry_row: int32 [H].
        key: int64 [R].
        used: int32 [R], slots in use.
        token: int32 [R, S], successors, heaviest first, equal weights by id.
        weight: float32 [R, S].
        mass: float32 [R], how often the row was written.
        age: int64 [R], when the row was last written.
        clock: int64 [3], rows in use, where the next look for an old row starts, writes so far.
    """

    entry_key: np.ndarray
    entry_row: np.ndarray
    key: np.ndarray
    used: np.ndarray
    token: np.ndarray
    weight: np.ndarray
    mass: np.ndarray
    age: np.ndarray
    clock: np.ndarray


class TrigramTable:
    """Tri-grams with weights, in bounded memory.

    A new bigram in a full table takes the place of the least recently written of 8 rows; the next look is at the 8
    rows after those. A new successor in a full row takes the place of the lightest. Both cost a constant number of
    operations, and nothing is ever rebuilt.

    A row in use takes 152 bytes and 24 to 40 in the hash: 45 MB for a full table of 2^18 rows. Memory is taken as
    rows are used.

    Args:
        vocab_size: V.
        rows: R, most bigrams kept.
    """

    def __init__(self, vocab_size: int, rows: int):
        self.vocab_size = vocab_size
        self.rows = _new(rows)

    @property
    def filled(self) -> bool:
        return bool(self.rows.clock[0])

    def arrays(self) -> dict[str, np.ndarray]:
        """Rows in use, least recently written first."""
        order = np.argsort(self.rows.age[: self.rows.clock[0]], kind="stable")
        return {name: getattr(self.rows, name)[order] for name in ("key", "used", "token", "weight", "mass")}

    def facts(self) -> dict[str, Any]:
        return {"slots": SLOTS}

    def fill(self, arrays: dict[str, np.ndarray], facts: dict[str, Any]) -> None:
        key, used, token, weight, mass = (arrays[name] for name in ("key", "used", "token", "weight", "mass"))
        n, most = len(key), len(self.rows.key)
        if facts["slots"] != SLOTS:
            raise ValueError(f"it holds slots={facts['slots']} successors per bigram, this drafter {SLOTS}")
        if n > most:
            raise ValueError(f"it holds {n} bigrams, this drafter rows={most}; ask for more rows")
        for name, array, shape in [("key", key, (n,)), ("used", used, (n,)), ("mass", mass, (n,))] + [
            (name, array, (n, SLOTS)) for name, array in (("token", token), ("weight", weight))
        ]:
            want = getattr(self.rows, name).dtype
            if array.shape != shape or array.dtype != want:
                raise ValueError(f"{name} is {array.dtype} {array.shape}, not {want} {shape}")
        if n and (key.min() < 0 or key.max() >= self.vocab_size**2 or len(np.unique(key)) < n):
            raise ValueError("a key is no bigram, or stands twice")
        if n and (used.min() < 1 or used.max() > SLOTS):
            raise ValueError(f"a row has fewer than 1 or more than {SLOTS} successors")
        real = np.arange(SLOTS) < used[:, None]  # [n, S]
        if not ((token >= 0) & (token < self.vocab_size))[real].all():
            raise ValueError("a successor is no token id")
        ids = np.sort(np.where(real, token, -1 - np.arange(SLOTS)), axis=1)
        if (ids[:, 1:] == ids[:, :-1]).any():
            raise ValueError("a successor stands twice in a row")
        if not (np.isfinite(weight) & (weight > 0))[real].all() or not (np.isfinite(mass) & (mass > 0)).all():
            raise ValueError("a weight or a mass is not a positive number")
        if (weight[:, 1:] > weight[:, :-1])[real[:, 1:]].any():
            raise ValueError("the successors of a row are not ordered by weight")
        rows = _new(most)
        for name, array in (("key", key), ("used", used), ("token", token), ("weight", weight), ("mass", mass)):
            getattr(rows, name)[:n] = array
        rows.age[:n] = np.arange(n)
        rows.clock[0] = rows.clock[2] = n
        _index(rows)
        self.rows = rows

    def merge(self, other: TrigramTable) -> None:
        """Join the rows of two tables.

        A bigram in both gets the mean of the two rows' weights, weighted by their masses, of which the 16 heaviest
        stay; its mass is the sum. A bigram only in ``other`` is added, most written first, while there is room, and
        counts as older than everything here.
        """
        order = np.argsort(-other.rows.mass[: other.rows.clock[0]], kind="stable")
        _merge(self.rows, other.rows, order)

    def feed(
        self, tokens: np.ndarray, first: int, special: np.ndarray, keep: float, add: float, cap: float = np.inf
    ) -> None:
        """Learn every triple (a, b, c) whose c stands at position ``first`` or later.

        The row of (a, b) is multiplied by ``keep``, then w(c) = min(w(c) + add, cap). With keep = 1 - eta and
        add = eta this is an exponential moving average, and no row ever sums to more than 1.

        Args:
            tokens: int64 [n].
            special: bool [V]; triples with one of these are left out.
        """
        _feed(self.rows, tokens, first, special, keep, add, cap)

    def count(self, tokens: np.ndarray, special: np.ndarray) -> None:
        """Count every triple of a document, int64 [n]: w(c) becomes the share of c among all counted after (a, b).

        Keeps the 12 heaviest successors of the bigrams met, without renormalising. Rows cut short, or adapted by
        ``feed`` before, go on as the mean of what they were and what is new.
        """
        _count(self.rows, tokens, special)

    def blend(
        self,
        contexts: np.ndarray,
        successors: np.ndarray,
        chances: np.ndarray,
        special: np.ndarray,
        keep: float,
        add: float,
        cap: float = np.inf,
    ) -> None:
        """As ``feed`` with several successors at once: w(c) = min(keep * w(c) + add * p(c), cap).

        Args:
            contexts: int64 [n, 2], bigrams.
            successors: int64 [n, m].
            chances: float32 [n, m], p.
            special: bool [V]; bigrams with one of these are left out, and so are successors.
        """
        _blend(self.rows, contexts, successors, chances, special, keep, add, cap)


def _new(rows: int) -> Rows:
    entries = 1 << int(np.ceil(np.log2(rows / 0.6)))
    return Rows(
        entry_key=np.zeros(entries, dtype=np.int64),
        entry_row=np.zeros(entries, dtype=np.int32),
        key=np.zeros(rows, dtype=np.int64),
        used=np.zeros(rows, dtype=np.int32),
        token=np.zeros((rows, SLOTS), dtype=np.int32),
        weight=np.zeros((rows, SLOTS), dtype=np.float32),
        mass=np.zeros(rows, dtype=np.float32),
        age=np.zeros(rows, dtype=np.int64),
        clock=np.zeros(3, dtype=np.int64),
    )


@njit
def _home(key: int, entries: int) -> int:
    """Where the search for a key starts: splitmix64's finaliser."""
    x = np.uint64(key)
    x = (x ^ (x >> _30)) * _A
    x = (x ^ (x >> _27)) * _B
    return int(np.int64((x ^ (x >> _31)) & np.uint64(entries - 1)))


@njit
def _entry(t: Rows, key: int) -> int:
    """The entry that holds a key, or the empty one where it belongs."""
    entries = len(t.entry_key)
    i = _home(key, entries)
    while t.entry_key[i] != 0 and t.entry_key[i] != key + 1:
        i = (i + 1) & (entries - 1)
    return i


@njit
def find(t: Rows, key: int) -> int:
    """The row of a bigram, -1 if it has none."""
    i = _entry(t, key)
    return int(t.entry_row[i]) if t.entry_key[i] else -1


@njit
def _forget(t: Rows, key: int) -> None:
    """Take a key out of the hash and close the gap: entries probed past it move back."""
    entries = len(t.entry_key)
    gap = _entry(t, key)
    i = gap
    while True:
        i = (i + 1) & (entries - 1)
        if t.entry_key[i] == 0:
            break
        home = _home(t.entry_key[i] - 1, entries)
        if ((i - home) & (entries - 1)) >= ((i - gap) & (entries - 1)):  # its search passes the gap
            t.entry_key[gap], t.entry_row[gap] = t.entry_key[i], t.entry_row[i]
            gap = i
    t.entry_key[gap] = 0


@njit
def _oldest(t: Rows) -> int:
    """The least recently written of the next few rows."""
    rows = len(t.key)
    oldest = t.clock[1]
    for i in range(1, min(_LOOKS, rows)):
        row = (t.clock[1] + i) % rows
        if t.age[row] < t.age[oldest]:
            oldest = row
    t.clock[1] = (t.clock[1] + _LOOKS) % rows
    return oldest


@njit
def _add_row(t: Rows, key: int) -> int:
    """An empty row for a key that has none."""
    if t.clock[0] < len(t.key):
        row = t.clock[0]
        t.clock[0] += 1
    else:
        row = _oldest(t)
        _forget(t, t.key[row])
    i = _entry(t, key)
    t.entry_key[i], t.entry_row[i] = key + 1, row
    t.key[row], t.used[row], t.mass[row], t.age[row] = key, 0, 0, 0
    return row


@njit
def _row_to_write(t: Rows, key: int) -> int:
    row = find(t, key)
    if row < 0:
        row = _add_row(t, key)
    t.clock[2] += 1
    t.age[row] = t.clock[2]
    return row


@njit
def _write(t: Rows, row: int, token: int, keep: float, add: float, cap: float) -> None:
    """Multiply a row by ``keep`` and add to one successor, which then moves to its place in the order."""
    token_of, weight = t.token[row], t.weight[row]
    n = t.used[row]
    at = -1
    for j in range(n):
        weight[j] *= keep
        if token_of[j] == token:
            at = j
    while n > 0 and weight[n - 1] < _NOTHING and at != n - 1:
        n -= 1
    t.used[row] = n
    if at < 0:
        if n < SLOTS:
            at = n
            t.used[row] = n + 1
        else:
            at = n - 1  # the lightest makes room
        weight[at] = 0
    new = np.float32(min(weight[at] + add, cap))
    while at > 0 and (weight[at - 1] < new or (weight[at - 1] == new and token_of[at - 1] > token)):
        token_of[at], weight[at] = token_of[at - 1], weight[at - 1]
        at -= 1
    token_of[at], weight[at] = token, new


@njit
def _feed(t: Rows, tokens: np.ndarray, first: int, special: np.ndarray, keep: float, add: float, cap: float) -> None:
    for i in range(max(first, 2), len(tokens)):
        a, b, c = tokens[i - 2], tokens[i - 1], tokens[i]
        if special[a] or special[b] or special[c]:
            continue
        row = _row_to_write(t, a * len(special) + b)
        _write(t, row, c, keep, add, cap)
        t.mass[row] += 1


@njit
def _count(t: Rows, tokens: np.ndarray, special: np.ndarray) -> None:
    for i in range(2, len(tokens)):
        a, b, c = tokens[i - 2], tokens[i - 1], tokens[i]
        if special[a] or special[b] or special[c]:
            continue
        row = _row_to_write(t, a * len(special) + b)
        # the mean of n one-hot rows and one more
        n = np.float64(t.mass[row])
        _write(t, row, c, n / (n + 1), 1 / (n + 1), np.inf)
        t.mass[row] += 1
    for i in range(1, len(tokens)):
        row = find(t, tokens[i - 1] * len(special) + tokens[i])
        if row >= 0:
            t.used[row] = min(t.used[row], CORPUS_SLOTS)


@njit
def _blend(
    t: Rows,
    contexts: np.ndarray,
    successors: np.ndarray,
    chances: np.ndarray,
    special: np.ndarray,
    keep: float,
    add: float,
    cap: float,
) -> None:
    for i in range(len(contexts)):
        a, b = contexts[i, 0], contexts[i, 1]
        if special[a] or special[b]:
            continue
        kept = keep  # the row decays once
        for j in range(successors.shape[1]):
            c, gain = successors[i, j], add * chances[i, j]
            if special[c] or gain < _NOTHING:
                continue
            row = _row_to_write(t, a * len(special) + b)
            _write(t, row, c, kept, gain, cap)
            t.mass[row] += chances[i, j]
            kept = 1.0


@njit
def _index(t: Rows) -> None:
    """Enter the rows in use into an empty hash."""
    for row in range(t.clock[0]):
        i = _entry(t, t.key[row])
        t.entry_key[i], t.entry_row[i] = t.key[row] + 1, row


@njit
def _merge(t: Rows, other: Rows, order: np.ndarray) -> None:
    token, weight = np.empty(2 * SLOTS, dtype=np.int64), np.empty(2 * SLOTS, dtype=np.float64)
    for theirs in order:
        row = find(t, other.key[theirs])
        if row < 0:
            if t.clock[0] == len(t.key):
                continue
            row = _add_row(t, other.key[theirs])
        mass = np.float64(t.mass[row]) + np.float64(other.mass[theirs])
        n = t.used[row]
        for j in range(n):
            token[j], weight[j] = t.token[row, j], t.weight[row, j] * t.mass[row] / mass
        for j in range(other.used[theirs]):
            at = 0
            while at < n and token[at] != other.token[theirs, j]:
                at += 1
            if at == n:
                token[n], weight[n] = other.token[theirs, j], 0.0
                n += 1
            weight[at] += other.weight[theirs, j] * other.mass[theirs] / mass
        t.used[row], t.mass[row] = 0, mass
        for j in range(n):
            if t.used[row] < SLOTS or weight[j] > t.weight[row, SLOTS - 1]:
                _write(t, row, token[j], 1.0, weight[j], np.inf)
