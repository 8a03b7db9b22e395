"""The decode kernel: a step's columns attend to a long prefix and to each other, keys and values read in place.

Online softmax in tiles is FlashAttention's (arXiv 2205.14135); splitting the prefix among programs and merging their
partial results by log-sum-exp is Flash-Decoding's. The prefix needs no mask, only bounds; the step's own columns are
masked by 64-bit words. The query heads that share a key head are packed with the columns into one tile, row
``n * group + g``, so that tensor cores have something to do and keys are read once per group.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch

from specdec.errors import UsageError
from specdec.tree_attention.config import MAX_COLUMNS, Chip, Config, choose, padded
from specdec.tree_attention.step import Step

LOG2E = 1.4426950408889634


def tree_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    step: Step,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    config: Config | None = None,
) -> torch.Tensor:
    """``reference.tree_attention`` on a GPU: float16, bfloat16 or float32 in, sums in float32.

    Args:
        query: [B, Hq, C, D], C <= 256, D and E <= 256.
        key: [B, Hkv, capacity, D]; only the last dimension must be contiguous.
        value: [B, Hkv, capacity, E]; E is D but for multi-head latent attention.
        step: who sees whom.
        scale: scores are ``scale * q . k``.
        softcap: then ``softcap * tanh(score / softcap)``.
        sinks: [Hq].
        out: where to write, [B, C, Hq, E] contiguous; allocated when None.
        config: the launch, for tests and measurements; chosen by ``config.choose`` when None.

    Returns:
        [B, C, Hq, E] contiguous.

    Raises:
        UsageError: shapes or strides the kernel does not take.
    """
    rows, heads, columns, dim = query.shape
    kv_heads, value_dim = key.shape[1], value.shape[3]
    if key.shape[3] != dim or value.shape[1] != kv_heads or heads % kv_heads or max(dim, value_dim) > 256:
        raise UsageError(
            f"tree attention: query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} must "
            'have heads of at most 256 numbers and divide them evenly; use attn_implementation="sdpa"'
        )
    if columns > MAX_COLUMNS:
        raise UsageError(f"tree attention: {columns} columns in one step, the most is {MAX_COLUMNS}; send fewer")
    if key.stride(3) != 1 or value.stride(3) != 1:
        raise UsageError("tree attention: the last dimension of key and value must be contiguous")
    if query.stride(3) != 1:
        query = query.contiguous()
    # triton is missing on some systems; there nobody gets this far
    from specdec.tree_attention.kernels import decode_kernel, merge_kernel

    group = heads // kv_heads
    config = config or choose(
        Chip.of(query.device), rows, kv_heads, group, columns, step.reach, max(dim, value_dim), query.element_size()
    )
    if out is None:
        out = query.new_empty(rows, columns, heads, value_dim)
    splits = config.splits
    part, lse = out, None
    if splits > 1:
        part = query.new_empty(rows, columns, heads, splits, value_dim, dtype=torch.float32)
        lse = query.new_empty(rows, columns, heads, splits, dtype=torch.float32)
    grid = (-(-group * columns // config.block_m), splits, rows * kv_heads)
    # triton launches on the current device
    with torch.cuda.device(query.device) if query.is_cuda else nullcontext():
        decode_kernel[grid](
            query,
            key,
            value,
            part,
            lse,
            step.extent,
            step.bits,
            step.low,
            sinks if lse is None else None,
            scale * LOG2E if softcap is None else scale / softcap,
            0.0 if softcap is None else softcap * LOG2E,
            *query.stride()[:3],
            *key.stride()[:3],
            *value.stride()[:3],
            columns,
            step.seen,
            splits,
            HEADS=kv_heads,
            GROUP=group,
            D=dim,
            E=value_dim,
            BLOCK_D=padded(dim),
            BLOCK_E=padded(value_dim),
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            SOFTCAP=softcap is not None,
            PRECISION="ieee",
            num_warps=config.warps,
            num_stages=config.stages,
            enable_fp_fusion=True,
        )
        if lse is not None:
            merge_kernel[(rows * columns * heads,)](
                part,
                lse,
                out,
                sinks,
                splits,
                HEADS=heads,
                E=value_dim,
                BLOCK_E=padded(value_dim),
                BLOCK_S=16,
                num_warps=4,
                enable_fp_fusion=True,
            )
    return out
