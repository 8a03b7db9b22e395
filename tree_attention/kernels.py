"""Triton kernels. Their callers, with the shapes and the reasons, are ``decode`` and ``compact``.

Triton decides when a kernel is defined whether it is interpreted (TRITON_INTERPRET=1) or compiled, and is missing on
some systems: import this module where a kernel is launched, never at the top of another.
"""

# parameters of kernels have no Python types
# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl


@triton.jit
def _tanh(x):
    """tanh from exp2: there is no tanh without a vendor's library. A series near 0, where 1 - e would cancel."""
    a = tl.abs(x)
    e = tl.exp2(a * -2.8853900817779268)
    far = (1 - e) / (1 + e)
    near = a * (1 - a * a * (0.33333334 - a * a * (0.13333334 - a * a * 0.05396825)))
    t = tl.where(a < 0.2, near, far)
    return tl.where(x < 0, -t, t)


@triton.jit
def _fold(q, k, v, visible, acc, top, total, scale, cap, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
    """One tile of keys and values into the running softmax. Scores are in powers of 2.

    q [M, D], k [N, D], v [N, E], visible [M, N]; acc [M, E] and total [M] are relative to 2 ** top.
    """
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale  # [M, N]
    if SOFTCAP:
        s = cap * _tanh(s)
    s = tl.where(visible, s, float("-inf"))
    new = tl.maximum(top, tl.max(s, 1))
    # a row that has seen nothing yet: -inf - -inf would be NaN
    safe = tl.where(new == float("-inf"), 0.0, new)
    p = tl.exp2(s - safe[:, None])
    decay = tl.exp2(top - safe)
    total = total * decay + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
    return acc, new, total


@triton.jit(do_not_specialize=["columns", "seen", "splits"])
def decode_kernel(
    q,  # [B, Hq, C, D]
    k,  # [B, Hkv, capacity, D]
    v,  # [B, Hkv, capacity, E]
    out,  # [B, C, Hq, E], or float32 [B, C, Hq, splits, E]
    lse,  # float32 [B, C, Hq, splits] base-2 log-sum-exp of each split; None: one split, final result
    extent,  # int64 [B, 2]
    bits,  # int64 [B, C, W]
    low,  # int32 [B, C] or None
    sinks,  # [Hq] or None
    scale,
    cap,
    q_b,
    q_h,
    q_n,
    k_b,
    k_h,
    k_n,
    v_b,
    v_h,
    v_n,
    columns,
    seen,
    splits,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One query tile of one key head of one row, over one split of its columns.

    The columns to read are the visible part of the prefix followed by the step's own. They are dealt out in equal
    lots, in whole tiles, so that the last split has the step's columns and what is left of the prefix.
    """
    split = tl.program_id(1)
    # 64 bits: a cache may have more than 2 ** 31 elements
    b = (tl.program_id(2) // HEADS).to(tl.int64)
    h = (tl.program_id(2) % HEADS).to(tl.int64)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n, head = row // GROUP, h * GROUP + row % GROUP
    real = n < columns
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    inside, kept = d < D, e < E
    col = tl.arange(0, BLOCK_N)

    q_at = q + b * q_b + head[:, None] * q_h + n[:, None] * q_n + d[None, :]
    tile = tl.load(q_at, mask=real[:, None] & inside[None, :], other=0.0)  # [M, D]
    acc = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)

    length = tl.load(extent + 2 * b).to(tl.int32)
    base = tl.load(extent + 2 * b + 1)
    first = 0
    if low is not None:
        lowest = tl.load(low + b * columns + n, mask=real, other=2147483647)  # [M]
        first = tl.minimum(tl.maximum(tl.min(lowest, 0), 0), length)
    lot = tl.cdiv(tl.cdiv(length - first + seen, splits), BLOCK_N) * BLOCK_N
    start = tl.minimum(first + split * lot, length)
    stop = tl.minimum(start + lot, length)

    k_tile = col[:, None] * k_n + d[None, :]
    v_tile = col[:, None] * v_n + e[None, :]
    k_at = k + b * k_b + h * k_h + start.to(tl.int64) * k_n
    v_at = v + b * v_b + h * v_h + start.to(tl.int64) * v_n
    for at in range(start, stop, BLOCK_N):
        exists = at + col < stop
        # columns beyond the prefix are not read: they may hold NaN, which a weight of 0 does not remove
        keys = tl.load(k_at + k_tile, mask=exists[:, None] & inside[None, :], other=0.0)
        values = tl.load(v_at + v_tile, mask=exists[:, None] & kept[None, :], other=0.0)
        visible = exists[None, :]
        if low is not None:
            visible = visible & (at + col[None, :] >= lowest[:, None])
        acc, top, total = _fold(tile, keys, values, visible, acc, top, total, scale, cap, SOFTCAP, PRECISION)
        k_at += BLOCK_N * k_n
        v_at += BLOCK_N * v_n

    if split == splits - 1:
        words = (seen + 63) // 64
        word_at = bits + (b * columns + n) * words
        k_at = k + b * k_b + h * k_h + base * k_n
        v_at = v + b * v_b + h * v_h + base * v_n
        for at in range(0, seen, BLOCK_N):
            exists = at + col < seen
            keys = tl.load(k_at + k_tile, mask=exists[:, None] & inside[None, :], other=0.0)
            values = tl.load(v_at + v_tile, mask=exists[:, None] & kept[None, :], other=0.0)
            # BLOCK_N divides 64, so one word holds all the tile's columns
            word = tl.load(word_at + at // 64, mask=real, other=0)  # [M]
            visible = ((word[:, None] >> (at % 64 + col)[None, :]) & 1) != 0
            acc, top, total = _fold(tile, keys, values, visible, acc, top, total, scale, cap, SOFTCAP, PRECISION)
            k_at += BLOCK_N * k_n
            v_at += BLOCK_N * v_n

    where = (b * columns + n) * (HEADS * GROUP) + head  # [M]
    if lse is None:
        if sinks is not None:
            sink = tl.load(sinks + head).to(tl.float32) * 1.4426950408889634
            new = tl.maximum(top, sink)
            decay = tl.exp2(top - new)
            total = total * decay + tl.exp2(sink - new)
            acc = acc * decay[:, None]
    else:
        where = where * splits + split
        tl.store(lse + where, tl.where(total > 0, top + tl.log2(total), float("-inf")), mask=real)
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    out_at = out + where[:, None] * E + e[None, :]
    tl.store(out_at, acc.to(out.dtype.element_ty), mask=real[:, None] & kept[None, :])


@triton.jit(do_not_specialize=["splits"])
def merge_kernel(
    part,  # float32 [B, C, Hq, splits, E]
    lse,  # float32 [B, C, Hq, splits]
    out,  # [B, C, Hq, E]
    sinks,  # [Hq] or None
    splits,
    HEADS: tl.constexpr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """One query's partial results, weighted by their share of the softmax's denominator."""
    row = tl.program_id(0).to(tl.int64)
    s, e = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_E)
    inside = e < E
    acc = tl.zeros([BLOCK_E], tl.float32)
    top = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    if sinks is not None:
        top = tl.load(sinks + row % HEADS).to(tl.float32) * 1.4426950408889634
        total = total + 1.0
    for at in range(0, splits, BLOCK_S):
        exists = at + s < splits
        log = tl.load(lse + row * splits + at + s, mask=exists, other=float("-inf"))  # [S]
        parts = tl.load(
            part + (row * splits + at + s)[:, None] * E + e[None, :],
            mask=exists[:, None] & inside[None, :],
            other=0.0,
        )
        new = tl.maximum(top, tl.max(log, 0))
        safe = tl.where(new == float("-inf"), 0.0, new)
        weight = tl.exp2(log - safe)
        decay = tl.exp2(top - safe)
        acc = acc * decay + tl.sum(parts * weight[:, None], 0)
        total = total * decay + tl.sum(weight, 0)
        top = new
    # every column sees itself, so total > 0
    tl.store(out + row * E + e, (acc / total).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["moves", "heads"])
def compact_kernel(
    table,  # int64 [buffers], addresses
    pairs,  # int64 [B, moves, 2], source and target
    moves,
    s_b,
    s_h,
    s_n,
    heads,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BITS: tl.constexpr,
):
    """Columns of a few heads of one row of one buffer, moved one after the other.

    No later source lies at or before an earlier target, but an earlier source may lie at a later target: overlapping
    moves are safe when each is finished before the next begins.
    """
    # numbers are copied as bits, whatever they mean
    kind: tl.constexpr = tl.int8 if BITS == 8 else tl.int16 if BITS == 16 else tl.int32
    b = tl.program_id(1).to(tl.int64)
    h = tl.program_id(2) * BLOCK_H + tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_D)
    mask = (h < heads)[:, None] & (d < D)[None, :]
    buffer = tl.load(table + tl.program_id(0)).to(tl.pointer_type(kind)) + b * s_b
    at = h.to(tl.int64)[:, None] * s_h + d[None, :]
    pair = pairs + b * moves * 2
    for i in range(moves):
        source = tl.load(pair + 2 * i)
        target = tl.load(pair + 2 * i + 1)
        column = tl.load(buffer + at + source * s_n, mask=mask)
        tl.store(buffer + at + target * s_n, column, mask=mask)
        tl.debug_barrier()  # another thread may have read what the next move overwrites
