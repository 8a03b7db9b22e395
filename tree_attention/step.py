"""What one step's attention needs to know, in a form that fits every kernel launch of the step.

A step's S columns stand in the cache from column ``base`` on: E earlier scratch columns (usually none), then the C
columns of this forward (pending, nodes, probes). They see the row's prefix, columns 0 to ``lengths[b]``, and each
other as bits say. Tree attention with a bit mask over the tree's part only is SpecInfer's (arXiv 2305.09781) and
Medusa's (arXiv 2401.10774).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

WORD = 64


@dataclass(frozen=True, eq=False)
class Step:
    """Visibility in one step, for layers of one kind (all of full attention, or all of one window).

    Attributes:
        extent: int64 [B, 2], committed columns of the row and the step's base column.
        bits: int64 [B, C, ceil(S / 64)], bit j % 64 of word j // 64 set when the query sees step column j. A window
            or chunk has been applied already.
        low: int32 [B, C], first prefix column (= position) the query sees; None when it sees them all.
        base: first step column in the cache.
        seen: S, step columns with keys.
        reach: the most prefix columns any query may see, known to the host: it decides on splits, never on results.
    """

    extent: torch.Tensor
    bits: torch.Tensor
    low: torch.Tensor | None
    base: int
    seen: int
    reach: int

    @staticmethod
    def build(
        lengths: Sequence[int],
        base: int,
        block: torch.Tensor,
        positions: torch.Tensor,
        window: int | None = None,
        chunk: int | None = None,
        earlier: torch.Tensor | None = None,
    ) -> Step:
        """The arguments of ``masks.step_mask``, packed.

        Both agree on every real column. A padding column sees itself and what a column right behind the row's prefix
        would see of the prefix, so its result is defined, cheap and never used.
        """
        s = block.shape[2]
        extent = torch.tensor([[length, base] for length in lengths], device=block.device)
        low, reach = None, base
        if window is not None or chunk is not None:
            keys = positions if earlier is None else torch.cat([earlier, positions], dim=1)
            q, k = positions[:, :, None], keys[:, None, :]
            # Padding has position 0. Left there, it would drag the whole prefix into every tile it shares.
            real = positions.maximum(extent[:, :1])
            low = torch.zeros_like(positions)
            if window is not None:
                block, low = block & (q - k < window), real - window + 1
                reach = min(reach, window + s)  # queries of one row stand at most S positions apart
            if chunk is not None:
                block, low = block & (q // chunk == k // chunk), low.maximum(real // chunk * chunk)
                reach = min(reach, chunk + s)
            low = low.to(torch.int32)
        return Step(extent, pack(block), low, base, s, reach)

    def visible(self) -> torch.Tensor:
        """bool [B, C, base + S]: the same as a dense mask."""
        columns = torch.arange(self.base, device=self.bits.device)
        prefix = columns < self.extent[:, None, :1]  # [B, 1, base]
        if self.low is not None:
            prefix = prefix & (columns >= self.low[:, :, None])
        return torch.cat([prefix.expand(*self.bits.shape[:2], -1), unpack(self.bits, self.seen)], dim=2)


def pack(block: torch.Tensor) -> torch.Tensor:
    """bool [..., S] to words int64 [..., ceil(S / 64)], column j at bit j % 64 of word j // 64."""
    words = -(-block.shape[-1] // WORD)
    padded = torch.nn.functional.pad(block, (0, words * WORD - block.shape[-1]))
    # bit 63 is the sign: the sum wraps round to it, since no bit is added twice
    return (padded.unflatten(-1, (words, WORD)) << _places(block.device)).sum(-1)


def unpack(bits: torch.Tensor, seen: int) -> torch.Tensor:
    """The inverse of ``pack``: bool [..., S]."""
    return ((bits[..., None] >> _places(bits.device)) & 1).bool().flatten(-2)[..., :seen]


def _places(device: torch.device) -> torch.Tensor:
    return torch.arange(WORD, device=device)


class StepMask(torch.Tensor):
    """A ``Step`` in the shape of an attention mask, so that models hand it down to the attention function untouched.

    The numbers are NaN in no memory (strides 0): whoever reads them as a mask gets a visibly wrong result or an
    error, never a quietly different one. Any operation on it gives an ordinary tensor, without the step, but one:
    taking some of its queries, as models do that compute their last layers for those alone (Gemma 4).
    """

    step: Step
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def of(step: Step) -> StepMask:
        """float32 [B, 1, C, base + S]."""
        rows, columns, _ = step.bits.shape
        nan = torch.full((1, 1, 1, 1), float("nan"), device=step.bits.device)
        mask = nan.expand(rows, 1, columns, step.base + step.seen).as_subclass(StepMask)
        mask.step = step
        return mask

    def __getitem__(self, index: Any) -> torch.Tensor:
        match index:
            case (slice() as rows, slice() as heads, slice() as queries, slice() as keys):
                if rows == heads == keys == slice(None):
                    low = None if self.step.low is None else self.step.low[:, queries].contiguous()
                    return StepMask.of(replace(self.step, bits=self.step.bits[:, queries].contiguous(), low=low))
        return super().__getitem__(index)
