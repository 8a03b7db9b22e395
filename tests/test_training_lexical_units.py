"""`specdec train lexical-units`: whole runs, what they leave, resuming, calibration by hand, wrong settings."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_training_heads import losses, samples
from tiny_models import tiny_llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from specdec import Decoder
from specdec.cli import app, train_lexical_units  # noqa: F401, the import brings the command
from specdec.drafters.lexical_units import Units, load_merged
from specdec.drafters.lexical_units.learner import UnitLearner
from specdec.errors import UsageError
from specdec.target import Target
from specdec.training import lexical_units as training
from specdec.training.heads import split
from specdec.training.joint import text_loss
from specdec.training.lexical_units import NEVER, Calibration, UnitSettings, train_units, unit_settings, unused_token
from specdec.training.lm import last_checkpoint

SETTINGS = UnitSettings(
    max_steps=12,
    batch=2,
    learning_rate=2e-3,
    log_steps=1,
    eval_steps=3,
    save_steps=3,
    eval_prompts=2,
    eval_tokens=8,
    unit_alpha=0.1,
    placeholder=2,
    rank=4,
)


def model():
    return tiny_llama(tie_word_embeddings=True)


def run(out: Path, settings: UnitSettings = SETTINGS, **more) -> Path:
    return train_units(model(), samples(), out, settings, base="/home/me/model", **more)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(62)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w0")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:
    return run(tmp_path_factory.mktemp("run") / "units", merged=True, tokenizer=tokenizer)


def test_a_finished_run_is_an_adapter_a_row_and_a_card_that_says_the_text_changed(unbroken):
    names = {f.name for f in unbroken.iterdir()}
    assert names == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "curves.png",
        "lexical_units.json",
        "merged",
        "placeholder.safetensors",
        "training.json",
    }
    units = Units.read(unbroken)
    assert (units.placeholder_id, units.K, units.alpha, units.guard, units.base) == (2, 4, 0.1, True, "model")
    card = (unbroken / "README.md").read_text()
    assert "no longer model's" in card
    assert "| confidence |" in card
    record = json.loads((unbroken / "training.json").read_text())
    assert len(losses(unbroken)) == 12
    assert {"loss_0", "loss_1", "loss_3", "accuracy_0", "accuracy_3"} <= record["log"][0].keys()
    assert sum(record["unit_lengths"]) > 0
    for file in unbroken.rglob("*.*"):
        assert file.suffix in (".png", ".safetensors") or "/home/me" not in file.read_text(), "nobody has this folder"


def test_adapter_and_row_on_the_base_are_the_merged_model(unbroken):
    whole = AutoModelForCausalLM.from_pretrained(unbroken / "merged").eval()
    mine = load_merged(model(), unbroken)
    ids = torch.tensor([[5, 9, 2, 2, 33]])
    with torch.no_grad():
        torch.testing.assert_close(mine(ids).logits, whole(ids).logits, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(mine(ids).logits, model()(ids).logits, atol=1e-3)
    moved = (mine.get_input_embeddings().weight != model().get_input_embeddings().weight).any(-1).nonzero()
    assert moved.flatten().tolist() == [2]
    for each in (mine, whole):
        assert each.generation_config.suppress_tokens == [2]
        decoder = Decoder(each, "lexical-units")  # it knows where it came from
        assert decoder.drafter.units == Units.read(unbroken)
        want = each.generate(ids, max_new_tokens=30, do_sample=False)
        assert torch.equal(decoder.generate(ids, max_new_tokens=30, do_sample=False), want)


def test_the_log_holds_what_was_measured(unbroken):
    record = json.loads((unbroken / "training.json").read_text())
    held_out, _ = split(samples(), SETTINGS)
    assert record["text_loss"]["before"] == pytest.approx(text_loss(Target(model()), held_out))
    merged = load_merged(model(), unbroken)
    assert record["text_loss"]["after"] == pytest.approx(text_loss(Target(merged), held_out), rel=1e-4)
    evals = [row["eval_mat"] for row in record["log"] if "eval_mat" in row]
    decoder = Decoder(merged, "lexical-units")
    tokens = steps = 0
    for sample in held_out:
        decoder.generate(torch.tensor([sample["input_ids"][:4]]), max_new_tokens=8, do_sample=False)
        tokens, steps = tokens + decoder.stats.new_tokens, steps + len(decoder.stats.steps)
    assert tokens / steps == pytest.approx(max(evals))


def test_a_run_that_breaks_off_ends_like_an_unbroken_one(unbroken, tmp_path, monkeypatch):
    out, forward, calls = tmp_path / "units", UnitLearner.forward, []

    def dying(*args, **batch):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return forward(*args, **batch)

    with monkeypatch.context() as patch:
        patch.setattr(UnitLearner, "forward", dying)
        with pytest.raises(KeyboardInterrupt):
            run(out)
    assert not out.exists(), "nothing half-written"
    assert last_checkpoint(tmp_path / "units.run") is not None
    run(out)
    assert losses(out) == pytest.approx(losses(unbroken), abs=1e-5)
    with pytest.raises(UsageError, match="a run of other settings or data"):
        run(out, replace(SETTINGS, lam=2.0))


def test_half_precision_halves_the_adapter_and_what_is_measured_is_what_is_stored(tmp_path):
    out = run(tmp_path / "units", replace(SETTINGS, max_steps=3), dtype=torch.bfloat16)
    tensors = load_file(out / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    held_out, _ = split(samples(), SETTINGS)
    after = json.loads((out / "training.json").read_text())["text_loss"]["after"]
    assert after == pytest.approx(text_loss(Target(load_merged(model(), out)), held_out), rel=1e-5)


def test_units_are_found_by_the_confidence_of_a_forward(tokenizer):
    target = Target(model(), tokenizer=tokenizer)
    texts = samples(5)
    for text, spans in zip(texts, training.identify(target, texts, SETTINGS), strict=True):
        ids = torch.tensor([text["input_ids"]])
        with torch.no_grad():
            p = target.model(ids).logits[0].softmax(-1)
        want, size = [], 0
        for i in range(4, ids.shape[1]):
            joins = want and size < 4 and float(p[i - 1, ids[0, i]]) >= 0.1
            size = size + 1 if joins else 1
            want = [*want[:-1], [want[-1][0], i + 1]] if joins else [*want, [i, i + 1]]
        assert spans.tolist() == want


def test_the_share_of_packed_batches_is_what_was_asked_for():
    packed = training._packed(2001, replace(SETTINGS, packed=0.3))
    assert len(packed) == 2001
    assert packed.mean() == pytest.approx(0.3, abs=0.05)
    assert (packed[:2000:2] == packed[1:2000:2]).all(), "whole batches"


# ---- the placeholder -----------------------------------------------------------------------------------------------


def test_an_unused_token_is_found_or_asked_for(tokenizer):
    target = Target(tiny_llama(), tokenizer=tokenizer)
    few = samples(vocab=60)
    assert unused_token(few, target, None) == 62, "behind the tokenizer's"
    assert unused_token(few, target, 61) == 61
    small = SimpleNamespace(vocab_size=62, config=target.config, tokenizer=tokenizer)
    with pytest.raises(UsageError, match="name one that is never produced, placeholder=ID"):
        unused_token(few, small, None)  # its unknown token is the padding
    named = {f"w{i}": i for i in range(61)} | {"<|reserved_0|>": 61}
    small.tokenizer = type("Reserving", (), {"get_vocab": lambda self: named, "__len__": lambda self: len(named)})()
    assert unused_token(few, small, None) == 61
    for wrong in (0, 1, int(few[0]["input_ids"][0]), 64, -1):
        with pytest.raises(UsageError, match=f"placeholder={wrong} must be one of the 64 tokens"):
            unused_token(few, target, wrong)


# ---- calibration ---------------------------------------------------------------------------------------------------


def test_beta_is_the_least_threshold_of_the_wanted_agreement():
    sure = np.array([[0.95, 0.9], [0.8, 0.99], [0.6, -1.0], [0.55, 0.2]])
    right = np.array([[True, True], [True, False], [False, False], [True, True]])
    found = Calibration(sure, right)
    assert found.agreement(0.5) == (pytest.approx(4 / 6), 6)
    assert found.agreement(0.9) == (1.0, 2), "a placeholder behind one that is unsure is not trusted"
    assert found.beta(least=1) == pytest.approx(0.81)
    assert found.beta(least=3) == found.beta() == NEVER, "too few to go by"
    assert Calibration(sure, ~right).beta(least=1) == NEVER
    assert "| 0.95 to 0.98 | 1.000 (1) | - |" in found.table()
    assert "| 0.98 to 1.0 | - | 0.000 (1) |" in found.table()


def test_calibration_asks_behind_every_token_of_the_models_own_text():
    target = Target(model())
    units = Units(2, 3, 0.9, NEVER)
    prompt = torch.tensor([[5, 9, 33, 7]])
    found = training.calibrate(target, [prompt], 6, units)
    text = target.model.generate(prompt, max_new_tokens=6, do_sample=False)[0].tolist()
    assert found.sure.shape == (6, 2)
    assert (found.sure < 0).tolist() == [[False, False]] * 4 + [[False, True], [True, True]]
    for i in range(6):
        with torch.no_grad():
            p = target.model(torch.tensor([[*text[: 4 + i], 2, 2]])).logits[0, -2:]
        p[:, 2] = -torch.inf
        best, token = p.softmax(-1).max(-1)
        for j in range(min(2, 5 - i)):
            assert found.sure[i, j] == pytest.approx(float(best[j]), rel=1e-3)
            assert found.right[i, j] == (int(token[j]) == text[5 + i + j])


# ---- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"K": 1}, "K=1 must be at least 2"),
        ({"rank": 0}, "rank=0 at least 1"),
        ({"unit_alpha": 0}, "unit_alpha=0.0"),
        ({"packed": 1.5}, "packed=1.5"),
        ({"lam": 0}, "lam=0.0"),
        ({"optimizer": "muon"}, "optimizer='muon' is for heads"),
        ({"decay": 0.5}, "decay=0.5 is for heads"),
        ({"unitalpha": 0.5}, "did you mean 'unit_alpha'"),
        ({"batch": "many"}, "setting batch='many': it takes int"),
    ],
)
def test_wrong_settings_name_the_key_and_the_remedy(values, said):
    with pytest.raises(UsageError, match=said):
        unit_settings(values)


def test_numbers_written_as_yaml_text_are_numbers():
    assert unit_settings({"learning_rate": "1e-3", "placeholder": None}).learning_rate == 1e-3


def test_without_peft_one_line_says_what_to_install(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "peft" else found(name, *a))
    with pytest.raises(UsageError, match=r"need peft: pip install 'specdec\[train\]'"):
        UnitSettings()


def test_the_command_trains_and_says_that_the_target_changes(tmp_path, tokenizer):
    model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples(vocab=62)))
    arguments = ["train", "lexical-units", "--target", tmp_path / "model", "--data", tmp_path / "data.jsonl"]
    sets = {"max_steps": 2, "batch": 2, "log_steps": 1, "eval_steps": 2, "save_steps": 2, "eval_prompts": 2, "rank": 2}
    pairs = [part for key, value in {**sets, "placeholder": 2}.items() for part in ("--set", f"{key}={value}")]
    result = CliRunner().invoke(app, [*map(str, arguments), "--out", str(tmp_path / "out"), "--merged", *pairs])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "merged" / "tokenizer.json").is_file()
    assert Units.read(tmp_path / "out" / "merged").placeholder_id == 2
    assert "THE TARGET CHANGES" in CliRunner().invoke(app, ["train", "lexical-units", "--help"]).output
