"""The target answers prompts itself: what trained drafters should learn from, since they must imitate this very model.

Medusa (Cai et al. 2024, section 2.3) calls it self-distillation.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from filelock import FileLock, Timeout

from specdec.decoder import Decoder
from specdec.errors import UsageError
from specdec.processes import ALONE, Process

from .conversations import PROVENANCE, first_user_turn, json_rows

WINDOW = 8  # batches: prompts are sorted by length inside such a window, so that a batch has little padding


@dataclass(frozen=True)
class Prompt:
    """One prompt; `id` is unique in its file."""

    id: str
    text: str
    category: str | None


@dataclass(frozen=True)
class Settings:
    """What decides the answers; a file is only continued with the same.

    Attributes:
        model: name, folder or hub id.
        prompts_sha256: of the file of prompts.
        max_new_tokens: most tokens of an answer.
        temperatures: taken in turn, prompt by prompt; 0 is greedy.
        batch_size: prompts decoded together.
        chat: prompts are wrapped in the chat template.
        drafter: registry name.
        dtype: of the weights.
        seed: of sampling.
    """

    model: str
    prompts_sha256: str
    max_new_tokens: int
    temperatures: tuple[float, ...]
    batch_size: int
    chat: bool
    drafter: str
    dtype: str
    seed: int


@dataclass
class Outcome:
    """What a run did: prompts answered by now, those too long for the context, and what this process added.

    ``whole``: all answers are in one file; else other processes are still at theirs, or ended early.
    """

    done: int
    too_long: int
    tokens: int = 0
    seconds: float = 0.0
    whole: bool = True


@dataclass(frozen=True)
class _Job:
    prompt: Prompt
    ids: list[int]
    temperature: float


def read_prompts(file: Path) -> list[Prompt]:
    """The prompts of a `.jsonl` or `.json` file.

    Rows hold "prompt", or "conversations"/"messages", of which the first user turn is the prompt; and optionally "id"
    (the row's number if left out) and "category".

    Raises:
        UsageError: no such file, a malformed row, or an id that comes twice.
    """
    prompts: dict[str, Prompt] = {}
    for number, row in enumerate(json_rows(file, "--prompts"), start=1):
        where = f"--prompts {file}: row {number}"
        if not {"prompt", "conversations", "messages"} & row.keys():
            raise UsageError(f'{where}: no "prompt", "conversations" or "messages" in it (keys: {", ".join(row)})')
        text = row["prompt"] if "prompt" in row else first_user_turn(row, where)
        if not isinstance(text, str) or not text.strip():
            raise UsageError(f'{where}: "prompt" must be text that is not empty')
        prompt = Prompt(str(row.get("id", number)), text, row.get("category"))
        if prompt.id in prompts:
            raise UsageError(f"{where}: the id {prompt.id!r} was used before; ids must be unique")
        prompts[prompt.id] = prompt
    if not prompts:
        raise UsageError(
            f'--prompts {file}: there is no prompt in it; write rows like {{"prompt": "Once upon a time"}}'
        )
    return list(prompts.values())


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def provenance_file(out: Path) -> Path:
    return out.with_name(out.name + PROVENANCE)


def distill(
    decoder: Decoder,
    tokenizer: Any,
    prompts: list[Prompt],
    out: Path,
    settings: Settings,
    environment: dict[str, Any],
    progress: Callable[[int, int, str], None],
    process: Process = ALONE,
) -> Outcome:
    """Append the target's answer to every prompt to `out`, each exactly once; a later call goes on where one stopped.

    A line holds "id", "category" (if the prompt has one), "prompt", "response", "prompt_ids", "response_ids" (int
    lists; the end-of-sequence token included where the answer ended with it) and "temperature". Lines come batch by
    batch; when all are there they are put in the order of the prompts. A batch is sampled with a seed made from
    `settings.seed` and its first prompt, so an interrupted run ends in the same answers as an unbroken one.
    `out` + ".provenance.json" says how the file was made.

    Of several processes each takes every so-manieth batch, the first into `out`, the others into `out` + ".parts"; the
    one that ends last brings all together, in the same file as one process makes. Any number of processes can go on
    with what any other number left.

    Args:
        decoder: the target; any drafter.
        tokenizer: the target's.
        prompts: those longer than the context less `max_new_tokens` are left out and counted.
        out: the `.jsonl` file.
        settings: what decides the answers.
        environment: versions, machine and command, for the record.
        progress: called with (done, total, text) of this process's share.
        process: this one.

    Raises:
        UsageError: `out` holds something else, is of other settings, is being written or cannot be; no prompt fits.
    """
    jobs = _jobs(prompts, tokenizer, settings, decoder.target.context)
    mine = list(_batches(jobs, settings))[process.rank :: process.count]
    parts = _Parts(out)
    try:
        with parts.session({job.prompt.id for batch in mine for job in batch}, settings, environment, process) as done:
            outcome = _share(decoder, tokenizer, mine, parts.file(process), done, settings, progress)
        outcome.too_long = len(prompts) - len(jobs)
        outcome.done, outcome.whole = parts.merge([job.prompt.id for job in jobs])
    except OSError as error:
        raise UsageError(f"--out {out}: cannot be written ({error.strerror}); give a place with room") from error
    return outcome


def _share(
    decoder: Decoder,
    tokenizer: Any,
    mine: list[list[_Job]],
    file: Path,
    done: set[str],
    settings: Settings,
    progress: Callable[[int, int, str], None],
) -> Outcome:
    """Answer this process's batches, except what is done."""
    total = sum(map(len, mine))
    outcome = Outcome(sum(job.prompt.id in done for batch in mine for job in batch), 0)
    if outcome.done == total:
        return outcome
    start = perf_counter()
    with file.open("ab") as lines:
        progress(outcome.done, total, "answering")
        for batch in mine:
            new = [job.prompt.id not in done for job in batch]
            if not any(new):
                continue
            # a batch that was cut is made again as a whole: its seed belongs to all of it
            answers = _answer(decoder, tokenizer, batch, settings)
            made = zip(new, batch, answers, strict=True)
            lines.write("".join(_line(job, answer, tokenizer) for is_new, job, answer in made if is_new).encode())
            lines.flush()
            outcome.done += sum(new)
            outcome.tokens += sum(map(len, answers))
            outcome.seconds = perf_counter() - start
            progress(outcome.done, total, f"{outcome.tokens / outcome.seconds:.0f} tokens/s")
    return outcome


def _jobs(prompts: list[Prompt], tokenizer: Any, settings: Settings, context: int | None) -> list[_Job]:
    """Prompts that leave room for the answer, each with its temperature."""
    jobs = []
    for i, prompt in enumerate(prompts):
        if settings.chat:
            turns = [{"role": "user", "content": prompt.text}]
            ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
        else:
            ids = tokenizer(prompt.text).input_ids
        if not ids:
            raise UsageError(f"--prompts: the tokenizer makes no token of prompt {prompt.id!r}; give at least one word")
        if context is None or len(ids) + settings.max_new_tokens <= context:
            jobs.append(_Job(prompt, ids, settings.temperatures[i % len(settings.temperatures)]))
    if not jobs:
        raise UsageError(
            f"--prompts: all {len(prompts)} prompts and --max-new-tokens {settings.max_new_tokens} exceed the model's "
            f"context of {context}; shorten them or lower --max-new-tokens"
        )
    return jobs


def _batches(jobs: list[_Job], settings: Settings) -> Iterator[list[_Job]]:
    """Batches of one temperature and similar length."""
    size = settings.batch_size
    window = WINDOW * size * len(settings.temperatures)
    for i in range(0, len(jobs), window):
        for temperature in dict.fromkeys(settings.temperatures):
            same = [job for job in jobs[i : i + window] if job.temperature == temperature]
            same.sort(key=lambda job: len(job.ids))
            yield from (same[j : j + size] for j in range(0, len(same), size))


def _answer(decoder: Decoder, tokenizer: Any, batch: list[_Job], settings: Settings) -> list[list[int]]:
    """New tokens of every prompt, up to and with the end-of-sequence token."""
    longest = max(len(job.ids) for job in batch)
    eos = decoder.model.generation_config.eos_token_id
    ends = {eos} if isinstance(eos, int) else set(eos or ())
    pad = tokenizer.pad_token_id or 0  # masked, so any token will do
    ids = torch.tensor([[pad] * (longest - len(job.ids)) + job.ids for job in batch])  # [B, S]
    mask = torch.tensor([[0] * (longest - len(job.ids)) + [1] * len(job.ids) for job in batch])
    # filters are switched off by name: transformers samples with top_k=50 unasked
    sampling: dict[str, Any] = {"do_sample": False}
    if batch[0].temperature > 0:
        sampling = {"do_sample": True, "temperature": batch[0].temperature, "top_k": 0, "top_p": 1.0}
    device = decoder.target.device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(f"{settings.seed} {batch[0].prompt.id}".encode()))
        sequences = decoder.generate(
            ids.to(device), attention_mask=mask.to(device), max_new_tokens=settings.max_new_tokens, **sampling
        )
    assert isinstance(sequences, torch.Tensor)
    answers = []
    for row in sequences[:, longest:].tolist():
        end = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
        answers.append(row[:end])  # what follows is padding
    return answers


def _line(job: _Job, answer: list[int], tokenizer: Any) -> str:
    row: dict[str, Any] = {"id": job.prompt.id}
    if job.prompt.category is not None:
        row["category"] = job.prompt.category
    row |= {
        "prompt": job.prompt.text,
        "response": tokenizer.decode(answer, skip_special_tokens=True),
        "prompt_ids": job.ids,
        "response_ids": answer,
        "temperature": job.temperature,
    }
    return json.dumps(row, ensure_ascii=False) + "\n"


class _Parts:
    """The files of one `out`: itself, written by the first process, and those of further processes in a folder."""

    def __init__(self, out: Path):
        self.out = out
        self.folder = out.with_name(out.name + ".parts")
        self.lock = FileLock(out.with_name(out.name + ".lock"))  # held while files are looked over or brought together

    def file(self, process: Process) -> Path:
        """Where a process appends its answers."""
        return self.out if process.first else self.folder / f"{process.rank}.jsonl"

    @contextmanager
    def session(
        self, mine: set[str], settings: Settings, environment: dict[str, Any], process: Process
    ) -> Iterator[set[str]]:
        """Answer as ``process``, whose share are the ids ``mine``; yields those that are answered in any file.

        Raises:
            UsageError: the files are of other settings, or damaged; another run is writing them.
        """
        self.out.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as held:
            with self.lock, ExitStack() as others:
                self._check(settings)
                self.folder.mkdir(exist_ok=True)
                own = self.folder / f"{process.rank}-of-{process.count}.lock"
                self._hold(held, {own})
                # processes of this run may be at it; with another number of them, shares would overlap
                beside = set(self.folder.glob(f"*-of-{process.count}.lock"))
                self._hold(others, set(self.folder.glob("*.lock")) - beside)
                done = {key for part in self._files() for key in _whole_lines(part)}
                if not mine <= done:
                    self._record(settings, environment)
                    _cut(self.file(process))
            yield done

    def merge(self, ids: list[str]) -> tuple[int, bool]:
        """Bring all lines into `out`, those of `ids` in their order, further ones behind them, once all are there.

        Returns:
            How many of `ids` are there, and whether `out` has them.
        """
        with self.lock, ExitStack() as held:
            lines = {key: line for part in self._files() for key, line in _whole_lines(part).items()}
            done = sum(key in lines for key in ids)
            if done < len(ids) or not self.folder.exists():
                return done, done == len(ids)
            try:
                self._hold(held, set(self.folder.glob("*.lock")))
            except UsageError:  # the process that ends last will come here again
                return done, False
            whole = b"".join(lines[key] for key in dict.fromkeys([*ids, *lines]))
            if not self.out.exists() or self.out.read_bytes() != whole:
                part = self.folder / "whole"
                part.write_bytes(whole)
                part.replace(self.out)
            shutil.rmtree(self.folder)
        return done, True

    def _files(self) -> list[Path]:
        return [file for file in (self.out, *sorted(self.folder.glob("*.jsonl"))) if file.exists()]

    def _hold(self, stack: ExitStack, locks: set[Path]) -> None:
        try:
            for lock in locks:
                stack.enter_context(FileLock(lock, timeout=0))
        except Timeout as error:
            raise UsageError(
                f"--out {self.out}: another run is writing it; wait for it, or give another --out"
            ) from error

    def _check(self, settings: Settings) -> None:
        """What earlier runs left is of the same settings."""
        if not self._files():
            return
        file = provenance_file(self.out)
        try:
            before = json.loads(file.read_text(encoding="utf-8"))["settings"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"--out {self.out}: this file was not written by `specdec distill` ({file.name} beside it is missing "
                "or damaged); give another --out"
            ) from error
        now = json.loads(json.dumps(asdict(settings)))
        changed = [f"{key} was {before.get(key)!r} and is {now[key]!r}" for key in now if now[key] != before.get(key)]
        if changed:
            raise UsageError(
                f"--out {self.out} was made with other settings ({'; '.join(changed)}); give another --out"
            )

    def _record(self, settings: Settings, environment: dict[str, Any]) -> None:
        """Write the provenance: the settings, and the environment of every process that was at it."""
        file = provenance_file(self.out)
        runs = json.loads(file.read_text(encoding="utf-8"))["runs"] if self._files() else []
        part = file.with_name(file.name + ".part")
        record = {"settings": asdict(settings), "runs": [*runs, environment]}
        part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        part.replace(file)


def _whole_lines(file: Path) -> dict[str, bytes]:
    """Id -> line, of the lines that were written to their end."""
    content = file.read_bytes()
    lines = content[: content.rfind(b"\n") + 1].splitlines(keepends=True)
    try:
        return {json.loads(line)["id"]: line for line in lines}
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"--out {file}: a line in it is damaged; give another --out") from error


def _cut(file: Path) -> None:
    """Make the file if it is not there, and take off a line that was torn when an earlier run was killed."""
    with file.open("ab") as lines:
        lines.truncate(file.read_bytes().rfind(b"\n") + 1)
