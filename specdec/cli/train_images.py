"""`specdec train images`: the embedded visual toy."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from specdec.cli.train import DataOption, OutOption, _fail, _overrides, require_extra, train_app, writable
from specdec.errors import UsageError
from specdec.processes import alone


@train_app.command("images")
def images(
    data: DataOption,
    out: OutOption,
    recipe: Annotated[str, typer.Option(help="`images`, or a YAML file.")] = "images",
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value over the recipe, key dotted.")] = None,
) -> None:
    """Train the visual toy tiny-image: autoencoder, classifier, target, draft, neighbour table.

    Started again with the same --out it goes on where it was.
    """
    console = Console(stderr=True)
    try:
        alone("specdec train images")
        require_extra()
        from specdec.training.images import load_image_recipe, train_images

        chosen = load_image_recipe(recipe, _overrides(set_ or []))
        writable(out)
        console.print(f"tiny-image: {train_images(chosen, data, out)}", highlight=False)
    except UsageError as error:
        _fail(console, error)
