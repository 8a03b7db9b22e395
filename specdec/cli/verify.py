"""`specdec verify`: a certificate that the text is the model's own, or what was found to differ."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specdec.cli import common
from specdec.errors import UsageError
from specdec.processes import alone

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def verify(
    model: common.Model = "tiny",
    drafter: Annotated[str, typer.Option(help="Who proposes tokens (`specdec list`).")] = "hybrid",
    verifier: Annotated[str, typer.Option(help="Who decides which drafted tokens to keep.")] = "standard",
    set_: common.Settings = None,
    draft: common.Draft = None,
    prompts: Annotated[
        str, typer.Option(help="`embedded`, `tasks`, a .jsonl file, or a text file, one prompt per line.")
    ] = "embedded",
    limit: Annotated[int, typer.Option(min=1, help="Only so many prompts.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Most tokens per prompt.")] = 64,
    compile_: common.Compile = "off",
    dtype: common.Dtype = "auto",
    device: common.Device = "auto",
    out: Annotated[
        Path | None, typer.Option(help="FILE.json (FILE.md beside it), or a folder for certificate.json and .md.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="JSON on standard output, the rest on standard error.")] = False,
) -> None:
    """Is the text the model's own with this drafter and verifier, on this machine? Exit code 1 if it is not.

    Greedy ids against generate(), near ties in --dtype, the exact law of sampling, and the cache. What needs float32 is
    run in float32 besides, where that fits. Lossy drafters and verifiers are refused.
    """
    alone("specdec verify")
    common.check_loading(dtype, device, compile_)

    from specdec import registry
    from specdec.bench.certificate import Certificate, certify, files, weights_hash
    from specdec.bench.environment import environment
    from specdec.bench.prompts import encode, load_prompts
    from specdec.bench.report import prepare_folder
    from specdec.decoder import Decoder

    rule, others = common.verifier_options(verifier, set_, model)
    (choice,) = common.choose({drafter: drafter}, others, "--drafter", model)
    drafting = choice.takes_draft(draft)
    small = common.draft_name(model, draft) if drafting else None
    if drafting and small is None:
        raise UsageError(f"--drafter {drafter}: it needs --draft-model FOLDER or ID, {model} brings no draft model")
    for part in (choice.make(draft="") if drafting else choice.make(), registry.verifier(verifier, **rule)):
        if not part.lossless:
            raise UsageError(f"{part.name}: not lossless by definition, so there is nothing to certify")
    texts = load_prompts(prompts, limit)
    if out is not None:
        prepare_folder(files(out)[0].parent)
    common.quiet()
    with common.json_only(json_) as stdout:
        console = common.console(stderr=True)
        tokenizer = common.load_tokenizer(model)

        def decoder(target: PreTrainedModel) -> Decoder:
            kind = str(target.dtype).removeprefix("torch.")
            more = {"draft": common.load_model(small, kind, device, "--draft-model")} if small is not None else {}
            judge = registry.verifier(verifier, **rule)
            return Decoder(target, choice.make(**more), judge, tokenizer=tokenizer, compile=compile_)  # type: ignore[arg-type]

        target = common.load_model(model, dtype, device)
        ids = encode(texts, tokenizer, target, max_new_tokens)
        mine = decoder(target)
        exact: Decoder | str = mine
        if str(target.dtype) != "torch.float32":
            exact = _obstacle(target) or decoder(common.load_model(model, "float32", device))
        try:
            with common.progress(console) as progress:
                sections = certify(mine, exact, ids, max_new_tokens, progress)
        except KeyboardInterrupt:
            console.print("interrupted: no certificate", highlight=False)
            raise typer.Exit(130) from None
        drafts: Any = getattr(getattr(mine.drafter, "draft", None), "model", None)
        provenance = {
            **environment(target, model),
            "drafter": {"name": drafter, **{k: str(v) for k, v in {**choice.brought, **choice.options}.items()}},
            "verifier": {"name": verifier, **{k: str(v) for k, v in rule.items()}},
            "draft_model": small,
            "compile": str(mine.target.compilation),
            "prompts": f"{len(ids)} of {prompts}, up to {max_new_tokens} tokens",
            "sha256": weights_hash(target),
            "sha256_of_draft": weights_hash(drafts) if drafts is not None else None,
        }
        certificate = Certificate(f"{model} with {drafter}, {verifier}", sections, provenance)
        printer = console if json_ else common.console()
        printer.print(f"{certificate.title}: {certificate.verdict}", highlight=False, markup=False)
        for section in sections:
            line = f"  {section.name}: {section.status}. {section.finding}"
            printer.print(line, highlight=False, markup=False, soft_wrap=True)
        if out is not None:
            try:
                written = certificate.write(out)
            except OSError as error:
                raise UsageError(f"--out {out}: could not be written ({error.strerror})") from error
            console.print(f"written: {', '.join(map(str, written))}", highlight=False, soft_wrap=True)
        if json_:
            stdout.write(json.dumps(certificate.to_json(), allow_nan=False) + "\n")
    if certificate.failed:
        raise typer.Exit(1)


def _obstacle(target: PreTrainedModel) -> str | None:
    """Why the model cannot be loaded in float32 besides; None if it can."""
    import torch

    if getattr(target.config, "quantization_config", None) is not None:
        return "its weights are quantised"
    need = 4 * target.num_parameters()
    if target.device.type == "cuda":
        have = torch.cuda.mem_get_info(target.device)[0]
    elif hasattr(os, "sysconf"):
        have = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    else:
        return None
    return f"its weights take {need / 1e9:.1f} GB more, of {have / 1e9:.1f} GB" if need > 0.9 * have else None
