"""`auto`: drafts while it pays, rests while it does not, and never changes the text."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from conftest import OracleDrafter, left_padded, new_tokens
from tiny_models import tiny_llama

from specdec import Decoder
from specdec.drafters import auto
from specdec.drafters.auto import Auto, Guard
from specdec.errors import UsageError
from specdec.profile import Profile, fingerprint, kept
from specdec.target import Target


def stream(guard: Guard, steps: int, draft: Callable[[], tuple[float, float]]) -> tuple[float, float, int]:
    """A request of about ``steps`` tokens: seconds, tokens and drafting steps. A plain step takes one second."""
    spent = made = 0.0
    drafted = 0
    guard.fresh_text()
    while made < steps:
        on = guard.on
        seconds, tokens = draft() if on else (random.gauss(1, 0.05), 1.0)
        guard.record(on, seconds, tokens)
        spent, made, drafted = spent + seconds, made + tokens, drafted + on
    return spent, made, drafted


def draft_of(cost: float, mat: float) -> Callable[[], tuple[float, float]]:
    """A drafting step: its time scatters by a tenth, its yield is 1 + a geometric number."""
    p = 1 - 1 / mat

    def step() -> tuple[float, float]:
        tokens = 1
        while random.random() < p:
            tokens += 1
        return random.gauss(cost, 0.1 * cost), tokens

    return step


class TestGuard:
    @pytest.mark.parametrize(("cost", "mat"), [(1.1, 1.02), (1.3, 1.1), (2.5, 1.3), (2.0, 1.9)])
    def test_a_losing_draft_costs_at_most_three_percent(self, cost: float, mat: float) -> None:
        guard = Guard()
        runs = [stream(guard, 128, draft_of(cost, mat)) for _ in range(30)]
        assert sum(r[0] for r in runs) / sum(r[1] for r in runs) < 1.03

    @pytest.mark.parametrize(("cost", "mat"), [(1.4, 2.5), (1.3, 1.9), (1.1, 1.4)])
    def test_a_winning_draft_keeps_nine_tenths_of_its_gain(self, cost: float, mat: float) -> None:
        guard = Guard()
        runs = [stream(guard, 128, draft_of(cost, mat)) for _ in range(60)]
        gain = sum(r[1] for r in runs) / sum(r[0] for r in runs) - 1
        assert gain > 0.9 * (mat / cost - 1)

    def test_it_follows_texts_that_change(self) -> None:
        guard, good, bad = Guard(), draft_of(1.3, 2.6), draft_of(1.3, 1.05)
        shares = []
        for draft in (good, bad) * 15:
            spent, made, _ = stream(guard, 128, draft)
            shares.append(made / spent)
        assert sum(shares[0::2]) / 15 > 1.6
        assert sum(shares[1::2]) / 15 > 0.96

    def test_it_first_learns_what_a_plain_step_costs_and_looks_again_now_and_then(self) -> None:
        guard = Guard()
        seen = []
        guard.fresh_text()
        for _ in range(400):
            seen.append(guard.on)
            guard.record(guard.on, 1.0, 3.0 if guard.on else 1.0)
        assert seen[: auto.PLAIN] == [False] * auto.PLAIN
        assert seen[auto.PLAIN :].count(False) == 400 // auto.REFRESH

    def test_a_machine_that_slows_down_is_no_loss(self) -> None:
        guard = Guard()
        on = []
        for i in range(3000):
            pace = 1 + i / 1000
            on.append(guard.on)
            guard.record(guard.on, 1.4 * pace if guard.on else pace, 2.0 if guard.on else 1.0)
        assert sum(on) > 2500


def drafts_are_slow(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step with a draft takes nine times as long as one without."""
    now = [0.0]

    def clock() -> float:
        steps = decoder.stats.steps
        now[0] += 9.0 if len(steps) > 1 and steps[-2].columns > 1 else 1.0
        return now[0]

    monkeypatch.setattr(auto, "perf_counter", clock)


class TestDecoding:
    @pytest.mark.parametrize("rows", [1, 3])
    def test_greedy_text_is_the_targets_whatever_the_clock_says(self, rows: int, monkeypatch) -> None:
        model = tiny_llama()
        inputs = left_padded([torch.tensor(t) for t in ([5, 6, 7, 8], [9, 10], [11, 12, 13])[:rows]])
        want = new_tokens(model, inputs, max_new_tokens=40, do_sample=False)
        dice = random.Random(3)
        clock = iter(lambda: dice.random(), None)  # absurd times: on and off at random
        monkeypatch.setattr(auto, "perf_counter", lambda: next(clock))
        oracle = OracleDrafter(want, wrong=0.3, decoys=1)
        decoder = Decoder(model, Auto(oracle))
        assert new_tokens(decoder, inputs, max_new_tokens=40, do_sample=False) == want
        assert decoder.lossless

    def test_drafting_stops_when_steps_with_a_draft_are_slow_and_goes_on_when_they_are_not(self, monkeypatch) -> None:
        model = tiny_llama()
        inputs = left_padded([torch.tensor([5, 6, 7, 8])])
        want = new_tokens(model, inputs, max_new_tokens=120, do_sample=False)
        guarded = Auto(OracleDrafter(want, depth=2))
        decoder = Decoder(model, guarded)
        now, price = [0.0], [9.0]

        def clock() -> float:
            # what the step just made cost: as much as it had columns, times a price beyond the first
            steps = decoder.stats.steps
            columns = steps[-2].columns if len(steps) > 1 else 1
            now[0] += 1.0 + price[0] * (columns - 1)
            return now[0]

        monkeypatch.setattr(auto, "perf_counter", clock)
        for price[0], least, most in ((9.0, 100, 120), (0.1, 40, 60)):
            decoder.generate(**inputs, max_new_tokens=120, do_sample=False, min_new_tokens=120)
            assert least <= decoder.stats.row_forwards <= most

    @pytest.mark.parametrize("tolerant", [True, False])
    def test_only_a_drafter_that_can_miss_steps_misses_those_of_a_long_rest(self, tolerant: bool, monkeypatch) -> None:
        model = tiny_llama()
        inputs = left_padded([torch.tensor([5, 6, 7, 8])])
        want = new_tokens(model, inputs, max_new_tokens=100, do_sample=False)
        seen: list[int] = []

        class Witness(OracleDrafter):
            tolerates_gaps = tolerant

            def observe(self, state, proposals, output, verdicts) -> None:
                seen.extend(n for v in verdicts for n in v.emitted)

        guarded = Auto(Witness(want, wrong=1.0))  # drafts lose for ever
        decoder = Decoder(model, guarded)
        drafts_are_slow(decoder, monkeypatch)
        monkeypatch.setattr(auto, "REST", 6)
        assert new_tokens(decoder, inputs, max_new_tokens=100, do_sample=False) == want
        assert len(seen) == 100 if not tolerant else 15 < len(seen) < 70

    def test_a_drafter_that_keeps_failing_sleeps_through_requests_and_wakes_again(self, monkeypatch) -> None:
        model = tiny_llama()
        inputs = left_padded([torch.tensor([5, 6, 7, 8])])
        want = new_tokens(model, inputs, max_new_tokens=40, do_sample=False)
        begun: list[bool] = []

        class Witness(OracleDrafter):
            tolerates_gaps = True

            def begin(self, state) -> None:
                begun[-1] = True
                super().begin(state)

        guarded = Auto(Witness(want, wrong=1.0))  # drafts lose for ever
        decoder = Decoder(model, guarded)
        drafts_are_slow(decoder, monkeypatch)
        for _ in range(60):
            begun.append(False)
            assert new_tokens(decoder, inputs, max_new_tokens=40, do_sample=False) == want
        assert all(begun[:2])
        assert 1 <= sum(begun[10:]) < 10

    def test_any_drafter_can_be_guarded_by_name(self) -> None:
        model = tiny_llama()
        inputs = left_padded([torch.tensor([5, 6, 7, 5, 6, 7, 5, 6])])
        want = new_tokens(model, inputs, max_new_tokens=20, do_sample=False)
        decoder = Decoder(model, "auto", method="prompt-lookup", copy=4)
        assert new_tokens(decoder, inputs, max_new_tokens=20, do_sample=False) == want
        assert decoder.drafter.drafter.name == "prompt-lookup"
        assert new_tokens(Decoder(model, "auto"), inputs, max_new_tokens=20, do_sample=False) == want

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"method": "auto"}, "guard itself"),
            ({"method": "suffix", "profile": "x.json"}, "give one of them"),
            ({"size": 4}, "drafter's name"),
            ({"profile": "nowhere.json"}, "specdec tune"),
            ({"method": "sufix"}, "did you mean suffix"),
        ],
    )
    def test_mistakes_are_named(self, options: dict, said: str) -> None:
        with pytest.raises(UsageError, match=said):
            Auto(**options)


class TestProfile:
    def test_it_is_found_again_for_the_same_model_only(self, tmp_path, monkeypatch) -> None:
        monkeypatch.setenv("SPECDEC_HOME", str(tmp_path))
        target = Target(tiny_llama())
        assert Profile.find(target) is None
        profile = Profile("prompt-lookup", {"copy": 5}, "off", fingerprint(target))
        profile.write(kept(profile.made_for))
        assert Profile.find(target) == profile
        assert Profile.find(Target(tiny_llama(hidden_size=64))) is None
        assert Profile.find(Target(tiny_llama().to(torch.bfloat16))) is None
        decoder = Decoder(target.model, "auto")
        assert decoder.drafter.drafter.name == "prompt-lookup"
        file = kept(profile.made_for)
        file.write_text("{}")
        with pytest.raises(UsageError, match="specdec tune"):
            Decoder(target.model, "auto")
