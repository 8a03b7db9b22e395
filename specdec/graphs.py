"""Steps as CUDA graphs: recorded once per size, replayed as one launch.

On a GPU an eager step of a few columns costs what launching its hundreds of kernels costs. A graph launches them all at
once, but repeats them exactly: same shapes, same addresses, no number from the host. So columns are padded to a few
``SIZES``; keys and values stay in one cache that is used again by every request; and what a step is about (its tokens,
positions, lengths, tree) goes to the GPU in one transfer, into a tensor that the graph reads. Only the tree attention
kernel reads lengths and trees from the device, so models on stock attention have no graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from specdec.cache import TreeCache
from specdec.tree_attention.config import MAX_COLUMNS
from specdec.tree_attention.step import WORD, Step, StepMask

if TYPE_CHECKING:
    from specdec.structure import Tap
    from specdec.target import Target

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, MAX_COLUMNS)
_CAPACITY = 1024  # columns of the smallest cache

Outputs = tuple[torch.Tensor, "dict[Tap, torch.Tensor]"]


@dataclass
class _Inputs:
    """What one graph reads, as views of one flat tensor: on the device for the graph, in host memory to fill it.

    Attributes:
        flat: int64.
        ids, positions: int64 [B, C].
        at: int64 [C], columns of the cache where the step is written.
        extent: int64 [B, 2], see ``Step``.
        bits: int64 [B, C, W] per kind of layer.
        low: int32 [B, C] per kind of layer; None for layers that see the whole prefix.
    """

    flat: torch.Tensor
    ids: torch.Tensor
    positions: torch.Tensor
    at: torch.Tensor
    extent: torch.Tensor
    bits: list[torch.Tensor]
    low: list[torch.Tensor | None]

    @staticmethod
    def empty(rows: int, size: int, seen: int, windowed: list[bool], device: torch.device) -> _Inputs:
        columns, words = rows * size, -(-seen // WORD)
        sizes = [columns, columns, size, 2 * rows]
        for window in windowed:
            sizes += [columns * words, -(-columns // 2) if window else 0]  # two int32 in one int64
        flat = torch.zeros(sum(sizes), dtype=torch.int64, device=device)
        ids, positions, at, extent, *masks = flat.split(sizes)
        return _Inputs(
            flat,
            ids.view(rows, size),
            positions.view(rows, size),
            at,
            extent.view(rows, 2),
            [bits.view(rows, size, words) for bits in masks[::2]],
            [
                low.view(torch.int32)[:columns].view(rows, size) if window else None
                for low, window in zip(masks[1::2], windowed, strict=True)
            ],
        )


@dataclass
class _Graph:
    """One size, recorded: ``host`` goes to ``device``, ``replay`` computes ``outputs`` from it."""

    host: _Inputs
    device: _Inputs
    replay: Callable[[], None]
    outputs: Outputs


class Graphs:
    """The usual steps of a target, as graphs; its caches live here and serve one request after the other.

    Args:
        target: whose steps run on the tree attention kernel, with its taps installed.

    Attributes:
        count: graphs recorded so far.
    """

    def __init__(self, target: Target):
        self.target = target
        self.count = 0
        self._cache: TreeCache | None = None
        self._capacity = 0  # of the cache, when the graphs were recorded
        self._graphs: dict[tuple[int, int, int, bool], _Graph] = {}
        self._pool: Any = None

    def cache(self, rows: int, capacity: int) -> TreeCache:
        """An empty cache: the one before, at its addresses, if it is large enough."""
        kept = self._cache
        if kept is None or not kept.reopen(rows, capacity):
            self._graphs.clear()
            self._cache = kept = None  # its memory goes before more is taken
            most = 1 << (max(capacity, _CAPACITY) - 1).bit_length()  # the next, longer request finds room
            if self.target.context is not None:
                most = max(min(most, self.target.context + MAX_COLUMNS), capacity)
            # zeros: a graph reads columns that nobody sees, whose weight of 0 would not remove a NaN
            self._cache = kept = TreeCache(self.target.config.num_hidden_layers, rows, most, zeros=True)
        return kept

    def takes(self, cache: TreeCache, columns: int) -> bool:
        """Whether a step of so many columns may be a graph: of these caches, and not too wide for the kernel."""
        return cache is self._cache and columns <= MAX_COLUMNS

    def __call__(
        self,
        cache: TreeCache,
        ids: torch.Tensor,
        positions: torch.Tensor,
        block: torch.Tensor,
        earlier: torch.Tensor | None,
        tapped: bool,
    ) -> Outputs:
        """A step after a cached text; see ``Target._run``. Tensors are on the host.

        Returns:
            logits [B, C, V] and taps, which later steps leave alone.
        """
        rows, columns = ids.shape
        before = 0 if earlier is None else earlier.shape[1]  # E
        size = next(n for n in SIZES if n >= columns)
        # a tree that grows level by level is wider each time: whole words of it have few sizes
        seen = -(-(before + size) // WORD) * WORD if before else size
        cache.reserve(cache.width - before + seen)
        if cache.capacity != self._capacity:
            self._graphs.clear()
            self._capacity = cache.capacity
        key = (rows, size, seen, tapped)
        graph = self._graphs.get(key)
        if graph is None:
            start = perf_counter()
            graph = self._graphs[key] = self._record(cache, key, (ids, positions, block, earlier))
            self.count += 1
            done = self.target.compilation
            self.target.compilation = replace(done, seconds=done.seconds + perf_counter() - start)
        else:
            self._fill(graph.host, cache, ids, positions, block, earlier)
            graph.device.flat.copy_(graph.host.flat, non_blocking=True)  # staged before this returns: not pinned
        graph.replay()
        cache.crop_to(cache.width + columns)  # no layer has seen the columns come
        logits, taps = graph.outputs
        # the next replay overwrites them
        return logits[:, :columns].clone(), {tap: x[:, :columns].clone() for tap, x in taps.items()}

    def _kinds(self) -> list[tuple[int | None, int | None]]:
        """Window and chunk of each kind of layer."""
        return [self.target.reach(kind) for kind in self.target.layer_kinds]

    def _fill(
        self,
        inputs: _Inputs,
        cache: TreeCache,
        ids: torch.Tensor,
        positions: torch.Tensor,
        block: torch.Tensor,
        earlier: torch.Tensor | None,
    ) -> None:
        """Write a step into host memory. Padding sees itself and what its row has committed."""
        columns, size = ids.shape[1], len(inputs.at)
        before = block.shape[2] - columns
        inputs.flat.zero_()
        inputs.ids.numpy()[:, :columns] = ids
        inputs.positions.numpy()[:, :columns] = positions
        inputs.at.numpy()[:] = np.arange(cache.width, cache.width + size)
        extent = inputs.extent.numpy()
        base = cache.width - before
        extent[:, 0], extent[:, 1] = cache.lengths, base
        padding = np.arange(columns, size)
        for (window, chunk), bits, low in zip(self._kinds(), inputs.bits, inputs.low, strict=True):
            step = Step.build(cache.lengths, base, block, positions, window, chunk, earlier)
            words = bits.numpy()
            words[:, :columns, : step.bits.shape[2]] = step.bits
            words[:, padding, (before + padding) // WORD] = np.left_shift(1, (before + padding) % WORD)
            if low is not None:
                lowest = low.numpy()
                lowest[:, :columns] = step.low
                lowest[:, columns:] = extent[:, :1]  # nothing of the prefix: it would be read for nothing

    def _record(self, cache: TreeCache, key: tuple[int, int, int, bool], given: tuple[Any, ...]) -> _Graph:
        """Make a graph out of the step ``given``, which its replay then computes."""
        rows, size, seen, tapped = key
        target, kinds = self.target, self._kinds()
        shape = (rows, size, seen, [kind != (None, None) for kind in kinds])
        host = _Inputs.empty(*shape, device=torch.device("cpu"))
        device = _Inputs.empty(*shape, device=target.device)
        self._fill(host, cache, *given)
        device.flat.copy_(host.flat)
        masks = []
        for (window, chunk), bits, low in zip(kinds, device.bits, device.low, strict=True):
            # lengths are read on the device; those known here only say how wide a mask is and how many programs share
            # the work, and must do for every length
            reach = min(n + seen if n else cache.capacity for n in (window, chunk))
            masks.append(StepMask.of(Step(device.extent, bits, low, cache.capacity - seen, seen, reach)))
        inputs: dict[str, Any] = {
            "input_ids": device.ids,
            "position_ids": device.positions,
            "attention_mask": masks[0] if len(masks) == 1 else dict(zip(target.layer_kinds, masks, strict=True)),
            "past_key_values": cache,
            "use_cache": True,
        }
        if "logits_to_keep" in target.inputs:
            inputs["logits_to_keep"] = size
        cache.write_at(device.at)
        try:
            if self._pool is None and target.device.type == "cuda":
                self._pool = torch.cuda.graph_pool_handle()
            outputs, replay = record(lambda: target.tapped(inputs, tapped), target.device, self._pool)
        finally:
            cache.write_at(None)
        return _Graph(host, device, replay, outputs)


def record(run: Callable[[], Outputs], device: torch.device, pool: Any) -> tuple[Outputs, Callable[[], None]]:
    """What ``run`` returns, and a function that computes it again from what then stands in the tensors it reads.

    Graphs of one pool share memory: the outputs of one are overwritten when another is replayed.
    """
    with torch.cuda.device(device):
        stream, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(stream)
        with torch.cuda.stream(side):
            for _ in range(2):  # libraries set themselves up in their first calls, which must not be recorded
                run()
        stream.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            # other threads, a streamer's say, may use the GPU meanwhile
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                outputs = run()
        finally:
            torch.cuda.set_stream(stream)  # a recording that fails leaves its own behind
    return outputs, graph.replay
