"""The models that ship inside the package: `tiny`, what was trained for it or on top of it, and held-out prompts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specdec.errors import UsageError

if TYPE_CHECKING:
    import torch

HERE = Path(__file__).resolve().parent
_FOLDERS = {
    "tiny": HERE / "tiny" / "target",
    "tiny-draft": HERE / "tiny" / "draft",
    "tiny-lexical-units": HERE / "tiny" / "target",  # see `adapted`
    "tiny-image": HERE / "tiny_image" / "target",
    "tiny-image-draft": HERE / "tiny_image" / "draft",
}
_UNITS = {"tiny-lexical-units": HERE / "tiny" / "lexical-units"}
_HEADS = {"tiny": HERE / "tiny" / "heads"}
_MADE = {
    "tiny": {"judge": {"checkpoint": HERE / "tiny" / "judge"}, "s2d": {"draft": HERE / "tiny" / "nested"}},
}
_PROMPTS = {"tiny": HERE / "tiny" / "prompts.jsonl"}
_TASKS = {"tiny": HERE / "tiny" / "tasks.jsonl"}


class ZooError(UsageError):
    """A packaged model is unknown, missing or damaged. The message says what to do."""


@dataclass(frozen=True)
class Prompt:
    """One held-out prompt, in a text format the model was trained on."""

    id: str
    category: str  # stories, qa, math, code, translation or continuation
    prompt: str
    source: str  # source of the recipe whose held-out part it was taken from
    reference: str | None = None  # a right answer, of tasks


def names() -> list[str]:
    """Names that `path` and `load` take."""
    return sorted(_FOLDERS)


def path(name: str) -> Path | None:
    """Folder of the packaged model `name`, for `from_pretrained`; None where `name` is not packaged."""
    return _FOLDERS.get(name)


def heads(name: str) -> dict[str, Path]:
    """Drafter -> checkpoint folder of the heads that were trained for the packaged model `name`; empty for others."""
    folder = _HEADS.get(name)
    found = sorted(folder.glob("*/config.json")) if folder is not None else []
    return {file.parent.name: file.parent for file in found}


def brings(name: str) -> dict[str, dict[str, Path]]:
    """Method -> options whose values were made for the packaged model `name`; empty for others."""
    made = {drafter: {"checkpoint": folder} for drafter, folder in heads(name).items()}
    return made | _MADE.get(name, {})


def adapted(name: str, model: Any) -> Any:
    """`model`, read from `path(name)`, with what was trained on top of it; most have nothing."""
    if name not in _UNITS:
        return model
    from specdec.drafters.lexical_units import load_merged

    return load_merged(model, _UNITS[name])


def load(name: str, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """(model, tokenizer) of the packaged model `name`, from the package alone; `dtype` None keeps bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = _FOLDERS.get(name)
    if folder is None:
        raise ZooError(f"zoo model {name!r} is unknown: choose one of {names()}")
    if name.startswith("tiny-image"):
        raise ZooError(f"zoo model {name!r} has no tokenizer: use specdec.zoo.tiny_image.load()")
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or torch.bfloat16, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever the readers of weights and JSON raise, the remedy is the same
        raise ZooError(
            f"zoo model {name!r} could not be read from {folder} ({type(error).__name__}): "
            "reinstall specdec, or train it anew with `specdec train lm --recipe tiny`"
        ) from error
    return adapted(name, model), tokenizer


def prompts(name: str = "tiny") -> list[Prompt]:
    """The 48 held-out prompts of `name`, 8 in each of 6 categories."""
    return _prompts(name, _PROMPTS)


def tasks(name: str = "tiny") -> list[Prompt]:
    """50 held-out problems and 50 translations of `name`, with reference answers; none is among its `prompts`."""
    return _prompts(name, _TASKS)


def _prompts(name: str, files: dict[str, Path]) -> list[Prompt]:
    file = files.get(name)
    if file is None:
        raise ZooError(f"zoo model {name!r} has no prompts: choose one of {sorted(files)}")
    try:
        return [Prompt(**json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, TypeError) as error:
        raise ZooError(f"prompts of {name!r} could not be read from {file}: reinstall specdec") from error
