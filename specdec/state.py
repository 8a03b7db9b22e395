"""What a request looks like while it is being decoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from specdec.sampling import Randomness, Sampler
from specdec.target import Target


class Row:
    """One sequence of the batch.

    Args:
        index: its row in the caller's batch; stays the same when other rows finish.
        prompt: int64 [S], left padding included.
        pad: how many leading tokens of ``prompt`` are padding.
        max_length: length at which the row stops, padding included.
        randomness: this row's own.
        sampler: this row's processors (stateful ones must not be shared between rows).

    Attributes:
        done: set by emit when a stopping rule holds.
    """

    def __init__(
        self, index: int, prompt: torch.Tensor, pad: int, max_length: int, randomness: Randomness, sampler: Sampler
    ):
        self.index, self.pad, self.max_length = index, pad, max_length
        self.randomness, self.sampler = randomness, sampler
        self.done = False
        self.prompt_length = len(prompt)
        # tokens are written in place; the slack holds a path while a processor looks at it
        self._ids = torch.zeros(max(max_length, len(prompt)) + 1, dtype=torch.long)
        self._ids[: len(prompt)] = prompt
        self._numpy = self._ids.numpy()
        self._n = len(prompt)
        self.recorded_scores: list[torch.Tensor] = []
        self.recorded_logits: list[torch.Tensor] = []

    def __len__(self) -> int:
        """Tokens so far, padding included."""
        return self._n

    @property
    def ids(self) -> torch.Tensor:
        """int64 [n] on the host, padding included: what processors and stopping criteria see. A view."""
        return self._ids[: self._n]

    @property
    def tokens(self) -> np.ndarray:
        """int64 [n], the committed tokens without padding. A view."""
        return self._numpy[self.pad : self._n]

    @property
    def new_tokens(self) -> np.ndarray:
        """int64, the tokens generated so far. A view."""
        return self._numpy[self.prompt_length : self._n]

    @property
    def tokens_left(self) -> int:
        """How many more tokens may be emitted."""
        return self.max_length - self._n

    def append(self, token: int) -> None:
        """Commit one token."""
        if self._n == len(self._ids):
            self._ids = torch.cat([self._ids, torch.zeros_like(self._ids)])
            self._numpy = self._ids.numpy()
        self._numpy[self._n] = token
        self._n += 1

    def after(self, path: Sequence[int]) -> torch.Tensor:
        """The prefix at a node: committed tokens plus the tokens of ``path``. A view, valid until the next call."""
        end = self._n + len(path)
        if end > len(self._ids):
            self._ids = torch.cat([self._ids, torch.zeros(end, dtype=torch.long)])
            self._numpy = self._ids.numpy()
        self._numpy[self._n : end] = path
        return self._ids[:end]


@dataclass
class DecodeState:
    """All rows still being decoded, in the Target's order, and what drafters and verifiers may ask about them.

    Attributes:
        rows: active rows.
        target: the model.
        budget: most columns (nodes + probes) one row may use in a step.
        eos: tokens that end a row.
        record_scores, record_logits: keep what the caller wants returned.
    """

    rows: list[Row]
    target: Target
    budget: int
    eos: frozenset[int] = frozenset()
    record_scores: bool = False
    record_logits: bool = False

    def only(self, rows: Sequence[int]) -> DecodeState:
        """The same state with some of its rows, for drafters composed of others."""
        return replace(self, rows=[self.rows[b] for b in rows])

    def depth_left(self, b: int) -> int:
        """Deepest useful node: one token is always left for the bonus, and positions must exist."""
        row = self.rows[b]
        left = row.tokens_left - 1
        if self.target.context is not None:
            left = min(left, self.target.context - len(row.tokens))
        return max(left, 0)

    def scores(self, b: int, path: Sequence[int], logits: torch.Tensor) -> torch.Tensor:
        """Processed scores float32 [V] at a node of row b. Call once per visited node, root first.

        Args:
            b: row.
            path: tokens from the root's child to the node.
            logits: the node's raw logits [V].
        """
        row = self.rows[b]
        scores = row.sampler.scores(row.after(path), logits)
        if self.record_scores:
            row.recorded_scores.append(scores)
        if self.record_logits:
            row.recorded_logits.append(logits.float())
        return scores
