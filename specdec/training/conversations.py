"""Training samples from chats, prompts with answers, or plain text: token ids and which of them are to be learned."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specdec.errors import UsageError, first_line

from .data import instruction_text

if TYPE_CHECKING:
    from datasets import Dataset
    from rich.console import Console

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
IDS = (("input_ids", "loss_mask"), ("prompt_ids", "response_ids"))
PROVENANCE = ".provenance.json"  # how a file beside it was made; no data
FORMATS = (
    *IDS,
    ("conversations",),
    ("messages",),
    ("prompt", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("text",),
)  # tried in this order, so that exact ids win over text that would be tokenised again

Masked = tuple[list[int], list[int]]  # token ids, and 1 for each that is to be learned


# --- reading rows ----------------------------------------------------------------------------------------------


def json_rows(file: Path, argument: str) -> Iterator[dict[str, Any]]:
    """The objects of a `.jsonl` file (one a line), or of a `.json` file (one array).

    Raises:
        UsageError: the file, or the line, that cannot be read.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UsageError(f"{argument} {file}: {reason}; give a .jsonl file of one object a line") from error
    array = text.lstrip().startswith("[")
    where = str(file)
    try:
        for number, item in enumerate(json.loads(text) if array else text.split("\n"), start=1):
            where = f"{file}: item {number}" if array else f"{file}:{number}"
            if array or item.strip():
                row = item if array else json.loads(item)
                if not isinstance(row, dict):
                    raise UsageError(f"{argument} {where}: {type(row).__name__}, not an object; write {{...}}")
                yield row
    except json.JSONDecodeError as error:
        raise UsageError(f"{argument} {where}: not JSON ({error}); write one object a line") from error


def turns(row: dict[str, Any], where: str) -> list[dict[str, str]]:
    """The turns of a row with "conversations" or "messages" as {"role", "content"}; ShareGPT's names are read too.

    Raises:
        UsageError: no turns, or one of a kind that is not understood; `where` points at the row.
    """
    said = row.get("conversations") or row.get("messages")
    if not isinstance(said, list) or not all(isinstance(turn, dict) for turn in said):
        raise UsageError(f"{where}: no list of turns under conversations or messages (keys: {', '.join(row)})")
    found = []
    for turn in said:
        role = turn.get("role") or turn.get("from")
        content = turn.get("content") if turn.get("content") is not None else turn.get("value")
        if role not in ROLES or not isinstance(content, str):
            raise UsageError(
                f"{where}: a turn of role {role!r} with content {content!r:.40}; roles are {', '.join(ROLES)}, and "
                "content is text"
            )
        found.append({"role": ROLES[role], "content": content})
    return found


def first_user_turn(row: dict[str, Any], where: str) -> str:
    """What the user says first in a row with "conversations" or "messages"."""
    for turn in turns(row, where):
        if turn["role"] == "user":
            return turn["content"]
    raise UsageError(f"{where}: no user turn in it, so there is nothing to answer; take the row out")


# --- samples ---------------------------------------------------------------------------------------------------


def load_samples(data: str, tokenizer: Any, max_length: int, limit: int | None = None) -> Dataset:
    """Samples with `input_ids` (ints) and `loss_mask` (0 or 1 each, as many): 1 marks what is to be learned.

    Learned are the assistant's tokens with the end-of-turn or eos token that closes a turn. Rows may hold, and each
    file's first row decides for the file:

    - `input_ids` and `loss_mask`, or `prompt_ids` and `response_ids` (by `specdec distill`): taken as they are.
    - `conversations` or `messages`: turns of `role`/`content`, or ShareGPT's `from`/`value`. They go through the chat
      template; where there is none, turns are put one after another with eos after each of the assistant's.
    - `prompt` and `response`: plain text, put together without a template.
    - `instruction` (and `input`) with `output` or `response`: a chat of one question where there is a template, else
      "Instruction: ... Input: ... Response: ...".
    - `text`: all of it is learned.

    Text starts with bos where the tokenizer puts one itself, as prompts do when decoding.

    Args:
        data: a `.jsonl` or `.json` file, a folder of them, or a hub id, also as `id:split` (`train` if left out).
        tokenizer: the target's; a fast one, unless rows are ids.
        max_length: tokens; the start of a longer sample is kept. Samples with nothing left to learn are dropped, with
            a warning.
        limit: rows to read at most.

    Raises:
        UsageError: no such data, rows that are not understood, ids outside the vocabulary, or nothing to learn.
    """
    try:
        from datasets import Features, Sequence, Value, concatenate_datasets
    except ImportError as error:
        raise UsageError("reading training data needs datasets: pip install 'specdec[train]'") from error

    features = Features(
        {"input_ids": Sequence(Value("int32")), "loss_mask": Sequence(Value("int8")), "learned": Value("int32")}
    )
    parts, left = [], limit
    for where, rows in _sources(data):
        if left is not None:
            rows = rows.select(range(min(left, len(rows))))
            left -= len(rows)
        if len(rows):
            read = _Reader(_format(rows[0], where), tokenizer, where, max_length)
            text = f"tokenising {Path(where).name}"
            parts.append(
                rows.map(
                    read,
                    with_indices=True,
                    remove_columns=rows.column_names,
                    features=features,
                    desc=text,
                    load_from_cache_file=False,  # its key knows the arguments and not this code
                )
            )
    if not parts:
        raise UsageError(f"--data {data}: there is no row in it; give a file with at least one sample")
    samples = concatenate_datasets(parts)
    kept = samples.filter(
        any, input_columns="loss_mask", desc="dropping samples with nothing to learn", load_from_cache_file=False
    )
    if not len(kept):
        if any(samples["learned"]):
            raise UsageError(
                f"--data {data}: all tokens masked: the first {max_length} tokens of every sample hold nothing to "
                "learn; raise --max-length"
            )
        raise UsageError(
            f"--data {data}: data without assistant turns, so all tokens are masked and nothing can be learned; give "
            'chats with assistant turns, or rows of "text"'
        )
    if len(kept) < len(samples):
        warnings.warn(
            f"{data}: {len(samples) - len(kept)} of {len(samples)} samples dropped: nothing to learn in their first "
            f"{max_length} tokens",
            stacklevel=2,
        )
    return kept.remove_columns("learned")


def _sources(data: str) -> Iterator[tuple[str, Dataset]]:
    """(name, rows) of every file, or of the hub's split."""
    from datasets import load_dataset

    path = Path(data).expanduser()
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.suffix in (".jsonl", ".json"))
        files = [file for file in found if not file.name.endswith(PROVENANCE)]
        if not files:
            raise UsageError(f"--data {data}: there is no .jsonl or .json file in this folder")
    elif path.is_file() or path.suffix in (".jsonl", ".json") or data.startswith(("/", ".", "~")):
        files = [path]
    else:
        name, _, split = data.partition(":")
        try:
            rows = load_dataset(name, split=split or "train")
        except Exception as error:  # hub, network and readers raise their own kinds
            raise UsageError(
                f"--data {data}: no such file, and the Hugging Face hub did not give it ({first_line(error)})"
            ) from error
        yield data, rows
        return
    for file in files:
        if next(json_rows(file, "--data"), None) is None:
            continue
        try:
            rows = load_dataset("json", data_files=str(file), split="train")
        except Exception as error:
            for _ in json_rows(file, "--data"):  # its errors name the line, the other reader's do not
                pass
            raise UsageError(f"--data {file}: cannot be read as rows of one kind ({first_line(error)})") from error
        yield str(file), rows


# --- formats ---------------------------------------------------------------------------------------------------


def _format(row: dict[str, Any], where: str) -> tuple[str, ...]:
    """Which of FORMATS a file's first row has."""
    keys = [key for key, value in row.items() if value is not None]
    for needed in FORMATS:
        if all(key in keys for key in needed):
            return needed
    known = "; ".join(" + ".join(needed) for needed in FORMATS)
    raise UsageError(f"--data {where}: rows of {', '.join(keys) or 'no keys'}; what is understood is {known}")


class _Reader:
    """Rows of one file -> samples."""

    def __init__(self, keys: tuple[str, ...], tokenizer: Any, where: str, max_length: int):
        if keys not in IDS and not tokenizer.is_fast:
            raise UsageError(
                f"--data {where}: the tokenizer does not tell which characters a token stands for; give a fast one "
                f"(tokenizer.json), or rows of {' + '.join(IDS[0])}"
            )
        self.keys, self.tokenizer, self.where, self.max_length = keys, tokenizer, where, max_length

    def __call__(self, row: dict[str, Any], index: int) -> dict[str, Any]:
        where = f"--data {self.where}: row {index + 1}"
        for key in self.keys:
            if row[key] is None:
                raise UsageError(f"{where}: it lacks {key!r}, which the file's first row has")
        ids, mask = self._masked(row, where)
        bad = [token for token in ids if not 0 <= token < len(self.tokenizer)]
        if bad:
            raise UsageError(
                f"{where}: token id {bad[0]} is outside the tokenizer's vocabulary of {len(self.tokenizer)}; give data "
                "tokenised for this model, or text"
            )
        return {"input_ids": ids[: self.max_length], "loss_mask": mask[: self.max_length], "learned": sum(mask)}

    def _masked(self, row: dict[str, Any], where: str) -> Masked:
        tokenizer = self.tokenizer
        first, last = row[self.keys[0]], row[self.keys[-1]]
        if self.keys == ("input_ids", "loss_mask"):
            if len(first) != len(last) or not set(last) <= {0, 1}:
                raise UsageError(f"{where}: loss_mask needs a 0 or 1 for each of the {len(first)} input_ids")
            return first, [int(entry) for entry in last]
        if self.keys == ("prompt_ids", "response_ids"):
            return first + last, [0] * len(first) + [1] * len(last)
        if self.keys in (("conversations",), ("messages",)):
            return chat(turns(row, where), tokenizer, where)
        if self.keys == ("text",):
            ids, _ = plain([(True, first)], tokenizer)
            return ids, [1] * len(ids)
        if self.keys == ("prompt", "response"):
            return plain([(False, first), (True, last)], tokenizer)
        given = row.get("input") or ""
        if not tokenizer.chat_template:
            return plain([(False, instruction_text(first, given)), (True, f" {last.strip()}")], tokenizer)
        question = f"{first}\n\n{given}" if given else first
        return chat([{"role": "user", "content": question}, {"role": "assistant", "content": last}], tokenizer, where)


def plain(pieces: list[tuple[bool, str]], tokenizer: Any) -> Masked:
    """Pieces of text in a row, each with whether it is learned; eos comes after each that is."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    ids = [bos] if bos is not None and tokenizer("").input_ids[:1] == [bos] else []
    mask = [0] * len(ids)
    text = ""  # what has not been tokenised yet: across pieces, so that none starts where the tokenizer sees no word
    for learned, piece in pieces:
        start = len(text)
        text += piece
        if learned:
            more, offsets = _encode(text, tokenizer)
            ids += more
            mask += [int(end > start) for _, end in offsets]
            if eos is not None and ids[-1:] != [eos]:
                ids.append(eos)
                mask.append(1)
            text = ""
    return ids, mask


def chat(said: list[dict[str, str]], tokenizer: Any, where: str) -> Masked:
    """A conversation in the chat template, or as it stands where there is none; the assistant's turns are learned."""
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        return plain([(turn["role"] == "assistant", turn["content"]) for turn in said], tokenizer)
    try:
        if re.search(r"\{%-?\s*generation\b", tokenizer.get_chat_template()):
            encoded = tokenizer.apply_chat_template(said, return_dict=True, return_assistant_tokens_mask=True)
            ids, mask = encoded["input_ids"], encoded["assistant_masks"]
        else:
            text = tokenizer.apply_chat_template(said, tokenize=False)
            spans = _assistant_spans(said, text, tokenizer, where)
            ids, offsets = _encode(text, tokenizer)
            mask = [int(any(a < end and b > start for start, end in spans)) for a, b in offsets]
    except TemplateError as error:
        raise UsageError(f"{where}: the chat template refuses it ({first_line(error)}); take the row out") from error
    return ids, _with_ends(ids, mask, tokenizer)


def _assistant_spans(said: list[dict[str, str]], text: str, tokenizer: Any, where: str) -> list[tuple[int, int]]:
    """Where the assistant's contents stand in the rendered `text`: (start, end) in characters."""
    spans = []
    end = 0
    for i, turn in enumerate(said):
        if turn["role"] != "assistant":
            continue
        before = tokenizer.apply_chat_template(said[:i], tokenize=False, add_generation_prompt=True) if i else ""
        # a template may write earlier turns otherwise when more follow, so only what both have in common counts
        common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(text, before)))
        start = max(end, common)
        whole = turn["content"].strip()
        answer = whole.split("</think>")[-1].strip()  # templates take the reasoning out of earlier turns
        # the second place: a generation prompt may have opened what the content opens again
        places = [(text.find(part, at), part) for part, at in ((whole, start), (whole, end), (answer, start))]
        found, part = next((place for place in places if place[0] >= 0), (-1, ""))
        if found < 0:
            raise UsageError(
                f"{where}: the chat template rewrites what the assistant says, so it cannot be found in the text; mark "
                "it with {% generation %} in the template"
            )
        end = found + len(part)
        spans.append((found, end))
    return spans


def _with_ends(ids: list[int], mask: list[int], tokenizer: Any) -> list[int]:
    """`mask` with the special token that closes each learned run, and white space before it."""
    special = {*tokenizer.all_special_ids, *(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)}
    closed = list(mask)
    for i in range(1, len(ids)):
        if mask[i - 1] and not mask[i] and ids[i - 1] not in special:
            end = i
            while end < len(ids) and ids[end] not in special and not tokenizer.decode([ids[end]]).strip():
                end += 1
            if end < len(ids) and ids[end] in special:
                closed[i : end + 1] = [1] * (end + 1 - i)
    return closed


def _encode(text: str, tokenizer: Any) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids of `text`, and the characters each stands for."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return encoded["input_ids"], encoded["offset_mapping"]


# --- looking at one --------------------------------------------------------------------------------------------


def show_sample(sample: dict[str, Any], tokenizer: Any, console: Console) -> None:
    """Print one sample of `load_samples`: what is learned in colour (in brackets where there is none), the rest dim."""
    from rich.text import Text

    ids, mask = sample["input_ids"], sample["loss_mask"]
    shown, before, start = Text(), "", 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or mask[end] != mask[start]:
            # decoded from the beginning: a tokenizer drops the space in front of what it decodes alone
            text = tokenizer.decode(ids[:end], skip_special_tokens=False)
            part, before = text[len(before) :], text
            if mask[start]:
                shown.append(part if console.color_system else f"\u27e6{part}\u27e7", style="bold green")
            else:
                shown.append(part, style="dim")
            start = end
    console.print(shown, soft_wrap=True)
    console.print(f"{len(ids)} tokens, {sum(mask)} learned ({sum(mask) / len(ids):.0%})", highlight=False)
