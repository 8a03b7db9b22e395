"""`specdec generate`: text from a prompt, as it is made."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from specdec.cli import common
from specdec.cli.streaming import TextStream
from specdec.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from specdec.stats import GenerationStats


def generate(
    model: common.Model = "tiny",
    prompt: Annotated[str | None, typer.Option(help="The text to continue.")] = None,
    file: Annotated[str | None, typer.Option(help="Read the prompt from a file; - is standard input.")] = None,
    drafter: Annotated[str, typer.Option(help="Who proposes tokens (`specdec list`).")] = "hybrid",
    set_: common.Settings = None,
    verifier: Annotated[str, typer.Option(help="Who decides which to keep.")] = "standard",
    draft: common.Draft = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to generate.")] = 128,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy; without it 0, and 1 for pictures.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Wrap the prompt in the model's chat template.")] = False,
    show_accepted: Annotated[bool, typer.Option("--show-accepted", help="Colour drafted and accepted tokens.")] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Print what it cost, on standard error.")] = False,
    compile_: common.Compile = "off",
    dtype: common.Dtype = "auto",
    device: common.Device = "auto",
    class_: Annotated[int | None, typer.Option("--class", help="Of `tiny-image` only: the digit to draw.")] = None,
    out: Annotated[Path | None, typer.Option(help="Of `tiny-image` only: the .png file to draw it into.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Generate text, streamed as it is made; or, with `tiny-image --class 7 --out digit.png`, a picture."""
    common.check_loading(dtype, device, compile_)
    if temperature is not None and not 0 <= temperature < float("inf"):
        raise UsageError(f"--temperature {temperature}: give a number from 0 up; 0 is greedy")
    drawing = model == "tiny-image"
    if drawing != (class_ is not None and out is not None) or (drawing and (prompt is not None or file is not None)):
        raise UsageError(
            "--class and --out: `tiny-image` draws a digit and needs both, and no prompt; other models take neither"
        )
    text, argument = ("", "--class") if drawing else _prompt(prompt, file)

    import torch

    from specdec import registry
    from specdec.bench.arms import Settings
    from specdec.decoder import Decoder

    rule, others = common.verifier_options(verifier, set_, model)  # mistakes fail before anything is loaded
    (choice,) = common.choose({drafter: drafter}, others, "--drafter", model)
    drafts = choice.takes_draft(draft)
    draft = common.draft_name(model, draft)
    if drafts and draft is None:
        raise UsageError(f"--drafter {drafter} needs --draft-model FOLDER or ID: {model} brings no draft model")
    common.quiet()
    with common.json_only(json_) as stdout:
        target = common.load_model(model, dtype, device)
        more: dict[str, Any] = {}
        if drafts and draft is not None:
            same = str(target.dtype).removeprefix("torch.")
            more["draft"] = common.load_model(draft, same, device, "--draft-model")
        if class_ is not None and out is not None:
            from specdec.zoo.tiny_image import draw

            how = 1.0 if temperature is None else temperature
            cost = draw(target, choice.make(**more), registry.verifier(verifier, **rule), class_, out, seed or 0, how)
            if json_:
                stdout.write(json.dumps({"out": str(out), "class": class_, "stats": cost.summary()}) + "\n")
            elif stats:
                _show_stats(cost)
            return
        tokenizer = common.load_tokenizer(model)
        inputs = _encode(tokenizer, text, chat, argument).to(target.device)
        length = inputs["input_ids"].shape[1]
        room = _room(target, length, max_new_tokens, argument)
        judge = registry.verifier(verifier, **rule)
        decoder = Decoder(target, choice.make(**more), judge, tokenizer=tokenizer, compile=compile_)  # type: ignore[arg-type]
        if seed is not None:
            torch.manual_seed(seed)
        stream = TextStream(tokenizer, None if json_ else stdout, colour=show_accepted)
        partial = False
        try:
            decoder.generate(
                inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                streamer=stream,
                **Settings(room, temperature or 0.0).arguments(),
            )
        except KeyboardInterrupt:
            partial = True
            stream.end()
        if json_:
            result = {
                "text": tokenizer.decode(stream.ids, skip_special_tokens=True),
                "ids": stream.ids,
                "partial": partial,
                "model": model,
                "options": choice.options,
                "verifier_options": rule,
                "prompt_tokens": length,
                "stats": decoder.stats.summary() if decoder.stats else None,  # None: interrupted before the start
            }
            stdout.write(json.dumps(result, allow_nan=False) + "\n")
    if stats and not json_ and decoder.stats is not None:
        _show_stats(decoder.stats)
    if partial:
        Console(stderr=True).print("interrupted: the text is partial", highlight=False)
        raise typer.Exit(130)


def _room(model: PreTrainedModel, length: int, wanted: int, argument: str) -> int:
    """How many tokens may be generated after a prompt of ``length``."""
    context = common.context_of(model)
    if context is None:
        return wanted
    if length >= context:
        raise UsageError(
            f"{argument}: the prompt has {length} tokens and the model's context is {context}; shorten it to at most "
            f"{context - 1}"
        )
    if length + wanted > context:
        Console(stderr=True).print(
            f"note: --max-new-tokens lowered from {wanted} to {context - length}: the context is {context} tokens",
            highlight=False,
        )
    return min(wanted, context - length)


def _encode(tokenizer: Any, text: str, chat: bool, argument: str) -> Any:
    if chat:
        if not tokenizer.chat_template:
            raise UsageError("--chat: this model's tokenizer has no chat template; leave --chat out")
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(text, return_tensors="pt")
    if inputs["input_ids"].shape[1] == 0:
        raise UsageError(f"{argument}: the tokenizer makes no token of it; give at least one word")
    return inputs


def _show_stats(stats: GenerationStats) -> None:
    """What a generation cost, on standard error."""
    table = Table(show_header=False)
    steps = [step.columns for step in stats.steps if step.columns]
    rows = [
        ("drafter, verifier", f"{stats.drafter}, {stats.verifier}"),
        ("lossless", "yes" if stats.lossless else "no"),
        ("compiled steps", stats.compilation),
        ("prompt tokens", str(stats.prompt_tokens)),
        ("new tokens", str(stats.new_tokens)),
        ("target forwards", str(len(steps))),
        ("draft forwards", str(stats.draft_forwards)),
        ("MAT (tokens per target forward)", "-" if stats.mat is None else f"{stats.mat:.2f}"),
        ("columns per forward", f"{sum(steps) / len(steps):.1f}" if steps else "-"),
        ("tokens/s", f"{stats.tokens_per_second:.1f}"),
        ("overhead outside the target's forward", f"{stats.overhead:.0%}"),
        *((f"  {phase}", f"{1000 * s:.1f} ms") for phase, s in stats.seconds_by_phase().items()),
    ]
    for row in rows:
        table.add_row(*row)
    common.console(stderr=True).print(table)


def _prompt(prompt: str | None, file: str | None) -> tuple[str, str]:
    """The text, and what the user called it."""
    if (prompt is None) == (file is None):
        raise UsageError("give either --prompt TEXT or --file FILE (- for standard input), and not both")
    if prompt is not None:
        argument, text = "--prompt", prompt
    elif file == "-":
        argument, text = "--file -", sys.stdin.read()
    else:
        assert file is not None
        argument = f"--file {file}"
        try:
            text = Path(file).expanduser().read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(f"{argument}: not UTF-8 text; save the file as UTF-8") from error
        except OSError as error:
            raise UsageError(f"{argument}: {error.strerror}; give a readable text file") from error
    if not text.strip():
        raise UsageError(f"{argument}: the prompt is empty; give at least one word")
    return text, argument
