"""Answer files in Spec-Bench's schema, and the folder in which a run keeps them.

    settings.json                what was asked, and the environment of every session that answered
    answers/METHOD.jsonl         one line per question, in the original's schema and nothing else
    details/METHOD.jsonl         our own: token ids, the state of learning drafters, ...
    answers/run-K/, details/run-K/   the second and later runs
    parts/rank-R/                the same of further processes, until the last one to finish merges them

A line is appended whole, details before answer, and counts once both are there; so a killed run loses at most the
question it was at, and goes on from there.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from textwrap import shorten
from typing import Any

from filelock import FileLock, Timeout

from specdec.bench.report import replace_text
from specdec.bench.spec_bench.questions import json_lines
from specdec.errors import UsageError

RECOMPILED = "graphs were compiled while it was timed"
ERROR = "ERROR"  # what the original writes in place of a text that could not be made


@dataclass(frozen=True)
class Answer:
    """One line of an answer file: a question's first choice.

    Attributes:
        turns: the text of each turn.
        decoding_steps, new_tokens: per turn; 0 steps where they are not known.
        wall_time: seconds per turn.
        accept_lengths: tokens committed per target step, bonus included, all turns in a row; [] where not known.
        tstamp: seconds since 1970.
    """

    question_id: int
    category: str
    answer_id: str
    model_id: str
    turns: list[str]
    decoding_steps: list[int]
    new_tokens: list[int]
    wall_time: list[float]
    accept_lengths: list[int]
    tstamp: float

    @property
    def failed(self) -> bool:
        return ERROR in self.turns

    def line(self) -> str:
        choice = {
            "index": 0,
            "turns": self.turns,
            "decoding_steps": self.decoding_steps,
            "new_tokens": self.new_tokens,
            "wall_time": self.wall_time,
            "accept_lengths": self.accept_lengths,
        }
        row = {
            "question_id": self.question_id,
            "category": self.category,
            "answer_id": self.answer_id,
            "model_id": self.model_id,
            "choices": [choice],
            "tstamp": self.tstamp,
        }
        return json.dumps(row, allow_nan=False) + "\n"


@dataclass(frozen=True)
class Detail:
    """What the original schema has no place for; lists have one entry per turn.

    Attributes:
        answer_id: of the answer it belongs to.
        session: number of the session in settings.json.
        lossless: what the method claims.
        state: one of ``bench.arms.STATES`` for methods that learn.
        ids: generated token ids, up to and including the end token.
        prompt_tokens: tokens of the prompt.
        limits: most new tokens that the context allowed.
        cut: tokens taken out of the middle of the prompt.
        forward_seconds: time in the target's forward; None where it cannot be told.
        compilation: what came of ``compile``; for hf-generate-compiled, whether it compiled again; else "".
        retokenised: the ids were made from a server's text.
        step_seconds: for each target forward that emitted, the time since the one before; for the first, since the
            call, which is the time to the first token. None for methods that do not tell; older runs have no list.
        remarks: what a server's row must say.
    """

    question_id: int
    answer_id: str
    session: int
    lossless: bool
    state: str | None
    ids: list[list[int]]
    prompt_tokens: list[int]
    limits: list[int]
    cut: list[int]
    forward_seconds: list[float | None]
    compilation: str
    retokenised: bool
    step_seconds: list[list[float] | None] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def line(self) -> str:
        return json.dumps(asdict(self), allow_nan=False) + "\n"


Answers = dict[int, Answer]  # by question id, ascending


def read_answers(file: Path, option: str = "FILE") -> Answers:
    """Any tool's answer file in the original schema; of several lines for a question the last counts.

    Raises:
        UsageError: no such file, nothing in it, or the line that is malformed.
    """
    found = {}
    for where, entry in json_lines(file.expanduser(), option):
        answer = _answer(entry, where)
        found[answer.question_id] = answer
    if not found:
        raise UsageError(f"{option} {file}: there is no answer in it")
    return dict(sorted(found.items()))


def _answer(entry: dict[str, Any], where: str) -> Answer:
    def need(source: dict[str, Any], key: str, fits: Any, what: str) -> Any:
        if key not in source:
            raise UsageError(f"{where}: {key} is missing (keys: {', '.join(source)})")
        if not fits(source[key]):
            raise UsageError(f"{where}: {key} must be {what}, not {shorten(repr(source[key]), 60)}")
        return source[key]

    def number(value: Any) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < float("inf")

    def numbers(value: Any) -> bool:
        return isinstance(value, list) and all(map(number, value))

    def texts(value: Any) -> bool:
        return isinstance(value, list) and all(isinstance(text, str) for text in value)

    question = need(entry, "question_id", lambda v: isinstance(v, int) and not isinstance(v, bool), "an integer")
    category = need(entry, "category", lambda v: isinstance(v, str), "text")
    choices = need(
        entry, "choices", lambda v: isinstance(v, list) and v and isinstance(v[0], dict), "a list of objects"
    )
    choice = choices[0]
    turns = need(choice, "turns", texts, "a list of texts")
    # older forks call it idxs; no figure needs it
    steps = need(choice, "decoding_steps", numbers, "a list of numbers") if "decoding_steps" in choice else []
    new_tokens = need(choice, "new_tokens", numbers, "a list of numbers")
    wall_time = need(choice, "wall_time", numbers, "a list of seconds")
    lengths = need(choice, "accept_lengths", numbers, "a list of numbers")
    if not len(turns) == len(new_tokens) == len(wall_time):
        raise UsageError(
            f"{where}: turns, new_tokens and wall_time have {len(turns)}, {len(new_tokens)} and {len(wall_time)} "
            "entries; each needs one per turn"
        )
    answer_id, model_id = str(entry.get("answer_id", "")), str(entry.get("model_id", ""))
    stamp = float(entry.get("tstamp", 0.0))
    return Answer(question, category, answer_id, model_id, turns, steps, new_tokens, wall_time, lengths, stamp)


class RunFolder:
    """The files of a run; several processes may answer into one folder at a time.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path):
        self.path = path
        self._settings = path / "settings.json"

    @staticmethod
    def name(method: str, run: int) -> str:
        """File of a method's answers (and details) in the ``run``-th run, which counts from 1."""
        return f"{method}.jsonl" if run == 1 else f"run-{run}/{method}.jsonl"

    def record(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The settings and the environments of the sessions; raises UsageError if there are none."""
        try:
            record = json.loads(self._settings.read_text(encoding="utf-8"))
            return record["settings"], record["sessions"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"{self.path}: no run of `specdec spec-bench run` (settings.json is missing or damaged); give the "
                "folder that was its --out"
            ) from error

    def pairs(self, name: str, roots: Sequence[Path] | None = None) -> dict[int, tuple[bytes, bytes]]:
        """Question id -> lines of answer and detail, from all processes or those of some roots, by id."""
        found = {}
        for root in self._roots() if roots is None else roots:
            details = {entry["answer_id"]: line for line, entry in _whole_lines(root / "details" / name)}
            for line, entry in _whole_lines(root / "answers" / name):
                if entry["answer_id"] in details:
                    found[int(entry["question_id"])] = line, details[entry["answer_id"]]
        return dict(sorted(found.items()))

    def read(self, name: str) -> tuple[Answers, dict[int, Detail]]:
        """Answers and details by question id, of all processes."""
        answers, details = {}, {}
        for question, (line, detail) in self.pairs(name).items():
            answers[question] = _answer(json.loads(line), f"{self.path}: {name}, question {question}")
            details[question] = Detail(**json.loads(detail))
        return answers, details

    @contextmanager
    def session(self, settings: dict[str, Any], environment: dict[str, Any], rank: int) -> Iterator[int]:
        """Answer into the folder as process ``rank``; yields the session's number.

        Raises:
            UsageError: the folder is of a run with other settings, or this process is already at it.
        """
        settings = json.loads(json.dumps(settings, default=str))  # paths among them
        with ExitStack() as held:
            with self._lock("run"):
                try:
                    held.enter_context(self._lock(f"rank-{rank}", timeout=0))
                except Timeout as error:
                    raise UsageError(
                        f"--out {self.path}: another run is writing into it; wait for it, or give another folder"
                    ) from error
                sessions = self._join(settings, environment)
                self._root(rank).mkdir(parents=True, exist_ok=True)  # from now on a merge waits for this process
                self._replace(self._root(rank), [self._root(rank)])  # drops what a killed session left half done
            yield sessions - 1

    def append(self, name: str, rank: int, answer: Answer, detail: Detail) -> None:
        """Keep one answer."""
        for kind, line in (("details", detail.line()), ("answers", answer.line())):
            file = self._root(rank) / kind / name
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("ab") as out:
                out.write(line.encode())

    def merge(self) -> bool:
        """Bring all parts together, sorted by question; False while a process is still answering."""
        with self._lock("run"), ExitStack() as held:
            roots = self._roots()
            try:
                for root in roots:
                    rank = 0 if root == self.path else int(root.name.removeprefix("rank-"))
                    held.enter_context(self._lock(f"rank-{rank}", timeout=0))
            except Timeout:
                return False
            self._replace(self.path, roots)
            for part in roots[1:]:
                shutil.rmtree(part)
        return True

    def _join(self, settings: dict[str, Any], environment: dict[str, Any]) -> int:
        """Write settings.json, or check that it is of the same settings; returns how many sessions there are."""
        sessions: list[dict[str, Any]] = []
        if self._settings.exists():
            before, sessions = self.record()
            changed = [
                f"{key} was {shorten(str(before.get(key)), 80)} and is {shorten(str(settings.get(key)), 80)}"
                for key in dict.fromkeys([*before, *settings])
                if before.get(key) != settings.get(key) and key != "runs"  # more runs of the same may follow
            ]
            if changed:
                raise UsageError(
                    f"--out {self.path} holds a run with other settings ({'; '.join(changed)}); give another folder"
                )
            settings = {**settings, "runs": max(settings["runs"], before["runs"])}
        elif any((self.path / "answers").glob("**/*.jsonl")):
            raise UsageError(f"--out {self.path}: it has answers but no settings.json; give another folder")
        sessions = [*sessions, environment]
        replace_text(self._settings, json.dumps({"settings": settings, "sessions": sessions}, indent=1) + "\n")
        return len(sessions)

    def _root(self, rank: int) -> Path:
        return self.path / "parts" / f"rank-{rank}" if rank else self.path

    def _roots(self) -> list[Path]:
        return [self.path, *sorted((self.path / "parts").glob("rank-*"))]

    def _lock(self, name: str, timeout: float = -1) -> FileLock:
        folder = self.path / ".locks"
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / name, timeout=timeout)

    def _replace(self, into: Path, roots: Sequence[Path]) -> None:
        """Write what ``roots`` hold together into ``into``, where that is not what stands there."""
        names = {str(f.relative_to(r / "answers")) for r in roots for f in (r / "answers").glob("**/*.jsonl")}
        for name in sorted(names):
            pairs = self.pairs(name, roots)
            for kind, which in (("details", 1), ("answers", 0)):
                file, content = into / kind / name, b"".join(pair[which] for pair in pairs.values())
                if not file.exists() or file.read_bytes() != content:
                    file.parent.mkdir(parents=True, exist_ok=True)
                    replace_text(file, content.decode())


def _whole_lines(file: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Lines that were written to their end, and what they say."""
    if not file.exists():
        return []
    content = file.read_bytes()
    lines = content[: content.rfind(b"\n") + 1].splitlines(keepends=True)
    try:
        return [(line, json.loads(line)) for line in lines]
    except ValueError as error:
        raise UsageError(f"{file}: a line in it is damaged ({error}); restore it or remove that line") from error
