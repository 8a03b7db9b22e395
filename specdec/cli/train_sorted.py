"""`specdec train s2d`: a draft model whose first layers are draft models too."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from specdec.cli import common
from specdec.cli.train import require_extra, train_app, writable
from specdec.processes import this_process


@train_app.command("s2d")
def s2d(
    draft: Annotated[str, typer.Option(help="The model to sort: `tiny-draft`, a local folder or a hub id.")],
    data: Annotated[str, typer.Option(help="JSONL of conversations, of `specdec distill`, ..., or a hub id.")],
    out: Annotated[Path, typer.Option(help="Folder of the finished model; OUT.run keeps the run.")],
    submodels: Annotated[
        str | None, typer.Option(help="Layers of each sub-model, such as 2,4,6; the last is the whole model.")
    ] = None,
    thresholds: Annotated[
        str | None, typer.Option(help="Where a token leaves, one for each; without it chosen on held-out samples.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting, over --config. Repeatable.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint in OUT.run.")] = True,
    device: common.Device = "auto",
    store: Annotated[str, typer.Option(help="Type of the stored weights: float32 or bfloat16.")] = "float32",
) -> None:
    """S2D: sort a small model, so that its first layers draft too (SoFT).

    All sub-models are trained at once. No target takes part: one draft serves targets of any
    size; data made by `specdec distill` raises acceptance with the model that made it.

    Further settings: layers (keep the first ones of --draft, or add fresh ones), fresh (sizes
    to change, with random weights), agreement (for thresholds), learning_rate, epochs, ...
    """
    require_extra()
    common.check_loading("auto", device)
    common.check_choice("--store", store, ("float32", "bfloat16"))

    import torch
    from rich.console import Console

    from specdec import zoo
    from specdec.cli.train_heads import read_settings as read_yaml
    from specdec.training.conversations import load_samples
    from specdec.training.sorted import load_draft, read_settings, train_sorted

    values = read_yaml(config, set_ or [])
    given = {"submodels": submodels, "thresholds": thresholds}
    settings = read_settings({**values, **{k: v for k, v in given.items() if v is not None}})
    writable(out.parent)
    common.quiet()
    process = this_process()
    place = process.place(device)
    if place == "auto":
        place = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_draft(str(zoo.path(draft) or draft), settings).to(place)
    tokenizer = common.load_tokenizer(draft, "--draft")
    samples = load_samples(data, tokenizer, settings.max_length)
    train_sorted(model, samples, out, settings, tokenizer, resume, getattr(torch, store))
    if process.first:
        Console(stderr=True).print(f"s2d: {out}", highlight=False)
