"""`specdec export`: trained heads in the formats that serving engines load."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

from specdec.cli import common
from specdec.errors import UsageError

# format -> method; known without importing the methods
FORMATS = {"vllm-medusa": "medusa", "fasterdecoding": "medusa", "eagle3": "eagle3", "speculators": "eagle3"}


def export(
    checkpoint: Annotated[str, typer.Argument(help="Folder or hub id of the heads, or `tiny-METHOD` (embedded).")],
    to: Annotated[str, typer.Option("--to", help=f"Format: {', '.join(FORMATS)} (eagle3 is the flat one).")],
    out: Annotated[Path, typer.Option(help="Folder to write; an earlier one is replaced.")],
    target: Annotated[
        str | None, typer.Option(help="The model the heads are for; without it, the one their config names.")
    ] = None,
    check: Annotated[bool, typer.Option(help="Read the result back and look for what engines stumble over.")] = True,
    dtype: common.Dtype = "auto",
) -> None:
    """Write heads for vLLM, SGLang or FasterDecoding; exit code 1 if the check finds anything.

    vLLM runs the likeliest chain of them, never a tree, so its tokens per step are those of `chain=True` here.
    """
    common.check_choice("--to", to, list(FORMATS))
    common.check_loading(dtype, "cpu")

    import torch
    from rich.console import Console

    from specdec.target import Target
    from specdec.training.heads import head_class

    method = FORMATS[to]
    head = head_class(method).from_pretrained(_source(checkpoint))
    name = target or head.config.target_id
    if not name:
        raise UsageError("--target: the checkpoint does not say which model it is for; name it")
    common.quiet()
    model = Target(common.load_model(name, dtype, "cpu", "--target"))
    head.attach(model)
    head.config.target_id = name  # engines look for the target under this name
    formats = _formats(method)
    folder = formats.WRITERS[to](head, out)
    console = Console(stderr=True)
    if check:
        problems = formats.check(folder, model) if to != "fasterdecoding" else []
        again = type(head).from_pretrained(folder).state_dict()
        mine = head.state_dict()
        changed = [n for n in sorted(mine.keys() | again.keys()) if n not in mine or n not in again]
        changed += [n for n in mine if n in again and not torch.equal(mine[n].cpu(), again[n].cpu())]
        problems += [f"{n} does not come back as it was" for n in changed]
        for problem in problems:
            console.print(f"problem: {problem}", highlight=False, soft_wrap=True)
        if problems:
            raise typer.Exit(1)
    console.print(f"{to}: {folder}" + (", checked" if check else ""), highlight=False, soft_wrap=True)


def _source(checkpoint: str) -> str:
    from specdec import zoo

    model, _, method = checkpoint.partition("-")
    return str(zoo.heads(model).get(method, checkpoint))


def _formats(method: str) -> ModuleType:
    return importlib.import_module(f"specdec.drafters.{method.replace('-', '_')}.formats")
