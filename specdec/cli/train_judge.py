"""`specdec train judge` and `judge-data`: a judge for the verifier of that name."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from specdec.cli import common
from specdec.cli.train import DataOption, RecipeOption, require_extra, train_app, writable
from specdec.cli.train_heads import read_settings
from specdec.errors import UsageError
from specdec.processes import this_process


@train_app.command("judge")
def judge(
    target: Annotated[str, typer.Option(help="`tiny`, a local folder or a hub id: the model the judge is for.")],
    data: Annotated[Path, typer.Option(help='JSONL of "prompt", "correct", "wrong", "mistake": [start, end].')],
    out: Annotated[Path, typer.Option(help="Folder of the finished judge; OUT.run keeps the hidden states.")],
    test: Annotated[Path | None, typer.Option(help="Held-out rows of the same form, only measured on.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting, over --config. Repeatable.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Use the hidden states that OUT.run holds already.")] = True,
    dtype: common.Dtype = "auto",
    device: common.Device = "auto",
) -> None:
    """Judge Decoding: train a linear judge of drafted tokens. The verifier that uses it is LOSSY."""
    require_extra()
    common.check_loading(dtype, device)

    from specdec.training.judge import JudgeSettings, read_examples, train_judge

    settings = JudgeSettings.of(read_settings(config, set_ or []))
    for argument, file in (("--data", data), ("--test", test)):
        if file is not None:
            read_examples(file, argument)  # before a model is loaded
    writable(out.parent)
    common.quiet()
    tokenizer = common.load_tokenizer(target, "--target")
    process = this_process()
    model = common.load_model(target, dtype, process.place(device), "--target")
    console = common.console(stderr=True)
    console.quiet = not process.first
    with common.progress(console) as progress:
        train_judge(model, tokenizer, data, out, settings, progress, test, target, resume)
    console.print(f"judge: {out}", highlight=False)


@train_app.command("judge-data")
def judge_data(
    data: DataOption,
    out: Annotated[Path, typer.Option(help="The .jsonl file to write.")],
    recipe: RecipeOption = "tiny",
    count: Annotated[int, typer.Option(min=1, help="Most examples of each kind.")] = 1000,
    kind: Annotated[str, typer.Option(help="all, math (a number changed) or qa (another question's answer).")] = "all",
    held_out: Annotated[bool, typer.Option("--held-out", help="From the documents the recipe holds out.")] = False,
) -> None:
    """Make right and wrong answers from a recipe's documents, with the mistakes marked, to train a judge on."""
    common.check_choice("--kind", kind, ("all", "math", "qa"))
    require_extra()

    from rich.console import Console

    from specdec.training.judge import make_examples
    from specdec.training.recipe import load_recipe

    writable(out.parent)
    examples = [e for e in make_examples(load_recipe(recipe), data, count, held_out) if kind in ("all", e.kind)]
    if not examples:
        raise UsageError(f"--kind {kind}: the recipe's documents give no example of it; choose another kind")
    part = out.with_name(out.name + ".part")
    part.write_text("".join(json.dumps(asdict(e), ensure_ascii=False) + "\n" for e in examples), encoding="utf-8")
    part.replace(out)
    Console(stderr=True).print(f"{out}: {len(examples)} examples", highlight=False)
