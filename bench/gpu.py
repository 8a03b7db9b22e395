"""Steps on this machine's GPU: the tree attention kernel beside stock attention, and a model's steps as CUDA graphs.

``python -m specdec.bench.gpu --out FOLDER`` writes ``gpu.json`` and ``gpu.md``: the kernel's error at real sizes, its
bandwidth over a copy's, the same work through sdpa and flex; then c(N) of a random model of 7 billion parameters, eager
and as graphs, and its plain decoding beside ``generate``. ``--small`` runs small sizes; on a machine without a GPU,
under triton's interpreter (set TRITON_INTERPRET=1), it checks the command and its times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from specdec.bench.arms import DecoderArm, Settings
from specdec.bench.baselines import REFERENCE, baseline
from specdec.bench.environment import commit
from specdec.bench.harness import Harness, grouped
from specdec.bench.statistics import summarise
from specdec.bench.step_times import measure as step_times
from specdec.compiling import Mode
from specdec.decoder import Decoder
from specdec.errors import CompatibilityError, UsageError
from specdec.target import Target
from specdec.tree_attention import reference
from specdec.tree_attention.config import Chip, choose, unavailable
from specdec.tree_attention.decode import tree_attention
from specdec.tree_attention.step import Step

LIMIT = {torch.float32: 2e-6, torch.float16: 5e-3, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Problem:
    """One step of one layer. The default heads are those of an 8-billion-parameter Llama."""

    prefix: int
    columns: int
    rows: int = 1
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    window: int | None = None
    dtype: str = "bfloat16"


@dataclass(frozen=True)
class Inputs:
    """query [B, Hq, C, D], key and value [B, Hkv, prefix + C, D], and the step, in the problem's dtype."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    step: Step


def make(problem: Problem, device: torch.device) -> Inputs:
    """Random numbers, and a random tree: every node but the root hangs under one of the few before it."""
    generator = torch.Generator(device).manual_seed(0)
    c, dtype = problem.columns, getattr(torch, problem.dtype)
    block, depth = torch.eye(c, dtype=torch.bool), torch.zeros(c, dtype=torch.int64)
    host = torch.Generator().manual_seed(0)
    for i in range(1, c):
        parent = int(torch.randint(max(0, i - 8), i, (), generator=host))
        block[i] |= block[parent]
        depth[i] = depth[parent] + 1

    def random(heads: int, columns: int) -> torch.Tensor:
        shape = (problem.rows, heads, columns, problem.dim)
        return torch.randn(shape, dtype=dtype, device=device, generator=generator)

    width = problem.prefix + c
    blocks = block.to(device).expand(problem.rows, -1, -1)
    positions = (problem.prefix + depth).to(device).expand(problem.rows, -1)
    step = Step.build([problem.prefix] * problem.rows, problem.prefix, blocks, positions, problem.window)
    return Inputs(random(problem.heads, c), random(problem.kv_heads, width), random(problem.kv_heads, width), step)


def error(problem: Problem, inputs: Inputs) -> float:
    """Largest difference from the reference in float64, relative to the largest result; row by row to save memory."""
    scale = problem.dim**-0.5
    got = tree_attention(inputs.query, inputs.key, inputs.value, inputs.step, scale=scale).double()
    step, worst = inputs.step, 0.0
    for b in range(problem.rows):
        low = None if step.low is None else step.low[b : b + 1]
        one = Step(step.extent[b : b + 1], step.bits[b : b + 1], low, step.base, step.seen, step.reach)
        query, key, value = (t[b : b + 1].double() for t in (inputs.query, inputs.key, inputs.value))
        want = reference.tree_attention(query, key, value, one, scale=scale)
        worst = max(worst, float((got[b : b + 1] - want).abs().max() / want.abs().max()))
    return worst


def seconds(run: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Median time of ``run``, with nothing of its data left in the chip's second-level cache."""
    run()
    if device.type != "cuda":
        times = []
        for _ in range(repeats):
            before = perf_counter()
            run()
            times.append(perf_counter() - before)
        return statistics.median(times)
    flush = torch.empty(256 * 2**20, dtype=torch.int8, device=device)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        flush.zero_()
        start.record()
        run()
        end.record()
    torch.cuda.synchronize(device)
    return statistics.median(start.elapsed_time(end) / 1000 for start, end in events)


def ceiling(device: torch.device, repeats: int) -> float:
    """Bytes per second of a large copy, reads and writes counted."""
    size = 2**30 if device.type == "cuda" else 2**24
    source = torch.empty(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds(lambda: target.copy_(source), device, repeats)


def arms(problem: Problem, inputs: Inputs, flex: bool) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
    """Ways to do the same work."""
    query, key, value, step = inputs.query, inputs.key, inputs.value, inputs.step
    scale = problem.dim**-0.5
    yield "kernel", lambda: tree_attention(query, key, value, step, scale=scale)
    mask = step.visible()[:, None]  # [B, 1, C, width]
    sdpa = torch.nn.functional.scaled_dot_product_attention
    group = problem.heads // problem.kv_heads

    def repeated() -> torch.Tensor:  # as transformers does under a mask
        k, v = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
        return sdpa(query, k, v, attn_mask=mask, scale=scale)

    yield "sdpa, mask", repeated
    yield "sdpa, mask, enable_gqa", lambda: sdpa(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True)
    if flex:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        dense = step.visible()
        blocks = create_block_mask(
            lambda b, h, q, k: dense[b, q, k],
            problem.rows,
            None,
            problem.columns,
            dense.shape[2],
            device=query.device,
        )
        compiled = torch.compile(flex_attention)
        yield "flex", lambda: compiled(query, key, value, block_mask=blocks, scale=scale, enable_gqa=True)


def measure(problem: Problem, device: torch.device, top: float, repeats: int, flex: bool) -> dict[str, Any]:
    """Error, launch and times of one problem; an arm that fails says why."""
    inputs = make(problem, device)
    group = problem.heads // problem.kv_heads
    size = inputs.query.element_size()
    launch = choose(
        Chip.of(device), problem.rows, problem.kv_heads, group, problem.columns, inputs.step.reach, problem.dim, size
    )
    read = min(problem.prefix, problem.window or problem.prefix) + problem.columns
    moved = 2 * problem.rows * problem.kv_heads * read * problem.dim * size
    times: dict[str, float | str] = {}
    for name, run in arms(problem, inputs, flex):
        try:
            times[name] = seconds(run, device, repeats)
        except Exception as failure:  # a baseline that cannot do this is a finding
            times[name] = f"{type(failure).__name__}: {str(failure).splitlines()[0][:120]}"
    fastest = times["kernel"]
    return {
        "problem": asdict(problem),
        "error": error(problem, inputs),
        "limit": LIMIT[inputs.query.dtype],
        "launch": asdict(launch),
        "bytes": moved,
        "of_copy_bandwidth": moved / fastest / top if isinstance(fastest, float) else None,
        "seconds": times,
    }


def grid(small: bool) -> list[Problem]:
    if small:
        return [
            Problem(60, 4, heads=4, kv_heads=2, dim=32, dtype="float32"),
            Problem(200, 4, rows=2, heads=4, kv_heads=2, dim=32, window=50, dtype="float16"),
        ]
    problems = [Problem(prefix, n) for prefix in (1024, 4096, 16_384, 65_536) for n in (1, 16, 64)]
    problems += [Problem(4096, n, rows=8) for n in (1, 16, 64)]
    problems += [Problem(16_384, 16, window=4096), Problem(16_384, 16, heads=8, kv_heads=4, dim=256)]
    problems += [Problem(4096, 16, dim=80), Problem(4096, 16, dtype="float16"), Problem(4096, 16, dtype="float32")]
    return problems


def random_model(small: bool, device: torch.device) -> PreTrainedModel:
    """Random weights in the shape of Mistral 7B; ``small``: a few thousand of them."""
    shape = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    if small:
        shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    heads = shape["num_attention_heads"] // (2 if small else 4)
    config = LlamaConfig(
        **shape, num_key_value_heads=heads, vocab_size=32000, max_position_embeddings=32768, eos_token_id=None
    )
    torch.manual_seed(0)
    config.dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    with torch.device(device):
        return LlamaForCausalLM(config).to(config.dtype).eval()


def curves(model: PreTrainedModel, prefixes: Sequence[int], seconds: float) -> list[dict[str, Any]]:
    """c(N) after each prefix, eager and as graphs; where there are no graphs, why."""
    found = []
    modes: tuple[Mode, ...] = ("off", "graphs")
    for mode in modes:
        target = Target(model, compile_mode=mode)
        try:
            target.compile()
        except CompatibilityError as error:
            found.append({"mode": mode, "reason": str(error)})
            continue
        found += [{"mode": mode, **step_times(target, prefix, seconds)} for prefix in prefixes]
    return found


def plain_decoding(model: PreTrainedModel, small: bool) -> list[dict[str, Any]]:
    """Rows of the bench's table: ``none``, eager and as graphs where there are any, beside generate."""
    arms: list[Any] = [baseline(REFERENCE, model), DecoderArm("none", Decoder(model))]
    with suppress(CompatibilityError):  # ``curves`` says why
        arms.append(DecoderArm("none, graphs", Decoder(model, compile="graphs")))
    g = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, 32000, (2, 8) if small else (6, 512), generator=g).tolist()
    settings = Settings(4 if small else 128, 0.0)
    groups = grouped([str(i) for i in range(len(prompts))], prompts, 1)
    harness = Harness(model)
    for arm in arms:
        harness.warm_up(arm, groups[0], settings)
    run = harness.run(arms, groups, [settings])
    if run.failure is not None:
        raise run.failure
    names = {arm.name: True for arm in arms}
    return [r.to_json() for r in summarise(run.records, names, dict.fromkeys(names), 1, REFERENCE)]


def step_tables(report: dict[str, Any]) -> list[str]:
    """c(N) and plain decoding, in Markdown."""
    lines = ["", f"Steps of a random model of {report['parameters'] / 1e9:.2f} billion parameters, batch 1, ms (c(N)):"]
    timed = [c for c in report["curves"] if "curve" in c]
    columns = [point["columns"] for point in timed[0]["curve"]]
    lines += ["", "| steps | prefix | " + " | ".join(f"N = {n}" for n in columns) + " |"]
    lines += ["|" + "---|" * (2 + len(columns))]
    for c in timed:
        shown = [f"{1e3 * p['seconds']:.2f} ({p['ratio']:.2f})" for p in c["curve"]]
        name = "eager" if c["mode"] == "off" else c["mode"]
        lines.append("| " + " | ".join([name, str(c["prefix"]), *shown]) + " |")
    lines += ["", *(f"{c['mode']}: {c['reason']}" for c in report["curves"] if "reason" in c)]
    lines += ["", "Plain decoding of the same model after random tokens, greedy, interleaved with hf-generate:", ""]
    lines += ["| method | speed-up | 95 % interval | tokens/s | overhead | same ids |", "|" + "---|" * 6]
    for r in report["decoding"]:
        interval = "-" if r["speedup_ci"] is None else "[{:.2f}, {:.2f}]".format(*r["speedup_ci"])
        overhead = "-" if r["overhead"] is None else f"{r['overhead']:.1%}"
        cells = (r["name"], f"{r['speedup']:.2f}", interval, f"{r['tokens_per_second']:.1f}", overhead)
        lines.append("| " + " | ".join((*cells, f"{r['equal_share']:.0%}")) + " |")
    return lines


def markdown(report: dict[str, Any]) -> str:
    """The report as tables; the kernel's times in microseconds."""
    e = report["environment"]
    arms = ["kernel", "sdpa, mask", "sdpa, mask, enable_gqa", "flex"]
    lines = [
        f"Tree attention on {e['device']}: torch {e['packages']['torch']}, triton {e['packages']['triton']}, commit "
        f"{e['commit']}, {e['date']}. A copy moves {report['copy_bytes_per_second'] / 1e9:.0f} GB/s.",
        "",
        "| rows | prefix | N | heads | D | window | dtype | error | splits | of copy | "
        + " | ".join(f"{a}, us" for a in arms)
        + " |",
        "|" + "---|" * (10 + len(arms)),
    ]
    for r in report["results"]:
        p, times = r["problem"], r["seconds"]
        shown = [f"{1e6 * t:.1f}" if isinstance(t := times.get(a), float) else "-" for a in arms]
        share = "-" if r["of_copy_bandwidth"] is None else f"{r['of_copy_bandwidth']:.0%}"
        cells = (p["rows"], p["prefix"], p["columns"], f"{p['heads']}/{p['kv_heads']}", p["dim"], p["window"] or "-")
        tail = (p["dtype"], f"{r['error']:.1e}", r["launch"]["splits"], share, *shown)
        lines.append("| " + " | ".join(map(str, cells + tail)) + " |")
    failed = {f"{a}: {t}" for r in report["results"] for a, t in r["seconds"].items() if isinstance(t, str)}
    lines += ["", *sorted(failed)] if failed else []
    return "\n".join([*lines, *step_tables(report)]) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """0 when every result is within its limit, else 1."""
    parser = argparse.ArgumentParser(prog="python -m specdec.bench.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json and gpu.md")
    parser.add_argument("--small", action="store_true", help="small sizes")
    parser.add_argument("--repeats", type=int, default=30)
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reason = unavailable(device)
    if reason is not None:
        raise UsageError(f"no kernel to measure: {reason}; set TRITON_INTERPRET=1 and --small to try the command")
    repeats = 1 if device.type == "cpu" else options.repeats
    top = ceiling(device, repeats)
    with torch.inference_mode():
        results = [measure(p, device, top, repeats, flex=device.type == "cuda") for p in grid(options.small)]
    model = random_model(options.small, device)
    report = {
        "environment": {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": " ".join(["python -m specdec.bench.gpu", *(arguments or sys.argv[1:])]),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu, interpreted",
            "packages": {name: _version(name) for name in ("specdec", "torch", "triton")},
            "python": platform.python_version(),
            "commit": commit(),
        },
        "copy_bytes_per_second": top,
        "results": results,
        "parameters": model.num_parameters(),
        "curves": curves(model, [20] if options.small else [1024, 8192], 0.0 if options.small else 15.0),
        "decoding": plain_decoding(model, options.small),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "gpu.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (options.out / "gpu.md").write_text(markdown(report), encoding="utf-8")
    print(markdown(report))
    wrong = [r for r in results if not r["error"] < r["limit"]]
    for r in wrong:
        print(f"WRONG: error {r['error']:.2g} above {r['limit']:.0e} for {r['problem']}")
    return 1 if wrong else 0


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
