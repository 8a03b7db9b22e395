"""From shared files to packed blocks: readers with fixed text formats, held-out splits, the mixture."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .recipe import Packing, Recipe, RecipeError, Source

END = "<|endoftext|>"


@dataclass(frozen=True)
class Documents:
    """The documents of one source, as plain text in the format the model sees."""

    train: list[str]
    held_out: list[str]


# --- formats: the only places where a task is turned into text -------------------------------------------------


def question_text(question: str, answer: str = "") -> str:
    return f"Question: {question.strip()}\nAnswer: {answer.strip()}".rstrip(" ")


def context_text(context: str, pairs: list[tuple[str, str]]) -> str:
    return "\n".join([f"Context: {context.strip()}"] + [question_text(q, a) for q, a in pairs])


def code_text(task: str, code: str = "") -> str:
    """Lines end in LF, tabs are four spaces: the files mix both, and a tiny model should see one."""
    code = "\n".join(line.rstrip() for line in code.replace("\r", "").expandtabs(4).split("\n")).strip("\n")
    return f"Task: {task.strip()}\nPython:\n{code}"


def translation_text(german: str, english: str = "") -> str:
    return f"German: {german.strip()}\nEnglish: {english.strip()}".rstrip(" ")


def instruction_text(instruction: str, given: str, response: str = "") -> str:
    lines = [f"Instruction: {instruction.strip()}"]
    if given.strip():
        lines.append(f"Input: {given.strip()}")
    return "\n".join([*lines, f"Response: {response.strip()}"]).rstrip(" ")


# --- readers: files -> documents -------------------------------------------------------------------------------


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _marked(path: Path) -> list[str]:
    """Documents of a text file in which each ends with a line `<|endoftext|>`."""
    return [part.strip() for part in path.read_text(encoding="utf-8").split(END) if part.strip()]


def _unwrap(text: str) -> str:
    """Join lines that were broken inside a sentence; some tales come hard-wrapped, a few with CR line ends."""
    return re.sub(r"(?<=[A-Za-z,;-])\n(?=[A-Za-z\"'])", " ", text.replace("\r", "\n"))


def _last(documents: list[str], held_out: int) -> Documents:
    cut = len(documents) - held_out
    return Documents(documents[:cut], documents[cut:])


def read_stories(paths: list[Path], source: Source) -> Documents:
    train = [story for path in paths for story in _marked(path)]
    assert source.held_out_file is not None
    data = paths[0].parents[len(Path(source.files[0]).parts) - 1]
    return Documents(train, _marked(data / source.held_out_file))


def read_fairytales(paths: list[Path], source: Source) -> Documents:
    rows = _lines(paths[0])
    text: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for row in rows:
        text[row["split"]].append(_unwrap("\n".join(row["sections"])))
    return Documents(text["train"], text["test"])


def read_classics(paths: list[Path], source: Source) -> Documents:
    """Whole books stay in order; every k-th document is held out. Tales that FairytaleQA holds too are dropped."""
    documents = _marked(paths[0])
    tales = [" ".join(row["sections"]) for row in _lines(paths[0].parent / "fairytaleqa_stories.jsonl")]
    seen = shingles(tales)
    documents = [document for document in documents if not overlaps(document, seen)]
    step = max(1, len(documents) // max(1, source.held_out))
    held_out = documents[step // 2 :: step] if source.held_out else []
    kept = set(held_out)
    return Documents([document for document in documents if document not in kept], held_out)


def read_context_questions(paths: list[Path], source: Source) -> Documents:
    """One document a question's sections, with all questions asked about them."""
    stories = {row["name"]: row["sections"] for row in _lines(paths[1])}
    groups: dict[tuple[str, str, tuple[int, ...]], list[tuple[str, str]]] = {}
    for row in _lines(paths[0]):
        key = (row["split"], row["name"], tuple(row["sections"]))
        groups.setdefault(key, []).append((row["question"], row["answer"]))
    text: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for (split, name, sections), pairs in groups.items():
        context = "\n".join(stories[name][i - 1] for i in sections if i <= len(stories[name]))
        text[split].append(context_text(_unwrap(context), pairs))
    return Documents(text["train"], text["test"])


def read_math(paths: list[Path], source: Source) -> Documents:
    """Grade-school problems; the `<<1+1=2>>` calculator marks go, the `#### 2` at the end stays."""
    rows = _lines(paths[0])
    return _last([question_text(r["question"], re.sub(r"<<.*?>>", "", r["answer"])) for r in rows], source.held_out)


def read_code(paths: list[Path], source: Source) -> Documents:
    """MBPP's own split: tasks 601-974 are train, 511-600 validation; the test tasks are not read at all."""
    rows = _lines(paths[0])
    train = [code_text(row["text"], row["code"]) for row in rows if row["task_id"] > 600]
    return Documents(train, [code_text(row["text"], row["code"]) for row in rows if 510 < row["task_id"] <= 600])


def read_translation(paths: list[Path], source: Source) -> Documents:
    pairs = [row["translation"] for row in _lines(paths[0])]
    return _last([translation_text(pair["de"], pair["en"]) for pair in pairs], source.held_out)


def read_instructions(paths: list[Path], source: Source) -> Documents:
    rows = json.loads(paths[0].read_text(encoding="utf-8"))
    return _last([instruction_text(r["instruction"], r["input"], r["output"]) for r in rows], source.held_out)


def read_seed_tasks(paths: list[Path], source: Source) -> Documents:
    text = [
        instruction_text(row["instruction"], instance["input"], instance["output"])
        for row in _lines(paths[0])
        for instance in row["instances"]
    ]
    return _last(text, source.held_out)


READERS: dict[str, Callable[[list[Path], Source], Documents]] = {
    "stories": read_stories,
    "fairytales": read_fairytales,
    "classics": read_classics,
    "context_questions": read_context_questions,
    "math": read_math,
    "code": read_code,
    "translation": read_translation,
    "instructions": read_instructions,
    "seed_tasks": read_seed_tasks,
}


def read_sources(recipe: Recipe, data: Path) -> dict[str, Documents]:
    """Every source's documents, after checking that each file the recipe names is there."""
    if not data.is_dir():
        raise RecipeError(f"--data {str(data)!r} is not a directory: give the folder that holds {_folders(recipe)}")
    for source in recipe.sources:
        for file in [*source.files, *([source.held_out_file] if source.held_out_file else [])]:
            if not (data / file).is_file():
                raise RecipeError(
                    f"--data {str(data)!r} lacks {file!r} (source {source.name!r}): "
                    "add the file or take the source out of the recipe"
                )
        if source.reader not in READERS:
            raise RecipeError(f"source {source.name!r}: reader {source.reader!r} is not one of {sorted(READERS)}")
    return {s.name: READERS[s.reader]([data / file for file in s.files], s) for s in recipe.sources}


def _folders(recipe: Recipe) -> str:
    return ", ".join(sorted({source.files[0].split("/")[0] + "/" for source in recipe.sources}))


# --- leakage ---------------------------------------------------------------------------------------------------

SHINGLE = 12  # words: long enough that plain English hardly repeats one by chance


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def shingles(texts: Iterable[str]) -> set[int]:
    """Hashes of every run of 12 words in `texts`."""
    found: set[int] = set()
    for text in texts:
        words = _words(text)
        found.update(hash(tuple(words[i : i + SHINGLE])) for i in range(len(words) - SHINGLE + 1))
    return found


def overlaps(text: str, seen: set[int], step: int = 5, share: float = 0.02) -> bool:
    """Whether more than `share` of the sampled 12-word runs of `text` are in `seen`."""
    words = _words(text)
    starts = range(0, len(words) - SHINGLE + 1, step)
    hits = sum(hash(tuple(words[i : i + SHINGLE])) in seen for i in starts)
    return hits > share * len(starts)


def leaked(prompts: Sequence[str], documents: Iterable[str]) -> list[str]:
    """The prompts that training `documents` hold: word for word, or half of their 12-word runs."""
    runs = [shingles([prompt]) for prompt in prompts]
    wanted: set[int] = set().union(*runs)
    found: set[int] = set()
    words = [" ".join(_words(prompt)) for prompt in prompts]
    bad: set[int] = set()
    for document in documents:
        tokens = _words(document)
        hits = {hash(tuple(tokens[i : i + SHINGLE])) for i in range(len(tokens) - SHINGLE + 1)} & wanted
        found |= hits
        # A prompt is over 12 words long, so one that is contained has given a hit already.
        if hits:
            text = " ".join(tokens)
            bad.update(i for i, w in enumerate(words) if runs[i] & hits and w in text)
    bad.update(i for i, run in enumerate(runs) if len(run & found) > 0.5 * len(run))
    return [prompts[i] for i in sorted(bad)]


# --- mixture and packing ---------------------------------------------------------------------------------------


def mixture(recipe: Recipe, documents: dict[str, Documents]) -> list[str]:
    """All training documents, each as often as its source's `repeats` says, in one seeded order."""
    rng = random.Random(recipe.seed)
    mixed: list[str] = []
    for source in recipe.sources:
        train = documents[source.name].train
        passes = int(source.repeats)
        mixed += train * passes
        mixed += rng.sample(train, round((source.repeats - passes) * len(train)))
    rng.shuffle(mixed)
    return mixed


def pack(ids: Iterable[list[int]], block: int) -> np.ndarray:
    """Concatenate documents (each with its bos and eos) and cut: [N, block] uint16, the remainder dropped."""
    flat = np.fromiter((token for document in ids for token in document), dtype=np.uint16)
    return flat[: len(flat) // block * block].reshape(-1, block)


class Blocks:
    """Dataset of packed blocks. The first `long_from` are cut into short rows by `collate`, the rest are whole."""

    def __init__(self, blocks: np.ndarray, packing: Packing, long_from: int) -> None:
        self.blocks, self.short, self.long_from = blocks, packing.short, long_from

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"ids": self.blocks[index].astype(np.int64), "short": index < self.long_from}

    def collate(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        import torch

        ids = torch.from_numpy(np.stack([item["ids"] for item in items]))  # [B, block]
        if items[0]["short"]:
            ids = ids.view(-1, self.short)  # [B * block / short, short]
        return {"input_ids": ids}
