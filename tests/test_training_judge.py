"""`specdec train judge`: labels to weights, balanced by hand, split by question, resumed, and a judge that judges."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import tiny_llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

import specdec.cli.train_judge  # noqa: F401
from specdec import zoo
from specdec.cli import app
from specdec.errors import UsageError
from specdec.target import Target
from specdec.training import judge as training
from specdec.training.judge import (
    Features,
    JudgeSettings,
    Scored,
    auc,
    auc_same_token,
    balance,
    by_kind,
    choose_delta,
    fit,
    interval,
    make_examples,
    measure,
    read_examples,
    read_features,
    split_questions,
    train_judge,
    weighted_loss,
)
from specdec.training.recipe import Recipe, RecipeError, Source
from specdec.verifiers.judge import JudgeConfig, JudgeHead
from specdec.verifiers.judge.labels import Example

ROW = {"prompt": "1 + 2 =", "correct": " 3", "wrong": " 4", "mistake": [1, 2]}
MOST = 4  # largest operand


def quiet(done: int, total: int, text: str) -> None:
    pass


def write(file: Path, rows: list[dict]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<s>", "</s>", "<unk>", "+", "=", "ok", "no", *map(str, range(2 * MOST + 1))]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", unk_token="<unk>")


def sums() -> list[tuple[int, int, int]]:
    """Every a + b = c, right and wrong."""
    return list(itertools.product(range(MOST + 1), range(MOST + 1), range(2 * MOST + 1)))


def rows() -> list[dict]:
    """A right answer with each of some wrong ones."""
    return [
        {"prompt": f"{a} + {b} =", "correct": f" {a + b}", "wrong": f" {c}", "mistake": [1, 2], "kind": "sums"}
        for a, b, c in sums()
        if c != a + b and (a + b + c) % 2
    ]


@pytest.fixture(scope="module")
def reader() -> LlamaForCausalLM:
    """A small model of a text that says "ok" behind a right sum and "no" behind a wrong one."""
    model = tiny_llama(32, hidden_size=48, intermediate_size=96, initializer_range=0.05).train()
    text = [f"{a} + {b} = {c} {'ok' if c == a + b else 'no'}" for a, b, c in sums()]
    ids = torch.tensor(tokenizer()(text).input_ids)
    weight = torch.where(ids[:, -1] == tokenizer().convert_tokens_to_ids("ok"), float(2 * MOST), 1.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(220):
        logits = model(ids).logits[:, -2]
        loss = (torch.nn.functional.cross_entropy(logits, ids[:, -1], reduction="none") * weight).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def random_features(n: int = 400, d: int = 6, seed: int = 0) -> Features:
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=g) * torch.tensor([1.0, 50, 1, 1, 0, 1]) + 7
    label = (hidden[:, 0] - 7 + 0.5 * torch.randn(n, generator=g) > -0.5).long()
    return Features(hidden.half(), label, torch.arange(n) // 4, torch.randint(3, 9, (n,), generator=g))


def fresh(d: int = 6, **settings) -> JudgeHead:
    return JudgeHead(JudgeConfig(d, 32, 2, **settings))


# ---- rows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"prompt": None}, "'prompt' must be text"),
        ({"correct": ""}, "'correct' must be text"),
        ({"wrong": 4}, "'wrong' must be text"),
        ({"mistake": None}, "'mistake' must be"),
        ({"mistake": [1]}, "'mistake' must be"),
        ({"mistake": [0, True]}, "'mistake' must be"),
        ({"mistake": [1, 3]}, "2 characters"),
        ({"mistake": [1, 1]}, "span of 'wrong'"),
        ({"mistake": [-1, 1]}, "span of 'wrong'"),
    ],
    ids=str,
)
def test_a_malformed_row_is_named(change: dict, says: str, tmp_path: Path):
    row = {k: v for k, v in {**ROW, **change}.items() if v is not None}
    with pytest.raises(UsageError, match=r"row 2: .*") as error:
        read_examples(write(tmp_path / "rows.jsonl", [ROW, row]))
    assert says in str(error.value)


def test_files_without_rows_are_refused(tmp_path: Path):
    with pytest.raises(UsageError, match="no row"):
        read_examples(write(tmp_path / "none.jsonl", []))
    with pytest.raises(UsageError, match="No such file"):
        read_examples(tmp_path / "missing.jsonl")


def test_rows_are_read_as_they_are_written(tmp_path: Path):
    example = Example("1 + 2 =", " 3", " 4", (1, 2), "sums")
    assert read_examples(write(tmp_path / "rows.jsonl", [dataclasses.asdict(example)])) == [example]
    assert read_examples(write(tmp_path / "rows.jsonl", [ROW]))[0].kind == "all"


def recipe(*sources: Source) -> Recipe:
    return Recipe("r", 3, None, list(sources), None, {}, None)


def test_examples_are_made_from_training_documents_or_from_those_held_out(tmp_path: Path):
    problems = [
        {"question": f"Had {i} and {i}?", "answer": f"It is {i}+{i}=<<{i}+{i}={2 * i}>>{2 * i}.\n#### {2 * i}"}
        for i in range(10, 18)
    ]
    story = {"name": "s", "split": "train", "sections": ["A fox met a hen."]}
    asked = [("Who met a hen?", "a fox"), ("Who was met?", "the hen"), ("Where?", "nobody knows")]
    questions = [
        {"name": name, "split": split, "sections": [1], "question": q, "answer": a}
        for name, split in (("s", "train"), ("t", "test"))
        for q, a in asked
    ]
    write(tmp_path / "math.jsonl", problems)
    write(tmp_path / "questions.jsonl", questions)
    write(tmp_path / "stories.jsonl", [story, {**story, "name": "t", "split": "test", "sections": ["A cat sat."]}])
    sources = (
        Source("m", "math", ["math.jsonl"], 1, held_out=3),
        Source("q", "context_questions", ["questions.jsonl", "stories.jsonl"], 1),
    )
    made = make_examples(recipe(*sources), tmp_path, 4)
    assert [e.kind for e in made] == ["math"] * 4 + ["qa"]
    assert made == make_examples(recipe(*sources), tmp_path, 4), "the same again"
    held_out = make_examples(recipe(*sources), tmp_path, 9, held_out=True)
    assert {e.prompt for e in held_out if e.kind == "math"} == {
        f"Question: Had {i} and {i}?\nAnswer:" for i in (15, 16, 17)
    }
    assert not {e.prompt for e in held_out} & {e.prompt for e in made}
    for e in made:
        assert e.prompt.endswith("Answer:")
        assert e.correct.startswith(" ")
        assert "<<" not in e.correct
        start, end = e.mistake
        assert e.wrong[:start] == e.correct[:start]
        assert e.wrong[start:end] != e.correct[start : start + end - start]
    assert made[-1].prompt.startswith("Context: A fox met a hen.\nQuestion: ")
    assert made[-1].wrong[1:] in {a for _, a in asked}
    with pytest.raises(RecipeError, match="no source"):
        make_examples(recipe(), tmp_path, 4)


def test_questions_and_not_rows_are_split():
    examples = [Example(f"q{i % 7}", " a", " b", (1, 2)) for i in range(70)]
    held = split_questions(examples, 0.3, seed=0)
    inside = {e.prompt for e, h in zip(examples, held.tolist()) if h}
    assert len(inside) == 2
    assert not inside & {e.prompt for e, h in zip(examples, held.tolist()) if not h}
    assert 0 < int(split_questions(examples[:2], 0.9, seed=0).sum()) < 2
    with pytest.raises(UsageError, match="at least two"):
        split_questions(examples[:1] * 5, 0.1, seed=0)


# ---- hidden states ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pre_norm", [True, False])
def test_features_are_the_hidden_states_at_the_answers_own_tokens(pre_norm: bool, tmp_path: Path):
    model, words = tiny_llama(32), tokenizer()
    target = Target(model, tokenizer=words)
    examples = [Example("1 + 2 =", " 3 ok", " 4 no", (1, 2)), Example("1 =", " 1", " 2", (1, 2))]
    settings = JudgeSettings(forward_batch=3)
    head = fresh(32, pre_norm=pre_norm)
    found = read_features(head, target, examples, tmp_path, settings, quiet)
    assert found.hidden.dtype == torch.float16
    seen = sorted(zip(found.example.tolist(), words.convert_ids_to_tokens(found.token), found.label.tolist()))
    assert seen == [(0, "3", 1), (0, "4", 0), (0, "ok", 1), (1, "1", 1), (1, "2", 0)]
    for text, token in (("1 + 2 = 4", "4"), ("1 + 2 = 3 ok", "ok"), ("1 + 2 = 3", "3")):
        whole = model(torch.tensor([words(text).input_ids]), output_hidden_states=True)
        taps = target.read(torch.tensor([words(text).input_ids]), head.needs)
        mine = found.hidden[found.token == words.convert_tokens_to_ids(token)][0].float()
        want = taps[head.tap][0, -1]
        assert torch.allclose(mine, want, atol=2e-2)
        # transformers' own last hidden state is already normalised
        assert torch.allclose(want, whole.hidden_states[-1][0, -1], atol=1e-4) is not pre_norm


def test_parts_that_are_there_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(training, "PART", 2)
    examples = [Example(f"{i} =", " 1", " 2", (1, 2)) for i in range(5)]
    target = Target(tiny_llama(32), tokenizer=tokenizer())
    arguments = (fresh(32), target, examples, tmp_path, JudgeSettings(), quiet)
    before = read_features(*arguments)
    (tmp_path / "part-000002.safetensors").unlink()
    reads = []
    real = target.read
    monkeypatch.setattr(target, "read", lambda ids, needs: reads.append(len(ids)) or real(ids, needs))
    after = read_features(*arguments)
    assert reads == [4], "one part of two examples with two answers each"
    assert torch.equal(before.hidden, after.hidden)


def test_features_too_large_for_float16_are_kept_whole(tmp_path: Path):
    model = tiny_llama(32)
    model.model.layers[-1].mlp.down_proj.weight.data.mul_(1e6)
    target = Target(model, tokenizer=tokenizer())
    found = read_features(fresh(32), target, [Example("1 =", " 1", " 2", (1, 2))], tmp_path, JudgeSettings(), quiet)
    assert found.hidden.abs().max() > 65504
    assert torch.isfinite(found.hidden).all()


# ---- the loss -----------------------------------------------------------------------------------------------------


def test_the_weighted_loss_is_the_papers_sum():
    f, label = torch.tensor([2.0, -1.0, 0.5, 3.0]), torch.tensor([1, 1, 1, 0])
    w1, w0 = 4 / (2 * 3), 4 / (2 * 1)
    s = [1 / (1 + math.exp(-x)) for x in f.tolist()]
    by_hand = -(w1 * (math.log(s[0]) + math.log(s[1]) + math.log(s[2])) + w0 * math.log(1 - s[3])) / 4
    weight = balance(label, torch.zeros(4, dtype=torch.long))
    assert weight.tolist() == pytest.approx([w1, w1, w1, w0])
    assert weighted_loss(f, label, weight).item() == pytest.approx(by_hand)


def test_kinds_are_balanced_each_by_itself():
    label, kind = torch.tensor([1, 1, 0, 0, 0, 0, 0, 1]), torch.tensor([0, 0, 0, 1, 1, 1, 1, 1])
    weight = balance(label, kind)
    for k in (0, 1):
        assert weight[(kind == k) & (label == 1)].sum() == pytest.approx(weight[(kind == k) & (label == 0)].sum())
    assert weight.sum() == pytest.approx(8)
    for one in (0, 1):
        with pytest.raises(UsageError, match="needs both"):
            balance(torch.full((3,), one), torch.zeros(3, dtype=torch.long))


def test_the_weights_of_the_lowest_validation_loss_are_kept():
    train, held = random_features(), random_features(seed=1)
    head, kind = fresh(), torch.zeros(100, dtype=torch.long)
    settings = JudgeSettings(learning_rate=0.3, epochs=40, patience=4, batch=64)
    history = fit(head, train, held, kind, settings)
    losses = [row["validation_loss"] for row in history]
    assert len(losses) < 40, "it stops early"
    assert len(losses) - 1 - int(np.argmin(losses)) == 4
    weight = balance(held.label, kind[held.example])
    with torch.no_grad():
        assert weighted_loss(head(held.hidden), held.label, weight).item() == pytest.approx(min(losses))
    assert head.scale[4] == 1, "what never varies is left alone"
    assert head.scale[1] == pytest.approx(50, rel=0.2)
    assert auc(Scored.by(head, held)) > 0.9


def test_the_threshold_catches_the_share_asked_for_of_every_kind():
    chance = np.array([0.1, 0.2, 0.3, 0.4, 0.9, 0.95])
    s = Scored(chance, np.array([0, 0, 0, 0, 1, 1]), np.zeros(6), np.zeros(6))
    easy = Scored(np.array([0.05, 0.6]), np.array([0, 1]), np.zeros(2), np.zeros(2))
    assert choose_delta([s], 0.75) == 0.3
    assert choose_delta([s], 0.76) == 0.4
    assert choose_delta([easy, s], 0.75) == 0.3
    assert measure(s, choose_delta([s], 0.75))["at_delta"]["caught"] == 0.75


# ---- figures ------------------------------------------------------------------------------------------------------


def scored(chance: list[float], label: list[int], token: list[int] | None = None, example: list[int] | None = None):
    n = len(chance)
    return Scored(np.array(chance), np.array(label), np.array(example or range(n)), np.array(token or [0] * n))


def test_auc_counts_pairs_and_halves_of_ties():
    assert auc(scored([0.9, 0.8, 0.7, 0.1], [1, 0, 1, 0])) == 3 / 4
    assert auc(scored([0.5, 0.5, 0.2], [1, 0, 0])) == 3 / 4
    assert math.isnan(auc(scored([0.5, 0.6], [1, 1])))


def test_auc_within_one_token_is_not_fooled_by_which_token_it_is():
    s = scored([0.9, 0.9, 0.9, 0.1, 0.2, 0.3], [1, 1, 1, 0, 1, 0], [7, 7, 7, 4, 4, 4])
    assert auc(s) > 0.8
    assert auc_same_token(s) == 0.5
    assert math.isnan(auc_same_token(scored([0.5, 0.6], [1, 0], [3, 4])))
    assert "auc_same_token" not in measure(scored([0.5, 0.6], [1, 0], [3, 4]), 0.5)


def test_intervals_resample_examples_and_not_tokens():
    dice = np.random.default_rng(0)
    chance, label = dice.random(40), np.tile([1, 0], 20)
    alone = scored(chance.tolist(), label.tolist(), example=(np.arange(40) // 2).tolist())
    copied = Scored(*(np.repeat(x, 25) for x in (alone.chance, alone.label, alone.example, alone.token)))
    assert interval(auc, copied) == pytest.approx(interval(auc, alone)), "copies of tokens are no evidence"
    low, high = interval(auc, alone)
    assert low < auc(alone) < high


def test_kinds_without_mistakes_are_not_reported():
    examples = [Example("q", " a", " b", (1, 2), kind) for kind in ("x", "x", "y")]
    s = scored([0.5, 0.6, 0.7], [1, 0, 1], example=[0, 1, 2])
    assert list(by_kind(s, examples)) == ["x"]


# ---- whole runs ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(reader: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OUT of the command line, beside its data and its target."""
    folder = tmp_path_factory.mktemp("judge")
    reader.save_pretrained(folder / "target")
    tokenizer().save_pretrained(folder / "target")
    data = write(folder / "rows.jsonl", rows())
    arguments = ["train", "judge", "--target", str(folder / "target"), "--data", str(data), "--test", str(data)]
    settings = ["--out", str(folder / "judge"), "--set", "validation=0.3", "--set", "learning_rate=1e-2"]
    done = CliRunner().invoke(app, [*arguments, *settings])
    assert done.exit_code == 0, done.stderr
    return folder / "judge"


def test_a_judge_of_corrupted_arithmetic_tells_right_from_wrong(trained: Path):
    record = json.loads((trained / "training.json").read_text())
    measured = record["measured"]["validation, sums"]
    assert measured["auc"][0] > 0.9
    assert measured["auc_same_token"][0] > 0.7, "and not by which number it is"
    assert measured["at_delta"]["caught"] >= 0.9
    assert measured["auc"][1] <= measured["auc"][0] <= measured["auc"][2]


def test_a_finished_run_is_a_checkpoint_with_its_record(trained: Path):
    names = ["README.md", "config.json", "judge.png", "model.safetensors", "training.json"]
    assert sorted(file.name for file in trained.iterdir()) == names
    assert (trained / "judge.png").read_bytes().startswith(b"\x89PNG")
    head = JudgeHead.from_pretrained(trained)
    record = json.loads((trained / "training.json").read_text())
    assert head.config.delta == record["delta"]
    assert head.config.target_id == "target"
    assert "held out, sums" in (trained / "README.md").read_text()


def test_the_same_command_trains_the_same_judge_from_kept_hidden_states(trained: Path, reader, monkeypatch):
    before = JudgeHead.from_pretrained(trained).state_dict()
    monkeypatch.setattr(Target, "read", None)  # reading again would fail
    folder = trained.parent
    settings = JudgeSettings(validation=0.3, learning_rate=1e-2)
    target = str((folder / "target").resolve())
    data = folder / "rows.jsonl"
    train_judge(reader, tokenizer(), data, trained, settings, quiet, test=data, target_id=target)
    after = JudgeHead.from_pretrained(trained).state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_hidden_states_of_other_settings_are_refused(trained: Path, reader):
    with pytest.raises(UsageError, match="--no-resume"):
        train_judge(reader, tokenizer(), trained.parent / "rows.jsonl", trained, JudgeSettings(pre_norm=False), quiet)


@pytest.mark.parametrize(
    ("pairs", "says"),
    [
        (["learning_rat=1"], "did you mean 'learning_rate'"),
        (["epochs=many"], "setting epochs='many'"),
        (["pre_norm=1"], "setting pre_norm=1"),
        (["epochs=0"], "epochs=0"),
        (["validation=1"], "validation=1"),
        (["learning_rate=-1"], "learning_rate=-1"),
        (["chat=true"], "no chat template"),
        (["after_error=worse"], "after_error='worse'"),
        (["max_length=3"], "needs both"),
    ],
    ids=str,
)
def test_wrong_settings_are_one_clear_error(pairs: list[str], says: str, trained: Path, tmp_path: Path):
    folder = trained.parent
    arguments = ["train", "judge", "--target", str(folder / "target"), "--data", str(folder / "rows.jsonl")]
    sets = [part for pair in pairs for part in ("--set", pair)]
    done = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "out"), *sets])
    assert done.exit_code == 2
    assert says in " ".join(done.stderr.split())


def test_the_embedded_judge_fits_the_embedded_model():
    folder = Path(zoo.__file__).parent / "tiny" / "judge"
    model, _ = zoo.load("tiny")
    head = JudgeHead.from_pretrained(folder)
    head.check(Target(model))
    assert sum(file.stat().st_size for file in folder.iterdir()) < 200_000
