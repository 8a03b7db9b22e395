"""`specdec train METHOD`: resumes exactly, measures with the real decoder, uses many processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import checkpointed, wait_until
from datasets import Dataset
from tiny_models import tiny_llama
from typer.testing import CliRunner

from specdec import Decoder, registry
from specdec.cli import app
from specdec.errors import UsageError
from specdec.target import Target
from specdec.training import heads as training
from specdec.training.heads import Settings, by_length, collate, split_settings, train_head

SETTINGS = Settings(
    max_steps=12, batch=2, learning_rate=2e-3, log_steps=1, eval_steps=3, save_steps=3, eval_prompts=2, eval_tokens=8
)
STARTED_BY_HAND = """
import sys
sys.path[:0] = {path!r}
from pathlib import Path
from test_training_heads import samples, SETTINGS, tiny_llama, train_head
import dataclasses, time, torch
import specdec.training.heads as training
torch.set_num_threads(1)
{before}
settings = dataclasses.replace(SETTINGS, **{changes!r})
train_head("medusa", tiny_llama(), samples(), Path({out!r}), settings, {{"num_heads": 2}})
"""


def samples(count: int = 40, vocab: int = 64) -> Dataset:
    g = torch.Generator().manual_seed(3)
    rows = [torch.randint(3, vocab, (12 + i % 7,), generator=g).tolist() for i in range(count)]
    return Dataset.from_dict({"input_ids": rows, "loss_mask": [[0] * 4 + [1] * (len(r) - 4) for r in rows]})


def train(out: Path, settings: Settings = SETTINGS, **more) -> Path:
    return train_head("medusa", tiny_llama(), samples(), out, settings, {"num_heads": 2}, **more)


def script(out: Path, before: str = "", **changes) -> str:
    here = str(Path(__file__).parent)
    return STARTED_BY_HAND.format(path=[here], out=str(out), before=before, changes=changes)


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in json.loads((out / "training.json").read_text())["log"] if "loss" in row]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("run") / "medusa")


def test_a_finished_run_is_a_checkpoint_with_its_record(unbroken):
    assert sorted(f.name for f in unbroken.iterdir()) == [
        "README.md",
        "config.json",
        "curves.png",
        "model.safetensors",
        "training.json",
    ]
    assert (unbroken / "curves.png").read_bytes().startswith(b"\x89PNG")
    acceptance = json.loads((unbroken / "config.json").read_text())["acceptance"]
    assert len(acceptance) == 2
    assert all(0 <= sum(row) <= 1.001 for row in acceptance)
    assert len(losses(unbroken)) == 12
    assert Decoder(tiny_llama(), "medusa", checkpoint=unbroken).generate(torch.tensor([[5]]), max_new_tokens=4).shape


def test_the_mat_in_the_log_is_what_the_decoder_does(unbroken):
    """The kept checkpoint is the one of the highest MAT, and decoding with it gives that MAT again."""
    log = json.loads((unbroken / "training.json").read_text())["log"]
    evals = [row["eval_mat"] for row in log if "eval_mat" in row]
    assert len(evals) == 4
    held_out, _ = training.split(samples(), SETTINGS)
    head = training.head_class("medusa").from_pretrained(unbroken)
    head.config.acceptance = None  # as it was while training
    decoder = Decoder(tiny_llama(), registry.drafter_class("medusa")(checkpoint=head))
    tokens = steps = 0
    for sample in held_out:
        decoder.generate(torch.tensor([sample["input_ids"][:4]]), max_new_tokens=8, do_sample=False)
        tokens, steps = tokens + decoder.stats.new_tokens, steps + len(decoder.stats.steps)
    assert tokens / steps == pytest.approx(max(evals))


def test_a_run_killed_at_any_step_ends_like_an_unbroken_one(unbroken, tmp_path):
    out = tmp_path / "medusa"
    slow = "training.math.isfinite = lambda x, f=training.math.isfinite: (time.sleep(0.4), f(x))[1]"
    process = subprocess.Popen([sys.executable, "-c", script(out, slow)], stderr=subprocess.PIPE)
    run = tmp_path / "medusa.run"
    wait_until(lambda: checkpointed(run), process)
    time.sleep(np.random.default_rng().uniform(0, 1.0))  # somewhere in the steps after it
    process.kill()
    process.wait()
    assert not out.exists(), "nothing half-written"
    assert training.last_checkpoint(run) is not None
    train(out)
    assert losses(out)[-1] == pytest.approx(losses(unbroken)[-1], abs=1e-4)
    assert losses(out) == pytest.approx(losses(unbroken), abs=1e-4)


def test_two_processes_walk_the_same_curve_as_one(tmp_path):
    two, one = tmp_path / "two", tmp_path / "one"
    changes = {"batch": 2, "max_steps": 6}
    file = tmp_path / "train.py"
    file.write_text(script(two, **changes))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(file)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=900, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    subprocess.run([sys.executable, "-c", script(one, batch=4, max_steps=6)], check=True, capture_output=True)
    assert losses(two) == pytest.approx(losses(one), rel=1e-3)


def test_a_loss_that_is_no_number_stops_the_run_and_says_so(tmp_path):
    settings = Settings(**{**SETTINGS.__dict__, "learning_rate": 3e38})
    with pytest.raises(UsageError, match=r"loss is (nan|inf) at step \d+; lower learning_rate"):
        train(tmp_path / "medusa", settings)
    assert not (tmp_path / "medusa").exists()


def test_a_full_disk_is_one_error_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", full)  # Trainer's checkpoints
        with pytest.raises(UsageError, match=r"checkpoint could not be written .*No space left"):
            train(tmp_path / "medusa")
    with monkeypatch.context() as patch:
        patch.setattr("specdec.heads.checkpoint.save_file", full)
        with pytest.raises(UsageError, match=r"could not be written .*No space left"):
            train(tmp_path / "medusa")
    assert [f.name for f in tmp_path.iterdir()] == ["medusa.run"]
    assert train(tmp_path / "medusa").is_dir()


def test_a_run_of_other_settings_is_not_gone_on_with(unbroken):
    with pytest.raises(UsageError, match="other settings or data"):
        train(unbroken, Settings(**{**SETTINGS.__dict__, "learning_rate": 1e-4}))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (lambda: samples(3), "at least 4 are needed"),
        (lambda: samples(10, vocab=90), r"token id \d+ is outside the target's vocabulary of 64"),
    ],
)
def test_data_that_cannot_be_trained_on_is_refused(tmp_path, data, said):
    with pytest.raises(UsageError, match=said):
        train_head("medusa", tiny_llama(), data(), tmp_path / "medusa", SETTINGS)


def test_batches_are_alike_in_length_and_every_sample_comes_once():
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 200, size=1003)
    order = by_length(rng.permutation(1003), lengths, 8, rng)
    assert sorted(order) == list(range(1003))
    spread = [np.ptp(lengths[order[i : i + 8]]) for i in range(0, 1000, 8)]
    assert np.mean(spread) < 0.2 * np.ptp(lengths)


def test_padding_is_not_learned():
    batch = collate([{"input_ids": [5, 6, 7], "loss_mask": [0, 1, 1]}, {"input_ids": [8], "loss_mask": [1]}])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]


def test_acceptance_is_the_share_of_held_out_positions():
    target = Target(tiny_llama())
    head = training.head_class("medusa").fresh(target, num_heads=1)
    head.attach(target)  # a fresh head repeats the target's guess for the next token
    data = samples(5)
    hits = np.zeros(3)
    count = 0
    for row in data:
        logits = target.model(torch.tensor([row["input_ids"]])).logits[0]
        for i in range(len(row["input_ids"]) - 2):
            if row["loss_mask"][i + 2]:
                top = logits[i].topk(3).indices.tolist()
                best = int(logits[i + 1].argmax())
                hits += [best == t for t in top]
                count += 1
    assert training.acceptance(head, target, data, ranks=3)[0] == pytest.approx((hits / count).round(4).tolist())


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"learning_rte": 1}, "did you mean 'learning_rate'"),
        ({"num_head": 3}, "did you mean 'num_heads'"),
        ({"batch": "many"}, "batch='many'"),
        ({"batch": 0}, "batch=0 must be at least 1"),
        ({"optimizer": "sgd"}, "optimizer='sgd' must be"),
        ({"loggers": "paper"}, "loggers='paper' is not installed or not known"),
        ({"eval_steps": 15}, "multiple of log_steps"),
        ({"save_steps": 300}, "multiple of eval_steps"),
    ],
)
def test_wrong_settings_name_the_key_and_the_remedy(values, said):
    with pytest.raises(UsageError, match=said):
        split_settings("medusa", values)


def test_numbers_written_as_yaml_text_are_numbers():
    settings, options = split_settings("medusa", {"learning_rate": "1e-3", "max_steps": "7", "num_heads": 2})
    assert (settings.learning_rate, settings.max_steps, options) == (1e-3, 7, {"num_heads": 2})


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set", "learning_rate"], "is not KEY=VALUE"),
        (["--config", "{tmp}/none.yaml"], "cannot be read as YAML"),
        (["--store", "int4"], "--store 'int4'"),
        (["--data", "{tmp}/none.jsonl"], "none.jsonl"),
    ],
)
def test_the_command_says_what_to_mend_in_one_line(tmp_path, arguments, said):
    options = {"--target": "tiny", "--data": "{tmp}/none.jsonl", "--out": "{tmp}/out"}
    options |= dict(zip(arguments[::2], arguments[1::2], strict=True))
    flat = [part.format(tmp=tmp_path) for pair in options.items() for part in pair]
    result = CliRunner().invoke(app, ["train", "medusa", *flat])
    assert result.exit_code == 2
    assert said in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()
