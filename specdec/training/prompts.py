"""Prompts in the formats of training: held-out ones to measure on, and others whose answers are trained on."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from typing import Any

from specdec import zoo

from .data import Documents, leaked, overlaps, shingles
from .recipe import Recipe, RecipeError

EACH = 8  # held-out prompts a category
TASKS = 50  # held-out tasks with an answer, a category
USES = 3  # training prompts a document


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


def held_out_tasks(recipe: Recipe, documents: dict[str, Documents]) -> list[dict[str, Any]]:
    """50 problems and 50 translations with their reference answers, none of them in the training text.

    They are other documents than those of `held_out_prompts`; seeded by the recipe.
    """
    train = [text for source in documents.values() for text in source.train]
    shown = {row["prompt"] for row in held_out_prompts(recipe, documents)}
    rows = []
    for category, source, mark in (("math", "gsm8k", "\nAnswer:"), ("translation", "europarl", "\nEnglish:")):
        short = (text.split(mark, 1) for text in documents[source].held_out if len(text.split()) <= 200)
        pairs = [(prompt + mark, answer.strip()) for prompt, answer in short if prompt + mark not in shown]
        random.Random(f"{recipe.seed} tasks {category}").shuffle(pairs)
        known = set(leaked([prompt for prompt, _ in pairs], train))
        chosen = [(prompt, answer) for prompt, answer in pairs if prompt not in known][:TASKS]
        if len(chosen) < TASKS:
            raise RecipeError(f"source {source!r} holds out too little text for {TASKS} tasks of {category!r}")
        rows += [
            {
                "id": f"task-{category}-{n}",
                "category": category,
                "prompt": prompt,
                "source": source,
                "reference": answer,
            }
            for n, (prompt, answer) in enumerate(chosen, start=1)
        ]
    return rows


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


def training_prompts(recipe: Recipe, documents: dict[str, Documents], count: int) -> list[dict[str, Any]]:
    """Up to `count` prompts cut from training documents, for the target to answer (`specdec distill`).

    They come in the held-out prompts' categories and formats, and in "instructions". Categories are equally large as
    far as the documents go. A document is used once, or up to three times where its category is short of text:
    stories are cut at three lengths, continuations at three places, contexts asked three questions, and the others
    are repeated word for word. No prompt shares 12 words in a row with a shipped held-out prompt. Seeded by the recipe.

    Raises:
        RecipeError: none of the recipe's sources can be cut into prompts.
    """
    held_out = shingles(prompt.prompt for prompt in zoo.prompts("tiny"))
    pools: dict[str, list[tuple[str, str]]] = {}  # category -> (source, prompt), the documents' first uses first
    for category, sources in _TRAINING.items():
        cuts = [
            (name, cut(text)) for name, cut in sources.items() if name in documents for text in documents[name].train
        ]
        random.Random(f"{recipe.seed} {category}").shuffle(cuts)
        uses = [(name, prompts[use]) for use in range(USES) for name, prompts in cuts if use < len(prompts)]
        pools[category] = [(name, prompt) for name, prompt in uses if not overlaps(prompt, held_out, step=1, share=0)]
    if not any(pools.values()):
        raise RecipeError(f"recipe {recipe.name!r}: no source can be cut into prompts; name one of {_cut_sources()}")
    rows: list[dict[str, Any]] = []
    for i, category in enumerate(sorted(pools, key=lambda category: len(pools[category]))):
        share = (count - len(rows)) // (len(pools) - i)  # what smaller categories left is shared by the rest
        rows += [
            {"id": f"train-{category}-{n}", "category": category, "prompt": prompt, "source": source}
            for n, (source, prompt) in enumerate(pools[category][:share], start=1)
        ]
    random.Random(recipe.seed).shuffle(rows)
    return rows


def _cut_sources() -> list[str]:
    return sorted(name for sources in _TRAINING.values() for name in sources)


def _story_openings(text: str) -> list[str]:
    if not text.startswith(("Once", "One day")) or not 120 <= len(text.split()) <= 400:
        return []
    return [_opening(text, words) for words in (25, 50, 75)]


def _passages(text: str) -> list[str]:
    """Up to three passages in a row, each with as much text after it."""
    passages: list[str] = []
    while len(passages) < USES and len(text.split()) >= 800:
        passages.append(_opening(text, 330))
        text = text[len(passages[-1]) :].strip()
    return passages


def _questions(text: str) -> list[str]:
    """The context with one question at a time."""
    context, *pairs = text.split("\nQuestion: ")
    if len(context.split()) > 260:
        return []
    return [f"{context}\nQuestion: {pair}".split("\nAnswer:")[0] + "\nAnswer:" for pair in pairs[:USES]]


def _before(mark: str, most: int) -> Callable[[str], list[str]]:
    """Cuts a document of at most `most` words behind the first `mark`."""

    def cut(text: str) -> list[str]:
        return [text.split(mark)[0] + mark] * USES if len(text.split()) <= most else []

    return cut


_TRAINING: dict[str, dict[str, Callable[[str], list[str]]]] = {
    "stories": {"tinystories": _story_openings},
    "qa": {"fairytaleqa_questions": _questions},
    "math": {"gsm8k": _before("\nAnswer:", 200)},
    "code": {"mbpp": _before("\nPython:\n", 200)},
    "translation": {"europarl": _before("\nEnglish:", 200)},
    "continuation": {"fairytaleqa_stories": _passages, "childrens_classics": _passages},
    "instructions": {"instructions": _before("\nResponse:", 400), "seed_tasks": _before("\nResponse:", 400)},
}
