"""A recipe: everything that decides the weights of a zoo model, read from one YAML file."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from specdec.errors import UsageError

RECIPES = Path(__file__).resolve().parent.parent / "zoo" / "recipes"


class RecipeError(UsageError):
    """A recipe, one of its values, or a file it names is not usable. The message says what to type instead."""


@dataclass(frozen=True)
class Source:
    """One part of the training mixture."""

    name: str
    reader: str  # key of `specdec.training.data.READERS`
    files: list[str]  # relative to the data directory
    repeats: float  # passes over the documents; a fraction is a seeded subset
    held_out: int = 0  # documents kept back, for readers without a split of their own
    held_out_file: str | None = None


@dataclass(frozen=True)
class TokenizerSpec:
    vocab_size: int
    sample_chars: int


@dataclass(frozen=True)
class Packing:
    block: int  # tokens
    short: int  # tokens; divides `block`
    short_share: float  # of the steps


@dataclass(frozen=True)
class ModelSpec:
    """A Llama with tied embeddings, and how long and how fast it is trained."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    tokens: int  # training tokens, all passes together
    learning_rate: float  # peak


@dataclass(frozen=True)
class Training:
    batch: int  # blocks a step
    warmup_share: float  # of the steps
    final_rate_share: float  # of the peak learning rate
    weight_decay: float
    max_grad_norm: float
    logging_steps: int
    save_steps: int  # a multiple of logging_steps, so that a resumed loss log equals an unbroken one


@dataclass(frozen=True)
class Recipe:
    name: str
    seed: int
    tokenizer: TokenizerSpec
    sources: list[Source]
    packing: Packing
    models: dict[str, ModelSpec]
    training: Training
    raw: dict[str, Any] = field(repr=False, default_factory=dict)  # as read, for the record beside the weights


def recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(name: str, overrides: dict[str, str] | None = None) -> Recipe:
    """The recipe called `name`, or the one in the file `name`; `overrides` maps dotted keys to YAML values."""
    path = RECIPES / f"{name}.yaml"
    if not path.is_file():
        path = Path(name)
    if not path.is_file():
        near = difflib.get_close_matches(name, recipe_names(), n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise RecipeError(f"recipe {name!r} is unknown: {hint}choose one of {recipe_names()} or give a YAML file")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {str(path)!r} is not YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(raw, dict):
        raise RecipeError(f"recipe {str(path)!r} must be a mapping with the keys of {RECIPES / 'tiny.yaml'}")
    for key, value in (overrides or {}).items():
        override(raw, key, value)
    return _build(raw)


def override(raw: dict[str, Any], key: str, value: str) -> None:
    *parents, last = key.split(".")
    node: Any = raw
    for part in parents:
        node = node.get(part) if isinstance(node, dict) else None
    if not isinstance(node, dict) or last not in node:
        near = difflib.get_close_matches(key, _keys(raw), n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise RecipeError(f"--set {key}={value}: the recipe has no key {key!r}; {hint}keys are {_keys(raw)}")
    node[last] = yaml.safe_load(value)


def _keys(raw: dict[str, Any], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for key, value in raw.items():
        keys += _keys(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}"]
    return keys


def _build(raw: dict[str, Any]) -> Recipe:
    try:
        recipe = Recipe(
            name=raw["name"],
            seed=int(raw["seed"]),
            tokenizer=typed(TokenizerSpec, raw["tokenizer"]),
            sources=[typed(Source, source) for source in raw["sources"]],
            packing=typed(Packing, raw["packing"]),
            models={name: typed(ModelSpec, spec) for name, spec in raw["models"].items()},
            training=typed(Training, raw["training"]),
            raw=raw,
        )
    except KeyError as error:
        raise RecipeError(f"the recipe lacks the key {error.args[0]!r}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise RecipeError(f"the recipe has a wrong value: {error}") from error
    if recipe.packing.block % recipe.packing.short:
        raise RecipeError(f"packing.short={recipe.packing.short} must divide packing.block={recipe.packing.block}")
    if recipe.training.save_steps % recipe.training.logging_steps:
        raise RecipeError("training.save_steps must be a multiple of training.logging_steps")
    return recipe


def typed(kind: Any, values: dict[str, Any]) -> Any:
    """`kind(**values)` with numbers cast to the field's type: YAML reads 1e-3 as a string."""
    casts = {"int": int, "float": float}
    types = {f.name: str(f.type) for f in dataclasses.fields(kind)}
    return kind(**{key: casts.get(types.get(key, ""), lambda x: x)(value) for key, value in values.items()})
