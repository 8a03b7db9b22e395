"""The drafter: guesses from the pool as a tree, the window as probes under its root."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from specdec.contracts import Verdict
from specdec.drafters.lookahead.pool import Pool
from specdec.drafters.lookahead.window import Window, most_probes
from specdec.errors import CompatibilityError, UsageError
from specdec.state import DecodeState, Row
from specdec.structure import Needs
from specdec.tables import TableDrafter
from specdec.tables.trees import select, trie
from specdec.target import StepOutput, Target
from specdec.tree import DraftTree, Probes, Proposal, Topology

# (N, W, G): the paper's for a 7B model on a GPU; on a CPU every column costs time
PUBLISHED, ON_CPU = (5, 15, 15), (5, 1, 4)
CPU_FLOOR, GPU_FLOOR = 0.1, 0.01  # least chance of a node
# Chance that any guess of a key begins right, that a right beginning goes on, and the weight of the next older guess.
# Measured on training text with the embedded model, and rough: the newest guess began right in 0.49 of the steps that
# had one, the second in 0.13, the third in 0.06.
BEGINS, GOES_ON, OLDER = 0.65, 0.8, 0.35


class Lookahead(TableDrafter[Pool]):
    """Drafts n-grams that appeared in a Jacobi iteration of the target running ahead of the text (arXiv 2402.02057).

    Every step carries a window of guesses about the text ahead, W columns on N - 1 levels, whose argmaxes make the next
    step's window and W new n-grams. Those that begin with the current token are drafted: at most G, merged into a tree.
    The target must be able to verify trees.

    Args:
        ngram: N >= 3, key included. None: 5.
        window: W >= 1. None: 15 on a GPU, 1 on a CPU.
        guesses: G, continuations kept and drafted per token, the newest first. None: 15 on a GPU, 4 on a CPU.
        seed: of the random tokens the window starts from. They are taken from the prompt, end tokens left out, or from
            the vocabulary where fewer than two are left.
        from_prompt: learn the n-grams of the prompt and of the committed text too. None: unless ``published``.
        published: the reference's behaviour. The defaults become its own (5, 15, 15, no ``from_prompt``, a pool per
            request), nothing is left out as too unlikely, and the last token of a guess is not drafted: the
            reference commits at most N - 1 tokens a step even when all N - 1 guessed tokens are right.
        scope: see ``TableDrafter``; None: "shared", since n-grams of one text help the next and an empty pool drafts
            nothing, or "request" if ``published``.
        table: see ``TableDrafter``.

    Memory: see ``Pool``. Its size is fixed; each row of a "request" pool has its own.

    Raises:
        UsageError: an option out of range.
    """

    name = "lookahead"
    summary = "n-grams found by Jacobi iteration on the target itself, verified as a tree"
    needs = Needs(final_hidden=True)

    def __init__(
        self,
        ngram: int | None = None,
        window: int | None = None,
        guesses: int | None = None,
        seed: int = 0,
        from_prompt: bool | None = None,
        published: bool = False,
        scope: Literal["shared", "request"] | None = None,
        table: str | Path | None = None,
    ):
        super().__init__(scope or ("request" if published else "shared"), table)
        for what, value, least in (("ngram", ngram, 3), ("window", window, 1), ("guesses", guesses, 1)):
            if value is not None and value < least:
                raise UsageError(f"{what}={value} must be at least {least}")
        if seed < 0:
            raise UsageError(f"seed={seed} must not be negative")
        self.seed, self.published = seed, published
        self.from_prompt = not published if from_prompt is None else from_prompt
        self._asked = (ngram, window, guesses)
        self._set_sizes(PUBLISHED)

    def _set_sizes(self, default: tuple[int, int, int]) -> None:
        self.ngram, self.window, self.guesses = (
            own if own is not None else usual for own, usual in zip(self._asked, default, strict=True)
        )
        self.depth = self.ngram - 2 if self.published else self.ngram - 1
        self._nodes = 1 + self.guesses * self.depth
        self.budget = self._nodes + most_probes(self.ngram, self.window)

    def bind(self, target: Target) -> None:
        if target.capability.tier != "tree":
            raise CompatibilityError(
                f"lookahead needs a model that can verify trees, its window is columns with a mask of their own: "
                f"{target.capability.reason}"
            )
        gpu = target.device.type == "cuda"
        if self._table is None:  # the pool keeps its shape for life
            self._set_sizes(PUBLISHED if gpu or self.published else ON_CPU)
        self._floor = 0.0 if self.published else GPU_FLOOR if gpu else CPU_FLOOR
        super().bind(target)

    def empty(self) -> Pool:
        return Pool(self._target.vocab_size, self.guesses, self.ngram)

    def compile(self) -> None:
        toy, ones = Pool(2, 1, 3), np.ones(3, dtype=np.int64)
        toy.insert(ones[None])
        toy.feed(ones, 0)
        toy.merge(toy)
        self._tree(toy, 1, ones, 1, 2)

    # ---- a request --------------------------------------------------------------------------------------------

    def begin(self, state: DecodeState) -> None:
        super().begin(state)
        self._fed = {row.index: 0 for row in state.rows}
        self._windows = {row.index: self._window(row) for row in state.rows}
        self._probes: dict[int, Probes] = {}

    def _window(self, row: Row) -> Window:
        prompt = row.tokens.copy()
        source = prompt[~np.isin(prompt, self.ends)]
        if len(source) < 2:
            source = np.setdiff1d(np.arange(self._target.vocab_size), [*self.ends, *self._special_ids()])
        if not len(source):  # a toy vocabulary of special tokens
            source = np.arange(self._target.vocab_size)
        return Window(self.ngram, self.window, np.random.default_rng((self.seed, row.index)), source)

    def _special_ids(self) -> list[int]:
        config = self._target.config
        ids = list(getattr(self._target.tokenizer, "all_special_ids", []))
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(config, name, None)
            ids += value if isinstance(value, list) else [] if value is None else [value]
        return ids

    def propose(self, state: DecodeState) -> list[Proposal | None]:
        return [self._row(state, b) for b in range(len(state.rows))]

    def _row(self, state: DecodeState, b: int) -> Proposal:
        row = state.rows[b]
        root, left, pool = int(row.tokens[-1]), state.depth_left(b), self.table_of(row)
        if self.from_prompt:
            pool.feed(row.tokens, self._fed[row.index])
            self._fed[row.index] = len(row.tokens)
        self._probes.pop(row.index, None)
        if left == 0:
            return Proposal(DraftTree.root(root))
        parents, tokens, prior = self._tree(pool, root, self.ends, min(left, self.depth), self._nodes)
        tree = DraftTree(Topology(parents), tokens, prior=prior)
        if left == 1 and self.scope == "request":
            return Proposal(tree)  # nothing found now could still be drafted
        probes = self._probes[row.index] = self._windows[row.index].probes(root)
        return Proposal(tree, probes)

    def _tree(
        self, pool: Pool, root: int, ends: np.ndarray, depth: int, nodes: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The guesses for ``root`` merged where they begin alike: parents, tokens, prior of what is worth a column."""
        paths = pool.guesses(root)  # [P, N - 1]
        weights = OLDER ** np.arange(len(paths))
        parents, tokens, weight = trie(root, paths, weights)
        # a node's share of its parent's guesses, times the chance that any of them is right
        prior = (weight / np.maximum(weight[parents], 1e-9) * np.where(parents > 0, GOES_ON, BEGINS)).astype(np.float32)
        return select(parents, tokens, prior, ends, depth, nodes, self._floor)

    def observe(
        self,
        state: DecodeState,
        proposals: Sequence[Proposal | None],
        output: StepOutput,
        verdicts: Sequence[Verdict | None],
    ) -> None:
        # a step without this window (a chunk of the prompt, another drafter's) leaves it as it is
        mine = [
            b
            for b, (row, proposal) in enumerate(zip(state.rows, proposals, strict=True))
            if proposal is not None and proposal.probes is not None and proposal.probes is self._probes.get(row.index)
        ]
        if not mine:
            return
        windows = [self._windows[state.rows[b].index] for b in mine]
        hidden = []
        for b, window in zip(mine, windows, strict=True):
            count = len(self._probes[state.rows[b].index])
            hidden.append(output.probe_hidden("final_hidden", b)[count - window.read : count])
        predicted = self._target.logits(torch.cat(hidden)).argmax(dim=-1).cpu().numpy()  # only ids leave the device
        start = 0
        for b, window in zip(mine, windows, strict=True):
            stop = start + window.read
            ngrams = window.advance(predicted[start:stop], self.ends)
            if ngrams is not None:
                self.table_of(state.rows[b]).insert(ngrams)
            start = stop

    def learn_document(self, tokens: np.ndarray) -> None:
        self.table.feed(tokens, 0)
