"""`specdec report`: one page of everything that was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from specdec.cli import common
from specdec.errors import UsageError


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of results; folders in it are searched too.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for report.html, report.md and the figures; DIR/report.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Look at the page in a browser (Chromium or Chrome), and keep screenshots.")
    ] = False,
) -> None:
    """Show what bench, spec-bench, verify, tune, pareto, bench-online, doctor --json and train wrote below DIR.

    One HTML page that needs nothing else, the same as Markdown, and every figure as PNG and SVG. Exits with 1 when
    --check finds something wrong.
    """
    folder = folder.expanduser()
    out = folder / "report" if out is None else out.expanduser()
    try:
        from specdec.bench.page.discover import discover
        from specdec.bench.page.render import write
    except ModuleNotFoundError as error:
        if error.name not in ("jinja2", "markupsafe", "matplotlib"):
            raise
        raise UsageError(
            f"specdec report needs {error.name}: install it with `pip install 'specdec[bench]'`"
        ) from error
    from specdec.bench.page import browser
    from specdec.bench.report import prepare_folder

    console = common.console(stderr=True)
    sections, unknown = discover(folder, out)
    prepare_folder(out)
    with common.progress(console) as progress:
        try:
            written = write(sections, unknown, folder.resolve().name, out, progress)
        except OSError as error:
            raise UsageError(f"--out {out}: could not be written ({error.strerror})") from error
    typer.echo(written[0])
    figures = sum(len(section.pictures) for section in sections)
    said = f"{len(sections)} results, {figures} figures; report.md and the figures lie beside it"
    console.print(said, highlight=False, markup=False)
    if not check:
        return
    problems, shots = browser.check(written[0])
    for problem in problems:
        console.print(f"check: {problem}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"screenshots: {', '.join(map(str, shots))}", highlight=False, markup=False, soft_wrap=True)
    if problems:
        raise typer.Exit(1)
