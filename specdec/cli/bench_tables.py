"""`specdec bench-tables`: what drafters cost by themselves."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from specdec.cli import common
from specdec.errors import UsageError

if TYPE_CHECKING:
    from specdec.bench.tables import Measured

_HEADERS = (
    "drafter",
    "V",
    "size",
    "nodes",
    "propose us, median / p99",
    "observe us, median / p99",
    "top-k us",
    "first step us",
    "table MB",
    "memory MB",
    "of a step",
)
_FOOTNOTE = (
    "Made-up text, real trees. propose, observe: per step, observe without top-k over the logits, which stands apart. "
    "nodes: mean columns per step. first step: begin, propose and observe where a request of 256 prompt tokens starts. "
    "memory: growth of the process. of a step: medians of propose and observe over one token of plain decoding with "
    "the embedded model, measured beside them."
)


def bench_tables(
    drafters: Annotated[
        str | None, typer.Option(help="Comma list, or LABEL=DRAFTER; without it all that run without a model.")
    ] = None,
    set_: common.Settings = None,
    vocab: Annotated[str, typer.Option(help="Sizes of the vocabulary, comma list.")] = "8192,32768,131072,151936",
    size: Annotated[str, typer.Option(help="Tree sizes, for drafters that have the option.")] = "8,16,32,64,128",
    steps: Annotated[int, typer.Option(min=1, help="Steps per row of the table.")] = 2000,
    words: Annotated[
        int | None,
        typer.Option(min=8, help="Different words of the made-up text; few make full trees. None: all."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the made-up text.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder for tables.json and tables.md.")] = None,
    json_: Annotated[
        bool, typer.Option("--json", help="JSON on standard output, the table on standard error.")
    ] = False,
) -> None:
    """Time drafters without a model, on made-up text: per step, per vocabulary, per tree size.

    Drafters that read hidden states or bring a model are left out. A drafter stops where drafting does not pay; to see
    trees of the full size, give --set DRAFTER.min_prob=0 where it has that option. Ctrl-C shows what was measured.
    """
    vocabularies, sizes = _numbers("--vocab", vocab, 64), _numbers("--size", size, 1)

    from specdec import registry
    from specdec.bench.environment import environment
    from specdec.bench.report import prepare_folder
    from specdec.bench.tables import NeedsModel, PlainStep, measure, why_not

    skipped: dict[str, str] = {}

    def skip(label: str, reason: str) -> None:
        if drafters:
            raise UsageError(f"--drafters {label}: {reason}, so it cannot be timed without a model; leave it out")
        skipped[label] = reason

    labels = common.labels("--drafters", drafters) or _loadable(skipped)
    for label, name in list(labels.items()):
        reason = why_not(registry.drafter_class(name))
        if reason:
            del labels[label]
            skip(label, reason)
    choices = common.choose(labels, set_, "--drafters")
    if out is not None:
        prepare_folder(out)
    jobs: list[tuple[common.Choice, int, int | None]] = []
    for choice in choices:
        sized = "size" in registry.options(registry.drafter_class(choice.drafter))
        chosen: Sequence[int | None] = sizes if sized and "size" not in choice.options else [choice.options.get("size")]
        jobs += [(choice, v, s) for v in vocabularies for s in chosen]
    common.quiet()
    rows: list[Measured] = []
    partial = False
    with common.json_only(json_) as stdout:
        console = common.console(stderr=True)
        model = common.load_model("tiny", device="cpu")
        plain = PlainStep(model)
        try:
            with common.progress(console) as progress:
                for i, (choice, v, s) in enumerate(jobs):
                    progress(i, len(jobs), f"{choice.label}, V {v}, size {s or 'default'}")
                    if choice.label in skipped:
                        continue
                    sized_choice = choice if s is None else choice.with_options(size=s)
                    try:
                        rows.append(measure(choice.label, sized_choice.make, v, s, steps, plain.seconds(), seed, words))
                    except NeedsModel as error:
                        skip(choice.label, str(error))
        except KeyboardInterrupt:
            partial = True
        result: dict[str, Any] = {
            "partial": partial,
            "rows": [row.to_json() for row in rows],
            "skipped": skipped,
            "settings": {
                "drafters": {c.label: {"drafter": c.drafter, "options": c.options} for c in choices},
                "vocab": vocabularies,
                "words": words,
                "size": sizes,
                "steps": steps,
                "seed": seed,
            },
            "environment": environment(model, "tiny"),
        }
        notes = [str(c) for c in choices if c.options or c.label != c.drafter]
        notes += [f"{label} left out: {reason}" for label, reason in skipped.items()]
        if out is not None:
            _replace(out / "tables.json", json.dumps(result, indent=1, allow_nan=False) + "\n")
            _replace(out / "tables.md", _markdown(result, rows, notes))
        _show(rows, notes, console if json_ else common.console())
        if json_:
            stdout.write(json.dumps(result, allow_nan=False) + "\n")
    if partial:
        console.print("interrupted: the results are partial", highlight=False)
        raise typer.Exit(130)


def _numbers(option: str, text: str, least: int) -> list[int]:
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or min(values) < least:
        raise UsageError(f"{option} {text!r}: give a whole number from {least} up, or a comma list of them")
    return list(dict.fromkeys(values))


def _loadable(skipped: dict[str, str]) -> dict[str, str]:
    """Every drafter; one that cannot be imported is noted in ``skipped``."""
    from specdec import registry

    names = {}
    for name in registry.drafter_names():
        try:
            registry.drafter_class(name)
        except Exception as error:  # another package's entry point must not stop the rest
            skipped[name] = f"it cannot be loaded ({type(error).__name__})"
        else:
            names[name] = name
    return names


def _cells(row: Measured) -> tuple[str, ...]:
    def megabytes(count: int | None) -> str:
        return "-" if count is None else f"{count / 1e6:.1f}"

    return (
        row.label,
        str(row.vocab_size),
        "-" if row.size is None else str(row.size),
        f"{row.nodes:.1f}",
        "{:.0f} / {:.0f}".format(*row.propose),
        "{:.0f} / {:.0f}".format(*row.observe),
        f"{row.top:.0f}",
        f"{row.first:.0f}",
        megabytes(row.table_bytes),
        megabytes(row.resident_bytes),
        f"{row.share:.1%}",
    )


def _show(rows: Sequence[Measured], notes: Sequence[str], console: Any) -> None:
    table = Table()
    for i, header in enumerate(_HEADERS):
        table.add_column(header, justify="right" if i else "left", no_wrap=bool(i))
    for row in rows:
        table.add_row(*_cells(row))
    console.print(table)
    console.print(_FOOTNOTE, style="dim", highlight=False)
    for note in notes:
        console.print(f"note: {note}", highlight=False, markup=False)


def _markdown(result: dict[str, Any], rows: Sequence[Measured], notes: Sequence[str]) -> str:
    lines = [_HEADERS, ("---", *["---:"] * (len(_HEADERS) - 1)), *map(_cells, rows)]
    e = result["environment"]
    where = f"{e['cpu']}, {e['torch_threads']} threads; {e['date']}; `{e['command']}`"
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return "\n\n".join([table, _FOOTNOTE, where, *(f"- {note}" for note in notes)]) + "\n"


def _replace(file: Path, text: str) -> None:
    """Write a file whole or not at all."""
    part = file.with_name(f".{file.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, file)
