"""`specdec bench-online`: what online distillation brings on a stream of requests."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from specdec.cli import common
from specdec.errors import UsageError
from specdec.processes import alone


def bench_online(
    model: common.Model = "tiny",
    out: Annotated[Path | None, typer.Option(help="Folder for online.json, online.md and online.png.")] = None,
    draft: common.Draft = None,
    prompts: Annotated[
        str, typer.Option(help='`embedded`, or a .jsonl file of {"prompt": ..., "category": ...}.')
    ] = "embedded",
    phases: Annotated[
        str, typer.Option(help="Domains in turn, a comma list; each a category, or several joined by +.")
    ] = "stories+continuation+qa,translation+math+code",
    requests: Annotated[int, typer.Option(min=2, help="Length of the stream, split evenly.")] = 48,
    arms: Annotated[
        str, typer.Option(help="Comma list, besides the frozen draft: all, error_only, reverse, mixed.")
    ] = "all",
    interval: Annotated[int, typer.Option(min=1, help="Requests per update.")] = 1,
    rate: Annotated[float, typer.Option(help="Learning rate.")] = 1e-3,
    train_seconds: Annotated[float, typer.Option(help="Most time training takes after a request.")] = 0.5,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens per request.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Which prompts, in which order; and of sampling.")] = 0,
) -> None:
    """Serve a stream of requests that changes its domain, with a frozen draft and with online ones, side by side.

    The caller's draft model is not changed. Ctrl-C keeps what was served.
    """
    from specdec.bench.arms import Settings
    from specdec.bench.environment import environment
    from specdec.bench.online import ARMS, FROZEN, Stream, markdown, stream, summary, write
    from specdec.bench.prompts import load_prompts
    from specdec.bench.report import prepare_folder

    alone("specdec bench-online")
    chosen = [name for name in common.names("--arms", arms) if name != FROZEN]
    for name in chosen:
        common.check_choice("--arms", name, list(ARMS))
    if not chosen:
        raise UsageError(f"--arms {arms!r}: name at least one besides {FROZEN}, of {', '.join(list(ARMS)[1:])}")
    names = common.names("--phases", phases)
    parts = stream(load_prompts(prompts), [name.split("+") for name in names], requests, seed)
    source = common.draft_name(model, draft)
    if source is None:
        raise UsageError(f"--draft-model: {model} brings no draft model; give a folder or hub id")
    if out is not None:
        prepare_folder(out)
    common.quiet()
    target, tokenizer = common.load_model(model), common.load_tokenizer(model)
    small = common.load_model(source, str(target.dtype).removeprefix("torch."), argument="--draft-model")
    options = {"interval": interval, "rate": rate, "train_seconds": train_seconds}
    run = Stream(target, small, tokenizer, chosen, **options)
    settings = Settings(max_new_tokens, temperature)
    console = common.console(stderr=True)
    partial = False
    try:
        with common.progress(console) as progress:
            requested = [(phase, prompt) for phase, group in enumerate(parts) for prompt in group]
            for number, (phase, prompt) in enumerate(requested, start=1):
                run.serve(prompt, phase, settings, seed)
                progress(number, len(requested), names[phase])
    except KeyboardInterrupt:
        partial = True
    if not run.served:
        raise typer.Exit(130)
    result = {
        "partial": partial,
        "requests": len(run.served) // len(run.decoders),
        "arms": {name: summary(run.served, name, names, train_seconds) for name in chosen},
        "settings": {
            **options,
            "model": model,
            "draft_model": source,
            "prompts": prompts,
            "phases": names,
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "seed": seed,
        },
        "environment": environment(target, model),
    }
    if out is not None:
        write(result, run.served, out)
    common.console().print(markdown(result), highlight=False, markup=False)
    if partial:
        console.print("interrupted: the results are partial", highlight=False)
        raise typer.Exit(130)
