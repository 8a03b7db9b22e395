"""Many processes: the same answers as one, none lost or doubled, also after any of them was killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import checkpointed, wait_until, word_tokenizer
from filelock import FileLock
from tiny_models import tiny_llama
from typer.testing import CliRunner

from specdec import Decoder, processes
from specdec.cli import app
from specdec.errors import UsageError
from specdec.processes import Process, alone, this_process
from specdec.training import judge
from specdec.training.heads import open_run

WORDS = [consonant + vowel for consonant in "bdfg" for vowel in "aeiou"]
MOST = 240  # seconds after which a process that waits for a dead one counts as hanging; a busy machine takes a while


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, prompts, questions and texts to train on."""
    folder = tmp_path_factory.mktemp("work")
    tiny_llama(vocab_size=96, eos_token_id=2).save_pretrained(folder / "model")
    word_tokenizer().save_pretrained(folder / "model")
    texts = [" ".join(WORDS[i : i + 1 + i * 7 % 5]) for i in range(14)]
    write(folder / "prompts.jsonl", [{"id": f"p{i}", "prompt": text} for i, text in enumerate(texts)])
    asked = [{"question_id": i, "category": "qa", "turns": [text, text]} for i, text in enumerate(texts[:6])]
    write(folder / "questions.jsonl", asked)
    write(folder / "train.jsonl", [{"prompt": text, "response": f"{text} {text} ba be bi"} for text in texts * 3])
    return folder


def write(file: Path, entries: Sequence[dict]) -> None:
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def distill(work: Path, out: Path) -> list[str]:
    command = ["distill", work / "model", "--prompts", work / "prompts.jsonl", "--out", out, "--max-new-tokens", 8]
    return list(map(str, [*command, "--temperature", "0,1", "--batch-size", 2]))


def spec_bench(work: Path, out: Path) -> list[str]:
    command = ["spec-bench", "run", work / "model", "--questions", work / "questions.jsonl", "--out", out]
    return list(map(str, [*command, "--max-new-tokens", 6, "--temperature", 1, "--drafters", "none,suffix"]))


def bench(work: Path, out: Path) -> list[str]:
    command = ["bench", work / "model", "--prompts", work / "prompts.jsonl", "--out", out, "--limit", 5, "--json"]
    drafters = ["--drafters", "none,suffix", "--baselines", "hf-generate", "--max-new-tokens", 6]
    return list(map(str, [*command, *drafters, "--temperature", "0,1"]))


def start(command: Sequence[str], count: int, kill: tuple[int, int] | None = None) -> list[tuple[int, str, str]]:
    """Run ``command`` in ``count`` processes: exit status (or less the signal), standard output and error of each.

    Forks, since new interpreters would first import torch for long. ``kill``: (rank, n), that process kills itself when
    it decodes for the n-th time and all have decoded, so that none is still looking for the others.
    """
    folder = Path(os.environ["PYTEST_TMP"])
    for file in folder.glob("*.decodes"):
        file.unlink()
    # bound while they run, so that no other program gets this port; the first process can still listen on it
    port = socket.socket()
    port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    port.bind(("127.0.0.1", 0))

    def work(rank: int) -> int:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port.getsockname()[1]}
        os.environ.update({"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in names.items()}})
        if kill is not None:
            calls, run = [], Decoder.run

            def mortal(*arguments: Any, **more: Any) -> Any:
                calls.append(1)
                (folder / f"{rank}.decodes").touch()
                if (rank, len(calls)) == kill:
                    while len(list(folder.glob("*.decodes"))) < count:
                        time.sleep(0.01)
                    os.kill(os.getpid(), signal.SIGKILL)
                return run(*arguments, **more)

            Decoder.run = mortal  # type: ignore[method-assign]
        result = CliRunner().invoke(app, list(command))
        (folder / f"{rank}.out").write_text(result.stdout)
        (folder / f"{rank}.err").write_text(result.stderr)
        return result.exit_code

    ended = []
    with port:
        children = [forked(lambda rank=rank: work(rank)) for rank in range(count)]
        for rank, child in enumerate(children):
            status = waited(child)
            said = [folder / f"{rank}.{kind}" for kind in ("out", "err")]
            ended.append((status, *(file.read_text() if status >= 0 else "" for file in said)))
    return ended


def forked(action: Callable[[], int]) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = int(action())
        finally:
            os._exit(code)
    return child


def waited(child: int) -> int:
    end = time.monotonic() + MOST
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    pytest.fail(f"a process hangs for more than {MOST} s")


@pytest.fixture(autouse=True)
def _said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_TMP", str(tmp_path))


# ---- distill ------------------------------------------------------------------------------------------------------


class TestDistill:
    @pytest.fixture(scope="class")
    def whole(self, work) -> bytes:
        out = work / "whole.jsonl"
        result = CliRunner().invoke(app, distill(work, out))
        assert result.exit_code == 0, result.output
        return out.read_bytes()

    def test_processes_make_the_file_of_one_in_the_order_of_the_prompts(self, work, whole, tmp_path) -> None:
        out = tmp_path / "a.jsonl"
        ended = start(distill(work, out), 2)
        assert [status for status, *_ in ended] == [0, 0], ended
        assert out.read_bytes() == whole
        assert [row["id"] for row in lines(out)] == [f"p{i}" for i in range(14)]
        assert "a.jsonl: 14 answers" in "".join(err for *_, err in ended)
        assert not (tmp_path / "a.jsonl.parts").exists()
        runs = json.loads((tmp_path / "a.jsonl.provenance.json").read_text())["runs"]
        assert sorted((run["rank"], run["processes"]) for run in runs) == [(0, 2), (1, 2)]

    def test_killed_at_any_byte_another_number_of_processes_ends_in_the_same_file(self, work, whole, tmp_path) -> None:
        out = tmp_path / "a.jsonl"
        ended = start(distill(work, out), 2, kill=(1, 2))
        assert [status for status, *_ in ended] == [0, -signal.SIGKILL]
        part = tmp_path / "a.jsonl.parts" / "1.jsonl"
        before = [row["id"] for file in (out, part) for row in lines(file)]
        assert 0 < len(lines(part)) < 7
        for file in (out, part):  # as if it had died while it wrote
            file.write_bytes(file.read_bytes()[:-9])
        ended = start(distill(work, out), 3, kill=(0, 2))
        assert [status for status, *_ in ended] == [-signal.SIGKILL, 0, 0]
        assert len(before) > len(lines(out))
        ended = start(distill(work, out), 1)
        assert ended[0][0] == 0, ended
        assert out.read_bytes() == whole
        assert not part.parent.exists()

    def test_files_that_were_brought_together_but_not_removed_do_no_harm(self, work, whole, tmp_path) -> None:
        out = tmp_path / "a.jsonl"
        start(distill(work, out), 1)
        (tmp_path / "a.jsonl.parts").mkdir()
        (tmp_path / "a.jsonl.parts" / "1.jsonl").write_bytes(b"".join(whole.splitlines(keepends=True)[2:5]))
        start(distill(work, out), 1)
        assert out.read_bytes() == whole
        assert not (tmp_path / "a.jsonl.parts").exists()

    def test_another_number_of_processes_at_the_same_time_is_refused(self, work, tmp_path) -> None:
        parts = tmp_path / "a.jsonl.parts"
        parts.mkdir()
        with FileLock(parts / "1-of-2.lock"):
            ((status, _, said),) = start(distill(work, tmp_path / "a.jsonl"), 1)
        assert status == 2
        assert "another run is writing it" in said
        assert not (tmp_path / "a.jsonl").exists()


# ---- spec-bench ---------------------------------------------------------------------------------------------------


def answered(out: Path) -> dict[str, list[tuple[int, Any]]]:
    """Question and token ids, by method."""
    return {
        file.stem: [(row["question_id"], row["ids"]) for row in lines(file)]
        for file in sorted((out / "details").glob("*.jsonl"))
    }


def test_spec_bench_gives_the_answers_of_one_process_after_a_kill(work, tmp_path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    ((status, _, said),) = start(spec_bench(work, one), 1)
    assert status == 0, said
    # each of two methods decodes three times to warm up, then two turns of a question
    ended = start(spec_bench(work, two), 2, kill=(1, 6 + 4 + 1))
    assert [status for status, *_ in ended] == [0, -signal.SIGKILL], ended
    # the first process has merged what the other answered only if that one died before
    kept = [out / "details/none.jsonl" for out in (two, two / "parts/rank-1")]
    assert sum(len(lines(file)) for file in kept if file.exists()) == 4
    with (two / "details/none.jsonl").open("ab") as file:  # as if it had died while it wrote
        file.write(b'{"question_id": 3, "answ')
    ended = start(spec_bench(work, two), 2)
    assert [status for status, *_ in ended] == [0, 0], ended
    assert answered(two) == answered(one)
    assert [question for question, _ in answered(two)["suffix"]] == list(range(6))


# ---- bench --------------------------------------------------------------------------------------------------------


def measured(out: Path) -> list[tuple[Any, ...]]:
    """What was generated, in the order of the file; times differ."""
    return [(r["temperature"], r["group"], r["prompts"], r["arm"], r["ids"]) for r in lines(out / "records.jsonl")]


def test_bench_measures_every_prompt_once_and_the_first_process_reports(work, tmp_path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    ((status, _, said),) = start(bench(work, one), 1)
    assert status == 0, said
    (first, second) = start([*bench(work, two), "--warm"], 2)
    assert (first[0], second[0]) == (0, 0), (first, second)
    assert measured(two) == measured(one)
    report = json.loads(first[1])
    assert report == json.loads((two / "results.json").read_text())
    assert [row["prompts"] for row in report["rows"]] == [5] * 6
    assert report["environment"]["processes"] == 2
    assert any("2 processes at a time on 1 machine, " in note for note in report["notes"])
    assert "warm: each process keeps what its own prompts taught" in report["notes"]
    assert second[1:] == ("", "")


@pytest.mark.parametrize("killed", [0, 1])
def test_a_bench_that_loses_a_process_says_so_and_writes_nothing(work, tmp_path, killed: int) -> None:
    ended = start(bench(work, tmp_path / "out"), 2, kill=(killed, 7))
    assert ended[killed][0] == -signal.SIGKILL
    status, out, said = ended[1 - killed]
    assert (status, out) == (2, "")
    assert "another of the 2 processes ended early" in said
    assert list((tmp_path / "out").iterdir()) == []


def test_more_processes_than_prompts_are_refused(work, tmp_path) -> None:
    ended = start([*bench(work, tmp_path / "out"), "--limit", "1"], 2)
    assert [status for status, *_ in ended] == [2, 2]
    assert "2 processes for 1 groups of prompts" in ended[0][2]


# ---- train judge --------------------------------------------------------------------------------------------------


def test_a_judge_is_the_same_of_two_processes_after_a_kill(work, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(judge, "PART", 4)
    rows = [{"prompt": f"{a} {b}", "correct": f" {b} {a}", "wrong": f" {b} {b}"} for a, b in zip(WORDS, WORDS[3:])]
    write(tmp_path / "rows.jsonl", [{**row, "mistake": [4, 6]} for row in rows])
    command = ["train", "judge", "--target", work / "model", "--data", tmp_path / "rows.jsonl", "--set", "epochs=3"]
    ended = start([*map(str, command), "--out", str(tmp_path / "one")], 1)
    assert ended[0][0] == 0, ended
    two = [*map(str, command), "--out", str(tmp_path / "two")]
    with monkeypatch.context() as patch:
        patch.setattr(judge, "save_file", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        assert [status for status, *_ in start(two, 2)] == [-signal.SIGKILL] * 2
    ended = start(two, 2)
    assert [status for status, *_ in ended] == [0, 0], ended
    assert "judge: " in ended[0][2]
    assert ended[1][1:] == ("", "")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]


# ---- which process ------------------------------------------------------------------------------------------------


class TestProcess:
    def test_the_launcher_s_names_say_which(self, monkeypatch) -> None:
        assert this_process() == Process() == processes.ALONE
        for name, value in (("RANK", "5"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "8")):
            monkeypatch.setenv(name, value)
        assert this_process() == Process(rank=5, count=8, local=1)
        assert not this_process().first
        with pytest.raises(UsageError, match="specdec train images runs in one process, not 8"):
            alone("specdec train images")
        monkeypatch.setenv("WORLD_SIZE", "5")
        with pytest.raises(UsageError, match="RANK=5: it must be below WORLD_SIZE=5"):
            this_process()

    def test_the_i_th_process_of_a_machine_takes_gpu_i(self, monkeypatch) -> None:
        current: list[int] = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "set_device", current.append)
        assert Process().place("auto") == "auto"
        assert Process(rank=5, count=8, local=1).place("auto") == "cuda:1"
        assert Process(rank=5, count=8, local=1).place("cpu") == "cpu"
        assert current == [1]
        with pytest.raises(UsageError, match=r"process 3 of this machine has no GPU \(2 here\)"):
            Process(rank=2, count=4, local=2).place("cuda")

    def test_a_training_run_is_not_gone_on_with_by_another_number_of_processes(self, tmp_path, monkeypatch) -> None:
        run, key = tmp_path / "run", {"settings": (1, 2)}
        assert open_run(run, key, resume=True) is None
        checkpoint = run / "checkpoint-3"
        checkpoint.mkdir()
        (checkpoint / "trainer_state.json").write_text("{}")
        (run / "checkpoint-6").mkdir()
        (run / "checkpoint-6/trainer_state.json").write_text('{"epoch": 1.')  # killed while it was written
        assert open_run(run, key, resume=True) == str(checkpoint)
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(UsageError, match="a run of 1 processes, not 2; start as many"):
            open_run(run, key, resume=True)
        assert open_run(run, key, resume=False) is None
        assert not checkpoint.exists()


# ---- real launchers -----------------------------------------------------------------------------------------------

# --multi_gpu starts two on a CPU as well, without it accelerate starts one there
ACCELERATE = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def launched(launcher: list[str], command: list[str]) -> subprocess.Popen:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    script = [sys.executable, *launcher, "-m", "specdec", *command]
    return subprocess.Popen(script, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def train(work: Path, out: Path) -> list[str]:
    settings = {"batch": 2, "max_steps": 40, "log_steps": 2, "eval_steps": 2, "save_steps": 2, "eval_prompts": 2}
    pairs = [part for key, value in {**settings, "eval_tokens": 4}.items() for part in ("--set", f"{key}={value}")]
    command = ["train", "medusa", "--target", work / "model", "--data", work / "train.jsonl", "--out", out]
    return [*map(str, command), "--device", "cpu", *pairs]


def children(parent: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


@pytest.mark.slow
class TestLaunchers:
    @pytest.mark.parametrize("launcher", [ACCELERATE, TORCHRUN], ids=["accelerate", "torchrun"])
    def test_launchers_start_processes_that_share_the_work(self, work, tmp_path, launcher) -> None:
        one, two = launched([], distill(work, tmp_path / "one")), launched(launcher, distill(work, tmp_path / "two"))
        for process in (one, two):
            assert process.wait(600) == 0, process.stderr.read()
        assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()

    def test_a_training_that_loses_a_process_ends_and_resumes_as_if_it_had_not(self, work, tmp_path) -> None:
        process, run = launched(TORCHRUN, train(work, tmp_path / "cut")), tmp_path / "cut.run"
        wait_until(lambda: checkpointed(run), process)
        os.kill(children(process.pid)[-1], signal.SIGKILL)
        assert process.wait(MOST) != 0
        assert not (tmp_path / "cut").exists(), "nothing half-written"
        both = [launched(TORCHRUN, train(work, tmp_path / name)) for name in ("cut", "whole")]
        for process in both:
            assert process.wait(600) == 0, process.stderr.read()
        cut, whole = (json.loads((tmp_path / name / "training.json").read_text()) for name in ("cut", "whole"))
        losses = [[row["loss"] for row in record["log"] if "loss" in row] for record in (cut, whole)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-4)
