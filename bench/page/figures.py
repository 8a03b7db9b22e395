"""Figures of the page, besides the bars of ``bench.report``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from specdec.bench.report import Interval

Estimate = tuple[float, Interval]  # a value and its 95 % interval


def categories(values: Mapping[str, Mapping[str, Estimate]]) -> Figure:
    """Speed-ups as points with intervals, one panel per category; ``values``: method -> category -> speed-up."""
    names = list(dict.fromkeys(name for mine in values.values() for name in mine))
    across = min(len(names), 3)
    down = -(-len(names) // across)
    figure = Figure(figsize=(2.6 * across + 1.4, 0.5 + (0.5 + 0.2 * len(values)) * down), layout="constrained")
    panels = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    for axes, name in zip(panels.flat, names):
        at = [i for i, mine in enumerate(values.values()) if name in mine]
        found = [mine[name] for mine in values.values() if name in mine]
        middle = [value for value, _ in found]
        below = [max(value - interval[0], 0.0) if interval else 0.0 for value, interval in found]
        above = [max(interval[1] - value, 0.0) if interval else 0.0 for value, interval in found]
        axes.errorbar(middle, at, xerr=[below, above], fmt="o", markersize=3.5, elinewidth=1.2, capsize=2)
        axes.axvline(1, color="black", linewidth=0.8, linestyle="--")
        axes.set_title(name, fontsize=9)
        axes.set_yticks(range(len(values)), list(values), fontsize=8)
        axes.grid(axis="x", linewidth=0.3)
    for axes in list(panels.flat)[len(names) :]:
        axes.set_visible(False)
    panels[0][0].invert_yaxis()
    figure.supxlabel("speed-up, 95 % interval", fontsize=9)
    return figure


def lines(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    x: str,
    y: str,
    log: bool = False,
    points: bool = True,
) -> Figure:
    """x and y of every series as a line.

    Args:
        series: label -> x and y.
        x, y: of the axes.
        log: x doubles from tick to tick.
        points: mark every point, and its x on the axis.
    """
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    markers = "osD^v<>Pp*Xhd"
    for i, (label, (xs, ys)) in enumerate(series.items()):
        dashes = ("-", "--", ":", "-.")[i // 10 % 4]  # colours come again after ten
        marker = markers[i % len(markers)] if points else None
        axes.plot(xs, ys, dashes, marker=marker, markersize=4, linewidth=1.2, label=label)
    if log:
        axes.set_xscale("log", base=2)
    if points:
        ticks = sorted({n for xs, _ in series.values() for n in xs})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set(xlabel=x, ylabel=y)
    axes.set_ylim(bottom=0)
    axes.grid(linewidth=0.3)
    if len(series) > 1:
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def stacked(values: Mapping[str, Mapping[str, float]], label: str) -> Figure:
    """Lying bars made of parts; ``values``: name of a bar -> part -> length."""
    figure = Figure(figsize=(7, 1.1 + 0.3 * len(values)), layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(values)
    for part in dict.fromkeys(part for mine in values.values() for part in mine):
        width = [mine.get(part, 0.0) for mine in values.values()]
        axes.barh(range(len(values)), width, 0.75, left=left, label=part)
        left = [a + b for a, b in zip(left, width)]
    axes.set_yticks(range(len(values)), list(values))
    axes.invert_yaxis()
    axes.set_xlim(right=1.04 * max(left))
    axes.set_xlabel(label)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def tradeoff(points: Sequence[Any], scores: Sequence[str]) -> Figure:
    """Speed-up over each score, a line per knob; ``points``: of ``bench.pareto``."""
    figure = Figure(figsize=(3.6 * len(scores) + 0.4, 3.8), layout="constrained")
    panels = figure.subplots(1, len(scores), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, scores):
        for curve in dict.fromkeys(p.curve for p in points):
            mine = [p for p in points if p.curve == curve]
            x, y = [p.scores[name].value for p in mine], [p.row.speedup for p in mine]
            alone = mine[0].value is None  # a lossless row: no knob
            axes.plot(x, y, "*" if alone else "o-", markersize=9 if alone else 4, linewidth=1, label=curve)
            for p, at, height in zip(mine, x, y):
                if p.value is not None:
                    axes.annotate(str(p.value), (at, height), fontsize=7, xytext=(3, 3), textcoords="offset points")
        axes.axhline(1, color="black", linewidth=0.8, linestyle="--")
        axes.set_xlabel(name)
    panels[0].set_ylabel("speed-up over hf-generate")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    return figure
