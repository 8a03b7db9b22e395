"""Which drafter, how large a tree, compiled or not: predicted from few measurements, then checked.

A method's speed is the tokens its steps yield over what the steps cost, and the two are known from different places:
what N columns cost from the curve t(N), measured once per compile mode; what a step yields, how many columns it takes
and what drafting and verifying add from a short run of every candidate. Static trees are cut for these prompts: a run
with a wide tree tells how often each rank is accepted at each depth, and with that and t(N) the fastest tree is known.
Only the best candidates are then timed whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from specdec.bench.harness import Group
from specdec.contracts import Drafter
from specdec.decoder import Decoder
from specdec.stats import GenerationStats
from specdec.templates import best_first, chances
from specdec.tree import DraftTree

CPU_SIZES, GPU_SIZES = (4, 8, 16, 32), (16, 32, 64)
LENGTHS = (2, 4, 6)
WIDE = 64  # nodes of the tree that tells how often each rank is accepted
PRIOR = 8.0  # observations that a drafter's own estimate of that weighs as much as
FLOORS = (0.3,)  # least chance of a node that is drafted, besides the drafter's own


@dataclass(frozen=True)
class Candidate:
    """A drafter with the options that are tuned."""

    drafter: str
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def label(self) -> str:
        said = ("tree of its own" if name == "acceptance" else f"{name}={value:g}" for name, value in self.options)
        return " ".join([self.drafter, *said])


@dataclass
class Yield:
    """What a candidate's steps did on the calibration prompts.

    Attributes:
        columns: int64 [S], of every step that emitted, the first ones of prompts left out.
        tokens: int64 [S].
        other: seconds of all these steps outside the target's forward.
        prompts: seconds of all steps up to each prompt's first token.
        first: tokens of those.
    """

    columns: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    other: float = 0.0
    prompts: float = 0.0
    first: int = 0

    def add(self, stats: GenerationStats) -> None:
        """One request of one row."""
        started = False
        for step in stats.steps:
            made = sum(step.emitted) + step.trusted
            if not started:
                self.prompts += sum(step.seconds.values())
                self.first += made
                started = made > 0
                continue
            self.columns.append(step.columns)
            self.tokens.append(made)
            self.other += sum(step.seconds.values()) - step.seconds["forward"]

    @property
    def mat(self) -> float:
        return sum(self.tokens) / max(len(self.tokens), 1)

    def seconds_per_token(self, curve: Curve, prompts: float) -> float:
        """Predicted, with forwards as ``curve`` says; ``prompts``: what reading the prompts costs any method."""
        spent = prompts + self.other + float(curve(np.array(self.columns)).sum())
        return spent / (self.first + sum(self.tokens))


@dataclass(frozen=True)
class Curve:
    """t(N): seconds of a step of N columns, linear between what was measured."""

    columns: tuple[int, ...]
    seconds: tuple[float, ...]

    @classmethod
    def of(cls, points: Sequence[dict[str, Any]]) -> Curve:
        """From the points of ``specdec doctor``."""
        return cls(tuple(p["columns"] for p in points), tuple(p["seconds"] for p in points))

    def __call__(self, columns: np.ndarray) -> np.ndarray:
        """Seconds [S] of steps of so many columns; steps without a forward cost none."""
        slope = (self.seconds[-1] - self.seconds[-2]) / (self.columns[-1] - self.columns[-2])
        beyond = np.maximum(columns - self.columns[-1], 0) * slope
        return np.where(columns == 0, 0.0, np.interp(columns, self.columns, self.seconds) + beyond)


def grid(drafter: str, taken: dict[str, Any], gpu: bool) -> list[Candidate]:
    """The settings of one drafter that are tried; ``taken`` are the options it has."""
    if "size" in taken:
        floors = [(), *((("min_prob", floor),) for floor in FLOORS if "min_prob" in taken)]
        sizes = GPU_SIZES if gpu else CPU_SIZES
        return [Candidate(drafter, (("size", size), *floor)) for floor in floors for size in sizes]
    if "length" in taken:
        return [Candidate(drafter, (("length", length),)) for length in LENGTHS]
    return [Candidate(drafter)]


class RankCounts:
    """How often a node's r-th child turned out to be the target's token, per depth, while a drafter decodes.

    Attributes:
        hits, tried: float64 [D, R]. They begin as ``PRIOR`` observations of the drafter's own estimate.
    """

    def __init__(self) -> None:
        self.hits = self.tried = np.zeros((0, 0))

    def watch(self, drafter: Drafter) -> None:
        """Count at every step of ``drafter``, for as long as it lives."""
        observe = drafter.observe

        def counting(state: Any, proposals: Any, output: Any, verdicts: Any) -> None:
            for proposal, verdict in zip(proposals, verdicts, strict=True):
                if verdict is not None and verdict.emitted and len(proposal.tree) > 1:
                    self.add(proposal.tree, verdict.path)
            observe(state, proposals, output, verdicts)

        drafter.observe = counting  # type: ignore[method-assign]

    def add(self, tree: DraftTree, path: Sequence[int]) -> None:
        """One step: the children of every accepted node were tried."""
        children = tree.topology.children
        self._grow(tree)
        for depth, node in enumerate([0, *path]):
            tried = children[node]
            self.tried[depth, : len(tried)] += 1
            if depth < len(path):
                self.hits[depth, tried.index(path[depth])] += 1

    def _grow(self, tree: DraftTree) -> None:
        children = tree.topology.children
        shape = (tree.topology.max_depth + 1, max(map(len, children)))
        if any(have < need for have, need in zip(self.tried.shape, shape, strict=True)):
            room = [(0, max(need - have, 0)) for have, need in zip(self.tried.shape, shape, strict=True)]
            self.hits, self.tried = np.pad(self.hits, room), np.pad(self.tried, room)
            for node, below in enumerate(children):
                depth = tree.topology.depth[node]
                for rank, child in enumerate(below):
                    if not self.tried[depth, rank] and tree.prior is not None:
                        self.tried[depth, rank] = PRIOR
                        self.hits[depth, rank] = PRIOR * tree.prior[child]

    def acceptance(self) -> tuple[tuple[float, ...], ...]:
        """[D][R] as ``templates.best_first`` takes it."""
        shares = np.divide(self.hits, self.tried, out=np.zeros_like(self.hits), where=self.tried > 0)
        return tuple(tuple(round(float(s), 4) for s in row) for row in shares if row.any())


def fastest_size(acceptance: Sequence[Sequence[float]], curve: Curve, other: float) -> int:
    """N that maximises expected tokens over the time of a step, among the best trees of every N.

    A node adds the product of the chances along its path, whatever else the tree holds, so the best tree of N nodes is
    the best of N - 1 and the next likeliest: no search over shapes is left. ``other``: seconds of a step outside its
    forward.
    """
    chance = np.sort(chances(acceptance, best_first(acceptance, WIDE)))[::-1]
    tokens = chance.cumsum()  # [N], of the best tree of 1, 2, ... nodes
    return int((tokens / (curve(np.arange(1, len(tokens) + 1)) + other)).argmax()) + 1


def own_trees(
    wide: Decoder, found: dict[Candidate, Yield], curves: dict[str, Curve], run: Callable[[Decoder], Any]
) -> list[Candidate]:
    """A drafter's static trees cut for the prompts, the fastest for each curve.

    Args:
        wide: decodes with the drafter's tree of ``WIDE`` nodes.
        found: what its other candidates did; says what drafting costs.
        curves: t(N) per compile mode.
        run: decodes the prompts.
    """
    counts = RankCounts()
    counts.watch(wide.drafter)
    run(wide)
    acceptance = counts.acceptance()
    mine = [done for candidate, done in found.items() if candidate.drafter == wide.drafter.name]
    other = sum(done.other for done in mine) / sum(len(done.tokens) for done in mine)
    sizes = {fastest_size(acceptance, curve, other) for curve in curves.values()}
    return [Candidate(wide.drafter.name, (("acceptance", acceptance), ("size", size))) for size in sorted(sizes - {1})]


def calibrate(
    decoders: Iterable[tuple[Candidate, Decoder]],
    groups: Sequence[Group],
    arguments: dict[str, Any],
    progress: Callable[[str], None],
) -> dict[Candidate, Yield]:
    """Run every candidate on the prompts, one after the other (what is timed here is compared with nothing)."""
    found = {}
    for candidate, decoder in decoders:
        progress(candidate.label)
        found[candidate] = Yield()
        inputs = [group.tensors(decoder.target.device) for group in groups]
        decoder.generate(inputs[0][0], attention_mask=inputs[0][1], **{**arguments, "max_new_tokens": 8})  # warm-up
        for input_ids, mask in inputs:
            decoder.drafter.reset()
            decoder.generate(input_ids, attention_mask=mask, **arguments)
            assert decoder.stats is not None
            found[candidate].add(decoder.stats)
    return found


def predictions(
    found: dict[Candidate, Yield], curves: dict[str, Curve], plain: Candidate
) -> dict[tuple[Candidate, str], float]:
    """Predicted speed-up over plain decoding, uncompiled, of every candidate in every compile mode."""
    prompts = found[plain].prompts
    base = found[plain].seconds_per_token(curves["off"], prompts)
    return {
        (candidate, mode): base / done.seconds_per_token(curve, prompts)
        for mode, curve in curves.items()
        for candidate, done in found.items()
    }


def shortlist(
    predicted: dict[tuple[Candidate, str], float], plain: Candidate, count: int
) -> list[tuple[Candidate, str]]:
    """The best setting of the ``count`` best drafters, in the mode that is best for each."""
    best: dict[str, tuple[Candidate, str]] = {}
    for key in sorted(predicted, key=lambda k: -predicted[k]):
        if key[0] != plain:
            best.setdefault(key[0].drafter, key)
    return list(best.values())[:count]
