"""Tile sizes and splits of the decode kernel: a fixed rule, no measuring inside a request.

What the rule weighs. A step reads every visible key and value once per query tile, so one tile should hold all
``group * C`` query rows of a key head where registers allow. At few rows and a long prefix there are too few tiles to
fill the chip, so the prefix is split among programs (Flash-Decoding); every split writes a partial result of 4-byte
numbers, which must stay small beside the keys and values it has read.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.util import find_spec

import torch

# no more columns of one forward than this go through the kernel: beyond it a step is a prefill, which other kernels
# do better
MAX_COLUMNS = 256


@dataclass(frozen=True)
class Chip:
    """What the rule needs to know of a device.

    Attributes:
        units: streaming multiprocessors.
        shared: bytes of shared memory one program may use.
    """

    units: int
    shared: int

    @staticmethod
    @cache
    def of(device: torch.device) -> Chip:
        if device.type != "cuda":
            return Chip(units=8, shared=99 * 1024)  # the interpreter's; small, so that tests see splits
        p = torch.cuda.get_device_properties(device)
        return Chip(p.multi_processor_count, getattr(p, "shared_memory_per_block_optin", 99 * 1024))


@dataclass(frozen=True)
class Config:
    """One launch: query rows and key columns per tile, programs per query tile, warps, pipeline stages."""

    block_m: int
    block_n: int
    splits: int
    warps: int
    stages: int


def padded(head_dim: int) -> int:
    """Width of a tile of heads: a power of two that tensor cores take."""
    return max(16, 1 << (head_dim - 1).bit_length())


def tiles(chip: Chip, query_rows: int, head_dim: int, itemsize: int) -> tuple[int, int, int, int]:
    """block_m, block_n, warps and stages for ``group * C`` query rows.

    Wider tiles than these spill registers on sm_80 or sm_90.
    """
    wide = padded(head_dim)
    if itemsize == 4:
        # float32 runs on the ordinary units, whose dot products keep whole operand tiles in registers
        return (16, 32, 4, 1) if wide <= 64 else (16, 16, 4 if wide <= 128 else 8, 2)
    block_m = min(128 if wide in (64, 128) else 64, max(16, 1 << (query_rows - 1).bit_length()))
    block_n = 64 if wide <= 64 else 32
    warps = 8 if block_m * max(wide, 128) > 64 * 128 else 4
    stage = 2 * block_n * wide * itemsize
    fixed = block_m * (wide + block_n) * itemsize
    # two programs per multiprocessor hide more latency than a deeper pipeline in one
    stages = max(n for n in (2, 3) if n == 2 or fixed + n * stage <= chip.shared // 2)
    return block_m, block_n, warps, stages


@lru_cache(maxsize=256)
def choose(
    chip: Chip, rows: int, kv_heads: int, group: int, columns: int, reach: int, head_dim: int, itemsize: int
) -> Config:
    """The launch for B ``rows`` of C ``columns`` over prefixes of at most ``reach`` visible columns."""
    block_m, block_n, warps, stages = tiles(chip, group * columns, head_dim, itemsize)
    programs = rows * kv_heads * -(-group * columns // block_m)
    wanted = 2 * chip.units // programs  # two per multiprocessor
    # a partial result is block_m * D * 4 bytes written and read again; so many columns make it a quarter of the keys
    # and values the split has read in half precision
    least = max(2 * block_n, 4 * block_m)
    return Config(block_m, block_n, max(1, min(wanted, reach // least, 128)), warps, stages)


def unavailable(device: torch.device) -> str | None:
    """Why no kernel of this package runs on ``device``; None when they do. TRITON_INTERPRET=1 runs them on a CPU."""
    if device.type != "cuda" and not (device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return f"it runs on CUDA devices, not on {device.type}"
    return _missing(device)


@cache
def _missing(device: torch.device) -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed; pip install triton"
    if device.type == "cuda" and torch.version.hip:
        return "it has not been tried on ROCm"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return f"it needs compute capability 8.0, {torch.cuda.get_device_name(device)} has less"
    return None
