"""The drafter: ask every member, merge, keep the nodes most likely to be accepted."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedModel

from specdec import registry
from specdec.contracts import Drafter, Verdict
from specdec.drafters.hybrid.mixture import Mixture, union
from specdec.errors import CompatibilityError, UsageError
from specdec.state import DecodeState
from specdec.structure import Needs
from specdec.tables.trees import select
from specdec.target import StepOutput, Target
from specdec.tree import DraftTree, Proposal, Topology

CPU_SIZE, GPU_SIZE = 12, 64
CPU_FLOOR, GPU_FLOOR = 0.08, 0.005  # a column costs more on a CPU, so it must promise more
_UNSURE = np.float32(0.5)  # prior of members that give none


class Hybrid(Drafter):
    """Several drafters at once; learns online what each one's nodes are worth and drafts the best of all.

    Every step each member proposes a tree. The trees are merged; a node's chance of acceptance is estimated from
    which members propose it and how sure they are, with estimates that follow what was accepted so far; the likeliest
    nodes fill the budget. What members cannot see of each other (probes) is left out.

    Args:
        members: names or ``Drafter`` objects, two to six, whose trees are looked up rather than drawn. A draft model
            may be among them ("draft-model", which then drafts its likeliest tokens, sampling or not).
        size: nodes per step, root included; also given to members named here that take a size. None: 64 on a GPU, 12 on
            a CPU.
        min_prob: chance below which a node is not drafted. None: 0.005 on a GPU, 0.08 on a CPU.
        scope: given to members named here that have a scope; see ``TableDrafter``.
        draft: given to members named here that draft with a model.
    """

    name = "hybrid"
    summary = "merges the trees of several drafters, and learns which of them pays"
    training = "online"

    def __init__(
        self,
        members: Sequence[str | Drafter] = ("suffix", "token-recycling"),
        size: int | None = None,
        min_prob: float | None = None,
        scope: Literal["shared", "request"] = "shared",
        draft: PreTrainedModel | str | Path | None = None,
    ):
        if isinstance(members, str) or not 2 <= len(members) <= 6:
            raise UsageError(f"members={members!r}: give two to six drafters")
        if size is not None and size < 2:
            raise UsageError(f"size={size} must be at least 2: the root and one drafted token")
        if min_prob is not None and not 0 <= min_prob < 1:
            raise UsageError(f"min_prob={min_prob} must be in [0, 1)")
        self.size, self.min_prob, self.scope, self._draft = size, min_prob, scope, draft
        self._chosen = members
        drafting = [m for m in members if isinstance(m, str) and "draft" in registry.options(registry.drafter_class(m))]
        if (draft is None) is bool(drafting):
            raise UsageError(
                f"members: {drafting[0]!r} drafts with a smaller model; give draft=..."
                if drafting
                else f"draft={draft!r}: none of the members {list(members)} drafts with a model; add 'draft-model'"
            )
        self.members = [m if isinstance(m, Drafter) else self._make(m, size or GPU_SIZE) for m in members]
        self._check()
        self.mixture = Mixture(len(self.members))
        self.budget = size or GPU_SIZE

    def _make(self, name: str, size: int) -> Drafter:
        taken = registry.options(registry.drafter_class(name))
        wanted: dict[str, Any] = {"size": size, "scope": self.scope, "min_prob": 0.0, "draft": self._draft}
        wanted["law"] = "point"  # drawn trees cannot be merged
        return registry.drafter(name, **{k: v for k, v in wanted.items() if k in taken})

    def _check(self) -> None:
        for member in self.members:
            if not member.lossless or isinstance(member, Hybrid):
                raise UsageError(f"members: {member.name!r} cannot be merged with others; leave it out")

    @property
    def forwards(self) -> int:  # type: ignore[override]
        return sum(m.forwards for m in self.members)

    @property
    def tolerates_gaps(self) -> bool:  # type: ignore[override]
        return all(m.tolerates_gaps for m in self.members)

    @property
    def warm(self) -> bool:
        return bool(self.mixture.tried.any()) or any(m.warm for m in self.members)

    def bind(self, target: Target) -> None:
        gpu = target.device.type == "cuda"
        size = self.size or (GPU_SIZE if gpu else CPU_SIZE)
        if size != self.budget:  # now that the device is known; what they have learned stays when bound again
            pairs = zip(self._chosen, self.members, strict=True)
            self.members = [self._make(c, size) if isinstance(c, str) else m for c, m in pairs]
            self.budget = size
        self._floor = self.min_prob if self.min_prob is not None else (GPU_FLOOR if gpu else CPU_FLOOR)
        for member in self.members:
            member.bind(target)
        self._compile()
        self.needs = reduce(or_, (m.needs for m in self.members), Needs())
        self.wishes = reduce(or_, (m.wishes for m in self.members), Needs())

    def _compile(self) -> None:
        toy, two = Mixture(2), np.array([-1, 0])
        prior = np.ones(2, dtype=np.float32)
        parents, tokens, raw = union([(two, two, prior), (two, two, prior)])
        select(parents, tokens, toy.priors(parents, raw), two[:0], 1, 2, 0.0)
        toy.learn(parents, tokens, raw, two)

    def reset(self) -> None:
        for member in self.members:
            member.reset()
        self.mixture = Mixture(len(self.members))

    def begin(self, state: DecodeState) -> None:
        self._ends = np.array(sorted(state.eos), dtype=np.int64)
        self._unions: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        for member in self.members:
            member.begin(state)

    def end(self, state: DecodeState) -> None:
        for member in self.members:
            member.end(state)

    def propose(self, state: DecodeState) -> list[Proposal | None]:
        everyone = [member.propose(state) for member in self.members]
        return [self._merge(state, b, [theirs[b] for theirs in everyone]) for b in range(len(state.rows))]

    def _merge(self, state: DecodeState, b: int, proposals: Sequence[Proposal | None]) -> Proposal:
        row = state.rows[b]
        trees = []
        for member, proposal in zip(self.members, proposals, strict=True):
            if proposal is None or proposal.tree is None:
                tree = DraftTree.root(int(row.tokens[-1]))
            else:
                tree = proposal.tree
            if tree.law is not None and tree.law[1:].any():
                raise CompatibilityError(
                    f"members: {member.name!r} draws its tokens when the request samples, and drawn trees cannot be "
                    "pruned; use its law 'point' or leave it out"
                )
            prior = tree.prior if tree.prior is not None else np.full(len(tree), _UNSURE)
            trees.append((tree.topology.above, tree.tokens, prior))
        parents, tokens, raw = self._unions[row.index] = union(trees)
        prior = self.mixture.priors(parents, raw)
        depth = state.depth_left(b)
        parents, tokens, prior = select(parents, tokens, prior, self._ends, depth, self.budget, self._floor)
        return Proposal(DraftTree(Topology(parents), tokens, prior=prior))

    def observe(
        self,
        state: DecodeState,
        proposals: Sequence[Proposal | None],
        output: StepOutput,
        verdicts: Sequence[Verdict | None],
    ) -> None:
        for member in self.members:
            member.observe(state, proposals, output, verdicts)
        for row, verdict in zip(state.rows, verdicts, strict=True):
            seen = self._unions.pop(row.index, None)
            if seen is not None and verdict is not None and verdict.emitted:
                self.mixture.learn(*seen, np.array(verdict.emitted, dtype=np.int64))
