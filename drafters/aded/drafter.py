"""The drafter: learn every triple of the text, search the table for likely continuations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from specdec.contracts import Verdict
from specdec.drafters.aded.search import (
    C1,
    C2,
    SIMULATIONS,
    best_first,
    extract,
    generator,
    monte_carlo,
    monte_carlo_nodes,
    scratch,
)
from specdec.drafters.aded.table import TrigramTable
from specdec.errors import UsageError
from specdec.state import DecodeState, Row
from specdec.tables import TableDrafter
from specdec.tables.trees import select
from specdec.target import StepOutput, Target
from specdec.tree import DraftTree, Proposal, Topology

CPU_SIZE, CUDA_SIZE, PUBLISHED_SIZE = 12, 64, 65  # published: 64 drafted nodes and the root
CPU_FLOOR, CUDA_FLOOR = 0.1, 0.01
# the published update: every triple of the last 16 tokens, at every step
WINDOW, WINDOW_ADD, WINDOW_CAP = 16, 0.04, 3.0
DEPTH, PUBLISHED_DEPTH = 12, 4  # published: three searched and one greedy


@dataclass
class _Progress:
    """What belongs to one row of a request: tokens learned so far, and the generator of its roll-outs."""

    fed: int
    state: np.ndarray


class Aded(TableDrafter[TrigramTable]):
    """Drafts from tri-grams of the text so far, and of a corpus if there is one (ADED, arXiv 2407.12021).

    Triples with special tokens are not learned. Where the last two tokens were never seen together nothing is drafted.
    The table holds at most ``rows`` bigrams of 16 successors, see ``TrigramTable``.

    Args:
        size: most nodes, root included; None: 64 on a GPU, 12 on a CPU, where every extra column costs time.
        search: "bestfirst" takes the nodes of the largest product of P; "mcts" is the paper's Monte-Carlo tree search,
            which comes to much the same tree and takes longer.
        depth: deepest node; None: 12, or 4 in "mcts", as published, of which the last is the greedy one.
        update: "once" learns every triple once, as a moving average with rate ``eta``; "window" adds 0.04, up to 3.0,
            for every triple of the last 16 tokens at every step.
        eta: rate of "once", and of ``logit_update``.
        ingest_prompt: with "once", learn the prompt too.
        logit_update: how many of the target's likeliest tokens are learned at every verified node, each with weight
            eta * p. 0: none.
        min_prob: least product of P of a node; None: 0.01 on a GPU, 0.1 on a CPU.
        rows: most bigrams kept.
        seed: of the roll-outs of "mcts".
        published: do as the released code does: search, depth, update and min_prob are the published ones whatever is
            asked for, size None is 65, weights are not normalised in the search, roll-outs have the released value,
            special tokens are not left out, and costly sequences are dropped whole (see ``search.extract``).
        scope, table: see ``TableDrafter``.

    Raises:
        UsageError: an option out of range.
    """

    name = "aded"
    summary = "a tri-gram table that adapts to the text, searched for likely continuations"
    tolerates_gaps = True

    def __init__(
        self,
        size: int | None = None,
        search: Literal["bestfirst", "mcts"] = "bestfirst",
        depth: int | None = None,
        update: Literal["once", "window"] = "once",
        eta: float = 0.25,
        ingest_prompt: bool = True,
        logit_update: int = 0,
        min_prob: float | None = None,
        rows: int = 2**18,
        seed: int = 0,
        published: bool = False,
        scope: Literal["shared", "request"] = "shared",
        table: str | Path | None = None,
    ):
        super().__init__(scope, table)
        if search not in ("bestfirst", "mcts"):
            raise UsageError(f"search={search!r} must be 'bestfirst' or 'mcts'")
        if update not in ("once", "window"):
            raise UsageError(f"update={update!r} must be 'once' or 'window'")
        if not 0 < eta < 1:
            raise UsageError(f"eta={eta} must be between 0 and 1, both excluded")
        if min_prob is not None and not 0 <= min_prob <= 1:
            raise UsageError(f"min_prob={min_prob} must be between 0 and 1")
        least = {
            "size": (size, 1),
            "depth": (depth, 1),
            "logit_update": (logit_update, 0),
            "rows": (rows, 1),
            "seed": (seed, 0),
        }
        for option, (value, lowest) in least.items():
            if value is not None and value < lowest:
                raise UsageError(f"{option}={value} must be at least {lowest}")
        self.size, self.search, self.min_prob = size, search, min_prob
        self.depth = depth or (PUBLISHED_DEPTH if search == "mcts" else DEPTH)
        self.update, self.eta, self.ingest_prompt = update, eta, ingest_prompt
        self.logit_update, self.max_rows, self.seed, self.published = logit_update, rows, seed, published
        if published:
            self.size = PUBLISHED_SIZE if size is None else size
            self.search, self.update, self.depth, self.min_prob = "mcts", "window", PUBLISHED_DEPTH, 0.0
        self.budget = self.size or CUDA_SIZE
        # how a row is written: kept share, what is added, its most
        window = self.update == "window"
        self._rule = (1.0, WINDOW_ADD, WINDOW_CAP) if window else (1.0 - eta, eta, np.inf)
        self._progress: dict[int, _Progress] = {}

    def empty(self) -> TrigramTable:
        return TrigramTable(self._target.vocab_size, self.max_rows)

    def compile(self) -> None:
        toy, text, none = TrigramTable(3, 2), np.array([0, 1, 2, 0, 1, 2], dtype=np.int64), np.zeros(3, dtype=np.bool_)
        toy.feed(text, 0, none, 1.0, 0.5)
        toy.feed(text[:3], 0, none, 1.0, 0.5)
        toy.count(text, none)
        toy.blend(text[None, :2], text[None, 2:], np.ones((1, 4), dtype=np.float32), none, 1.0, 0.5)
        toy.merge(toy)
        toy.fill(toy.arrays(), toy.facts())
        nodes = scratch(monte_carlo_nodes(1))
        best_first(toy.rows, nodes, 3, 0, 1, 1, 2)
        extract(
            toy.rows, nodes, monte_carlo(toy.rows, nodes, generator(0, 0), 3, 0, 1, 1, 1, C1, C2, False), 3, 2, True
        )
        one = text[:1]
        select(one - 1, one, np.ones(1, dtype=np.float32), one, 1, 1, 0.0)

    def bind(self, target: Target) -> None:
        cuda = target.device.type == "cuda"
        self.budget = self.size or (CUDA_SIZE if cuda else CPU_SIZE)
        self._floor = self.min_prob if self.min_prob is not None else (CUDA_FLOOR if cuda else CPU_FLOOR)
        searched = monte_carlo_nodes(SIMULATIONS) if self.search == "mcts" else self.budget
        self._scratch = scratch(searched)
        self._special = self._special_ids(target)
        self._special_here = self._special
        super().bind(target)

    def _special_ids(self, target: Target) -> np.ndarray:
        special = np.zeros(target.vocab_size, dtype=np.bool_)
        if target.tokenizer is not None and not self.published:
            ids = np.array(target.tokenizer.all_special_ids, dtype=np.int64)
            special[ids[(ids >= 0) & (ids < len(special))]] = True
        return special

    def begin(self, state: DecodeState) -> None:
        super().begin(state)
        self._special_here = self._special
        if len(self.ends) and not self.published:
            self._special_here = self._special.copy()
            self._special_here[self.ends[(self.ends >= 0) & (self.ends < len(self._special))]] = True
        self._progress = {
            row.index: _Progress(
                0 if self.ingest_prompt else len(row.tokens) - len(row.new_tokens), generator(self.seed, row.index)
            )
            for row in state.rows
        }

    def end(self, state: DecodeState) -> None:
        super().end(state)
        self._progress = {}

    def propose(self, state: DecodeState) -> list[Proposal | None]:
        return [self._propose_row(row, state.depth_left(b)) for b, row in enumerate(state.rows)]

    def _propose_row(self, row: Row, depth_left: int) -> Proposal:
        tokens, table = row.tokens, self.table_of(row)
        if self.update == "window":
            table.feed(tokens[-WINDOW:], 0, self._special_here, *self._rule)
        else:
            self._feed(row)
        depth = min(self.depth, depth_left)
        if len(tokens) < 2 or depth == 0:
            return Proposal(DraftTree.root(int(tokens[-1])))
        tree = self._grow(table, self._progress[row.index].state, int(tokens[-2]), int(tokens[-1]))
        parents, drafted, prior = select(*tree, self.ends, depth, self.budget, self._floor)
        return Proposal(DraftTree(Topology(parents), drafted, prior=prior))

    def _grow(
        self, table: TrigramTable, state: np.ndarray, before: int, root: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        t, s, v = table.rows, self._scratch, self._target.vocab_size
        if self.search == "bestfirst":
            return best_first(t, s, v, before, root, self.depth, self.budget)
        searched = max(self.depth - 1, 1)
        n = monte_carlo(t, s, state, v, before, root, searched, SIMULATIONS, C1, C2, self.published)
        return extract(t, s, n, v, self.budget, self.published)

    def _feed(self, row: Row) -> None:
        """Learn the triples that end in tokens not learned yet."""
        progress, tokens = self._progress[row.index], row.tokens
        self.table_of(row).feed(tokens, progress.fed, self._special_here, *self._rule)
        progress.fed = len(tokens)

    def observe(
        self,
        state: DecodeState,
        proposals: Sequence[Proposal | None],
        output: StepOutput,
        verdicts: Sequence[Verdict | None],
    ) -> None:
        for b, (row, proposal) in enumerate(zip(state.rows, proposals, strict=True)):
            if self.update == "once":
                self._feed(row)
            if self.logit_update and proposal is not None and proposal.tree is not None:
                self._learn_logits(row, b, proposal.tree, output)

    def _learn_logits(self, row: Row, b: int, tree: DraftTree, output: StepOutput) -> None:
        """Learn the likeliest tokens after every node of a verified tree, under the bigram (parent, node)."""
        assert output.kept is not None
        at = self._target.lengths[b] - (len(output.kept[b]) - output.pending[b])  # the root's place in row.tokens
        first = 0 if at > 0 else 1  # a text's first token makes no bigram
        parents = np.array(tree.topology.parents)
        above = tree.tokens[parents]
        above[0] = row.tokens[at - 1]
        contexts = np.stack([above, tree.tokens], axis=1)[first:]  # [N, 2]
        top = output.top(self.logit_update)[b, : len(tree)]  # [N, m]
        logits = output.logits[b, : len(tree)].float()  # [N, V]
        chances = (logits.gather(-1, torch.from_numpy(top).to(logits.device)) - logits.logsumexp(-1, True)).exp()
        self.table_of(row).blend(
            contexts, top[first:].copy(), chances[first:].cpu().numpy().copy(), self._special_here, *self._rule
        )

    def learn_document(self, tokens: np.ndarray) -> None:
        """Count the triples of one document."""
        self.table.count(tokens, self._special)
