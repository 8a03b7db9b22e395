"""Servers as rows: found out before anything is measured, asked in the way they understand, counted like the others."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import word_tokenizer
from tiny_models import tiny_llama
from typer.testing import CliRunner

from specdec.bench.arms import Settings
from specdec.bench.servers import PROBES, ServerArm
from specdec.bench.spec_bench.answers import RunFolder
from specdec.bench.spec_bench.report import from_folder
from specdec.cli import app
from specdec.cli.against import Server, servers
from specdec.cli.common import load_tokenizer
from specdec.errors import UsageError

TOKENIZER = word_tokenizer()
ENDS = frozenset({2})
SHORT = Settings(5, 0.0)


class Completions(BaseHTTPRequestHandler):
    """Continues every prompt with "fa fe". What of ``server`` can be set says how it fails and what it understands."""

    server: Any

    def do_GET(self) -> None:
        self._send(200, {"data": [{"id": name} for name in self.server.models]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        kind = "chat" if "messages" in body else "ids" if isinstance(body["prompt"], list) else "text"
        server = self.server
        server.bodies.append(body)
        time.sleep(server.delay)
        if len(server.bodies) > server.dies_after:
            self._send(500, {"error": "no memory left"})
        elif body["model"] not in server.models:
            self._send(404, {"error": f"no model {body['model']}"})
        elif kind not in server.takes:
            self._send(404 if server.takes == ["chat"] else 400, {"detail": "prompt must be a string"})
        else:
            text = body["messages"][0]["content"] if kind == "chat" else body["prompt"]
            count = len(text) if kind == "ids" else len(server.tokenizer(text).input_ids) + server.off
            said = {"message": {"content": "fa fe"}} if kind == "chat" else {"text": server.says}
            usage = {"prompt_tokens": count, "completion_tokens": server.counts}
            choice = {**said, "finish_reason": "stop", **server.more}
            self._send(200, {"choices": [choice], "usage": usage})

    def _send(self, code: int, entry: dict) -> None:
        content = self.server.instead or json.dumps(entry).encode()
        try:
            self.send_response(code)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
        except ConnectionError:
            pass  # the client gave up waiting

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Any]:
    made: Any = ThreadingHTTPServer(("127.0.0.1", 0), Completions)
    made.models, made.takes, made.bodies = ["some/model"], ["ids", "text", "chat"], []
    made.off, made.delay, made.dies_after, made.instead, made.says, made.more = 0, 0.0, 10**9, b"", "fa fe", {}
    made.counts, made.tokenizer = 3, TOKENIZER
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


def url(server: Any) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}/v1"


def arm(server: Any, **changes: Any) -> ServerArm:
    return ServerArm("s", url(server), TOKENIZER, "/there/model/", ENDS, **{"timeout": 120.0, **changes})


def ask(made: ServerArm, ids: list[int], settings: Settings = SHORT) -> list[int]:
    tokens = torch.tensor([ids])
    return made.generate(tokens, torch.ones_like(tokens), settings)[0].tolist()


# ---- what --against means -----------------------------------------------------------------------------------------


def test_a_server_has_a_name_an_address_and_perhaps_a_model() -> None:
    found = servers(["vllm=http://a:8000/v1/", "https://b/v1?x=1#org/m@main"], {"none"})
    assert found == [Server("vllm", "http://a:8000/v1", None), Server("server", "https://b/v1?x=1", "org/m@main")]
    assert str(found[1]) == "https://b/v1?x=1#org/m@main"


@pytest.mark.parametrize("text", ["localhost:8000", "vllm=localhost", "=http://a", "ftp://a", "", "a/b=http://a"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="write NAME=URL"):
        servers([text], ())


def test_two_rows_of_one_name_are_refused() -> None:
    for texts, taken in ((["http://a", "http://b"], ()), (["none=http://a"], ("none",))):
        with pytest.raises(UsageError, match="already names something else"):
            servers(texts, taken)


# ---- how it is asked ----------------------------------------------------------------------------------------------


def test_ids_are_sent_where_they_are_understood_and_its_text_is_tokenised_again(server) -> None:
    made = arm(server)
    assert (made.takes, made.served) == ("ids", "some/model")
    output = ask(made, [7, 8])
    assert output == [7, 8, *TOKENIZER("fa fe", add_special_tokens=False).input_ids, 2]
    body = server.bodies[-1]
    assert body["prompt"] == [7, 8]
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("some/model", 5, 0.0)
    assert made.remarks() == [
        f"s is a server ({url(server)}): HTTP is inside its time, its tokens are its text tokenised here"
    ]


def test_text_that_means_the_same_ids_is_sent_where_only_text_is_understood(server) -> None:
    server.takes, server.tokenizer = ["text"], load_tokenizer("tiny")
    made = ServerArm("s", url(server), server.tokenizer, "model", ENDS)
    ids = server.tokenizer("The cat is").input_ids
    assert len(server.tokenizer("").input_ids) == 1  # it begins every text with a token of its own
    ask(made, ids)
    assert made.takes == "text"
    assert server.tokenizer(server.bodies[-1]["prompt"]).input_ids == ids
    assert "other tokens" not in made.remarks()[0]
    ask(made, [*ids, *server.tokenizer.convert_tokens_to_ids(list("cat"))])  # spelt in letters
    assert "1 prompts are other tokens as text" in made.remarks()[0]


def test_a_server_of_chats_alone_is_asked_in_one_and_its_row_says_so(server) -> None:
    server.takes = ["chat"]
    made = arm(server)
    assert made.takes == "chat"
    ids = TOKENIZER("ba be").input_ids
    assert len(ask(made, ids)) == len(ids) + 3
    assert server.bodies[-1]["messages"] == [{"role": "user", "content": TOKENIZER.decode(ids)}]
    assert "its chat template is around every prompt" in made.remarks()[0]


def test_sampling_is_seeded_by_torch_and_its_row_says_whose_filters_are_on(server) -> None:
    made = arm(server)
    seeds = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        ask(made, [7, 8], Settings(5, 0.7))
        seeds.append(server.bodies[-1]["seed"])
    assert seeds[0] == seeds[1] != seeds[2]
    assert "top-k" in made.remarks()[0]


def test_the_end_token_is_the_one_that_the_server_names(server) -> None:
    server.more = {"stop_reason": 9}
    made = arm(server)
    assert ask(made, [7])[-1] == 2  # not one that ends texts of this model
    made = ServerArm("s", url(server), TOKENIZER, "model", frozenset({2, 9}))
    assert ask(made, [7])[-1] == 9
    server.more = {"finish_reason": "length"}
    assert ask(made, [7])[-1] not in (2, 9)


def test_another_count_of_new_tokens_is_told(server) -> None:
    server.counts = 4
    made = arm(server)
    ask(made, [7])
    ask(made, [7])
    assert "it counts 8 new tokens where its text has 6 here" in made.remarks()[0]


# ---- what is found out before anything is measured ------------------------------------------------------------------


def test_another_tokenizer_is_found_out_by_its_counts(server) -> None:
    server.off = 1
    for takes in (["ids", "text"], ["text"]):
        server.takes = takes
        count = len(TOKENIZER(PROBES[0]).input_ids)
        with pytest.raises(UsageError, match=rf"makes {count + 1} tokens of .*MODEL's {count}"):
            arm(server)


def test_another_model_is_refused_unless_its_name_is_given(server) -> None:
    server.models = ["other-model", "more"]
    with pytest.raises(UsageError, match=r"it serves other-model, more, not model; .*behind the URL: #ID"):
        arm(server)
    assert arm(server, served="other-model").served == "other-model"
    with pytest.raises(UsageError, match=r"HTTP 404.*no model nonsense"):
        arm(server, served="nonsense")
    server.models = []
    with pytest.raises(UsageError, match="lists no model"):
        arm(server)


def test_what_is_no_such_api_is_refused(server) -> None:
    for content, said in ((b"<html>", "not JSON"), (b"[1]", "a JSON list"), (b"{}", "lists no model")):
        server.instead = content
        with pytest.raises(UsageError, match=said) as error:
            arm(server)
        assert url(server) in str(error.value)
    server.instead = b'{"choices": [{}]}'
    with pytest.raises(UsageError, match="its answer has no text"):
        arm(server, served="some/model")


def test_a_server_that_is_down_or_slow_or_broken_is_named_with_what_it_said(server) -> None:
    with pytest.raises(UsageError, match=r"cannot be reached .*start it, or mend the URL"):
        ServerArm("s", "http://127.0.0.1:9/v1", TOKENIZER, "model", ENDS)
    made = arm(server)
    made.timeout, server.delay = 0.3, 10.0  # nobody waits for the answer
    with pytest.raises(UsageError, match=r"no answer in 0.3 seconds; raise --server-timeout"):
        ask(made, [7])
    made.timeout, server.delay, server.dies_after = 120.0, 0.0, 0
    with pytest.raises(UsageError, match=r"HTTP 500 .*no memory left.*see the server's log"):
        ask(made, [7])


# ---- rows -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("words")
    tiny_llama(vocab_size=96, eos_token_id=2).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    (folder / "prompts.txt").write_text("ba be bi\nbu ca\nfa fe fi\n")
    return folder


def cli(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def bench(checkpoint: Path, *more: object) -> Any:
    command = ["bench", checkpoint, "--drafters", "none", "--baselines", "hf-generate", "--max-new-tokens", 6, "--json"]
    return cli(*command, "--prompts", checkpoint / "prompts.txt", *more)


def test_a_server_is_a_row_of_bench(checkpoint: Path, server) -> None:
    server.models = [f"org/{checkpoint.name}"]
    result = bench(checkpoint, "--against", f"other={url(server)}")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == ["hf-generate", "none", "other"]
    other = rows["other"]
    assert (other["tokens"], other["prompts"]) == (9, 3)
    assert other["mat"] is other["overhead"] is None
    assert other["equal"] is False
    assert report["settings"]["against"] == {"other": url(server)}
    assert any(note.startswith("other is a server") for note in report["notes"])


def test_what_was_measured_before_a_server_died_is_kept(checkpoint: Path, server, tmp_path: Path) -> None:
    server.models = [checkpoint.name]
    server.dies_after = 1 + len(PROBES) + 1 + 2  # to find out what it is, the warm-up, two prompts
    result = bench(checkpoint, "--against", url(server), "--out", tmp_path)
    assert result.exit_code == 2
    assert "--against server=" in result.stderr
    assert "no memory left" in result.stderr
    report = json.loads((tmp_path / "results.json").read_text())
    assert report["partial"]
    assert [row["prompts"] for row in report["rows"]] == [2, 2, 2]


def test_a_server_gets_one_prompt_at_a_time(checkpoint: Path) -> None:
    result = bench(checkpoint, "--against", "http://127.0.0.1:9/v1", "--batch-size", 2)
    assert result.exit_code == 2
    assert "--batch-size 2: a server gets one prompt at a time" in result.stderr


def test_a_server_that_is_down_is_one_line_before_anything_is_measured(checkpoint: Path, tmp_path: Path) -> None:
    result = bench(checkpoint, "--against", "http://127.0.0.1:9/v1", "--out", tmp_path)
    assert result.exit_code == 2
    (line,) = result.stderr.strip().splitlines()
    assert "cannot be reached" in line
    assert not list(tmp_path.iterdir())


def test_a_server_is_a_row_of_spec_bench(checkpoint: Path, server, tmp_path: Path) -> None:
    server.models = [checkpoint.name]
    asked = tmp_path / "q.jsonl"
    lines = [{"question_id": n, "category": "writing", "turns": ["ba be", "bu"]} for n in (1, 2)]
    asked.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "out"
    command = ["spec-bench", "run", checkpoint, "--questions", asked, "--out", out, "--max-new-tokens", 6]
    result = cli(*command, "--drafters", "none", "--against", f"other={url(server)}")
    assert result.exit_code == 0, result.output
    assert "other is a server" in result.output
    first = json.loads((out / "answers/other.jsonl").read_text().splitlines()[0])["choices"][0]
    assert first["turns"] == ["fa fe", "fa fe"]
    assert first["new_tokens"] == [3, 3]
    assert first["decoding_steps"] == [0, 0]
    report = from_folder(RunFolder(out), "hf-generate", TOKENIZER)
    (row,) = (r for r in report.rows if (r.method, r.subtask) == ("other", "overall"))
    assert row.ours is not None
    assert row.ours.mat is None
    assert row.ours.equal_share is not None
    assert row.ours.equal_share < 1
