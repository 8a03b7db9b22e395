"""`specdec list`: every method that can be named."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.table import Table

from specdec.cli import common


def list_methods(
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """List drafters and verifiers: lossless or not, what must be trained, what they need."""
    from specdec import registry

    drafters = [_describe(name, registry.drafter_class) for name in registry.drafter_names()]
    verifiers = [_describe(name, registry.verifier_class) for name in registry.verifier_names()]
    if json_:
        typer.echo(json.dumps({"drafters": drafters, "verifiers": verifiers}, indent=1))
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
