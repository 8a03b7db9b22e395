"""Speed against quality: scores, their intervals, and `specdec pareto`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from specdec import zoo
from specdec.bench.prompts import Prompt, load_prompts
from specdec.bench.quality import TextQuality, answer, score
from specdec.cli import app


@pytest.fixture(scope="module")
def tiny():
    model, tokenizer = zoo.load("tiny", dtype=torch.float32)
    return model.eval(), tokenizer


def run(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


class TestAnswer:
    @pytest.mark.parametrize(
        ("text", "number"),
        [
            ("30 x $12 = $360.\n#### 40", 40),
            ("#### 1,234 dollars", 1234),
            ("so she has 3 apples and 4.5 pears.", 4.5),
            ("it falls to -7", -7),
            ("none at all", None),
            ("12 eggs #### none", None),
        ],
    )
    def test_it_is_the_marked_number_or_the_last(self, text: str, number: float | None) -> None:
        assert answer(text) == number


class TestScores:
    def prompts(self) -> list[Prompt]:
        return [
            Prompt("a", "Question: 2 + 2?\nAnswer:", "math", "", "#### 4"),
            Prompt("b", "German: Danke.\nEnglish:", "translation", "", "Thank you very much."),
            Prompt("c", "Once upon a time", "stories", ""),
        ]

    def quality(self, tiny, greedy: bool = True) -> TextQuality:
        model, tokenizer = tiny
        return TextQuality(
            model, tokenizer, self.prompts(), [tokenizer(p.text).input_ids for p in self.prompts()], greedy
        )

    def texts(self, tiny, *texts: str) -> list[list[int]]:
        return [tiny[1](text, add_special_tokens=False).input_ids for text in texts]

    def test_each_prompt_counts_for_the_scores_it_has(self, tiny) -> None:
        quality = self.quality(tiny)
        plain = self.texts(tiny, "2 + 2 = 4\n#### 4", "Thank you very much.", "there was a fox.")
        mine = self.texts(tiny, "2 + 2 = 5\n#### 5", "Thank you very much.", "there was a fox.")
        found = quality.statistics(mine, plain)
        assert set(found) == set(quality.meanings) == {"log p", "exact match", "chrF", "same text"}
        everyone = np.arange(3)
        assert found["exact match"](everyone) == 0
        assert quality.statistics(plain, plain)["exact match"](everyone) == 1
        assert found["chrF"](everyone) == pytest.approx(100)
        assert found["same text"](everyone) == pytest.approx(2 / 3)
        assert np.isnan(found["exact match"](np.array([1, 2])))  # a resample without a problem has no such score

    def test_log_p_is_the_mean_over_tokens_of_the_targets_log_probability(self, tiny) -> None:
        quality = self.quality(tiny)
        texts = self.texts(tiny, " 4", " Thank you", " there was a little fox who lived")
        found = quality.statistics(texts, texts)["log p"](np.arange(3))
        total = 0.0
        for prompt, text in zip(quality.prompt_ids, texts, strict=True):
            labels = torch.tensor([[-100] * len(prompt) + text])
            total -= tiny[0](torch.tensor([[*prompt, *text]]), labels=labels).loss.item() * len(text)
        assert found == pytest.approx(total / sum(map(len, texts)), rel=1e-4)

    def test_a_sampled_run_has_no_same_text(self, tiny) -> None:
        assert "same text" not in self.quality(tiny, greedy=False).meanings

    def test_intervals_hold_the_truth_and_the_paired_one_is_narrower(self) -> None:
        random = np.random.default_rng(3)
        base = random.normal(0, 1, 60)
        mine = base + 0.2 + random.normal(0, 0.05, 60)
        found = score(lambda p: float(mine[p].mean()), lambda p: float(base[p].mean()), 60, 500)
        assert found.change == pytest.approx(0.2, abs=0.05)
        assert found.change_ci[0] < 0.2 < found.change_ci[1]
        assert found.change_ci[1] - found.change_ci[0] < (found.ci[1] - found.ci[0]) / 5


class TestTasks:
    def test_the_embedded_tasks_alternate_and_have_answers(self) -> None:
        tasks = load_prompts("tasks", 4)
        assert [t.category for t in tasks] == ["math", "translation"] * 2
        assert all(t.reference for t in load_prompts("tasks"))
        assert not {t.text for t in load_prompts("tasks")} & {t.text for t in load_prompts("embedded")}

    def test_a_file_may_bring_references(self, tmp_path: Path) -> None:
        file = tmp_path / "a.jsonl"
        file.write_text('{"prompt": "a", "reference": "b"}\n{"prompt": "c"}\n')
        assert [p.reference for p in load_prompts(str(file))] == ["b", None]
        file.write_text('{"prompt": "a", "reference": 4}\n')
        result = run("pareto", "tiny", "--prompts", str(file))
        assert result.exit_code == 2
        assert f"{file}:1" in result.stderr
        assert "reference" in result.stderr


class TestCommand:
    def test_the_knobs_limits_are_the_target_and_files_tell_all(self, tmp_path: Path) -> None:
        result = run(
            *("pareto", "tiny", "--limit", "4", "--max-new-tokens", "16", "--out", str(tmp_path / "out")),
            *("--curve", "rollback.threshold=0,20", "--set", "bild.fallback=0", "--json"),
        )
        assert result.exit_code == 0, result.stderr
        found = {(p["curve"], p["value"]): p for p in json.loads(result.stdout)["points"]}
        assert set(found) == {
            ("hf-generate", None), ("bild + standard", None), ("rollback.threshold", 0), ("rollback.threshold", 20)
        }  # fmt: skip
        exact, loose = found["rollback.threshold", 0], found["rollback.threshold", 20]
        assert exact["scores"]["same text"]["value"] == 1
        assert exact["scores"]["log p"]["change"] == 0
        assert not exact["row"]["lossless"]
        assert loose["scores"]["same text"]["value"] < 1
        assert loose["scores"]["log p"]["value"] < exact["scores"]["log p"]["value"]
        assert loose["row"]["mat"] > exact["row"]["mat"]
        report = json.loads((tmp_path / "out" / "pareto.json").read_text())
        assert report["points"] == json.loads(result.stdout)["points"]
        assert report["settings"]["curves"]["rollback.threshold"]["settings"] == ["bild.fallback=0"]
        assert (tmp_path / "out" / "pareto.png").read_bytes().startswith(b"\x89PNG")
        assert "rollback.threshold" in (tmp_path / "out" / "pareto.md").read_text()
        assert len((tmp_path / "out" / "records.jsonl").read_text().splitlines()) == 16

    @pytest.mark.parametrize(
        ("arguments", "named"),
        [
            (["--curve", "rollback"], "METHOD.OPTION"),
            (["--curve", "rollback.threshold=1,,2"], "METHOD.OPTION"),
            (["--curve", "rolback.threshold=1"], "did you mean rollback"),
            (["--curve", "rollback.threshhold=1"], "threshold"),
            (["--curve", "rollback.threshold=-1"], "threshold=-1"),
            (["--curve", "rollback.threshold=1,1"], "twice"),
            (["--curve", "rollback.threshold=1", "--curve", "rollback.threshold=2"], "twice"),
            (["--curve", "rollback.threshold=1", "--set", "typical.epsilon=0.1"], "no curve uses"),
            (["--prompts", "nowhere.jsonl"], "nowhere.jsonl"),
        ],
    )
    def test_mistakes_are_told_before_anything_is_loaded(self, arguments: list[str], named: str) -> None:
        result = run("pareto", "tiny", *arguments)
        assert result.exit_code == 2
        assert named in re.sub(r"\s+", " ", result.stderr)

    def test_a_model_without_a_draft_must_be_told_what_to_vary(self, tmp_path: Path) -> None:
        assert "--curve" in run("pareto", str(tmp_path)).stderr
        result = run("pareto", str(tmp_path), "--curve", "rollback.threshold=1")
        assert result.exit_code == 2
        assert "--draft-model" in result.stderr

    def test_pictures_are_scored_by_classifier_and_distance(self) -> None:
        result = run(
            *(
                "pareto",
                "tiny-image",
                "--temperature",
                "1",
                "--limit",
                "20",
                "--curve",
                "lantern.factor=1,20",
                "--json",
            ),
            *("--set", "draft-model.branching=3,2"),
        )
        assert result.exit_code == 0, result.stderr
        found = {(p["curve"], p["value"]): p for p in json.loads(result.stdout)["points"]}
        exact, loose = found["lantern.factor", 1], found["lantern.factor", 20]
        assert set(exact["scores"]) == {"accuracy", "Fréchet"}
        assert exact["row"]["mat"] == found["draft-model + standard", None]["row"]["mat"]  # the limit is standard
        assert exact["scores"] == found["draft-model + standard", None]["scores"]
        assert loose["row"]["mat"] > exact["row"]["mat"]
        low, high = exact["scores"]["Fréchet"]["ci"]
        assert low < exact["scores"]["Fréchet"]["value"] < high
        assert "--temperature" in run("pareto", "tiny-image", "--curve", "lantern.factor=1").stderr


class TestDrawing:
    def test_a_digit_is_drawn_into_a_file(self, tmp_path: Path) -> None:
        out = tmp_path / "digit.png"
        drawn = ("generate", "tiny-image", "--class", "7", "--out", str(out), "--drafter", "draft-model", "--json")
        result = run(*drawn, "--verifier", "lantern", "--seed", "3")
        assert result.exit_code == 0, result.stderr
        assert json.loads(result.stdout)["stats"]["new_tokens"] == 49
        assert out.read_bytes().startswith(b"\x89PNG")

    @pytest.mark.parametrize(
        "arguments",
        [
            ("tiny-image", "--prompt", "a seven"),
            ("tiny-image", "--class", "7"),
            ("tiny", "--prompt", "a", "--class", "7", "--out", "x.png"),
        ],
    )
    def test_pictures_and_texts_are_not_mixed(self, arguments: tuple[str, ...]) -> None:
        result = run("generate", *arguments)
        assert result.exit_code == 2
        assert "tiny-image" in result.stderr

    def test_a_class_that_is_no_digit_is_refused(self, tmp_path: Path) -> None:
        result = run("generate", "tiny-image", "--class", "11", "--out", str(tmp_path / "a.png"))
        assert result.exit_code == 2
        assert "11" in result.stderr
        assert not list(tmp_path.iterdir())


def test_every_drafter_with_a_small_model_runs_in_a_bench(tmp_path: Path) -> None:
    names = "rsd,bild,s2d,online,ead"
    result = run("bench", "tiny", "--drafters", names, "--baselines", "hf-generate", "--limit", "1", "--max-new-tokens",
                 "8", "--set", "ead.tau=100", "--json")  # fmt: skip
    assert result.exit_code == 0, result.stderr
    rows = {row["name"]: row for row in json.loads(result.stdout)["rows"]}
    assert [name for name in names.split(",") if not rows[name]["lossless"]] == ["ead"]
    assert all(rows[name]["equal"] for name in names.split(",") if name != "ead")


def test_the_readmes_figures_of_lossy_methods_are_those_of_the_results() -> None:
    root = Path(__file__).resolve().parents[1]
    readme = (root / "README.md").read_text(encoding="utf-8")
    report = json.loads((root / "bench" / "results" / "pareto-0" / "pareto.json").read_text(encoding="utf-8"))
    points = {(p["curve"], p["value"]): p for p in report["points"]}
    for knob in (("ead.tau", 6), ("judge.threshold", 0.742)):
        row, lost = points[knob]["row"], -points[knob]["scores"]["log p"]["change"]
        assert "{:.2f} [{:.2f}, {:.2f}]".format(row["speedup"], *row["speedup_ci"]) in readme
        assert f"{lost:.2f} nats" in readme
    for exact in (("rollback.threshold", 0), ("ead.tau", 0), ("judge.threshold", 1)):
        assert points[exact]["scores"]["same text"]["value"] == 1
