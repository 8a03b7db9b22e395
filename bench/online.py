"""How acceptance follows the traffic: a stream of requests that changes its domain, a frozen draft against online ones.

Every request goes through every arm before the next one comes: the frozen draft runs in the shadow of the online ones,
so that easy and hard prompts hit all alike. alpha is the chance that one draft is accepted, see ``drafters.online``.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from specdec.bench.arms import Settings
from specdec.bench.prompts import Prompt
from specdec.bench.report import replace_text
from specdec.decoder import Decoder
from specdec.drafters.online import Online
from specdec.errors import UsageError

FROZEN = "frozen"
ARMS: dict[str, dict[str, Any]] = {
    FROZEN: {"train_seconds": 0.0},
    "all": {},
    "error_only": {"positions": "error_only"},
    "reverse": {"loss": "reverse"},
    "mixed": {"loss": "mixed"},
}
WINDOW = 25  # requests of a moving average


@dataclass(frozen=True)
class Served:
    """One request through one arm: see ``drafters.online.Request``; ``mat`` is the request's tokens per forward."""

    number: int
    phase: int
    prompt: str
    arm: str
    alpha: float | None
    tested: int
    mat: float
    version: int
    training_seconds: float


def stream(prompts: Sequence[Prompt], phases: Sequence[Sequence[str]], count: int, seed: int) -> list[list[Prompt]]:
    """Prompts of every phase, ``count`` in all, drawn without repeating a text.

    Raises:
        UsageError: a phase's categories have too few prompts.
    """
    pick, used, found = random.Random(seed), set(), []
    for i, categories in enumerate(phases):
        wanted = count * (i + 1) // len(phases) - count * i // len(phases)
        pool = {p.text: p for p in prompts if p.category in categories and p.text not in used}
        if len(pool) < wanted:
            known = sorted({p.category for p in prompts if p.category})
            raise UsageError(
                f"--phases: {wanted} prompts of {'+'.join(categories)} are wanted, there are {len(pool)}; lower "
                f"--requests, or give --prompts a larger file (categories in this one: {', '.join(known) or 'none'})"
            )
        found.append(pick.sample(list(pool.values()), wanted))
        used |= {p.text for p in found[-1]}
    return found


class Stream:
    """Serves requests through all arms.

    Args:
        target: the model.
        draft: copied for every arm.
        tokenizer: the models'.
        arms: names of ``ARMS``; the frozen one comes along.
        options: of ``Online``, for all arms alike.

    Attributes:
        served: one entry per request and arm, of requests that every arm has served.
    """

    def __init__(
        self, target: PreTrainedModel, draft: PreTrainedModel, tokenizer: Any, arms: Sequence[str], **options: Any
    ):
        self.tokenizer, self.device = tokenizer, target.device
        self.drafters = {
            name: Online(draft=draft, **{**options, **ARMS[name]}) for name in dict.fromkeys([FROZEN, *arms])
        }
        self.decoders = {name: Decoder(target, d, tokenizer=tokenizer) for name, d in self.drafters.items()}
        self.served: list[Served] = []

    def serve(self, prompt: Prompt, phase: int, settings: Settings, seed: int) -> None:
        """One request."""
        ids = torch.tensor([self.tokenizer(prompt.text).input_ids], device=self.device)
        number = len(self.served) // len(self.decoders)
        answers = []
        for name, decoder in self.decoders.items():
            torch.manual_seed(seed + number)
            decoder.generate(ids, attention_mask=torch.ones_like(ids), **settings.arguments())
            assert decoder.stats is not None
            seen, mat = self.drafters[name].history[-1], decoder.stats.mat or 1.0
            answers.append(
                Served(number, phase, prompt.id, name, seen.alpha, seen.tested, mat, seen.version, seen.seconds)
            )
        self.served += answers


def gain(rows: Sequence[Served], base: Sequence[Served], resamples: int = 10_000) -> dict[str, Any]:
    """Mean alpha of two arms on the same requests, their difference and its 95 % bootstrap interval over requests."""
    pairs = [(r.alpha, b.alpha) for r, b in zip(rows, base, strict=True) if r.alpha is not None and b.alpha is not None]
    mine, theirs = np.array(pairs, dtype=float).reshape(-1, 2).T
    if len(pairs) < 2:
        return {"requests": len(pairs)}
    pick = np.random.default_rng(0).integers(0, len(pairs), (resamples, len(pairs)))
    low, high = np.quantile((mine - theirs)[pick].mean(axis=1), [0.025, 0.975])
    return {
        "requests": len(pairs),
        "alpha": float(mine.mean()),
        FROZEN: float(theirs.mean()),
        "gain": float((mine - theirs).mean()),
        "interval": [float(low), float(high)],
        "mat": float(np.mean([r.mat for r in rows])),
        "frozen_mat": float(np.mean([b.mat for b in base])),
    }


def moving(values: Sequence[float | None], window: int = WINDOW) -> np.ndarray:
    """Means of the last ``window`` values, NaN before there are so many; missing values do not count."""
    array = np.array([np.nan if v is None else v for v in values], dtype=float)
    means = np.full(len(array), np.nan)
    for i in range(window - 1, len(array)):
        seen = array[i - window + 1 : i + 1]
        means[i] = seen[~np.isnan(seen)].mean() if (~np.isnan(seen)).any() else np.nan
    return means


def summary(served: Sequence[Served], arm: str, phases: Sequence[str], budget: float) -> dict[str, Any]:
    """An arm against the frozen draft: by parts of the stream, and what training took."""
    rows, base = [s for s in served if s.arm == arm], [s for s in served if s.arm == FROZEN]
    parts: dict[str, tuple[int, int]] = {"whole stream": (0, len(base))}
    for i, name in enumerate(phases):
        numbers = [s.number for s in base if s.phase == i]
        if numbers:
            start, end = numbers[0], numbers[-1] + 1
            middle = (start + end) // 2
            parts |= {f"{i + 1} {name}, first half": (start, middle), f"{i + 1} {name}, second half": (middle, end)}
    seconds = np.array([r.training_seconds for r in rows])
    return {
        "parts": {name: gain(rows[a:b], base[a:b]) for name, (a, b) in parts.items()},
        "updates": max(r.version for r in rows),
        "training_seconds_mean": float(seconds.mean()),
        "training_seconds_longest": float(seconds.max()),
        "over_budget": int((seconds > budget).sum()),
    }


def markdown(result: dict[str, Any]) -> str:
    """The summaries as tables."""
    s, lines = result["settings"], []
    kind = "greedy" if s["temperature"] == 0 else f"temperature {s['temperature']:g}"
    cut = ", cut off: partial" if result["partial"] else ""
    lines += [f"**{s['model']}, {kind}, {result['requests']} requests of {s['max_new_tokens']} tokens{cut}**", ""]
    lines += ["| arm | part of the stream | requests | alpha | frozen | gain [95 %] | MAT | frozen MAT |"]
    lines += ["| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for arm, found in result["arms"].items():
        for name, g in found["parts"].items():
            if "gain" in g:
                low, high = g["interval"]
                lines.append(
                    f"| {arm} | {name} | {g['requests']} | {g['alpha']:.3f} | {g[FROZEN]:.3f} | "
                    f"{g['gain']:+.3f} [{low:+.3f}, {high:+.3f}] | {g['mat']:.2f} | {g['frozen_mat']:.2f} |"
                )
    lines += ["", "alpha: chance that one draft is accepted, mean over requests; gain: the same requests, paired.", ""]
    lines += ["| arm | updates | training after a request, mean s | longest s | budget s | over it |"]
    lines += ["| --- | ---: | ---: | ---: | ---: | ---: |"]
    for arm, f in result["arms"].items():
        lines.append(
            f"| {arm} | {f['updates']} | {f['training_seconds_mean']:.3f} | {f['training_seconds_longest']:.3f} | "
            f"{s['train_seconds']:g} | {f['over_budget']} |"
        )
    e = result["environment"]
    lines += ["", f"{e['gpu'] or e['cpu']}, {e['torch_threads']} threads, {e['dtype']}; {e['date']}."]
    options = ", ".join(f"{name}={s[name]}" for name in ("interval", "rate", "train_seconds", "prompts", "seed"))
    return "\n".join([*lines, "", options]) + "\n"


def plot(served: Sequence[Served], result: dict[str, Any], file: Path) -> None:
    """Moving averages of alpha, and what training took, over the stream, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    for arm in [FROZEN, *result["arms"]]:
        rows = [s for s in served if s.arm == arm]
        colour = {"color": "black", "linestyle": "--"} if arm == FROZEN else {}
        upper.plot(moving([r.alpha for r in rows]), label=arm, **colour)
        if arm != FROZEN:
            lower.plot([r.training_seconds for r in rows], ".", markersize=3, label=arm)
    for earlier, later in pairwise(s for s in served if s.arm == FROZEN):
        if earlier.phase != later.phase:
            upper.axvline(later.number - 0.5, color="grey", linewidth=0.8)
    lower.axhline(result["settings"]["train_seconds"], color="grey", linewidth=0.8, label="budget")
    upper.set(ylabel=f"alpha, mean of {WINDOW} requests", title=" then ".join(result["settings"]["phases"]))
    lower.set(xlabel="request", ylabel="training after it, s", ylim=(0, None))
    upper.legend(fontsize=8)
    lower.legend(fontsize=8)
    part = file.with_name(f".{file.name}.part")
    figure.savefig(part, dpi=120, format="png")
    os.replace(part, file)


def write(result: dict[str, Any], served: Sequence[Served], folder: Path) -> None:
    """online.json, online.md and, where matplotlib is, online.png, each whole or not at all."""
    replace_text(folder / "online.json", json.dumps({**result, "served": [asdict(s) for s in served]}, indent=1) + "\n")
    replace_text(folder / "online.md", markdown(result))
    if find_spec("matplotlib") is not None:
        plot(served, result, folder / "online.png")
