"""The prompts that ship with a zoo model: held-out text, in the formats of training."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from typing import Any

from .data import Documents, leaked
from .recipe import Recipe, RecipeError

EACH = 8  # prompts a category


def held_out_prompts(recipe: Recipe, documents: dict[str, Documents]) -> list[dict[str, Any]]:
    """8 prompts in each of 6 categories, none of them in the training text; seeded by the recipe."""
    train = [text for source in documents.values() for text in source.train]
    rows = []
    for category, source, candidates in _candidates(documents):
        pool = list(candidates)
        random.Random(f"{recipe.seed} {category} {source}").shuffle(pool)
        count = {"fairytaleqa_stories": 5, "childrens_classics": 3}.get(source, EACH)
        pool = pool[: 2 * count]
        known = set(leaked(pool, train))
        chosen = [prompt for prompt in pool if prompt not in known][:count]
        if len(chosen) < count:
            raise RecipeError(f"source {source!r} holds out too little text for {count} prompts of {category!r}")
        rows += [{"category": category, "prompt": prompt, "source": source} for prompt in chosen]
    numbers: dict[str, int] = {}
    for row in rows:
        numbers[row["category"]] = numbers.get(row["category"], 0) + 1
        row["id"] = f"{row['category']}-{numbers[row['category']]}"
    return [{key: row[key] for key in ("id", "category", "prompt", "source")} for row in rows]


def _candidates(documents: dict[str, Documents]) -> Iterator[tuple[str, str, Iterator[str]]]:
    """(category, source, prompts); long enough to say something, short enough to leave room for an answer."""

    def held(source: str, low: int, high: int) -> Iterator[str]:
        return (text for text in documents[source].held_out if low <= len(text.split()) <= high)

    openings = (_opening(text, 25) for text in held("tinystories", 120, 400) if text.startswith(("Once", "One day")))
    yield "stories", "tinystories", openings
    questions = (text.split("\nAnswer:")[0] + "\nAnswer:" for text in held("fairytaleqa_questions", 90, 260))
    yield "qa", "fairytaleqa_questions", questions
    yield "math", "gsm8k", (text.split("\nAnswer:")[0] + "\nAnswer:" for text in held("gsm8k", 40, 200))
    tasks = (text.split("Python:\n")[0] + "Python:\n" for text in held("mbpp", 20, 120))
    yield "code", "mbpp", (task for task in tasks if len(task.split()) >= 14)
    german = (text.split("\nEnglish:")[0] + "\nEnglish:" for text in held("europarl", 36, 90))
    yield "translation", "europarl", german
    for source in ("fairytaleqa_stories", "childrens_classics"):
        yield "continuation", source, (_opening(text, 330) for text in held(source, 800, 9999))


def _opening(text: str, words: int) -> str:
    """The first sentences of `text`, at least `words` words of them."""
    end = 0
    for match in re.finditer(r"[.!?][\"'”]?(?=\s)", text):
        end = match.end()
        if len(text[:end].split()) >= words:
            break
    return text[:end]
