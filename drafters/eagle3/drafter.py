"""EAGLE-3: a layer drafts on its own states, a tree grown by its own confidence (Li et al., arXiv 2503.01840)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from specdec.cache import TreeCache
from specdec.contracts import Verdict
from specdec.drafters.eagle3.module import Eagle3 as Eagle3Head
from specdec.errors import UsageError
from specdec.heads import Head, HeadDrafter
from specdec.heads.growth import Growth
from specdec.state import DecodeState
from specdec.structure import Tap
from specdec.target import StepOutput, Target
from specdec.tree import DraftTree, Proposal

_SLACK = 1024  # columns allocated beyond the prompt at first


class Eagle3(HeadDrafter[Eagle3Head]):
    """Drafts level by level with one layer, whose cache holds real features of the target and nothing it drafted.

    The pair of index i, (g_i, x_{i+1}), is fed when the target has committed both; drafts are fed in columns that are
    dropped afterwards. Beyond the positions its checkpoint was made for it drafts nothing.

    Shapes: B rows, n columns, W frontier width, d the layer's hidden size.

    Args:
        checkpoint, size: see ``HeadDrafter``.
        depth: deepest level of the tree; the draft layer runs once less (the official ``depth`` counts those runs).
        width: k, nodes expanded per level and children asked of each.
        chain: the likeliest token after each alone, as batched engines run it.

    Raises:
        UsageError: depth or width below 1, or a chain wider than 1.
    """

    name = "eagle3"
    summary = "one layer on fused target features drafts token by token, a tree grown by its confidence"
    head_class = Eagle3Head
    gpu_size = 60

    def __init__(
        self,
        checkpoint: Head | str | Path,
        size: int | None = None,
        depth: int | None = None,
        width: int | None = None,
        chain: bool = False,
    ):
        super().__init__(checkpoint, size)
        for name, value in (("depth", depth), ("width", width)):
            if value is not None and value < 1:
                raise UsageError(f"{name}={value} must be at least 1")
        if chain and width not in (None, 1):
            raise UsageError(f"width={width} is no chain; leave out one of width and chain")
        self._depth, self._width, self.chain = depth, width, chain

    def bind(self, target: Target) -> None:
        super().bind(target)
        cpu = target.device.type == "cpu"
        # on a CPU: the fastest of what was tried with the embedded model on training prompts
        self.width = self._width or (2 if cpu else 10)
        if self.chain or target.capability.tier != "tree":
            self.width = 1
        self.depth = min(self._depth or (3 if cpu else 8), self.size - 1)
        self.longest = self.head.midlayer.config.max_position_embeddings
        self.output = self.head.output()
        self._taps: list[Tap] = list(self.needs.layers) or ["final_hidden"]

    # ---- a request --------------------------------------------------------------------------------------------

    def begin(self, state: DecodeState) -> None:
        longest = max(row.max_length for row in state.rows)
        capacity = min(longest, max(len(row) for row in state.rows) + _SLACK) + self.width * self.depth
        self._cache = TreeCache(1, len(state.rows), capacity)
        self._rows = [row.index for row in state.rows]
        self._fed = [0] * len(state.rows)  # P, positions in the target's cache when it last saw it
        norm = self.head.norm.weight
        self._last = norm.new_zeros(len(state.rows), len(norm))  # a of every row's last position [B, d]

    def end(self, state: DecodeState) -> None:
        del self._cache, self._last

    def _align(self, state: DecodeState) -> None:
        """Drop the rows that have finished."""
        rows = [row.index for row in state.rows]
        if rows != self._rows:
            keep = [self._rows.index(r) for r in rows]
            self._cache.select(keep)
            self._fed, self._last, self._rows = [self._fed[i] for i in keep], self._last[keep], rows

    def observe(
        self,
        state: DecodeState,
        proposals: Sequence[Proposal | None],
        output: StepOutput,
        verdicts: Sequence[Verdict | None],
    ) -> None:
        """Feed the pairs of every position that entered the target's cache."""
        self._align(state)
        assert output.kept is not None
        cached = dict(zip(state.target.row_ids, state.target.lengths, strict=True))
        self._fed = [cached[row.index] for row in state.rows]
        counts = [len(columns) for columns in output.kept]
        n = max(counts)
        if n == 0 or min(self._fed) >= self.longest:
            return
        B, cache, device = len(counts), self._cache, self.target.device
        columns, tokens = np.zeros((2, B, n), dtype=np.int64)  # rows with fewer are padded on the right
        positions = np.array(self._fed)[:, None] - np.array(counts)[:, None] + np.arange(n)
        for b, (row, kept) in enumerate(zip(state.rows, output.kept, strict=True)):
            columns[b, : len(kept)] = kept
            following = row.tokens[self._fed[b] - len(kept) + 1 : self._fed[b] + 1]
            tokens[b, : len(following)] = following
        every = torch.arange(B, device=device)[:, None]
        index = torch.from_numpy(columns).to(device)
        g = self.head.fuse({tap: output.taps[tap][every, index] for tap in self._taps})  # [B, n, d]
        base = cache.width
        visible = torch.ones(n, base + n, dtype=torch.bool, device=device).tril_(base).expand(B, -1, -1)
        if B > 1:
            prefix = self._prefix()
            visible = visible & torch.cat([prefix, prefix.new_ones(B, 1, n)], dim=-1)
        a = self._extend(torch.from_numpy(tokens), g, torch.from_numpy(positions), visible)
        last = a[every[:, 0], torch.tensor(counts, device=device) - 1]
        if min(counts) == 0:  # rows that took no part keep theirs
            last = torch.where(torch.tensor(counts, device=device)[:, None] > 0, last, self._last)
        self._last = last
        cache.keep(base, [list(range(count)) for count in counts])

    def propose(self, state: DecodeState) -> list[Proposal | None]:
        self._align(state)
        roots = [int(row.tokens[-1]) for row in state.rows]
        proposals: list[Proposal | None] = [Proposal(DraftTree.root(root)) for root in roots]
        depth = min(self.depth, max(state.depth_left(b) for b in range(len(roots))))
        # it is behind where the prompt is unread, or where tokens were committed without a forward
        ready = [fed == len(row.tokens) - 1 < self.longest for fed, row in zip(self._fed, state.rows, strict=True)]
        if depth > 0 and any(ready):
            trees = self._grow(depth).trees(roots, self.size)
            proposals = [Proposal(t) if ok else p for t, ok, p in zip(trees, ready, proposals, strict=True)]
        return proposals

    def _grow(self, depth: int) -> Growth:
        """A tree of ``depth`` levels for every row."""
        head, cache, base = self.head, self._cache, self._cache.width
        states, hidden = head.finish(self._last)  # [B, d]
        growth = Growth(self.output(states), self.width, self.output.ids)
        W = growth.width
        hidden = hidden[:, None].expand(-1, W, -1)  # the parent's state: the root's for the first level
        prefix = self._prefix().expand(-1, W, -1)
        positions = torch.tensor(self._fed, device=self.target.device)[:, None].expand(-1, W)
        for level in range(depth - 1):
            visible = torch.cat([prefix, growth.visible], dim=-1)
            a = self._extend(growth.tokens, hidden, positions + level, visible)
            states, hidden = head.finish(a)  # [B, W, d]
            growth.extend(self.output(states))
            hidden = hidden.gather(1, growth.parent[..., None].expand_as(hidden))
        cache.crop_to(base)
        return growth

    def _extend(
        self, tokens: torch.Tensor, hidden: torch.Tensor, positions: torch.Tensor, visible: torch.Tensor
    ) -> torch.Tensor:
        self.forwards += 1
        device = self.target.device
        return self.head.extend(tokens.to(device), hidden, positions.to(device), self._cache, visible)

    def _prefix(self) -> torch.Tensor:
        """bool [B, 1, width]: the columns of the stable cache that are each row's own."""
        cache, device = self._cache, self.target.device
        lengths = torch.tensor(cache.lengths, device=device)
        return (torch.arange(cache.width, device=device) < lengths[:, None])[:, None]
