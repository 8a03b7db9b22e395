"""`specdec train medusa-2`: train a target together with its Medusa heads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from specdec.cli import common
from specdec.cli.train import require_extra, writable
from specdec.cli.train_heads import read_settings, train_app
from specdec.processes import this_process


@train_app.command("medusa-2")
def medusa_2(
    target: Annotated[str, typer.Option(help="`tiny`, a local folder or a hub id: the model to change.")],
    data: Annotated[str, typer.Option(help="JSONL of conversations, of `specdec distill`, ..., or a hub id.")],
    out: Annotated[Path, typer.Option(help="Folder for OUT/target and OUT/heads; OUT.run keeps the run.")],
    config: Annotated[Path | None, typer.Option(help="YAML file of settings.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting, over --config. Repeatable.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint in OUT.run.")] = True,
    dtype: common.Dtype = "auto",
    device: common.Device = "auto",
    store: Annotated[str, typer.Option(help="Type of the stored heads: float32 or bfloat16.")] = "float32",
) -> None:
    """Medusa-2: train the target together with its Medusa heads. THE TARGET CHANGES.

    OUT/target is a new model: decoding is lossless against it, not against the original.
    Where the original's text is wanted, use `specdec train medusa`.

    Further settings: adapt (lora or full), rank, alpha, dropout, lambda0, head_rate,
    heads (a checkpoint to start from), self_distill (keep to the target's own distribution).
    """
    require_extra()
    common.check_loading(dtype, device)
    common.check_choice("--store", store, ("float32", "bfloat16"))

    import torch
    from rich.console import Console

    from specdec.training.conversations import load_samples
    from specdec.training.heads import split_settings
    from specdec.training.joint import JointSettings, train_joint

    settings, options = split_settings("medusa", read_settings(config, set_ or []), JointSettings)
    writable(out.parent)
    common.quiet()
    process = this_process()
    tokenizer = common.load_tokenizer(target, "--target")
    samples = load_samples(data, tokenizer, settings.max_length)
    model = common.load_model(target, dtype, process.place(device), "--target")
    train_joint(model, samples, out, settings, options, tokenizer, target, resume, getattr(torch, store))
    if process.first:
        Console(stderr=True).print(f"medusa-2: {out}/target and {out}/heads", highlight=False)
