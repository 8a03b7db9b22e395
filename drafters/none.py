"""No drafting: plain decoding through the same loop."""

from __future__ import annotations

from specdec.contracts import Drafter
from specdec.state import DecodeState
from specdec.tree import DraftTree, Proposal


class NoDrafter(Drafter):
    """Every step is the root alone."""

    name = "none"
    summary = "plain decoding, one token a step, without generate()'s overhead"
    budget = 1

    def propose(self, state: DecodeState) -> list[Proposal | None]:
        return [Proposal(DraftTree.root(int(row.tokens[-1]))) for row in state.rows]
