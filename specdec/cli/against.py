"""Servers as rows of a comparison: the options that `bench` and `spec-bench` share."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specdec.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from specdec.bench.arms import Arm
    from specdec.bench.servers import ServerArm

Against = Annotated[
    list[str] | None,
    typer.Option(
        metavar="[NAME=]URL[#ID]",
        help="A server of the same model with OpenAI's completions API (vLLM, `transformers serve`, ...) as a row, "
        "e.g. vllm=http://localhost:8000/v1; #ID where it calls MODEL by another name. Its text is tokenised again to "
        "count tokens. Repeatable.",
    ),
]
ServerTimeout = Annotated[float, typer.Option(min=0.1, help="Seconds a server may take for an answer.")]


@dataclass(frozen=True)
class Server:
    """One of --against.

    Attributes:
        name: the row's.
        url: of the API, up to and including /v1.
        model: what it calls the model; None if it is to be found in its list.
    """

    name: str
    url: str
    model: str | None

    def __str__(self) -> str:
        return self.url + (f"#{self.model}" if self.model else "")


def servers(texts: Sequence[str] | None, taken: Collection[str]) -> list[Server]:
    """The values of --against; raises UsageError for one that is none, and for names that are ``taken``."""
    found: dict[str, Server] = {}
    for text in texts or ():
        parts = re.fullmatch(r"(?:([^=/]+)=)?(https?://[^#]+)(?:#(.+))?", text.strip())
        if parts is None:
            raise UsageError(f"--against {text!r}: write NAME=URL, for example vllm=http://localhost:8000/v1")
        name, url = parts[1] or "server", parts[2].rstrip("/")
        if name in taken or name in found:
            raise UsageError(f"--against {text!r}: {name!r} already names something else; write OTHER-NAME={url}")
        found[name] = Server(name, url, parts[3])
    return list(found.values())


def server_arms(
    found: Sequence[Server], timeout: float, model: str, target: PreTrainedModel, tokenizer: Any
) -> list[ServerArm]:
    """Each server, asked what it serves and how it counts tokens.

    Args:
        found: of --against.
        timeout: seconds for an answer.
        model: MODEL.
        target, tokenizer: what MODEL is.
    """
    from specdec.bench.harness import end_tokens
    from specdec.bench.servers import ServerArm

    ends = end_tokens(target)
    return [ServerArm(s.name, s.url, tokenizer, model, ends, s.model, timeout) for s in found]


def remarks(arms: Sequence[Arm]) -> list[str]:
    """What a reader must know about the servers among ``arms``."""
    from specdec.bench.servers import ServerArm

    return [text for arm in arms if isinstance(arm, ServerArm) for text in arm.remarks()]
