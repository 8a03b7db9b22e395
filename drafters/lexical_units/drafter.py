"""Lexical unit decoding: a model trained to fill placeholders drafts from its own confidence (arXiv 2405.15208)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from specdec.contracts import Drafter, Verdict
from specdec.drafters.lexical_units.units import Units
from specdec.errors import CompatibilityError, UsageError
from specdec.heads.static import StaticTree
from specdec.state import DecodeState, Row
from specdec.structure import Needs
from specdec.target import StepOutput, Target
from specdec.tree import DraftTree, ProbeLayout, Probes, Proposal

MODES = ("lossless", "trusting")
CANDIDATES = 4  # per placeholder
# Columns are dear on a CPU. With the embedded model on training prompts, at 5 % of a step each, tokens per forward over
# cost were 1.24 for (K, size, anchors) = (2, 2, 2), 1.20 for (3, 3, 1), 1.16 for (4, 4, 1), 1.09 for (4, 6, 2).
CPU_K, CPU_SIZE, CPU_ANCHORS = 2, 2, 2
GPU_SIZE = 16


class LexicalUnits(Drafter):
    """Placeholders behind the text predict the tokens after the next one, in the same forward.

    The model was changed by its training, so everything here is relative to the TRAINED model, not to its base.
    "lossless": what placeholders predict becomes a tree, which the next forward verifies while placeholders under the
    tree's nodes predict on. "trusting" is the paper's own decoding and LOSSY: predicted tokens are committed unverified
    as long as the model gives each at least ``beta``, up to the first that fails. With beta > 1 that is plain decoding.
    When sampling, only the token after each such run is drawn; those in it are the likeliest ones.

    Args:
        units: folder (or hub id) with the trained model's ``lexical_units.json``; None: the one the model came from.
        mode: "lossless" or "trusting".
        K: most tokens decided per forward, at most what the model was trained for; None: that, or 2 for "lossless" on
            a CPU.
        beta: trusting: least probability, at temperature 1, of a trusted token; None: what calibration chose.
        guard: trusting: trust no token that repeats the 1, 2 or 3 tokens before it; None: as trained.
        size: lossless: most nodes of a tree, root included; None: 2 on a CPU, 16 on a GPU.
        anchors: lossless: how many nodes carry placeholders, the likeliest to be the last accepted. A step that ends
            at another is followed by one without drafts. None: every node on a GPU, 2 on a CPU.

    Raises:
        UsageError: unknown mode, a value out of range, or an option of the other mode.
    """

    name = "lexical-units"
    summary = "the target, trained for it, predicts several tokens at placeholders; lossy with mode=trusting"
    training = "specdec train"
    requires = "a target trained with `specdec train lexical-units`"
    needs = Needs(final_hidden=True)

    def __init__(
        self,
        units: Units | str | Path | None = None,
        mode: Literal["lossless", "trusting"] = "lossless",
        K: int | None = None,
        beta: float | None = None,
        guard: bool | None = None,
        size: int | None = None,
        anchors: int | None = None,
    ):
        if mode not in MODES:
            raise UsageError(f"mode={mode!r} must be one of {', '.join(MODES)}")
        foreign = {"size": size, "anchors": anchors} if mode == "trusting" else {"beta": beta, "guard": guard}
        for name, value in foreign.items():
            if value is not None:
                raise UsageError(f"{name}={value} does nothing with mode={mode!r}; leave it out")
        for name, least in {"K": 2, "size": 1, "anchors": 1}.items():
            if (value := locals()[name]) is not None and value < least:
                raise UsageError(f"{name}={value} must be at least {least}")
        if beta is not None and not beta > 0:
            raise UsageError(f"beta={beta} must be above 0; above 1 nothing is trusted")
        self.mode, self.lossless = mode, mode == "lossless"
        self._units, self._K, self._beta, self._guard = units, K, beta, guard
        self._size, self._anchors = size, anchors

    def bind(self, target: Target) -> None:
        if target.capability.tier != "tree":
            raise CompatibilityError(
                f"lexical-units: placeholders need a model that can verify trees: {target.capability.reason}"
            )
        source = self._units or getattr(target.model.config, "_name_or_path", "") or "this model"
        units = source if isinstance(source, Units) else Units.read(source)
        if units.placeholder_id >= target.vocab_size:
            raise CompatibilityError(
                f"lexical-units: its placeholder is token {units.placeholder_id}, this model has {target.vocab_size}; "
                f"load the model that was trained ({units.base})"
            )
        if self._K is not None and self._K > units.K:
            raise UsageError(f"K={self._K}: the model was trained for units of at most K={units.K} tokens")
        self.target, self.units = target, units
        self.beta = units.beta if self._beta is None else self._beta
        self.guard = units.guard if self._guard is None else self._guard
        cpu = target.device.type == "cpu"
        self.K = self._K or (min(units.K, CPU_K) if cpu and self.lossless else units.K)
        self.size = 1 if not self.lossless else self._size or (CPU_SIZE if cpu else GPU_SIZE)
        self.anchors = min(self._anchors or (CPU_ANCHORS if cpu else self.size), self.size)
        self.budget = self.size + self.anchors * (self.K - 1)

    # ---- a request ------------------------------------------------------------------------------------------------

    def begin(self, state: DecodeState) -> None:
        if not self.lossless and (state.record_scores or state.record_logits):
            raise UsageError("output_scores and output_logits: trusted tokens have none; use mode='lossless'")
        self._probes: dict[int, Probes] = {}  # row -> what this step carries
        self._trees: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # row -> candidates and probabilities [k, R]
        self._spans: dict[int, list[int]] = {}  # row -> tokens to be trusted

    def end(self, state: DecodeState) -> None:
        self._probes, self._trees, self._spans = {}, {}, {}

    def propose(self, state: DecodeState) -> list[Proposal | None]:
        return [self._row(row, state.depth_left(b)) for b, row in enumerate(state.rows)]

    def _row(self, row: Row, left: int) -> Proposal:
        span = self._spans.pop(row.index, [])[:left]
        left -= len(span)
        root = span[-1] if span else int(row.tokens[-1])
        tree, nodes = DraftTree.root(root), [0]
        if row.index in self._trees:
            ids, chances = self._trees.pop(row.index)
            shape = StaticTree(chances[:left].tolist(), self.size)
            if len(shape.topology) > 1:
                tree = shape.fill(root, ids)
                nodes = np.sort(np.argsort(-shape.last(), kind="stable")[: self.anchors]).tolist()
        self._probes.pop(row.index, None)
        steps = min(self.K - 1, left - 1)  # they predict below the next root, at least one token further
        if steps < 1:
            return Proposal(tree, trusted=span)
        layout = groups(tuple(nodes), steps)
        probes = self._probes[row.index] = Probes(layout, np.full(len(layout), self.units.placeholder_id))
        return Proposal(tree, probes, span)

    def observe(
        self,
        state: DecodeState,
        proposals: Sequence[Proposal | None],
        output: StepOutput,
        verdicts: Sequence[Verdict | None],
    ) -> None:
        """Read the placeholders behind every row's last token in the cache."""
        rows: list[Row] = []
        hidden: list[torch.Tensor] = []
        for b, (row, proposal, verdict) in enumerate(zip(state.rows, proposals, verdicts, strict=True)):
            probes = self._probes.get(row.index)
            if verdict is None or row.done or probes is None or proposal is None or proposal.probes is not probes:
                continue  # a chunk of the prompt, or another drafter's step
            place = np.flatnonzero(probes.layout.anchor == verdict.kept[-1] - output.root[b])
            if len(place):
                rows.append(row)
                hidden.append(output.probe_hidden("final_hidden", b)[place])  # [k, d]
        if not rows:
            return
        logits = self.target.logits(torch.cat(hidden))  # [sum k, V]
        logits[:, self.units.placeholder_id] = -torch.inf
        best = logits.softmax(-1).topk(min(CANDIDATES, logits.shape[-1]), dim=-1)
        chances, ids = best.values.cpu().numpy(), best.indices.cpu().numpy()
        stop = 0
        for row, h in zip(rows, hidden, strict=True):
            mine = slice(stop, stop := stop + len(h))
            if self.lossless:
                self._trees[row.index] = ids[mine], chances[mine]
            else:
                self._spans[row.index] = self._trusted(row, state.eos, ids[mine, 0], chances[mine, 0], logits[mine])

    def _trusted(
        self, row: Row, eos: frozenset[int], ids: np.ndarray, chances: np.ndarray, logits: torch.Tensor
    ) -> list[int]:
        """The confident tokens [a <= k] of likeliest tokens and their probabilities [k], from raw logits [k, V]."""
        span: list[int] = []
        tokens = row.tokens[-6:].tolist()
        for token, chance, z in zip(ids.tolist(), chances.tolist(), logits, strict=True):
            if chance < self.beta or (self.guard and repeats([*tokens, *span, token])):
                break
            # penalties and bans of the request may want another token: that is for the model to say
            if row.sampler.processors and row.sampler.argmax(row.sampler.scores(row.after(span), z)) != token:
                break
            span.append(token)
            if token in eos:
                break
        return span


def repeats(tokens: Sequence[int]) -> bool:
    """Whether the last 1, 2 or 3 tokens repeat those before them: placeholders do not see one another's answers."""
    return any(len(tokens) >= 2 * g and tokens[-g:] == tokens[-2 * g : -g] for g in (1, 2, 3))


@cache
def groups(nodes: tuple[int, ...], steps: int) -> ProbeLayout:
    """``steps`` placeholders behind each node, group by group; kind = number in the group, from 1."""
    kind = np.tile(np.arange(1, steps + 1), len(nodes))
    see = np.kron(np.eye(len(nodes), dtype=bool), np.tri(steps, dtype=bool))
    return ProbeLayout(np.repeat(nodes, steps), kind, see, kind)
