"""The figures on the screen and on disk: the protocol's and ours, side by side and never mixed."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from specdec.bench.arms import STATES
from specdec.bench.baselines import REFERENCE
from specdec.bench.report import replace_text
from specdec.bench.spec_bench.answers import RECOMPILED, RunFolder, read_answers
from specdec.bench.spec_bench.metrics import (
    Divergence,
    Method,
    Row,
    Steps,
    accepted_by_position,
    comparable,
    divergences,
    reported,
    retokenised,
    rows,
    steps,
)
from specdec.bench.spec_bench.questions import OVERALL, SUBTASKS, subtask
from specdec.bench.spec_bench.ties import Gaps, read_gaps
from specdec.errors import UsageError

PROTOCOL_NOTE = (
    "speed-ups as Spec-Bench computes them: mean over questions of new_tokens/wall_time, over the same mean of {base}, "
    "whose tokens are its text's, {count}; so {base} itself need not be 1. MAT: mean of accept_lengths over all steps, "
    "bonus included."
)
OURS_NOTE = (
    "speed-ups of total tokens over total time, token ids up to and including the end token; interval: bootstrap over "
    "questions, 95 %. MAT: tokens per target forward. overhead: share of time outside the target's forward. equal: "
    "questions whose ids are {base}'s in every turn (greedy only). distinct-4: different 4-grams over 4-grams; looping "
    "text scores low."
)
POSITIONS_NOTE = "share of target forwards that accepted at least so many drafted tokens"
STEPS_NOTE = (
    "milliseconds, over all turns: median time to the first token, prompt and set-up included; median and 95th "
    "percentile of the times between later steps. tokens/s: after the first step. Only methods of ours tell: on a GPU "
    "a streamer would slow transformers' own, as it waits for every token, and servers are not asked to stream."
)
TableOf = tuple[str, list[str], list[list[str]], str]  # title, headers, cells, footnote

MOST_POSITIONS, MOST_DIVERGENCES = 8, 10  # in tables; the JSON has all


@dataclass
class Report:
    """Everything there is to say.

    Attributes:
        title: what was asked.
        baseline: what speed-ups are relative to.
        rows: methods by subtask, overall last.
        divergences: where texts leave the baseline's.
        states: method -> what learning drafters knew.
        accepted: method -> shares by position, all questions.
        steps: method -> when its tokens come, of methods that tell.
        gaps: of logits where lossless texts leave the baseline's; None if they were not measured.
        counted: how the protocol's baseline tokens were counted, in words.
        settings, sessions: of a run's folder.
        notes: what a reader must know.
    """

    title: str
    baseline: str
    rows: list[Row]
    divergences: list[Divergence]
    states: dict[str, str | None]
    accepted: dict[str, list[float]]
    counted: str
    steps: dict[str, Steps] = field(default_factory=dict)
    gaps: Gaps | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    sessions: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "baseline": self.baseline,
            "protocol": self._note(PROTOCOL_NOTE),
            "ours": self._note(OURS_NOTE),
            "rows": [row.to_json() for row in self.rows],
            "accepted_by_position": self.accepted,
            "steps": {name: asdict(found) for name, found in self.steps.items()},
            "divergences": [asdict(d) for d in self.divergences],
            "gaps": asdict(self.gaps) if self.gaps else None,
            "states": self.states,
            "settings": self.settings,
            "sessions": self.sessions,
            "notes": self.notes,
        }

    def tables(self) -> list[TableOf]:
        """The protocol's figures, ours where there are any, and acceptance by position where it is known."""
        tables = [self._protocol_table()]
        if any(row.ours for row in self.rows):
            tables.append(self._our_table())
        if any(self.accepted.values()):
            tables.append(self._positions_table())
        if self.steps:
            tables.append(self._steps_table())
        return tables

    def _protocol_table(self) -> TableOf:
        lines = []
        for label, mine in self._methods():
            figures = [row.protocol for row in mine]
            last = figures[-1]
            speed = _spread(last.tokens_per_second, last.tokens_per_second_std, ".1f")
            lines.append([label, *(_spread(f.speedup, f.speedup_std) for f in figures), _number(last.mat), speed])
        headers = [*self._heads(), "MAT", "tokens/s"]
        return "Spec-Bench's own figures: speed-up", headers, lines, self._note(PROTOCOL_NOTE)

    def _our_table(self) -> TableOf:
        lines = []
        for label, mine in self._methods():
            figures = [row.ours for row in mine if row.ours]
            last = figures[-1]
            interval = f" [{last.speedup_ci[0]:.2f}, {last.speedup_ci[1]:.2f}]" if last.speedup_ci else ""
            cells = [label, *(_number(f.speedup) for f in figures[:-1]), _number(last.speedup) + interval]
            cells += [_number(last.mat), _number(last.tokens_per_second, ".1f"), _number(last.overhead, ".0%")]
            lines.append([*cells, _number(last.equal_share, ".0%"), _number(last.distinct4)])
        headers = [*self._heads()[:-1], "overall [95 %]", "MAT", "tokens/s", "overhead", "equal", "distinct-4"]
        return "Totals: speed-up", headers, lines, self._note(OURS_NOTE)

    def _positions_table(self) -> TableOf:
        depth = min(max(map(len, self.accepted.values())), MOST_POSITIONS)
        lines = []
        for name, shares in self.accepted.items():
            if shares:
                cells = [*shares, *[0.0] * depth][:depth]
                lines.append([self._label(name), *(f"{share:.0%}" for share in cells)])
        headers = ["method", *(f">= {k}" for k in range(1, depth + 1))]
        return "Acceptance by position", headers, lines, POSITIONS_NOTE

    def _steps_table(self) -> TableOf:
        lines = []
        for name, s in self.steps.items():
            times = [None if t is None else 1000 * t for t in (s.first, s.median, s.high)]
            lines.append([self._label(name), *(_number(t, ".1f") for t in times), _number(s.tokens_per_second, ".1f")])
        return "Steps", ["method", "first token", "step", "95 %", "tokens/s"], lines, STEPS_NOTE

    def _heads(self) -> list[str]:
        return ["method", *(SUBTASKS.get(s, s) for s in dict.fromkeys(row.subtask for row in self.rows))]

    def _methods(self) -> list[tuple[str, list[Row]]]:
        """Label and rows of every method, overall last."""
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            found.setdefault(row.method, []).append(row)
        return [(self._label(name), mine) for name, mine in found.items()]

    def _label(self, name: str) -> str:
        state = self.states.get(name)
        return f"{name} ({state})" if state else name

    def _note(self, text: str) -> str:
        return text.format(base=self.baseline, count=self.counted)


def from_folder(folder: RunFolder, baseline: str, tokenizer: Any) -> Report:
    """The report of a run, finished or not.

    Args:
        folder: where it is.
        baseline: what speed-ups are relative to.
        tokenizer: counts the protocol's baseline tokens.

    Raises:
        UsageError: no run there, no such method, or no question that every method has answered.
    """
    settings, sessions = folder.record()
    names: list[str] = settings["methods"]
    if baseline not in names:
        raise UsageError(f"--baseline {baseline!r}: {folder.path} has {', '.join(names)}")
    asked = set(settings["question_ids"])
    numbers = range(1, settings["runs"] + 1)
    read = {(name, run): folder.read(folder.name(name, run)) for name in names for run in numbers}
    whole = [r for r in numbers if all(asked <= read[name, r][0].keys() for name in names)]
    used = whole or [1]
    methods = [Method(n, [read[n, r][0] for r in used], [read[n, r][1] for r in used]) for n in names]
    (base,) = [m for m in methods if m.name == baseline]
    greedy = settings["temperature"] == 0
    questions = comparable(methods)
    if not questions:
        raise UsageError(f"{folder.path}: no question has been answered by every method yet; continue the run")
    how = "greedy" if greedy else f"temperature {settings['temperature']:g}"
    what = f"{len(questions)} questions" + (f", {len(used)} runs" if len(used) > 1 else "")
    taught = {d.session for m in methods for run in m.details for d in run.values()}
    report = Report(
        title=f"{settings['model']}, {how}, {what}, up to {settings['max_new_tokens']} tokens a turn, template "
        f"{settings['template']}, batch 1",
        baseline=baseline,
        rows=rows(methods, base, retokenised(tokenizer), greedy),
        divergences=divergences(methods, base, questions) if greedy else [],
        states={m.name: m.details[0][questions[0]].state for m in methods},
        accepted=_accepted(methods, questions),
        steps={m.name: told for m in methods if (told := steps(m, questions))},
        gaps=read_gaps(folder) if baseline == REFERENCE else None,
        counted="tokenised again, less one for BOS",
        settings=settings,
        sessions=[sessions[number] for number in sorted(taught)],
    )
    report.notes = _run_notes(report, methods, base, questions, whole) + _bos_note(tokenizer)
    return report


def from_files(files: Sequence[Path], baseline: Path, tokenizer: Any | None) -> Report:
    """The protocol's figures of answer files of any tool.

    Args:
        files: one method each, the baseline among them.
        baseline: what speed-ups are relative to.
        tokenizer: counts the baseline's tokens; without one, the file's own counts are taken.

    Raises:
        UsageError: a malformed file, files of different questions, or nothing that can be compared.
    """
    stems = [file.stem for file in files]
    names = stems if len(set(stems)) == len(stems) else [str(file) for file in files]
    methods = [Method(name, [read_answers(file)], []) for name, file in zip(names, files, strict=True)]
    base = methods[list(files).index(baseline)]
    for method, file in zip(methods, files, strict=True):
        _same_questions(method, base, file, baseline)
    questions = comparable(methods)
    if not questions:
        raise UsageError(f"{baseline}: no question is without error in every file")
    report = Report(
        title=f"{len(questions)} questions, answer files",
        baseline=base.name,
        rows=rows(methods, base, reported if tokenizer is None else retokenised(tokenizer), greedy=True),
        divergences=divergences(methods, base, questions),
        states={},
        accepted=_accepted(methods, questions),
        counted="as the file reports it" if tokenizer is None else "tokenised again, less one for BOS",
    )
    report.notes = _dropped(methods) + _own_categories(base) + _texts_note(report, methods, len(questions))
    if tokenizer is None:
        report.notes.append("the protocol tokenises the baseline's text again: give --tokenizer for its exact figures")
    else:
        report.notes += _bos_note(tokenizer)
    return report


def _same_questions(method: Method, base: Method, file: Path, base_file: Path) -> None:
    mine, theirs = method.answers[0], base.answers[0]
    parts = []
    for where, more, fewer in ((file, mine, theirs), (base_file, theirs, mine)):
        if only := sorted(more.keys() - fewer.keys()):
            parts.append(f"only in {where}: {_some(only)}")
    shared = mine.keys() & theirs.keys()
    other = sorted(q for q in shared if mine[q].category != theirs[q].category)
    if other:
        parts.append(f"of another category: {_some(other)}")
    turns = sorted(q for q in shared if len(mine[q].turns) != len(theirs[q].turns))
    if turns:
        parts.append(f"of another number of turns: {_some(turns)}")
    if parts:
        raise UsageError(
            f"{file} and {base_file} answer different questions ({'; '.join(parts)}); compare answers to one set"
        )


def _some(ids: Sequence[int], most: int = 8) -> str:
    more = f" and {len(ids) - most} more" if len(ids) > most else ""
    return ", ".join(map(str, ids[:most])) + more


def _accepted(methods: Sequence[Method], questions: Sequence[int]) -> dict[str, list[float]]:
    return {
        m.name: accepted_by_position([n for run in m.answers for q in questions for n in run[q].accept_lengths])
        for m in methods
    }


def _dropped(methods: Sequence[Method]) -> list[str]:
    """Questions that some method has no figures for; they are left out of every method's."""
    notes = [
        f"{m.name}: {len(failed)} answers are errors; these questions count for no method ({_some(failed)})"
        for m in methods
        if (failed := m.errors())
    ]
    answers = [a for m in methods for run in m.answers for a in run.values()]
    timeless = sorted({a.question_id for a in answers if not a.failed and sum(a.wall_time) <= 0})
    if timeless:
        notes.append(f"{len(timeless)} questions took no time somewhere and count for no method ({_some(timeless)})")
    return notes


def _own_categories(base: Method) -> list[str]:
    categories = dict.fromkeys(a.category for a in base.answers[0].values())
    own = [category for category in categories if subtask(category) not in SUBTASKS]
    return [f"categories that are not Spec-Bench's stand under their own names: {', '.join(own)}"] if own else []


def _texts_note(report: Report, methods: Sequence[Method], questions: int) -> list[str]:
    notes = []
    for method in methods:
        if method.name != report.baseline:
            differ = sorted({d.question for d in report.divergences if d.method == method.name})
            which = f" ({_some(differ)})" if differ else ""
            notes.append(f"{method.name}: {len(differ)} of {questions} texts differ from {report.baseline}'s{which}")
    return notes


def _bos_note(tokenizer: Any) -> list[str]:
    if len(tokenizer("").input_ids) == 1:
        return []
    return ["this tokenizer puts no BOS before a text, so the protocol's count of the baseline lacks one token a turn"]


def _run_notes(
    report: Report, methods: Sequence[Method], base: Method, questions: Sequence[int], whole: Sequence[int]
) -> list[str]:
    settings, sessions = report.settings, report.sessions
    notes = []
    asked = len(settings["question_ids"])
    if not whole:
        notes.append(f"partial: {asked - len(questions)} of {asked} questions are not answered by every method yet")
    elif len(whole) < settings["runs"]:
        notes.append(f"{settings['runs'] - len(whole)} of {settings['runs']} runs are unfinished and not counted")
    if settings["left_out"]:
        ids = settings["left_out"]
        notes.append(f"{len(ids)} questions left out for every method, they do not fit the context: {_some(ids)}")
    cut = {q for m in methods for run in m.details for q, d in run.items() if any(d.cut)}
    if cut:
        notes.append(f"{len(cut)} questions had a prompt whose middle was taken out: {_some(sorted(cut))}")
    turns = [
        (d.question_id, len(ids), limit)
        for m in methods
        for run in m.details
        for d in run.values()
        for ids, limit in zip(d.ids, d.limits, strict=True)
    ]
    short = sorted({question for question, n, limit in turns if n == limit < settings["max_new_tokens"]})
    if short:
        notes.append(f"{len(short)} questions have an answer that the context ended: {_some(short)}")
    notes += _dropped(methods) + _own_categories(base)
    for name, drafter in settings["drafters"].items():
        if drafter["options"] or drafter["drafter"] != name:
            options = [f"{key}={value}" for key, value in drafter["options"].items()]
            notes.append(f"{name}: {', '.join([drafter['drafter'], *options])}")
    if settings["compile"] != "off":
        outcomes: dict[str, list[str]] = {}
        for m in methods:
            outcomes.setdefault(m.details[0][questions[0]].compilation, []).append(m.name)
        notes += [f"compile {settings['compile']}, {what}: {', '.join(n)}" for what, n in outcomes.items() if what]
    states = list(dict.fromkeys(filter(None, report.states.values())))
    notes += [f"{state}: {STATES[state]}; a prompt is a question with all its turns here" for state in states]
    if any("warm" in state for state in states) and len(sessions) > 1:
        notes.append(f"warm drafters began anew in each of the {len(sessions)} sessions or processes")
    for key in ("commit", "packages", "cpu", "gpu", "torch_threads"):
        values = list(dict.fromkeys(str(s.get(key)) for s in sessions))
        if len(values) > 1:
            notes.append(f"sessions were not alike, {key}: {'; '.join(values)}")
    if max(s["processes"] for s in sessions) > 1:
        notes.append("several processes answered at a time; on one machine they slow each other down")
    lossy = [m.name for m in methods if not m.details[0][questions[0]].lossless and not _remote(m)]
    notes += [f"{name} is lossy: its text need not be the target's" for name in lossy]
    remote = [m.name for m in methods if _remote(m)]
    for m in methods:
        made = [(a.tstamp, d[q].remarks) for run, d in zip(m.answers, m.details, strict=True) for q, a in run.items()]
        notes += max(made)[1]  # they grow with every answer
        again = sum(d.compilation == RECOMPILED for run in m.details for d in run.values())
        notes += [f"{m.name}: {RECOMPILED}, at {again} questions"] if again else []
    for row in report.rows:
        if row.method == base.name and row.ours and row.ours.distinct4 is not None and row.ours.distinct4 < 0.5:
            notes.append(
                f"{row.subtask}: the model's own text repeats itself (distinct-4 {row.ours.distinct4:.2f}), which "
                "flatters every speed-up there"
            )
    dtype = sessions[0]["dtype"]
    differ = [m.name for m in methods if m.name not in (base.name, *lossy, *remote)]
    for row in report.rows:
        share = row.ours.equal_share if row.ours else None
        if row.subtask == OVERALL and row.method in differ and share is not None and share < 1:
            notes.append(
                f"{row.method} is lossless, yet {1 - share:.0%} of its answers differ from {base.name}'s: "
                + _verdict(row.method, report.gaps, dtype)
            )
    return notes


def _verdict(method: str, gaps: Gaps | None, dtype: str) -> str:
    """Near ties or a bug, as far as it is known."""
    mine = [gap.gap for gap in gaps.found if gap.method == method] if gaps else []
    if not gaps or gaps.allowed is None or not mine:
        return f"near ties of logits fall either way in {dtype}, anything else is a bug"
    known = [gap for gap in mine if gap is not None]
    bad = sum(gap > gaps.allowed for gap in known) + len(mine) - len(known)
    said = f"of {len(mine)} first differences {len(mine) - bad} are near ties of logits in {gaps.dtype} (largest gap "
    said += f"{max(known, default=0.0):.1e}, the model's own noise allows {gaps.allowed:.1e})"
    return said + (f", {bad} are more than that: a bug" if bad else "")


def _remote(method: Method) -> bool:
    return any(d.retokenised for run in method.details for d in run.values())


def _number(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None else format(value, form)


def _spread(value: float | None, deviation: float | None, form: str = ".2f") -> str:
    return _number(value, form) + (f" ± {deviation:{form}}" if deviation is not None else "")


def show(report: Report, console: Console) -> None:
    """Tables, footnotes and notes."""
    console.print(f"\n{report.title}", highlight=False, markup=False)
    for title, headers, lines, note in report.tables():
        table = Table(title=title, title_justify="left")
        for i, header in enumerate(headers):
            table.add_column(header, justify="right" if i else "left", no_wrap=True)
        for line in lines:
            table.add_row(*line)
        console.print(table)
        console.print(note, style="dim", highlight=False, markup=False)
    for text in report.notes:
        console.print(f"note: {text}", highlight=False, markup=False)


def markdown(report: Report) -> str:
    """The tables, where texts differ, and where it was measured."""
    lines = [f"**{report.title}**", ""]
    for title, headers, cells, note in report.tables():
        lines += [f"**{title}**", "", *_table(headers, cells), "", note, ""]
    lines += [*(f"- {note}" for note in report.notes), ""]
    if report.divergences:
        lines += [f"**Where texts leave {report.baseline}'s**", ""]
        cells = []
        measured = report.gaps.found if report.gaps else []
        gaps = {(gap.method, gap.question, gap.run, gap.turn): gap.gap for gap in measured}
        for name in dict.fromkeys(d.method for d in report.divergences):
            mine = [d for d in report.divergences if d.method == name]
            for d in mine[:MOST_DIVERGENCES]:
                index = "-" if d.index is None else str(d.index)
                gap = _number(gaps.get((name, d.question, d.run, d.turn)), ".1e")
                cells.append([name, str(d.question), str(d.run), str(d.turn), index, gap])
            if len(mine) > MOST_DIVERGENCES:
                cells.append([name, f"{len(mine) - MOST_DIVERGENCES} more", "", "", "", ""])
        heads = ["method", "question", "run", "turn", "first token that differs", "gap of the two logits"]
        lines += [*_table(heads, cells), ""]
    if report.sessions:
        e = report.sessions[0]
        versions = ", ".join(f"{name} {number}" for name, number in e["packages"].items() if number)
        lines += [f"{e['gpu'] or e['cpu']}, {e['torch_threads']} threads, {e['dtype']}, {versions}; {e['date']}.", ""]
        lines += [f"`{e['command']}`"]
    return "\n".join(lines).rstrip() + "\n"


def _table(headers: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    rules = ["---", *["---:"] * (len(headers) - 1)]
    return ["| " + " | ".join(line) + " |" for line in (headers, rules, *cells)]


def plot(report: Report, file: Path) -> None:
    """Our speed-ups by subtask as bars, with the overall interval, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [n for n in dict.fromkeys(row.method for row in report.rows) if n != report.baseline]
    subtasks = list(dict.fromkeys(row.subtask for row in report.rows))
    width = 0.8 / max(len(names), 1)
    figure, axes = plt.subplots(figsize=(3 + 1.2 * len(subtasks), 4), layout="constrained")
    for i, name in enumerate(names):
        mine = [(row.subtask, row.ours) for row in report.rows if row.method == name and row.ours]
        at = [subtasks.index(subtask) + (i - (len(names) - 1) / 2) * width for subtask, _ in mine]
        speeds = [ours.speedup or 0.0 for _, ours in mine]
        cis = [ours.speedup_ci or (speed, speed) for speed, (_, ours) in zip(speeds, mine, strict=True)]
        error = [[max(v - low, 0.0) for v, (low, _) in zip(speeds, cis, strict=True)]]
        error += [[max(high - v, 0.0) for v, (_, high) in zip(speeds, cis, strict=True)]]
        axes.bar(at, speeds, width * 0.9, yerr=error, capsize=2, label=name)
    axes.axhline(1, color="black", linewidth=0.8, linestyle="--")
    axes.set_xticks(range(len(subtasks)), subtasks, fontsize=8)
    axes.set_ylabel(f"speed-up over {report.baseline}, total tokens / total time")
    axes.set_title(report.title, fontsize=8)
    if names:
        axes.legend(fontsize=7)
    part = file.with_name(f".{file.name}.part")
    figure.savefig(part, dpi=150, format="png")
    plt.close(figure)
    os.replace(part, file)


def write(report: Report, folder: Path) -> list[str]:
    """Write report.json, report.md and report.png, each whole or not at all; returns notes about what is missing."""
    replace_text(folder / "report.json", json.dumps(report.to_json(), indent=1, allow_nan=False) + "\n")
    replace_text(folder / "report.md", markdown(report))
    try:
        plot(report, folder / "report.png")
    except ImportError:
        return ["no report.png: matplotlib is missing, install it with `pip install 'specdec[bench]'`"]
    return []
