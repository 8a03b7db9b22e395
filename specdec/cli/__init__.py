"""The command line. torch and transformers are imported inside commands, so that help answers at once."""

from __future__ import annotations

import sys
from typing import Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from specdec.cli import (  # noqa: F401 - they add commands to train_app
    train_heads,
    train_images,
    train_joint,
    train_judge,
    train_lexical_units,
    train_sorted,
)
from specdec.cli.bench import bench
from specdec.cli.bench_online import bench_online
from specdec.cli.bench_tables import bench_tables
from specdec.cli.codebook import codebook
from specdec.cli.common import one_line
from specdec.cli.distill import distill
from specdec.cli.doctor import doctor
from specdec.cli.export import export
from specdec.cli.generate import generate
from specdec.cli.grow import grow
from specdec.cli.listing import list_methods
from specdec.cli.pareto import pareto
from specdec.cli.recipe import recipe
from specdec.cli.report import report
from specdec.cli.spec_bench import spec_bench_app
from specdec.cli.table import table_app
from specdec.cli.train import train_app
from specdec.cli.tune import tune
from specdec.cli.verify import verify


class Commands(TyperGroup):
    """Turns every mistake a user can mend into one line on standard error and exit code 2."""

    def main(self, args: Any = None, *, standalone_mode: bool = True, **more: Any) -> Any:  # type: ignore[override]
        if not standalone_mode:
            return super().main(args, standalone_mode=False, **more)
        args = (sys.argv[1:] if args is None else list(args)) or ["--help"]
        try:
            code = super().main(args, standalone_mode=False, **more)
        except KeyboardInterrupt:
            code = 130
        except Exception as error:
            if isinstance(error, typer.Abort):  # what older typer makes of Ctrl-C
                sys.exit(130)
            line = one_line(error)
            if line is None:
                raise
            Console(stderr=True, soft_wrap=True).print(f"error: {line}", highlight=False, markup=False)
            code = 2
        sys.exit(code if isinstance(code, int) else 0)


app = typer.Typer(
    cls=Commands,
    help="Speculative and parallel decoding for Hugging Face causal LMs: the same text, faster.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("generate")(generate)
app.command("bench")(bench)
app.command("bench-tables")(bench_tables)
app.command("bench-online")(bench_online)
app.command("verify")(verify)
app.command("tune")(tune)
app.command("pareto")(pareto)
app.command("report")(report)
app.command("distill")(distill)
app.command("export")(export)
app.command("grow")(grow)
app.command("codebook")(codebook)
app.command("recipe")(recipe)
app.command("doctor")(doctor)
app.command("list")(list_methods)
app.add_typer(spec_bench_app, name="spec-bench")
app.add_typer(table_app, name="table")
app.add_typer(train_app, name="train")


@app.callback()
def specdec() -> None:
    """Speculative and parallel decoding for Hugging Face causal LMs: the same text, faster."""
