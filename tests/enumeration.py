"""Every outcome of a randomised procedure with its exact probability."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable

import torch


class Scripted:
    """Stands in for ``Randomness``: follows a script of choices and records what else could have been chosen."""

    def __init__(self, script: list[int]):
        self.script, self.step, self.probability = script, 0, 1.0
        self.options: list[int] = []

    def _choose(self, weights: list[tuple[object, float]]):
        weights = [(value, w) for value, w in weights if w > 1e-15]
        if self.step == len(self.script):
            self.script.append(0)
        value, w = weights[self.script[self.step]]
        self.options.append(len(weights))
        self.step += 1
        self.probability *= w
        return value

    def accept(self, ratio: float) -> bool:
        p = min(1.0, max(0.0, ratio))
        return self._choose([(True, p), (False, 1.0 - p)])

    def draw(self, probs: torch.Tensor) -> int:
        probs = probs.double() / probs.double().sum()
        return self._choose(list(enumerate(probs.tolist())))

    def draws(self, probs: torch.Tensor, k: int, replace: bool) -> torch.Tensor:
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
        return torch.tensor(rows)


def law(procedure: Callable[[Scripted], Hashable], limit: int = 200_000) -> dict[Hashable, float]:
    """Exact distribution of ``procedure``'s result over all random outcomes."""
    result: dict[Hashable, float] = defaultdict(float)
    script: list[int] = []
    for _ in range(limit):
        run = Scripted(script)
        result[procedure(run)] += run.probability
        while script and script[-1] + 1 == run.options[len(script) - 1]:
            script.pop()
        if not script:
            return dict(result)
        script[-1] += 1
    raise AssertionError(f"more than {limit} outcomes")


def total_variation(a: dict, b: dict) -> float:
    """Half the sum of absolute differences."""
    return sum(abs(a.get(k, 0.0) - b.get(k, 0.0)) for k in {*a, *b}) / 2
