"""From the files of specdec's commands to sections of the page. A file is known by what it holds, not by its name."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from specdec import zoo
from specdec.bench import report as reports
from specdec.bench.baselines import REFERENCE
from specdec.bench.page import figures
from specdec.bench.page.figures import Estimate
from specdec.bench.page.measured import MOST_DIFFERING, by_category, from_records, number, positions, speedup
from specdec.bench.page.parts import Picture, Section, Table
from specdec.bench.statistics import Record, Row, summarise
from specdec.errors import UsageError, first_line


def read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{file}: no readable JSON ({first_line(error)}); write it again, or move it away") from error


def _records(file: Path) -> list[Record]:
    records = []
    for i, line in enumerate(file.read_text(encoding="utf-8").split("\n"), start=1):
        try:
            if line:
                records.append(Record.from_json(json.loads(line)))
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"{file}:{i}: not a record of `specdec bench` ({first_line(error)}); measure again, or move it away"
            ) from error
    return records


# ---- shared ---------------------------------------------------------------------------------------------------------


def provenance(environment: Mapping[str, Any], settings: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Where it was measured and what was asked for, as text; what notes say of drafters is left to them."""
    left = ("drafters", "curves", "categories", "question_ids", "left_out")
    asked = {f"asked: {key}": value for key, value in (settings or {}).items() if key not in left}
    return {key: _text(value) for key, value in {**environment, **asked}.items() if value not in (None, {}, [])}


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_text(v)}" for k, v in value.items() if v is not None) or "-"
    if isinstance(value, list):
        return ", ".join(map(_text, value)) or "-"
    return "-" if value is None else str(value)


def row_of(entry: dict[str, Any]) -> Row:
    """A row as it was before it was JSON."""
    interval = entry["speedup_ci"]
    return Row(**{**entry, "speedup_ci": None if interval is None else (interval[0], interval[1])})


def best(values: Mapping[str, Estimate]) -> str:
    """Name and figure of the fastest."""
    name = max(values, key=lambda n: values[n][0])
    return f"{name} {speedup(values[name])}"


def spoken(values: Mapping[str, Estimate]) -> str:
    """The bars of a figure in words."""
    return "Speed-ups: " + "; ".join(f"{name} {speedup(value)}" for name, value in values.items()) + "."


def grown(environment: Mapping[str, Any], notes: list[str]) -> list[str]:
    """The caution about a grown model, where the notes lack it."""
    note = environment.get("grown")
    return [note] if note and note not in notes else []


def cost_of_columns(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> tuple[Table, Picture]:
    """Table and figure of t(N) and c(N); ``curves``: label -> columns and seconds."""
    ratios = {label: (n, [s / seconds[0] for s in seconds]) for label, (n, seconds) in curves.items()}
    rows = [
        [label, f"{n:g}", f"{1000 * s:.2f}", f"{c:.2f}"]
        for label, (columns, seconds) in curves.items()
        for n, s, c in zip(columns, seconds, ratios[label][1], strict=True)
    ]
    note = "A draft of N columns pays when it yields more than c(N) tokens per step (MAT), drafting costs aside."
    text = "; ".join(f"{label}: " + ", ".join(f"c({n:g}) = {c:.2f}" for n, c in zip(*r)) for label, r in ratios.items())
    table = Table("What a step of N columns costs", ["steps", "N", "ms", "c(N)"], rows, note)
    figure = figures.lines(ratios, "columns N", "c(N) = t(N) / t(1)", log=True)
    return table, Picture("columns", "Cost of a step of N columns, in steps of one: c(N)", text, figure)


# ---- one reader per kind --------------------------------------------------------------------------------------------


def bench(data: dict[str, Any], file: Path) -> Section:
    """`specdec bench`: results.json, and records.jsonl where it is."""
    s = data["settings"]
    rows = [row_of(row) for row in data["rows"]]
    report = reports.Report(rows, data["environment"], s, list(data["notes"]), data["partial"])
    greedy = ", ".join(reports.how(t) for t in s["temperatures"])
    section = Section("bench", f"{s['model']}, {greedy}, {s['state']}", "no prompt was finished by every method")
    section.notes = grown(report.environment, report.notes) + report.notes
    section.provenance = provenance(report.environment, s)
    if report.partial:
        section.notes.insert(0, "partial: the run was cut off; figures are of the prompts that every method finished")
    if not rows:
        section.missing.append("no table: no prompt was finished by every method")
        return section
    found: list[str] = []
    spread: dict[str, Estimate] = {}
    for title, mine in reports.titles(report):
        section.parts.append(Table(title, reports.HEADERS, [reports.cells(r) for r in mine], reports.FOOTNOTE, 2))
        values = {r.name: (r.speedup, r.speedup_ci) for r in mine}
        ours = {r.name: values[r.name] for r in mine if r.lossless and r.name in s["drafters"]}
        found.append(f"{reports.how(mine[0].temperature)}: fastest lossless {best(ours or values)}")
        spread |= {f"{reports.how(mine[0].temperature)}, {name}": value for name, value in values.items()}
    section.finding = "; ".join(found)
    caption = "Speed-up over hf-generate with 95 % intervals"
    section.parts.append(Picture("speed-up", caption, spoken(spread), reports.speedups(report)))
    beside = file.with_name("records.jsonl")
    if not beside.exists():
        section.missing.append(
            "by category, acceptance by position, time per phase, differing texts: there is no records.jsonl beside it"
        )
        return section
    records = _records(beside)
    lossless, states = {r.name: r.lossless for r in rows}, {r.name: r.state for r in rows}
    again = summarise([r for r in records if r.arm in lossless], lossless, states, s["repeats"], REFERENCE)
    if [(r.name, r.temperature, r.tokens) for r in again] != [(r.name, r.temperature, r.tokens) for r in rows]:
        section.missing.append(
            "by category, acceptance by position, time per phase, differing texts: the records.jsonl beside it is of "
            "another run"
        )
        return section
    from_records(section, records, lossless, states, s["repeats"], _categories(s))
    return section


def _categories(settings: dict[str, Any]) -> dict[str, str]:
    """Prompt id -> category, as far as it is known."""
    embedded = {"embedded": zoo.prompts, "tasks": zoo.tasks}
    if settings["prompts"] in embedded:
        return {p.id: p.category for p in embedded[settings["prompts"]]("tiny")}
    return settings.get("categories") or {}


def spec_bench(data: dict[str, Any], file: Path) -> Section:
    """`specdec spec-bench run`, `report` and `compare`: report.json."""
    from specdec.bench.spec_bench.answers import RunFolder
    from specdec.bench.spec_bench.metrics import Divergence, Ours, Protocol, Steps
    from specdec.bench.spec_bench.metrics import Row as SubtaskRow
    from specdec.bench.spec_bench.questions import OVERALL
    from specdec.bench.spec_bench.report import Report

    rows = [
        SubtaskRow(
            r["method"],
            r["subtask"],
            r["questions"],
            Protocol(**r["protocol"]),
            Ours(**r["ours"]) if r["ours"] else None,
        )
        for r in data["rows"]
    ]
    base, settings = data["baseline"], data["settings"]
    report = Report(
        title=data["title"],
        baseline=base,
        rows=rows,
        divergences=[Divergence(**d) for d in data["divergences"]],
        states=data["states"],
        accepted=data["accepted_by_position"],
        steps={name: Steps(**found) for name, found in data.get("steps", {}).items()},
        counted="",
        settings=settings,
    )
    section = Section("spec-bench", data["title"], "", notes=list(data["notes"]))
    (caption, headers, cells, _), *others = report.tables()
    section.parts.append(Table(caption, headers, cells, data["protocol"]))
    section.parts += [Table(*table) for table in others]
    ours = {r.method: r.ours for r in rows if r.subtask == OVERALL and r.method != base and r.ours}
    overall = {m: (o.speedup, o.speedup_ci) for m, o in ours.items() if o.speedup is not None}
    section.finding = f"fastest overall: {best(overall)}" if overall else "Spec-Bench's own figures only"
    if overall:
        caption = f"Speed-up over {base} with 95 % intervals, all questions"
        figure = reports.bars({"": overall}, f"speed-up over {base}, total tokens / total time", "")
        section.parts.append(Picture("speed-up", caption, spoken(overall), figure))
        values: dict[str, dict[str, Estimate]] = {}
        for r in rows:
            if r.ours and r.ours.speedup is not None and r.subtask != OVERALL and r.method != base:
                values.setdefault(r.method, {})[r.subtask] = r.ours.speedup, r.ours.speedup_ci
        section.parts.append(by_category(values, "Totals: speed-up with 95 % intervals, by subtask"))
        text = " ".join(f"{m}: {spoken(mine)}" for m, mine in values.items())
        caption = "Speed-up with 95 % intervals, by subtask"
        section.parts.append(Picture("categories", caption, text, figures.categories(values)))
    section.parts += positions(data["accepted_by_position"], "positions", "")
    if not any(data["accepted_by_position"].values()):
        section.missing.append("acceptance by position: no method told its step lengths")
    if report.divergences:
        section.parts.append(_divergences(report.divergences, data.get("gaps"), base))
    section.missing.append("time per phase: Spec-Bench's answers hold the time of turns only")
    if not settings:
        section.missing.append("provenance: answer files of other tools name none")
        return section
    section.provenance = provenance(data["sessions"][0], settings)
    if file.with_name("settings.json").exists():
        folder = RunFolder(file.parent)
        answered = min(len(folder.pairs(folder.name(method, 1))) for method in settings["methods"])
        if rows and answered > rows[-1].questions:
            section.notes.append(
                f"this is of {rows[-1].questions} questions, the folder holds {answered} that every method answered: "
                "`specdec spec-bench report` renews it where none of them are errors"
            )
    return section


def _divergences(found: Sequence[Any], gaps: dict[str, Any] | None, base: str) -> Table:
    """Where texts leave the baseline's, and how near the two tokens' logits were, where that was measured."""
    gap = {(g["method"], g["question"], g["run"], g["turn"]): g["gap"] for g in (gaps or {"found": []})["found"]}
    rows, left = [], 0
    for name in dict.fromkeys(d.method for d in found):
        mine = [d for d in found if d.method == name]
        left += max(len(mine) - MOST_DIFFERING, 0)
        for d in mine[:MOST_DIFFERING]:
            near = number(gap.get((name, d.question, d.run, d.turn)), ".1e")
            rows.append([name, str(d.question), str(d.run), str(d.turn), number(d.index, "d"), near])
    headers = ["method", "question", "run", "turn", "first token that differs", "gap of the two logits"]
    note = "A text that leaves at a near tie is no fault; only `specdec verify` or the gap tells."
    note += f" {left} more are not shown." if left else ""
    return Table(f"Where texts leave {base}'s", headers, rows, note)


def spec_bench_run(data: dict[str, Any], file: Path) -> Section | None:
    """`specdec spec-bench run` before its first report; None where there is one."""
    if file.with_name("report.json").exists():
        return None
    s = data["settings"]
    section = Section("spec-bench", f"{s['model']}, {len(s['question_ids'])} questions, unfinished", "no report yet")
    section.missing.append("all tables: `specdec spec-bench report` with this folder makes its report, finished or not")
    section.provenance = provenance(data["sessions"][0], s)
    return section


def certificate(data: dict[str, Any], file: Path) -> Section:
    """`specdec verify`."""
    from specdec.bench.certificate import MEANINGS

    section = Section("verify", data["title"], data["verdict"], failed=not data["passed"])
    cells = [[s["name"], s["status"], s["finding"]] for s in data["sections"]]
    meanings = [f"{s['name']}: {MEANINGS[s['name']]}" for s in data["sections"] if s["name"] in MEANINGS]
    note = " ".join([*meanings, f"allowed: {MEANINGS['allowed']}"])
    section.parts.append(Table(f"Is it the same text? {data['verdict']}", ["section", "", "found"], cells, note, 3))
    section.notes = grown(data["provenance"], []) + [
        f"{s['name']} {s['status']}: {s['finding']}" for s in data["sections"] if s["status"] != "passed"
    ]
    section.provenance = provenance(data["provenance"])
    return section


def profile(data: dict[str, Any], file: Path) -> Section:
    """`specdec tune`: its profile, or what --json printed."""
    evidence = data.get("evidence", data)
    s = evidence["settings"]
    options = ", ".join(f"{k}={v}" for k, v in data["options"].items())
    compiled = "" if data["compile"] == "off" else f", compile={data['compile']}"
    section = Section("tune", f"{s['model']}, {s['prompt_count']} prompts", "")
    rows = evidence["finalists"]
    values: dict[str, Estimate] = {r["setting"]: (r["measured"], r["interval"]) for r in rows}
    chosen = best({name: value for name, value in values.items() if name != REFERENCE})
    section.finding = f"chosen: {', '.join(filter(None, [data['drafter'], options])) + compiled}; fastest: {chosen}"
    cells = [[r["setting"], number(r["predicted"]), speedup(values[r["setting"]]), number(r["mat"])] for r in rows]
    caption = "Finalists: speed-up over hf-generate on prompts that did not calibrate"
    section.parts.append(Table(caption, ["setting", "predicted", "measured [95 %]", "MAT"], cells))
    figure = reports.bars({"": values}, "speed-up over hf-generate, 95 % interval", "")
    section.parts.append(Picture("speed-up", caption, spoken(values), figure))
    predicted = [[name, f"{value:.2f}"] for name, value in evidence["all predicted over none"].items()]
    section.parts.append(Table("Predicted for every candidate", ["candidate", "speed-up over none"], predicted))
    table, picture = cost_of_columns({mode: (n, t) for mode, (n, t) in evidence["curve"].items()})
    section.parts.append(table)
    section.parts.append(picture)
    section.notes = grown(evidence["environment"], [])
    section.provenance = provenance(evidence["environment"], s)
    return section


def pareto(data: dict[str, Any], file: Path) -> Section:
    """`specdec pareto`."""
    from specdec.bench.pareto import Point, _cells, _headers
    from specdec.bench.quality import Score

    points = [
        Point(p["curve"], p["value"], row_of(p["row"]), {name: Score(**score) for name, score in p["scores"].items()})
        for p in data["points"]
    ]
    s, names = data["settings"], list(points[0].scores)
    title = f"{s['model']}, {reports.how(s['temperature'])}, {s['prompt_count']} prompts, lossy methods"
    section = Section("pareto", title, f"{len(points)} settings; curves: {', '.join(s['curves'])}")
    meanings = [f"{name}: {meaning}." for name, meaning in data.get("scores", {}).items()]
    note = " ".join([*meanings, "change: from the target alone, paired; intervals: 95 % bootstrap over prompts."])
    cells = [_cells(p, names) for p in points]
    section.parts.append(Table("Speed against quality", _headers(names), cells, note, 3))
    text = "; ".join(f"{p.curve} {'' if p.value is None else p.value}: speed-up {p.row.speedup:.2f}" for p in points)
    figure = figures.tradeoff(points, names)
    section.parts.append(
        Picture("tradeoff", "Speed-up over quality, a line per knob; intervals are in the table", text, figure)
    )
    environment = data.get("environment", {})
    if not environment:
        section.missing.append("provenance: this is what --json printed; `specdec pareto --out` writes more")
    section.notes = grown(environment, data.get("notes", [])) + data.get("notes", [])
    section.provenance = provenance(environment, s)
    return section


def online(data: dict[str, Any], file: Path) -> Section:
    """`specdec bench-online`."""
    from specdec.bench.online import FROZEN, WINDOW, moving

    s, cells = data["settings"], []
    for arm, found in data["arms"].items():
        for part, g in found["parts"].items():
            if "gain" in g:
                low, high = g["interval"]
                gain = f"{g['gain']:+.3f} [{low:+.3f}, {high:+.3f}]"
                figures_ = [f"{g['alpha']:.3f}", f"{g[FROZEN]:.3f}", gain, f"{g['mat']:.2f}", f"{g['frozen_mat']:.2f}"]
                cells.append([arm, part, str(g["requests"]), *figures_])
    whole = [f"{arm} {f['parts']['whole stream'].get('gain', 0.0):+.3f}" for arm, f in data["arms"].items()]
    title = f"{s['model']}, {reports.how(s['temperature'])}, {data['requests']} requests, online distillation"
    section = Section("bench-online", title, f"gain in acceptance over the frozen draft: {', '.join(whole)}")
    headers = ["arm", "part of the stream", "requests", "alpha", "frozen", "gain [95 %]", "MAT", "frozen MAT"]
    note = "alpha: chance that one draft is accepted, mean over requests; gain: the same requests, paired."
    section.parts.append(Table("Acceptance against the frozen draft", headers, cells, note, 2))
    series = {}
    for arm in [FROZEN, *data["arms"]]:
        means = moving([served["alpha"] for served in data["served"] if served["arm"] == arm])
        series[arm] = list(range(len(means))), means.tolist()
    figure = figures.lines(series, "request", f"alpha, mean of {WINDOW} requests", points=False)
    section.parts.append(Picture("alpha", "Acceptance over the stream", f"Gains: {', '.join(whole)}.", figure))
    if data["partial"]:
        section.notes.append("partial: the run was cut off")
    section.notes += grown(data["environment"], [])
    section.provenance = provenance(data["environment"], s)
    return section


def doctor(data: dict[str, Any], file: Path) -> Section:
    """`specdec doctor --json`."""
    e = data["environment"]
    section = Section("doctor", f"{data['model']} on {e['gpu'] or e['cpu']}", f"{data['tier']}: {data['reason']}")
    section.notes = grown(e, [])
    section.provenance = provenance({**e, **{k: v for k, v in data.items() if k not in ("curve", "environment")}})
    if data["curve"]:
        columns, seconds = [p["columns"] for p in data["curve"]], [p["seconds"] for p in data["curve"]]
        table, picture = cost_of_columns({f"after {data['prefix']} tokens": (columns, seconds)})
        section.parts.append(table)
        section.parts.append(picture)
    else:
        section.missing.append("cost of columns: this model takes no drafts, so nothing was timed")
    return section


def head(data: dict[str, Any], file: Path) -> Section | None:
    """`specdec train HEAD`: the acceptance table of a checkpoint; None where there is none."""
    table = data["acceptance"]
    if not table:
        return None
    method, beside = data["specdec_method"], file.with_name("training.json")
    first = ", ".join(f"{row[0]:.0%}" for row in table)
    section = Section("train", f"{method} for {data.get('target_id') or 'a model'}", f"first candidate right: {first}")
    headers = ["depth", *(f"rank {r}" for r in range(1, len(table[0]) + 1)), "any"]
    cells = [[str(k), *(f"{share:.1%}" for share in row), f"{sum(row):.1%}"] for k, row in enumerate(table, start=1)]
    note = "How often the target's own token is the candidate of a rank, on held-out text."
    section.parts.append(Table("Acceptance by depth and rank", headers, cells, note))
    ranks = list(range(1, len(table[0]) + 1))
    depths = {f"depth {k}": (ranks, [sum(row[:r]) for r in ranks]) for k, row in enumerate(table, start=1)}
    figure = figures.lines(depths, "candidates taken", "share of texts' tokens among them")
    section.parts.append(Picture("acceptance", "Target's token among the first candidates", note, figure))
    if not beside.exists():
        section.missing.append("provenance: there is no training.json beside it")
        return section
    training = read_json(beside)
    section.provenance = provenance({k: v for k, v in training.items() if k != "log"})
    evals = [row for row in training.get("log", []) if "eval_mat" in row]
    if evals:
        top = max(evals, key=lambda row: row["eval_mat"])
        section.finding += f"; MAT {top['eval_mat']:.2f} on held-out prompts at step {top['step']}, the checkpoint kept"
    return section


Reader = Callable[[dict[str, Any], Path], "Section | None"]
READERS: list[tuple[set[str], Reader]] = [  # keys that tell a kind; the first that fits
    ({"partial", "rows", "settings", "environment", "notes"}, bench),
    ({"protocol", "ours", "rows", "accepted_by_position"}, spec_bench),
    ({"settings", "sessions"}, spec_bench_run),
    ({"verdict", "passed", "sections", "provenance"}, certificate),
    ({"drafter", "options", "compile", "evidence"}, profile),
    ({"drafter", "options", "compile", "finalists"}, profile),
    ({"points", "settings"}, pareto),
    ({"arms", "served", "settings"}, online),
    ({"tier", "reason", "curve", "environment"}, doctor),
    ({"specdec_method", "acceptance"}, head),
]
