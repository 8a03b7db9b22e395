"""Medusa heads: a residual block per head, and an output matrix of its own or the target's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from specdec.drafters.medusa import formats
from specdec.errors import UsageError
from specdec.heads import Batch, Drafts, Head, HeadConfig, Output
from specdec.structure import Needs
from specdec.target import Target


@dataclass(kw_only=True)
class MedusaConfig(HeadConfig):
    """See ``HeadConfig``.

    Attributes:
        num_heads: K; head k predicts token t + 2 + k.
        num_layers: residual blocks per head.
        shared_output: every head uses the target's output matrix ("Medusa v2"); else each has its own.
        bias: of the residual blocks.
    """

    num_heads: int
    num_layers: int = 1
    shared_output: bool = True
    bias: bool = True


class ResidualBlock(nn.Module):
    """x + SiLU(W x + b); zero at first, so that a head starts as the target's own."""

    def __init__(self, d: int, bias: bool):
        super().__init__()
        self.linear = nn.Linear(d, d, bias=bias)
        for p in self.linear.parameters():
            nn.init.zeros_(p)

    def forward(self, x: Tensor) -> Tensor:
        return x + nn.functional.silu(self.linear(x))


class Medusa(Head):
    """K heads over the target's final hidden state (Cai et al., arXiv 2401.10774)."""

    method = "medusa"
    objective = "labels"
    config_class = MedusaConfig
    config: MedusaConfig
    needs = Needs(final_hidden=True)

    def __init__(self, config: MedusaConfig):
        super().__init__(config)
        d, K, L = config.hidden_size, config.num_heads, config.num_layers
        if min(K, L) < 1:
            raise UsageError(f"num_heads={K} and num_layers={L} must be at least 1")
        self.blocks: Any = nn.ModuleList(
            nn.Sequential(*(ResidualBlock(d, config.bias) for _ in range(L))) for _ in range(K)
        )
        own = 0 if config.shared_output else K
        self.outputs: Any = nn.ModuleList(nn.Linear(d, config.vocab_size, bias=False) for _ in range(own))

    @property
    def depths(self) -> int:
        return self.config.num_heads

    @classmethod
    def fresh(
        cls, target: Target, num_heads: int = 4, num_layers: int = 1, shared_output: bool = True, **_: Any
    ) -> Medusa:
        head = cls(
            MedusaConfig(
                **MedusaConfig.facts(target), num_heads=num_heads, num_layers=num_layers, shared_output=shared_output
            )
        )
        for own in head.outputs:
            own.weight.data.copy_(target.head.module.weight)
        return head

    def state(self, k: int, h: Tensor) -> Tensor:
        """What head k's output matrix reads, [..., d], from final hidden states h [..., d]."""
        return self.blocks[k](h)

    def output(self, k: int) -> Output:
        shared = self.shared.output
        if self.config.shared_output:
            return shared
        return Output(self.outputs[k].weight, scale=shared.scale, cap=shared.cap)

    def drafts(self, batch: Batch) -> Drafts:
        h = batch.taps["final_hidden"].to(self.blocks[0][0].linear.weight.dtype)
        K = range(self.depths)
        return Drafts([self.state(k, h) for k in K], [self.output(k) for k in K])

    @classmethod
    def foreign(
        cls, config: dict[str, Any], tensors: dict[str, torch.Tensor]
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor]] | None:
        return formats.read(config, tensors)
