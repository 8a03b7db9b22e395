"""Random problems for the tree attention kernel, on the interpreter or a GPU, and what must hold on each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from specdec.tree_attention import reference
from specdec.tree_attention.config import Config
from specdec.tree_attention.decode import tree_attention
from specdec.tree_attention.step import Step

LIMIT = {torch.float32: 2e-6, torch.float16: 5e-3, torch.bfloat16: 1e-2}


@dataclass
class Case:
    """One random problem. ``lengths`` are committed columns per row, the base is the largest plus ``gap``."""

    lengths: Sequence[int] = (70, 3)
    columns: int = 5
    group: int = 2
    kv_heads: int = 1
    dim: int = 16
    value_dim: int | None = None  # the same
    dtype: torch.dtype = torch.float32
    gap: int = 0
    earlier: int = 0
    window: int | None = None
    chunk: int | None = None
    softcap: float | None = None
    sinks: bool = False
    config: Config | None = None
    seed: int = 0
    device: str = "cpu"


def check(case: Case) -> None:
    """The kernel agrees with the reference in float64 and defines every output, whatever unseen columns hold."""
    g = torch.Generator().manual_seed(case.seed)
    rows, c, e, base = len(case.lengths), case.columns, case.earlier, max(case.lengths) + case.gap
    heads, s, capacity = case.group * case.kv_heads, e + c, base + e + c + 7
    block = torch.rand(rows, c, s, generator=g) < 0.4
    block[:, range(c), range(e, s)] = True
    lengths = torch.tensor(case.lengths)[:, None]
    depth = torch.arange(s) // 2
    positions = lengths + depth
    if c > 1:  # one row's last column is padding: it sees itself only and stands at 0
        block[0, -1] = False
        block[0, -1, -1] = True
        positions[0, -1] = 0
    block, positions = block.to(case.device), positions.to(case.device)
    step = Step.build(
        case.lengths, base, block, positions[:, e:], case.window, case.chunk, positions[:, :e] if e else None
    )
    query = torch.randn(rows, c, heads, case.dim, generator=g).transpose(1, 2).to(case.device, case.dtype)
    # scores of a few units, so that softmax and softcap have something to do
    key = 2 * torch.randn(rows, case.kv_heads, capacity, case.dim, generator=g)
    value = torch.randn(rows, case.kv_heads, capacity, case.value_dim or case.dim, generator=g)
    seen = step.visible().any(dim=1)  # [B, base + S]
    seen[:, base:] = True  # a step's columns are finite, seen or not
    unseen = torch.cat([~seen, seen.new_ones(rows, 7)], dim=1)[:, None, :, None]
    key, value = (t.to(case.device).masked_fill(unseen, float("nan")).to(case.dtype) for t in (key, value))
    sinks = (torch.randn(heads, generator=g) * 3).to(case.device) if case.sinks else None
    options = {"scale": case.dim**-0.5, "softcap": case.softcap, "sinks": sinks}
    out = torch.full((rows, c, heads, value.shape[3]), float("nan"), dtype=case.dtype, device=case.device)
    got = tree_attention(query, key, value, step, out=out, config=case.config, **options).double()
    want = reference.tree_attention(query.double(), key.double(), value.double(), step, **options)
    assert got.isfinite().all()
    assert float((got - want).abs().max() / want.abs().max()) < LIMIT[case.dtype]


def launch(block_n: int = 32, splits: int = 1, block_m: int = 16) -> Config:
    return Config(block_m, block_n, splits, warps=4, stages=1)
