"""Other engines as a row of a comparison: any server of OpenAI's completions API (vLLM, SGLang, llama.cpp, ...).

A comparison hands over its prompts token for token where the server takes ids (vLLM), as text where it takes only that
(`transformers serve`), and as one user message where it has nothing but a chat.
"""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from typing import Any, Literal, get_args

import torch

from specdec.bench.arms import Settings
from specdec.errors import UsageError, first_line

# tokenizers that are not the same count at least one of these differently: words, digits and code, other scripts
PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "for i in range(1024):\n    total += 3.14159 * x[i]\n",
    "Größenordnungen naïvement überprüfen — 東京タワー, Москва",
)
PROBE = {"max_tokens": 1, "temperature": 0.0}
REFUSALS = (400, 404, 405, 422)  # of a kind of prompt, or of a path


Takes = Literal["ids", "text", "chat"]


class HTTPError(UsageError):
    """The server refused a request, with this status."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


class ServerArm:
    """A server that continues prompts; what it sends back is text, which is tokenised again.

    So tokens are counted by our tokenizer for it as for every arm, step lengths are not known, and HTTP and that
    tokenising are inside its time. Before anything is measured the server is asked for its models and for the length of
    some texts, so that another model or tokenizer is found out.

    Args:
        name: the row's.
        url: of the API, up to and including /v1.
        tokenizer: the target's; the server must have the same.
        model: the target's name or folder, whose last part the server's name for it must end with.
        ends: tokens that end a text; one is added where the server says that it stopped by itself.
        served: what the server calls the model, if not so.
        timeout: seconds for one answer.

    Attributes:
        takes: how it gets its prompts.

    Raises:
        UsageError: nobody answers there, it is no such API, it serves another model, or has another tokenizer.
    """

    lossless = False  # nothing is known about it
    state = None
    stats = None

    def __init__(
        self,
        name: str,
        url: str,
        tokenizer: Any,
        model: str,
        ends: frozenset[int],
        served: str | None = None,
        timeout: float = 600.0,
    ):
        self.name, self.url, self.tokenizer, self.timeout = name, url, tokenizer, timeout
        self.where = f"--against {name}={url}"  # as the user wrote it
        self._ends = ends
        eos = tokenizer.eos_token_id
        self._end = eos if eos in ends else min(ends, default=None)
        self.served = served or self._find(model)
        self.takes = self._how()
        self._check_tokenizer()
        self._own, self._reported, self._unfaithful, self._sampled = 0, 0, 0, False

    def reset(self) -> None:
        pass

    def forget(self) -> None:
        pass

    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, settings: Settings) -> torch.Tensor:
        """One prompt int64 [1, S] -> int64 [1, S + new]; raises UsageError when the server fails."""
        ids = input_ids[0].tolist()
        body = {"max_tokens": settings.max_new_tokens, "temperature": settings.temperature, "top_p": 1.0}
        if settings.temperature > 0:
            body["seed"] = int(torch.randint(1 << 31, ()))
            self._sampled = True
        answer = self._complete(self.takes, ids if self.takes == "ids" else self._text(ids), body)
        choice = answer["choices"][0]
        new = list(self.tokenizer(_said(choice), add_special_tokens=False, verbose=False).input_ids)
        if choice.get("finish_reason") == "stop" and self._end is not None:
            reason = choice.get("stop_reason")  # vLLM names the token, if there are several
            new.append(reason if reason in self._ends else self._end)
        if (counted := _usage(answer, "completion_tokens")) is not None:
            self._own, self._reported = self._own + len(new), self._reported + counted
        return torch.cat([input_ids, input_ids.new_tensor([new])], dim=1) if new else input_ids

    def remarks(self) -> list[str]:
        """What a reader of its row must know, from all calls so far."""
        found = ["HTTP is inside its time, its tokens are its text tokenised here"]
        if self.takes == "chat":
            found.append("it answers chats only: its chat template is around every prompt, whose tokens are not ours")
        if self._unfaithful:
            found.append(f"it takes text only, and {self._unfaithful} prompts are other tokens as text")
        if self._own != self._reported:
            found.append(f"it counts {self._reported} new tokens where its text has {self._own} here")
        if self._sampled:
            found.append("filters that nobody asked for, such as top-k, are as it sets them")
        return [f"{self.name} is a server ({self.url}): {'; '.join(found)}"]

    def _find(self, model: str) -> str:
        """What it calls ``model``."""
        try:
            listed = self._ask("models", None).get("data")
        except HTTPError as error:
            raise UsageError(f"{error}; the URL goes up to /v1, and #ID behind it names the model") from error
        names = [m["id"] for m in listed if isinstance(m, dict) and "id" in m] if isinstance(listed, list) else []
        for name in names:
            if _last(name) == _last(model):
                return str(name)
        serves = f"it serves {', '.join(names[:4])}" if names else "it lists no model"
        raise UsageError(
            f"{self.where}: {serves}, not {_last(model)}; start it with that model, or write what it "
            "calls it behind the URL: #ID"
        )

    def _how(self) -> Takes:
        """The first kind of prompt that it takes."""
        ids = self.tokenizer(PROBES[0]).input_ids
        for takes in get_args(Takes):
            try:
                answer = self._complete(takes, ids if takes == "ids" else PROBES[0], PROBE)
            except HTTPError as error:
                if takes == "chat" or error.status not in REFUSALS:
                    raise
            else:
                # some take ids for a text of numbers
                if takes != "ids" or _usage(answer, "prompt_tokens") in (None, len(ids)):
                    break
        return takes

    def _check_tokenizer(self) -> None:
        """Compare the length of texts, special tokens included."""
        if self.takes == "chat" and not self.tokenizer.chat_template:
            return  # how the server wraps them is not known
        for text in PROBES:
            if self.takes == "chat":
                said = [{"role": "user", "content": text}]
                ours = self.tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=True)
            else:
                ours = self.tokenizer(text)
            theirs = _usage(self._complete(self.takes, text, PROBE), "prompt_tokens")
            if theirs not in (None, len(ours["input_ids"])):
                raise UsageError(
                    f"{self.where}: its tokenizer makes {theirs} tokens of {text!r}, MODEL's "
                    f"{len(ours['input_ids'])}; compare with a server of the same model"
                )

    def _text(self, ids: list[int]) -> str:
        """A text that the tokenizer makes ``ids`` of, if there is one."""
        special = self.tokenizer("").input_ids
        bare = ids[len(special) :] if ids[: len(special)] == special else ids
        text = str(self.tokenizer.decode(bare, clean_up_tokenization_spaces=False))
        self._unfaithful += self.takes == "text" and self.tokenizer(text, verbose=False).input_ids != ids
        return text

    def _complete(self, takes: Takes, prompt: list[int] | str, body: dict[str, Any]) -> dict[str, Any]:
        """Its answer, which has a text."""
        if takes == "chat":
            said = {"messages": [{"role": "user", "content": prompt}]}
            answer = self._ask("chat/completions", {"model": self.served, **said, **body})
        else:
            answer = self._ask("completions", {"model": self.served, "prompt": prompt, **body})
        choices = answer.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(_said(choices[0]), str):
            raise UsageError(f"{self.where}: its answer has no text; is it a completions API?")
        return answer

    def _ask(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        """GET, or POST of ``body``, as JSON."""
        where = f"{self.where}/{path}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/{path}", data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                answer = json.loads(response.read())
        except urllib.error.HTTPError as error:
            said = " ".join(error.read().decode(errors="replace").split())[:200]
            message = f"{where}: HTTP {error.code} ({said or error.reason}); see the server's log"
            raise HTTPError(message, error.code) from error
        except TimeoutError as error:
            raise UsageError(f"{where}: no answer in {self.timeout:g} seconds; raise --server-timeout") from error
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                raise UsageError(f"{where}: no answer in {self.timeout:g} seconds; raise --server-timeout") from error
            raise UsageError(f"{where}: cannot be reached ({reason}); start it, or mend the URL") from error
        except ValueError as error:
            raise UsageError(f"{where}: not JSON ({first_line(error)}); is it an OpenAI-compatible API?") from error
        if not isinstance(answer, dict):
            raise UsageError(f"{where}: a JSON {type(answer).__name__}, not an object; is it an OpenAI-compatible API?")
        return answer


def _said(choice: dict[str, Any]) -> Any:
    """The text of a completion or of a chat's message."""
    return choice.get("message", choice).get("content", choice.get("text"))


def _usage(answer: dict[str, Any], key: str) -> int | None:
    usage = answer.get("usage")
    return usage.get(key) if isinstance(usage, dict) else None


def _last(name: str) -> str:
    """The last part of a model's name or path, without its revision."""
    return name.rstrip("/").rsplit("/", 1)[-1].partition("@")[0].lower()
