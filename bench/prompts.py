"""Prompts to measure on: embedded ones or a file's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from specdec import zoo
from specdec.errors import UsageError


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        id: unique in the run.
        text: what is tokenised.
        category: free; None when the source names none.
        where: how an error message points at it.
        reference: a right answer, for tasks that have one.
    """

    id: str
    text: str
    category: str | None
    where: str
    reference: str | None = None


def load_prompts(source: str, limit: int | None = None) -> list[Prompt]:
    """The prompts of ``source``, at most ``limit``.

    Args:
        source: "embedded"; "tasks", the embedded ones that have reference answers; a ``.jsonl`` file of objects with
            "prompt" (and optional "id", "category" and "reference"); or any other text file, one prompt per line. Blank
            lines are skipped.
        limit: take the first ones. Embedded prompts alternate between categories, so a few are already a mixture.

    Raises:
        UsageError: no such file, or the line that is malformed.
    """
    embedded = {"embedded": zoo.prompts, "tasks": zoo.tasks}
    prompts = _embedded(embedded[source]("tiny")) if source in embedded else _file(Path(source).expanduser())
    return prompts[:limit]


def encode(prompts: Sequence[Prompt], tokenizer: Any, model: PreTrainedModel, max_new_tokens: int) -> list[list[int]]:
    """Token ids of every prompt; raises UsageError for one that leaves no room for the answer."""
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    ids = []
    for prompt in prompts:
        tokens = tokenizer(prompt.text).input_ids
        if not tokens:
            raise UsageError(f"--prompts {prompt.where}: the tokenizer makes no token of it; give at least one word")
        if context is not None and len(tokens) + max_new_tokens > context:
            raise UsageError(
                f"--prompts {prompt.where}: {len(tokens)} tokens and --max-new-tokens {max_new_tokens} exceed the "
                f"model's context of {context}; shorten the prompt or lower --max-new-tokens"
            )
        ids.append(tokens)
    return ids


def _embedded(prompts: Sequence[zoo.Prompt]) -> list[Prompt]:
    by_category: dict[str, list[zoo.Prompt]] = {}
    for p in prompts:
        by_category.setdefault(p.category, []).append(p)
    longest = max(map(len, by_category.values()))
    turns = [group[i] for i in range(longest) for group in by_category.values() if i < len(group)]
    return [Prompt(p.id, p.prompt, p.category, f"embedded prompt {p.id}", p.reference) for p in turns]


def _file(file: Path) -> list[Prompt]:
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        line = file.read_bytes()[: error.start].count(b"\n") + 1
        raise UsageError(f"--prompts {file}:{line}: not UTF-8 text; save the file as UTF-8") from error
    except OSError as error:
        raise UsageError(
            f"--prompts {file}: {error.strerror or error}; give `embedded`, `tasks`, a .jsonl file or a text file of "
            "one prompt per line"
        ) from error
    parse = _json_prompt if file.suffix in (".jsonl", ".ndjson", ".json") else _line_prompt
    prompts = [parse(line, f"{file}:{i}", str(i)) for i, line in enumerate(lines, start=1) if line.strip()]
    if not prompts:
        raise UsageError(f"--prompts {file}: there is no prompt in it; write one per line")
    seen: dict[str, str] = {}
    for p in prompts:
        if p.id in seen:
            raise UsageError(f"--prompts {p.where}: id {p.id!r} was already used in {seen[p.id]}; ids must be unique")
        seen[p.id] = p.where
    return prompts


def _line_prompt(line: str, where: str, number: str) -> Prompt:
    return Prompt(number, line.rstrip("\r"), None, where)


def _json_prompt(line: str, where: str, number: str) -> Prompt:
    example = '{"prompt": "Once upon a time"}'
    try:
        entry: Any = json.loads(line)
    except ValueError as error:
        raise UsageError(f"--prompts {where}: not JSON ({error}); write one object per line, like {example}") from error
    if not isinstance(entry, dict):
        raise UsageError(f"--prompts {where}: a JSON {type(entry).__name__}, not an object; write {example}")
    text = entry.get("prompt")
    if not isinstance(text, str) or not text.strip():
        have = "is empty" if isinstance(text, str) else "is not text" if "prompt" in entry else "is missing"
        keys = ", ".join(map(str, entry)) or "none"
        raise UsageError(f'--prompts {where}: "prompt" {have} (keys: {keys}); write {example}')
    category, reference = entry.get("category"), entry.get("reference")
    if reference is not None and not isinstance(reference, str):
        raise UsageError(
            f'--prompts {where}: "reference" is not text; write the right answer as a string, or leave it out'
        )
    return Prompt(str(entry.get("id", number)), text, None if category is None else str(category), where, reference)
