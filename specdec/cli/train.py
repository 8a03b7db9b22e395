"""`specdec train`: language models from a recipe, prompts to distil, and a look at training data."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from specdec.cli import common
from specdec.errors import UsageError
from specdec.processes import alone

train_app = typer.Typer(help="Train heads for a target, or language models from a recipe.", no_args_is_help=True)

RecipeOption = Annotated[str, typer.Option(help="Name of a shipped recipe, or a YAML file.")]
DataOption = Annotated[Path, typer.Option(help="Directory of the recipe's data files.")]
OutOption = Annotated[Path, typer.Option(help="Directory for data, checkpoints and weights.")]


class Which(str, Enum):
    target = "target"
    draft = "draft"
    both = "both"


@train_app.callback()
def train() -> None:
    """Train heads for a target, or language models from a recipe."""


@train_app.command("lm")
def lm(
    data: DataOption,
    out: OutOption,
    recipe: RecipeOption = "tiny",
    model: Annotated[Which, typer.Option(help="Which model of the recipe.")] = Which.both,
    max_steps: Annotated[int | None, typer.Option(min=1, help="Steps, in place of the recipe's tokens.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint in --out.")] = True,
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value over the recipe, key dotted.")] = None,
) -> None:
    """Train the recipe's language models; weights appear in OUT/target and OUT/draft when all is done."""
    console = Console(stderr=True)
    try:
        alone("specdec train lm")
        require_extra()
        from specdec.training.lm import train_lm
        from specdec.training.recipe import load_recipe

        chosen = load_recipe(recipe, _overrides(set_ or []))
        names = list(chosen.models) if model is Which.both else [model.value]
        writable(out)
        for name in names:
            if name not in chosen.models:
                raise UsageError(f"--model {name}: recipe {chosen.name!r} has only {sorted(chosen.models)}")
            folder = train_lm(chosen, name, data, out, max_steps=max_steps, resume=resume)
            console.print(f"{name}: {folder}", highlight=False)
    except UsageError as error:
        _fail(console, error)


@train_app.command("package")
def package(
    data: DataOption,
    out: OutOption,
    to: Annotated[Path, typer.Option(help="Folder to fill with weights, prompts and the model card.")],
    recipe: RecipeOption = "tiny",
) -> None:
    """Fill a folder that can ship from finished runs in OUT: weights, prompts, loss curves, model card."""
    console = Console(stderr=True)
    try:
        require_extra()
        from specdec.training.package import package as fill
        from specdec.training.recipe import load_recipe

        console.print(f"packaged: {fill(load_recipe(recipe), data, out, to)}", highlight=False)
    except UsageError as error:
        _fail(console, error)


@train_app.command("prompts")
def prompts(
    data: DataOption,
    out: Annotated[Path, typer.Option(help="The .jsonl file to write.")],
    recipe: RecipeOption = "tiny",
    count: Annotated[int, typer.Option(min=1, help="Most prompts, all categories together.")] = 10_000,
) -> None:
    """Cut prompts from the recipe's training documents, for `specdec distill`."""
    console = Console(stderr=True)
    try:
        require_extra()
        from specdec.training.data import read_sources
        from specdec.training.prompts import training_prompts
        from specdec.training.recipe import load_recipe

        chosen = load_recipe(recipe)
        writable(out.parent)
        rows = training_prompts(chosen, read_sources(chosen, data), count)
        part = out.with_name(out.name + ".part")
        part.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        part.replace(out)
        sizes = Counter(row["category"] for row in rows)
        each = ", ".join(f"{sizes[category]} {category}" for category in sorted(sizes))
        console.print(f"{out}: {len(rows)} prompts ({each})", highlight=False, soft_wrap=True)
    except UsageError as error:
        _fail(console, error)


@train_app.command("show")
def show(
    target: Annotated[str, typer.Option(help="The model to be drafted for: `tiny`, a folder or a hub id.")],
    data: Annotated[str, typer.Option(help="A .jsonl or .json file, a folder of them, or a hub id (id:split).")],
    index: Annotated[int, typer.Option(min=0, help="Which sample.")] = 0,
    max_length: Annotated[int, typer.Option(min=1, help="Tokens; the rest of a sample is cut off.")] = 2048,
) -> None:
    """Print one training sample: learned tokens in colour, the rest dim."""
    console = Console(stderr=True)
    try:
        from specdec.training.conversations import load_samples, show_sample

        common.quiet()
        tokenizer = common.load_tokenizer(target, "--target")
        samples = load_samples(data, tokenizer, max_length)
        if index >= len(samples):
            raise UsageError(f"--index {index}: there are {len(samples)} samples; give 0 to {len(samples) - 1}")
        show_sample(samples[index], tokenizer, Console())
    except UsageError as error:
        _fail(console, error)


def _fail(console: Console, error: UsageError) -> None:
    console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(2) from error


def require_extra() -> None:
    missing = [
        name for name in ("accelerate", "datasets", "matplotlib", "yaml") if importlib.util.find_spec(name) is None
    ]
    if missing:
        raise UsageError(f"training needs {', '.join(missing)}: pip install 'specdec[train]'")


def _overrides(pairs: list[str]) -> dict[str, str]:
    for pair in pairs:
        if "=" not in pair:
            raise UsageError(f"--set {pair!r} is not key=value: write for example --set training.batch=4")
    return {key: value for key, _, value in (pair.partition("=") for pair in pairs)}


def writable(out: Path) -> None:
    """Find out before an hour of training, not after it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(
            f"--out {str(out)!r} cannot be written ({error.strerror}): give a directory you own"
        ) from error
