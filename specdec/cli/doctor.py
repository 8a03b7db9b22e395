"""`specdec doctor`: what can be decoded faster here, and what a step costs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.table import Table

from specdec.cli import common
from specdec.errors import CompatibilityError


def doctor(
    model: common.Model = "tiny",
    prefix: Annotated[int, typer.Option(min=1, help="Cached tokens before the timed step.")] = 256,
    seconds: Annotated[float, typer.Option(min=0.0, help="About how long to measure.")] = 15.0,
    compile_: common.Compile = "off",
    dtype: common.Dtype = "auto",
    device: common.Device = "auto",
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Tell what a model allows (trees, chains, nothing, and why) and what N columns cost on this machine."""
    common.check_loading(dtype, device, compile_)
    common.quiet()

    from specdec.bench.environment import environment
    from specdec.bench.step_times import measure
    from specdec.target import Target

    with common.json_only(json_) as out:
        loaded = common.load_model(model, dtype, device)
        report: dict[str, Any] = {"model": model, "context": common.context_of(loaded), "curve": []}
        try:
            target = Target(loaded, compile_mode=compile_)  # type: ignore[arg-type]
        except CompatibilityError as error:
            report |= {"tier": "none", "reason": str(error)}
        else:
            report |= {"tier": target.capability.tier, "reason": target.capability.reason}
            report |= {"tree_attention": "kernel" if target.uses_kernel else target.attention}
            report |= {"kernel": target.capability.stock or "used", "placement": target.placement or "one device"}
            target.compile()
            report |= {"compiled": str(target.compilation)}
            report |= measure(target, prefix, seconds)
        report["environment"] = environment(loaded, model)
        if json_:
            out.write(json.dumps(report, allow_nan=False) + "\n")
            return
    _show(report)


def _show(report: dict[str, Any]) -> None:
    console = common.console()
    e = report["environment"]
    facts: Sequence[tuple[str, Any]] = (
        ("model", f"{report['model']} ({e['architecture']}, {e['parameters'] / 1e6:.1f} M parameters)"),
        ("tier", f"{report['tier']}: {report['reason']}"),
        ("dtype", e["dtype"]),
        ("attention", e["attention"] + (f", trees: {report['tree_attention']}" if "tree_attention" in report else "")),
        ("kernel", report.get("kernel", "not used")),
        ("compiled steps", report.get("compiled", "off")),
        ("context", report["context"] or "no stated limit"),
        ("device", f"{e['gpu'] or e['cpu']}, {e['torch_threads']} threads"),
        ("placement", report.get("placement", "not looked at")),
    )
    table = Table(show_header=False, box=None)
    for name, value in facts:
        table.add_row(name, str(value))
    console.print(table)
    if not report["curve"]:
        return
    console.print(
        f"\na step of N columns after {report['prefix']} tokens, median of {report['rounds']}", highlight=False
    )
    table = Table()
    for header in ("N", "ms", "c(N) = break-even MAT"):
        table.add_column(header, justify="right")
    for point in report["curve"]:
        table.add_row(str(point["columns"]), f"{1000 * point['seconds']:.2f}", f"{point['ratio']:.2f}")
    console.print(table)
    console.print(
        "A draft of N columns pays when it yields more than c(N) tokens per step (MAT), drafting costs aside.",
        style="dim",
        highlight=False,
    )
