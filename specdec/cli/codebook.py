"""`specdec codebook`: which codes of an image model's quantiser are near each other, for the verifier lantern."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from specdec.cli import common
from specdec.errors import UsageError


def codebook(
    source: Annotated[
        str,
        typer.Argument(
            metavar="MODEL_OR_FILE",
            help="A Chameleon, Emu3 or Janus model (folder or hub id; only its codebook is read), or a .safetensors, "
            ".pt or .npy file with a matrix of one vector a row.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="File to write, in a folder that exists.")],
    k: Annotated[int, typer.Option("-k", min=1, help="Neighbours of each code to keep, at most all others.")] = 1024,
    tensor: Annotated[str | None, typer.Option(help="The matrix's name, in a file of several.")] = None,
    normalise: Annotated[
        bool, typer.Option("--normalise", help="Compare vectors at length 1, as LlamaGen does (Janus' always are).")
    ] = False,
    offset: Annotated[int | None, typer.Option(min=0, help="Token id of code 0, where the model does not say.")] = None,
) -> None:
    """Find every code's nearest codes; use the table with --verifier lantern --set lantern.codebook=FILE.

    The verifier finds a table named neighbours.safetensors beside the model's weights by itself. Ctrl-C saves nothing.
    """
    if out.is_dir() or not out.parent.is_dir():
        raise UsageError(f"--out {out}: name a file in a folder that exists")

    from dataclasses import replace

    import numpy as np

    from specdec.verifiers.lantern import Neighbours, read_codebook

    common.quiet()
    found = read_codebook(source, tensor)
    tokens = found.tokens if offset is None else np.arange(len(found.vectors)) + offset
    found = replace(found, tokens=tokens, normalise=found.normalise or normalise)
    console = common.console(stderr=True)
    try:
        with common.progress(console) as progress:
            table = Neighbours.of(
                found,
                min(k, len(found.vectors) - 1),
                lambda done, total: progress(done, total, "codes compared"),
            )
        table.save(out)
    except KeyboardInterrupt:
        console.print("interrupted: nothing was saved", highlight=False)
        raise typer.Exit(130) from None
    facts = ", ".join(f"{name} {value}" for name, value in table.facts.items())
    console.print(f"{out}: {table.ids.shape[1]} neighbours of each code ({facts})", highlight=False, soft_wrap=True)
