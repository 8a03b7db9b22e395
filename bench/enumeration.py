"""Every outcome of a randomised procedure with its exact probability: a proof where sampling gives a p-value."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import torch

Outcome = TypeVar("Outcome", bound=Hashable)


class NotEnumerable(Exception):
    """The procedure has too many outcomes, draws from a continuum, or does not repeat itself."""


class Scripted:
    """Stands in for ``sampling.Randomness``: follows a script of choices and records what else could have been chosen.

    Args:
        script: which of the possible values to take, choice by choice; grows by zeros where it ends.

    Attributes:
        probability: of everything chosen so far.
        options: how many values each choice had.
    """

    def __init__(self, script: list[int]):
        self.script, self.step, self.probability = script, 0, 1.0
        self.options: list[int] = []

    def _choose(self, weights: list[tuple[Any, float]]) -> Any:
        weights = [(value, w) for value, w in weights if w > 1e-15]
        if self.step == len(self.script):
            self.script.append(0)
        if self.script[self.step] >= len(weights):
            raise NotEnumerable("the same random choices led elsewhere the second time")
        value, w = weights[self.script[self.step]]
        self.options.append(len(weights))
        self.step += 1
        self.probability *= w
        return value

    def accept(self, ratio: float) -> bool:
        """Both answers, with probabilities min(1, ratio) and the rest."""
        p = min(1.0, max(0.0, ratio))
        return self._choose([(True, p), (False, 1.0 - p)])

    def draw(self, probs: torch.Tensor) -> int:
        """Every token of positive probability of ``probs`` [V]."""
        probs = probs.double() / probs.double().sum()
        support = probs.nonzero().flatten()
        return self._choose(list(zip(support.tolist(), probs[support].tolist(), strict=True)))

    def draws(self, probs: torch.Tensor, k: int, replace: bool) -> torch.Tensor:
        """Every sequence of k draws for each row of ``probs`` [P, V] -> int64 [P, k]."""
        rows = []
        for q in probs.double():
            drawn: list[int] = []
            for _ in range(k):
                left = q.clone()
                if not replace:
                    left[drawn] = 0.0
                if left.sum() <= 0:  # beyond the support: columns of probability 0, as Randomness has them
                    drawn.append(next(x for x in range(len(q)) if x not in drawn))
                    continue
                drawn.append(self.draw(left))
            rows.append(drawn)
        return torch.tensor(rows, device=probs.device)

    def race(self, rates: torch.Tensor) -> torch.Tensor:
        """Times are a continuum.

        Raises:
            NotEnumerable: always.
        """
        raise NotEnumerable("the drafter draws continuous times, whose outcomes cannot be listed")


def law(procedure: Callable[[Scripted], Outcome], limit: int = 200_000) -> dict[Outcome, float]:
    """Exact distribution of ``procedure``'s result over all random outcomes.

    Args:
        procedure: random through its argument only, and the same for the same choices.
        limit: most outcomes to go through.

    Raises:
        NotEnumerable: there are more, or the procedure does not repeat itself.
    """
    result: dict[Outcome, float] = defaultdict(float)
    script: list[int] = []
    known: list[int] = []  # options of the choices that the next script shares with the last one
    for _ in range(limit):
        run = Scripted(script)
        outcome = procedure(run)
        if run.options[: len(known)] != known:
            raise NotEnumerable("the same random choices led elsewhere the second time")
        result[outcome] += run.probability
        while script and script[-1] + 1 == run.options[len(script) - 1]:
            script.pop()
        if not script:
            return dict(result)
        script[-1] += 1
        known = run.options[: len(script)]
    raise NotEnumerable(f"more than {limit} outcomes")


def total_variation(a: Mapping[Any, float], b: Mapping[Any, float]) -> float:
    """Half the sum of absolute differences."""
    return sum(abs(a.get(k, 0.0) - b.get(k, 0.0)) for k in {*a, *b}) / 2
