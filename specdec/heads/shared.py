"""What heads borrow from the target, and what they say along a text.

Shapes: B rows, S positions, K depths, d the target's hidden size, V its vocabulary. Everywhere ``h_i`` is the output of
the target's final norm at position i, ``p_i`` its next-token distribution there (about token i + 1), and depth k counts
from 0: a head's state for depth k at position i imitates ``p_{i+k+1}`` and so predicts token i + k + 2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.sharding import whole
from specdec.structure import Head as OutputHead
from specdec.structure import Tap


@dataclass(frozen=True)
class Output:
    """From states to logits: ``cap * tanh(scale * (x W^T + b) / cap)``, without the tanh when there is no cap.

    Attributes:
        weight: [V', d].
        bias: [V'] or None.
        scale, cap: what the model does to logits afterwards; cap None does nothing.
        ids: int64 [V'], the target's token of each row when V' < V; None: row v is token v.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    cap: float | None = None
    ids: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Logits [..., V'] of states [..., d]."""
        z = torch.nn.functional.linear(x.to(self.weight.dtype), self.weight, self.bias)
        z = z if self.scale == 1 else z * self.scale
        return torch.tanh(z / self.cap) * self.cap if self.cap else z


@dataclass(frozen=True)
class Shared:
    """The target's embedding and output, which heads use and never change.

    Attributes:
        embed: int64 [...] -> [..., d], the embedding table's rows.
        output: the target's own.
    """

    embed: Callable[[Tensor], Tensor]
    output: Output

    @staticmethod
    def of(model: PreTrainedModel, head: OutputHead) -> Shared:
        """What ``head`` was found to compute on ``model``."""
        table = whole(model.get_input_embeddings().weight)
        bias = getattr(head.module, "bias", None)
        output = Output(whole(head.module.weight), None if bias is None else whole(bias), head.scale, head.cap)
        return Shared(lambda ids: torch.nn.functional.embedding(ids, table), output)


@dataclass(frozen=True)
class Batch:
    """A text with the target's hidden states along it.

    Attributes:
        ids: int64 [B, S], padded on the right.
        mask: bool [B, S], tokens to be learned.
        taps: tap -> [B, S, d], as the head's ``needs`` asked.
    """

    ids: Tensor
    mask: Tensor
    taps: dict[Tap, Tensor]


@dataclass(frozen=True)
class Drafts:
    """What a head says along a text, teacher-forced.

    Attributes:
        states: per depth k a tensor [B, S, d'], whose position i imitates ``p_{i+k+1}``.
        outputs: per depth, from its states to logits.
        auxiliary: a further loss, a sum over learned positions, or None.
        where: bool [B, S], the positions at which the head said something; None: at all.
    """

    states: Sequence[Tensor]
    outputs: Sequence[Output]
    auxiliary: Tensor | None = None
    where: Tensor | None = None
