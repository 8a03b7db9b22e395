"""The bench does not find what is not there, and finds what is: A against A, run against run, a planted slow-down."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from test_spec_bench import answer
from tiny_models import tiny_llama

from specdec.bench import harness as harnesses
from specdec.bench.arms import Settings
from specdec.bench.baselines import HFArm
from specdec.bench.harness import Harness, grouped
from specdec.bench.spec_bench.answers import Detail
from specdec.bench.spec_bench.metrics import Method, rows
from specdec.bench.statistics import Record, Row, speedup_interval, summarise

PROMPTS = 30
GROUPS = grouped([f"p{i}" for i in range(PROMPTS)], [[3 + i] for i in range(PROMPTS)], 1)


class Clock:
    """A clock that only moves when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Timed:
    """Takes as long as the prompt is hard, times its own slowness, give or take a fifth."""

    lossless, state, stats = True, None, None

    def __init__(self, name: str, clock: Clock, seed: int, slowness: float = 1.0):
        self.name, self.clock, self.slowness = name, clock, slowness
        self._dice = np.random.default_rng([seed, len(name)])

    def reset(self) -> None:
        pass

    def forget(self) -> None:
        pass

    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, settings: Settings) -> torch.Tensor:
        hard = 1 + int(input_ids[0, 0]) % 7
        self.clock.now += hard * self.slowness * self._dice.uniform(0.8, 1.2)
        return torch.cat([input_ids, torch.full((1, 4 * hard), 7)], dim=1)


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture
def clock(monkeypatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(harnesses, "perf_counter", made)
    return made


def compared(harness: Harness, arms: Sequence, repeats: int = 1) -> Row:
    """The row of the second arm against the first."""
    run = harness.run(arms, GROUPS, [Settings(8, 0.0)], repeats)
    assert run.failure is None
    names = [arm.name for arm in arms]
    return summarise(run.records, dict.fromkeys(names, True), dict.fromkeys(names), repeats, names[0])[1]


def fake(model, clock: Clock, seed: int, slowness: float = 1.0) -> tuple[float, float]:
    arms = [Timed("hf-generate", clock, seed), Timed("again", clock, seed, slowness)]
    found = compared(Harness(model, seed), arms).speedup_ci
    assert found is not None
    return found


def test_a_method_against_itself_gives_one_about_95_times_in_100(model, clock) -> None:
    intervals = [fake(model, clock, seed) for seed in range(25)]
    assert sum(low <= 1 <= high for low, high in intervals) >= 22
    assert max(high - low for low, high in intervals) < 0.2  # not by knowing nothing


def test_two_runs_of_one_comparison_overlap(model, clock) -> None:
    (low, high), (other_low, other_high) = (fake(model, clock, seed, slowness=1.1) for seed in (1, 2))
    assert max(low, other_low) <= min(high, other_high)


def test_a_planted_slow_down_is_found(model, clock) -> None:
    for seed in range(8):
        low, high = fake(model, clock, seed, slowness=1.3)
        assert high < 1
        assert low < 1 / 1.3 * 1.1


class Delayed(HFArm):
    """hf-generate that sleeps after its work, so that it is 1.3 times slower."""

    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, settings: Settings) -> torch.Tensor:
        start = time.perf_counter()
        output = super().generate(input_ids, attention_mask, settings)
        time.sleep(0.3 * (time.perf_counter() - start))
        return output


@pytest.mark.slow
@pytest.mark.parametrize("kind", [HFArm, Delayed])
def test_real_clocks_agree(model, kind: type[HFArm]) -> None:
    arms = [HFArm("hf-generate", model), kind("again", model)]
    intervals = []
    for seed in range(3):
        harness = Harness(model, seed)
        for made in arms:
            harness.warm_up(made, GROUPS[0], Settings(8, 0.0))
        found = compared(harness, arms, repeats=3).speedup_ci
        assert found is not None
        intervals.append(found)
    if kind is HFArm:  # 95 % intervals: one in twenty may miss it
        assert sum(low <= 1 <= high for low, high in intervals) >= 2
    else:
        assert all(high < 1 for _, high in intervals)


# ---- what is resampled --------------------------------------------------------------------------------------------


def test_prompts_of_a_batch_are_resampled_together() -> None:
    dice = np.random.default_rng(0)
    seconds = {name: dice.uniform(1, 2, 12) for name in ("hf-generate", "x")}
    records = [
        Record(name, 0.0, g, ("a", "b"), 0, float(t), 4, None, [[1, 2], [3, 4]])
        for name, times in seconds.items()
        for g, t in enumerate(times)
    ]
    names = list(seconds)
    row = summarise(records, dict.fromkeys(names, True), dict.fromkeys(names), 1, "hf-generate")[1]
    tokens = np.full(12, 4.0)
    assert row.speedup_ci == speedup_interval(tokens, seconds["x"], tokens, seconds["hf-generate"])


def test_turns_and_runs_of_a_question_are_resampled_together() -> None:
    """Saying the same again, in more turns or runs, is no more evidence."""
    dice = np.random.default_rng(0)
    seconds = {name: dice.uniform(1, 2, 12) for name in ("base", "x")}

    def method(name: str, turns: int, runs: int) -> Method:
        answers = {q: answer(q, "qa", [4] * turns, [float(t)] * turns, []) for q, t in enumerate(seconds[name])}
        details = {
            q: Detail(q, "", 0, True, None, [[1, 2, 3, 4]] * turns, [1] * turns, [9] * turns, [0] * turns,
                      [None] * turns, "", False)
            for q in answers
        }  # fmt: skip
        return Method(name, [answers] * runs, [details] * runs)

    found = []
    for turns, runs in ((1, 1), (3, 1), (1, 4)):
        base, mine = (method(name, turns, runs) for name in ("base", "x"))
        ours = rows([base, mine], base, lambda a: 1, greedy=True)[-1].ours
        assert ours is not None
        found.append(ours.speedup_ci)
    assert found[1] == pytest.approx(found[0])
    assert found[2] == pytest.approx(found[0])
