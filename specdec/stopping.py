"""When a row ends: at exactly the token where ``generate()`` would end it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from transformers.generation import EosTokenCriteria, MaxLengthCriteria

from specdec.state import Row


class StopRules:
    """transformers' stopping criteria, checked after every token of every row.

    End tokens and lengths are checked without tensors; everything else is called as ``generate()`` would call it,
    with the row alone.

    Args:
        criteria: as prepared by ``generate()``.

    Attributes:
        eos: end tokens.
        max_length: absolute, prompt and padding included; None without a length rule.
    """

    def __init__(self, criteria: Iterable):
        self.eos: frozenset[int] = frozenset()
        self.max_length: int | None = None
        self._others = []
        for rule in criteria:
            if type(rule) is EosTokenCriteria:
                self.eos |= frozenset(rule.eos_token_id.flatten().tolist())
            elif type(rule) is MaxLengthCriteria:
                self.max_length = min(rule.max_length, self.max_length or rule.max_length)
            else:
                self._others.append(rule)

    def commit(self, row: Row, tokens: list[int]) -> list[int]:
        """Append ``tokens`` to the row until it stops; returns those appended and sets ``row.done``."""
        for i, token in enumerate(tokens):
            row.append(token)
            if token in self.eos or len(row) >= row.max_length or self._stops(row):
                row.done = True
                return tokens[: i + 1]
        return tokens

    def _stops(self, row: Row) -> bool:
        if not self._others:
            return False
        ids = row.ids[None]
        # the verifier has recorded the whole path; a criterion sees the scores of the tokens committed so far
        scores = tuple(s[None] for s in row.recorded_scores[: len(row) - row.prompt_length]) or None
        return any(bool(torch.as_tensor(rule(ids, scores)).any()) for rule in self._others)
