"""The trainer: exact resume, exact loss, exact text, and errors that say what to type."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

from specdec.cli.train import train_app
from specdec.training import data as D
from specdec.training.loss import next_token_loss
from specdec.training.optimizer import MuonAdamW, orthogonalise, parameter_groups
from specdec.training.recipe import Packing, RecipeError, load_recipe
from specdec.training.tokenizer import fit_sentencepiece, save_tokenizer

transformers = pytest.importorskip("transformers")
runner = CliRunner()

SMALL = {
    "name": "small",
    "seed": 3,
    "tokenizer": {"vocab_size": 400, "sample_chars": 100000},
    "sources": [
        {"name": "tinystories", "reader": "stories", "files": ["a.txt"], "held_out_file": "valid.txt", "repeats": 1.5},
        {"name": "gsm8k", "reader": "math", "files": ["math.jsonl"], "held_out": 2, "repeats": 1},
    ],
    "packing": {"block": 64, "short": 16, "short_share": 0.5},
    "models": {
        "target": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "tokens": 1024,
            "learning_rate": 0.005,
        }
    },
    "training": {
        "batch": 2,
        "warmup_share": 0.1,
        "final_rate_share": 0.1,
        "weight_decay": 0.1,
        "max_grad_norm": 1.0,
        "logging_steps": 1,
        "save_steps": 2,
    },
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory with two sources of made-up words, and the recipe that reads it."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abdefgilmnoprstu", k=rng.randint(2, 7))) for _ in range(300)]
    folder = tmp_path_factory.mktemp("data")
    stories = [" ".join(rng.choices(words, k=40)) + ".\nAnd " + " ".join(rng.choices(words, k=9)) for _ in range(80)]
    (folder / "a.txt").write_text(f"\n{D.END}\n".join(stories[:70]), encoding="utf-8")
    (folder / "valid.txt").write_text(f"\n{D.END}\n".join(stories[70:]), encoding="utf-8")
    rows = [
        {"question": f"What is {a} + 2?", "answer": f"It is <<{a}+2={a + 2}>>{a + 2}.\n#### {a + 2}"} for a in range(20)
    ]
    (folder / "math.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (folder / "small.yaml").write_text(yaml.safe_dump(SMALL), encoding="utf-8")
    return folder


class TestText:
    def test_code_has_lf_line_ends_and_spaces_for_tabs(self) -> None:
        assert D.code_text(" Add. ", "def f():\r\n\treturn 1 \r\n") == "Task: Add.\nPython:\ndef f():\n    return 1"

    def test_a_prompt_ends_where_the_answer_begins_without_a_space(self) -> None:
        assert D.question_text("Why?") == "Question: Why?\nAnswer:"
        assert D.translation_text("Ja.") == "German: Ja.\nEnglish:"
        assert D.instruction_text("Say hi.", "", "hi") == "Instruction: Say hi.\nResponse: hi"
        assert D.code_text("Add.") == "Task: Add.\nPython:\n"

    def test_math_drops_calculator_marks_and_keeps_the_final_answer(self, corpus: Path) -> None:
        text = D.read_sources(load_recipe(str(corpus / "small.yaml")), corpus)["gsm8k"]
        assert text.train[5] == "Question: What is 5 + 2?\nAnswer: It is 7.\n#### 7"
        assert len(text.held_out) == 2
        assert not set(text.held_out) & set(text.train)

    def test_a_prompt_in_the_training_text_is_found(self) -> None:
        sentence = "the quick brown fox jumps over the lazy dog while seven small birds sing in the old apple tree"
        other = "nothing at all of this stands in the training text " * 3
        assert D.leaked([sentence, other], [f"Before. {sentence.upper()}, after.", "short"]) == [sentence]

    def test_a_fractional_repeat_is_whole_passes_and_a_seeded_part(self, corpus: Path) -> None:
        recipe = load_recipe(str(corpus / "small.yaml"))
        documents = D.read_sources(recipe, corpus)
        mixed = D.mixture(recipe, documents)
        counts = [mixed.count(story) for story in documents["tinystories"].train]
        assert sum(counts) == 105
        assert set(counts) == {1, 2}
        assert mixed == D.mixture(recipe, documents)

    def test_early_blocks_are_cut_short_and_late_ones_stay_whole(self) -> None:
        blocks = D.pack([list(range(40)), list(range(40, 100))], 32)  # [3, 32]
        assert blocks.shape == (3, 32)
        assert blocks.reshape(-1).tolist() == list(range(96))
        dataset = D.Blocks(blocks, Packing(block=32, short=8, short_share=0.5), long_from=2)
        short = dataset.collate([dataset[0], dataset[1]])["input_ids"]
        assert short.shape == (8, 8)
        assert dataset.collate([dataset[2]])["input_ids"].shape == (1, 32)


class TestTokenizer:
    def test_text_comes_back_exactly_and_pieces_are_sentencepiece_s(self, corpus: Path, tmp_path: Path) -> None:
        import sentencepiece

        documents = (corpus / "a.txt").read_text(encoding="utf-8").split(D.END)
        model_file = fit_sentencepiece(documents, tmp_path, vocab_size=400, sample_chars=10**6, seed=0)
        save_tokenizer(model_file, tmp_path, context=64)
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
        for text in ["  two  spaces ", "def f(x):\n    return x\n\n", "\n", "grün 日本 🙂\ttab", documents[0]]:
            ids = tokenizer(text).input_ids
            assert ids[0] == tokenizer.bos_token_id
            assert tokenizer.decode(ids[1:]) == text
            assert ids[1:] == pieces.encode(text)
        assert (
            len({tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 4
        )


class TestLossAndOptimizer:
    def test_chunked_loss_and_gradients_equal_cross_entropy(self) -> None:
        torch.manual_seed(0)
        h = torch.randn(3, 250, 8, dtype=torch.float64, requires_grad=True)  # more rows than one chunk
        w = torch.randn(40, 8, dtype=torch.float64, requires_grad=True)
        ids = torch.randint(0, 40, (3, 250))
        plain = torch.nn.functional.cross_entropy((h[:, :-1] @ w.T).flatten(0, 1), ids[:, 1:].flatten())
        want = torch.autograd.grad(plain, (h, w))
        loss = next_token_loss(h, w, ids)
        got = torch.autograd.grad(loss, (h, w))
        torch.testing.assert_close(loss, plain)
        torch.testing.assert_close(got, want)

    @pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4)])
    def test_orthogonalised_gradients_have_singular_values_near_one(self, shape: tuple[int, int]) -> None:
        torch.manual_seed(0)
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
        assert values.min() > 0.3
        assert values.max() < 1.3

    def test_every_parameter_is_in_one_group_and_the_loss_falls(self) -> None:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        groups = parameter_groups(model, weight_decay=0.0)
        assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
        optimizer = MuonAdamW(groups, lr=0.05, weight_decay=0.0)
        x = torch.randn(64, 4)
        y = x.sum(1, keepdim=True)
        losses = []
        for _ in range(100):
            loss = (model(x) - y).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.3 * losses[0]


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


class TestTrain:
    @pytest.fixture(scope="class")
    def straight(self, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        from specdec.training.lm import train_lm

        return train_lm(load_recipe(str(corpus / "small.yaml")), "target", corpus, tmp_path_factory.mktemp("straight"))

    def test_a_killed_run_resumes_to_the_same_weights_and_the_same_log(
        self, straight: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from specdec.training import loss as loss_module
        from specdec.training.lm import train_lm

        recipe = load_recipe(str(corpus / "small.yaml"))
        calls = 0

        def killed(*args: torch.Tensor) -> torch.Tensor:
            nonlocal calls
            calls += 1
            if calls == 6:  # of 8 steps, after the checkpoint at step 4
                raise KeyboardInterrupt
            return next_token_loss(*args)

        with monkeypatch.context() as patch:
            patch.setattr(loss_module, "next_token_loss", killed)
            with pytest.raises(KeyboardInterrupt):
                train_lm(recipe, "target", corpus, tmp_path)
        assert not (tmp_path / "target").exists()
        torn = tmp_path / "target.run" / "checkpoint-6"  # as if killed while the checkpoint was written
        torn.mkdir()
        (torn / "model.safetensors").write_bytes(b"half")
        resumed = train_lm(recipe, "target", corpus, tmp_path)
        torch.testing.assert_close(_weights(resumed), _weights(straight), rtol=0, atol=0)
        logs = [json.loads((folder / "training.json").read_text())["loss"] for folder in (straight, resumed)]
        assert logs[0] == logs[1]
        assert len(logs[0]) == 8

    def test_a_finished_folder_is_bf16_and_loads_with_auto_classes(self, straight: Path) -> None:
        assert all(w.dtype == torch.bfloat16 for w in _weights(straight).values())
        model = transformers.AutoModelForCausalLM.from_pretrained(straight)
        tokenizer = transformers.AutoTokenizer.from_pretrained(straight)
        assert model.config.max_position_embeddings == 64
        assert model.generation_config.eos_token_id == tokenizer.eos_token_id
        assert (straight / "loss.png").read_bytes().startswith(b"\x89PNG")
        assert json.loads((straight / "training.json").read_text())["tokens"] == 1024
        assert not list(straight.parent.glob("*.part"))

    def test_bits_per_character_of_a_uniform_model(self, straight: Path) -> None:
        from specdec.training.report import bits_per_character

        model = transformers.AutoModelForCausalLM.from_pretrained(straight, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(straight)
        model.lm_head.weight.data.zero_()  # tied: all logits are 0, so each token costs log2(400) bits
        text = "some text to be measured"
        tokens = len(tokenizer(text).input_ids) - 1
        assert bits_per_character(model, tokenizer, [text]) == pytest.approx(tokens * np.log2(400) / len(text))

    def test_data_of_another_recipe_is_not_reused(self, straight: Path, corpus: Path) -> None:
        from specdec.training.lm import prepare

        with pytest.raises(RecipeError, match="another recipe"):
            prepare(load_recipe(str(corpus / "small.yaml"), {"seed": "4"}), corpus, straight.parent)

    def test_checkpoints_of_other_settings_are_not_resumed(self, straight: Path, corpus: Path) -> None:
        from specdec.training.lm import train_lm

        faster = load_recipe(str(corpus / "small.yaml"), {"models.target.learning_rate": "0.1"})
        with pytest.raises(RecipeError, match="another recipe"):
            train_lm(faster, "target", corpus, straight.parent)


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["--recipe", "tny"], "did you mean 'tiny'"),
            (["--data", "nowhere"], "--data 'nowhere' is not a directory"),
            (["--set", "training.bach=4"], "did you mean 'training.batch'"),
            (["--set", "seed"], "is not key=value"),
            (["--set", "packing.short=500"], "must divide"),
            (["--out", "{corpus}/a.txt"], "cannot be written"),
            (["--data", "{empty}"], "lacks 'text/tinystories_train_a.txt'"),
        ],
    )
    def test_one_line_names_the_argument_and_the_remedy(
        self, arguments: list[str], said: str, corpus: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "empty").mkdir()
        given = [a.format(corpus=corpus, empty=tmp_path / "empty") for a in arguments]
        options = {"--data": str(corpus), "--out": str(tmp_path / "out"), **dict(zip(given[::2], given[1::2]))}
        result = runner.invoke(train_app, ["lm", *[part for pair in options.items() for part in pair]])
        assert result.exit_code == 2
        assert said in result.output
        assert len(result.output.strip().splitlines()) == 1

    def test_packaging_without_trained_models_says_what_to_run(self, corpus: Path, tmp_path: Path) -> None:
        options = ["--data", str(corpus), "--out", str(tmp_path), "--to", str(tmp_path / "zoo")]
        result = runner.invoke(train_app, ["package", *options])
        assert result.exit_code == 2
        assert "specdec train lm --model target" in result.output
        assert not (tmp_path / "zoo").exists()

    def test_a_missing_extra_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        result = runner.invoke(train_app, ["lm", "--data", str(tmp_path), "--out", str(tmp_path)])
        assert result.exit_code == 2
        assert "pip install 'specdec[train]'" in result.output
