"""Speed against quality: lossy methods over a range of one knob each, measured in one interleaved run."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from specdec.bench.harness import Run
from specdec.bench.quality import Quality, Score, score
from specdec.bench.report import replace_text
from specdec.bench.statistics import Record, Row, summarise

_CHANGE = ("change", "from the target alone on the same prompts, paired; intervals: 95 % bootstrap over prompts")


@dataclass(frozen=True)
class Point:
    """One setting of one method.

    Attributes:
        curve: what is varied, "rollback.threshold"; of the lossless rows their name.
        value: the knob's value, None for lossless rows.
        row: speed, MAT and the rest, as in a bench.
        scores: name -> figure.
    """

    curve: str
    value: Any
    row: Row
    scores: dict[str, Score]

    def to_json(self) -> dict[str, Any]:
        scores = {name: s.to_json() for name, s in self.scores.items()}
        return {"curve": self.curve, "value": self.value, "row": self.row.to_json(), "scores": scores}


def points(
    run: Run, knobs: dict[str, tuple[str, Any]], lossless: dict[str, bool], quality: Quality, reference: str
) -> list[Point]:
    """Every arm's point; all must have finished the same prompts.

    Args:
        run: one prompt per group, one repeat.
        knobs: arm -> (curve, value).
        lossless: arm -> whether it is.
        quality: scores texts.
        reference: the arm of the target alone.
    """
    rows = {row.name: row for row in summarise(run.records, lossless, dict.fromkeys(lossless), 1, reference)}
    calls: dict[str, dict[int, Record]] = {}
    for record in run.records:
        calls.setdefault(record.arm, {})[record.group] = record
    groups = sorted(calls[reference])
    plain = [calls[reference][g].ids[0] for g in groups]
    base = quality.statistics(plain, plain)
    found = []
    for arm, row in rows.items():
        mine = quality.statistics([calls[arm][g].ids[0] for g in groups], plain)
        scores = {name: score(mine[name], base[name], len(groups), quality.resamples) for name in quality.meanings}
        found.append(Point(*knobs[arm], row, scores))
    return found


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1 else f"{value:.2f}"


def _cells(point: Point, names: Sequence[str]) -> list[str]:
    low, high = point.row.speedup_ci or (point.row.speedup, point.row.speedup)
    cells = [point.curve, "" if point.value is None else str(point.value), "yes" if point.row.lossless else "no"]
    cells += [
        f"{point.row.speedup:.2f} [{low:.2f}, {high:.2f}]",
        "-" if point.row.mat is None else f"{point.row.mat:.2f}",
    ]
    for name in names:
        s = point.scores[name]
        cells.append(f"{_number(s.value)} ({s.change:+.2f} [{s.change_ci[0]:+.2f}, {s.change_ci[1]:+.2f}])")
    return cells


def _headers(names: Sequence[str]) -> list[str]:
    return ["knob", "value", "lossless", "speed-up [95 %]", "MAT", *(f"{name} (change [95 %])" for name in names)]


def show(found: Sequence[Point], quality: Quality, title: str, console: Console) -> None:
    """The table on the screen."""
    names = list(quality.meanings)
    console.print(f"\n{title}", highlight=False, markup=False)
    table = Table()
    for i, header in enumerate(_headers(names)):
        table.add_column(header, justify="left" if i < 3 else "right", no_wrap=True)
    for point in found:
        table.add_row(*_cells(point, names))
    console.print(table)
    for name, meaning in [*quality.meanings.items(), _CHANGE]:
        console.print(f"{name}: {meaning}", style="dim", highlight=False, markup=False)


def markdown(
    found: Sequence[Point], quality: Quality, title: str, environment: dict[str, Any], notes: list[str]
) -> str:
    """The table with what its columns mean, and where it was measured."""
    names = list(quality.meanings)
    headers = _headers(names)
    lines = [f"**{title}**", "", *(_line(x) for x in (headers, ["---"] * 3 + ["---:"] * (len(headers) - 3)))]
    lines += [*(_line(_cells(point, names)) for point in found), ""]
    lines += [*(f"- {name}: {meaning}" for name, meaning in quality.meanings.items())]
    lines += [
        "- change: paired difference from the target alone on the same prompts; intervals: bootstrap over prompts"
    ]
    lines += [*(f"- {note}" for note in notes), ""]
    e = environment
    versions = ", ".join(f"{name} {number}" for name, number in e["packages"].items() if number)
    lines += [f"{e['gpu'] or e['cpu']}, {e['torch_threads']} threads, {e['dtype']}, {versions}; {e['date']}.", ""]
    return "\n".join([*lines, f"`{e['command']}`"]) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def plot(found: Sequence[Point], quality: Quality, title: str, file: Path) -> None:
    """Speed-up over each score, one line per knob, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(quality.meanings)
    figure, panels = plt.subplots(1, len(names), figsize=(4.2 * len(names), 4), layout="constrained", squeeze=False)
    for axes, name in zip(panels[0], names, strict=True):
        for curve in dict.fromkeys(p.curve for p in found):
            mine = [p for p in found if p.curve == curve]
            x, y = [p.scores[name].value for p in mine], [p.row.speedup for p in mine]
            cis = [p.row.speedup_ci or (p.row.speedup, p.row.speedup) for p in mine]
            across = [[v - p.scores[name].ci[0] for v, p in zip(x, mine, strict=True)]]
            across += [[p.scores[name].ci[1] - v for v, p in zip(x, mine, strict=True)]]
            along = [
                [v - low for v, (low, _) in zip(y, cis, strict=True)],
                [high - v for v, (_, high) in zip(y, cis, strict=True)],
            ]
            shape = (
                {"marker": "*", "markersize": 9, "linestyle": "none"}
                if mine[0].value is None
                else {"marker": "o", "markersize": 4}
            )
            axes.errorbar(
                x, y, xerr=_whole(across), yerr=_whole(along), label=curve, linewidth=1, elinewidth=0.4, **shape
            )
            for p, at, height in zip(mine, x, y, strict=True):
                if p.value is not None:
                    axes.annotate(str(p.value), (at, height), fontsize=6, xytext=(3, 3), textcoords="offset points")
        axes.axhline(1, color="black", linewidth=0.8, linestyle="--")
        axes.set_xlabel(name)
    panels[0][0].set_ylabel("speed-up over hf-generate")
    panels[0][0].legend(fontsize=7)
    figure.suptitle(title, fontsize=9)
    part = file.with_name(f".{file.name}.part")
    figure.savefig(part, dpi=150, format="png")
    plt.close(figure)
    os.replace(part, file)


def _whole(errors: list[list[float]]) -> list[list[float]]:
    """Lengths of error bars: a bootstrap interval need not hold the estimate."""
    return [[max(v, 0.0) for v in side] for side in errors]


def write(
    found: Sequence[Point],
    run: Run,
    quality: Quality,
    title: str,
    environment: dict[str, Any],
    settings: dict[str, Any],
    notes: list[str],
    folder: Path,
) -> None:
    """pareto.json, records.jsonl, pareto.md and pareto.png, each whole or not at all."""
    report = {
        "points": [p.to_json() for p in found],
        "scores": quality.meanings,
        "settings": settings,
        "environment": environment,
        "notes": notes,
    }
    replace_text(folder / "pareto.json", json.dumps(report, indent=1) + "\n")
    replace_text(folder / "records.jsonl", "".join(json.dumps(r.to_json()) + "\n" for r in run.records))
    replace_text(folder / "pareto.md", markdown(found, quality, title, environment, notes))
    plot(found, quality, title, folder / "pareto.png")
