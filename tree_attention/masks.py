"""Dense attention masks of one step, for transformers' stock attention functions.

Columns of a step: C new ones after ``base`` cached ones. In row b the first ``lengths[b]`` cached columns are its
prefix, column j holding position j; cached columns from there to ``base`` are garbage.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def step_mask(
    lengths: Sequence[int],
    base: int,
    block: torch.Tensor,
    positions: torch.Tensor,
    window: int | None = None,
    chunk: int | None = None,
    earlier: torch.Tensor | None = None,
) -> torch.Tensor:
    """Which columns each new column attends to.

    Args:
        lengths: committed columns per row, B ints.
        base: cached columns of the forward (the largest row's, or more).
        block: bool [B, C, S], visibility of the new columns to S = E + C columns after the base: E earlier scratch
            columns (usually none), then themselves (padding sees itself).
        positions: int64 [B, C] of the new columns.
        window: sliding window in POSITIONS: key visible when q - k < window (tree slots are no distances).
        chunk: chunked attention: key visible when q // chunk == k // chunk.
        earlier: int64 [B, E] positions of the earlier scratch columns.

    Returns:
        bool [B, 1, C, base + S], True = attend.
    """
    rows, c, s = block.shape
    device = block.device
    mask = torch.empty(rows, 1, c, base + s, dtype=torch.bool, device=device)
    mask[:, 0, :, base:] = block
    if rows == 1 and lengths[0] == base:
        mask[..., :base] = True
    else:
        prefix = torch.arange(base, device=device) < torch.tensor(lengths, device=device)[:, None]  # [B, base]
        mask[..., :base] = prefix[:, None, None, :]
    # a column's own distance is 0, so these never hide a padding column from itself
    if window is not None and base + s > window:
        q, k = _queries_keys(positions, base, earlier)
        mask &= q - k < window
    if chunk is not None and base + s > chunk:
        q, k = _queries_keys(positions, base, earlier)
        mask &= q // chunk == k // chunk
    return mask


def _queries_keys(
    positions: torch.Tensor, base: int, earlier: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of queries [B, 1, C, 1] and of keys [B, 1, 1, base + S]."""
    prefix = torch.arange(base, device=positions.device).expand(len(positions), base)
    keys = torch.cat([prefix, positions] if earlier is None else [prefix, earlier, positions], dim=1)
    return positions[:, None, :, None], keys[:, None, None, :]


def additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The same mask as values to add to scores. finfo.min and not -inf: a row that sees nothing must not be NaN."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)
