"""Another drafter behind a guard: it drafts while that pays and lets the target alone while it does not.

What pays is measured, not predicted: how long steps with and without a draft take here, and what they yield.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from specdec import registry
from specdec.contracts import Drafter, Verdict
from specdec.errors import UsageError
from specdec.profile import Profile
from specdec.state import DecodeState, Row
from specdec.target import StepOutput, Target
from specdec.tree import DraftTree, Proposal

PLAIN = 3  # plain steps before the first draft, to know what one costs
REFRESH = 128  # drafting steps between plain ones that keep that known
LOSS = 3.0  # plain steps' worth of time that drafting may lose before it is stopped
REST = 24  # plain steps before it is tried again
HOPE = 5  # trials that fail in a row before requests no longer begin with one


class Guard:
    """Decides step by step whether to draft, for one batch size.

    Against a plain step, a drafting step of ``seconds`` that yields ``tokens`` loses seconds - tokens * plain. These
    losses are summed up (a one-sided CUSUM: gains count only up to a bound, so that a text that changes is noticed).
    When the sum exceeds a few plain steps, drafting rests. Every trial that fails in a row halves what the next may
    lose and doubles the rest after it, up to 32 times; the first few rests end with their text.
    """

    def __init__(self) -> None:
        self._plain: deque[float] = deque(maxlen=9)
        self._lost = 0.0  # plain steps
        self._failed = 0  # trials in a row
        self._resting = PLAIN
        self._since_plain = 0

    @property
    def on(self) -> bool:
        """Whether the next step should draft."""
        return not self._resting and self._since_plain < REFRESH

    @property
    def trial_is_near(self) -> bool:
        """Whether what is learned now is still fresh when drafting is tried next."""
        return self._resting <= REST

    def rests_for(self, steps: int) -> bool:
        """Whether none of the next ``steps`` steps will draft."""
        return self._resting > steps

    def fresh_text(self) -> None:
        """A request begins: what did not pay in the last text may in this one."""
        if self._plain and self._failed < HOPE:
            self._resting, self._lost = 0, 0.0

    def record(self, drafted: bool, seconds: float, tokens: float) -> None:
        """One step that has finished; ``tokens`` per row."""
        if not drafted:
            self._plain.append(seconds)
            self._since_plain = 0
            self._resting = max(self._resting - 1, 0)
            return
        self._since_plain += 1
        self._lost = max(self._lost + seconds / median(self._plain) - tokens, -2 * LOSS)
        if self._lost > max(LOSS / 2**self._failed, 0.5):
            self._resting, self._lost = REST * 2 ** min(self._failed, 5), 0.0
            self._failed += 1
        elif self._lost < -LOSS:
            self._failed = 0


class Auto(Drafter):
    """Drafts with another drafter while that is faster than plain decoding here, and not at all while it is not.

    ``specdec tune`` chooses that drafter for a model and a machine and keeps its choice as a profile; without one
    it is ``hybrid``. Steps are timed as they happen: a request starts with a short trial unless the last few
    failed, a losing draft costs a few plain steps' time, and the last 128 drafting steps include a plain one.
    Drafters that can miss steps do not learn in a long rest either. Whether a step drafts depends on the clock, so
    a sampled text is not repeatable from its seed; its distribution and greedy texts are what they always are.

    Args:
        method: name of a drafter, or a ``Drafter``; None: what the profile says.
        profile: file written by ``specdec tune``; None: the one kept for this model, device and dtype, if any.
        options: passed to the named drafter.

    Raises:
        UsageError: the profile cannot be read, or is given together with a drafter.
    """

    name = "auto"
    summary = "the drafter that `specdec tune` chose, switched off while it loses and on when it pays"
    training = "online"

    def __init__(self, method: str | Drafter | None = None, profile: str | Path | None = None, **options: Any):
        if method is not None and profile is not None:
            raise UsageError(f"method={method!r} and profile={str(profile)!r}: give one of them")
        if options and not isinstance(method, str):
            raise UsageError(f"options {sorted(options)} only go with a drafter's name")
        if method == self.name or isinstance(method, Auto):
            raise UsageError("method='auto' would guard itself; name another drafter")
        self._profile = Profile.read(profile) if profile is not None else None
        self._drafter = registry.drafter(method, **options) if isinstance(method, str) else method
        self._guards: dict[int, Guard] = {}
        if self._drafter is not None:
            self.lossless = self._drafter.lossless

    @property
    def drafter(self) -> Drafter:
        """The guarded drafter; known once bound."""
        assert self._drafter is not None, "the drafter is chosen when it is bound to a target"
        return self._drafter

    @property
    def forwards(self) -> int:  # type: ignore[override]
        return self.drafter.forwards

    @property
    def warm(self) -> bool | None:
        return self.drafter.warm

    def bind(self, target: Target) -> None:
        if self._drafter is None:
            profile = self._profile or Profile.find(target)
            self._drafter = (
                registry.drafter(profile.drafter, **profile.options) if profile else registry.drafter("hybrid")
            )
        self.drafter.bind(target)
        self.lossless = self.drafter.lossless
        self.needs, self.wishes, self.budget = self.drafter.needs, self.drafter.wishes, self.drafter.budget
        self._guards = {}  # steps cost something else on another model

    def reset(self) -> None:
        self.drafter.reset()

    def begin(self, state: DecodeState) -> None:
        self._step: tuple[float, list[Row], int, bool] | None = None
        self._first = True
        for guard in self._guards.values():
            guard.fresh_text()
        longest = max(row.tokens_left for row in state.rows)
        sizes = range(1, len(state.rows) + 1)  # of the batch, as its rows end
        self._sleeps = self.drafter.tolerates_gaps and all(
            size in self._guards and self._guards[size].rests_for(longest) for size in sizes
        )
        self._learns = not self._sleeps  # the prompt too
        if not self._sleeps:
            self.drafter.begin(state)

    def end(self, state: DecodeState) -> None:
        if not self._sleeps:
            self.drafter.end(state)

    def propose(self, state: DecodeState) -> list[Proposal | None]:
        now, rows = perf_counter(), [row for row in state.rows if not row.done]
        if self._step is not None:
            start, then, length, drafted = self._step
            self._guards[len(then)].record(drafted, now - start, (sum(map(len, then)) - length) / len(then))
        guard = self._guards.setdefault(len(rows), Guard())
        drafts = guard.on
        # learning from every step's logits costs too, so most of a long rest goes by unseen
        self._learns = not self._sleeps and (drafts or guard.trial_is_near or not self.drafter.tolerates_gaps)
        # the first step reads what is left of the prompt, so its time says nothing
        self._step = None if self._first else (now, rows, sum(map(len, rows)), drafts)
        self._first = False
        if drafts:
            return self.drafter.propose(state)
        return [Proposal(DraftTree.root(int(row.tokens[-1]))) for row in state.rows]

    def observe(
        self,
        state: DecodeState,
        proposals: Sequence[Proposal | None],
        output: StepOutput,
        verdicts: Sequence[Verdict | None],
    ) -> None:
        if self._learns:
            self.drafter.observe(state, proposals, output, verdicts)
