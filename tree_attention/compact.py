"""Moving the accepted columns of a step to their place, for all layers at once.

Committed columns are copied one by one per layer otherwise, with a gather and a scatter for keys and for values: four
launches and two small transfers per layer. Here one launch serves every layer of one shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch

from specdec.tree_attention.config import unavailable


def compact(buffers: Sequence[torch.Tensor], pairs: Sequence[Sequence[tuple[int, int]]]) -> bool:
    """Copy columns of every buffer in place, if there is a kernel for its device.

    Args:
        buffers: keys and values of all layers, each [B, H, capacity, D]; D contiguous.
        pairs: K (source, target) columns per row of B, with ``target <= source`` and both ascending, so that a source
            is never overwritten before it is read. A row may repeat its last pair to reach K, or hold (0, 0).

    Returns:
        False when nothing was done: the caller copies in torch.
    """
    if not buffers or unavailable(buffers[0].device):
        return False
    groups: dict[Any, list[torch.Tensor]] = {}
    for t in buffers:
        groups.setdefault((t.device, t.shape, t.stride(), t.element_size()), []).append(t)
    if not all(s[3] == 1 and works(device, shape[1], shape[3], size) for device, shape, s, size in groups):
        return False
    for group in groups.values():
        _launch(group, pairs)
    return True


@cache
def works(device: torch.device, heads: int, dim: int, itemsize: int) -> bool:
    """Whether the kernel moves columns of this kind rightly on this device; tried once, which also compiles it."""
    if unavailable(device) or itemsize not in (1, 2, 4):
        return False
    dtype = {1: torch.int8, 2: torch.int16, 4: torch.int32}[itemsize]
    columns = torch.arange(8, dtype=dtype, device=device)[None, None, :, None]
    buffers = [columns.repeat(2, heads, 1, dim) for _ in range(2)]
    try:
        _launch(buffers, [[(3, 2), (6, 3)], [(6, 5), (6, 5)]])
    except Exception:  # a compiler or driver: torch moves the columns instead
        return False
    want = torch.tensor([[0, 1, 3, 6, 4, 5, 6, 7], [0, 1, 2, 3, 4, 6, 6, 7]], dtype=dtype, device=device)
    return all(torch.equal(t, want[:, None, :, None].expand_as(t)) for t in buffers)


def _launch(group: Sequence[torch.Tensor], pairs: Sequence[Sequence[tuple[int, int]]]) -> None:
    """Move columns of buffers of one shape."""
    # triton is missing on some systems; there nobody gets this far
    from specdec.tree_attention.kernels import compact_kernel

    rows, heads, _, dim = group[0].shape
    flat = [column for row in pairs for pair in row for column in pair]
    # addresses and columns in one transfer
    sent = torch.tensor([t.data_ptr() for t in group] + flat).to(group[0].device)
    block_d = 1 << (dim - 1).bit_length()
    block_h = max(1, min(1 << (heads - 1).bit_length(), 1024 // block_d))
    with torch.cuda.device(sent.device) if sent.is_cuda else nullcontext():
        compact_kernel[(len(group), rows, -(-heads // block_h))](
            sent,
            sent[len(group) :],
            len(pairs[0]),
            *group[0].stride()[:3],
            heads,
            D=dim,
            BLOCK_D=block_d,
            BLOCK_H=block_h,
            BITS=8 * group[0].element_size(),
            num_warps=4,
            enable_fp_fusion=True,
        )
