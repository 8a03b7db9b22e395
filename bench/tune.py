"""Which drafter, how large a tree, compiled or not: predicted from few measurements, then checked.

A method's speed is the tokens its steps yield over what the steps cost, and the two are known from different places:
what N columns cost from the curve t(N), measured once per compile mode; what a step yields, how many columns it takes
and what drafting and verifying add from a short run of every candidate. Only the best candidates are then timed whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from specdec.bench.harness import Group
from specdec.decoder import Decoder
from specdec.stats import GenerationStats

CPU_SIZES, GPU_SIZES = (4, 8, 16, 32), (16, 32, 64)
LENGTHS = (2, 4, 6)
FLOORS = (0.3,)  # least chance of a node that is drafted, besides the drafter's own


@dataclass(frozen=True)
class Candidate:
    """A drafter with the options that are tuned."""

    drafter: str
    options: tuple[tuple[str, float], ...] = ()

    @property
    def label(self) -> str:
        return " ".join([self.drafter, *(f"{name}={value:g}" for name, value in self.options)])


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


def calibrate(
    decoders: Iterator[tuple[Candidate, Decoder]],
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
