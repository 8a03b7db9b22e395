"""What is timed: one arm per method, all called alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from specdec.decoder import Decoder
from specdec.graphs import Graphs
from specdec.stats import GenerationStats

# what a learning drafter knows when a prompt begins
STATES = {
    "cold": "the drafter forgets everything before each prompt",
    "warm": "the drafter keeps what the earlier prompts of the run taught it",
    "corpus": "the drafter starts each prompt from its table file and keeps nothing of earlier prompts",
    "corpus+warm": "the drafter starts from its table file and keeps what the earlier prompts of the run taught it",
}


@dataclass(frozen=True)
class Settings:
    """What every arm is asked for.

    Attributes:
        max_new_tokens: most tokens per prompt.
        temperature: 0 means greedy.
    """

    max_new_tokens: int
    temperature: float

    def arguments(self) -> dict[str, Any]:
        """``generate()``'s arguments. Filters are switched off by name: transformers samples with top_k=50 unasked."""
        if self.temperature == 0:
            return {"max_new_tokens": self.max_new_tokens, "do_sample": False}
        return {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": True,
            "temperature": self.temperature,
            "top_k": 0,
            "top_p": 1.0,
        }


class Arm(Protocol):
    """One method.

    Attributes:
        name: the row's name.
        lossless: the text, or its distribution, is the target's own.
        state: one of ``STATES``; None when the method does not learn.
    """

    name: str
    lossless: bool

    @property
    def state(self) -> str | None: ...

    @property
    def stats(self) -> GenerationStats | None:
        """Costs of the last call as the method counts them; None lets the harness count forwards."""

    def reset(self) -> None:
        """Called before every prompt, outside the timing."""

    def forget(self) -> None:
        """Drop everything learned, warm or not."""

    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, settings: Settings) -> torch.Tensor:
        """int64 [B, S] left padded -> int64 [B, S + new]."""


class DecoderArm:
    """A ``Decoder`` under a name.

    Args:
        name: the row's.
        decoder: the method; what its drafter has learned from earlier requests is forgotten.
        warm: keep what a learning drafter has learned from one prompt to the next.
    """

    def __init__(self, name: str, decoder: Decoder, warm: bool = False):
        self.name, self.decoder = name, decoder
        self.lossless = decoder.lossless
        self._learns = decoder.drafter.warm is not None
        self._warm = warm
        self.forget()
        self._corpus = bool(decoder.drafter.warm)  # after a reset: it comes from a file

    @property
    def state(self) -> str | None:
        if not self._learns:
            return None
        if self._corpus:
            return "corpus+warm" if self._warm else "corpus"
        return "warm" if self._warm else "cold"

    @property
    def stats(self) -> GenerationStats | None:
        return self.decoder.stats

    @property
    def graphs(self) -> int:
        """CUDA graphs recorded so far; those of calls that were timed are in their time."""
        run = self.decoder.target.run
        return run.count if isinstance(run, Graphs) else 0

    def reset(self) -> None:
        if not self._warm:
            self.forget()

    def forget(self) -> None:
        if self._learns:
            self.decoder.drafter.reset()

    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, settings: Settings) -> torch.Tensor:
        output = self.decoder.generate(input_ids, attention_mask=attention_mask, **settings.arguments())
        assert isinstance(output, torch.Tensor)
        return output
