"""The part of a drafter that keeps a table: whose it is, how long it lives, how it is saved."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, Protocol, TypeVar

import numpy as np

from specdec.contracts import Drafter
from specdec.errors import UsageError
from specdec.state import DecodeState, Row
from specdec.tables import store
from specdec.target import Target


class Table(Protocol):
    """What a method keeps, in flat arrays."""

    @property
    def filled(self) -> bool:
        """Whether anything has been learned."""

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything that is saved."""

    def facts(self) -> dict[str, Any]:
        """Numbers the arrays cannot be read without (JSON)."""

    def fill(self, arrays: dict[str, np.ndarray], facts: dict[str, Any]) -> None:
        """Replace the contents by saved ones.

        Everything is checked, indices too: compiled loops do not look before they read. Raises ValueError, with the
        reason, for contents that do not fit this table; nothing is changed then.
        """

    def merge(self, other: Any) -> None:
        """Take over what another table of the same facts has learned."""


T = TypeVar("T", bound=Table)


class TableDrafter(Drafter, Generic[T]):
    """A drafter with a table.

    Args:
        scope: "shared": one table for all rows and requests of this object; "request": every row starts from the
            loaded table (or none) and forgets at its end, so that no text influences another's speed.
        table: file to start from, made by ``save`` or ``specdec table build``.

    Attributes:
        table: the shared table, once bound.
    """

    training: ClassVar[str] = "online"
    _target: Target

    def __init__(self, scope: Literal["shared", "request"] = "shared", table: str | Path | None = None):
        if scope not in ("shared", "request"):
            raise UsageError(f"scope={scope!r} must be 'shared' or 'request'")
        self.scope, self._source = scope, table
        self._table: T | None = None
        self._own: dict[int, T] = {}

    @abstractmethod
    def empty(self) -> T:
        """A table that knows nothing, for the bound target."""

    @abstractmethod
    def compile(self) -> None:
        """Call every compiled function once, on a toy table: no request waits for a compiler."""

    @abstractmethod
    def learn_document(self, tokens: np.ndarray) -> None:
        """What ``learn`` does once ``tokens`` int64 [n], n > 0, are known to be ids."""

    @property
    def table(self) -> T:
        assert self._table is not None, "the table exists once the drafter is bound to a target"
        return self._table

    @property
    def warm(self) -> bool:
        return self._table is not None and self._table.filled

    def bind(self, target: Target) -> None:
        if self._table is not None and target.vocab_size != self._target.vocab_size:
            raise UsageError(
                f"{self.name}: its table is for {self._target.vocab_size} tokens, this model has {target.vocab_size}; "
                "make a new drafter for it"
            )
        self._target = target
        self.compile()
        if self._table is None:
            self.reset()

    def reset(self) -> None:
        """Forget everything learned since the file given as ``table``."""
        self._table = self.empty()
        if self._source is not None:
            self.load(self._source)

    def begin(self, state: DecodeState) -> None:
        self.ends = np.array(sorted(state.eos), dtype=np.int64)
        if self.scope == "request":
            self._own = {row.index: self._copy() for row in state.rows}

    def end(self, state: DecodeState) -> None:
        self._own = {}

    def table_of(self, row: Row) -> T:
        """The table this row reads and writes."""
        return self._own[row.index] if self._own else self.table

    def _copy(self) -> T:
        copy = self.empty()
        if self.table.filled:
            copy.fill({name: array.copy() for name, array in self.table.arrays().items()}, self.table.facts())
        return copy

    def learn(self, tokens: Any) -> None:
        """Learn from one document without a request.

        Args:
            tokens: ids [n].

        Raises:
            UsageError: an id outside the vocabulary.
        """
        ids = np.array(tokens, dtype=np.int64).reshape(-1)
        size = self._target.vocab_size
        if len(ids) and not 0 <= ids.min() <= ids.max() < size:
            raise UsageError(
                f"tokens: ids {ids.min()}..{ids.max()} are not all in 0..{size - 1}; encode with this model's tokenizer"
            )
        if len(ids):
            self.learn_document(ids)

    # ---- files ----------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the shared table; an earlier file survives anything that goes wrong.

        Raises:
            UsageError: nothing learned yet, no tokenizer, or a folder that cannot be written.
        """
        if not self.warm:
            raise UsageError(f"{self.name}: its table is empty, there is nothing to save; generate or learn first")
        store.write(path, self.name, self._print(), self._target.vocab_size, self.table.arrays(), self.table.facts())

    def load(self, path: str | Path) -> None:
        """Replace the shared table by a saved one.

        Raises:
            UsageError: no such file, damaged, another drafter's, or another tokenizer's.
        """
        self._table = self._read(path)

    def merge(self, path: str | Path) -> None:
        """Add what a saved table has learned to the shared one; raises UsageError as ``load`` does."""
        self.table.merge(self._read(path))

    def _read(self, path: str | Path) -> T:
        table = self.empty()
        arrays, facts = store.read(path, self.name, self._print(), self._target.vocab_size)
        try:
            table.fill(arrays, facts)
        except (ValueError, KeyError) as error:
            raise UsageError(f"table {str(path)!r}: does not fit this drafter ({error})") from error
        return table

    def _print(self) -> str:
        if self._target.tokenizer is None:
            raise UsageError(
                f"{self.name}: tables are saved and loaded together with a fingerprint of the tokenizer; "
                "pass Decoder(..., tokenizer=tokenizer)"
            )
        return store.fingerprint(self._target.tokenizer)
