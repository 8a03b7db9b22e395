"""The drafter: read a tree from the table, write every logits row of the step back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from specdec.contracts import Verdict
from specdec.drafters.token_recycling.table import AdjacencyTable
from specdec.drafters.token_recycling.trees import (
    COMMON_ACCEPTANCE,
    CPU_SIZE,
    PUBLISHED_SIZE,
    RANK_ACCEPTANCE,
    from_paths,
    template,
)
from specdec.errors import UsageError
from specdec.state import DecodeState, Row
from specdec.structure import Needs
from specdec.tables import TableDrafter
from specdec.target import StepOutput, Target
from specdec.templates import best_first
from specdec.tree import DraftTree, Proposal, Topology

# positions of a text whose logits exist at one time: [256, V] and never [text, V]
_CHUNK = 256


class TokenRecycling(TableDrafter[AdjacencyTable]):
    """Drafts the successors that the target itself last predicted after each token.

    Args:
        size: nodes of the static tree, root included; None: 81 (as published) on a GPU, 8 on a CPU, where every
            extra column costs time.
        k: successors kept per token.
        update_on_prompt: learn from prompt positions too (the published code does not).
        acceptance: what the tree of ``size`` nodes is cut from, see ``templates.best_first``; None: measured with the
            embedded model.
        paths: a tree of your own in place of ``size``, see ``trees.from_paths``.
        scope, table: see ``TableDrafter``.
    """

    name = "token-recycling"
    summary = "a table of the successors the target last predicted after each token"
    wishes = Needs(final_hidden=True)
    tolerates_gaps = True

    def __init__(
        self,
        size: int | None = None,
        k: int = 8,
        update_on_prompt: bool = True,
        acceptance: Sequence[Sequence[float]] | None = None,
        paths: Sequence[tuple[int, ...]] | None = None,
        scope: Literal["shared", "request"] = "shared",
        table: str | Path | None = None,
    ):
        super().__init__(scope, table)
        if not 1 <= k <= 64:
            raise UsageError(f"k={k} must be between 1 and 64")
        if size is not None and size < 1:
            raise UsageError(f"size={size} must be at least 1: the root alone")
        self.size, self.k, self.update_on_prompt, self.acceptance = size, k, update_on_prompt, acceptance
        self._own_template = from_paths(paths) if paths is not None else None
        if not update_on_prompt:
            self.wishes = Needs()

    def empty(self) -> AdjacencyTable:
        return AdjacencyTable(self._target.vocab_size, self.k)

    def compile(self) -> None:
        toy, one = AdjacencyTable(2, 1), np.zeros(1, dtype=np.int64)
        toy.update(one, one[:, None])
        toy.count(one)
        toy.fill_tree(0, one - 1, one, one)

    def bind(self, target: Target) -> None:
        self.k = min(self.k, target.vocab_size)
        size = self.size or (PUBLISHED_SIZE if target.device.type == "cuda" else CPU_SIZE)
        if self.acceptance is None:
            self._parents, self._ranks = self._own_template or template(size, self.k)
        else:
            self._parents, self._ranks = self._own_template or best_first([r[: self.k] for r in self.acceptance], size)
        self.budget = len(self._parents)
        shares = RANK_ACCEPTANCE if self.acceptance is None else self.acceptance[0]
        by_rank = [*shares, *[shares[-1]] * self.k][: self.k]
        self._chance = np.array([*by_rank, COMMON_ACCEPTANCE], dtype=np.float32)
        super().bind(target)

    def begin(self, state: DecodeState) -> None:
        super().begin(state)
        for row in state.rows:
            self.table_of(row).count(row.tokens)

    def propose(self, state: DecodeState) -> list[Proposal | None]:
        proposals: list[Proposal | None] = []
        for row in state.rows:
            root = int(row.tokens[-1])
            parents, tokens, ranks = self.table_of(row).fill_tree(root, self._parents, self._ranks, self.ends)
            proposals.append(Proposal(DraftTree(Topology(parents), tokens, prior=self._chance[ranks])))
        return proposals

    def observe(
        self,
        state: DecodeState,
        proposals: Sequence[Proposal | None],
        output: StepOutput,
        verdicts: Sequence[Verdict | None],
    ) -> None:
        top = output.top(self.k)  # [B, N, k]
        for b, (row, proposal, verdict) in enumerate(zip(state.rows, proposals, verdicts, strict=True)):
            if proposal is None or proposal.tree is None or verdict is None:
                continue
            if not (verdict.emitted or self.update_on_prompt):
                continue  # a chunk of the prompt
            if self.update_on_prompt and output.pending[b]:
                self._learn_pending(row, b, output)
            # breadth first, then the accepted path once more: where tokens repeat, the accepted context wins
            order = [*range(len(proposal.tree)), 0, *verdict.path]
            self.table_of(row).update(proposal.tree.tokens[order], top[b, order])
            self.table_of(row).count(np.array(verdict.emitted, dtype=np.int64))

    def _learn_pending(self, row: Row, b: int, output: StepOutput) -> None:
        """Learn from the tokens before the root: prompt, or what another drafter committed."""
        hidden = output.taps.get("final_hidden")
        if hidden is None:
            return
        root, count = output.root[b], output.pending[b]
        end = self._target.lengths[b] - len(output.kept[b]) + count if output.kept else 0
        tokens = row.tokens[end - count : end]
        for start in range(0, count, _CHUNK):
            part = slice(start, min(start + _CHUNK, count))
            columns = slice(root - count + part.start, root - count + part.stop)
            logits = self._target.logits(hidden[b, columns])  # [n, V]
            top = logits.topk(self.k, dim=-1).indices.cpu().numpy()
            self.table_of(row).update(np.ascontiguousarray(tokens[part]), top)

    def learn_document(self, tokens: np.ndarray) -> None:
        """Run the target over a document and keep its predictions, as if it had been a prompt."""
        target = self._target
        window = target.context or len(tokens)
        for begin in range(0, len(tokens), window):
            text = tokens[begin : begin + window]
            with target.session():
                target.open([0], len(text))
                for start in range(0, len(text), _CHUNK):
                    chain = DraftTree.chain(int(text[start]), text[start + 1 : start + _CHUNK].tolist())
                    output = target.step([text[: start + 1]], [Proposal(chain)])
                    target.commit(output, [list(range(1, len(chain)))])
                    self.table.update(chain.tokens, output.top(self.k)[0])
                    self.table.count(chain.tokens)
