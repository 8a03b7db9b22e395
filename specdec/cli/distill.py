"""`specdec distill`: the target's own answers, to train drafters on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from specdec.cli import common
from specdec.errors import UsageError
from specdec.processes import this_process


def distill(
    model: common.Model,
    prompts: Annotated[
        Path, typer.Option(help='A .jsonl file of {"prompt": ...} or {"conversations": ...} (the first user turn).')
    ],
    out: Annotated[Path, typer.Option(help="The .jsonl file to write; an unfinished one is continued.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 256,
    temperature: Annotated[str, typer.Option(help="0 is greedy; a comma list (0,1) is taken in turn.")] = "0",
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts answered together.")] = 32,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many prompts.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Wrap prompts in the model's chat template.")] = False,
    drafter: Annotated[str, typer.Option(help="Who proposes tokens; with batches, none is usually fastest.")] = "none",
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    compile_: common.Compile = "off",
    dtype: common.Dtype = "auto",
    device: common.Device = "auto",
) -> None:
    """Let the model answer prompts, for training drafters on its own text.

    Ctrl-C keeps what is done; the same command goes on from there. Under `accelerate launch -m specdec distill ...` or
    torchrun, processes share the prompts; the file is the same.
    """
    common.check_loading(dtype, device, compile_)
    temperatures = _temperatures(temperature)

    from specdec.bench.environment import environment
    from specdec.decoder import Decoder
    from specdec.training.distill import Settings, read_prompts, sha256
    from specdec.training.distill import distill as answer

    (choice,) = common.choose({drafter: drafter}, None, "--drafter", model)
    if choice.takes_draft():
        raise UsageError(f"--drafter {drafter}: it never pays in batches; use none, or one that needs no other model")
    asked = read_prompts(prompts)[:limit]
    common.quiet()
    process = this_process()
    target, tokenizer = common.load_model(model, dtype, process.place(device)), common.load_tokenizer(model)
    if chat and not tokenizer.chat_template:
        raise UsageError("--chat: this model's tokenizer has no chat template; leave --chat out")
    decoder = Decoder(target, choice.make(), tokenizer=tokenizer, compile=compile_)  # type: ignore[arg-type]
    settings = Settings(
        model=model,
        prompts_sha256=sha256(prompts),
        max_new_tokens=max_new_tokens,
        temperatures=temperatures,
        batch_size=batch_size,
        chat=chat,
        drafter=drafter,
        dtype=str(target.dtype).removeprefix("torch."),
        seed=seed,
    )
    where = {**environment(target, model), "rank": process.rank, "processes": process.count}
    console = common.console(stderr=True)
    console.quiet = not process.first
    try:
        with common.progress(console) as progress:
            outcome = answer(decoder, tokenizer, asked, out, settings, where, progress, process)
    except KeyboardInterrupt:
        console.print(f"interrupted: {out} is whole as far as it goes; the same command goes on", highlight=False)
        raise typer.Exit(130) from None
    if outcome.too_long:
        console.print(
            f"note: {outcome.too_long} prompts left out: with --max-new-tokens {max_new_tokens} they exceed the "
            f"model's context of {decoder.target.context}",
            highlight=False,
        )
    speed = f", {outcome.tokens} tokens at {outcome.tokens / outcome.seconds:.0f} tokens/s" if outcome.tokens else ""
    by = f" by process {process.rank}" if process.count > 1 and speed else ""
    console.quiet = not outcome.whole  # the process that ends last says how many there are
    console.print(f"{out}: {outcome.done} answers{speed}{by}", highlight=False)


def _temperatures(text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or any(not 0 <= value < float("inf") for value in values):
        raise UsageError(f"--temperature {text!r}: give a number from 0 up, or a comma list of them like 0,0.7,1")
    return values
