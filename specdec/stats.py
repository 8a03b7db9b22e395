"""What a generation cost: per step and per request."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from time import perf_counter
from typing import Any

import torch

PHASES = ("propose", "forward", "verify", "emit", "commit", "observe")


@dataclass
class StepStats:
    """One step of the loop.

    Attributes:
        columns: widest row's nodes + probes + pending.
        accepted: drafted tokens accepted, per row that took part.
        emitted: tokens emitted by verification, per row that took part.
        trusted: tokens emitted on the drafter's word, all rows.
        seconds: wall time by phase; on a GPU the forward is waited for.
    """

    columns: int = 0
    accepted: list[int] = field(default_factory=list)
    emitted: list[int] = field(default_factory=list)
    trusted: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))


@dataclass
class GenerationStats:
    """One call of ``generate``.

    Attributes:
        drafter, verifier: names.
        lossless: the output is the target's own.
        rows: batch rows.
        compilation: whether steps were compiled, or why not.
        prompt_tokens, new_tokens: over all rows.
        steps: every step, prefill chunks included.
        draft_forwards: forwards of models the drafter runs, if it counts them.
        seconds: wall time of the loop.
    """

    drafter: str
    verifier: str
    lossless: bool
    rows: int
    compilation: str = ""
    prompt_tokens: int = 0
    new_tokens: int = 0
    seconds: float = 0.0
    draft_forwards: int = 0
    steps: list[StepStats] = field(default_factory=list)

    @property
    def row_forwards(self) -> int:
        """Target forwards that emitted for a row, summed over rows (prefill chunks emit nothing)."""
        return sum(len(step.emitted) for step in self.steps)

    @property
    def mat(self) -> float | None:
        """Mean accepted tokens: tokens per target forward and row, bonus included. None without any forward."""
        return self.new_tokens / self.row_forwards if self.row_forwards else None

    @property
    def overhead(self) -> float:
        """Share of the loop's time spent outside the target's forward."""
        forward = sum(step.seconds["forward"] for step in self.steps)
        return 1 - forward / self.seconds if self.seconds else 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.new_tokens / self.seconds if self.seconds else 0.0

    def seconds_by_phase(self) -> dict[str, float]:
        """Wall time of each phase, all steps."""
        return {phase: sum(step.seconds[phase] for step in self.steps) for phase in PHASES}

    def summary(self) -> dict[str, Any]:
        """The request's figures without the steps."""
        fields = {k: v for k, v in asdict(self).items() if k != "steps"}
        return {
            **fields,
            "target_forwards": len([s for s in self.steps if s.columns]),
            "mat": self.mat,
            "overhead": self.overhead,
            "tokens_per_second": self.tokens_per_second,
            "seconds_by_phase": self.seconds_by_phase(),
        }


class Clock:
    """Adds wall time to phases of the current step."""

    def __init__(self, device: torch.device):
        # a forward returns before a GPU has finished it; verification would be charged for the wait
        self._wait = torch.cuda.synchronize if device.type == "cuda" else None

    @contextmanager
    def phase(self, step: StepStats, name: str) -> Iterator[None]:
        start = perf_counter()
        yield
        if self._wait is not None and name == "forward":
            self._wait()
        step.seconds[name] += perf_counter() - start
