"""`specdec list`: every method that can be named, and what is embedded."""

from __future__ import annotations

import inspect
import json
import re
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from specdec.cli import common


def list_methods(
    options: Annotated[
        str | None, typer.Option(metavar="NAME", help="The options of one drafter or verifier instead.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """List drafters and verifiers (lossless or not, what must be trained, what they need), and embedded models."""
    from specdec import registry, zoo

    if options is not None:
        _show_options(options, json_)
        return
    drafters = [_describe(name, registry.drafter_class) for name in registry.drafter_names()]
    verifiers = [_describe(name, registry.verifier_class) for name in registry.verifier_names()]
    if json_:
        embedded = {"models": zoo.names(), "brings": {name: sorted(zoo.brings(name)) for name in zoo.names()}}
        typer.echo(json.dumps({"drafters": drafters, "verifiers": verifiers, "embedded": embedded}, indent=1))
        return
    console = common.console()
    for title, methods in (("drafters", drafters), ("verifiers", verifiers)):
        training = title == "drafters"
        table = Table(title=title, title_justify="left")
        for header in ("name", "lossless", *(("training", "needs") if training else ()), "what it does"):
            table.add_column(header, overflow="fold")
        for m in methods:
            lossless = {True: "yes", False: "no", None: "depends"}[m["lossless"]]
            table.add_row(m["name"], lossless, *((m["training"], m["requires"]) if training else ()), m["summary"])
        console.print(table)
    for name in zoo.names():
        brought = ", ".join(zoo.brings(name))
        console.print(f"embedded: {name}" + (f", with what {brought} need" if brought else ""), highlight=False)


def _describe(name: str, find: Any) -> dict[str, Any]:
    """A method's class attributes; one that cannot be imported is listed with the reason."""
    try:
        cls = find(name)
    except Exception as error:  # another package's entry point must not hide the rest
        return {
            "name": name,
            "summary": f"cannot be loaded: {type(error).__name__}: {error}",
            "lossless": None,
            "training": "-",
            "requires": "-",
        }
    return {
        "name": name,
        "summary": cls.summary,
        "lossless": cls.lossless if isinstance(cls.lossless, bool) else None,  # a property: decided by its options
        "training": getattr(cls, "training", "none"),
        "requires": getattr(cls, "requires", "nothing"),
    }


def _show_options(name: str, json_: bool) -> None:
    """The constructor of a method: names, types, defaults, and what its documentation says."""
    from specdec import registry

    verifiers = registry.verifier_names()
    common.check_choice("--options", name, [*registry.drafter_names(), *verifiers])
    cls: type = registry.verifier_class(name) if name in verifiers else registry.drafter_class(name)
    meaning = _documented(cls)
    found: list[dict[str, Any]] = [
        {
            "name": p.name,
            "type": None if p.annotation is p.empty else str(p.annotation),
            "default": None if p.default is p.empty else repr(p.default),
            "required": p.default is p.empty,
            "meaning": meaning.get(p.name, ""),
        }
        for p in inspect.signature(cls).parameters.values()
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    if json_:
        typer.echo(json.dumps({"name": name, "options": found}, indent=1))
        return
    console = common.console()
    if not found:
        console.print(f"{name} has no options", highlight=False)
        return
    made = f"verifier={cls.__name__}(OPTION=...)" if name in verifiers else f"{name!r}, OPTION=..."
    console.print(f"Decoder(model, {made}), or --set {name}.OPTION=...", highlight=False, markup=False)
    table = Table()
    for header in ("option", "default", "type", "meaning"):
        table.add_column(header, overflow="fold")
    for o in found:
        default = "must be given" if o["required"] else o["default"]
        table.add_row(*map(escape, (o["name"], default, o["type"] or "", o["meaning"])))
    console.print(table)


def _documented(cls: type) -> dict[str, str]:
    """Option -> text, from the "Args:" of the class and of those it inherits from."""
    meaning: dict[str, str] = {}
    for documented in cls.__mro__:
        _, _, section = inspect.cleandoc(documented.__dict__.get("__doc__") or "").partition("Args:\n")
        block = re.split(r"\n(?=\S)", section)[0]  # up to the next heading
        for entry in re.split(r"\n {4}(?=\S)", "\n" + block)[1:]:
            names, _, text = entry.partition(":")
            text = " ".join(text.replace("``", "").split())
            for name in names.split(","):
                # "see TableDrafter" stands for what that class, further up, says
                if not meaning.get(name.strip()) or meaning[name.strip()].startswith("see "):
                    meaning[name.strip()] = text
    return meaning
