"""`specdec train medusa|hidden-transfer|chimera|eagle3`: train a head for a target."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from specdec.cli import common
from specdec.cli.train import require_extra, train_app, writable
from specdec.errors import UsageError, first_line
from specdec.processes import alone, this_process

# name -> help; known without importing the methods, so that --help is quick
METHODS = {
    "medusa": "Medusa heads: one residual block per token ahead.",
    "hidden-transfer": "Hidden transfer: linear maps that make pseudo hidden states at middle layers.",
    "chimera": "Chimera: a trigram encoder, one context layer and residual heads.",
    "eagle3": "EAGLE-3: one autoregressive layer over features of three target layers.",
}


def command(method: str) -> Callable[..., None]:
    """The command that trains one method's heads."""

    def train(
        target: Annotated[str, typer.Option(help="`tiny`, a local folder or a hub id: the model the heads are for.")],
        data: Annotated[str, typer.Option(help="JSONL of conversations, of `specdec distill`, ..., or a hub id.")],
        out: Annotated[Path, typer.Option(help="Folder of the finished checkpoint; OUT.run keeps the run.")],
        config: Annotated[Path | None, typer.Option(help="YAML file of settings.")] = None,
        set_: Annotated[
            list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting, over --config. Repeatable.")
        ] = None,
        resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint in OUT.run.")] = True,
        dtype: common.Dtype = "auto",
        device: common.Device = "auto",
        store: Annotated[str, typer.Option(help="Type of the stored weights: float32 or bfloat16.")] = "float32",
    ) -> None:
        run(method, target, data, out, config, set_ or [], resume, dtype, device, store)

    return train


def run(
    method: str,
    target: str,
    data: str,
    out: Path,
    config: Path | None,
    pairs: list[str],
    resume: bool,
    dtype: str,
    device: str,
    store: str,
) -> None:
    """Train, after everything that can be wrong has been checked."""

    require_extra()
    common.check_loading(dtype, device)
    common.check_choice("--store", store, ("float32", "bfloat16"))

    import torch
    from rich.console import Console

    from specdec.training.conversations import load_samples
    from specdec.training.heads import split_settings, train_head

    settings, options = split_settings(method, read_settings(config, pairs))
    writable(out.parent)
    common.quiet()
    process = this_process()
    tokenizer = common.load_tokenizer(target, "--target")
    samples = load_samples(data, tokenizer, settings.max_length)
    model = common.load_model(target, dtype, process.place(device), "--target")
    stored = getattr(torch, store)
    train_head(method, model, samples, out, settings, options, tokenizer, target, resume, stored)
    if process.first:
        Console(stderr=True).print(f"{method}: {out}", highlight=False)


def read_settings(config: Path | None, pairs: list[str]) -> dict[str, Any]:
    """--config with --set on top."""
    import yaml

    values: Any = {}
    if config is not None:
        try:
            values = yaml.safe_load(config.read_text(encoding="utf-8")) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UsageError(f"--config {config}: cannot be read as YAML ({first_line(error)})") from error
        if not isinstance(values, dict):
            raise UsageError(f"--config {config}: write one mapping, KEY: VALUE per line")
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise UsageError(f"--set {pair!r} is not KEY=VALUE: write for example --set learning_rate=1e-3")
        values[key.strip()] = yaml.safe_load(value)
    return values


@train_app.command("sweep-layers")
def sweep_layers(
    target: Annotated[str, typer.Option(help="`tiny`, a local folder or a hub id.")],
    data: Annotated[str, typer.Option(help="As for `specdec train hidden-transfer`.")],
    out: Annotated[Path, typer.Option(help="Folder for layers.json and layers.png.")],
    layers: Annotated[str | None, typer.Option(help="Comma list; without it every second from 0.3 to 0.9.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Updates per layer.")] = 500,
    block: Annotated[int, typer.Option(min=8, help="Tokens of a text.")] = 128,
    held_out: Annotated[int, typer.Option(min=1, help="Texts to measure on.")] = 32,
    dtype: common.Dtype = "auto",
    device: common.Device = "auto",
) -> None:
    """Which layer hidden transfer should inject at: trains the first map alone at each, and draws the curve."""
    alone("specdec train sweep-layers")
    require_extra()
    common.check_loading(dtype, device)
    try:
        wanted = None if layers is None else [int(part) for part in layers.split(",")]
    except ValueError as error:
        raise UsageError(f"--layers {layers!r}: write numbers with commas between, such as 2,4,6") from error
    writable(out)

    import torch
    from rich.console import Console

    from specdec.drafters.hidden_transfer.sweep import candidate_layers, sweep, write_curve
    from specdec.target import Target
    from specdec.training.conversations import load_samples

    common.quiet()
    samples = load_samples(data, common.load_tokenizer(target, "--target"), 10**9)
    text = torch.cat([torch.tensor(ids) for ids in samples["input_ids"]])
    texts = text[: len(text) // block * block].view(-1, block)
    if len(texts) <= held_out:
        raise UsageError(f"--data {data}: {len(texts)} texts of {block} tokens, {held_out} of them held out; give more")
    model = Target(common.load_model(target, dtype, device, "--target"))
    console, scores = Console(stderr=True), []
    chosen = wanted or candidate_layers(model.config.num_hidden_layers)
    for score in sweep(model, texts[held_out:], texts[:held_out], chosen, steps):
        scores.append(score)
        console.print(f"layer {score.layer}: top-1 {score.accuracy:.3f}, loss {score.loss:.3f}", highlight=False)
        rows = [asdict(score) for score in scores]
        (out / "layers.json").write_text(
            json.dumps({"steps": steps, "layers": rows}, indent=1) + "\n", encoding="utf-8"
        )
        write_curve(scores, out / "layers.png")


for _name, _help in METHODS.items():
    train_app.command(_name, help=_help)(command(_name))
