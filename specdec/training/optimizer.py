"""Muon for the weight matrices and AdamW for the rest, as one optimizer, so one schedule drives both."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def orthogonalise(g: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz towards U V^T of g = U S V^T, for g [R, C]; Jordan et al. 2024, with their coefficients."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.T if g.shape[0] > g.shape[1] else g
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        s = x @ x.T
        x = a * x + (b * s + c * s @ s) @ x
    return x.T if g.shape[0] > g.shape[1] else x


class MuonAdamW(torch.optim.Optimizer):
    """Parameter groups with `muon=True` take Muon steps, the others AdamW steps; the same learning rate serves both.

    A Muon update is scaled by 0.2 sqrt(max(R, C)), which gives it the root mean square of an AdamW update
    (Liu et al. 2025, "Muon is scalable for LLM training").
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        defaults = dict(lr=lr, weight_decay=weight_decay, momentum=momentum, betas=betas, eps=eps, muon=False)
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                p.mul_(1 - group["lr"] * group["weight_decay"])
                rule = self._muon if group["muon"] else self._adam
                update = rule(p, p.grad, group)
                p.add_(update, alpha=-group["lr"])

    def _muon(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> Tensor:
        state = self.state[p]
        m = state.setdefault("momentum", torch.zeros_like(p))
        m.lerp_(g, 1 - group["momentum"])
        ahead = g.lerp(m, group["momentum"])  # Nesterov
        return orthogonalise(ahead) * (0.2 * max(p.shape) ** 0.5)

    def _adam(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> Tensor:
        state = self.state[p]
        beta1, beta2 = group["betas"]
        t = state["step"] = state.get("step", 0) + 1
        m = state.setdefault("exp_avg", torch.zeros_like(p)).lerp_(g, 1 - beta1)
        v = state.setdefault("exp_avg_sq", torch.zeros_like(p)).lerp_(g.square(), 1 - beta2)
        return (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + group["eps"])


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Muon for the matrices between the layers; AdamW for embeddings, without decay for norms."""
    matrices: list[Tensor] = []
    embeddings: list[Tensor] = []
    vectors: list[Tensor] = []
    for name, p in model.named_parameters():
        bucket = vectors if p.ndim < 2 else embeddings if "embed" in name or "lm_head" in name else matrices
        bucket.append(p)
    return [
        {"params": matrices, "muon": True, "weight_decay": weight_decay},
        {"params": embeddings, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
