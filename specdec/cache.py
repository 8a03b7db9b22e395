"""A preallocated key/value cache that takes trees: append in place, keep the accepted columns.

Columns of one forward are written at a common column ``width`` for all rows. ``keep`` then gathers each row's
accepted columns to that row's own length, so in the committed part a column number IS a position.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from specdec.tree_attention.compact import compact


class TreeLayer(CacheLayerMixin):
    """Keys and values of one layer, [B, H, capacity, D], of which ``width`` columns are valid."""

    is_sliding = False
    is_compileable = False
    is_croppable = True

    def __init__(self, capacity: int, zeros: bool = False):
        self._new = torch.zeros if zeros else torch.empty
        self.is_initialized = False  # not super().__init__(), which sets keys and values
        self.capacity, self.width = capacity, 0
        self.at: torch.Tensor | None = None  # see ``TreeCache.write_at``
        self._k: torch.Tensor
        self._v: torch.Tensor

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        self._k, self._v = (self._buffer(states) for states in (key_states, value_states))
        self.whole = self._k, self._v  # with the rows that were dropped

    def _buffer(self, like: torch.Tensor) -> torch.Tensor:
        return self._new(*like.shape[:2], self.capacity, like.shape[-1], dtype=like.dtype, device=like.device)

    @property
    def keys(self) -> torch.Tensor | None:
        """[B, H, width, D]; None before the first update."""
        return self._k[:, :, : self.width] if self.is_initialized else None

    @property
    def values(self) -> torch.Tensor | None:
        """[B, H, width, D]; None before the first update."""
        return self._v[:, :, : self.width] if self.is_initialized else None

    def reserve(self, columns: int) -> None:
        """Make room for so many columns in all."""
        if self.capacity >= columns:
            return
        while self.capacity < columns:
            self.capacity *= 2
        if self.is_initialized:
            grown = []
            for old in (self._k, self._v):
                new = self._buffer(old)
                new[:, :, : self.width] = old[:, :, : self.width]
                grown.append(new)
            self._k, self._v = self.whole = grown[0], grown[1]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.at is not None:
            self._k.index_copy_(2, self.at, key_states)
            self._v.index_copy_(2, self.at, value_states)
            return self._k, self._v
        start, end = self.width, self.width + key_states.shape[-2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.reserve(end)
        self._k[:, :, start:end] = key_states
        self._v[:, :, start:end] = value_states
        self.width = end
        return self._k[:, :, :end], self._v[:, :, :end]

    def buffers(self) -> tuple[torch.Tensor, ...]:
        """Keys and values [B, H, capacity, D]; nothing for a layer that shares another layer's keys."""
        return (self._k, self._v) if self.is_initialized else ()

    def move(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy columns ``source`` int64 [B, K] of every row to columns ``target`` [B, K]."""
        if not self.is_initialized:  # a layer that shares another layer's keys
            return
        source, target = source.to(self.device), target.to(self.device)
        for t in (self._k, self._v):
            if t.shape[0] == 1:
                t.index_copy_(2, target[0], t.index_select(2, source[0]))
            else:
                shape = (*t.shape[:2], source.shape[1], t.shape[-1])
                moved = t.gather(2, source[:, None, :, None].expand(shape))  # [B, H, K, D]
                t.scatter_(2, target[:, None, :, None].expand(shape), moved)

    def select(self, rows: torch.Tensor) -> None:
        """Keep only the batch rows ``rows`` int64, in that order. They stay at the addresses of the first rows."""
        if self.is_initialized:
            rows = rows.to(self.device)
            self._k, self._v = (t[: len(rows)].copy_(t.index_select(0, rows)) for t in (self._k, self._v))

    def reopen(self, rows: int) -> None:
        """Forget everything, and use the first ``rows`` of the rows that were there."""
        if self.is_initialized:
            self._k, self._v = (t[:rows] for t in self.whole)
        self.width = 0

    def get_seq_length(self, *args: Any) -> int:
        return self.width

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # the older name

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        n = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.width + n, 0

    def crop(self, tokens_to_remove: int) -> None:
        self.width += tokens_to_remove

    def reset(self) -> None:
        self.width = 0

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.select(beam_idx)


class TreeCache(Cache):
    """One ``TreeLayer`` per model layer, with a committed length per row.

    Args:
        num_layers: layers of the model.
        rows: batch rows B.
        capacity: columns allocated at first; doubled when they run out.
        zeros: columns that were never written hold zeros and not whatever memory held.

    Attributes:
        lengths: committed columns per row, B ints. Columns between a row's length and ``width`` are garbage that
            masks must hide.
    """

    def __init__(self, num_layers: int, rows: int, capacity: int, zeros: bool = False):
        super().__init__(layers=[TreeLayer(capacity, zeros) for _ in range(num_layers)])
        self.lengths = [0] * rows
        self.width = 0

    @property
    def capacity(self) -> int:
        """Columns there is room for."""
        return max(layer.capacity for layer in self.layers)

    def reserve(self, columns: int) -> None:
        """Make room for so many columns in all."""
        for layer in self.layers:
            layer.reserve(columns)

    def write_at(self, columns: torch.Tensor | None) -> None:
        """Let forwards write at ``columns`` int64 [C] and read the whole buffers, until this is called with None.

        Neither their kernels nor their addresses then depend on how full the cache is.
        """
        for layer in self.layers:
            layer.at = columns

    def reopen(self, rows: int, capacity: int) -> bool:
        """Empty it for ``rows`` new texts, where it is; False when it is too small."""
        whole = next((len(layer.whole[0]) for layer in self.layers if layer.is_initialized), 0)
        if rows > whole or capacity > self.capacity:
            return False
        for layer in self.layers:
            layer.reopen(rows)
        self.lengths, self.width = [0] * rows, 0
        return True

    def advance(self, columns: int) -> None:
        """Note that a forward has written ``columns`` more columns."""
        self.width += columns

    def crop_to(self, width: int) -> None:
        """Make the first ``width`` columns the valid ones."""
        self.width = width
        for layer in self.layers:
            layer.width = width

    def keep(self, base: int, kept: list[list[int]]) -> None:
        """Commit, for each row, the step columns ``kept[b]`` (relative to ``base``, ascending); drop the others.

        They move to the row's own length, in order, so that column = position holds again.
        """
        moves = [
            [(base + c, length + i) for i, c in enumerate(columns) if base + c != length + i]
            for length, columns in zip(self.lengths, kept, strict=True)
        ]
        longest = max(map(len, moves))
        if longest:
            # rows with fewer moves repeat one of theirs: one gather and one scatter serve all rows
            padded = [m + (m[-1:] or [(0, 0)]) * (longest - len(m)) for m in moves]
            if not compact([t for layer in self.layers for t in layer.buffers()], padded):
                pairs = torch.tensor(padded)  # [B, K, 2]
                for layer in self.layers:
                    layer.move(pairs[..., 0], pairs[..., 1])
        self.lengths = [length + len(columns) for length, columns in zip(self.lengths, kept, strict=True)]
        self.crop_to(max(self.lengths))

    def select(self, rows: list[int]) -> None:
        """Keep only the batch rows ``rows``."""
        index = torch.tensor(rows)
        for layer in self.layers:
            layer.select(index)
        self.lengths = [self.lengths[r] for r in rows]
        self.crop_to(max(self.lengths))
