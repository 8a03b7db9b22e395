"""One line: what the method guesses, and from what (Authors, arXiv number)."""

from __future__ import annotations

from collections.abc import Sequence

from specdec.contracts import Drafter, Verdict
from specdec.state import DecodeState
from specdec.target import StepOutput
from specdec.tree import DraftTree, Proposal


class MyDrafter(Drafter):
    """Guesses that the last token repeats.

    Args:
        length: tokens drafted.
    """

    name = "my-drafter"
    summary = "what `specdec list` says of it"

    def __init__(self, length: int = 2):
        self.length = length
        self.budget = length + 1  # columns a step may use, root included

    def propose(self, state: DecodeState) -> list[Proposal | None]:
        roots = [int(row.tokens[-1]) for row in state.rows]
        return [Proposal(DraftTree.chain(root, [root] * self.length)) for root in roots]

    def observe(
        self,
        state: DecodeState,
        proposals: Sequence[Proposal | None],
        output: StepOutput,
        verdicts: Sequence[Verdict | None],
    ) -> None:
        """Learn from what was accepted: ``verdicts[b].emitted``, ``output.logits[b]``. Drop this if you do not."""
