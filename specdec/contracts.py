"""The two things a method implements: a Drafter proposes, a Verifier decides."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from specdec.state import DecodeState
from specdec.structure import Needs
from specdec.target import StepOutput, Target
from specdec.tree import Proposal


@dataclass
class Verdict:
    """What a verifier decided for one row.

    Attributes:
        path: accepted nodes from the root's child down.
        token: the token the target adds after them (the bonus).
        emitted: tokens really emitted after cutting at the stop; set by the Decoder.
        kept: columns of the step that entered the cache; set by the Decoder.
    """

    path: list[int]
    token: int
    emitted: list[int] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)


class Drafter(ABC):
    """Proposes tokens. ``None`` in place of a proposal means "nothing for this row in this step".

    Class attributes:
        name: registry name, equal to the module's name with dashes.
        summary: one line for ``specdec list``.
        lossless: False when it emits trusted tokens.
        training: "none", "online" or what must be trained.
        requires: what it needs besides the target, in words.
        needs: hidden states and hooks it cannot do without.
        wishes: taps it uses when the model has them (look into ``output.taps``).
        budget: most columns (nodes + probes) it uses per row; ``Decoder`` sizes the cache by it.
        forwards: forwards of its own models so far, if it has any.
        tolerates_gaps: ``observe`` may be left out for steps it did not draft; it then knows less, but nothing wrong.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    lossless: bool = True
    training: ClassVar[str] = "none"
    requires: ClassVar[str] = "nothing"
    needs: Needs = Needs()
    wishes: Needs = Needs()
    budget: int = 64
    forwards: int = 0
    tolerates_gaps: bool = False

    def bind(self, target: Target) -> None:
        """Check that this target can be served. ``needs`` and ``wishes`` are read afterwards.

        Raises:
            CompatibilityError: it cannot; one message with the reason.
        """

    def begin(self, state: DecodeState) -> None:
        """A request starts. ``state`` is the same object until ``end``; its rows shrink as they finish."""

    @abstractmethod
    def propose(self, state: DecodeState) -> list[Proposal | None]:
        """One entry per row of ``state.rows``."""

    def observe(
        self,
        state: DecodeState,
        proposals: Sequence[Proposal | None],
        output: StepOutput,
        verdicts: Sequence[Verdict | None],
    ) -> None:
        """Learn from a finished step, after commit.

        The prompt arrives here too: long prompts come in chunks of root-only proposals with nothing emitted. The
        proposals may be another drafter's, so feed what has not been seen yet.
        """

    def end(self, state: DecodeState) -> None:
        """The request is over; drop what belongs to it."""

    @property
    def warm(self) -> bool | None:
        """For drafters that learn: whether anything has been learned. None: it does not learn."""
        return None

    def reset(self) -> None:
        """Forget everything learned (drafters that learn)."""


class Verifier(ABC):
    """Decides which drafted tokens to keep.

    Class attributes: ``name``, ``summary``, ``lossless``, ``needs`` as for ``Drafter``.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    lossless: bool = True
    needs: Needs = Needs()

    def bind(self, target: Target) -> None:
        """Check that this target can be served; raises CompatibilityError."""

    @abstractmethod
    def verify(
        self, state: DecodeState, proposals: Sequence[Proposal | None], output: StepOutput
    ) -> list[Verdict | None]:
        """One verdict per row with a tree, None for rows that skipped the forward."""
