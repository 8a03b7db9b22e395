"""Questions: what is asked, in turns."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specdec.errors import UsageError

OVERALL = "overall"
MT_BENCH = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
SUBTASKS = {  # the protocol's columns and their short heads
    "mt_bench": "MT",
    "translation": "Trans",
    "summarization": "Sum",
    "qa": "QA",
    "math_reasoning": "Math",
    "rag": "RAG",
}
EXAMPLE = '{"question_id": 81, "category": "writing", "turns": ["Write a poem.", "Make it shorter."]}'


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        id: ``question_id``.
        category: as the file names it.
        turns: what the user says, turn by turn.
    """

    id: int
    category: str
    turns: tuple[str, ...]

    @property
    def subtask(self) -> str:
        return subtask(self.category)


def subtask(category: str) -> str:
    """The column a category is counted in: MT-Bench's eight are one, any other is its own."""
    return "mt_bench" if category in MT_BENCH else category


def columns(categories: Sequence[str]) -> list[str]:
    """Subtasks of some categories: the protocol's in its order, then others in theirs."""
    present = dict.fromkeys(map(subtask, categories))
    return [*(name for name in SUBTASKS if name in present), *(name for name in present if name not in SUBTASKS)]


def json_lines(file: Path, option: str) -> list[tuple[str, dict[str, Any]]]:
    """Where each object of a .jsonl file stands ("FILE:LINE"), and the object.

    Raises:
        UsageError: no such file, not UTF-8, or the line that is no JSON object.
    """
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise UsageError(f"{option} {file}: not UTF-8 text; save the file as UTF-8") from error
    except OSError as error:
        raise UsageError(f"{option} {file}: {error.strerror or error}; give a .jsonl file that can be read") from error
    found = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                entry = json.loads(line)
            except ValueError as error:
                raise UsageError(f"{option} {file}:{number}: not JSON ({error}); mend or remove this line") from error
            if not isinstance(entry, dict):
                raise UsageError(f"{option} {file}:{number}: a JSON {type(entry).__name__}, not an object")
            found.append((f"{option} {file}:{number}", entry))
    return found


def read_questions(file: Path) -> list[Question]:
    """The questions of a file in Spec-Bench's or MT-Bench's format, in its order.

    Raises:
        UsageError: no such file, no question in it, a malformed line, an id that comes twice.
    """
    questions: dict[int, Question] = {}
    for where, entry in json_lines(file.expanduser(), "--questions"):
        missing = [key for key in ("question_id", "category", "turns") if key not in entry]
        if missing:
            raise UsageError(f"{where}: {', '.join(missing)} missing (keys: {', '.join(entry)}); write {EXAMPLE}")
        number, category, turns = entry["question_id"], entry["category"], entry["turns"]
        if not isinstance(number, int) or isinstance(number, bool):
            raise UsageError(f"{where}: question_id {number!r} is not an integer; write {EXAMPLE}")
        if not isinstance(category, str) or not category or category == OVERALL:
            raise UsageError(f'{where}: category {category!r} must be a name other than "{OVERALL}"; write {EXAMPLE}')
        if not isinstance(turns, list) or not turns or not all(isinstance(t, str) and t.strip() for t in turns):
            raise UsageError(f"{where}: turns must be a list of texts, none of them empty; write {EXAMPLE}")
        if number in questions:
            raise UsageError(f"{where}: question_id {number} was used before; ids must be unique")
        questions[number] = Question(number, category, tuple(turns))
    if not questions:
        raise UsageError(f"--questions {file}: there is no question in it; write lines like {EXAMPLE}")
    return list(questions.values())


def select(questions: Sequence[Question], categories: Sequence[str], limit: int | None) -> list[Question]:
    """Questions of some categories or subtasks, the first ``limit`` of each subtask; all by default.

    Raises:
        UsageError: a category that no question has.
    """
    known = dict.fromkeys([*columns([q.category for q in questions]), *(q.category for q in questions)])
    for name in categories:
        if name not in known:
            raise UsageError(f"--categories {name!r}: no question has it; choose from {', '.join(known)}")
    chosen, count = [], dict.fromkeys(known, 0)
    for question in questions:
        if not categories or {question.category, question.subtask} & set(categories):
            count[question.subtask] += 1
            if limit is None or count[question.subtask] <= limit:
                chosen.append(question)
    return chosen
