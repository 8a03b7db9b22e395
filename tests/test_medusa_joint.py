"""Medusa-2: what is trained, its loss by hand, the bundle it leaves, and runs that are killed."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import checkpointed, wait_until
from test_training_heads import losses, samples
from tiny_models import tiny_gemma2, tiny_llama
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

from specdec import Decoder
from specdec.cli import app
from specdec.drafters.medusa import Medusa as Drafter
from specdec.drafters.medusa.joint import JointLearner
from specdec.drafters.medusa.module import Medusa
from specdec.errors import CompatibilityError, UsageError
from specdec.target import Target
from specdec.training import curves
from specdec.training import heads as training
from specdec.training.heads import split_settings, train_head
from specdec.training.joint import JointSettings, text_loss, train_joint

SETTINGS = JointSettings(
    max_steps=12,
    batch=2,
    learning_rate=2e-3,
    log_steps=1,
    eval_steps=3,
    save_steps=3,
    eval_prompts=2,
    eval_tokens=8,
    rank=4,
)
LORA = (4, 16.0, 0.05)
STARTED_BY_HAND = """
import sys
sys.path[:0] = [{here!r}]
from pathlib import Path
from test_medusa_joint import SETTINGS, run, training
import time, torch
torch.set_num_threads(1)
training.math.isfinite = lambda x, f=training.math.isfinite: (time.sleep(0.4), f(x))[1]
run(Path({out!r}))
"""


def run(out: Path, settings: JointSettings = SETTINGS, options: dict | None = None, **more) -> Path:
    return train_joint(tiny_llama(), samples(), out, settings, {"num_heads": 2} if options is None else options, **more)


def joint(model, lora=LORA, self_distill=False, lambda0=0.2, shared_output=True, **more) -> JointLearner:
    target = Target(model)
    torch.manual_seed(0)
    head = Medusa.fresh(target, num_heads=2, shared_output=shared_output)
    with torch.no_grad():
        for p in head.blocks.parameters():
            p += torch.randn_like(p) * 0.1
    return JointLearner(head, target, lora, self_distill, lambda0, **more)


def text(rows: int = 3, length: int = 11) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, :3] = False
    mask[0, -2:] = False
    return ids, mask


def take_steps(learner: JointLearner, steps: int, rate: float = 3e-3) -> list[torch.Tensor]:
    """Loss per token of every depth, at each step."""
    ids, mask = text()
    optimizer = torch.optim.Adam([p for p in learner.parameters() if p.requires_grad], lr=rate)
    seen = []
    learner.train()
    for _ in range(steps):
        out = learner(ids, mask)
        optimizer.zero_grad()
        out.total.backward()
        optimizer.step()
        seen.append(out.loss / out.count)
    learner.eval()
    return seen


def by_hand(logits: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor, shift: int) -> float:
    """Sum of cross-entropies of logits [B, S, V] whose position i predicts token i + shift."""
    z, y, learned = logits[:, :-shift], ids[:, shift:], mask[:, shift:]
    return float(cross_entropy(z[learned], y[learned], reduction="sum"))


# ---- what is trained ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared_output", [True, False])
@pytest.mark.parametrize("lora", [LORA, None])
def test_both_ways_of_adapting_lower_both_losses(lora, shared_output):
    seen = take_steps(joint(tiny_llama(), lora, shared_output=shared_output), 25)
    assert (seen[-1] < 0.9 * seen[0]).all()


def test_adapters_change_nothing_but_themselves_and_switched_off_give_the_original_bit_for_bit():
    model, original = tiny_llama(), tiny_llama()
    ids, _ = text()
    learner = joint(model)
    take_steps(learner, 3)
    learner.train()  # puts the adapter back on the output matrix
    names = {n.replace(".base_layer", ""): p for n, p in model.named_parameters() if "lora_" not in n}
    for name, p in original.named_parameters():
        assert torch.equal(names[name], p), name
    adapted = {n.split(".lora_A")[0] for n, _ in model.named_parameters() if "lora_A" in n}
    linear = {n for n, m in original.named_modules() if isinstance(m, torch.nn.Linear)}
    assert adapted == linear
    assert len(adapted) == 2 * 7 + 1
    model.eval()
    with learner._adapters[0].disable_adapter(), torch.no_grad():
        assert torch.equal(model(ids).logits, original(ids).logits)
    with torch.no_grad():
        assert not torch.allclose(model(ids).logits, original(ids).logits)


def test_a_tied_output_matrix_gets_no_adapter_so_the_embedding_stays():
    model = tiny_llama(tie_word_embeddings=True)
    before = model.get_input_embeddings().weight.clone()
    learner = joint(model)
    take_steps(learner, 3)
    merged = learner.merged()
    assert torch.equal(merged.get_input_embeddings().weight, before)
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    assert merged.config.tie_word_embeddings


def test_full_training_moves_every_weight_and_sees_a_tied_matrix_once():
    model, original = tiny_llama(tie_word_embeddings=True), tiny_llama(tie_word_embeddings=True)
    learner = joint(model, lora=None)
    assert len(learner.trained) == len(list(original.parameters()))
    take_steps(learner, 2)
    for (name, p), q in zip(model.named_parameters(), original.parameters(), strict=True):
        assert not torch.equal(p, q), name


@pytest.mark.parametrize("family", ["gemma2", "gpt2"])
def test_layers_are_found_by_structure_and_merging_keeps_the_text(family):
    """Softcapped logits with a tied output; linear layers that are no nn.Linear, dropout, learned positions."""
    torch.manual_seed(0)
    gpt2 = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.3)
    model = tiny_gemma2() if family == "gemma2" else GPT2LMHeadModel(gpt2).eval()
    ids, _ = text()
    learner = joint(model)
    seen = take_steps(learner, 12)
    assert (seen[-1] < seen[0]).all()
    with torch.no_grad():
        before = model(ids).logits
        torch.testing.assert_close(learner.merged()(ids).logits, before, atol=1e-4, rtol=1e-4)


def test_the_output_that_heads_read_is_the_adapted_one():
    """While decoding in the middle of training, the weight of the output matrix holds its adapter."""
    model = tiny_llama()
    learner = joint(model)
    ids, _ = text()
    take_steps(learner, 3)
    with torch.no_grad():
        want = learner.output()(learner.read(ids))
    torch.testing.assert_close(model(ids).logits, want)
    assert not torch.allclose(model.get_output_embeddings().weight, learner.target.head.module.weight)
    learner.train()
    assert hasattr(model.get_output_embeddings(), "lora_A")


# ---- the loss by hand ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared_output", [True, False])
def test_the_loss_is_the_targets_plus_lambda0_times_the_heads(shared_output):
    """Every learned token counts, the first one after the start included; lambda_k = 0.8^k with k from 1."""
    model = tiny_llama()
    learner = joint(model, lambda0=0.3, shared_output=shared_output)
    take_steps(learner, 2)
    ids, mask = text()
    mask[1] = True
    out = learner(ids, mask)
    with torch.no_grad():
        states = model(ids, output_hidden_states=True)
        want = [by_hand(states.logits, ids, mask, 1)]
        for k in range(2):
            h = learner.head.state(k, states.hidden_states[-1])
            z = model.lm_head(h) if shared_output else learner.head.outputs[k](h)
            want.append(by_hand(z, ids, mask, k + 2))
    assert out.loss.tolist() == pytest.approx(want, rel=1e-5)
    assert float(out.total) == pytest.approx(want[0] + 0.3 * (0.8 * want[1] + 0.64 * want[2]), rel=1e-5)


@pytest.mark.parametrize("lora", [LORA, None])
def test_gradients_are_those_of_the_loss_by_hand(lora):
    """Through the whole target, the heads, and the output matrix they share."""
    model = tiny_llama()
    learner = joint(model, lora and (*lora[:2], 0.0))
    take_steps(learner, 2)
    learner.train()
    ids, mask = text()
    trained = [p for p in learner.parameters() if p.requires_grad]
    got = torch.autograd.grad(learner(ids, mask).total, trained)
    states = model(ids, output_hidden_states=True)
    want = 0.0
    for k, weight in enumerate((1, 0.2 * 0.8, 0.2 * 0.64)):
        h = states.hidden_states[-1]
        z = model.lm_head(h if k == 0 else learner.head.state(k - 1, h))[:, : -k - 1]
        want = want + weight * cross_entropy(z[mask[:, k + 1 :]], ids[:, k + 1 :][mask[:, k + 1 :]], reduction="sum")
    for a, b in zip(got, torch.autograd.grad(want, trained), strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)


def test_self_distillation_keeps_to_the_target_as_it_was_and_its_heads_come_in_along_a_sine():
    model, original = tiny_llama(), tiny_llama()
    learner = joint(model, self_distill=True, lambda0=0.01)
    take_steps(learner, 3)
    ids, mask = text()
    with torch.no_grad():
        teacher, student = original(ids).logits[:, :-1][mask[:, 1:]], model(ids).logits[:, :-1][mask[:, 1:]]
        want = -(teacher.softmax(-1) * student.log_softmax(-1)).sum()
    for progress, ramp in ((0.0, 0.0), (1 / 3, 0.5), (0.5, math.sqrt(0.5)), (1.0, 1.0)):
        learner.progress = progress
        out = learner(ids, mask)
        assert float(out.loss[0]) == pytest.approx(float(want), rel=1e-5)
        heads = 0.8 * float(out.loss[1]) + 0.64 * float(out.loss[2])
        assert float(out.total) == pytest.approx(float(want) + 0.01 * ramp * heads, rel=1e-5)


def test_a_target_that_has_not_moved_has_nothing_to_learn_from_itself():
    learner = joint(tiny_llama(), self_distill=True)
    learner.progress = 0.0
    learner.eval()
    learner(*text()).total.backward()
    assert all(p.grad.abs().max() < 1e-5 for p in learner.trained)


# ---- whole runs ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w0")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:
    return run(tmp_path_factory.mktemp("run") / "joint", tokenizer=tokenizer, target_id="/home/me/model")


def test_a_finished_run_is_a_bundle_that_says_the_target_changed(unbroken, tokenizer):
    assert sorted(f.name for f in unbroken.iterdir()) == ["curves.png", "heads", "target", "training.json"]
    for card in ("target/README.md", "heads/README.md"):
        said = (unbroken / card).read_text()
        assert "no longer the original's" in said
        assert "not against model" in said
        assert "/home/me" not in said, "nobody else has this folder"
    record = json.loads((unbroken / "training.json").read_text())
    assert record["settings"]["lambda0"] == 0.2
    assert len(losses(unbroken)) == 12
    assert {"loss_0", "loss_1", "loss_2", "accuracy_1", "accuracy_2"} <= record["log"][0].keys()
    assert "accuracy_0" not in record["log"][0]
    held_out, _ = training.split(samples(), SETTINGS)
    assert record["text_loss"]["before"] == pytest.approx(text_loss(Target(tiny_llama()), held_out))
    head = json.loads((unbroken / "heads" / "config.json").read_text())
    assert head["target_id"] == "joint/target", "not the original's name"
    assert len(head["acceptance"]) == 2
    again = PreTrainedTokenizerFast.from_pretrained(unbroken / "target")
    assert again("w5 w7").input_ids == tokenizer("w5 w7").input_ids


def test_the_bundle_decodes_as_its_own_target_generates(unbroken):
    model = AutoModelForCausalLM.from_pretrained(unbroken / "target").eval()
    assert not any("lora" in name for name in model.state_dict())
    ids = torch.tensor([[5, 9, 33]])
    want = model.generate(ids, max_new_tokens=40, do_sample=False)
    got = Decoder(model, "medusa", checkpoint=unbroken / "heads").generate(ids, max_new_tokens=40, do_sample=False)
    assert torch.equal(got, want)
    with torch.no_grad():
        assert not torch.allclose(model(ids).logits, tiny_llama()(ids).logits, atol=1e-3)


@pytest.mark.parametrize("changes", [{}, {"adapt": "full"}, {"self_distill": True}])
def test_the_mat_in_the_log_is_what_the_bundle_does(unbroken, tmp_path, changes):
    out = run(tmp_path / "joint", replace(SETTINGS, **changes)) if changes else unbroken
    log = json.loads((out / "training.json").read_text())["log"]
    evals = [row["eval_mat"] for row in log if "eval_mat" in row]
    assert len(evals) == 4
    held_out, _ = training.split(samples(), SETTINGS)
    head = Medusa.from_pretrained(out / "heads")
    head.config.acceptance = None  # as it was while training
    decoder = Decoder(AutoModelForCausalLM.from_pretrained(out / "target").eval(), Drafter(checkpoint=head))
    tokens = steps = 0
    for sample in held_out:
        decoder.generate(torch.tensor([sample["input_ids"][:4]]), max_new_tokens=8, do_sample=False)
        tokens, steps = tokens + decoder.stats.new_tokens, steps + len(decoder.stats.steps)
    assert tokens / steps == pytest.approx(max(evals))


def test_the_heads_learn_four_times_as_fast(unbroken):
    state = torch.load(next((unbroken.parent / "joint.run").glob("checkpoint-12")) / "optimizer.pt")
    rates = [group["initial_lr"] for group in state["param_groups"] if group["params"]]
    assert rates == pytest.approx([2e-3, 8e-3, 8e-3])


def test_a_run_killed_at_any_step_ends_like_an_unbroken_one(unbroken, tmp_path):
    """Its dropout included."""
    out = tmp_path / "joint"
    script = STARTED_BY_HAND.format(here=str(Path(__file__).parent), out=str(out))
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE)
    checkpoints = tmp_path / "joint.run"
    wait_until(lambda: checkpointed(checkpoints), process)
    process.kill()
    process.wait()
    assert not out.exists(), "nothing half-written"
    assert training.last_checkpoint(checkpoints) is not None
    run(out)
    assert losses(out) == pytest.approx(losses(unbroken), abs=1e-4)


def test_a_bundle_that_cannot_be_written_leaves_nothing_and_is_written_by_the_next_try(tmp_path, monkeypatch):
    out, settings = tmp_path / "joint", replace(SETTINGS, max_steps=3)

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(curves, "write_curves", full_disk)
        with pytest.raises(UsageError, match="No space left on device"):
            run(out, settings)
    assert [f.name for f in tmp_path.iterdir()] == ["joint.run"]
    assert (run(out, settings) / "curves.png").is_file()


def test_the_second_stage_starts_from_the_heads_of_the_first(tmp_path):
    first = train_head("medusa", tiny_llama(), samples(), tmp_path / "medusa", SETTINGS, {"num_heads": 3})
    settings = replace(SETTINGS, heads=str(first), learning_rate=1e-9, head_rate=1.0, max_steps=3)
    out = run(tmp_path / "joint", settings, {})
    mine, theirs = (Medusa.from_pretrained(folder).state_dict() for folder in (out / "heads", first))
    for name, tensor in theirs.items():
        torch.testing.assert_close(mine[name], tensor, atol=1e-6, rtol=0)
    assert str(tmp_path) not in (out / "training.json").read_text()
    with pytest.raises(UsageError, match=r"num_heads: heads=.*leave one of them out"):
        run(tmp_path / "both", settings, {"num_heads": 3})
    with pytest.raises(CompatibilityError, match="trained for a target with hidden_size=32, this target has 64"):
        train_joint(tiny_llama(hidden_size=64), samples(), tmp_path / "other", settings)


# ---- settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"self_distill": True, "adapt": "full"}, "self_distill=true needs adapt=lora"),
        ({"adapt": "qlora"}, "adapt='qlora' must be 'lora' or 'full'"),
        ({"optimizer": "muon"}, "'adamw' only"),
        ({"rank": 0}, "rank=0 must be at least 1"),
        ({"lambda0": 0}, "lambda0=0.0 must be above 0"),
        ({"self_distill": "maybe"}, "self_distill='maybe': it takes bool"),
        ({"self_distil": True}, "did you mean 'self_distill'"),
    ],
)
def test_wrong_settings_name_the_key_and_the_remedy(values, said):
    with pytest.raises(UsageError, match=said):
        split_settings("medusa", values, JointSettings)


def test_without_peft_one_line_says_what_to_install(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "peft" else found(name, *a))
    with pytest.raises(UsageError, match=r"needs peft: pip install 'specdec\[train\]'"):
        JointSettings()
    JointSettings(adapt="full")


def test_the_command_trains_and_says_that_the_target_changes(tmp_path, tokenizer):
    tiny_llama().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = "".join(json.dumps(row) + "\n" for row in samples())
    (tmp_path / "data.jsonl").write_text(rows)
    arguments = ["train", "medusa-2", "--target", tmp_path / "model", "--data", tmp_path / "data.jsonl"]
    sets = {"max_steps": 2, "batch": 2, "log_steps": 1, "eval_steps": 2, "save_steps": 2, "eval_prompts": 2, "rank": 2}
    pairs = [part for key, value in sets.items() for part in ("--set", f"{key}={value}")]
    result = CliRunner().invoke(app, [*map(str, arguments), "--out", str(tmp_path / "out"), *pairs])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "target" / "tokenizer.json").is_file()
    shown = CliRunner().invoke(app, ["train", "medusa-2", "--help"]).output
    assert "THE TARGET CHANGES" in shown
