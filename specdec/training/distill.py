"""The target answers prompts itself: what trained drafters should learn from, since they must imitate this very model.

Medusa (Cai et al. 2024, section 2.3) calls it self-distillation.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from filelock import FileLock, Timeout

from specdec.decoder import Decoder
from specdec.errors import UsageError

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
    """What a run did: prompts in the file now, those too long for the context, and what this run added."""

    done: int
    too_long: int
    tokens: int = 0
    seconds: float = 0.0


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
) -> Outcome:
    """Append the target's answer to every prompt to `out`, each exactly once; a later call goes on where one stopped.

    A line holds "id", "category" (if the prompt has one), "prompt", "response", "prompt_ids", "response_ids" (int
    lists; the end-of-sequence token included where the answer ended with it) and "temperature". Lines come batch by
    batch. A batch is sampled with a seed made from `settings.seed` and its first prompt, so an interrupted run ends in
    the same answers as an unbroken one. `out` + ".provenance.json" says how the file was made.

    Args:
        decoder: the target; any drafter.
        tokenizer: the target's.
        prompts: those longer than the context less `max_new_tokens` are left out and counted.
        out: the `.jsonl` file.
        settings: what decides the answers.
        environment: versions, machine and command, for the record.
        progress: called with (done, total, text).

    Raises:
        UsageError: `out` holds something else, comes from other settings is being written or cannot be; no prompt fits.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(out.with_name(out.name + ".lock"), timeout=0):
            return _distill(decoder, tokenizer, prompts, out, settings, environment, progress)
    except Timeout as error:
        raise UsageError(f"--out {out}: another run is writing it; wait for it, or give another --out") from error
    except OSError as error:
        raise UsageError(f"--out {out}: cannot be written ({error.strerror}); give a place with room") from error


def _distill(
    decoder: Decoder,
    tokenizer: Any,
    prompts: list[Prompt],
    out: Path,
    settings: Settings,
    environment: dict[str, Any],
    progress: Callable[[int, int, str], None],
) -> Outcome:
    done = _resume(out, settings)
    jobs = _jobs(prompts, tokenizer, settings, decoder.target.context)
    left = sum(job.prompt.id not in done for job in jobs)
    outcome = Outcome(len(jobs) - left, len(prompts) - len(jobs))
    if not left:
        return outcome
    _record(out, settings, environment)
    start = perf_counter()
    with out.open("ab") as file:
        progress(outcome.done, len(jobs), "answering")
        for batch in _batches(jobs, settings):
            if all(job.prompt.id in done for job in batch):
                continue
            # a batch that was cut is made again as a whole: its seed belongs to all of it
            answers = _answer(decoder, tokenizer, batch, settings)
            lines = [
                _line(job, answer, tokenizer)
                for job, answer in zip(batch, answers, strict=True)
                if job.prompt.id not in done
            ]
            file.write("".join(lines).encode())
            file.flush()
            outcome.done += len(lines)
            outcome.tokens += sum(map(len, answers))
            outcome.seconds = perf_counter() - start
            progress(outcome.done, len(jobs), f"{outcome.tokens / outcome.seconds:.0f} tokens/s")
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


def _resume(out: Path, settings: Settings) -> set[str]:
    """Ids that `out` holds, after cutting off a line that was torn when an earlier run was killed."""
    if not out.exists():
        return set()
    try:
        before = json.loads(provenance_file(out).read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"--out {out}: this file was not written by `specdec distill` ({provenance_file(out).name} beside it is "
            "missing or damaged); give another --out"
        ) from error
    now = json.loads(json.dumps(asdict(settings)))
    changed = [f"{key} was {before.get(key)!r} and is {now[key]!r}" for key in now if now[key] != before.get(key)]
    if changed:
        raise UsageError(f"--out {out} was made with other settings ({'; '.join(changed)}); give another --out")
    content = out.read_bytes()
    whole = content.rfind(b"\n") + 1
    try:
        ids = [json.loads(line)["id"] for line in content[:whole].splitlines()]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"--out {out}: a line in it is damaged; give another --out") from error
    if whole < len(content):
        with out.open("r+b") as file:
            file.truncate(whole)
    return set(ids)


def _record(out: Path, settings: Settings, environment: dict[str, Any]) -> None:
    """Write the provenance: the settings, and the environment of every run that added to the file."""
    file = provenance_file(out)
    runs = json.loads(file.read_text(encoding="utf-8"))["runs"] if out.exists() else []
    part = file.with_name(file.name + ".part")
    record = {"settings": asdict(settings), "runs": [*runs, environment]}
    part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    part.replace(file)
