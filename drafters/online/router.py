"""One drafter per domain: requests are routed by a plain rule, and each drafter learns from its own alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from operator import or_

import numpy as np

from specdec.contracts import Drafter, Verdict
from specdec.drafters.online.drafter import Online
from specdec.errors import UsageError
from specdec.state import DecodeState
from specdec.structure import Needs
from specdec.target import StepOutput, Target
from specdec.tree import Proposal

Rule = Callable[[np.ndarray], str]


class Centroids:
    """The nearest centroid of token counts, learned from what is routed.

    A prompt becomes a vector of log(1 + count) over ``size`` buckets of token ids, of length 1. While a name has no
    centroid, it gets the first prompt whose cosine with every other centroid is below ``new``; else the nearest one
    takes the prompt, and its centroid moves to the mean of its prompts.

    Args:
        names: of the drafters.
        new: below it a prompt starts a domain of its own, while there are names left.
        size: buckets; token t counts in bucket t % size.
    """

    def __init__(self, names: Sequence[str], new: float = 0.3, size: int = 4096):
        self.names, self.new, self.size = list(names), new, size
        self.sums: dict[str, np.ndarray] = {}  # a mean's direction is its sum's

    def vector(self, tokens: np.ndarray) -> np.ndarray:
        """float64 [size] of length 1."""
        counts = np.log1p(np.bincount(tokens % self.size, minlength=self.size))
        return counts / np.linalg.norm(counts)

    def __call__(self, tokens: np.ndarray) -> str:
        """The drafter for a prompt int64 [n], n > 0, which is learned from."""
        x = self.vector(tokens)
        near = {name: float(x @ s / np.linalg.norm(s)) for name, s in self.sums.items()}
        free = [name for name in self.names if name not in self.sums]
        best = max(near, key=near.__getitem__) if near else free[0]
        if free and near.get(best, 0.0) < self.new:
            best = free[0]
        self.sums[best] = self.sums.get(best, 0.0) + x
        return best


class Router(Drafter):
    """Several ``Online`` drafters, one of which serves a request: all rows of a call go to the same.

    Args:
        drafters: by name; each has its own weights and buffer, so give each a draft of its own.
        rule: from the prompts' tokens, int64 [n] of all rows, to a name. None: ``Centroids``.

    Attributes:
        chosen: how many requests each drafter has served.

    Raises:
        UsageError: fewer than two drafters, something else than ``Online``, or a rule that names none of them.
    """

    name = "online-router"
    summary = "one online drafter per domain"
    training = "online"
    requires = Online.requires

    def __init__(self, drafters: Mapping[str, Online], rule: Rule | None = None):
        if len(drafters) < 2 or not all(isinstance(d, Online) for d in drafters.values()):
            raise UsageError("drafters: give at least two Online drafters by name")
        if len({id(d.drafter) for d in drafters.values()}) < len(drafters):
            raise UsageError("drafters: two of them train the same drafter; give each its own")
        self.drafters = dict(drafters)
        self.rule: Rule = rule if rule is not None else Centroids(list(drafters))
        self.chosen: Counter[str] = Counter()
        self.lossless = all(d.lossless for d in drafters.values())

    @property
    def budget(self) -> int:  # type: ignore[override]
        return max(d.budget for d in self.drafters.values())

    @property
    def forwards(self) -> int:  # type: ignore[override]
        return sum(d.forwards for d in self.drafters.values())

    @property
    def warm(self) -> bool:
        return any(d.warm for d in self.drafters.values())

    def reset(self) -> None:
        for d in self.drafters.values():
            d.reset()
        self.chosen.clear()
        if isinstance(self.rule, Centroids):
            self.rule.sums.clear()

    def bind(self, target: Target) -> None:
        for d in self.drafters.values():
            d.bind(target)
        self.needs = reduce(or_, (d.needs for d in self.drafters.values()), Needs())
        self.wishes = reduce(or_, (d.wishes for d in self.drafters.values()), Needs())

    def begin(self, state: DecodeState) -> None:
        name = self.rule(np.concatenate([row.tokens for row in state.rows]))
        if name not in self.drafters:
            raise UsageError(f"rule: it chose {name!r}, which is none of {', '.join(self.drafters)}")
        self.chosen[name] += 1
        self._serving = self.drafters[name]
        self._serving.begin(state)

    def propose(self, state: DecodeState) -> list[Proposal | None]:
        return self._serving.propose(state)

    def observe(
        self,
        state: DecodeState,
        proposals: Sequence[Proposal | None],
        output: StepOutput,
        verdicts: Sequence[Verdict | None],
    ) -> None:
        self._serving.observe(state, proposals, output, verdicts)

    def end(self, state: DecodeState) -> None:
        self._serving.end(state)
