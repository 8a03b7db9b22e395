"""The page shows what was measured, says what it lacks, and holds in a real browser."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import typer
from tiny_models import tiny_llama
from typer.testing import CliRunner

from specdec import Decoder, zoo
from specdec.bench import pareto, report
from specdec.bench.arms import DecoderArm, Settings
from specdec.bench.baselines import BASELINES, REFERENCE, baseline
from specdec.bench.certificate import Certificate, Section
from specdec.bench.environment import environment
from specdec.bench.harness import Harness, grouped
from specdec.bench.page import browser
from specdec.bench.page.discover import discover
from specdec.bench.page.parts import Section as Part
from specdec.bench.page.render import write
from specdec.bench.quality import Score
from specdec.bench.spec_bench.report import from_files
from specdec.bench.statistics import Record, summarise
from specdec.cli import Commands
from specdec.cli.report import report as command
from specdec.errors import UsageError
from specdec.profile import Profile
from specdec.stats import PHASES

RESULTS = Path(__file__).resolve().parents[1] / "bench" / "results"
ENVIRONMENT = {"command": "specdec x", "date": "2026-01-02T03:04:05+00:00", "cpu": "a machine", "gpu": None}
NASTY = "<script>alert('x')</script>$|"

app = typer.Typer(cls=Commands, pretty_exceptions_enable=False)
app.command("report")(command)
app.callback()(lambda: None)


def cli(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


def saved(file: Path, content: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return file


def settings(**changes: Any) -> dict[str, Any]:
    fixed: dict[str, Any] = {
        "model": "m",
        "prompts": "p.jsonl",
        "max_new_tokens": 8,
        "temperatures": [0.0],
        "batch_size": 1,
    }
    fixed["drafters"] = dict.fromkeys(("none", "suffix", "fast"))
    return {**fixed, "repeats": 1, "compile": "off", "state": "cold", **changes}


def bench_of(records: list[Record], folder: Path, notes: tuple[str, ...] = (), **changes: Any) -> Path:
    """A folder as `specdec bench --out` writes it."""
    arms = list(dict.fromkeys(r.arm for r in records))
    rows = summarise(records, dict.fromkeys(arms, True), dict.fromkeys(arms), 1, REFERENCE)
    where = {**ENVIRONMENT, "packages": {"torch": "2"}, "torch_threads": 1, "dtype": "float32"}
    folder.mkdir(parents=True)
    report.write(report.Report(rows, where, settings(**changes), list(notes)), records, folder)
    return folder


def by_hand(other: str = "fast", differ: bool = False, text: tuple[int, ...] = (1, 2, 3, 4)) -> list[Record]:
    """The method is twice as fast on prompts a and b, as fast as the reference on c and d."""
    records = []
    for group, prompt in enumerate("abcd"):
        texts = {REFERENCE: [*text], other: [*text[:-1], 9] if differ and prompt == "d" else [*text]}
        for arm, ids in texts.items():
            seconds = 1.0 if arm == other and prompt in "ab" else 2.0
            told = ([2, 0], dict.fromkeys(PHASES, 0.125)) if arm == other else (None, None)
            records.append(Record(arm, 0.0, group, (prompt,), 0, seconds, 2, 0.5, [ids], *told))
    return records


def cells(section: Part, caption: str) -> dict[str, list[str]]:
    """Rows of the table whose caption begins so, by their first cell."""
    (table,) = [t for t in section.tables if t.caption.startswith(caption)]
    return {row[0]: list(row[1:]) for row in table.rows}


def made(folder: Path, out: Path | None = None) -> tuple[str, str]:
    """HTML and Markdown of a folder."""
    out = out or folder / "report"
    sections, unknown = discover(folder, out)
    out.mkdir(parents=True, exist_ok=True)
    written = write(sections, unknown, folder.name, out, lambda *_: None)
    assert all(file.stat().st_size for file in written)
    assert not list(out.glob(".*"))  # nothing half written
    return written[0].read_text(encoding="utf-8"), written[1].read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Record]]:
    """A real bench of seconds, under the embedded prompts' names."""
    model = tiny_llama()
    prompts = [p for p in zoo.prompts("tiny") if p.category in ("stories", "math")]
    groups = grouped([p.id for p in prompts], [[5 + i, 6, 7, 5 + i, 6] for i in range(len(prompts))], 1)
    arms = [baseline(name, model) for name in BASELINES if name == REFERENCE]
    arms += [DecoderArm(name, Decoder(model, name)) for name in ("none", "suffix")]
    asked = [Settings(6, 0.0), Settings(6, 1.0)]
    records = Harness(model).run(arms, groups, asked).records
    lossless, states = {a.name: a.lossless for a in arms}, {a.name: a.state for a in arms}
    rows = summarise(records, lossless, states, 1, REFERENCE)
    folder = tmp_path_factory.mktemp("measured")
    what = settings(prompts="embedded", temperatures=[0.0, 1.0])
    report.write(report.Report(rows, environment(model, "tiny"), what), records, folder)
    return folder, records


# ---- a bench --------------------------------------------------------------------------------------------------------


def test_records_tell_what_steps_accepted_and_where_time_went(measured: tuple[Path, list[Record]]):
    for record in measured[1]:
        if record.arm == REFERENCE:
            assert record.accepted is None
            assert record.phases is None
        else:
            assert record.accepted is not None
            assert len(record.accepted) == record.forwards
            assert sum(record.accepted) + record.forwards >= record.tokens  # the target adds at most one a forward
            assert 0 < sum((record.phases or {}).values()) <= record.seconds
    assert Record.from_json(json.loads(json.dumps(measured[1][-1].to_json()))) == measured[1][-1]


def test_a_real_bench_is_shown_with_categories_positions_and_phases(measured: tuple[Path, list[Record]]):
    (section,), _ = discover(measured[0], measured[0] / "report")
    kinds = ("m, greedy", "Speed-up over hf-generate by category", "Time per phase")
    assert all(any(t.caption.startswith(kind) for t in section.tables) for kind in kinds)
    assert set(cells(section, "Speed-up over hf-generate by category, with 95 % intervals, temp")) == {"none", "suffix"}
    assert not any("by category" in line for line in section.missing)
    html, markdown = made(measured[0])
    assert html.count("<figure>") == html.count("<svg") == len(section.pictures) == markdown.count("![")
    for stem in re.findall(r"!\[.*?\]\((.*?)\.png\)", markdown):
        assert (measured[0] / "report" / f"{stem}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (measured[0] / "report" / f"{stem}.svg").read_text(encoding="utf-8")


def test_figures_by_category_position_and_phase_are_those_of_the_records(tmp_path: Path):
    categories = {"a": "one", "b": "one", "c": "two", "d": "two"}
    bench_of(by_hand(), tmp_path / "run", categories=categories)
    (section,), _ = discover(tmp_path, tmp_path / "report")
    assert cells(section, "Speed-up over hf-generate by") == {"fast": ["2.00 [2.00, 2.00]", "1.00 [1.00, 1.00]"]}
    assert cells(section, "Acceptance by position") == {"fast": ["50%", "50%"]}
    phases = cells(section, "Time per phase")  # 16 tokens in 6 s, of which six phases took 0.5 s each; and in 8 s
    assert phases["fast"] == ["31.250"] * 6 + ["187.500", "375.000"]
    assert phases[REFERENCE] == ["125.000", *["-"] * 5, "375.000", "500.000"]
    assert section.finding == "greedy: fastest lossless fast 1.33 [1.00, 2.00]"


def test_texts_that_differ_are_named_by_prompt_and_token(tmp_path: Path):
    bench_of(by_hand(differ=True), tmp_path / "run")
    (section,), _ = discover(tmp_path, tmp_path / "report")
    assert cells(section, "Greedy texts of lossless") == {"fast": ["d", "3"]}


def test_what_a_source_lacks_is_said_in_a_line(tmp_path: Path):
    records = [Record(**{**vars(r), "accepted": None, "phases": None}) for r in by_hand()]
    bench_of(records, tmp_path / "old")
    (section,), _ = discover(tmp_path, tmp_path / "report")
    assert [line.partition(",")[0].partition(":")[0] for line in section.missing] == [
        "acceptance by position", "time per phase", "by category"
    ]  # fmt: skip
    (tmp_path / "old" / "records.jsonl").unlink()
    html, markdown = made(tmp_path)
    assert "there is no records.jsonl" in html
    assert "there is no records.jsonl" in markdown


def test_records_of_another_run_are_not_mixed_in(tmp_path: Path):
    folder, other = bench_of(by_hand(), tmp_path / "run"), bench_of(by_hand(other="slow"), tmp_path / "other")
    shutil.copy(other / "records.jsonl", folder)
    shutil.rmtree(other)
    (section,), _ = discover(tmp_path, tmp_path / "report")
    assert "another run" in section.missing[0]
    assert len(section.tables) == 1


def test_every_note_is_on_the_page(tmp_path: Path):
    folder = bench_of(
        by_hand(text=(1,) * 12),
        tmp_path / "run",
        ("a grown model", "left out: x"),
        categories=dict.fromkeys("abcd", "c"),
    )
    file = folder / "results.json"
    saved(file, {**json.loads(file.read_text()), "partial": True})
    html, markdown = made(tmp_path)
    for note in ("a grown model", "left out: x", "the run was cut off", "c, greedy: the model"):
        assert note in html
        assert note in markdown
    assert "fewer than ten prompts" in html


def test_folders_of_earlier_versions_are_shown(tmp_path: Path):
    for name in ("cold-0/results.json", "online/online.json", "pareto-1/pareto.json"):
        (tmp_path / name).parent.mkdir()
        shutil.copy(RESULTS / name, tmp_path / name)
    sections, unknown = discover(tmp_path, tmp_path / "report")
    assert [s.kind for s in sections] == ["bench", "bench-online", "pareto"]
    assert not unknown
    assert any("no records.jsonl" in line for line in sections[0].missing)


# ---- every other kind -----------------------------------------------------------------------------------------------


def answers(file: Path, seconds: float, lengths: list[int]) -> Path:
    choice = {"index": 0, "turns": ["t"], "new_tokens": [6], "wall_time": [seconds], "accept_lengths": lengths}
    rows = [{"question_id": q, "category": "qa", "choices": [choice]} for q in (1, 2)]
    return saved(file, "".join(json.dumps(row) + "\n" for row in rows))


def test_spec_bench_certificate_profile_pareto_doctor_and_head_are_shown(tmp_path: Path):
    slow, fast = answers(tmp_path / "slow.jsonl", 2.0, [1] * 6), answers(tmp_path / "fast.jsonl", 1.0, [3, 2, 1])
    saved(tmp_path / "a" / "report.json", from_files([slow, fast], slow, None).to_json())
    found = [Section("greedy", "passed", "all equal"), Section("law", "failed", "far off")]
    (tmp_path / "b").mkdir()
    Certificate("m with suffix", found, {**ENVIRONMENT, "grown": "m is a grown model"}).write(tmp_path / "b")
    finalist = {"setting": "suffix size=8", "predicted": 1.5, "measured": 1.4, "interval": [1.2, 1.6], "mat": 2.0}
    evidence = {
        "finalists": [{**finalist, "setting": REFERENCE, "measured": 1.0}, finalist],
        "all predicted over none": {"suffix size=8, off": 1.5},
        "curve": {"off": [[1, 2, 4], [0.01, 0.012, 0.02]]},
        "settings": {"model": "m", "prompt_count": 4},
        "environment": ENVIRONMENT,
    }
    Profile("suffix", {"size": 8}, "off", {}, evidence).write(tmp_path / "c" / "profile.json")
    row = summarise(by_hand(), {REFERENCE: True, "fast": False}, {REFERENCE: None, "fast": None}, 1, REFERENCE)[1]
    point = pareto.Point("rollback.threshold", 3, row, {"log p": Score(-1.0, (-1.1, -0.9), -0.1, (-0.2, 0.0))})
    asked = {"model": "m", "temperature": 0.0, "prompt_count": 4, "curves": {"rollback.threshold": {}}}
    saved(tmp_path / "d" / "pareto.json", {"points": [point.to_json()], "scores": {"log p": "x"}, "settings": asked,
                                           "environment": ENVIRONMENT, "notes": ["a note"]})  # fmt: skip
    curve = [{"columns": n, "seconds": s, "ratio": s / 0.01} for n, s in ((1, 0.01), (8, 0.015))]
    saved(tmp_path / "e.json", {"model": "m", "tier": "tree", "reason": "it can", "prefix": 256, "rounds": 3,
                                "curve": curve, "environment": ENVIRONMENT})  # fmt: skip
    saved(tmp_path / "f" / "config.json", {"specdec_method": "medusa", "target_id": "m", "acceptance": [[0.5, 0.25]]})
    saved(
        tmp_path / "g" / "settings.json", {"settings": {"model": "m", "question_ids": [1]}, "sessions": [ENVIRONMENT]}
    )
    saved(tmp_path / "h" / "tables.json", {"rows": [], "environment": ENVIRONMENT})
    saved(tmp_path / "i" / "package.json", {"name": "no business of ours"})
    sections, unknown = discover(tmp_path, tmp_path / "report")
    spec, proof, tuned, lossy, cost, head, unfinished = sections
    assert [s.kind for s in sections] == ["spec-bench", "verify", "tune", "pareto", "doctor", "train", "spec-bench"]
    assert unknown == ["h/tables.json"]
    assert cells(spec, "Spec-Bench's own")["fast"][0] == "2.00"
    assert cells(spec, "Acceptance by position")["fast"] == ["67%", "33%"]
    assert proof.failed
    assert proof.finding == "FAILED: law"
    assert "m is a grown model" in proof.notes
    assert cells(tuned, "Finalists")["suffix size=8"] == ["1.50", "1.40 [1.20, 1.60]", "2.00"]
    assert cells(tuned, "What a step")["off"] == ["4", "20.00", "2.00"]  # the last of its rows
    assert lossy.notes == ["a note"]
    assert cells(cost, "What a step")["after 256 tokens"] == ["8", "15.00", "1.50"]
    assert cells(head, "Acceptance by depth") == {"1": ["50.0%", "25.0%", "75.0%"]}
    assert "specdec spec-bench report" in unfinished.missing[0]
    html, markdown = made(tmp_path)
    assert "FAILED: law" in html
    assert "far off" in markdown
    assert "h/tables.json" in html


def test_a_run_that_went_on_after_its_report_is_pointed_out(tmp_path: Path):
    slow, fast = answers(tmp_path / "slow.jsonl", 2.0, [1] * 6), answers(tmp_path / "fast.jsonl", 1.0, [3, 2, 1])
    shown = from_files([slow, fast], slow, None).to_json()
    more = {"settings": {"model": "m", "methods": ["slow", "fast"]}, "sessions": [ENVIRONMENT]}
    saved(tmp_path / "run" / "report.json", {**shown, **more})
    saved(tmp_path / "run" / "settings.json", more)
    lines = "".join(json.dumps({"question_id": q, "answer_id": str(q)}) + "\n" for q in range(3))
    for kind in ("answers", "details"):
        for method in ("slow", "fast"):
            saved(tmp_path / "run" / kind / f"{method}.jsonl", lines)
    (section,), _ = discover(tmp_path, tmp_path / "report")
    assert "of 2 questions, the folder holds 3" in section.notes[-1]


# ---- the page -------------------------------------------------------------------------------------------------------


class Reader(HTMLParser):
    """Tags with what they refer to; fails on tags that do not close in order."""

    VOID = ("meta", "br", "link", "img")

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_names_are_text_wherever_they_stand(tmp_path: Path):
    records = [Record(**{**vars(r), "prompts": (r.prompts[0] + NASTY,)}) for r in by_hand(NASTY, differ=True)]
    bench_of(records, tmp_path / "run", notes=(NASTY,), categories={f"{p}{NASTY}": f"c{NASTY}" for p in "abcd"})
    html, markdown = made(tmp_path)
    assert html.count("alert(") > 10
    assert not [tag for tag, _ in Reader(html).tags if tag == "script"]
    assert "<script" not in html
    assert "<script" not in markdown.replace("\\<", "")
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)\|", line)) == len(re.findall(r"(?<!\\)\|", rows[0])) for line in rows[:4])


def test_the_page_needs_nothing_but_itself_and_is_readable_without_eyes(measured: tuple[Path, list[Record]]):
    tags = Reader(made(measured[0])[0]).tags
    refers = [v for _, given in tags for k, v in given.items() if k in ("src", "href", "xlink:href", "action", "data")]
    ids = [given["id"] for _, given in tags if "id" in given]
    assert refers
    assert all((target or "").startswith("#") and (target or "")[1:] in ids for target in refers)
    assert len(set(ids)) == len(ids)
    assert sum(tag == "caption" for tag, _ in tags) == sum(tag == "table" for tag, _ in tags)
    assert all(given.get("scope") for tag, given in tags if tag == "th")
    assert all((given.get("aria-label") or "").count(" ") > 5 for _, given in tags if given.get("role") == "img")


def test_the_same_input_makes_the_same_bytes(measured: tuple[Path, list[Record]], tmp_path: Path):
    for out in ("one", "two"):
        made(measured[0], tmp_path / out)
    first = {file.name: file.read_bytes() for file in (tmp_path / "one").iterdir()}
    assert first == {file.name: file.read_bytes() for file in (tmp_path / "two").iterdir()}


# ---- mistakes -------------------------------------------------------------------------------------------------------


def test_nothing_to_show_names_the_folder_and_what_makes_results(tmp_path: Path):
    saved(tmp_path / "settings.json", {"editor": "vi"})
    result = cli(tmp_path)
    assert result.exit_code == 2
    assert str(tmp_path) in result.stderr
    assert "specdec bench --out" in result.stderr
    assert not (tmp_path / "report").exists()
    assert "no such folder" in cli(tmp_path / "missing").stderr


@pytest.mark.parametrize(
    ("name", "damage", "says"),
    [
        ("results.json", lambda text: text[:-20], "no readable JSON"),
        ("results.json", lambda text: text.replace('"speedup_ci"', '"other"'), "not what `specdec bench` writes"),
        ("records.jsonl", lambda text: text.replace('"arm"', '"arms"', 1), "records.jsonl:1: not a record"),
        ("records.jsonl", lambda text: text + '{"arm": ', "records.jsonl:9: not a record"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, damage: Any, says: str):
    file = bench_of(by_hand(), tmp_path / "run") / name
    file.write_text(damage(file.read_text()))
    with pytest.raises(UsageError, match=re.escape(says)) as error:
        discover(tmp_path, tmp_path / "report")
    assert str(file) in str(error.value)


def test_the_command_writes_the_page_beside_the_results(tmp_path: Path):
    bench_of(by_hand(), tmp_path / "run")
    for _ in range(2):  # the second time the first one's report is there
        result = cli(tmp_path)
        assert result.exit_code == 0, result.output
    assert result.stdout == f"{tmp_path / 'report' / 'report.html'}\n"


def test_a_missing_library_or_browser_is_one_line_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    bench_of(by_hand(), tmp_path / "run")
    monkeypatch.setattr(browser, "BROWSERS", ("no-such-browser",))
    result = cli(tmp_path, "--check")
    assert result.exit_code == 2
    assert "apt install chromium" in result.stderr
    assert (tmp_path / "report" / "report.html").exists()  # the page is there all the same
    monkeypatch.delitem(__import__("sys").modules, "specdec.bench.page.render")
    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)
    assert "pip install 'specdec[bench]'" in cli(tmp_path).stderr


# ---- a real browser -------------------------------------------------------------------------------------------------

needs_browser = pytest.mark.skipif(browser.find() is None, reason="no Chromium or Chrome on the PATH")


@needs_browser
def test_a_real_browser_finds_everything_in_place(tmp_path: Path):
    bench_of(by_hand(differ=True), tmp_path / "run", categories=dict.fromkeys("abcd", "c"))
    result = cli(tmp_path, "--check")
    assert result.exit_code == 0, result.output
    for name in browser.WIDTHS:
        assert (tmp_path / "report" / name).stat().st_size > 10_000
    assert not list((tmp_path / "report").glob(".*"))


@needs_browser
def test_a_real_browser_sees_what_is_missing_asked_for_or_too_wide(tmp_path: Path):
    table = "<table><tr><td>x</td></tr></table>"
    hidden = f'<div style="display: none">{table}</div><figure><svg width="9" height="0"></svg></figure>'
    wide = '<div style="width: 3000px">wide</div><img src="missing.png"><script>console.error("broken")</script>'
    page = saved(tmp_path / "report.html", f"<html><head></head><body>{table}{hidden}{wide}</body></html>")
    problems, _ = browser.check(page)
    for said in ("1 tables have no size", "1 drawings have no size", "missing.png", "sideways", "broken"):
        assert any(said in problem for problem in problems), said
