"""Randomness and the target's processed law."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable

import torch
from transformers import LogitsProcessorList
from transformers.generation import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

_WARPERS = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper, TypicalLogitsWarper)


class Randomness:
    """Every random decision of one row: drafting, acceptance and drawing.

    One object per row, so rows never influence each other and tests can enumerate a whole decoding loop by
    replacing it. ``accept`` uses the host's generator, so that no test waits for the device.
    """

    def __init__(self, seed: int, device: torch.device | str = "cpu"):
        self._host = random.Random(seed)
        self._device = torch.Generator(device=device)
        self._device.manual_seed(seed)

    def accept(self, ratio: float) -> bool:
        """True with probability min(1, ratio). Strict, so that ratio 0 never accepts."""
        return self._host.random() < ratio

    def draw(self, probs: torch.Tensor) -> int:
        """One token from ``probs`` [V], by inversion: torch.multinomial takes ten times as long on a CPU."""
        wide = torch.float32 if probs.device.type == "mps" else torch.float64
        edges = probs.cumsum(-1, dtype=wide)
        u = torch.rand(1, dtype=wide, device=probs.device, generator=self._device) * edges[-1]
        # right: the first edge beyond u, so that a token of probability 0 is never drawn
        return min(int(torch.searchsorted(edges, u, right=True)), len(probs) - 1)

    def draws(self, probs: torch.Tensor, k: int, replace: bool) -> torch.Tensor:
        """k tokens for each row of ``probs`` [P, V] -> int64 [P, k], in draw order.

        Without replacement, a row with fewer than k tokens of positive probability yields tokens of probability 0
        in its last columns; they were not drawn and must be dropped.
        """
        if replace:
            return torch.multinomial(probs, k, replacement=True, generator=self._device)
        # the order of arrival in an exponential race is sequential sampling without replacement
        return self.race(probs).topk(k, dim=-1, largest=False).indices

    def race(self, rates: torch.Tensor) -> torch.Tensor:
        """Independent times Exp(rate) at which tokens of ``rates`` [..., V] arrive; infinite where a rate is 0."""
        return torch.empty_like(rates).exponential_(generator=self._device).clamp_min_(1e-30) / rates


class NonFiniteLogits(ValueError):
    """The target produced NaN or infinite logits; no token can be chosen from them."""


def check_finite(best: float) -> None:
    """Raise unless the largest logit of a row is finite (NaN wins every max, so the maximum tells)."""
    if not math.isfinite(best):
        raise NonFiniteLogits(
            f"the target's largest logit is {best}, so no token can be chosen; load the model in float32 or "
            "bfloat16, and check its weights and any custom logits processor"
        )


class Sampler:
    """Turns a row of logits and its true prefix into the law plain decoding would use there.

    Args:
        processors: transformers' processors and warpers in ``generate()``'s order.
        do_sample: False means argmax; softmax is then never called.
    """

    def __init__(self, processors: Iterable | None = None, do_sample: bool = False):
        self.processors = LogitsProcessorList(processors or [])
        self.do_sample = do_sample

    @property
    def is_argmax(self) -> bool:
        """Greedy without processors: the choice depends on the raw logits alone."""
        return not self.do_sample and not self.processors

    def scores(self, prefix: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Processed scores float32 [V] from raw ``logits`` [V] after ``prefix`` int64 [n] (left padding included)."""
        scores = logits.to(dtype=torch.float32, copy=True)[None]  # [1, V]
        if self.processors:
            scores = self.processors(prefix[None].to(logits.device), scores)
        return scores[0]

    def warp(self, logits: torch.Tensor) -> torch.Tensor:
        """A draft model's law made alike: the request's temperature, top-k, top-p and min-p on ``logits`` [n, V].

        Only the rules that look at one row of scores and keep no state; float32 probabilities [n, V].
        """
        scores = logits.float()
        for warper in self.processors:
            if type(warper) in _WARPERS:
                scores = warper(None, scores)
        return torch.softmax(scores, dim=-1)

    @staticmethod
    def probabilities(scores: torch.Tensor) -> torch.Tensor:
        """The law of processed ``scores`` [V]: float32 [V]."""
        check_finite(float(scores.max()))
        return torch.softmax(scores, dim=-1)

    @staticmethod
    def argmax(scores: torch.Tensor) -> int:
        """The greedy token of processed ``scores`` [V]."""
        best, token = scores.max(dim=-1)
        check_finite(float(best))
        return int(token)
