"""Our drafters inside vLLM, vLLM's own, and our Decoder, side by side: ``python -m specdec.bench.vllm.proposers``.

Every engine of vLLM is a process that waits between its turns; our arms run here. The rest is ``specdec bench``: every
prompt through every arm before the next prompt, in random order, batch 1, greedy. A prompt's way to a vLLM process and
back, under a millisecond, is in its time. Drafters and vLLM's prefix cache keep nothing from one prompt to the next.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

import specdec
from specdec import zoo
from specdec.bench.arms import Arm, DecoderArm, Settings
from specdec.bench.baselines import REFERENCE, HFArm
from specdec.bench.environment import environment
from specdec.bench.harness import Group, Harness, grouped
from specdec.bench.prompts import encode, load_prompts
from specdec.bench.report import Report, cautions, prepare_folder, show, write
from specdec.bench.statistics import Record, Row, median_repeat, speedup_interval, summarise
from specdec.decoder import Decoder
from specdec.errors import UsageError

PLAIN = "vllm"
OURS = ("none", "prompt-lookup", "suffix", "aded", "hybrid")
INSIDE = ("prompt-lookup", "suffix", "aded", "hybrid")
ROOM = 64  # tokens beyond the longest text
PAUSE = 0.3  # seconds before each turn: OpenMP threads of the engine before spin for 0.2 s


def speculations(k: int) -> dict[str, tuple[dict[str, Any] | None, dict[str, Any]]]:
    """Arm -> vLLM's ``speculative_config`` and ``additional_config``; ``k``: most drafted tokens of a step."""
    mine = {"method": "custom_class", "model": "specdec.vllm.Proposer", "num_speculative_tokens": k}
    inside = {f"{PLAIN}+{name}": (mine, {"specdec": {"drafter": name, **_request_scope(name)}}) for name in INSIDE}
    ngram = {"method": "ngram", "num_speculative_tokens": k, "prompt_lookup_max": 5, "prompt_lookup_min": 2}
    suffix = {"method": "suffix", "suffix_decoding_max_cached_requests": 0}  # as long as it likes
    return {PLAIN: (None, {}), f"{PLAIN}-ngram": (ngram, {}), f"{PLAIN}-suffix": (suffix, {}), **inside}


def _request_scope(name: str) -> dict[str, str]:
    return {} if name == "prompt-lookup" else {"scope": "request"}


class VllmArm:
    """An engine of vLLM in a process of its own.

    Args:
        name: the row's.
        python: of vLLM's environment.
        engine: arguments of vLLM's ``LLM``.
        threads: it computes with.
        folder: for its log, and for what Numba compiles there (another version than ours).

    Attributes:
        about: versions and model runner.
        drafted, accepted: tokens so far, as vLLM counts them; None without drafts.

    Raises:
        UsageError: it does not start, or has ended.
    """

    lossless = True
    state = None
    stats = None

    def __init__(self, name: str, python: Path, engine: dict[str, Any], threads: int, folder: Path):
        self.name, self.log = name, folder / f"{name}.log"
        cores = sorted(os.sched_getaffinity(0))[:threads]
        # vLLM warns that drafting is much slower without the first, and asks for the second where there is one
        preload = [python.parents[1] / "lib" / "libiomp5.so", *Path("/usr/lib").glob("*/libtcmalloc_minimal.so.4")]
        settings = {
            "LD_PRELOAD": ":".join(str(file.absolute()) for file in preload if file.exists()),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # no second process between this one and the engine
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
            "OMP_NUM_THREADS": str(threads),
            # all that vLLM's n-gram drafter asks for; others would spin on the one core they inherit
            "NUMBA_NUM_THREADS": "1",
            "NUMBA_CACHE_DIR": str(folder.resolve() / "numba"),
        }
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [str(python), "-I", str(Path(__file__).with_name("serve_worker.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, **settings},
            )
        self.drafted: int | None = None
        self.accepted: int | None = None
        try:
            self.about = self._ask(paths=[str(Path(specdec.__file__).parents[1])], engine=engine)
        except BaseException:
            self.close()
            raise

    def reset(self) -> None:
        pass

    def forget(self) -> None:
        pass

    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, settings: Settings) -> torch.Tensor:
        """One prompt int64 [1, S] -> int64 [1, S + new], greedily."""
        answer = self._ask(prompt=input_ids[0].tolist(), max_new_tokens=settings.max_new_tokens)
        self.drafted, self.accepted = answer.get("drafted"), answer.get("accepted")
        return torch.cat([input_ids, input_ids.new_tensor([answer["ids"]])], dim=1)

    def _ask(self, **question: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended; what it said last stands in its log
        line = self._process.stdout.readline()
        answer = json.loads(line) if line else {"error": f"it ended without an answer; see {self.log}"}
        if "error" in answer:
            raise UsageError(f"{self.name}: {answer['error']}")
        return answer

    def close(self) -> None:
        """It keeps nothing that would have to be put away."""
        self._process.kill()
        self._process.wait()


# ---- what the table does not say ----------------------------------------------------------------------------------


def best_of(rows: Sequence[Row], names: Sequence[str]) -> Row:
    return max((row for row in rows if row.name in names), key=lambda row: row.tokens_per_second)


def duel(records: Sequence[Record], mine: str, theirs: str) -> str:
    """The ratio of two arms' total speeds, with its interval over prompts."""
    calls: dict[tuple[str, int], list[Record]] = {}
    for r in records:
        calls.setdefault((r.arm, r.group), []).append(r)
    groups = sorted({g for a, g in calls if a == mine} & {g for a, g in calls if a == theirs})
    tokens, seconds, base_tokens, base_seconds = (
        np.array([number(median_repeat(calls[name, g])) for g in groups], dtype=float)
        for name in (mine, theirs)
        for number in (lambda r: r.tokens, lambda r: r.seconds)
    )
    ratio = tokens.sum() / seconds.sum() / (base_tokens.sum() / base_seconds.sum())
    interval = speedup_interval(tokens, seconds, base_tokens, base_seconds)
    return f"{mine} over {theirs}: {ratio:.2f}" + (f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else "")


def profile(records: Sequence[Record], name: str) -> str:
    """Where an arm of ours spends its time, in milliseconds per target forward."""
    mine = [r for r in records if r.arm == name and r.phases is not None]
    forwards = sum(r.forwards for r in mine)
    phases = {phase: sum((r.phases or {})[phase] for r in mine) for phase in (mine[0].phases or {})}
    phases["rest"] = sum(r.seconds for r in mine) - sum(phases.values())
    shares = ", ".join(f"{phase} {1000 * seconds / forwards:.3f}" for phase, seconds in phases.items())
    return f"profile of {name}, milliseconds per target forward: {shares}"


def same_as_plain(records: Sequence[Record], names: Sequence[str]) -> str:
    """How many prompts have vLLM's plain ids in every repeat, per arm of vLLM."""
    plain = {r.group: r.ids for r in records if r.arm == PLAIN}
    said = []
    for name in names:
        differ = {r.group for r in records if r.arm == name and r.ids != plain.get(r.group, r.ids)}
        said.append(f"{name} {len(plain) - len(differ)}")
    return f"of {len(plain)} prompts, greedy ids equal to those of {PLAIN} without drafts: {', '.join(said)}"


def drafted(arm: VllmArm) -> str:
    share = f" ({arm.accepted / arm.drafted:.0%})" if arm.drafted and arm.accepted is not None else ""
    return f"{arm.name}: vLLM counts {arm.accepted} of {arm.drafted} drafted tokens accepted{share}, warm-up included"


# ---- the command --------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """0: measured; 2: it could not be, with one message; 130: interrupted, what was measured is written."""
    parser = argparse.ArgumentParser(prog="python -m specdec.bench.vllm.proposers", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--environment", type=Path, default=Path(".venv-vllm"), help="by specdec.bench.vllm.environment"
    )
    parser.add_argument("--model", default="tiny", help="packaged name or folder")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--prompts", default="embedded", help="as in `specdec bench`")
    parser.add_argument("--limit", type=int, default=24, help="prompts")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--k", type=int, default=5, help="most drafted tokens of a step in vLLM")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of every engine")
    parser.add_argument("--compile", action="store_true", help="torch.compile on both sides: minutes before the start")
    parser.add_argument("--out", type=Path, required=True, help="folder for results and logs")
    options = parser.parse_args(arguments)
    console = Console(stderr=True)
    vllm: list[VllmArm] = []
    try:
        interrupted = run(options, vllm, console)
    except UsageError as error:
        console.print(f"error: {error}", highlight=False, markup=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:  # later ones are the harness's to keep
        console.print("interrupted before anything was measured", highlight=False)
        return 130
    finally:
        for arm in vllm:
            arm.close()
    return 130 if interrupted else 0


def run(options: argparse.Namespace, vllm: list[VllmArm], console: Console) -> bool:
    """Measure and report; engines that start are put into ``vllm``. Whether it was interrupted."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    python = options.environment / "bin" / "python"
    if not python.exists():
        raise UsageError(
            f"--environment {options.environment}: no vLLM there; make it with "
            f"`python -m specdec.bench.vllm.environment {options.environment}`"
        )
    prepare_folder(options.out)
    torch.set_num_threads(options.threads)
    folder = zoo.path(options.model) or Path(options.model).expanduser()
    if not folder.is_dir():
        raise UsageError(f"--model {options.model}: neither packaged nor a folder; packaged: {', '.join(zoo.names())}")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, options.dtype)).eval()
    texts = load_prompts(options.prompts, options.limit)
    groups = grouped([t.id for t in texts], encode(texts, tokenizer, model, options.max_new_tokens), 1)
    notes = start(options, vllm, folder.resolve(), python, groups, model.config.max_position_embeddings, console)
    ours = [
        DecoderArm(n, Decoder(model, n, tokenizer=tokenizer, compile="auto" if options.compile else "off"))
        for n in OURS
    ]
    theirs = [HFArm(REFERENCE, model), HFArm("hf-prompt-lookup", model, prompt_lookup_num_tokens=10)]
    arms: list[Arm] = [*theirs, *vllm, *ours]
    settings, harness = Settings(options.max_new_tokens, 0.0), Harness(model)
    with Progress(console=console) as bar:
        task = bar.add_task("warm-up", total=None)
        for arm in arms:
            harness.warm_up(arm, groups[0], settings)

        def progress(done: int, total: int, what: str) -> None:
            bar.update(task, completed=done, total=total, description=what)
            time.sleep(PAUSE)  # between two timed calls

        measured = harness.run(arms, groups, [settings], options.repeats, progress)
    records, names = measured.records, [arm.name for arm in vllm]
    states = {arm.name: arm.state for arm in arms}
    rows = summarise(records, dict.fromkeys(states, True), states, options.repeats, REFERENCE)
    if rows:
        mine = best_of(rows, OURS).name
        inside = [name for name in names if "+" in name]
        best = best_of(rows, [name for name in names if name not in inside]).name
        notes.append(f"{duel(records, mine, best)} (our best, vLLM's best)")
        if inside:
            notes.append(f"{duel(records, best_of(rows, inside).name, best)} (our best inside vLLM, vLLM's best)")
        notes += [profile(records, mine), same_as_plain(records, names)]
    notes += [drafted(arm) for arm in vllm if arm.drafted]
    notes += cautions(rows, REFERENCE, options.dtype)
    command = shlex.join(["python", "-m", "specdec.bench.vllm.proposers", *sys.argv[1:]])
    report = Report(
        rows=rows,
        environment={**environment(model, options.model), "command": command, "vllm": vllm[0].about},
        settings={
            **{k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()},
            "drafters": {name: {"drafter": name, "options": {}} for name in OURS},
            "temperatures": [0.0],
            "batch_size": 1,
            "state": "cold",
            "compile": "auto" if options.compile else "off",
            "engines": speculations(options.k),
        },
        notes=notes,
        partial=measured.failure is not None,
    )
    report.notes += write(report, records, options.out)
    wide = Console()
    show(report, wide if wide.is_terminal else Console(width=200))
    if measured.failure is not None and not isinstance(measured.failure, KeyboardInterrupt):
        raise measured.failure
    return measured.failure is not None


def start(
    options: argparse.Namespace,
    vllm: list[VllmArm],
    folder: Path,
    python: Path,
    groups: Sequence[Group],
    context: int,
    console: Console,
) -> list[str]:
    """Start the engines one by one; notes about those that could not."""
    longest = max(len(g.ids[0]) for g in groups) + options.max_new_tokens
    notes = []
    for name, (speculative, additional) in speculations(options.k).items():
        engine = {
            "model": str(folder),
            "dtype": options.dtype,
            "enforce_eager": not options.compile,
            "enable_prefix_caching": False,
            "max_num_seqs": 1,
            # vLLM drafts nothing once a draft might not fit
            "max_model_len": min(longest + ROOM, context),
            "disable_log_stats": False,  # else it counts nothing
            "seed": 0,
            "speculative_config": speculative,
            "additional_config": additional,
        }
        console.print(f"starting {name}", highlight=False)
        try:
            vllm.append(VllmArm(name, python, engine, options.threads, options.out))
        except UsageError as error:
            if name == PLAIN:
                raise
            notes.append(f"left out: {error}")
    about = vllm[0].about
    versions = ", ".join(f"{package} {number}" for package, number in about["versions"].items())
    return [f"inside vLLM: {versions}, model runner {about['runner']} without drafts", *notes]


if __name__ == "__main__":
    sys.exit(main())
