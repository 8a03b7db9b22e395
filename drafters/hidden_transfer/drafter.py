"""Hidden transfer: drafts read off pseudo columns of the target's own forward (Wu et al., arXiv 2404.12022)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from specdec.contracts import Verdict
from specdec.drafters.hidden_transfer.module import HiddenTransfer as TransferMaps
from specdec.errors import CompatibilityError, UsageError
from specdec.heads import Head, HeadDrafter
from specdec.heads.static import StaticTree, acceptance_table
from specdec.state import DecodeState, Row
from specdec.structure import Needs, decoder_layers
from specdec.target import StepOutput, Target
from specdec.tree import DraftTree, ProbeLayout, Probes, Proposal

MODES = ("one-pass", "two-pass")
# On a CPU columns cost more than a step without drafts now and then: in trees of 8 nodes of the embedded model, on
# training prompts, 1, 2 and 8 anchors gave 1.05, 1.04 and 0.92 times generate()'s tokens per second, two passes 0.78.
CPU_ANCHORS = 1


def second_pass(head: TransferMaps, target: Target, sources: dict[int, Tensor], steps: int) -> Tensor:
    """Pseudo columns of each row's last cached token alone, in scratch columns behind the committed text.

    Exactly what a step would compute for them beside its tree: they read the same keys and values.

    Args:
        sources: per transfer layer the residual stream [B, d] of the last cached tokens of all rows, entering it.
        steps: k <= K, columns per row.

    Returns:
        logits [B, k, V].
    """
    rows = len(target.lengths)
    positions = torch.tensor(target.lengths)[:, None] + torch.arange(steps)  # the last cached token's + 1, + 2, ...
    if target.context is not None:
        positions.clamp_(max=target.context - 1)
    visible = torch.from_numpy(head.layout([0], steps).see).expand(rows, -1, -1)

    def enter(layer: int, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        pseudo = (args[0] if args else kwargs["hidden_states"]).transpose(0, 1)  # [k, B, d]
        x = head.inject(layer, sources[layer], pseudo).transpose(0, 1)
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

    layers = decoder_layers(target.model)
    handles = [layers[at].register_forward_pre_hook(partial(enter, at), with_kwargs=True) for at in sources]
    run, target.run = target.run, target.model  # compiled steps would run without these hooks
    try:
        with target.scratch():
            return target.forward(torch.zeros_like(positions), positions, visible)
    finally:
        target.run = run
        for handle in handles:
            handle.remove()


class HiddenTransfer(HeadDrafter[TransferMaps]):
    """Drafts the top candidates of K pseudo columns of the last token in the cache, on a static tree.

    The last token is known only after verification. "one-pass" hangs pseudo columns under the nodes that may turn out
    to be it; "two-pass" runs the K columns of the accepted node in a forward of their own.

    Args:
        checkpoint, size: see ``HeadDrafter``.
        mode: "one-pass" or "two-pass".
        anchors: one-pass: how many nodes carry pseudo columns, the likeliest to be the last accepted. A step that ends
            at another is followed by one without drafts. None: every node on a GPU, 1 on a CPU.

    Raises:
        UsageError: unknown mode; anchors below 1, or given with two-pass.
    """

    name = "hidden-transfer"
    summary = "pseudo tokens injected into the target's middle layers, a static tree of their candidates"
    head_class = TransferMaps
    gpu_size = 24  # with pseudo columns under every node, 96 columns for K = 3

    def __init__(
        self,
        checkpoint: Head | str | Path,
        size: int | None = None,
        mode: Literal["one-pass", "two-pass"] = "one-pass",
        anchors: int | None = None,
    ):
        super().__init__(checkpoint, size)
        if mode not in MODES:
            raise UsageError(f"mode={mode!r} must be one of {', '.join(MODES)}")
        if anchors is not None and (anchors < 1 or mode != "one-pass"):
            raise UsageError(f"anchors={anchors} must be at least 1, and goes with mode='one-pass' only")
        self.mode, self._asked = mode, anchors

    @property
    def needs(self) -> Needs:  # type: ignore[override]
        layers = tuple(sorted(set(self.head.config.transfer_layers)))
        return self.head.needs if self.mode == "one-pass" else Needs(layers=layers)

    def bind(self, target: Target) -> None:
        super().bind(target)
        if self.mode == "two-pass" and target.ranks is not None:
            raise CompatibilityError(
                "mode='two-pass' hooks the layers of one rank alone; use mode='one-pass' with a sharded model"
            )
        K = self.head.depths
        acceptance = [row[: target.vocab_size] for row in acceptance_table(self.head.config.acceptance, K)]
        self._trees = [StaticTree(acceptance[:depth], self.size) for depth in range(K + 1)]  # by greatest depth
        self._width = max(tree.width for tree in self._trees)
        self._layouts: dict[tuple[int, int], ProbeLayout] = {}
        if self.mode == "one-pass" and self.size > 1:
            self.anchors = min(self._asked or (CPU_ANCHORS if target.device.type == "cpu" else self.size), self.size)
            self.budget = self.size + self.anchors * K

    # ---- a request ------------------------------------------------------------------------------------------------

    def begin(self, state: DecodeState) -> None:
        self._ids: dict[int, np.ndarray] = {}  # row -> int64 [k, R], the candidates of every depth
        self._probes: dict[int, Probes] = {}  # one-pass: what this step carries
        self._sources: dict[int, dict[int, Tensor]] = {}  # two-pass: see ``second_pass``, a row's own [d]

    def end(self, state: DecodeState) -> None:
        self.begin(state)

    def propose(self, state: DecodeState) -> list[Proposal | None]:
        if self.mode == "two-pass" and self.size > 1:
            self._draft(state)
        return [self._row(state, b) for b in range(len(state.rows))]

    def _row(self, state: DecodeState, b: int) -> Proposal:
        row, left = state.rows[b], state.depth_left(b)
        ids = self._ids.get(row.index)
        depth = 0 if ids is None else min(left, len(ids))
        root = int(row.tokens[-1])
        tree = self._trees[depth].fill(root, ids) if ids is not None and depth else DraftTree.root(root)
        steps = min(self.head.depths, left - 1)  # they draft below the next root, at least one token further
        self._probes.pop(row.index, None)
        if self.mode == "two-pass" or self.size == 1 or steps < 1:
            return Proposal(tree)
        layout = self._layout(depth, steps)
        probes = self._probes[row.index] = Probes(layout, np.full(len(layout), root))
        return Proposal(tree, probes)

    def _layout(self, depth: int, steps: int) -> ProbeLayout:
        """Pseudo columns under the likeliest last nodes of the tree of that depth."""
        if (depth, steps) not in self._layouts:
            likeliest = np.argsort(-self._trees[depth].last(), kind="stable")[: self.anchors]
            self._layouts[depth, steps] = self.head.layout(np.sort(likeliest), steps)
        return self._layouts[depth, steps]

    def _draft(self, state: DecodeState) -> None:
        """Two-pass: the candidates of every row that has moved on since they were last made."""
        rows = [row for b, row in enumerate(state.rows) if row.index in self._sources and state.depth_left(b) > 0]
        if not rows:
            return
        steps = min(self.head.depths, max(state.depth_left(b) for b in range(len(state.rows))))
        other = self._sources[rows[0].index]  # for rows of the cache that need nothing
        each = [self._sources.get(index, other) for index in self.target.row_ids]
        sources = {at: torch.stack([x[at] for x in each]) for at in other}  # [B, d]
        logits = second_pass(self.head, self.target, sources, steps)  # [B, k, V]
        self.forwards += 1
        for row in rows:
            del self._sources[row.index]
        self._keep(rows, logits[[self.target.row_ids.index(row.index) for row in rows]].unbind())

    def _keep(self, rows: Sequence[Row], logits: Sequence[Tensor]) -> None:
        """Candidates from the rows' logits [k, V]; one read from the device."""
        ids = torch.cat(list(logits)).topk(self._width, dim=-1).indices.cpu().numpy()
        stop = 0
        for row, z in zip(rows, logits, strict=True):
            start, stop = stop, stop + len(z)
            self._ids[row.index] = ids[start:stop]

    def observe(
        self,
        state: DecodeState,
        proposals: Sequence[Proposal | None],
        output: StepOutput,
        verdicts: Sequence[Verdict | None],
    ) -> None:
        """One-pass: read the pseudo columns of every row's last token in the cache. Two-pass: keep what makes them."""
        rows: list[Row] = []
        hidden: list[Tensor] = []
        for b, (row, proposal, verdict) in enumerate(zip(state.rows, proposals, verdicts, strict=True)):
            if verdict is None:
                continue
            self._ids.pop(row.index, None)
            if self.mode == "two-pass":
                self._sources[row.index] = {at: output.kept_hidden(at, b)[-1] for at in self.needs.layers}
                continue
            probes = self._probes.get(row.index)
            if row.done or probes is None or proposal is None or proposal.probes is not probes:
                continue  # a chunk of the prompt, or another drafter's step: the next one drafts nothing
            layout, node = probes.layout, verdict.kept[-1] - output.root[b]
            n = len(layout) // (int(layout.kind[-1]) + 1)
            place = np.flatnonzero(layout.anchor[:n] == node)
            if len(place):
                rows.append(row)
                hidden.append(output.probe_hidden("final_hidden", b)[place[0] : len(layout) : n])  # [k, d]
        if rows:
            logits = self.target.logits(torch.cat(hidden))
            self._keep(rows, logits.split([len(h) for h in hidden]))
