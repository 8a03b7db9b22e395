"""The common part of drafters that carry a trained head."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Generic, TypeVar

import torch

from specdec.contracts import Drafter, Verdict
from specdec.errors import UsageError
from specdec.heads.checkpoint import Head
from specdec.state import DecodeState
from specdec.structure import Needs
from specdec.target import StepOutput, Target
from specdec.tree import Proposal

AnyHead = TypeVar("AnyHead", bound=Head)


class HeadDrafter(Drafter, Generic[AnyHead]):
    """Loads a head when it is made, and fits it to the target when it is bound.

    Args:
        checkpoint: a head, its folder, or a hub id.
        size: most nodes of a draft tree, root included; None: chosen by the kind of device.

    Raises:
        UsageError: the checkpoint cannot be read or is another method's; size below 1.
    """

    head_class: ClassVar[type[Head]]
    training = "specdec train"
    requires = "heads trained for the target (checkpoint=...)"
    cpu_size: ClassVar[int] = 8
    gpu_size: ClassVar[int] = 64

    def __init__(self, checkpoint: Head | str | Path, size: int | None = None):
        if size is not None and size < 1:
            raise UsageError(f"size={size} must be at least 1 (the root alone)")
        if isinstance(checkpoint, Head) and not isinstance(checkpoint, self.head_class):
            raise UsageError(
                f"checkpoint: it holds {checkpoint.method} heads, not {self.name}; use drafter {checkpoint.method!r}"
            )
        head = checkpoint if isinstance(checkpoint, Head) else self.head_class.from_pretrained(checkpoint)
        self.head: AnyHead = head  # type: ignore[assignment]
        self._size = size

    @property
    def needs(self) -> Needs:  # type: ignore[override]
        return self.head.needs

    def bind(self, target: Target) -> None:
        self.target = target
        self.head.to(device=target.device, dtype=target.model.dtype).eval()
        self.head.attach(target)
        self.size = self._size or (self.cpu_size if target.device.type == "cpu" else self.gpu_size)
        self.budget = self.size

    def begin(self, state: DecodeState) -> None:
        self._hidden: dict[int, torch.Tensor] = {}

    def end(self, state: DecodeState) -> None:
        self._hidden = {}

    def observe(
        self,
        state: DecodeState,
        proposals: Sequence[Proposal | None],
        output: StepOutput,
        verdicts: Sequence[Verdict | None],
    ) -> None:
        """Keep the final hidden state [d] of every row's last token in the cache."""
        for b, (row, verdict) in enumerate(zip(state.rows, verdicts, strict=True)):
            if verdict is not None:
                self._hidden[row.index] = output.kept_hidden("final_hidden", b)[-1]

    def hidden(self, state: DecodeState) -> torch.Tensor | None:
        """[B, d], what ``observe`` kept of each row; None before the prompt has been read."""
        if any(row.index not in self._hidden for row in state.rows):
            return None
        return torch.stack([self._hidden[row.index] for row in state.rows])
