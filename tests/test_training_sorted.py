"""`specdec train s2d`: the loss of SoFT, what a run leaves behind, resuming, and what is refused before it starts."""

from __future__ import annotations

import dataclasses
import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from test_s2d import truncated
from tiny_models import tiny_gemma2, tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from specdec import Decoder, zoo
from specdec.cli import app
from specdec.drafters.s2d.nested import Nested
from specdec.errors import CompatibilityError, UsageError
from specdec.training.heads import batches
from specdec.training.sorted import Exits, SortedSettings, choose_thresholds, load_draft, read_settings, train_sorted

D = (1, 2, 4)
SETTINGS = SortedSettings(
    submodels=D, max_steps=12, batch=4, learning_rate=5e-3, log_steps=1, eval_steps=3, save_steps=3, eval_prompts=4
)
model = partial(tiny_llama, num_hidden_layers=4, initializer_range=0.1)


def samples(count: int = 40) -> Dataset:
    """Tokens that count upwards: easily learned."""
    rows = [[(start * 7 + i) % 61 + 3 for i in range(10 + start % 5)] for start in range(count)]
    return Dataset.from_dict({"input_ids": rows, "loss_mask": [[0] * 3 + [1] * (len(r) - 3) for r in rows]})


def log(out: Path, key: str) -> list[float]:
    return [row[key] for row in json.loads((out / "training.json").read_text())["log"] if key in row]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_sorted(model(), samples(), tmp_path_factory.mktemp("run") / "sorted", SETTINGS)


def test_the_loss_is_the_mean_over_truncated_models(unbroken):
    whole = model()
    exits = Exits(whole, Nested.of(D))
    batch = batches(samples(), 5)[1]
    got = exits.loss(whole, batch["input_ids"], batch["labels"])
    for n, loss in zip(D, got, strict=True):
        logits = truncated(whole, n)(batch["input_ids"]).logits[:, :-1]
        want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
        torch.testing.assert_close(loss, want)
    got.mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in whole.parameters()), "every parameter trains"
    for total, *each in zip(
        *(log(unbroken, key) for key in ("eval_loss", *(f"eval_loss_{n}" for n in D))), strict=True
    ):
        assert total == pytest.approx(sum(each) / 3)


def test_training_lowers_the_loss_of_every_sub_model(unbroken):
    for n in D:
        losses, held_out = log(unbroken, f"loss_{n}"), log(unbroken, f"eval_loss_{n}")
        assert len(losses) == 12
        assert losses[-1] < 0.8 * losses[0]
        assert held_out[-1] < held_out[0]


def test_what_comes_out_is_an_ordinary_model_with_its_sub_models_beside_it(unbroken):
    assert sorted(f.name for f in unbroken.iterdir() if f.name != "generation_config.json") == [
        "config.json",
        "loss.png",
        "model.safetensors",
        "s2d.json",
        "training.json",
    ]
    assert (unbroken / "loss.png").read_bytes().startswith(b"\x89PNG")
    plain = AutoModelForCausalLM.from_pretrained(unbroken).eval()
    assert type(plain).__name__ == "LlamaForCausalLM"
    exits = Exits(plain, Nested.of(D))
    assert exits.submodels == Nested.beside(unbroken).submodels == D
    ids = torch.tensor([[3, 4, 5]])
    decoder = Decoder(tiny_llama(), "s2d", draft=unbroken)
    want = tiny_llama().generate(ids, do_sample=False, max_new_tokens=10)
    assert torch.equal(decoder.generate(ids, do_sample=False, max_new_tokens=10), want)


def test_a_resumed_run_ends_like_an_unbroken_one_and_another_run_is_refused(unbroken, tmp_path, monkeypatch):
    out = tmp_path / "sorted"

    def dies(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("specdec.training.sorted._write", dies)
    with pytest.raises(KeyboardInterrupt):
        train_sorted(model(), samples(), out, SETTINGS)
    monkeypatch.undo()
    assert not out.exists()
    shutil.rmtree(tmp_path / "sorted.run" / "checkpoint-12")
    with pytest.raises(UsageError, match="it holds a run of other settings or data"):
        train_sorted(model(), samples(), out, dataclasses.replace(SETTINGS, learning_rate=1e-3))
    train_sorted(model(), samples(), out, SETTINGS)
    assert log(out, "loss") == pytest.approx(log(unbroken, "loss"), abs=1e-4)
    assert log(out, "eval_loss") == pytest.approx(log(unbroken, "eval_loss"), abs=1e-4)


def test_thresholds_worked_by_hand():
    c = torch.tensor([[0.9, 0.8, 0.7, 0.6], [0.9, 0.8, 0.7, 0.6], [0.9, 0.8, 0.7, 0.6], [0.5] * 4])
    best = torch.tensor([[1, 2, 0, 4], [1, 2, 3, 4], [0, 2, 0, 0], [1, 2, 3, 4]])
    assert choose_thresholds(c, best, 1.0) == (0.7, 0.0, 1.0, 0.0)
    assert choose_thresholds(c, best, 0.75) == (0.0, 0.0, 1.0, 0.0)
    assert choose_thresholds(c, best, 0.5) == (0.0, 0.0, 0.7, 0.0)


def test_a_checkpoint_is_cut_or_grown_and_sizes_can_be_fresh(tmp_path):
    model().save_pretrained(tmp_path)
    text = torch.tensor([[3, 9, 4]])

    def loaded(**settings):
        return load_draft(str(tmp_path), read_settings(settings))

    assert torch.equal(loaded(submodels="1,2", layers=2)(text).logits, truncated(model(), 2)(text).logits)
    grown = loaded(submodels=[2, 6], layers=6)
    assert torch.equal(grown.model.layers[3].mlp.up_proj.weight, model().model.layers[3].mlp.up_proj.weight)
    assert torch.equal(grown(text).logits, loaded(submodels=[2, 6], layers=6)(text).logits), "the seed decides"
    fresh = loaded(submodels=[1, 4], fresh={"hidden_size": 16, "head_dim": 4})
    assert fresh.config.hidden_size == 16
    with pytest.raises(UsageError, match="fresh: llama models have no 'hiden_size'"):
        loaded(submodels=[1, 4], fresh={"hiden_size": 16})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "must be numbers of layers that rise"),
        ({"submodels": "4,2"}, r"submodels=\(4, 2\) must be numbers of layers that rise"),
        ({"submodels": "1,2,8"}, "the last one must be the whole model, which has 4 layers"),
        ({"submodels": "1,2"}, "the last one must be the whole model, which has 4 layers"),
        ({"submodels": "1,2,4", "thresholds": "0.5,0"}, "2 for the 3 sub-models"),
        ({"submodels": "1,b"}, "setting submodels='1,b': it takes tuple"),
        ({"submodels": "1,2,4", "agreement": 0}, "agreement=0.0 must be a share above 0"),
        ({"submodels": "1,2,4", "layers": 0}, "layers=0 must be at least 1"),
        ({"submodels": "1,2,4", "decay": 0.8}, "setting 'decay' is unknown"),
        ({"submodels": "1,2,4", "learning_rat": 1}, "did you mean 'learning_rate'"),
    ],
)
def test_bad_settings_are_one_error_before_weights_are_read(settings: dict, message: str, tmp_path):
    model().config.save_pretrained(tmp_path)  # and no weights
    with pytest.raises(UsageError, match=message):
        load_draft(str(tmp_path), read_settings(settings))


def test_data_of_another_vocabulary_and_models_that_cannot_be_sorted_are_refused(tmp_path):
    with pytest.raises(UsageError, match="outside the target's vocabulary of 32"):
        train_sorted(tiny_llama(vocab_size=32, num_hidden_layers=4), samples(), tmp_path / "x", SETTINGS)
    with pytest.raises(CompatibilityError, match="Gemma2ForCausalLM scales, caps or shifts its logits"):
        train_sorted(tiny_gemma2(num_hidden_layers=4), samples(), tmp_path / "x", SETTINGS)
    assert not list(tmp_path.iterdir())


def test_the_command_trains_and_its_errors_are_one_line(tmp_path):
    data, out = tmp_path / "data.jsonl", tmp_path / "out"
    row = {"prompt": "Once upon a time", "response": " there was a little boy who had a red ball."}
    data.write_text("".join(json.dumps(row) + "\n" for _ in range(8)))
    settings = ["max_steps=2", "eval_prompts=2", "batch=2", "log_steps=1", "eval_steps=2", "save_steps=2", "layers=3"]
    command = ["train", "s2d", "--draft", "tiny-draft", "--data", str(data), "--out", str(out), "--device", "cpu"]
    options = [part for setting in settings for part in ("--set", setting)]
    done = CliRunner().invoke(app, [*command, *options, "--submodels", "1,3", "--store", "bfloat16"])
    assert done.exit_code == 0, done.output
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(out).vocab_size == 8192
    assert Nested.beside(out).submodels == (1, 3)
    for more, message in (
        (["--submodels", "1,2"], "the last one must be the whole model, which has 3 layers"),
        (["--submodels", "1,3", "--thresholds", "0.5"], "1 for the 2 sub-models"),
        (["--submodels", "1,3", "--draft", "nowhere"], "--draft 'nowhere': no model there"),
    ):
        refused = CliRunner().invoke(app, [*command, *options, *more])
        assert refused.exit_code == 2
        assert message in " ".join(refused.output.split())


def test_the_embedded_nested_draft_serves_tiny():
    folder = zoo.HERE / "tiny" / "nested"
    target, tokenizer = zoo.load("tiny", torch.float32)
    decoder = Decoder(target, "s2d", draft=folder)
    for prompt in zoo.prompts()[::20]:
        inputs = tokenizer(prompt.prompt, return_tensors="pt")
        want = target.generate(**inputs, do_sample=False, max_new_tokens=32)
        assert torch.equal(decoder.generate(**inputs, do_sample=False, max_new_tokens=32), want)
        assert decoder.stats.mat > 1.2
        assert len(decoder.drafter.exits) == 3
