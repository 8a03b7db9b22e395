"""A recorder that keeps the rules of CUDA graphs on a CPU.

What is recorded is every operation with its very tensors; a replay repeats them into the same memory, after all that
memory was poisoned. So a number from the host, a tensor made anew for each step, or a result kept from the recording
shows.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from specdec import compiling, graphs
from specdec.tree_attention import registration

aten = torch.ops.aten
HOST_READS = {
    aten._local_scalar_dense.default: "a number is read from the device",
    aten.item.default: "a number is read from the device",
    aten.is_nonzero.default: "a number is read from the device",
    aten.equal.default: "a number is read from the device",
    aten.nonzero.default: "the shape depends on numbers",
    aten.lift_fresh.default: "a tensor is made of numbers of the host",
}


class Tape(TorchDispatchMode):
    """Runs operations and keeps them."""

    running: Tape | None = None

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], tuple, dict, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        by_mask = func is aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1])
        if func in HOST_READS or by_mask:
            raise RuntimeError(f"{func}: {HOST_READS.get(func, HOST_READS[aten.nonzero.default])}")
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for _, *given, out in self.calls:
            for t in self._new(given, out):
                t.fill_(float("nan") if t.is_floating_point() else 77)
        for func, args, kwargs, out in self.calls:
            made = func(*args, **kwargs)
            for old, new in zip(self._new((args, kwargs), out), self._new((args, kwargs), made), strict=True):
                old.copy_(new)

    @staticmethod
    def _new(given: Any, out: Any) -> list[torch.Tensor]:
        """Results in memory of their own, which is neither a view of an argument nor an argument changed in place."""
        before = {t.untyped_storage().data_ptr() for t in tree_leaves(given) if isinstance(t, torch.Tensor)}
        results = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        return [t for t in results if t.untyped_storage().data_ptr() not in before]


def record(run: Callable[[], Any], device: torch.device, pool: Any) -> tuple[Any, Callable[[], None]]:
    """``graphs.record`` without a GPU."""
    run()
    tape = Tape()
    Tape.running = tape
    try:
        with tape:
            outputs = run()
    finally:
        Tape.running = None
    return outputs, tape.replay


def install(monkeypatch: pytest.MonkeyPatch, kernel: Callable[..., torch.Tensor]) -> None:
    """Make graphs possible here, with ``kernel`` as tree attention."""
    monkeypatch.setattr(graphs, "record", record)
    monkeypatch.setattr(compiling, "_obstacle", lambda target, how: None)

    def attend(query: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        """A kernel reads memory by address, so the tape sees nothing of it: one entry for all it does."""
        with _disable_current_modes() if Tape.running else nullcontext():
            out = kernel(query, *arguments, **options)
        if Tape.running is not None:
            Tape.running.calls.append((kernel, (query, *arguments), options, out))
        return out

    monkeypatch.setattr(registration, "tree_attention", attend)
