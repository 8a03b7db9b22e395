"""`specdec doctor`: what can be decoded faster here, and what a step costs."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from specdec.cli import common
from specdec.errors import CompatibilityError

if TYPE_CHECKING:
    from specdec.target import Target

COLUMNS = (1, 2, 4, 8, 16, 32, 64)


def doctor(
    model: common.Model = "tiny",
    prefix: Annotated[int, typer.Option(min=1, help="Cached tokens before the timed step.")] = 256,
    seconds: Annotated[float, typer.Option(min=0.0, help="About how long to measure.")] = 15.0,
    dtype: common.Dtype = "auto",
    device: common.Device = "auto",
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Tell what a model allows (trees, chains, nothing, and why) and what N columns cost on this machine."""
    common.check_loading(dtype, device)
    common.quiet()

    from specdec.bench.environment import environment
    from specdec.target import Target

    with common.json_only(json_) as out:
        loaded = common.load_model(model, dtype, device)
        report: dict[str, Any] = {"model": model, "context": common.context_of(loaded), "curve": []}
        try:
            target = Target(loaded)
        except CompatibilityError as error:
            report |= {"tier": "none", "reason": str(error)}
        else:
            report |= {"tier": target.capability.tier, "reason": target.capability.reason}
            report |= {"tree_attention": "kernel" if target.uses_kernel else target.attention}
            report |= {"kernel": target.capability.stock or "used", "placement": target.placement or "one device"}
            report |= measure(target, prefix, seconds)
        report["environment"] = environment(loaded, model)
        if json_:
            out.write(json.dumps(report, allow_nan=False) + "\n")
            return
    _show(report)


def measure(target: Target, prefix: int, seconds: float) -> dict[str, Any]:
    """c(N) = t(N) / t(1): a step of N columns after ``prefix`` cached tokens, against a step of one.

    Args:
        target: the model.
        prefix: cached tokens; fewer where the context is short.
        seconds: stop starting rounds after this time; at least 3 are made, at most 41.

    Returns:
        "prefix", "rounds" and "curve": one object per N with "columns", "seconds" (median) and "ratio" c(N).
    """
    import numpy as np

    from specdec.tree import DraftTree, Proposal

    if target.context is not None:
        prefix = max(min(prefix, target.context - COLUMNS[-1] - 1), 1)
    tokens = np.arange(3, prefix + 4) % target.vocab_size  # the last one is the root
    proposals = {n: Proposal(DraftTree.chain(int(tokens[-1]), [5] * (n - 1))) for n in COLUMNS}
    times: dict[int, list[float]] = {n: [] for n in COLUMNS}
    with target.session():
        target.open([0], prefix + COLUMNS[-1] + 1)
        first = target.step([tokens[:-1]], [Proposal(DraftTree.root(int(tokens[-2])))])
        target.commit(first, [[]])
        start = perf_counter()
        for n in COLUMNS:
            _step(target, tokens, proposals[n])  # warm-up
        while len(times[1]) < 3 or (perf_counter() - start < seconds and len(times[1]) < 41):
            for n in COLUMNS:  # interleaved, so that a slow moment hits every N
                times[n].append(_step(target, tokens, proposals[n]))
    median = {n: statistics.median(t) for n, t in times.items()}
    curve = [{"columns": n, "seconds": s, "ratio": s / median[1]} for n, s in median.items()]
    return {"prefix": prefix, "rounds": len(times[1]), "curve": curve}


def _step(target: Target, tokens: Any, proposal: Any) -> float:
    """Seconds of one step, which is undone afterwards."""
    import torch

    before = target.lengths
    start = perf_counter()
    output = target.step([tokens], [proposal])
    if target.device.type == "cuda":
        torch.cuda.synchronize(target.device)
    elapsed = perf_counter() - start
    target.commit(output, [[]])
    target.truncate(before)
    return elapsed


def _show(report: dict[str, Any]) -> None:
    console = common.console()
    e = report["environment"]
    facts: Sequence[tuple[str, Any]] = (
        ("model", f"{report['model']} ({e['architecture']}, {e['parameters'] / 1e6:.1f} M parameters)"),
        ("tier", f"{report['tier']}: {report['reason']}"),
        ("dtype", e["dtype"]),
        ("attention", e["attention"] + (f", trees: {report['tree_attention']}" if "tree_attention" in report else "")),
        ("kernel", report.get("kernel", "not used")),
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
