"""The drafter: copy what followed the current suffix, in this text or in earlier outputs."""

from __future__ import annotations

from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

import numpy as np

from specdec.drafters.suffix.automaton import Automaton, follow
from specdec.drafters.suffix.speculate import speculate
from specdec.errors import UsageError
from specdec.state import DecodeState, Row
from specdec.tables import TableDrafter
from specdec.target import Target
from specdec.tree import DraftTree, Proposal, Topology

CUDA_SIZE, CPU_SIZE = 64, 16
CUDA_MIN_PROB, CPU_MIN_PROB = 0.01, 0.2
ALPHA = 4.0
# Fits the embedded model's greedy text on training prompts best: in each tenth of the scale, priors and the share
# accepted agree within 0.1. Text sampled at temperature 1 repeats itself less: there priors are about twice too high.
NOVELTY = 2.0
PUBLISHED_ALPHA, PUBLISHED_MIN_PROB = 1.0, 0.1

_ROOM = 1 << 15  # tokens a row's automaton has room for at first, beyond the prompt; doubling it takes milliseconds
_CORPUS_ROOM = 1 << 19  # the same for half a corpus: at the default capacity nothing is ever copied


class Corpus:
    """Documents (earlier outputs, or text given to ``learn``) in two suffix automata, an older and a younger one.

    New documents enter the younger. When it is full, the older is dropped as a whole and the younger takes its place:
    between half of ``capacity`` and all of it is remembered. Of a document longer than half the capacity the end is
    kept. Memory follows what is stored: about 130 bytes a token, and at least
    16 a token of half the capacity once there is a document.

    Attributes:
        version: changes whenever a document is added.
    """

    def __init__(self, vocab_size: int, capacity: int):
        self.vocab_size, self.half = vocab_size, capacity // 2
        self.version = 0
        self._generations: list[tuple[Automaton, list[np.ndarray]]] = []

    @property
    def filled(self) -> bool:
        return bool(self._generations)

    @property
    def automata(self) -> list[Automaton]:
        """At most two, the younger first."""
        return [automaton for automaton, _ in reversed(self._generations)]

    @property
    def documents(self) -> list[np.ndarray]:
        """int32 [n] each, oldest first."""
        return [document for _, documents in self._generations for document in documents]

    def add(self, document: np.ndarray) -> None:
        """Store one document, int64 [n], ids below the vocabulary's size."""
        document = document[max(len(document) - self.half, 0) :]
        if not len(document):
            return
        if not self._generations or len(self._generations[-1][0]) + len(document) > self.half:
            self._generations = [*self._generations[-1:], (Automaton(min(self.half, _CORPUS_ROOM)), [])]
        automaton, documents = self._generations[-1]
        automaton.new_document()
        automaton.append(document)
        documents.append(document.astype(np.int32))
        self.version += 1

    def arrays(self) -> dict[str, np.ndarray]:
        """``tokens`` int32 [n] of all documents, oldest first, and ``starts`` int64 [d], where each begins."""
        documents = self.documents
        starts = np.cumsum([0, *map(len, documents)])[:-1]
        tokens = np.concatenate([np.empty(0, dtype=np.int32), *documents])
        return {"tokens": tokens, "starts": starts.astype(np.int64)}

    def facts(self) -> dict[str, Any]:
        return {}

    def fill(self, arrays: dict[str, np.ndarray], facts: dict[str, Any]) -> None:
        tokens, starts = arrays["tokens"], arrays["starts"]
        if tokens.dtype != np.int32 or starts.dtype != np.int64 or tokens.ndim != 1 or starts.ndim != 1:
            raise ValueError("tokens must be int32 [n] and starts int64 [d]")
        if not len(tokens) or tokens.min() < 0 or tokens.max() >= self.vocab_size:
            raise ValueError(f"tokens holds no ids, or ids outside 0..{self.vocab_size - 1}")
        ends = np.append(starts[1:], len(tokens))
        if not len(starts) or starts[0] != 0 or (ends <= starts).any():
            raise ValueError("starts must begin with 0 and rise to below the number of tokens")
        self._generations = []
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            self.add(tokens[start:end].astype(np.int64))

    def merge(self, other: Corpus) -> None:
        """Add the other's documents after ours, as the newest."""
        for document in other.documents:
            self.add(document.astype(np.int64))


class _Text:
    """One row: its own automaton, and where its current suffix stands in the corpus."""

    def __init__(self, row: Row, corpus: Corpus):
        n = len(row.tokens)
        self.row, self.corpus = row, corpus
        self.automaton = Automaton(n + min(max(row.tokens_left, 0), _ROOM))
        self._restart()
        self.feed()

    def _restart(self) -> None:
        self._version, self._read = self.corpus.version, 0
        self._matches = [(automaton, 0, 0) for automaton in self.corpus.automata]

    def feed(self) -> None:
        """Read the committed tokens not read yet."""
        tokens = self.row.tokens
        self.automaton.append(tokens[len(self.automaton) :])
        if self._version != self.corpus.version:  # documents came in during the request
            self._restart()
        new, self._read = tokens[self._read :], len(tokens)
        self._matches = [(a, *follow(a.pools, new, state, length)) for a, state, length in self._matches]

    def matches(self) -> Iterator[tuple[Automaton, int, int, int]]:
        """Automaton, state and length of the longest match, and the text's end in it: own text first, -1 elsewhere."""
        state, length = self.automaton.longest_repeat()
        yield self.automaton, state, length, len(self.automaton)
        for automaton, state, length in self._matches:
            yield automaton, state, length, -1


class Suffix(TableDrafter[Corpus]):
    """Drafts what followed earlier occurrences of the current suffix, as a tree weighted by how often it did.

    Every row has an automaton of its own text (prompt and output). Outputs of finished requests and documents given to
    ``learn`` are kept in a ``Corpus`` that all later requests read; prompts are not kept. Outputs enter it when their
    request ends, so rows of a batch never influence each other. Of the two drafts the one with the higher expected
    gain is taken, the row's own on a tie.

    A node's prior is c / (n + 2/m): a continuation seen c times after the n earlier occurrences of the m tokens before
    it (the draft's included). One occurrence of a long match is good evidence, one of a single token is not.

    Memory: 130 bytes per token of a row while it is decoded, and ``capacity`` times 130 bytes for the corpus.

    Args:
        size: most nodes of a tree, root included; None: 64 on a GPU, 16 on a CPU, where every column costs time.
        alpha, offset: a match of p tokens drafts at most alpha * p + offset tokens; ``alpha`` None: 4 (published: 1).
        min_prob: least probability of a drafted path; None: 0.01 on a GPU, 0.2 on a CPU (published: 0.1).
        max_depth: deepest node; None: no limit.
        tree: False drafts a chain, the most frequent continuation.
        published: probabilities as published: plain ratios in which the live suffix counts as an occurrence without a
            continuation, and a copy stops where the text ends.
        capacity: most tokens of earlier outputs kept, see ``Corpus``; 0: none.
        scope: "request" keeps no outputs; a file given as ``table`` is still read.
        table: see ``TableDrafter``.

    Raises:
        UsageError: an option out of range.
    """

    name = "suffix"
    summary = "copies what followed the longest match, in this text and in earlier outputs"
    tolerates_gaps = True

    def __init__(
        self,
        size: int | None = None,
        alpha: float | None = None,
        offset: float = 0.0,
        min_prob: float | None = None,
        max_depth: int | None = None,
        tree: bool = True,
        published: bool = False,
        capacity: int = 1_000_000,
        scope: Literal["shared", "request"] = "shared",
        table: str | Path | None = None,
    ):
        super().__init__(scope, table)
        if size is not None and size < 1:
            raise UsageError(f"size={size} must be at least 1 (the root alone)")
        if alpha is not None and not 0 <= alpha <= 1e6:
            raise UsageError(f"alpha={alpha} must be between 0 and 1e6 drafted tokens per matched token")
        if not -1e6 <= offset <= 1e6:
            raise UsageError(f"offset={offset} must be between -1e6 and 1e6 drafted tokens")
        if min_prob is not None and not 0 <= min_prob <= 1:
            raise UsageError(f"min_prob={min_prob} must be between 0 and 1")
        if max_depth is not None and max_depth < 1:
            raise UsageError(f"max_depth={max_depth} must be at least 1, or None for no limit")
        if not 0 <= capacity <= 1 << 28:
            raise UsageError(f"capacity={capacity} must be between 0 (keep nothing) and {1 << 28} tokens")
        self.size, self.min_prob, self.max_depth = size, min_prob, max_depth
        self.alpha = (PUBLISHED_ALPHA if published else ALPHA) if alpha is None else alpha
        self.offset, self.tree, self.published, self.capacity = offset, tree, published, capacity
        self.budget = CUDA_SIZE if size is None else size
        self._texts: dict[int, _Text] = {}

    def empty(self) -> Corpus:
        return Corpus(self._target.vocab_size, self.capacity)

    def compile(self) -> None:
        toy, one = Automaton(1), np.zeros(1, dtype=np.int64)
        for _ in range(3):
            toy.append(one)  # grows
        follow(toy.pools, one, 0, 0)
        self._speculate(toy, *toy.longest_repeat(), 3, 1, one)

    def bind(self, target: Target) -> None:
        cuda = target.device.type == "cuda"
        if self.size is None:
            self.budget = CUDA_SIZE if cuda else CPU_SIZE
        default = PUBLISHED_MIN_PROB if self.published else CUDA_MIN_PROB if cuda else CPU_MIN_PROB
        self._floor = float(default if self.min_prob is None else self.min_prob)
        super().bind(target)

    def _copy(self) -> Corpus:
        return self.table  # nothing is written while a request runs

    def begin(self, state: DecodeState) -> None:
        super().begin(state)
        self._texts = {row.index: _Text(row, self.table_of(row)) for row in state.rows}

    def propose(self, state: DecodeState) -> list[Proposal | None]:
        return [self._row(self._texts[row.index], state.depth_left(b)) for b, row in enumerate(state.rows)]

    def _row(self, text: _Text, depth: int) -> Proposal:
        text.feed()
        root = text.row.tokens[-1]
        depth = depth if self.max_depth is None else min(depth, self.max_depth)
        drafts = [self._speculate(*match, depth, self.ends) for match in text.matches()]
        parents, tokens, chance, score = max(drafts, key=itemgetter(3))  # the first of equals: the row's own text
        if not score:
            return Proposal(DraftTree.root(int(root)))
        topology = Topology(np.concatenate([[-1], parents + 1]))
        prior = np.concatenate([[1.0], chance]).astype(np.float32)
        return Proposal(DraftTree(topology, np.concatenate([[root], tokens]), prior=prior))

    def _speculate(
        self, automaton: Automaton, state: int, length: int, live: int, depth: int, ends: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
        return speculate(
            automaton.pools,
            state,
            length,
            -1 if self.published else live,
            self.budget - 1,
            float(self.alpha),
            float(self.offset),
            self._floor,
            0.0 if self.published else NOVELTY,
            depth,
            ends,
            self.tree,
            not self.published,
        )

    def end(self, state: DecodeState) -> None:
        if self.scope == "shared":
            for text in self._texts.values():
                self.table.add(text.row.new_tokens)
        self._texts = {}
        super().end(state)

    def learn_document(self, tokens: np.ndarray) -> None:
        self.table.add(tokens)
