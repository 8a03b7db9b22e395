"""Which layer to inject at: the first map alone, trained for a while at every second layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from specdec.drafters.hidden_transfer.module import HiddenTransfer
from specdec.errors import UsageError
from specdec.heads import Learner
from specdec.target import Target


@dataclass(frozen=True)
class LayerScore:
    """What one layer was good for, on held-out text.

    Attributes:
        layer: l_1.
        accuracy: share of positions where pseudo column 1's likeliest token is the target's own.
        loss: cross-entropy to the target's distribution, nats per position.
    """

    layer: int
    accuracy: float
    loss: float


def candidate_layers(num_layers: int) -> list[int]:
    """Every second layer between 0.3 and 0.9 of them."""
    return list(range(max(1, round(0.3 * num_layers)), max(2, min(round(0.9 * num_layers) + 1, num_layers)), 2))


def sweep(
    target: Target,
    blocks: torch.Tensor,
    held_out: torch.Tensor,
    layers: Sequence[int] | None = None,
    steps: int = 500,
    batch: int = 8,
    rate: float = 1e-3,
    seed: int = 0,
) -> Iterator[LayerScore]:
    """Train T_1 alone at each layer, on the same batches; scores come as they are known.

    Args:
        target: frozen.
        blocks, held_out: int64 [n, S], texts of the same length, to train on and to measure on.
        layers: which; None: ``candidate_layers``.
        steps, batch, rate, seed: updates, texts per update, learning rate of AdamW, and seed of their order.

    Raises:
        UsageError: no texts, or a layer that does not exist.
    """
    if min(len(blocks), len(held_out)) < 1 or blocks.shape[1] < 3 or held_out.shape[1] < 3:
        raise UsageError(
            f"blocks {tuple(blocks.shape)} and held_out {tuple(held_out.shape)} must hold texts of 3 tokens or more"
        )
    count = target.config.num_hidden_layers
    for layer in candidate_layers(count) if layers is None else layers:
        if not 1 <= layer < count:
            raise UsageError(f"layers: {layer} must be one of 1..{count - 1}")
        head = HiddenTransfer.fresh(target, num_steps=1, transfer_layers=[layer]).float().to(target.device)
        learner = Learner(head, target).train()
        optimizer = torch.optim.AdamW(learner.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for _ in range(steps):
                ids = blocks[torch.randint(len(blocks), (batch,))].to(target.device)
                out = learner(ids, torch.ones_like(ids, dtype=torch.bool))
                optimizer.zero_grad()
                (out.total / out.count.sum()).backward()
                torch.nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
                optimizer.step()
        learner.eval()
        hits = loss = positions = 0.0
        with torch.no_grad():
            for ids in held_out.to(target.device).split(batch):
                out = learner(ids, torch.ones_like(ids, dtype=torch.bool))
                hits, loss = hits + float(out.hits), loss + float(out.loss)
                positions += float(out.count)
        yield LayerScore(layer, hits / positions, loss / positions)


def write_curve(scores: Sequence[LayerScore], file: str | Path) -> None:
    """Draw accuracy over layers (needs matplotlib)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4))
    axes = figure.subplots()
    axes.plot([s.layer for s in scores], [s.accuracy for s in scores], marker="o")
    axes.set(xlabel="transfer layer $l_1$", ylabel="top-1 agreement of pseudo column 1 with the target")
    figure.savefig(file, dpi=90, bbox_inches="tight")
