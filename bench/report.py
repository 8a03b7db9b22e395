"""A measurement on the screen and on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from specdec.bench.statistics import Record, Row
from specdec.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEADERS = ("method", "lossless", "speed-up [95 %]", "MAT", "tokens/s", "overhead", "equal", "distinct-4")
FOOTNOTE = (
    "speed-up: tokens/s over hf-generate's, total tokens over total time on the same prompts; interval: bootstrap "
    "over prompts. MAT: tokens per target forward, bonus included. overhead: share of time outside the target's "
    "forward. equal: prompts whose ids are hf-generate's (greedy only). distinct-4: different 4-grams over 4-grams; "
    "looping text scores low."
)


@dataclass
class Report:
    """Everything a bench has to say.

    Attributes:
        rows: one per temperature and method.
        environment: where it was measured.
        settings: what was asked.
        notes: what was left out, and why.
        partial: the run was cut off; rows hold the prompts that every method had finished.
    """

    rows: list[Row]
    environment: dict[str, Any]
    settings: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    partial: bool = False

    def to_json(self) -> dict[str, Any]:
        return {
            "partial": self.partial,
            "rows": [row.to_json() for row in self.rows],
            "settings": self.settings,
            "environment": self.environment,
            "notes": self.notes,
        }


def cells(row: Row) -> tuple[str, ...]:
    """A row as text, in the order of the headers."""
    interval = f" [{row.speedup_ci[0]:.2f}, {row.speedup_ci[1]:.2f}]" if row.speedup_ci else ""
    return (
        f"{row.name} ({row.state})" if row.state else row.name,
        "yes" if row.lossless else "no",
        f"{row.speedup:.2f}{interval}",
        _number(row.mat, ".2f"),
        f"{row.tokens_per_second:.1f}",
        _number(row.overhead, ".0%"),
        _number(row.equal_share, ".0%"),
        _number(row.distinct4, ".2f"),
    )


def cautions(rows: Sequence[Row], reference: str, dtype: str) -> list[str]:
    """What a reader of the table must know: looping text, which is easy to draft, and lossless rows that differ."""
    loops = [
        f"{how(row.temperature)}: the model's own text repeats "
        f"itself (distinct-4 {row.distinct4:.2f}), which flatters every speed-up in this table"
        for row in rows
        if row.name == reference and row.distinct4 is not None and row.distinct4 < 0.5
    ]
    differ = [
        f"{row.name} is lossless, yet {1 - row.equal_share:.0%} of its greedy texts differ from {reference}'s: "
        f"near ties of logits fall either way in {dtype}, anything else is a bug"
        for row in rows
        if row.lossless and row.equal is False and row.equal_share is not None
    ]
    return loops + differ


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def titles(report: Report) -> list[tuple[str, list[Row]]]:
    """A heading and the rows of every temperature."""
    temperatures = list(dict.fromkeys(row.temperature for row in report.rows))
    cut = ", cut off: partial" if report.partial else ""
    s = report.settings
    titles = []
    for t in temperatures:
        rows = [row for row in report.rows if row.temperature == t]
        what = f"{s['model']}, {how(t)}, {rows[0].prompts} prompts"
        state = ", warm" * (s["state"] == "warm") + ", compiled steps" * (s.get("compile", "off") != "off")
        titles.append((f"{what}, up to {s['max_new_tokens']} tokens, batch {s['batch_size']}{state}{cut}", rows))
    return titles


def show(report: Report, console: Console) -> None:
    """Tables, footnote and notes."""
    for title, rows in titles(report):
        console.print(f"\n{title}", highlight=False, markup=False)
        table = Table()
        for i, header in enumerate(HEADERS):
            table.add_column(header, justify="left" if i < 2 else "right", no_wrap=True)
        best = max((row.speedup for row in rows if row.lossless), default=None)
        for row in rows:
            table.add_row(*cells(row), style="bold" if row.speedup == best else None)
        console.print(table)
    if report.rows:
        console.print(FOOTNOTE, style="dim", highlight=False)
    else:
        console.print("no prompt was finished by every method, so there is no table", highlight=False)
    for note in report.notes:
        console.print(f"note: {note}", highlight=False, markup=False)


def markdown(report: Report) -> str:
    """The tables as Markdown, with where and how they were measured."""
    lines: list[str] = []
    for title, rows in titles(report):
        lines += [f"**{title}**", "", _line(HEADERS), _line(["---", "---", *["---:"] * (len(HEADERS) - 2)])]
        lines += [*(_line(cells(row)) for row in rows), ""]
    lines += [FOOTNOTE, ""]
    e = report.environment
    versions = ", ".join(f"{name} {number}" for name, number in e["packages"].items() if number)
    lines += [f"{e['gpu'] or e['cpu']}, {e['torch_threads']} threads, {e['dtype']}, {versions}; {e['date']}.", ""]
    lines += [f"`{e['command']}`", ""]
    lines += [f"- {note}" for note in report.notes]
    return "\n".join(lines).rstrip() + "\n"


def _line(values: Sequence[str]) -> str:
    return "| " + " | ".join(values) + " |"


Interval = tuple[float, float] | None


def bars(series: dict[str, dict[str, tuple[float, Interval]]], label: str, title: str) -> Figure:
    """Values with their intervals as lying bars, and a line at 1.

    Args:
        series: name of a colour -> name of a bar -> value and interval.
        label: of the axis of values.
        title: above it.
    """
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for values in series.values() for name in values))
    thick = 0.8 / len(series)
    figure = Figure(figsize=(7, 0.9 + (0.1 + 0.25 * len(series)) * len(names)), layout="constrained")
    axes = figure.subplots()
    for i, (colour, values) in enumerate(series.items()):
        at = [names.index(name) + (i - (len(series) - 1) / 2) * thick for name in values]
        middle = [value for value, _ in values.values()]
        # a bootstrap interval need not hold the estimate
        below = [max(value - interval[0], 0.0) if interval else 0.0 for value, interval in values.values()]
        above = [max(interval[1] - value, 0.0) if interval else 0.0 for value, interval in values.values()]
        axes.barh(at, middle, thick * 0.9, xerr=[below, above], capsize=2, error_kw={"elinewidth": 0.8}, label=colour)
    axes.axvline(1, color="black", linewidth=0.8, linestyle="--")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.set_title(title, fontsize=9)
    if len(series) > 1:
        axes.legend(fontsize=8)
    return figure


def speedups(report: Report) -> Figure:
    """Speed-ups with their intervals, one colour per temperature."""
    series = {how(rows[0].temperature): {r.name: (r.speedup, r.speedup_ci) for r in rows} for _, rows in titles(report)}
    machine = report.environment["gpu"] or report.environment["cpu"]
    title = f"{report.settings['model']}, {machine}"
    if len(series) == 1:
        title += f", {next(iter(series))}"
    return bars(series, "speed-up over hf-generate, 95 % interval over prompts", title)


def how(temperature: float) -> str:
    return "greedy" if temperature == 0 else f"temperature {temperature:g}"


def plot(report: Report, file: Path) -> None:
    """``speedups`` as PNG."""
    drawn = BytesIO()
    speedups(report).savefig(drawn, dpi=150, format="png")
    replace_bytes(file, drawn.getvalue())


def prepare_folder(folder: Path) -> None:
    """Make ``folder`` and try to write in it, before any work that would be lost.

    Raises:
        UsageError: it cannot be written.
    """
    probe = folder / f".specdec-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise UsageError(f"--out {folder}: cannot write there ({error.strerror}); give another folder") from error


def write(report: Report, records: Sequence[Record], folder: Path) -> list[str]:
    """Write results.json, records.jsonl, results.md and speedup.png, each whole or not at all.

    Returns:
        Notes about what could not be written.
    """
    replace_text(folder / "results.json", json.dumps(report.to_json(), indent=1, allow_nan=False) + "\n")
    replace_text(folder / "records.jsonl", "".join(json.dumps(r.to_json(), allow_nan=False) + "\n" for r in records))
    replace_text(folder / "results.md", markdown(report))
    if not report.rows:
        return []
    try:
        plot(report, folder / "speedup.png")
    except ImportError:
        return ["no speedup.png: matplotlib is missing, install it with `pip install 'specdec[bench]'`"]
    return []


def replace_text(file: Path, text: str) -> None:
    """Whole or not at all."""
    replace_bytes(file, text.encode())


def replace_bytes(file: Path, content: bytes) -> None:
    """Whole or not at all."""
    part = file.with_name(f".{file.name}.part")
    part.write_bytes(content)
    os.replace(part, file)
