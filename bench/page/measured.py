"""What the records of a bench say beyond its table: by category, by position, by phase, and where texts differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest

from specdec.bench import report as reports
from specdec.bench.baselines import REFERENCE
from specdec.bench.page import figures
from specdec.bench.page.figures import Estimate
from specdec.bench.page.parts import Picture, Section, Table
from specdec.bench.spec_bench.metrics import accepted_by_position
from specdec.bench.statistics import Record, finished, median_repeat, summarise
from specdec.stats import PHASES

MOST_POSITIONS, MOST_DIFFERING = 8, 10
POSITIONS_NOTE = (
    "Share of target forwards that accepted at least so many drafted tokens: how often the k-th drafted token stood. "
    f"Forwards without a draft count as none accepted. The first {MOST_POSITIONS} positions."
)
OUTSIDE = "outside"  # of the loop, or of the forward where a method tells no more


def number(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None else format(value, form)


def speedup(value: Estimate) -> str:
    middle, interval = value
    return f"{middle:.2f}" + (f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else "")


def by_category(values: Mapping[str, Mapping[str, Estimate]], caption: str, note: str = "") -> Table:
    """``values``: method -> category -> speed-up."""
    names = list(dict.fromkeys(name for mine in values.values() for name in mine))
    rows = [[m, *(speedup(mine[n]) if n in mine else "-" for n in names)] for m, mine in values.items()]
    return Table(caption, ["method", *names], rows, note)


def positions(shares: Mapping[str, Sequence[float]], name: str, how: str) -> list[Picture]:
    """One picture, or none of a single position.

    Args:
        shares: method -> share of forwards that accepted at least 1, 2, ... drafted tokens.
        name: the picture's.
        how: end of its caption.
    """
    shares = {m: share for m, share in shares.items() if share}
    depth = min(max(map(len, shares.values()), default=0), MOST_POSITIONS)
    if depth < 2:
        return []
    series = {m: (list(range(1, depth + 1)), [*share, *[0.0] * depth][:depth]) for m, share in shares.items()}
    text = "; ".join(f"{m}: " + ", ".join(f"{share:.0%}" for share in found) for m, (_, found) in series.items())
    figure = figures.lines(series, "k-th drafted token", "share of forwards that accepted it")
    return [Picture(name, f"Acceptance by position{how}", text, figure)]


def from_records(
    section: Section,
    records: Sequence[Record],
    lossless: dict[str, bool],
    states: dict[str, str | None],
    repeats: int,
    categories: dict[str, str],
) -> None:
    """Adds to ``section`` what records say.

    Args:
        section: of the bench that made the records.
        records: all of them.
        lossless, states: per arm, in the order of the table.
        repeats: calls per arm and group.
        categories: prompt id -> category; empty where they are not known.
    """
    for temperature in dict.fromkeys(r.temperature for r in records):
        mine = [r for r in records if r.temperature == temperature and r.arm in lossless]
        how, end = f", {reports.how(temperature)}", f"-{temperature:g}"
        calls = finished(mine, lossless, repeats)
        chosen = {arm: [median_repeat(c) for c in groups] for arm, groups in calls.items()}
        if not chosen[REFERENCE]:
            continue
        if categories:
            _categories(section, mine, lossless, states, repeats, categories, how, end)
        _positions(section, chosen, how, end)
        _phases(section, chosen, how, end)
        if temperature == 0:
            _differing(section, calls, lossless)
    if not categories:
        section.missing.append("by category: the prompts' categories were not recorded, or they have none")


def _categories(
    section: Section,
    records: Sequence[Record],
    lossless: dict[str, bool],
    states: dict[str, str | None],
    repeats: int,
    categories: dict[str, str],
    how: str,
    end: str,
) -> None:
    of = {r.group: {categories.get(p) for p in r.prompts} for r in records}
    mixed = [g for g, found in of.items() if len(found) > 1 or None in found]
    values: dict[str, dict[str, Estimate]] = {arm: {} for arm in lossless if arm != REFERENCE}
    counts = {}
    for name in dict.fromkeys(categories.values()):
        rows = summarise([r for r in records if of[r.group] == {name}], lossless, states, repeats, REFERENCE)
        for row in rows:
            counts[name] = row.prompts
            if row.name != REFERENCE:
                values[row.name][name] = row.speedup, row.speedup_ci
            elif row.distinct4 is not None and row.distinct4 < 0.5:
                section.notes.append(
                    f"{name}{how}: the model's own text repeats itself (distinct-4 {row.distinct4:.2f}), which "
                    "flatters every speed-up there"
                )
    if mixed:
        section.missing.append(f"by category{how}: {len(mixed)} batches have prompts of several categories, or of none")
    if not counts or not values:
        return
    note = "Prompts: " + ", ".join(f"{name} {n}" for name, n in counts.items()) + "."
    if min(counts.values()) < 10:
        note += " Bootstrap intervals over fewer than ten prompts are too narrow."
    caption = f"Speed-up over {REFERENCE} by category, with 95 % intervals{how}"
    section.parts.append(by_category(values, caption, note))
    text = " ".join(
        f"{name}: {', '.join(f'{c} {speedup(v)}' for c, v in mine.items())}." for name, mine in values.items()
    )
    section.parts.append(Picture(f"categories{end}", caption, text, figures.categories(values)))


def _positions(section: Section, chosen: dict[str, list[Record]], how: str, end: str) -> None:
    told = {arm: [n for r in mine for n in r.accepted or ()] for arm, mine in chosen.items()}
    shares = {arm: accepted_by_position([n + 1 for n in accepted]) for arm, accepted in told.items()}
    shares = {arm: share for arm, share in shares.items() if share}
    if not shares:
        section.missing.append(f"acceptance by position{how}: the records do not tell it, or nothing was accepted")
        return
    depth = min(max(map(len, shares.values())), MOST_POSITIONS)
    rows = [[a, *(f"{share:.0%}" for share in [*s, *[0.0] * depth][:depth])] for a, s in shares.items()]
    headers = ["method", *(f"k = {k}" for k in range(1, depth + 1))]
    section.parts.append(Table(f"Acceptance by position{how}", headers, rows, POSITIONS_NOTE))
    section.parts += positions(shares, f"positions{end}", how)


def _phases(section: Section, chosen: dict[str, list[Record]], how: str, end: str) -> None:
    """Milliseconds a token, so that a short bar is a fast method."""
    parts: dict[str, dict[str, float]] = {}
    for arm, mine in chosen.items():
        tokens, seconds = sum(r.tokens for r in mine), sum(r.seconds for r in mine)
        if all(r.phases is not None for r in mine):
            found = {phase: sum((r.phases or {})[phase] for r in mine) for phase in PHASES}
        elif all(r.forward_seconds is not None for r in mine):
            found = {"forward": sum(r.forward_seconds or 0.0 for r in mine)}
        else:
            continue
        found[OUTSIDE] = max(seconds - sum(found.values()), 0.0)
        parts[arm] = {part: 1000 * s / tokens for part, s in found.items()}
    if all(r.phases is None for mine in chosen.values() for r in mine):
        section.missing.append(f"time per phase{how}: the records do not tell it")
        return
    heads = ["forward", *(p for p in PHASES if p != "forward"), OUTSIDE]
    rows = [
        [arm, *(number(found.get(p), ".3f") for p in heads), f"{sum(found.values()):.3f}"]
        for arm, found in parts.items()
    ]
    note = (
        "forward: of the target. outside: of the loop, in generate(); of methods that tell their forwards only, "
        "everything else."
    )
    caption = f"Time per phase, ms a token{how}"
    section.parts.append(Table(caption, ["method", *heads, "all"], rows, note))
    bars = {arm: {p: found.get(p, 0.0) for p in heads} for arm, found in parts.items()}
    text = "; ".join(f"{arm}: {sum(f.values()):.2f} ms, forward {f['forward']:.2f}" for arm, f in parts.items())
    section.parts.append(Picture(f"phases{end}", caption, text, figures.stacked(bars, "ms a token")))


def _differing(section: Section, calls: dict[str, list[list[Record]]], lossless: dict[str, bool]) -> None:
    """Where greedy texts of lossless methods leave the reference's; every repeat counts."""
    rows, left = [], 0
    for arm, groups in calls.items():
        found = {}
        for mine, base in zip(groups, calls[REFERENCE], strict=True):
            for i, prompt in enumerate(base[0].prompts):
                theirs = median_repeat(base).ids[i]
                ids = next((r.ids[i] for r in mine if r.ids[i] != theirs), None)
                if ids is not None:
                    found[prompt] = next(k for k, (a, b) in enumerate(zip_longest(ids, theirs)) if a != b)
        if lossless[arm]:
            rows += [[arm, prompt, str(at)] for prompt, at in list(found.items())[:MOST_DIFFERING]]
            left += max(len(found) - MOST_DIFFERING, 0)
    if rows:
        note = "Near ties of logits fall either way in half precision; `specdec verify` tells them from bugs."
        note += f" {left} more are not shown." if left else ""
        caption = f"Greedy texts of lossless methods that leave {REFERENCE}'s"
        section.parts.append(Table(caption, ["method", "prompt", "first token that differs"], rows, note, 2))
