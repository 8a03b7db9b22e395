"""The Jacobi window: N - 1 levels of guesses about the text ahead, each a step older than the next.

The window is a matrix. Level l, column j stands at the position of the current token + l + j; level 0, column 0 is the
current token. A cell was predicted from the cell of the level above in the column to the right one step earlier, which
now stands in its own column: so a column, read downwards and continued by the newest prediction, is an n-gram.

Shapes: L levels, C columns (W of them once warm), N n-gram size.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from specdec.tree import ProbeLayout, Probes


@cache
def layout(levels: int, columns: int) -> ProbeLayout:
    """The window [L, C] as probes under the root, row by row, without the current token.

    Level 0 is a text: it sees the columns before it. A deeper cell sees level 0 up to its column, its own column on the
    levels between, and itself. ``kind`` is the level.
    """
    see = np.zeros((levels, columns, levels, columns), dtype=bool)
    for level in range(levels):
        for column in range(columns):
            see[level, column, 0, : column + 1] = True
            see[level, column, : level + 1, column] = True
    size = levels * columns
    rows, cols = np.divmod(np.arange(1, size), columns)
    return ProbeLayout(
        anchor=np.zeros(size - 1, dtype=np.int64),
        offset=rows + cols,
        see=np.ascontiguousarray(see.reshape(size, size)[1:, 1:]),
        kind=rows,
    )


def most_probes(ngram: int, width: int) -> int:
    """The most probes of any step; narrow windows of many levels are widest while they warm up."""
    return max(s * (width + ngram - 1 - s) - 1 for s in range(1, ngram))


class Window:
    """One row's window.

    Args:
        ngram: N >= 3.
        width: W >= 1.
        random: its own generator.
        source: int64 [n], tokens that random guesses are taken from.

    Attributes:
        cells: int64 [L, C]. The first step has one level of W + N - 2 columns; each step of the warm-up adds a level
            and drops a column, until there are N - 1 levels of W columns.
    """

    def __init__(self, ngram: int, width: int, random: np.random.Generator, source: np.ndarray):
        self._levels, self._random, self._source = ngram - 1, random, source
        self.cells = self._draw(width + ngram - 2)[None]

    def _draw(self, count: int) -> np.ndarray:
        return self._source[self._random.integers(len(self._source), size=count)]

    def probes(self, current: int) -> Probes:
        """The window hung under the current token."""
        self.cells[0, 0] = current
        return Probes(layout(*self.cells.shape), self.cells.ravel()[1:].copy())

    @property
    def read(self) -> int:
        """How many predictions ``advance`` wants: those of the last so many probes."""
        levels, columns = self.cells.shape
        return columns if levels == self._levels else columns - 1

    def advance(self, predicted: np.ndarray, ends: np.ndarray) -> np.ndarray | None:
        """Move on by one column.

        Args:
            predicted: int64 [``read``], the target's argmax after the last ``read`` probes.
            ends: int64 [e], end tokens. They close an n-gram, but inside the window nothing sensible follows them, so
                there a random token takes their place.

        Returns:
            int64 [W, N] n-grams, C-contiguous; None while warming up.
        """
        if len(self.cells) < self._levels:
            self.cells = np.vstack([self.cells[:, 1:], self._without(predicted, ends)])
            return None
        ngrams = np.ascontiguousarray(np.vstack([self.cells, predicted]).T)
        self.cells = np.vstack([self.cells[1:], self._without(predicted, ends)])
        return ngrams

    def _without(self, predicted: np.ndarray, ends: np.ndarray) -> np.ndarray:
        over = np.isin(predicted, ends)
        return np.where(over, self._draw(len(predicted)), predicted) if over.any() else predicted
