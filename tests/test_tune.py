"""`specdec tune`: predictions are the arithmetic they claim, and what is kept can be used."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from specdec import Decoder, zoo
from specdec.bench.tune import (
    PRIOR,
    Candidate,
    Curve,
    RankCounts,
    Yield,
    fastest_size,
    grid,
    own_trees,
    predictions,
    shortlist,
)
from specdec.cli import app
from specdec.profile import Profile
from specdec.stats import GenerationStats, StepStats
from specdec.templates import best_first, chances
from specdec.tree import DraftTree, Topology

NONE, SUFFIX, SUFFIX_16, HEADS = (
    Candidate("none"),
    Candidate("suffix", (("size", 8),)),
    Candidate("suffix", (("size", 16),)),
    Candidate("medusa"),
)
CURVE = Curve((1, 2, 4), (0.010, 0.011, 0.014))


def stats(*steps: tuple[int, int, float, float]) -> GenerationStats:
    """Steps of (columns, tokens emitted, seconds of the forward, seconds outside)."""
    made = GenerationStats("x", "standard", True, 1)
    for columns, tokens, forward, other in steps:
        step = StepStats(columns=columns, emitted=[tokens] if tokens else [])
        step.seconds["forward"], step.seconds["propose"] = forward, other
        made.steps.append(step)
    return made


class TestPrediction:
    def test_the_curve_is_linear_between_and_beyond_its_points_and_no_forward_is_free(self) -> None:
        assert CURVE(np.array([1, 3, 4, 6, 0])) == pytest.approx([0.010, 0.0125, 0.014, 0.017, 0.0])

    def test_a_step_costs_what_the_curve_says_plus_what_was_spent_outside_it(self) -> None:
        done = Yield()
        # a prompt chunk and the step of the first token read the prompt; the rest are what a method is about
        done.add(stats((512, 0, 9.0, 0.0), (40, 1, 2.0, 0.0), (4, 3, 99.0, 0.001), (2, 1, 99.0, 0.002)))
        assert done.prompts == pytest.approx(11.0)
        assert (done.first, done.columns, done.tokens, done.mat) == (1, [4, 2], [3, 1], 2.0)
        assert done.seconds_per_token(CURVE, prompts=0.5) == pytest.approx((0.5 + 0.003 + 0.014 + 0.011) / 5)

    def test_speed_ups_are_over_plain_uncompiled_steps_and_share_its_prompt_time(self) -> None:
        plain, draft = Yield(), Yield()
        plain.add(stats((9, 1, 0.02, 0.0), *[(1, 1, 0.0, 0.0)] * 10))
        draft.add(stats((9, 1, 5.00, 0.0), *[(4, 2, 0.0, 0.001)] * 5))  # a slow prompt is the machine's fault
        fast = Curve((1, 2, 4), (0.005, 0.006, 0.007))
        found = predictions({NONE: plain, SUFFIX: draft}, {"off": CURVE, "inductor": fast}, NONE)
        assert found[NONE, "off"] == 1
        assert found[NONE, "inductor"] == pytest.approx((0.02 + 0.10) / (0.02 + 0.05))
        assert found[SUFFIX, "off"] == pytest.approx((0.02 + 0.10) / (0.02 + 5 * 0.015))
        assert found[SUFFIX, "inductor"] == pytest.approx((0.02 + 0.10) / (0.02 + 5 * 0.008))

    def test_each_drafter_sends_its_best_setting_and_mode(self) -> None:
        predicted = {
            (NONE, "off"): 1.0, (SUFFIX, "off"): 1.3, (SUFFIX_16, "off"): 1.4, (SUFFIX_16, "inductor"): 2.0,
            (HEADS, "off"): 1.1, (HEADS, "inductor"): 0.9,
        }  # fmt: skip
        assert shortlist(predicted, NONE, 3) == [(SUFFIX_16, "inductor"), (HEADS, "off")]
        assert shortlist(predicted, NONE, 1) == [(SUFFIX_16, "inductor")]

    def test_only_options_that_a_drafter_has_are_tried(self) -> None:
        assert grid("none", {}, False) == [NONE]
        assert {c.options for c in grid("draft-model", {"length": 4}, False)} == {(("length", n),) for n in (2, 4, 6)}
        sizes = grid("suffix", {"size": None, "min_prob": None}, True)
        assert {dict(c.options)["size"] for c in sizes} == {16, 32, 64}
        assert {dict(c.options).get("min_prob") for c in sizes} == {None, 0.3}


class TestTrees:
    def test_ranks_are_counted_where_they_were_tried(self) -> None:
        tree = DraftTree(
            Topology([-1, 0, 0, 1, 1, 2]), np.arange(6), prior=np.array([1, 0.5, 0.25, 0.5, 0.0, 0.5], dtype=np.float32)
        )
        counts = RankCounts()
        counts.add(tree, [1])  # 1 accepted; of its children 3 and 4, none
        counts.add(tree, [2, 5])
        counts.add(tree, [])
        first = [(PRIOR * p + 1) / (PRIOR + 3) for p in (0.5, 0.25)]
        second = [(PRIOR * 0.5 + 1) / (PRIOR + 2), 0.0]
        assert np.allclose(counts.acceptance(), [first, second], atol=1e-4)

    @pytest.mark.parametrize("price", [0.0, 0.02, 0.1, 1.0])
    def test_the_size_is_the_fastest_of_all(self, price: float) -> None:
        acceptance = ((0.6, 0.2, 0.1), (0.5, 0.2), (0.3,))
        curve = Curve((1, 64), (1.0, 1.0 + 63 * price))

        def speed(size: int) -> float:
            template = best_first(acceptance, size)
            return chances(acceptance, template).sum() / (1.0 + price * (len(template[0]) - 1) + 0.1)

        size = fastest_size(acceptance, curve, other=0.1)
        assert speed(size) == pytest.approx(max(speed(n) for n in range(1, 30)))
        assert {0.0: size > 9, 1.0: size == 1}.get(price, True)

    def test_a_drafter_is_watched_while_it_decodes_and_its_tree_fits_its_prompts(self) -> None:
        model, tokenizer = zoo.load("tiny", dtype=torch.float32)
        ids = tokenizer("one two three one two three one two three one", return_tensors="pt").input_ids
        decoder = Decoder(model, "token-recycling", size=32)
        steep = {"off": Curve((1, 64), (1.0, 64.0))}
        flat = {"off": Curve((1, 64), (1.0, 1.0))}
        done = Yield(columns=[4], tokens=[2], other=0.001)

        def run(it: Decoder) -> None:
            it.generate(ids, max_new_tokens=40, do_sample=False)

        assert own_trees(decoder, {Candidate("token-recycling"): done}, steep, run) == []  # no tree is worth it
        (tree,) = own_trees(decoder, {Candidate("token-recycling"): done}, flat, run)
        options = json.loads(json.dumps(dict(tree.options)))  # as a profile gives them back
        assert options["size"] > 16
        assert tree.label == f"token-recycling tree of its own size={options['size']}"
        fitted = Decoder(model, "token-recycling", **options)
        assert fitted.drafter.budget == options["size"]
        assert fitted.generate(ids, max_new_tokens=9).tolist() == model.generate(ids, max_new_tokens=9).tolist()


def run(*arguments: str):
    return CliRunner().invoke(app, ["tune", "tiny", *arguments])


class TestCommand:
    def test_what_it_keeps_decodes(self, tmp_path: Path) -> None:
        out = tmp_path / "new" / "profile.json"
        arguments = ("--limit", "4", "--max-new-tokens", "8", "--drafters", "suffix,draft-model", "--out", str(out))
        result = run(*arguments, "--set", "draft-model.length=2", "--json")
        assert result.exit_code == 0, result.stderr
        said = json.loads(result.stdout)
        rows = {row["setting"]: row for row in said["finalists"]}
        assert {name.split()[0] for name in rows} == {"hf-generate", "none", "suffix", "draft-model"}
        assert "draft-model" in rows  # an option that was set is not tuned
        chosen = max((r for r in said["finalists"] if r["predicted"] is not None), key=lambda r: r["measured"])
        assert chosen["setting"].split()[0] == said["drafter"]
        assert len(said["all predicted over none"]) == 1 + 8 + 1
        profile = Profile.read(out)
        assert (profile.drafter, profile.options) == (said["drafter"], said["options"])
        model, tokenizer = zoo.load("tiny", dtype=torch.float32)
        decoder = Decoder(model.eval(), "auto", profile=out)
        ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
        want = model.generate(ids, max_new_tokens=8, do_sample=False)
        assert decoder.generate(ids, max_new_tokens=8, do_sample=False).tolist() == want.tolist()

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["--drafters", "sufix"], "did you mean suffix"),
            (["--drafters", "ead"], "lossy"),
            (["--prompts", "nowhere.txt"], "nowhere.txt"),
            (["--drafters", "suffix", "--set", "medusa.size=4"], "was not chosen"),
            (["--out", "/proc/none/p.json"], "/proc/none"),
        ],
    )
    def test_mistakes_are_told_before_anything_is_loaded(self, arguments: list[str], said: str) -> None:
        result = run(*arguments)
        assert result.exit_code == 2
        assert said in re.sub(r"\s+", " ", result.stderr)

    def test_too_few_prompts_are_refused(self, tmp_path: Path) -> None:
        (tmp_path / "p.txt").write_text("one\ntwo\nthree\n")
        assert "at least 4" in run("--prompts", str(tmp_path / "p.txt")).stderr
