"""Loss, accuracy and MAT of a training run as one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def write_curves(history: Sequence[dict[str, Any]], title: str, file: Path) -> None:
    """Draw Trainer's log: loss, accuracy by depth, and MAT of the real decoder, over steps."""
    from matplotlib.figure import Figure

    losses = [row for row in history if "loss" in row]
    evals = [row for row in history if "eval_mat" in row]
    depths = sorted({key for row in losses for key in row if key.startswith("accuracy_")})
    figure = Figure(figsize=(13, 4))
    left, middle, right = figure.subplots(1, 3)
    left.plot([r["step"] for r in losses], [r["loss"] for r in losses])
    left.set(xlabel="step", ylabel="loss (nats a learned token, depths weighted)", title=title)
    for key in depths:
        middle.plot([r["step"] for r in losses], [r.get(key) for r in losses], label=f"depth {key.split('_')[1]}")
    middle.set(xlabel="step", ylabel="top-1 agreement with the target", ylim=(0, 1))
    if depths:
        middle.legend()
    right.plot([r["step"] for r in evals], [r["eval_mat"] for r in evals], marker="o")
    right.set(xlabel="step", ylabel="MAT on held-out prompts, greedy")
    figure.savefig(file, dpi=90, bbox_inches="tight")
