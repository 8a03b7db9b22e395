"""`specdec grow`: a larger model that says exactly what a small one says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from specdec.cli import common
from specdec.processes import alone

_TEXTS, _TOKENS = 8, 64  # held-out texts, and tokens of each, that the check reads


def grow(
    model: common.Model,
    to: Annotated[str, typer.Option("--to", help="Parameters: 300M, 1.1B, ...; met within 10 %.")],
    out: Annotated[Path, typer.Option(help="Folder to write; an earlier grown model there is replaced.")],
    width: Annotated[
        int | None, typer.Option(min=1, help="Factor of hidden size, MLP and heads; without it a usual shape.")
    ] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Layers in all; without it as many as --to takes.")] = None,
    dtype: common.Dtype = "auto",
) -> None:
    """A wider and deeper model with the same function, to measure at its cost what a small model accepts.

    Llama, Mistral, Qwen2 and Qwen3. Vocabulary and tokenizer stay, so drafters that read tokens and draft models fit;
    trained heads do not. Takes 4 bytes of memory per parameter. --dtype is what is stored (auto: as the checkpoint).
    """
    from specdec.bench.grow import check_folder, parse_size

    parameters = parse_size(to)
    alone("specdec grow")
    common.check_loading(dtype, "cpu")
    check_folder(out)

    import torch

    from specdec import zoo
    from specdec.bench import grow as growing
    from specdec.bench.prompts import load_prompts

    common.quiet()
    console = common.console(stderr=True)
    # the embedded weights are stored in bfloat16 though commands run them in float32
    stored = "bfloat16" if model in zoo.names() and dtype == "auto" else dtype
    small, tokenizer = common.load_model(model, stored, "cpu"), common.load_tokenizer(model)
    kind = small.dtype if dtype == "auto" else getattr(torch, dtype)
    size = growing.plan(small.config, parameters, width, layers)
    console.print(
        f"{model}: {small.num_parameters():,} parameters -> {size.parameters:,}, width x{size.width}, "
        f"{size.layers} layers",
        highlight=False,
    )
    large = growing.grow(small, size)
    console.print("checking it against the small one", highlight=False)
    ids = [i for p in load_prompts("embedded", _TEXTS) if (i := tokenizer(p.text).input_ids[:_TOKENS])]
    found = growing.check(small, large, ids, kind)
    note = growing.write(large, tokenizer, model, small.num_parameters(), size, found, out)
    console.print(
        f"{out}: {note}; over {found.positions} tokens of text float32 logits differ by {found.error:.1e} of the "
        f"largest, {found.agreement:.1%} of the {found.dtype} argmaxes are the same",
        highlight=False,
        soft_wrap=True,
    )
