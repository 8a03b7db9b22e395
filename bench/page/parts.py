"""What a page is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Table:
    """Text in cells.

    Attributes:
        caption: what it shows.
        headers: of the columns; the first column heads its rows.
        rows: as many cells as headers.
        note: what the columns mean.
        words: leading columns that hold words; the others hold figures, set to the right.
    """

    caption: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    words: int = 1


@dataclass(frozen=True)
class Picture:
    """A figure; ``text`` says what is to be seen to those who cannot see it."""

    name: str
    caption: str
    text: str
    figure: Figure


@dataclass
class Section:
    """What one file (and those beside it) says.

    Attributes:
        kind: the command that wrote it.
        title: what was measured.
        finding: the main result in a line.
        failed: it is evidence against us.
        parts: tables and pictures in the order of the page.
        notes: every caution of the source.
        missing: what the page would show if the source had it, and why it does not.
        provenance: name -> value.
        where: the file, relative to the folder of the page; filled in by ``discover``.
    """

    kind: str
    title: str
    finding: str
    failed: bool = False
    parts: list[Table | Picture] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    provenance: dict[str, str] = field(default_factory=dict)
    where: str = ""

    @property
    def tables(self) -> list[Table]:
        return [part for part in self.parts if isinstance(part, Table)]

    @property
    def pictures(self) -> list[Picture]:
        return [part for part in self.parts if isinstance(part, Picture)]
