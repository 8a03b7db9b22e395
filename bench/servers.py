"""Other engines as a row of a comparison: any server of OpenAI's completions API (vLLM, SGLang, llama.cpp, ...)."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from typing import Any

import torch

from specdec.bench.arms import Settings
from specdec.errors import UsageError, first_line


class ServerArm:
    """A server that completes token ids; what it sends back is text, which is tokenised again.

    So a comparison sees its prompts token for token, but its answers only as text: tokens are counted by our
    tokenizer, step lengths are not known, and HTTP is inside its time.

    Args:
        name: the row's.
        url: of the API, up to and including /v1.
        tokenizer: the target's; the server must have the same.
        end: token that ends a text, added where the server says that it stopped by itself.
        timeout: seconds for one answer.

    Raises:
        UsageError: not a URL, or nobody answers there.
    """

    lossless = False  # nothing is known about it
    state = None
    stats = None

    def __init__(self, name: str, url: str, tokenizer: Any, end: int | None, timeout: float = 600.0):
        if not url.startswith(("http://", "https://")):
            raise UsageError(f"server {name} {url!r}: give a URL like http://localhost:8000/v1")
        self.name, self.url, self.tokenizer, self.end, self.timeout = name, url.rstrip("/"), tokenizer, end, timeout
        models = self._ask("models", None).get("data")
        if not isinstance(models, list) or not models or "id" not in models[0]:
            raise UsageError(f"server {name} {self.url}: it lists no model under /models; start it with one")
        self.model: str = models[0]["id"]

    def reset(self) -> None:
        pass

    def forget(self) -> None:
        pass

    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, settings: Settings) -> torch.Tensor:
        """One prompt int64 [1, S] -> int64 [1, S + new]; raises UsageError when the server fails."""
        body = {
            "model": self.model,
            "prompt": input_ids[0].tolist(),
            "max_tokens": settings.max_new_tokens,
            "temperature": settings.temperature,
            "top_p": 1.0,
        }
        if settings.temperature > 0:
            body["seed"] = int(torch.randint(1 << 31, ()))
        choices = self._ask("completions", body).get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0].get("text"), str):
            raise UsageError(f"server {self.name} {self.url}: its answer has no text; is it a completions API?")
        new = list(self.tokenizer(choices[0]["text"], add_special_tokens=False, verbose=False).input_ids)
        if choices[0].get("finish_reason") == "stop" and self.end is not None:
            new.append(self.end)
        return torch.cat([input_ids, input_ids.new_tensor([new])], dim=1) if new else input_ids

    def _ask(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        """GET, or POST of ``body``, as JSON."""
        where = f"server {self.name} {self.url}/{path}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/{path}", data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                answer = json.loads(response.read())
        except urllib.error.HTTPError as error:
            said = " ".join(error.read().decode(errors="replace").split())[:200]
            raise UsageError(f"{where}: HTTP {error.code} ({said or error.reason}); see the server's log") from error
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
