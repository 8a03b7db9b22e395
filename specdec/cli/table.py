"""`specdec table`: tables that drafters learn from text, made ahead of time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Annotated

import typer
from rich.table import Table

from specdec.cli import common
from specdec.errors import UsageError

END = "<|endoftext|>"

table_app = typer.Typer(help="Build, inspect and merge the tables that drafters learn from text.", no_args_is_help=True)

Out = Annotated[Path, typer.Option(help="File to write, in a folder that exists.")]


@table_app.callback()
def table() -> None:
    """Build, inspect and merge the tables that drafters learn from text."""


@table_app.command("build")
def build(
    drafter: Annotated[str, typer.Option(help="Whose table (`specdec list`), e.g. token-recycling.")],
    corpus: Annotated[
        Path,
        typer.Option(
            help=f"A .txt file (a line {END} ends a document; without one the file is one document), a .jsonl file "
            "(--field), or a folder of such files."
        ),
    ],
    out: Out,
    model: common.Model = "tiny",
    field: Annotated[str, typer.Option(help="Key of the text in .jsonl lines.")] = "text",
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many documents.")] = None,
    set_: common.Settings = None,
    dtype: common.Dtype = "auto",
    device: common.Device = "auto",
) -> None:
    """Let a drafter learn from documents and save its table; use it with --set DRAFTER.table=FILE.

    Ctrl-C saves nothing.
    """
    common.check_loading(dtype, device)

    import numpy as np

    from specdec.decoder import Decoder

    # everything that can be wrong is checked before anything slow starts
    _check_keeps_table(drafter)
    (choice,) = common.choose({drafter: drafter}, set_, "--drafter")
    _check_out(out)
    count = sum(1 for _ in islice(documents(corpus, field), limit))
    if not count:
        raise UsageError(f"--corpus {corpus}: there is no text in it; give at least one document")
    common.quiet()
    tokenizer = common.load_tokenizer(model)

    def encoded() -> Iterator[list[int]]:
        for text in islice(documents(corpus, field), limit):
            yield tokenizer(text, verbose=False).input_ids

    if not any(encoded()):
        raise UsageError(f"--corpus {corpus}: the tokenizer of {model} makes no token of any document")
    target = common.load_model(model, dtype, device)
    learner = Decoder(target, choice.make(), tokenizer=tokenizer).drafter
    console, start, done, tokens = common.console(stderr=True), perf_counter(), 0, 0
    try:
        with common.progress(console) as progress:
            progress(0, count, f"{count} documents")
            for ids in encoded():
                if ids:
                    learner.learn(np.array(ids, dtype=np.int64))  # type: ignore[attr-defined]
                done, tokens = done + 1, tokens + len(ids)
                progress(done, count, f"{tokens} tokens")
        learner.save(out)  # type: ignore[attr-defined]
    except KeyboardInterrupt:
        console.print(f"interrupted after {done} of {count} documents: nothing was saved", highlight=False)
        raise typer.Exit(130) from None
    seconds = perf_counter() - start
    _show([*_facts(out), ("documents", str(done)), ("tokens", str(tokens)), ("seconds", f"{seconds:.1f}")])


@table_app.command("info")
def info(
    file: Annotated[Path, typer.Argument(help="A table file.")],
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Tell whose table a file is, for which tokenizer, and how large."""
    from specdec.tables import store

    header = store.header(file)
    if json_:
        keys = ("kind", "vocab_size", "fingerprint", "facts", "shapes")
        found = {"file": str(file), "bytes": file.stat().st_size, **{key: header[key] for key in keys}}
        typer.echo(json.dumps(found, indent=1))
        return
    _show(_facts(file))


@table_app.command("merge")
def merge(
    files: Annotated[list[Path], typer.Argument(metavar="FILE FILE...", help="Tables of one drafter and tokenizer.")],
    out: Out,
    model: Annotated[str, typer.Option(help="The model they were made for.")] = "tiny",
    set_: common.Settings = None,
    dtype: common.Dtype = "auto",
    device: common.Device = "auto",
) -> None:
    """Put several tables of one drafter into one; where two of them disagree, earlier files come first."""
    common.check_loading(dtype, device)

    from specdec import registry
    from specdec.decoder import Decoder
    from specdec.tables import store

    if len(files) < 2:
        raise UsageError(f"{files[0]}: one file is nothing to merge; give two or more")
    headers = [store.header(file) for file in files]
    kind = headers[0]["kind"]
    _check_keeps_table(kind)
    known = registry.options(registry.drafter_class(kind))
    # a table only fits the options it was made with, and carries them among its facts
    options = {name: value for name, value in headers[0]["facts"].items() if name in known}
    for file, header in zip(files, headers, strict=True):
        for key, what in (("kind", "drafter"), ("fingerprint", "tokenizer"), ("vocab_size", "vocabulary")):
            if header[key] != headers[0][key]:
                raise UsageError(
                    f"{file}: of another {what} ({header[key]}) than {files[0]} ({headers[0][key]}); merge tables that "
                    "were made alike"
                )
        for name, value in options.items():
            if header["facts"].get(name) != value:
                raise UsageError(
                    f"{file}: made with {name}={header['facts'].get(name)}, but {files[0]} with {name}={value}; merge "
                    "tables that were made alike"
                )
    _check_out(out)
    (choice,) = common.choose({kind: kind}, set_, "the files' drafter")
    choice = common.Choice(kind, kind, {**options, **choice.options, "table": files[0]})
    common.quiet()
    tokenizer = common.load_tokenizer(model, "--model")
    if store.fingerprint(tokenizer) != headers[0]["fingerprint"]:
        raise UsageError(f"--model {model}: its tokenizer is not the one {files[0]} was made with")
    target = common.load_model(model, dtype, device, "--model")
    drafter = Decoder(target, choice.make(), tokenizer=tokenizer).drafter
    for file in files[1:]:
        drafter.merge(file)  # type: ignore[attr-defined]
    drafter.save(out)  # type: ignore[attr-defined]
    _show(_facts(out))


def documents(corpus: Path, field: str) -> Iterator[str]:
    """Texts of a corpus in the order of its files, blank ones left out.

    Args:
        corpus: .txt, .jsonl, or a folder of such files (at any depth).
        field: key of the text in .jsonl lines.

    Raises:
        UsageError: no such file, none of these kinds, or the line that is malformed.
    """
    readers = {".txt": _plain, ".jsonl": _objects}
    corpus = corpus.expanduser()
    if corpus.is_dir():
        files = sorted(f for f in corpus.rglob("*") if f.suffix in readers and f.is_file())
        if not files:
            raise UsageError(f"--corpus {corpus}: no .txt or .jsonl file in this folder")
    elif not corpus.exists():
        raise UsageError(f"--corpus {corpus}: no such file; give a .txt file, a .jsonl file or a folder of them")
    elif corpus.suffix not in readers:
        raise UsageError(f"--corpus {corpus}: neither .txt nor .jsonl nor a folder; rename it to what it is")
    else:
        files = [corpus]
    for file in files:
        try:
            with file.open(encoding="utf-8") as lines:
                yield from (text for text in readers[file.suffix](lines, file, field) if text.strip())
        except UnicodeDecodeError as error:
            raise UsageError(f"--corpus {file}: not UTF-8 text; save the file as UTF-8") from error
        except OSError as error:
            raise UsageError(f"--corpus {file}: {error.strerror}; give files that can be read") from error


def _plain(lines: Iterator[str], file: Path, field: str) -> Iterator[str]:
    document: list[str] = []
    for line in lines:
        if line.strip() == END:
            yield "".join(document)
            document = []
        else:
            document.append(line)
    yield "".join(document)


def _objects(lines: Iterator[str], file: Path, field: str) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise UsageError(f"--corpus {file}:{number}: not JSON ({error}); write one object per line") from error
        text = entry.get(field) if isinstance(entry, dict) else None
        if not isinstance(text, str):
            have = f"keys: {', '.join(entry) or 'none'}" if isinstance(entry, dict) else f"a {type(entry).__name__}"
            raise UsageError(f"--corpus {file}:{number}: no text under {field!r} ({have}); name the key with --field")
        yield text


def _check_keeps_table(drafter: str) -> None:
    from specdec import registry
    from specdec.tables import TableDrafter

    if not issubclass(registry.drafter_class(drafter), TableDrafter):
        keepers = filter(_keeps_table, registry.drafter_names())
        raise UsageError(f"--drafter {drafter}: it keeps no table; these do: {', '.join(keepers)}")


def _keeps_table(name: str) -> bool:
    from specdec import registry
    from specdec.tables import TableDrafter

    try:
        return issubclass(registry.drafter_class(name), TableDrafter)
    except Exception:  # another package's drafter that cannot be imported
        return False


def _check_out(out: Path) -> None:
    """Find out before an hour of reading, not after it."""
    folder = out.parent
    if out.is_dir():
        raise UsageError(f"--out {out}: this is a folder; name a file in it")
    if not folder.is_dir():
        raise UsageError(f"--out {out}: there is no folder {folder}; make it, or give another")
    if not os.access(folder, os.W_OK):
        raise UsageError(f"--out {out}: cannot write in {folder}; give a folder you own")


def _facts(file: Path) -> list[tuple[str, str]]:
    from specdec.tables import store

    header = store.header(file)
    facts = [
        ("file", str(file)),
        ("bytes", f"{file.stat().st_size:,}"),
        ("drafter", header["kind"]),
        ("tokenizer", f"{header['fingerprint'][:16]}, {header['vocab_size']} ids"),
    ]
    facts += [(name, json.dumps(value)) for name, value in header["facts"].items()]
    return facts + [(f"array {name}", " x ".join(map(str, shape))) for name, shape in header["shapes"].items()]


def _show(facts: Sequence[tuple[str, str]]) -> None:
    shown = Table(show_header=False, box=None)
    for name, value in facts:
        shown.add_row(name, value)
    common.console().print(shown, highlight=False)
