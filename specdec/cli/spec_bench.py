"""`specdec spec-bench`: Spec-Bench's protocol, in answer files that its own scripts can read."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specdec.cli import against as remote
from specdec.cli import common
from specdec.errors import UsageError
from specdec.processes import this_process

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from specdec.bench.arms import Arm
    from specdec.bench.spec_bench.report import Report

DRAFTERS = ("none", "prompt-lookup", "token-recycling", "aded", "suffix", "hybrid")

spec_bench_app = typer.Typer(
    help="Spec-Bench (Xia et al. 2024): run its protocol, report its figures beside ours, compare answer files.",
    no_args_is_help=True,
)

Tokenizer = Annotated[str | None, typer.Option(metavar="MODEL", help="Whose tokenizer counts the baseline's tokens.")]
Json = Annotated[bool, typer.Option("--json", help="JSON on standard output, the tables on standard error.")]


@spec_bench_app.callback()
def spec_bench() -> None:
    """Spec-Bench (Xia et al. 2024): run its protocol, report its figures beside ours, compare answer files."""


@spec_bench_app.command("run")
def run(
    questions: Annotated[
        Path, typer.Option(help="Spec-Bench's question.jsonl, or a file like it: question_id, category, turns.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the run; an unfinished one is continued.")],
    model: common.Model = "tiny",
    drafters: Annotated[
        str, typer.Option(help="Comma list (`specdec list`); LABEL=DRAFTER names a row, as in `specdec bench`.")
    ] = ",".join(DRAFTERS),
    set_: common.Settings = None,
    baselines: Annotated[
        str,
        typer.Option(
            help="Comma list of hf-generate (always there), hf-prompt-lookup, hf-assisted, hf-generate-compiled "
            "(compiles for a while first), hf-early-exit (for checkpoints trained for it)."
        ),
    ] = "hf-generate",
    against: remote.Against = None,
    server_timeout: remote.ServerTimeout = 600.0,
    verifier: Annotated[str, typer.Option(help="Who decides which drafted tokens to keep.")] = "standard",
    draft: common.Draft = None,
    categories: Annotated[
        str | None, typer.Option(help="Comma list of subtasks or categories; all by default.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many questions of each subtask.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens per turn.")] = 1024,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    runs: Annotated[int, typer.Option(min=1, help="Times through all questions; reports give mean and deviation.")] = 1,
    template: Annotated[
        str,
        typer.Option(
            help="auto (the tokenizer's chat template, none where it has none), none (turns and answers on lines of "
            "their own) or vicuna (FastChat's)."
        ),
    ] = "auto",
    truncate: Annotated[
        bool,
        typer.Option(
            "--truncate", help="Take the middle out of prompts that are too long; else their questions are left out."
        ),
    ] = False,
    warm: Annotated[
        bool, typer.Option("--warm", help="Let learning drafters keep what earlier questions taught.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the order of the methods, and of sampling.")] = 0,
    compile_: common.Compile = "off",
    dtype: common.Dtype = "auto",
    device: common.Device = "auto",
) -> None:
    """Answer questions turn by turn with every method, interleaved question by question.

    Answers go to OUT/answers, a line as soon as it is made; a run that was cut off goes on by the same command. Under
    `accelerate launch -m specdec spec-bench run ...` processes share the questions. Learning drafters forget before
    every question unless --warm.
    """
    common.check_loading(dtype, device, compile_)
    from specdec.bench.spec_bench.protocol import TEMPLATES

    common.check_choice("--template", template, TEMPLATES)

    from specdec import registry
    from specdec.bench.baselines import BASELINES, REFERENCE
    from specdec.bench.environment import environment
    from specdec.bench.report import prepare_folder
    from specdec.bench.spec_bench.answers import RunFolder
    from specdec.bench.spec_bench.protocol import Asker, Rules, measure, template_of
    from specdec.bench.spec_bench.questions import read_questions, select
    from specdec.bench.spec_bench.report import from_folder, show, write
    from specdec.bench.spec_bench.ties import explain

    # everything that can be wrong is checked before anything slow starts
    rule, others = common.verifier_options(verifier, set_, model)
    labels = common.labels("--drafters", drafters, {*BASELINES, *registry.verifier_names()})
    choices = common.choose(labels, others, "--drafters", model)
    peers = common.names("--baselines", baselines)
    for name in peers:
        common.check_choice("--baselines", name, BASELINES)
    peers = list(dict.fromkeys([REFERENCE, *peers]))
    servers = remote.servers(against, {*BASELINES, *labels})
    methods = [*peers, *(c.label for c in choices), *(s.name for s in servers)]
    for name in methods:
        if not re.fullmatch(r"[\w.+-]+", name) or name.startswith("."):
            raise UsageError(
                f"{name!r}: a method's answers lie in a file of its name; label it with letters and digits"
            )
    asked = select(read_questions(questions), common.names("--categories", categories), None)
    explicit, draft = draft, common.draft_name(model, draft)
    drafting = {c.label for c in choices if c.takes_draft(explicit)} | {"hf-assisted"} & set(peers)
    if drafting and draft is None:
        raise UsageError(
            f"{', '.join(sorted(drafting))}: give --draft-model FOLDER or ID, {model} brings no draft model"
        )
    prepare_folder(out)

    process = this_process()
    place = process.place(device)
    common.quiet()
    console = common.console(stderr=True)
    console.quiet = not process.first  # errors are still said
    target, tokenizer = common.load_model(model, dtype, place), common.load_tokenizer(model)
    weights = str(target.dtype).removeprefix("torch.")
    small = common.load_model(draft, weights, place, "--draft-model") if draft is not None and drafting else None
    rules = Rules(template_of(template, tokenizer), max_new_tokens, temperature, truncate, seed)
    asker = Asker(target, tokenizer, Path(model).name, rules)
    fitting = [q for q in asked if asker.fits(q)]
    left_out = [q.id for q in asked if q not in fitting]
    fitting = select(fitting, [], limit)
    if left_out:
        console.print(
            f"{len(left_out)} of {len(asked)} questions left out: with --max-new-tokens {max_new_tokens} they exceed "
            f"the model's context of {asker.context}; lower it, or give --truncate",
            highlight=False,
        )
    if not fitting:
        raise UsageError(
            f"--questions {questions}: none fits the model's context of {asker.context} with --max-new-tokens "
            f"{max_new_tokens}; lower it, or give --truncate"
        )
    settings = {
        "model": model,
        "questions": questions.name,
        "questions_sha256": _sha256(questions.expanduser()),
        "categories": categories,
        "limit": limit,
        "methods": methods,
        "drafters": {c.label: {"drafter": c.drafter, "options": c.options} for c in choices},
        "draft_model": draft if small is not None else None,
        "verifier": verifier,
        "verifier_options": rule,
        "servers": {s.name: str(s) for s in servers},
        "template": rules.template,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "truncate": truncate,
        "warm": warm,
        "seed": seed,
        "compile": compile_,
        "dtype": weights,
        "device": target.device.type,
        "runs": runs,
        "question_ids": [q.id for q in fitting],
        "left_out": left_out,
    }
    where = {**environment(target, model), "rank": process.rank, "processes": process.count}
    # before the folder knows their URLs
    outside = remote.server_arms(servers, server_timeout, model, target, tokenizer)
    folder = RunFolder(out)
    try:
        with folder.session(settings, where, process.rank) as session, common.progress(console) as progress:
            judge, longest = (verifier, rule), asker.longest(fitting)
            ours = _arms(target, tokenizer, choices, judge, peers, small, longest, drafting, warm, compile_)
            share = (process.rank, process.count)
            measure(asker, [*ours, *outside], fitting, runs, folder, session, share, progress)
            if process.count == 1:
                explain(folder, REFERENCE, asker, fitting, progress)
    except KeyboardInterrupt:
        said = f"interrupted: finished answers are in {out}; the same command goes on"
        console.print(said, highlight=False, markup=False)
        raise typer.Exit(130) from None
    except OSError as error:
        raise UsageError(f"--out {out}: cannot be written ({error.strerror}); give a place with room") from error
    folder.merge()
    if process.count > 1:
        said = f"`specdec spec-bench report {out}` shows the figures once all processes are done"
        console.print(said, highlight=False, markup=False)
        return
    report = from_folder(folder, REFERENCE, tokenizer)
    report.notes += write(report, out)
    show(report, common.console())


@spec_bench_app.command("report")
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The --out of a run.")],
    baseline: Annotated[str, typer.Option(help="The method that speed-ups are relative to.")] = "hf-generate",
    tokenizer: Tokenizer = None,
    json_: Json = False,
) -> None:
    """Spec-Bench's figures and ours of a run, finished or not; also as report.json, report.md and report.png in DIR."""
    from specdec.bench.report import prepare_folder
    from specdec.bench.spec_bench.answers import RunFolder
    from specdec.bench.spec_bench.report import from_folder, write

    run_folder = RunFolder(folder)
    settings, _ = run_folder.record()
    prepare_folder(folder)
    common.quiet()
    counter = common.load_tokenizer(tokenizer or settings["model"], "--tokenizer")
    merged = run_folder.merge()
    made = from_folder(run_folder, baseline, counter)
    if not merged:
        made.notes.append("a run is still writing into this folder")
    made.notes += write(made, folder)
    _print(made, json_)


@spec_bench_app.command("compare")
def compare(
    files: Annotated[list[Path], typer.Argument(metavar="FILE FILE...", help="Answer files, of any tool.")],
    baseline: Annotated[Path | None, typer.Option(help="Which of them is the baseline; the first if left out.")] = None,
    tokenizer: Tokenizer = None,
    json_: Json = False,
) -> None:
    """Spec-Bench's figures of answer files in its schema, and whose texts are the baseline's."""
    if len(files) < 2:
        raise UsageError(f"{files[0]}: one file is nothing to compare; give two or more")
    if len(set(files)) < len(files):
        raise UsageError(f"{', '.join(map(str, files))}: a file is given twice")
    if baseline is not None and baseline not in files:
        raise UsageError(f"--baseline {baseline}: it is none of the files to compare ({', '.join(map(str, files))})")

    from specdec.bench.spec_bench.report import from_files

    counter = None
    if tokenizer is not None:
        common.quiet()
        counter = common.load_tokenizer(tokenizer, "--tokenizer")
    _print(from_files(files, baseline or files[0], counter), json_)


def _print(report: Report, as_json: bool) -> None:
    from specdec.bench.spec_bench.report import show

    show(report, common.console(stderr=as_json))
    if as_json:
        typer.echo(json.dumps(report.to_json(), allow_nan=False))


def _arms(
    target: PreTrainedModel,
    tokenizer: Any,
    choices: Sequence[common.Choice],
    verifier: tuple[str, dict[str, Any]],
    peers: Sequence[str],
    small: PreTrainedModel | None,
    longest: int,
    drafting: set[str],
    warm: bool,
    compile_: str,
) -> list[Arm]:
    """Baselines, then a decoder for every choice; those in ``drafting`` draft with ``small``."""
    from specdec import registry
    from specdec.bench.arms import DecoderArm
    from specdec.bench.baselines import baseline
    from specdec.decoder import Decoder

    arms: list[Arm] = [baseline(peer, target, small, longest) for peer in peers]
    name, rule = verifier
    for choice in choices:
        drafter = choice.make(draft=small) if choice.label in drafting else choice.make()
        judge = registry.verifier(name, **rule)
        decoder = Decoder(target, drafter, judge, tokenizer=tokenizer, compile=compile_)  # type: ignore[arg-type]
        arms.append(DecoderArm(choice.label, decoder, warm))
    return arms


def _sha256(file: Path) -> str:
    import hashlib

    return hashlib.sha256(file.read_bytes()).hexdigest()
