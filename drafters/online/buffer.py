"""What requests leave behind for training: texts, the positions to learn, and what the target said there."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace

from torch import Tensor


@dataclass(frozen=True)
class Record:
    """One request's text. All tensors are on the CPU.

    Attributes:
        ids: int64 [T], prompt and answer without padding.
        positions: int64 [m], ascending: the tokens to be learned; what teaches ``ids[e]`` is the target's row after
            ``ids[:e]``.
        rows: per position [m, ...], see ``learner.DraftLearner``.
        taps: per token [T, d], see ``learner.HeadLearner``.
        born: when it was made, in seconds of a clock that never goes back.
    """

    ids: Tensor
    positions: Tensor
    rows: dict[str, Tensor] = field(default_factory=dict)
    taps: dict[str, Tensor] = field(default_factory=dict)
    born: float = 0.0

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.ids, self.positions, *self.rows.values(), *self.taps.values()))

    def last(self, length: int) -> Record:
        """The last ``length`` tokens of it; positions with nothing left before them go."""
        cut = len(self) - length
        if cut <= 0:
            return self
        kept = self.positions > cut
        return replace(
            self,
            ids=self.ids[cut:],
            positions=self.positions[kept] - cut,
            rows={name: row[kept] for name, row in self.rows.items()},
            taps={name: tap[cut:] for name, tap in self.taps.items()},
        )


class Buffer:
    """Records waiting for an update: bounded in number, bytes and age, and emptied when they are taken.

    Args:
        interval: records that make an update due.
        max_age: seconds after which a record makes an update due by itself.
        capacity: most records.
        max_bytes: most bytes. Beyond either, the oldest go.
    """

    def __init__(self, interval: int, max_age: float, capacity: int, max_bytes: int):
        self.interval, self.max_age, self.capacity, self.max_bytes = interval, max_age, capacity, max_bytes
        self.records: deque[Record] = deque()

    def __len__(self) -> int:
        return len(self.records)

    @property
    def nbytes(self) -> int:
        return sum(record.nbytes for record in self.records)

    def add(self, record: Record) -> None:
        """Append a record; one without positions teaches nothing and is left out."""
        if len(record.positions) == 0:
            return
        self.records.append(record)
        while len(self.records) > self.capacity or self.nbytes > self.max_bytes:
            self.records.popleft()

    def due(self, now: float) -> bool:
        """Whether there is enough, or something old enough, for an update."""
        return len(self.records) >= self.interval or any(now - r.born >= self.max_age for r in self.records)

    def expire(self, now: float) -> None:
        """Drop what is too old."""
        self.records = deque(r for r in self.records if now - r.born < self.max_age)

    def take(self) -> list[Record]:
        """All records; the buffer is empty afterwards."""
        records = list(self.records)
        self.records.clear()
        return records
