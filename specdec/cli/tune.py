"""`specdec tune`: the fastest setting for a model, a machine and the user's prompts, kept as a profile."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from specdec.cli import common
from specdec.errors import UsageError
from specdec.processes import alone

DRAFTERS = ("prompt-lookup", "suffix", "aded", "token-recycling", "hybrid", "draft-model")
FINALISTS = 3


def tune(
    model: common.Model = "tiny",
    drafters: Annotated[
        str | None,
        typer.Option(
            help=f"Comma list of those to choose from; without it {', '.join(DRAFTERS)} and heads that `tiny` brings."
        ),
    ] = None,
    set_: common.Settings = None,
    draft: common.Draft = None,
    prompts: Annotated[
        str, typer.Option(help="`embedded`, or a file of prompts like yours, as for `specdec bench`; at least 4.")
    ] = "embedded",
    limit: Annotated[int | None, typer.Option(min=4, help="Only so many prompts.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=8, help="Most tokens per prompt.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy. Tune for what you will use.")] = 0.0,
    compile_: common.Compile = "off",
    seed: Annotated[int, typer.Option(help="Of the order of the methods, and of sampling.")] = 0,
    dtype: common.Dtype = "auto",
    device: common.Device = "auto",
    out: Annotated[
        Path | None,
        typer.Option(help="Where to keep the profile; without it where `Decoder(model, 'auto')` looks for it."),
    ] = None,
    json_: Annotated[
        bool, typer.Option("--json", help="JSON on standard output, the table on standard error.")
    ] = False,
) -> None:
    """Choose drafter, tree and compile mode by predicted speed, check the best, and keep the fastest.

    Every other prompt calibrates: how many tokens steps yield, how many columns they take, what drafting costs, and
    which ranks are accepted at which depth, so that static trees are cut for your prompts. With the cost of N columns
    that predicts each setting's speed. The best three are then timed on the other prompts, beside plain decoding and
    transformers, and the fastest becomes the profile: `none` where nothing is faster.
    """
    alone("specdec tune")
    common.check_loading(dtype, device, compile_)

    from specdec import registry, zoo
    from specdec.bench.arms import DecoderArm, Settings
    from specdec.bench.baselines import REFERENCE, baseline
    from specdec.bench.environment import environment
    from specdec.bench.harness import Harness, grouped
    from specdec.bench.prompts import encode, load_prompts
    from specdec.bench.report import prepare_folder
    from specdec.bench.statistics import summarise
    from specdec.bench.step_times import measure
    from specdec.bench.tune import WIDE, Candidate, Curve, Yield, calibrate, grid, own_trees, predictions, shortlist
    from specdec.decoder import Decoder
    from specdec.profile import Profile, fingerprint, kept
    from specdec.target import Target

    names = common.names("--drafters", drafters) or [*DRAFTERS, *zoo.heads(model)]
    explicit, draft = draft, common.draft_name(model, draft)
    choices = {c.drafter: c for c in common.choose({n: n for n in names if n != "none"}, set_, "--drafters", model)}
    needing = {name for name, choice in choices.items() if choice.takes_draft(explicit)}
    if draft is None and needing:
        if drafters is not None:
            raise UsageError(f"{min(needing)} needs --draft-model FOLDER or ID, {model} brings no draft model")
        choices = {name: choice for name, choice in choices.items() if name not in needing}
    lossy = [name for name in choices if registry.drafter_class(name).lossless is False]
    if lossy:
        raise UsageError(f"--drafters {lossy[0]}: it is lossy, and a profile must not change texts; leave it out")
    texts = load_prompts(prompts, limit)
    if len(texts) < 4:
        raise UsageError(f"--prompts {prompts}: {len(texts)} prompts; give at least 4, half of them calibrate")
    if out is not None:
        prepare_folder(out.parent)
    common.quiet()
    with common.json_only(json_) as stdout:
        console = common.console(stderr=True)
        target, tokenizer = common.load_model(model, dtype, device), common.load_tokenizer(model)
        groups = grouped([p.id for p in texts], encode(texts, tokenizer, target, max_new_tokens), 1)
        small = None
        if draft is not None and needing & set(choices):
            small = common.load_model(draft, str(target.dtype).removeprefix("torch."), device, "--draft-model")
        settings = Settings(max_new_tokens, temperature)
        plain = Candidate("none")

        def decoder(candidate: Candidate, mode: str) -> Decoder:
            choice = choices.get(candidate.drafter)
            more: dict[str, Any] = {"draft": small} if candidate.drafter in needing else {}
            made = choice.make(**dict(candidate.options), **more) if choice else registry.drafter("none")
            return Decoder(target, made, tokenizer=tokenizer, compile=mode)  # type: ignore[arg-type]

        def candidates() -> Iterator[tuple[Candidate, Decoder]]:
            yield plain, decoder(plain, "off")
            for name, choice in choices.items():
                free = {
                    k: v for k, v in registry.options(registry.drafter_class(name)).items() if k not in choice.options
                }
                for candidate in grid(name, free, target.device.type == "cuda"):
                    yield candidate, decoder(candidate, "off")

        bound = Target(target)
        curves = {"off": Curve.of(measure(bound, 256, 5.0)["curve"])}
        if compile_ != "off":
            compiled = decoder(plain, compile_)
            if compiled.target.compilation.mode == "off":
                console.print(f"not compiled: {compiled.target.compilation.reason}", highlight=False)
            else:
                curves[compiled.target.compilation.mode] = Curve.of(measure(compiled.target, 256, 5.0)["curve"])
        console.print(f"calibrating on {len(groups[::2])} prompts", highlight=False)
        with console.status("") as status:

            def trial(some: Iterable[tuple[Candidate, Decoder]]) -> dict[Candidate, Yield]:
                return calibrate(some, groups[::2], settings.arguments(), status.update)

            found = trial(candidates())
            for name in choices:
                taken = registry.options(registry.drafter_class(name))
                if "acceptance" in taken and not {"acceptance", "size", "paths", "chain"} & set(choices[name].options):
                    wide = Candidate(name, (("size", WIDE),))
                    trees = own_trees(decoder(wide, "off"), found, curves, lambda one: trial([(wide, one)]))  # noqa: B023
                    found |= trial((tree, decoder(tree, "off")) for tree in trees)
        predicted = predictions(found, curves, plain)
        finalists = [(plain, mode) for mode in curves] + shortlist(predicted, plain, FINALISTS)
        arms: list[Any] = [baseline(REFERENCE, target, None)]
        keys = {}
        for candidate, mode in finalists:
            label = candidate.label + (f", {mode}" if mode != "off" else "")
            arms.append(DecoderArm(label, decoder(candidate, mode)))
            keys[label] = (candidate, mode)
        harness = Harness(target, seed)
        with common.progress(console) as progress:
            for i, arm in enumerate(arms):
                progress(0, 1, f"warm-up {i + 1}/{len(arms)}, {arm.name}")
                harness.warm_up(arm, groups[1], settings)
            run = harness.run(arms, groups[1::2], [settings], 1, progress)
        if run.failure is not None:
            raise run.failure
        lossless, states = {a.name: a.lossless for a in arms}, {a.name: a.state for a in arms}
        rows = {row.name: row for row in summarise(run.records, lossless, states, 1, REFERENCE)}
        best = max(keys, key=lambda label: rows[label].speedup)
        candidate, mode = keys[best]
        options: dict[str, Any] = {}
        if (choice := choices.get(candidate.drafter)) is not None:  # none has no options
            options = {**{k: str(v) for k, v in choice.brought.items()}, **choice.options, **dict(candidate.options)}
        if candidate.drafter in needing:
            options["draft"] = str(zoo.path(draft or "") or draft)
        table = [
            {
                "setting": label,
                "predicted": predicted[keys[label]] * rows["none"].speedup if label in keys else None,
                "measured": rows[label].speedup,
                "interval": rows[label].speedup_ci,
                "mat": rows[label].mat,
            }
            for label in rows
        ]
        evidence = {
            "finalists": table,
            "all predicted over none": {
                f"{c.label}, {m}": round(v, 3) for (c, m), v in sorted(predicted.items(), key=lambda item: -item[1])
            },
            "curve": {m: [list(c.columns), list(c.seconds)] for m, c in curves.items()},
            "settings": {
                "model": model, "prompts": prompts, "prompt_count": len(texts), "max_new_tokens": max_new_tokens,
                "temperature": temperature, "seed": seed,
            },
            "environment": environment(target, model),
        }  # fmt: skip
        profile = Profile(candidate.drafter, options, mode, fingerprint(bound), evidence)
        file = out or kept(profile.made_for)
        profile.write(file)
        screen = console if json_ else common.console()
        _show(table, best, screen)
        screen.print(f"\nchosen: {best}\nprofile: {file}", highlight=False, markup=False, soft_wrap=True)
        more = "" if mode == "off" else f", compile={mode!r}"
        where = "" if out is None else f", profile={str(out)!r}"
        screen.print(f"Decoder(model, 'auto'{where}{more})", highlight=False, markup=False, soft_wrap=True)
        if json_:
            stdout.write(json.dumps({"profile": str(file), "drafter": profile.drafter, "options": profile.options,
                                     "compile": mode, **evidence}) + "\n")  # fmt: skip


def _show(table: list[dict[str, Any]], best: str, screen: Any) -> None:
    shown = Table(title="speed-up over hf-generate on the prompts that did not calibrate", title_justify="left")
    for i, header in enumerate(("setting", "predicted", "measured [95 %]", "MAT")):
        shown.add_column(header, justify="left" if i == 0 else "right", no_wrap=True)
    for row in table:
        low, high = row["interval"] or (row["measured"],) * 2
        shown.add_row(
            row["setting"],
            "-" if row["predicted"] is None else f"{row['predicted']:.2f}",
            f"{row['measured']:.2f} [{low:.2f}, {high:.2f}]",
            "-" if row["mat"] is None else f"{row['mat']:.2f}",
            style="bold" if row["setting"] == best else None,
        )
    screen.print(shown)
