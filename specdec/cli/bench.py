"""`specdec bench`: which method is fastest here, by how much, and whose text it is."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specdec.cli import against as remote
from specdec.cli import common
from specdec.errors import UsageError
from specdec.processes import gathering, this_process

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from specdec.bench.arms import Arm, Settings
    from specdec.bench.harness import Group, Harness
    from specdec.bench.statistics import Record

DRAFTERS = ("none", "prompt-lookup", "token-recycling", "aded", "suffix", "hybrid", "draft-model")


def bench(
    model: common.Model = "tiny",
    drafters: Annotated[
        str | None,
        typer.Option(
            help=f"Comma list (`specdec list`); without it {', '.join(DRAFTERS)} and the "
            "heads that `tiny` brings. LABEL=DRAFTER names a row, so that a "
            "drafter can run twice with different --set LABEL.OPTION=VALUE."
        ),
    ] = None,
    set_: common.Settings = None,
    baselines: Annotated[
        str | None,
        typer.Option(
            help="Comma list; without it hf-generate, hf-prompt-lookup, hf-assisted. On request hf-generate-compiled, "
            "which compiles for a while first, and hf-early-exit, for checkpoints trained for it."
        ),
    ] = None,
    against: remote.Against = None,
    server_timeout: remote.ServerTimeout = 600.0,
    verifier: Annotated[str, typer.Option(help="Who decides which drafted tokens to keep.")] = "standard",
    draft: common.Draft = None,
    prompts: Annotated[
        str,
        typer.Option(
            help='`embedded`, `tasks`, a .jsonl file of {"prompt": ...}, or a text file, one prompt per line.'
        ),
    ] = "embedded",
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many prompts.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens per prompt.")] = 128,
    temperature: Annotated[str, typer.Option(help="0 is greedy; a comma list (0,1) makes a table each.")] = "0",
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts decoded together.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Times per prompt; the median counts.")] = 1,
    warm: Annotated[
        bool, typer.Option("--warm", help="Let learning drafters keep what earlier prompts taught.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the order of the methods, and of sampling.")] = 0,
    compile_: common.Compile = "off",
    dtype: common.Dtype = "auto",
    device: common.Device = "auto",
    out: Annotated[
        Path | None, typer.Option(help="Folder for results.json, records.jsonl, results.md and speedup.png.")
    ] = None,
    json_: Annotated[
        bool, typer.Option("--json", help="JSON on standard output, the table on standard error.")
    ] = False,
) -> None:
    """Compare drafters with transformers' own methods, interleaved in one run, with intervals.

    Learning drafters forget before every prompt unless --warm; one that was given a table file (--set
    DRAFTER.table=FILE) goes back to that file. Ctrl-C keeps what was measured, marked as partial.

    Under `accelerate launch -m specdec bench ...` or torchrun, processes share the prompts, and the first reports.
    """
    temperatures = _temperatures(temperature)
    common.check_loading(dtype, device, compile_)
    if warm and repeats > 1:
        raise UsageError(f"--warm with --repeats {repeats}: a repeated prompt is no longer new; use --repeats 1")

    from specdec import registry, zoo
    from specdec.bench.arms import STATES, Settings
    from specdec.bench.baselines import BASELINES, DEFAULTS, ONE_ROW_ONLY, REFERENCE
    from specdec.bench.environment import environment
    from specdec.bench.grow import grown_note
    from specdec.bench.harness import Harness, grouped
    from specdec.bench.prompts import encode, load_prompts
    from specdec.bench.report import Report, cautions, prepare_folder, show, write
    from specdec.bench.statistics import summarise

    # everything that can be wrong is checked before anything slow starts
    rule, others = common.verifier_options(verifier, set_, model)
    labels = common.labels("--drafters", drafters, {*BASELINES, *registry.verifier_names()})
    labels = labels or {name: name for name in (*DRAFTERS, *zoo.heads(model))}
    choices = {c.label: c for c in common.choose(labels, others, "--drafters", model)}
    chosen = list(choices)
    peers = common.names("--baselines", baselines) or list(DEFAULTS)
    for name in peers:
        common.check_choice("--baselines", name, BASELINES)
    peers = list(dict.fromkeys([REFERENCE, *peers]))
    servers = remote.servers(against, {*BASELINES, *choices})
    if servers and batch_size > 1:
        raise UsageError(f"--against with --batch-size {batch_size}: a server gets one prompt at a time; leave one out")
    if out is not None:
        prepare_folder(out)
    texts = load_prompts(prompts, limit)
    explicit_draft, draft = draft, common.draft_name(model, draft)
    notes: list[str] = []
    explicit = {*(chosen if drafters else ()), *(peers if baselines else ())}

    def leave_out(name: str, names: list[str], reason: str) -> None:
        if name in names:
            if name in explicit:
                raise UsageError(f"{name}: {reason}")
            names.remove(name)
            notes.append(f"{name} left out: {reason}")

    drafting = {label for label, choice in choices.items() if choice.takes_draft(explicit_draft)}
    if draft is None:
        reason = f"it needs --draft-model FOLDER or ID, {model} brings no draft model"
        for label in drafting:
            leave_out(label, chosen, reason)
        leave_out("hf-assisted", peers, reason)
    if batch_size > 1:
        for name in ONE_ROW_ONLY:
            leave_out(name, peers, f"transformers runs it at batch size 1 only, not {batch_size}")

    process = this_process()
    common.quiet()
    with common.json_only(json_) as stdout, gathering(process) as gather:
        console = common.console(stderr=True)
        console.quiet = not process.first  # errors are still said
        place = process.place(device)
        target, tokenizer = common.load_model(model, dtype, place), common.load_tokenizer(model)
        groups = grouped([p.id for p in texts], encode(texts, tokenizer, target, max_new_tokens), batch_size)
        if len(groups) < process.count:
            raise UsageError(f"{process.count} processes for {len(groups)} groups of prompts; start fewer processes")
        loaded_draft = None
        if draft is not None and {*drafting, "hf-assisted"} & {*chosen, *peers}:
            same = str(target.dtype).removeprefix("torch.")
            loaded_draft = common.load_model(draft, same, place, "--draft-model")
        measured = [choices[label] for label in chosen]
        longest = max(len(ids) for group in groups for ids in group.ids) + max_new_tokens
        rule_of = (verifier, rule)
        arms = _arms(target, tokenizer, measured, rule_of, peers, loaded_draft, longest, drafting, warm, compile_)
        arms += remote.server_arms(servers, server_timeout, model, target, tokenizer)
        settings = [Settings(max_new_tokens, t) for t in temperatures]
        harness = Harness(target, seed)
        try:
            with common.progress(console) as progress:
                sizes = list({len(group.ids): group for group in groups}.values())  # each may be compiled for
                arms = _warm_up(harness, arms, sizes, settings, leave_out, peers, progress)
                compiled = _graphs(arms)
                run = harness.run(arms, groups, settings, repeats, progress, process)
        except KeyboardInterrupt:  # later ones are the harness's to keep
            console.print("interrupted during the warm-up: nothing was measured", highlight=False)
            raise typer.Exit(130) from None
        if process.count > 1:
            if run.failure is not None:  # its records stay behind: the others' are only whole together with them
                raise run.failure
            shares = gather((run.records, platform.node()))
            if not process.first:
                return
            if len({frozenset(r.arm for r in records) for records, _ in shares}) > 1:
                raise UsageError("a baseline ran in some processes only; leave it out by --baselines, and start again")
            run.records = sorted((r for records, _ in shares for r in records), key=lambda r: _place(r, temperatures))
            notes += _side_by_side(len(shares), len({node for _, node in shares}), warm)
        lossless, states = {a.name: a.lossless for a in arms}, {a.name: a.state for a in arms}
        rows = summarise(run.records, lossless, states, repeats, REFERENCE)
        report = Report(
            rows=rows,
            environment={**environment(target, model), "processes": process.count},
            settings={
                "model": model,
                "drafters": {c.label: {"drafter": c.drafter, "options": c.options} for c in measured},
                "draft_model": draft if loaded_draft is not None else None,
                "against": {s.name: str(s) for s in servers},
                "verifier": verifier,
                "verifier_options": rule,
                "prompts": prompts,
                "prompt_count": len(texts),
                "categories": {p.id: p.category for p in texts if p.category is not None},
                "max_new_tokens": max_new_tokens,
                "temperatures": temperatures,
                "batch_size": batch_size,
                "repeats": repeats,
                "seed": seed,
                "compile": compile_,
                "state": "warm" if warm else "cold",
            },
            notes=[
                *filter(None, [grown_note(target)]),
                *notes,
                *(str(c) for c in measured if c.options or c.label != c.drafter),
                *_compiled(arms, compile_),
                *_recompiled(compiled, _graphs(arms)),
                *remote.remarks(arms),
                *(f"{state}: {STATES[state]}" for state in dict.fromkeys(filter(None, states.values()))),
                *cautions(rows, REFERENCE, str(target.dtype).removeprefix("torch.")),
            ],
            partial=run.failure is not None,
        )
        if out is not None:
            try:
                report.notes += write(report, run.records, out)
            except OSError as error:  # the screen still gets what the disk did not
                run.failure = run.failure or UsageError(f"--out {out}: could not be written ({error.strerror})")
        show(report, console if json_ else common.console())
        if json_:
            stdout.write(json.dumps(report.to_json(), allow_nan=False) + "\n")
    if isinstance(run.failure, KeyboardInterrupt):
        console.print("interrupted: the results are partial", highlight=False)
        raise typer.Exit(130)
    if run.failure is not None:
        raise run.failure


def _place(record: Record, temperatures: list[float]) -> tuple[int, int, int]:
    """Where a record of one of several processes would stand if there were one."""
    return temperatures.index(record.temperature), record.group, record.repeat


def _side_by_side(processes: int, machines: int, warm: bool) -> list[str]:
    """What a reader must know of a measurement that several processes shared."""
    import torch

    threads = torch.get_num_threads()
    what = f"{processes} processes at a time on {machines} machine{'s' * (machines > 1)}, {threads} threads each"
    learned = ["warm: each process keeps what its own prompts taught"] if warm else []
    return [f"{what}; on one machine they share memory and cores; tokens/s are one process's", *learned]


def _temperatures(text: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or any(not 0 <= v < float("inf") for v in values):
        raise UsageError(f"--temperature {text!r}: give a number from 0 up, or a comma list of them like 0,1")
    return list(dict.fromkeys(values))


def _arms(
    target: PreTrainedModel,
    tokenizer: Any,
    drafters: Sequence[common.Choice],
    verifier: tuple[str, dict[str, Any]],
    peers: Sequence[str],
    draft: PreTrainedModel | None,
    longest: int,
    drafting: set[str],
    warm: bool,
    compile_: str,
) -> list[Arm]:
    """Every method of the table, baselines first; those in ``drafting`` draft with ``draft``."""
    from specdec import registry
    from specdec.bench.arms import DecoderArm
    from specdec.bench.baselines import baseline
    from specdec.decoder import Decoder

    arms: list[Arm] = []
    name, rule = verifier
    for choice in drafters:
        drafter = choice.make(draft=draft) if choice.label in drafting else choice.make()
        judge = registry.verifier(name, **rule)
        decoder = Decoder(target, drafter, judge, tokenizer=tokenizer, compile=compile_)  # type: ignore[arg-type]
        arms.append(DecoderArm(choice.label, decoder, warm))
    return [*(baseline(peer, target, draft, longest) for peer in peers), *arms]


def _compiled(arms: Sequence[Arm], asked: str) -> list[str]:
    """What came of --compile, one line per outcome."""
    from specdec.bench.arms import DecoderArm

    if asked == "off":
        return []
    outcomes: dict[str, list[str]] = {}
    for arm in arms:
        if isinstance(arm, DecoderArm):
            done = arm.decoder.target.compilation
            outcomes.setdefault(
                "compiled steps" if done.mode != "off" else f"no compiled steps ({done.reason})", []
            ).append(arm.name)
    return [f"{outcome}: {', '.join(names)}" for outcome, names in outcomes.items()]


def _graphs(arms: Sequence[Arm]) -> dict[str, int]:
    """Graphs that were compiled so far, where that can be told."""
    from specdec.bench.arms import DecoderArm
    from specdec.bench.baselines import CompiledArm

    return {arm.name: arm.graphs for arm in arms if isinstance(arm, (CompiledArm, DecoderArm))}


def _recompiled(before: dict[str, int], after: dict[str, int]) -> list[str]:
    return [f"{a}: {n - before[a]} graphs were compiled while it was timed" for a, n in after.items() if n > before[a]]


def _warm_up(
    harness: Harness,
    arms: list[Arm],
    groups: Sequence[Group],
    settings: Sequence[Settings],
    leave_out: Callable[[str, list[str], str], None],
    peers: list[str],
    progress: Callable[[int, int, str], None],
) -> list[Arm]:
    """Run every arm untimed on every group; a baseline that transformers cannot run on this model is left out."""
    from specdec.bench.baselines import REFERENCE

    working = list(arms)
    # our own arms first: their errors name the cause
    for i, arm in enumerate(sorted(arms, key=lambda a: a.name in peers)):
        progress(0, 1, f"warm-up {i + 1}/{len(arms)}, {arm.name}")
        try:
            for setting in settings:
                for group in groups:
                    harness.warm_up(arm, group, setting)
        except Exception as error:
            if arm.name not in peers or isinstance(error, UsageError):
                raise
            reason = f"transformers cannot run it here ({type(error).__name__}: {str(error).splitlines()[0][:150]})"
            if arm.name == REFERENCE:
                raise UsageError(f"{arm.name}: {reason}") from error
            leave_out(arm.name, peers, reason)
            working.remove(arm)
    return working
