"""`specdec pareto`: what lossy methods gain and what they lose, over a range of their knobs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specdec.cli import common
from specdec.errors import UsageError
from specdec.processes import alone

if TYPE_CHECKING:
    from specdec.bench.prompts import Prompt
    from specdec.contracts import Verifier

# what is varied when nothing is asked for, as far as the model brings what it needs
CURVES = {
    "rollback": "rollback.threshold=0,1,2,3,5,8",
    "typical": "typical.epsilon=0.01,0.03,0.09,0.3,1",
    "ead": "ead.tau=0,2,3,4,5,6",
}
PARTNERS = {"rollback": "bild"}  # the drafter a verifier was made for; others draft with the draft model


@dataclass(frozen=True)
class Curve:
    """One method with one of its options varied.

    Attributes:
        name: METHOD.OPTION.
        drafter, verifier: registry names.
        settings: values of --set that concern them.
        values: the knob's values as texts, in order.
    """

    name: str
    drafter: str
    verifier: str
    settings: list[str]
    values: list[str]

    def point(self, value: str, model: str) -> tuple[common.Choice, dict[str, Any]]:
        """The drafter and the verifier's options with the knob set; raises UsageError for a value that is refused."""
        settings = [*self.settings, f"{self.name}={value}"]
        rule, others = common.verifier_options(self.verifier, settings, model)
        (choice,) = common.choose({self.drafter: self.drafter}, others, "--curve", model)
        return choice, rule


def pareto(
    model: common.Model = "tiny",
    curve: Annotated[
        list[str] | None,
        typer.Option(
            metavar="METHOD.OPTION=V1,V2,...",
            help="What to vary: an option of a verifier or of a drafter, e.g. rollback.threshold=0,1,3,8. Repeatable. "
            "Without it the knobs of rollback, ead and, when sampling, typical; of `tiny-image` lantern's.",
        ),
    ] = None,
    drafter: Annotated[
        str | None, typer.Option(help="Drafter of verifiers' curves; without it bild for rollback, else draft-model.")
    ] = None,
    set_: common.Settings = None,
    draft: common.Draft = None,
    prompts: Annotated[
        str,
        typer.Option(
            help="`tasks` (embedded problems and translations), `embedded`, or a file as for `specdec bench`; entries "
            'of a .jsonl file with a "reference" are scored against it.'
        ),
    ] = "tasks",
    limit: Annotated[int | None, typer.Option(min=2, help="Only so many prompts.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens per prompt.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the order of the methods, and of sampling.")] = 0,
    dtype: common.Dtype = "auto",
    device: common.Device = "auto",
    out: Annotated[
        Path | None, typer.Option(help="Folder for pareto.json, records.jsonl, pareto.md and pareto.png.")
    ] = None,
    json_: Annotated[
        bool, typer.Option("--json", help="JSON on standard output, the table on standard error.")
    ] = False,
) -> None:
    """Speed against quality of lossy methods, each over a range of one knob, beside the target alone.

    Texts are scored by how likely the target finds them and, where prompts have reference answers, by exact match of
    math answers and chrF. Everything runs interleaved in one process; intervals resample prompts.
    """
    alone("specdec pareto")
    common.check_loading(dtype, device)

    from specdec import registry
    from specdec.bench.arms import DecoderArm, Settings
    from specdec.bench.baselines import REFERENCE, baseline
    from specdec.bench.environment import environment
    from specdec.bench.grow import grown_note
    from specdec.bench.harness import Harness, grouped
    from specdec.bench.images import PictureQuality
    from specdec.bench.pareto import points, show, write
    from specdec.bench.prompts import encode, load_prompts
    from specdec.bench.quality import Quality, TextQuality
    from specdec.bench.report import prepare_folder
    from specdec.decoder import Decoder
    from specdec.zoo import tiny_image

    explicit = draft
    draft = common.draft_name(model, draft)
    drawing = model == "tiny-image"
    if drawing and (prompts != "tasks" or temperature == 0):
        raise UsageError("tiny-image: it takes no --prompts but draws digits in turn, and needs --temperature above 0")
    asked_for = curve if curve or not drawing else ["lantern.factor=1,2,3,5,10"]
    curves = _curves(asked_for, drafter, set_ or [], draft is not None, temperature > 0)
    chosen = [(c, value, *c.point(value, model)) for c in curves for value in c.values]
    for c, _, choice, _ in chosen:
        if choice.takes_draft(explicit) and draft is None:
            raise UsageError(
                f"{c.name}: {choice.drafter} needs --draft-model FOLDER or ID, {model} brings no draft model"
            )
    texts = _digits(limit or 300) if drawing else load_prompts(prompts, limit)
    if out is not None:
        prepare_folder(out)
    common.quiet()
    with common.json_only(json_) as stdout:
        console = common.console(stderr=True)
        target = common.load_model(model, dtype, device)
        quality: Quality
        if drawing:
            toy, tokenizer = tiny_image.load(), None
            ids = toy.prompts([int(p.text) for p in texts]).tolist()
            quality = PictureQuality(toy, [int(p.text) for p in texts])
            max_new_tokens = tiny_image.LENGTH
        else:
            tokenizer = common.load_tokenizer(model)
            ids = encode(texts, tokenizer, target, max_new_tokens)
            quality = TextQuality(target, tokenizer, texts, ids, greedy=temperature == 0)
        groups = grouped([p.id for p in texts], ids, 1)
        small = None
        if draft is not None and any(choice.takes_draft(explicit) for _, _, choice, _ in chosen):
            small = common.load_model(draft, str(target.dtype).removeprefix("torch."), device, "--draft-model")
        arms: list[Any] = [baseline(REFERENCE, target, None)]
        knobs: dict[str, tuple[str, Any]] = {REFERENCE: (REFERENCE, None)}

        def add(name: str, knob: tuple[str, Any], choice: common.Choice, verifier: Verifier) -> None:
            drafting = choice.make(draft=small) if choice.takes_draft(explicit) else choice.make()
            arms.append(DecoderArm(name, Decoder(target, drafting, verifier, tokenizer=tokenizer)))
            knobs[name] = knob

        for c, value, choice, rule in chosen:
            name = f"{choice.drafter} + standard"
            if c.verifier != "standard" and name not in knobs:
                add(name, (name, None), choice, registry.verifier("standard"))
            add(f"{c.name}={value}", (c.name, common.literal(value)), choice, registry.verifier(c.verifier, **rule))
        settings = [Settings(max_new_tokens, temperature)]
        harness = Harness(target, seed)
        try:
            with common.progress(console) as progress:
                for i, arm in enumerate(arms):
                    progress(0, 1, f"warm-up {i + 1}/{len(arms)}, {arm.name}")
                    harness.warm_up(arm, groups[0], settings[0])
                run = harness.run(arms, groups, settings, 1, progress)
        except KeyboardInterrupt:
            run = None
        if run is None or isinstance(run.failure, KeyboardInterrupt):
            # a part of the prompts would be other prompts for every score
            console.print("interrupted: nothing is reported", highlight=False)
            raise typer.Exit(130)
        if run.failure is not None:
            raise run.failure
        found = points(run, knobs, {arm.name: arm.lossless for arm in arms}, quality, REFERENCE)
        how = "greedy" if temperature == 0 else f"temperature {temperature:g}"
        title = f"{model}, {how}, {len(texts)} prompts, up to {max_new_tokens} tokens"
        where = environment(target, model)
        asked = {
            "model": model,
            "curves": {c.name: {"drafter": c.drafter, "settings": c.settings, "values": c.values} for c in curves},
            "draft_model": draft,
            "prompts": prompts,
            "prompt_count": len(texts),
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "seed": seed,
        }
        notes = [*filter(None, [grown_note(target)])]
        notes += [f"{c.name}: {', '.join([f'drafter {c.drafter}', *c.settings])}" for c in curves]
        show(found, quality, title, console if json_ else common.console())
        if out is not None:
            write(found, run, quality, title, where, asked, notes, out)
        if json_:
            stdout.write(json.dumps({"points": [p.to_json() for p in found], "settings": asked}) + "\n")


def _curves(
    asked: Sequence[str] | None, drafter: str | None, settings: Sequence[str], has_draft: bool, sampling: bool
) -> list[Curve]:
    """The curves to draw; every setting must concern one of them."""
    from specdec import registry

    if asked is None:
        if not has_draft:
            raise UsageError(
                "--curve: say what to vary, for example --curve rollback.threshold=0,1,3,8 with --draft-model; "
                "the model brings no draft model of its own"
            )
        asked = [text for name, text in CURVES.items() if name != "typical" or sampling]
    curves: list[Curve] = []
    for text in asked:
        name, equals, values = text.partition("=")
        method, dot, option = name.strip().rpartition(".")
        listed = [value.strip() for value in values.split(",")]
        if not equals or not dot or not option or not all(listed):
            raise UsageError(f"--curve {text!r}: write METHOD.OPTION=V1,V2,..., e.g. rollback.threshold=0,1,3,8")
        if len(set(listed)) != len(listed):
            raise UsageError(f"--curve {text!r}: a value is given twice")
        if any(name.strip() == c.name for c in curves):
            raise UsageError(f"--curve {text!r}: {name.strip()} is varied twice; put all its values into one --curve")
        verifiers = registry.verifier_names()
        common.check_choice(f"--curve {text}: method", method, [*verifiers, *registry.drafter_names()])
        verifier = method if method in verifiers else "standard"
        by = (drafter or PARTNERS.get(method, "draft-model")) if method in verifiers else method
        mine = [pair for pair in settings if pair.partition("=")[0].strip().rpartition(".")[0] in (verifier, by)]
        curves.append(Curve(name.strip(), by, verifier, mine, listed))
    for pair in settings:
        if not any(pair in c.settings for c in curves):
            raise UsageError(f"--set {pair}: no curve uses that method; they use {', '.join(_methods(curves))}")
    return curves


def _digits(count: int) -> list[Prompt]:
    """Pictures to draw, of every class in turn."""
    from specdec.bench.prompts import Prompt

    return [Prompt(f"picture-{i}", str(i % 10), None, "tiny-image") for i in range(count)]


def _methods(curves: Sequence[Curve]) -> list[str]:
    return list(dict.fromkeys(name for c in curves for name in (c.drafter, c.verifier)))
