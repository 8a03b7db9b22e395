"""What is written beside trained weights: the loss curve; and the measure they are compared by, bits per character."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from .recipe import Recipe


def write_curve(recipe: Recipe, name: str, state: Any, seconds: float, resumed_at: int | None, folder: Path) -> None:
    """`training.json` (settings, tokens, wall time, points) and `loss.png` into `folder`."""
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib.figure import Figure

    points = [
        {"step": row["step"], "loss": row["loss"], "learning_rate": row["learning_rate"]}
        for row in state.log_history
        if "loss" in row
    ]
    tokens_a_step = recipe.training.batch * recipe.packing.block
    record = {
        "model": name,
        "tokens": state.global_step * tokens_a_step,
        "steps": state.global_step,
        "wall_seconds": round(seconds),  # of the last process: `resumed_at_step` says where it took over
        "resumed_at_step": resumed_at,
        "recipe": recipe.raw,
        "loss": points,
    }
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    axes.plot([p["step"] * tokens_a_step / 1e6 for p in points], [p["loss"] for p in points])
    axes.set(xlabel="training tokens (millions)", ylabel="loss (nats a token)", title=f"{recipe.name}: {name}")
    figure.savefig(folder / "loss.png", dpi=100, bbox_inches="tight")


def bits_per_character(model: Any, tokenizer: Any, documents: list[str], context: int = 2048) -> float:
    """-log2 p(text) / characters, over documents cut to `context` tokens; the end of text is not counted.

    Each document starts from bos alone. Where it is cut, only the characters of the kept tokens count.
    """
    import torch

    bits, characters = 0.0, 0
    device = next(model.parameters()).device
    with torch.inference_mode():
        for text in documents:
            ids = tokenizer(text, verbose=False).input_ids[:context]
            row = torch.tensor([ids], device=device)  # [1, S]
            logits = model(row, use_cache=False).logits[0, :-1].float()  # [S - 1, V]
            bits += torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="sum").item() / math.log(2)
            characters += len(tokenizer.decode(ids, skip_special_tokens=True))
    return bits / characters
