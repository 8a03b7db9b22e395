"""`specdec train lexical-units`: train a model to fill placeholders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from specdec.cli import common
from specdec.cli.train import require_extra, train_app, writable
from specdec.cli.train_heads import read_settings
from specdec.processes import this_process


@train_app.command("lexical-units")
def lexical_units(
    target: Annotated[str, typer.Option(help="`tiny`, a local folder or a hub id: the model to change.")],
    data: Annotated[str, typer.Option(help="JSONL of conversations, of `specdec distill`, ..., or a hub id.")],
    out: Annotated[Path, typer.Option(help="Folder for adapter, row and lexical_units.json; OUT.run keeps the run.")],
    config: Annotated[Path | None, typer.Option(help="YAML file of settings.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting, over --config. Repeatable.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint in OUT.run.")] = True,
    merged: Annotated[bool, typer.Option(help="Write OUT/merged too: an ordinary model with its tokenizer.")] = False,
    dtype: common.Dtype = "auto",
    device: common.Device = "auto",
    store: Annotated[str, typer.Option(help="Type of the stored adapter: float32 or bfloat16.")] = "float32",
) -> None:
    """Lexical units: train the target to fill placeholders. THE TARGET CHANGES.

    Decoding is lossless against the trained model, not against the original.

    Further settings: K, unit_alpha, lam, packed, placeholder, rank, alpha, dropout.
    """
    require_extra()
    common.check_loading(dtype, device)
    common.check_choice("--store", store, ("float32", "bfloat16"))

    import torch
    from rich.console import Console

    from specdec.training.conversations import load_samples
    from specdec.training.lexical_units import train_units, unit_settings

    settings = unit_settings(read_settings(config, set_ or []))
    writable(out.parent)
    common.quiet()
    process = this_process()
    tokenizer = common.load_tokenizer(target, "--target")
    samples = load_samples(data, tokenizer, settings.max_length)
    model = common.load_model(target, dtype, process.place(device), "--target")
    train_units(model, samples, out, settings, tokenizer, target, resume, getattr(torch, store), merged)
    if process.first:
        Console(stderr=True).print(f"lexical-units: {out}", highlight=False)
