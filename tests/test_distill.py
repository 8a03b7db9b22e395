"""Distillation: every prompt is answered once, by the target's own text, however often a run is interrupted."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import wait_until
from tiny_models import tiny_llama
from typer.testing import CliRunner

from specdec import Decoder
from specdec.cli import app
from specdec.errors import UsageError
from specdec.training.distill import Outcome, Prompt, Settings, distill, provenance_file, read_prompts

SETTINGS = Settings(
    model="random",
    prompts_sha256="0",
    max_new_tokens=8,
    temperatures=(0.0, 1.0),
    batch_size=3,
    chat=False,
    drafter="none",
    dtype="float32",
    seed=5,
)
WORDS = [consonant + vowel for consonant in "bdfg" for vowel in "aeiou"]
# of different lengths, in no order
PROMPTS = [Prompt(f"p{i}", " ".join(WORDS[i : i + 1 + i * 7 % 5]), "even" if i % 2 == 0 else None) for i in range(14)]


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    """A random model whose greedy answer to the first prompt ends early."""
    model = tiny_llama(vocab_size=96)
    text = model.generate(**_inputs(model, [5]), max_new_tokens=8, do_sample=False)[0, 1:].tolist()
    model.generation_config.eos_token_id = [text[3], 2]
    return Decoder(model)


def _inputs(model: Any, ids: list[int]) -> dict[str, Any]:
    row = torch.tensor([ids])
    return {"input_ids": row, "attention_mask": torch.ones_like(row)}


def run(decoder: Decoder, tokenizer: Any, out: Path, prompts: list[Prompt] = PROMPTS, **changes: Any) -> Outcome:
    settings = dataclasses.replace(SETTINGS, **changes)
    return distill(decoder, tokenizer, prompts, out, settings, {"command": "test"}, lambda done, total, text: None)


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


class TestAnswers:
    def test_greedy_answers_are_generate_s_up_to_and_with_eos(self, decoder, tokenizer, tmp_path) -> None:
        outcome = run(decoder, tokenizer, tmp_path / "a.jsonl", temperatures=(0.0,))
        model, ends = decoder.model, decoder.model.generation_config.eos_token_id
        for row in rows(tmp_path / "a.jsonl"):
            assert row["prompt_ids"] == tokenizer(row["prompt"]).input_ids
            alone = model.generate(**_inputs(model, row["prompt_ids"]), max_new_tokens=8, do_sample=False)
            assert row["response_ids"] == alone[0, len(row["prompt_ids"]) :].tolist()
            assert row["response"] == tokenizer.decode(row["response_ids"], skip_special_tokens=True)
            assert row["temperature"] == 0
        answers = {row["id"]: row["response_ids"] for row in rows(tmp_path / "a.jsonl")}
        assert len(answers["p0"]) == 4
        assert answers["p0"][-1] in ends
        assert max(map(len, answers.values())) == 8
        assert outcome == Outcome(14, 0, sum(map(len, answers.values())), outcome.seconds)

    def test_every_prompt_is_answered_once_with_temperatures_in_turn(self, decoder, tokenizer, tmp_path) -> None:
        run(decoder, tokenizer, tmp_path / "a.jsonl")
        got = {row["id"]: row for row in rows(tmp_path / "a.jsonl")}
        assert len(rows(tmp_path / "a.jsonl")) == len(got) == 14
        for i, prompt in enumerate(PROMPTS):
            assert got[prompt.id]["temperature"] == i % 2
            assert got[prompt.id].get("category") == prompt.category
            assert got[prompt.id]["prompt"] == prompt.text

    def test_sampled_answers_depend_on_the_seed_alone(self, decoder, tokenizer, tmp_path) -> None:
        for other, (name, seed) in enumerate((("a", 5), ("b", 5), ("c", 6))):
            torch.manual_seed(other)  # the global generator has no say
            run(decoder, tokenizer, tmp_path / name, seed=seed, temperatures=(1.0,))
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
        assert (tmp_path / "a").read_bytes() != (tmp_path / "c").read_bytes()

    def test_prompts_without_room_for_the_answer_are_left_out_and_counted(self, decoder, tokenizer, tmp_path) -> None:
        long = Prompt("long", " ".join(WORDS * 13), None)  # 260 tokens of a context of 256
        assert run(decoder, tokenizer, tmp_path / "a.jsonl", [long, *PROMPTS]).too_long == 1
        assert {row["id"] for row in rows(tmp_path / "a.jsonl")} == {p.id for p in PROMPTS}
        with pytest.raises(UsageError, match=r"all 1 prompts .* exceed the model's context of 256"):
            run(decoder, tokenizer, tmp_path / "b.jsonl", [long])

    def test_chat_wraps_prompts_in_the_template(self, decoder, tokenizer, tmp_path, monkeypatch) -> None:
        monkeypatch.setattr(tokenizer, "chat_template", "da {{ messages[0].content }} du")
        run(decoder, tokenizer, tmp_path / "a.jsonl", PROMPTS[:1], chat=True)
        assert rows(tmp_path / "a.jsonl")[0]["prompt_ids"] == tokenizer("da ba du").input_ids
        assert rows(tmp_path / "a.jsonl")[0]["prompt"] == "ba"


class TestResuming:
    @pytest.mark.parametrize("cut", ["in a line", "in a batch", "at the start", "after all"])
    def test_a_cut_run_ends_in_the_same_file(self, decoder, tokenizer, tmp_path, cut: str) -> None:
        run(decoder, tokenizer, tmp_path / "whole.jsonl")
        whole = (tmp_path / "whole.jsonl").read_bytes()
        lines = whole.splitlines(keepends=True)
        kept = {"in a line": sum(map(len, lines[:7])) + 9, "in a batch": sum(map(len, lines[:4])), "at the start": 5}
        out = tmp_path / "cut.jsonl"
        run(decoder, tokenizer, out)
        out.write_bytes(whole[: kept.get(cut, len(whole))])
        run(decoder, tokenizer, out)
        assert out.read_bytes() == whole

    def test_ctrl_c_leaves_whole_lines_and_the_next_run_goes_on(
        self, decoder, tokenizer, tmp_path, monkeypatch
    ) -> None:
        out, calls, generate = tmp_path / "a.jsonl", [], Decoder.generate

        def interrupted(self: Decoder, *args: Any, **kwargs: Any) -> Any:
            calls.append(len(args[0]))
            if len(calls) == 3:
                raise KeyboardInterrupt
            return generate(self, *args, **kwargs)

        monkeypatch.setattr(Decoder, "generate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(decoder, tokenizer, out)
        assert len(rows(out)) == sum(calls[:2]) == 6
        outcome = run(decoder, tokenizer, out)
        assert outcome.done == 14
        assert sum(calls[3:]) == 8  # what was done is not done again
        monkeypatch.undo()
        run(decoder, tokenizer, tmp_path / "whole.jsonl")
        assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()

    def test_two_runs_cannot_write_one_file(self, decoder, tokenizer, tmp_path, monkeypatch) -> None:
        out, refused, generate = tmp_path / "a.jsonl", [], Decoder.generate

        def meanwhile(self: Decoder, *args: Any, **kwargs: Any) -> Any:
            with pytest.raises(UsageError, match="another run is writing it") as caught:
                run(decoder, tokenizer, out)
            refused.append(caught)
            return generate(self, *args, **kwargs)

        monkeypatch.setattr(Decoder, "generate", meanwhile)
        run(decoder, tokenizer, out)
        assert len(refused) == 6
        assert len(rows(out)) == 14

    def test_more_prompts_may_be_asked_for_later(self, decoder, tokenizer, tmp_path) -> None:
        run(decoder, tokenizer, tmp_path / "a.jsonl", PROMPTS[:5])
        run(decoder, tokenizer, tmp_path / "a.jsonl")
        assert sorted(row["id"] for row in rows(tmp_path / "a.jsonl")) == sorted(p.id for p in PROMPTS)

    def test_the_provenance_names_settings_and_every_run(self, decoder, tokenizer, tmp_path) -> None:
        out = tmp_path / "a.jsonl"
        for prompts in (PROMPTS[:3], PROMPTS):
            run(decoder, tokenizer, out, prompts)
        record = json.loads(provenance_file(out).read_text(encoding="utf-8"))
        assert record["settings"] == {**dataclasses.asdict(SETTINGS), "temperatures": [0.0, 1.0]}
        assert record["runs"] == [{"command": "test"}] * 2

    def test_files_of_other_settings_or_other_origin_are_refused(self, decoder, tokenizer, tmp_path) -> None:
        out = tmp_path / "a.jsonl"
        run(decoder, tokenizer, out, PROMPTS[:3])
        before = out.read_bytes()
        with pytest.raises(UsageError, match=r"max_new_tokens was 8 and is 9; seed was 5 and is 6"):
            run(decoder, tokenizer, out, seed=6, max_new_tokens=9)
        assert out.read_bytes() == before
        out.write_bytes(b"{}\n" + before)
        with pytest.raises(UsageError, match="a line in it is damaged"):
            run(decoder, tokenizer, out)
        provenance_file(out).unlink()
        with pytest.raises(UsageError, match="was not written by `specdec distill`"):
            run(decoder, tokenizer, out)


class TestPrompts:
    def test_conversations_give_their_first_user_turn(self, tmp_path) -> None:
        turns = [{"from": "system", "value": "be"}, {"from": "human", "value": "ba"}, {"from": "human", "value": "bi"}]
        lines = [{"id": 7, "conversations": turns}, {"prompt": "bo", "category": "qa", "response": "bu"}]
        (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
        assert read_prompts(tmp_path / "p.jsonl") == [Prompt("7", "ba", None), Prompt("2", "bo", "qa")]

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            ('{"text": "ba"}', r"row 1: no \"prompt\".*\(keys: text\)"),
            ('{"prompt": " "}', "row 1: .* not empty"),
            ('{"prompt": "ba", "id": 1}\n{"prompt": "be", "id": "1"}', "row 2: the id '1' was used before"),
            ('{"messages": [{"role": "assistant", "content": "ba"}]}', "row 1: no user turn"),
            ('{"prompt": ', "p.jsonl:1: not JSON"),
            ("", "there is no prompt in it"),
        ],
    )
    def test_malformed_prompts_are_named(self, tmp_path, content: str, said: str) -> None:
        (tmp_path / "p.jsonl").write_text(content)
        with pytest.raises(UsageError, match=said):
            read_prompts(tmp_path / "p.jsonl")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_llama(vocab_size=96).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    lines = [json.dumps({"id": p.id, "prompt": p.text}) for p in PROMPTS]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    return str(tmp_path / "p.jsonl")


class TestCommand:
    def test_it_writes_answers_and_where_they_come_from(self, checkpoint, prompts, tmp_path) -> None:
        out = tmp_path / "new" / "a.jsonl"
        command = ["distill", checkpoint, "--prompts", prompts, "--out", str(out), "--max-new-tokens", "4"]
        result = CliRunner().invoke(app, [*command, "--temperature", "0,0.5", "--limit", "6"])
        assert result.exit_code == 0, result.output
        assert "6 answers, 24 tokens at" in result.output
        record = json.loads(provenance_file(out).read_text(encoding="utf-8"))
        assert record["settings"]["temperatures"] == [0.0, 0.5]
        assert len(record["settings"]["prompts_sha256"]) == 64
        assert record["runs"][0]["packages"]["specdec"]
        result = CliRunner().invoke(app, [*command, "--temperature", "0,0.5"])
        assert result.exit_code == 0, result.output
        assert sorted(row["id"] for row in rows(out)) == sorted(p.id for p in PROMPTS)

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (["--temperature", "0,hot"], "--temperature '0,hot': give a number"),
            (["--drafter", "non"], "did you mean none"),
            (["--drafter", "draft-model"], "use none"),
            (["--out", f"{__file__}/a.jsonl"], "cannot be written"),
            (["--chat"], "no chat template"),
            (["--prompts", "nowhere.jsonl"], "--prompts nowhere.jsonl: No such file"),
        ],
    )
    def test_mistakes_are_one_line(self, checkpoint, prompts, tmp_path, options: list[str], said: str) -> None:
        command = ["distill", checkpoint, "--prompts", prompts, "--out", str(tmp_path / "a.jsonl"), *options]
        command += ["--max-new-tokens", "4"]
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 2
        assert said in result.output
        assert len(result.output.strip().splitlines()) == 1
        assert not (tmp_path / "a.jsonl").exists()

    def test_ctrl_c_says_how_to_go_on(self, checkpoint, prompts, tmp_path) -> None:
        out = tmp_path / "a.jsonl"
        command = ["distill", checkpoint, "--prompts", prompts, "--out", str(out), "--batch-size", "1"]
        command += ["--max-new-tokens", "200"]
        slow = (  # a batch takes a while, or all are done before the signal comes; a background job ignores Ctrl-C
            "import signal, time, specdec.decoder as m; run = m.Decoder.run; "
            "signal.signal(signal.SIGINT, signal.default_int_handler); "
            "m.Decoder.run = lambda *a, **k: (time.sleep(0.3), run(*a, **k))[1]; from specdec.cli import app; app()"
        )
        script = [sys.executable, "-c", slow, *command]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(script, stderr=subprocess.PIPE, text=True, env=environment)
        wait_until(lambda: out.exists() and out.stat().st_size, process)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=240)
        assert process.returncode == 130
        assert "the same command goes on" in said
        assert 0 < len(rows(out)) < 14
