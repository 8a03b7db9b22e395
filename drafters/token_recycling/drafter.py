"""The drafter: read a tree from the table, write every logits row of the step back."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from specdec.contracts import Drafter, Verdict
from specdec.drafters.token_recycling.table import AdjacencyTable
from specdec.drafters.token_recycling.trees import CPU_SIZE, PUBLISHED_SIZE, from_paths, template
from specdec.errors import UsageError
from specdec.state import DecodeState
from specdec.structure import Needs
from specdec.target import StepOutput, Target
from specdec.tree import DraftTree, Proposal, Topology

# prompt positions whose logits exist at one time: [256, V] and never [prompt, V]
_PROMPT_CHUNK = 256


@lru_cache(maxsize=4096)
def _topology(parents: tuple[int, ...]) -> Topology:
    # a table that is still filling gives ever new shapes, a full one always the template's
    return Topology(parents)


class TokenRecycling(Drafter):
    """Drafts the successors that the target itself last predicted after each token.

    The table lives as long as this object and is shared by all its requests and rows.

    Args:
        size: nodes of the static tree, root included; None: 81 (as published) on a GPU, 8 on a CPU, where every
            extra column costs time.
        k: successors kept per token.
        update_on_prompt: learn from prompt positions too (the published code does not).
        paths: a tree of your own in place of ``size``, see ``trees.from_paths``.
    """

    name = "token-recycling"
    summary = "a table of the successors the target last predicted after each token"
    training = "online"
    wishes = Needs(final_hidden=True)

    def __init__(
        self,
        size: int | None = None,
        k: int = 8,
        update_on_prompt: bool = True,
        paths: Sequence[tuple[int, ...]] | None = None,
    ):
        if not 1 <= k <= 64:
            raise UsageError(f"k={k} must be between 1 and 64")
        self.k, self.update_on_prompt = k, update_on_prompt
        self._template = from_paths(paths) if paths is not None else template(size, k) if size is not None else None
        self.budget = PUBLISHED_SIZE if self._template is None else len(self._template[0])
        if not update_on_prompt:
            self.wishes = Needs()
        self._table: AdjacencyTable | None = None

    @property
    def warm(self) -> bool:
        return self._table is not None and bool(self._table.seen.any())

    @property
    def table(self) -> AdjacencyTable:
        assert self._table is not None, "the table exists once the drafter is bound to a target"
        return self._table

    def bind(self, target: Target) -> None:
        default = PUBLISHED_SIZE if target.device.type == "cuda" else CPU_SIZE
        self._parents, self._ranks = self._template or template(default, self.k)
        self._target = target
        if self._table is None or len(self._table.seen) != target.vocab_size:
            self._table = AdjacencyTable(target.vocab_size, self.k)

    def reset(self) -> None:
        self._table = AdjacencyTable(self._target.vocab_size, self.k)

    def begin(self, state: DecodeState) -> None:
        self._ends = np.array(sorted(state.eos), dtype=np.int64)

    def propose(self, state: DecodeState) -> list[Proposal | None]:
        proposals: list[Proposal | None] = []
        for row in state.rows:
            root = int(row.tokens[-1])
            parents, tokens = self.table.fill(root, self._parents, self._ranks, self._ends)
            proposals.append(Proposal(DraftTree(_topology(tuple(parents.tolist())), tokens)))
        return proposals

    def observe(
        self,
        state: DecodeState,
        proposals: Sequence[Proposal | None],
        output: StepOutput,
        verdicts: Sequence[Verdict | None],
    ) -> None:
        width = max(output.nodes)
        top = output.logits.topk(min(self.k, output.logits.shape[-1]), dim=-1).indices.cpu().numpy()  # [B, N, k]
        assert top.shape[1] == width
        for b, (proposal, verdict) in enumerate(zip(proposals, verdicts, strict=True)):
            if proposal is None or proposal.tree is None or verdict is None:
                continue
            if not (verdict.emitted or self.update_on_prompt):
                continue  # a chunk of the prompt
            if self.update_on_prompt and output.pending[b]:
                self._learn_pending(state, b, output)
            # breadth first, then the accepted path once more: where tokens repeat, the accepted context wins
            order = [*range(len(proposal.tree)), 0, *verdict.path]
            self.table.update(proposal.tree.tokens[order], top[b, order])

    def _learn_pending(self, state: DecodeState, b: int, output: StepOutput) -> None:
        """Learn from the tokens before the root: prompt, or what another drafter committed."""
        hidden = output.taps.get("final_hidden")
        if hidden is None:
            return
        root, count = output.root[b], output.pending[b]
        end = self._target.lengths[b] - len(output.kept[b]) + count if output.kept else 0
        tokens = state.rows[b].tokens[end - count : end]
        for start in range(0, count, _PROMPT_CHUNK):
            part = slice(start, min(start + _PROMPT_CHUNK, count))
            columns = slice(root - count + part.start, root - count + part.stop)
            logits = self._target.logits(hidden[b, columns])  # [n, V]
            top = logits.topk(self.k, dim=-1).indices.cpu().numpy()
            self.table.update(np.ascontiguousarray(tokens[part]), top)
