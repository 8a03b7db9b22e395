"""Spec-Bench: its formulas, its answer files, runs that are killed, shared among processes, or ask a server."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import typer
from conftest import word_tokenizer
from tiny_models import tiny_llama
from typer.testing import CliRunner

from specdec.bench.arms import DecoderArm, Settings
from specdec.bench.baselines import baseline
from specdec.bench.harness import ForwardMeter, generated
from specdec.bench.spec_bench import protocol as running
from specdec.bench.spec_bench.answers import Answer, Detail, RunFolder, read_answers
from specdec.bench.spec_bench.metrics import (
    Method,
    Steps,
    accepted_by_position,
    comparable,
    divergences,
    protocol,
    retokenised,
    rows,
    steps,
)
from specdec.bench.spec_bench.protocol import Asker, Rules, accepted_lengths, measure, prompt_ids, without_middle
from specdec.bench.spec_bench.questions import MT_BENCH, SUBTASKS, Question, columns, read_questions, select, subtask
from specdec.bench.spec_bench.report import from_files, from_folder, markdown
from specdec.bench.spec_bench.ties import explain
from specdec.cli import Commands
from specdec.cli.common import load_tokenizer
from specdec.cli.spec_bench import spec_bench_app
from specdec.decoder import Decoder
from specdec.errors import UsageError
from specdec.stats import GenerationStats, StepStats

REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "spec_bench" / "question.jsonl"
ORIGINAL_KEYS = ["question_id", "category", "answer_id", "model_id", "choices", "tstamp"]
ORIGINAL_CHOICE = ["index", "turns", "decoding_steps", "new_tokens", "wall_time", "accept_lengths"]
GREEDY = Rules(template="none", max_new_tokens=6, temperature=0.0, truncate=False, seed=0)

app = typer.Typer(cls=Commands, pretty_exceptions_enable=False)
app.add_typer(spec_bench_app, name="spec-bench")
app.callback()(lambda: None)


def cli(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["spec-bench", *map(str, arguments)])


def written(file: Path, entries: Sequence[dict]) -> Path:
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return file


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def question(number: int, category: str = "qa", turns: Sequence[str] = ("ba be bi",)) -> dict:
    return {"question_id": number, "category": category, "turns": list(turns)}


ASKED = [
    question(11, "writing", ["ba be bi bo", "bu ca"]),
    question(12, "coding", ["fa fe fi", "fo fu ga"]),
    question(13, "qa", ["ge gi go"]),
    question(14, "rag", ["ka ke ki ko ku la le li"]),
    question(15, "riddles", ["ma me mi"]),
]


@pytest.fixture(scope="module")
def asked(tmp_path_factory) -> Path:
    return written(tmp_path_factory.mktemp("questions") / "q.jsonl", ASKED)


@pytest.fixture(scope="module")
def model():
    return tiny_llama(vocab_size=96, eos_token_id=2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, model) -> str:
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return str(folder)


class Scripted:
    """A method that says what it is told, and notes what it was asked."""

    lossless, state, stats = True, None, None

    def __init__(self, name: str, says: Sequence[int] = (5, 6, 7), log: list | None = None, fails: int = -1):
        self.name, self.says, self.fails = name, list(says), fails
        self.log: list = [] if log is None else log

    def reset(self) -> None:
        self.log.append((self.name, "reset"))

    def forget(self) -> None:
        self.log.append((self.name, "forget"))

    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, settings: Settings) -> torch.Tensor:
        self.log.append((self.name, input_ids[0].tolist(), settings.max_new_tokens))
        if sum(len(entry) == 3 for entry in self.log) == self.fails:
            raise ValueError("out of luck")
        return torch.cat([input_ids, torch.tensor([self.says[: settings.max_new_tokens]])], dim=1)


def asker(model, rules: Rules = GREEDY) -> Asker:
    return Asker(model, word_tokenizer(), "m", rules)


def settings_of(methods: Sequence[str], **changes: Any) -> dict[str, Any]:
    asked = {"question_ids": [q["question_id"] for q in ASKED], "left_out": [], "drafters": {}, "compile": "off"}
    how = {"model": "m", "temperature": 0.0, "template": "none", "max_new_tokens": 6, "runs": 1}
    return {**asked, **how, "methods": list(methods), **changes}


ENVIRONMENT = {
    **{"commit": "abc", "packages": {"torch": "2"}, "cpu": "c", "gpu": None, "torch_threads": 1, "processes": 1},
    **{"dtype": "float16", "date": "today", "command": "specdec"},
}


def run_all(folder: RunFolder, model, arms: Sequence[Any], entries: Sequence[dict], runs: int = 1, **settings) -> int:
    questions = [Question(e["question_id"], e["category"], tuple(e["turns"])) for e in entries]
    with folder.session(settings_of([a.name for a in arms], runs=runs, **settings), ENVIRONMENT, 0) as session:
        return measure(asker(model), arms, questions, runs, folder, session, (0, 1), lambda *_: None)


def forked(action) -> int:
    """Id of a process that does it and exits with its result; a new interpreter would first import torch for long."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = int(action())
        finally:
            os._exit(code)
    return child


# ---- questions ----------------------------------------------------------------------------------------------------


class TestQuestions:
    def test_the_eight_mt_bench_categories_are_one_column_and_strangers_come_last_by_name(self) -> None:
        assert {subtask(name) for name in MT_BENCH} == {"mt_bench"}
        assert len(MT_BENCH) == 8
        assert columns(["riddles", "rag", "math", "writing", "qa"]) == ["mt_bench", "qa", "rag", "riddles"]

    def test_a_file_is_read_in_its_order(self, asked) -> None:
        questions = read_questions(asked)
        assert [q.id for q in questions] == [11, 12, 13, 14, 15]
        assert questions[0] == Question(11, "writing", ("ba be bi bo", "bu ca"))

    def test_limits_count_per_subtask_and_categories_may_be_either(self, asked) -> None:
        questions = read_questions(asked)
        assert [q.id for q in select(questions, [], 1)] == [11, 13, 14, 15]
        assert [q.id for q in select(questions, ["mt_bench"], None)] == [11, 12]
        assert [q.id for q in select(questions, ["coding", "riddles"], None)] == [12, 15]
        with pytest.raises(UsageError, match="--categories 'poems': no question has it; choose from mt_bench"):
            select(questions, ["poems"], None)

    @pytest.mark.parametrize(
        ("line", "said"),
        [
            ('{"question_id": 2, "category": "qa"}', "turns missing"),
            ('{"question_id": "2", "category": "qa", "turns": ["a"]}', "is not an integer"),
            ('{"question_id": 2, "category": "qa", "turns": []}', "turns must be a list of texts"),
            ('{"question_id": 2, "category": "qa", "turns": [" "]}', "turns must be a list of texts"),
            ('{"question_id": 2, "category": "overall", "turns": ["a"]}', "must be a name"),
            ('{"question_id": 1, "category": "qa", "turns": ["a"]}', "question_id 1 was used before"),
            ('{"question_id": 2,', "not JSON"),
            ("[2]", "a JSON list, not an object"),
        ],
    )
    def test_a_malformed_line_is_named_by_its_number(self, tmp_path, line: str, said: str) -> None:
        file = tmp_path / "q.jsonl"
        file.write_text(json.dumps(question(1)) + f"\n\n{line}\n")
        with pytest.raises(UsageError, match=said) as error:
            read_questions(file)
        assert f"{file}:3" in str(error.value)

    @pytest.mark.shared_data
    @pytest.mark.skipif(not REAL.is_file(), reason="the shared data does not lie beside the checkout")
    def test_the_real_file_has_480_questions_in_six_subtasks(self) -> None:
        questions = read_questions(REAL)
        assert [q.id for q in questions] == list(range(81, 561))
        assert columns([q.category for q in questions]) == list(SUBTASKS)
        for name in SUBTASKS:
            assert sum(q.subtask == name for q in questions) == 80
        assert {len(q.turns) for q in questions if q.subtask == "mt_bench"} == {2}


# ---- one question -------------------------------------------------------------------------------------------------


class TestPrompts:
    def test_vicuna_is_fastchats_text(self) -> None:
        said = []

        def tokenizer(text: str, **_: Any) -> SimpleNamespace:
            said.append(text)
            return SimpleNamespace(input_ids=[1])

        prompt_ids(tokenizer, "vicuna", ["Hi.", "More."], ["Hello!"])
        prompt_ids(tokenizer, "none", ["Hi.", "More."], ["Hello!"])
        assert said[0].startswith("A chat between a curious user and an artificial intelligence assistant. The assist")
        assert said[0].endswith("the user's questions. USER: Hi. ASSISTANT: Hello!</s>USER: More. ASSISTANT:")
        assert said[1] == "Hi.\nHello!\nMore.\n"

    def test_auto_is_the_tokenizers_template_and_plain_text_without_one(self) -> None:
        tokenizer = word_tokenizer()
        assert running.template_of("auto", tokenizer) == "none"
        assert running.template_of("vicuna", tokenizer) == "vicuna"
        tokenizer.chat_template = (
            "{% for m in messages %}{{ 'ba' if m.role == 'user' else 'be' }} {{ m.content }} {% endfor %}"
            "{% if add_generation_prompt %}be{% endif %}"
        )
        assert running.template_of("auto", tokenizer) == "chat"
        text = tokenizer.decode(prompt_ids(tokenizer, "chat", ["fa", "fe"], ["fi"]))
        assert text.split() == ["ba", "fa", "be", "fi", "ba", "fe", "be"]

    def test_the_middle_goes_first(self) -> None:
        assert without_middle(list(range(10)), 5) == [0, 1, 7, 8, 9]
        assert without_middle([1, 2], 5) == [1, 2]

    def test_the_second_turn_quotes_the_stripped_text_tokenised_again(self, model) -> None:
        tokenizer = word_tokenizer()
        arm = Scripted("a", [*tokenizer("fa fe").input_ids, 2, 9, 9])  # after the end token comes padding
        meter = ForwardMeter(model)
        answer, detail = asker(model).ask(meter, arm, Question(1, "qa", ("ba", "be")), 1, 0)
        first, second = [entry for entry in arm.log if len(entry) == 3]
        assert answer.turns == ["fa fe", "fa fe"]
        assert detail.ids[0] == [*tokenizer("fa fe").input_ids, 2]  # the end token counts
        assert answer.new_tokens == [3, 3]
        assert first[1] == tokenizer("ba\n").input_ids
        assert second[1] == tokenizer("ba\nfa fe\nbe\n").input_ids
        assert arm.log[0] == ("a", "reset")
        assert sum(entry[1] == "reset" for entry in arm.log) == 1  # the second turn knows the first
        assert answer.accept_lengths == []  # nobody said what a step made
        meter.close()

    def test_an_answer_may_end_with_the_context_and_so_may_a_conversation(self, model) -> None:
        rules = Rules("none", 200, 0.0, False, 0)
        arm = Scripted("a", [5] * 200)
        ask = asker(model, rules)
        long = Question(1, "qa", ("ba " * 30, "be", "bi " * 20))
        assert ask.fits(long)
        meter = ForwardMeter(model)
        answer, detail = ask.ask(meter, arm, long, 1, 0)
        meter.close()
        assert detail.limits[0] == 200
        assert 0 < detail.limits[1] < 200
        assert answer.new_tokens == [200, detail.limits[1], 0]
        assert answer.turns[2] == ""
        assert len([entry for entry in arm.log if len(entry) == 3]) == 2
        assert not ask.fits(Question(2, "qa", ("ba " * 60,)))

    def test_truncation_keeps_room_for_the_answer(self, model) -> None:
        ask = asker(model, Rules("none", 200, 0.0, True, 0))
        arm = Scripted("a")
        meter = ForwardMeter(model)
        _, detail = ask.ask(meter, arm, Question(2, "qa", ("ba " * 60,)), 1, 0)
        meter.close()
        assert detail.prompt_tokens == [56]
        assert detail.cut[0] > 0
        assert detail.limits == [200]

    def test_more_new_tokens_than_the_context_are_refused(self, model) -> None:
        with pytest.raises(UsageError, match="--max-new-tokens 256: the model's context of 256"):
            asker(model, Rules("none", 256, 0.0, False, 0))

    def test_the_clock_waits_for_the_device_on_both_sides(self, monkeypatch) -> None:
        events: list[str] = []
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: events.append(f"wait {device}"))
        monkeypatch.setattr(running.time, "perf_counter", lambda: events.append("look") or float(len(events)))
        with running.stopwatch(torch.device("cuda:1")) as seconds:
            events.append("work")
        assert events == ["wait cuda:1", "look", "work", "wait cuda:1", "look"]
        assert seconds == [3.0]

    def test_steps_count_what_each_forward_committed(self) -> None:
        stats = GenerationStats("d", "v", True, 1)
        prefill = StepStats(columns=9)
        stats.steps = [prefill, StepStats(emitted=[3], trusted=2), StepStats(trusted=4), StepStats(emitted=[1])]
        assert accepted_lengths(stats) == [5, 5]
        stats.steps.append(StepStats(trusted=1))
        assert accepted_lengths(stats) == [5, 6]

    def test_steps_take_what_passed_since_the_one_before(self) -> None:
        def step(seconds: float, **more: Any) -> StepStats:
            made = StepStats(**more)
            made.seconds["forward"], made.seconds["verify"] = seconds, 0.5
            return made

        stats = GenerationStats("d", "v", True, 1, seconds=20.0)
        stats.steps = [step(9, columns=9), step(3, emitted=[3]), step(1, trusted=4), step(2, emitted=[1])]
        assert running.step_seconds(stats, wall=21.0) == [1 + 9.5 + 3.5, 1.5 + 2.5]

    def test_real_methods_account_for_every_token(self, model) -> None:
        asks, meter = asker(model), ForwardMeter(model)
        arms = [DecoderArm("suffix", Decoder(model, "suffix")), baseline("hf-generate", model)]
        arms.append(baseline("hf-prompt-lookup", model))
        ours, plain, lookup = (asks.ask(meter, a, Question(1, "qa", ("ba be ba be", "ba")), 1, 0) for a in arms)
        meter.close()
        assert ours[1].ids == plain[1].ids == lookup[1].ids
        assert sum(ours[0].accept_lengths) == sum(ours[0].new_tokens)
        assert len(ours[0].accept_lengths) == sum(ours[0].decoding_steps)
        assert plain[0].accept_lengths == [1] * sum(plain[0].new_tokens)
        assert lookup[0].accept_lengths == []
        assert sum(lookup[0].decoding_steps) > 0
        assert [len(times) for times in ours[1].step_seconds] == ours[0].decoding_steps
        for times, wall in zip(ours[1].step_seconds, ours[0].wall_time, strict=True):
            assert 0 < times[0] < sum(times) <= wall
        assert plain[1].step_seconds == [None, None]  # transformers does not tell


# ---- figures ------------------------------------------------------------------------------------------------------


def answer(number: int, category: str, new: list[int], wall: list[float], lengths: list[int], turns=None) -> Answer:
    texts = turns or ["ba be bi"] * len(new)
    return Answer(number, category, f"a{number}", "m", texts, new, new, wall, lengths, 0.0)


def synthetic(seed: int, speed: float) -> list[Answer]:
    """Uneven subtasks, answers of all lengths."""
    dice = random.Random(seed)
    words = word_tokenizer().get_vocab()
    made = []
    for number in range(60):
        category = dice.choice([*MT_BENCH, "qa", "qa", "rag", "translation"])
        turns = 2 if category in MT_BENCH else 1
        new = [dice.randrange(1, 90) for _ in range(turns)]
        wall = [n / speed / dice.uniform(0.2, 3) for n in new]
        texts = [" ".join(w.strip("▁") for w in dice.sample(sorted(words), min(n, 40))) for n in new]
        lengths = [dice.randrange(1, 6) for _ in range(sum(new) // 2 + 1)]
        made.append(answer(number, category, new, wall, lengths, turns=texts))
    return made


def original_speed(file: Path, base: Path, tokenizer, task: str) -> tuple[float, float, float, list[int]]:
    """Section 4 of the protocol: what its script says about two files."""

    def chosen(path: Path) -> list[dict]:
        return [
            r["choices"][0] for r in lines(path)
            if task == "overall" or r["category"] == task or (task == "mt_bench" and r["category"] in MT_BENCH)
        ]  # fmt: skip

    speeds, lengths = [], []
    for row in chosen(file):
        speeds.append(sum(row["new_tokens"]) / sum(row["wall_time"]))
        lengths.extend(row["accept_lengths"])
    base_speeds = []
    for row in chosen(base):
        tokens = 0
        for text in row["turns"]:
            tokens += len(tokenizer(text).input_ids) - 1
        base_speeds.append(tokens / sum(row["wall_time"]))
    fast, slow = np.array(speeds).mean(), np.array(base_speeds).mean()
    return fast, slow, fast / slow, lengths


def method(name: str, *runs: Sequence[Answer]) -> Method:
    return Method(name, [{a.question_id: a for a in run} for run in runs], [])


class TestFigures:
    @pytest.mark.parametrize("bos", [True, False])
    def test_they_are_the_original_scripts_to_the_last_bit(self, tmp_path, bos: bool) -> None:
        tokenizer = load_tokenizer("tiny") if bos else word_tokenizer()
        assert len(tokenizer("").input_ids) == bos
        files = []
        for seed, speed, name in ((1, 30.0, "base"), (1, 60.0, "fast")):
            file = tmp_path / f"{name}.jsonl"
            file.write_text("".join(a.line() for a in synthetic(seed, speed)), encoding="utf-8")
            files.append(file)
        report = from_files(files, files[0], tokenizer)
        assert any("no BOS" in note for note in report.notes) is not bos
        found = {row.subtask: row.protocol for row in report.rows if row.method == "fast"}
        assert list(found) == ["mt_bench", "translation", "qa", "rag", "overall"]
        for task, figures in found.items():
            fast, slow, ratio, lengths = original_speed(files[1], files[0], tokenizer, task)
            assert figures.tokens_per_second == fast
            assert figures.baseline_tokens_per_second == slow
            assert figures.speedup == ratio
            assert figures.mat == np.mean(lengths)
        parts = [found[task].speedup for task in list(found)[:-1]]
        assert abs(found["overall"].speedup - np.mean(parts)) > 1e-3  # uneven subtasks

    def test_three_runs_give_the_mean_and_the_sample_deviation_and_pool_all_steps(self) -> None:
        base = [[answer(1, "qa", [10], [1.0], [1] * 10), answer(2, "qa", [20], [1.0], [1])]] * 3
        timed = ((0.5, 1), (0.25, 4), (1.0, 7))
        runs = [[answer(1, "qa", [10], [t], [n] * 3), answer(2, "qa", [20], [t], [2])] for t, n in timed]
        figures = protocol(method("m", *runs), method("b", *base), [1, 2], lambda a: sum(a.new_tokens))
        speeds = [30.0, 60.0, 15.0]
        assert figures.tokens_per_second == np.mean(speeds)
        assert figures.tokens_per_second_std == np.std(speeds, ddof=1)
        assert figures.speedup_std == np.std([2.0, 4.0, 1.0], ddof=1)
        assert figures.mat == np.mean([1, 1, 1, 2, 4, 4, 4, 2, 7, 7, 7, 2])

    def test_the_last_of_several_lines_counts_and_errors_and_empty_answers_do_no_harm(self, tmp_path) -> None:
        good = [answer(n, "qa", [8], [1.0], [4, 4]) for n in (1, 2, 3, 4)]
        base, mine = tmp_path / "base.jsonl", tmp_path / "mine.jsonl"
        base.write_text("".join(a.line() for a in good))
        error, empty = answer(2, "qa", [8], [0.1], [8], turns=["ERROR"]), answer(3, "qa", [0], [0.5], [], turns=[""])
        never, stale = answer(4, "qa", [0], [0.0], []), answer(1, "qa", [999], [1.0], [9])
        mine.write_text("".join(a.line() for a in (never, stale, empty, error, good[0])))
        report = from_files([base, mine], base, None)
        (overall,) = (row for row in report.rows if row.method == "mine" and row.subtask == "overall")
        assert overall.questions == 2  # 1 and 3; the error and the timeless one count on neither side
        assert overall.protocol.speedup == (8 + 0) / (8 + 8)
        assert overall.protocol.mat == 4
        assert any("mine: 1 answers are errors" in note and "(2)" in note for note in report.notes)
        assert any("1 questions took no time" in note for note in report.notes)
        assert any("give --tokenizer" in note for note in report.notes)

    def test_a_baseline_of_empty_answers_has_no_speedup(self) -> None:
        base = method("b", [answer(1, "qa", [0], [1.0], [], turns=[""])])
        found = protocol(method("m", [answer(1, "qa", [4], [1.0], [4])]), base, [1], retokenised(word_tokenizer()))
        assert found.speedup is None
        assert found.tokens_per_second == 4

    def test_positions_are_shares_of_steps(self) -> None:
        assert accepted_by_position([1, 2, 4, 1]) == [0.5, 0.25, 0.25]
        assert accepted_by_position([1, 1]) == []
        assert accepted_by_position([]) == []

    def test_a_divergence_is_named_by_turn_and_token(self) -> None:
        def with_ids(name: str, *texts: list[list[int]], server: bool = False) -> Method:
            details = {
                n: Detail(n, "", 0, True, None, ids, [1] * len(ids), [9] * len(ids), [0] * len(ids), [0.0], "", server)
                for n, ids in enumerate(texts)
            }
            answers = {
                n: answer(n, "qa", [len(i) for i in ids], [1.0] * len(ids), [1], turns=[str(i) for i in ids])
                for n, ids in enumerate(texts)
            }
            return Method(name, [answers], [details])

        base = with_ids("b", [[1, 2], [3, 4]], [[5, 6, 7]], [[8]])
        mine = with_ids("m", [[1, 2], [3, 9]], [[5, 6]], [[8]])
        found = divergences([base, mine], base, [0, 1, 2])
        assert [(d.question, d.turn, d.index) for d in found] == [(0, 2, 1), (1, 1, 2)]
        last = {r.method: r.ours for r in rows([base, mine], base, lambda a: 1, True)}
        assert {name: ours.equal_share for name, ours in last.items()} == {"b": 1.0, "m": pytest.approx(1 / 3)}
        assert all(r.ours.equal_share is None for r in rows([base, mine], base, lambda a: 1, False))
        remote = with_ids("s", [[1, 2], [3, 9]], [[5, 6, 7]], [[8]], server=True)
        assert [(d.question, d.turn, d.index) for d in divergences([remote], base, [0, 1, 2])] == [(0, 2, None)]

    def test_totals_are_not_the_protocols_mean(self) -> None:
        ids = {1: [list(range(90))], 2: [list(range(10))]}
        details = {n: Detail(n, "", 0, True, None, i, [1], [99], [0], [0.0], "", False) for n, i in ids.items()}
        base = Method("b", [{1: answer(1, "qa", [90], [9.0], [1]), 2: answer(2, "qa", [10], [1.0], [1])}], [details])
        mine = Method("m", [{1: answer(1, "qa", [90], [9.0], [1]), 2: answer(2, "qa", [10], [0.1], [1])}], [details])
        row = rows([base, mine], base, lambda a: sum(a.new_tokens), True)[-1]
        assert row.protocol.speedup == pytest.approx((10 + 100) / 2 / 10)
        assert row.ours.speedup == pytest.approx((100 / 9.1) / 10)
        assert comparable([base, mine]) == [1, 2]


def told(seconds: list[list[float] | None], lengths: list[int]) -> Method:
    turns = len(seconds)
    each = {name: [1] * turns for name in ("prompt_tokens", "limits", "cut", "forward_seconds")}
    detail = Detail(
        1, "", 0, True, None, [[1]] * turns, **each, compilation="", retokenised=False, step_seconds=seconds
    )
    return Method("m", [{1: answer(1, "qa", [1] * turns, [9.0] * turns, lengths)}], [{1: detail}])


class TestSteps:
    def test_the_first_of_every_turn_is_apart_from_the_later_ones(self) -> None:
        found = steps(told([[5.0, 1.0, 2.0], [7.0, 3.0]], [9, 4, 5, 9, 3]), [1])
        assert found == Steps(first=6.0, median=2.0, high=pytest.approx(2.9), tokens_per_second=(4 + 5 + 3) / 6)
        assert steps(told([[5.0], []], [9]), [1]) == Steps(5.0, None, None, None)

    def test_methods_that_do_not_tell_have_none(self) -> None:
        assert steps(told([None], []), [1]) is None
        assert steps(told([], []), [1]) is None


# ---- answer files -------------------------------------------------------------------------------------------------


class TestFiles:
    def test_a_line_has_the_originals_keys_and_comes_back_the_same(self, tmp_path) -> None:
        made = synthetic(3, 10.0)
        file = tmp_path / "a.jsonl"
        file.write_text("".join(a.line() for a in made))
        first = lines(file)[0]
        assert list(first) == ORIGINAL_KEYS
        assert list(first["choices"][0]) == ORIGINAL_CHOICE
        assert list(read_answers(file).values()) == made

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (lambda row: row.pop("category"), "category is missing"),
            (lambda row: row.pop("choices"), "choices is missing"),
            (lambda row: row.update(choices=[]), "choices must be a list"),
            (lambda row: row["choices"][0].pop("wall_time"), "wall_time is missing"),
            (lambda row: row["choices"][0].update(accept_lengths=["x"]), "accept_lengths must be a list of numbers"),
            (lambda row: row["choices"][0].update(new_tokens=[1, 2, 3]), "each needs one per turn"),
        ],
    )
    def test_a_missing_or_wrong_field_is_named_with_its_line(self, tmp_path, change, said: str) -> None:
        entries = [json.loads(a.line()) for a in synthetic(3, 10.0)[:3]]
        change(entries[1])
        file = written(tmp_path / "a.jsonl", entries)
        with pytest.raises(UsageError, match=said) as error:
            read_answers(file)
        assert f"{file}:2" in str(error.value)

    def test_torn_lines_and_halves_of_answers_are_dropped_and_made_again(self, tmp_path, model) -> None:
        folder, arm = RunFolder(tmp_path), Scripted("a")
        assert run_all(folder, model, [arm], ASKED) == 5
        answers, details = tmp_path / "answers/a.jsonl", tmp_path / "details/a.jsonl"
        content = answers.read_bytes().splitlines(keepends=True)
        answers.write_bytes(b"".join(content[:3]) + content[3][:40])  # torn; the detail of the fifth has no answer
        details.write_bytes(b"".join(details.read_bytes().splitlines(keepends=True)[1:]))  # the first has no detail
        assert run_all(folder, model, [arm], ASKED) == 3
        assert folder.merge()
        assert [row["question_id"] for row in lines(answers)] == [11, 12, 13, 14, 15]
        assert [row["answer_id"] for row in lines(answers)] == [row["answer_id"] for row in lines(details)]
        assert run_all(folder, model, [arm], ASKED) == 0

    def test_other_settings_are_refused_and_the_difference_is_named(self, tmp_path, model) -> None:
        folder = RunFolder(tmp_path)
        run_all(folder, model, [Scripted("a")], ASKED[:1])
        with pytest.raises(UsageError, match="max_new_tokens was 6 and is 9"):
            run_all(folder, model, [Scripted("a")], ASKED[:1], max_new_tokens=9)
        with pytest.raises(UsageError, match=r"methods was \['a'\] and is \['b'\]"):
            run_all(folder, model, [Scripted("b")], ASKED[:1])
        assert len(folder.record()[1]) == 1

    def test_more_runs_may_follow(self, tmp_path, model) -> None:
        folder, log = RunFolder(tmp_path), []
        run_all(folder, model, [Scripted("a", log=log)], ASKED[:2])
        log.clear()
        assert run_all(folder, model, [Scripted("a", log=log)], ASKED[:2], runs=3) == 4
        assert (tmp_path / "answers/run-3/a.jsonl").is_file()
        assert [row["question_id"] for row in lines(tmp_path / "answers/run-2/a.jsonl")] == [11, 12]
        assert log.count(("a", "forget")) == running.WARM_UPS + 3  # the questions come again

    def test_a_folder_is_written_by_one_run_at_a_time(self, tmp_path, model) -> None:
        folder = RunFolder(tmp_path)
        with folder.session(settings_of(["a"]), ENVIRONMENT, 0):
            with pytest.raises(UsageError, match="another run is writing into it"):
                run_all(folder, model, [Scripted("a")], ASKED)
            assert not folder.merge()
        assert folder.merge()

    def test_a_killed_run_loses_nothing_and_doubles_nothing(self, tmp_path, model) -> None:
        # so many that it is killed often on a fast machine too
        many = [question(n, turns=["ba be", "bi"]) for n in range(600)]
        arms = [Scripted("a"), Scripted("b")]
        folder, dice, kills = RunFolder(tmp_path), random.Random(0), 0
        for _ in range(60):
            child = forked(lambda: run_all(folder, model, arms, many) < 0)
            deadline = time.monotonic() + dice.uniform(0.0, 0.15)
            while time.monotonic() < deadline and os.waitpid(child, os.WNOHANG)[0] == 0:
                time.sleep(0.001)
            try:
                os.kill(child, signal.SIGKILL)
                kills += os.WIFSIGNALED(os.waitpid(child, 0)[1])
            except (ProcessLookupError, ChildProcessError):
                break  # it was done
        run_all(folder, model, arms, many)
        assert folder.merge()
        assert kills > 3
        for name in "ab":
            found = lines(tmp_path / f"answers/{name}.jsonl")
            assert [row["question_id"] for row in found] == list(range(600))
            details = lines(tmp_path / f"details/{name}.jsonl")
            assert [d["answer_id"] for d in details] == [row["answer_id"] for row in found]


# ---- runs ---------------------------------------------------------------------------------------------------------


class TestRuns:
    def test_methods_take_turns_in_changing_order(self, tmp_path, model) -> None:
        log: list = []
        arms = [Scripted(name, log=log) for name in "abcd"]
        run_all(RunFolder(tmp_path), model, arms, [question(n) for n in range(8)])
        order = "".join(name for name, what, *_ in log if what == "reset")
        blocks = [order[i : i + 4] for i in range(0, 32, 4)]
        assert all(sorted(block) == list("abcd") for block in blocks)
        assert len(set(blocks)) > 3

    def test_the_warm_up_asks_no_question_and_is_forgotten(self, tmp_path, model) -> None:
        log: list = []
        run_all(RunFolder(tmp_path), model, [Scripted("a", log=log)], ASKED)
        warm_up = log[: log.index(("a", "reset"))]
        tokenizer = word_tokenizer()
        prompts = [entry[1] for entry in warm_up if len(entry) == 3]
        assert len(prompts) == 3
        assert max(map(len, prompts)) == max(len(tokenizer(q["turns"][0] + "\n").input_ids) for q in ASKED)
        assert not {tuple(p) for p in prompts} & {tuple(tokenizer(q["turns"][0] + "\n").input_ids) for q in ASKED}
        assert warm_up[-1] == ("a", "forget")

    def test_a_method_that_fails_is_named_and_finished_work_is_kept(self, tmp_path, model) -> None:
        folder = RunFolder(tmp_path)
        with pytest.raises(RuntimeError, match=r"b, question 1[1-5]: ValueError: out of luck; finished answers"):
            run_all(folder, model, [Scripted("a"), Scripted("b", fails=6)], ASKED)
        kept = sum(len(folder.pairs(f"{name}.jsonl")) for name in "ab")
        assert kept > 2
        assert run_all(folder, model, [Scripted("a"), Scripted("b")], ASKED) == 10 - kept

    def test_seeds_belong_to_questions_and_runs(self, tmp_path, model) -> None:
        drawn: list[float] = []

        class Dice(Scripted):
            def generate(self, *arguments) -> torch.Tensor:
                drawn.append(float(torch.rand(())))
                return super().generate(*arguments)

        meter = ForwardMeter(model)
        for number, run in ((1, 1), (1, 1), (2, 1), (1, 2)):
            asker(model).ask(meter, Dice("a"), Question(number, "qa", ("ba",)), run, 0)
        meter.close()
        assert drawn[0] == drawn[1]
        assert len(set(drawn)) == 3

    def test_a_report_warns_of_loops_of_texts_that_differ_and_of_sessions_that_were_not_alike(
        self, tmp_path, model, monkeypatch
    ) -> None:
        folder = RunFolder(tmp_path)
        arms = [Scripted("hf-generate", [5] * 6), Scripted("same", [5] * 6), Scripted("other", [5] * 5 + [6])]
        monkeypatch.setattr(arms[1], "lossless", False)
        methods = [arm.name for arm in arms]
        run_all(folder, model, arms, ASKED[:3])
        assert "partial: 2 of 5" in " ".join(from_folder(folder, "hf-generate", word_tokenizer()).notes)
        monkeypatch.setitem(ENVIRONMENT, "commit", "def")
        run_all(folder, model, arms, ASKED)
        report = from_folder(folder, "hf-generate", word_tokenizer())
        said = "\n".join(report.notes)
        assert "overall: the model's own text repeats itself (distinct-4 0.33)" in said
        assert "other is lossless, yet 100% of its answers differ from hf-generate's" in said
        assert "same is lossy" in said
        assert "sessions were not alike, commit: abc; def" in said
        assert "partial" not in said
        assert [(d.method, d.turn, d.index) for d in report.divergences] == [("other", 1, 5)] * 5
        assert "| other | 11 | 1 | 1 | 5 |" in markdown(report)
        assert [row.method for row in report.rows[-3:]] == methods

    def test_shares_by_position_stand_in_the_report(self, tmp_path, model) -> None:
        folder = RunFolder(tmp_path)
        run_all(folder, model, [Scripted("hf-generate"), Scripted("b")], ASKED)
        file = tmp_path / "answers/b.jsonl"
        steps = [json.loads(line) for line in file.read_text().splitlines()]
        for row in steps:
            row["choices"][0]["accept_lengths"] = [1, 3]
        written(file, steps)
        report = from_folder(folder, "hf-generate", word_tokenizer())
        assert report.accepted["b"] == [0.5, 0.5]
        assert "| b | 50% | 50% |" in markdown(report)


class TestTies:
    """A text that parts from the baseline's where two logits are equal, and one that parts where they are not."""

    def explained(self, folder: RunFolder, model, others: Sequence[Scripted], **settings: Any):
        arms = [baseline("hf-generate", model), *others]
        run_all(folder, model, arms, ASKED[:1], question_ids=[11], **settings)
        explain(folder, "hf-generate", asker(model), read_questions(self.asked)[:1], lambda *_: None)
        return from_folder(folder, "hf-generate", word_tokenizer())

    @pytest.fixture(autouse=True)
    def _asked(self, asked) -> None:
        self.asked = asked

    def test_near_ties_and_bugs_are_told_apart(self, tmp_path, model) -> None:
        twin = deepcopy(model)
        prompt = torch.tensor([prompt_ids(word_tokenizer(), "none", ASKED[0]["turns"][:1], [])])
        (text,) = generated(twin.generate(prompt, max_new_tokens=6, do_sample=False), prompt.shape[1], frozenset())
        one, two = text[2], next(t for t in range(3, 96) if t not in [*text, *prompt[0].tolist()])
        with torch.no_grad():  # always as likely as each other
            twin.lm_head.weight[two] = twin.lm_head.weight[one]
        (text,) = generated(twin.generate(prompt, max_new_tokens=6, do_sample=False), prompt.shape[1], frozenset())
        at = next(i for i, token in enumerate(text) if token in (one, two))
        equal = two if text[at] == one else one
        wrong = int(twin(torch.cat([prompt, torch.tensor([text[:1]])], 1)).logits[0, -1].argmin())
        near = Scripted("near", [*text[:at], equal, *text[at + 1 :]])
        report = self.explained(RunFolder(tmp_path), twin, [near, Scripted("broken", [text[0], wrong, *text[2:]])])
        gaps = {gap.method: gap for gap in report.gaps.found}
        assert gaps["near"].gap <= report.gaps.allowed < gaps["broken"].gap
        assert gaps["near"].index == at
        assert gaps["broken"].index == 1
        said = " ".join(report.notes)
        assert "near is lossless, yet 100% of its answers differ from hf-generate's: of 1 first differences 1" in said
        assert "1 are more than that: a bug" in said
        assert f"| broken | 11 | 1 | 1 | 1 | {gaps['broken'].gap:.1e} |" in markdown(report)
        assert report.to_json()["gaps"]["dtype"] == "float32"

    def test_equal_texts_have_no_gaps_and_lossy_ones_are_not_asked(self, tmp_path, model) -> None:
        lossy = Scripted("lossy")
        lossy.lossless = False
        report = self.explained(RunFolder(tmp_path), model, [DecoderArm("none", Decoder(model, "none")), lossy])
        assert (report.gaps.found, report.gaps.allowed) == ([], None)
        assert {d.method for d in report.divergences} == {"lossy"}


class TestCommand:
    def test_it_runs_reports_and_can_be_compared(self, checkpoint, asked, tmp_path) -> None:
        out = tmp_path / "out"
        command = ["run", checkpoint, "--questions", asked, "--out", out, "--max-new-tokens", 8]
        command += ["--drafters", "none,small=suffix", "--set", "small.size=4"]
        result = cli(*command, "--baselines", "hf-prompt-lookup")
        assert result.exit_code == 0, result.output
        for text in ("Spec-Bench's own figures", "Totals: speed-up", "small (cold)", "own names: riddles"):
            assert text in result.output
        methods = ["hf-generate", "hf-prompt-lookup", "none", "small"]
        assert sorted(f.stem for f in (out / "answers").iterdir()) == methods
        report = json.loads((out / "report.json").read_text())
        assert {(r["method"], r["ours"]["equal_share"]) for r in report["rows"]} == {(m, 1.0) for m in methods}
        assert report["states"]["small"] == "cold"
        assert report["settings"]["drafters"]["small"] == {"drafter": "suffix", "options": {"size": 4}}
        assert len(report["settings"]["questions_sha256"]) == 64
        assert report["sessions"][0]["packages"]["torch"] == torch.__version__
        assert "own names: riddles" in (out / "report.md").read_text()
        assert list(report["steps"]) == ["none", "small"]  # methods of ours tell
        assert report["gaps"]["found"] == []
        assert (out / "report.png").stat().st_size > 1000
        # the protocol's figures are those of the original script on the very files
        (mine,) = (r["protocol"] for r in report["rows"] if (r["method"], r["subtask"]) == ("small", "overall"))
        files = [out / "answers" / f"{name}.jsonl" for name in ("hf-generate", "small")]
        fast, slow, ratio, lengths = original_speed(files[1], files[0], load_tokenizer(checkpoint), "overall")
        assert (mine["tokens_per_second"], mine["baseline_tokens_per_second"]) == (fast, slow)
        ratio = ratio if slow > 0 else None  # empty texts count -1 token, and on a busy machine they may outweigh all
        assert (mine["speedup"], mine["mat"]) == (ratio, np.mean(lengths))
        compared = cli("compare", *files, "--tokenizer", checkpoint, "--json")
        assert compared.exit_code == 0, compared.output
        entry = json.loads(compared.stdout)
        assert entry["rows"][-1]["protocol"]["speedup"] == ratio
        assert "small: 0 of 5 texts differ from hf-generate's" in entry["notes"]
        other = cli("report", out, "--baseline", "none", "--json")
        assert json.loads(other.stdout)["baseline"] == "none"

    def test_warm_drafters_say_so_and_three_runs_have_a_spread(self, checkpoint, asked, tmp_path) -> None:
        out = tmp_path / "out"
        command = ["run", checkpoint, "--questions", asked, "--out", out, "--max-new-tokens", 6, "--warm"]
        result = cli(*command, "--drafters", "token-recycling", "--runs", 3, "--limit", 1, "--temperature", 0.8)
        assert result.exit_code == 0, result.output
        assert "token-recycling (warm)" in result.output
        assert "3 runs" in result.output
        assert " ± " in result.output
        report = json.loads((out / "report.json").read_text())
        assert all(r["protocol"]["speedup_std"] is not None for r in report["rows"])
        assert all(r["ours"]["equal_share"] is None for r in report["rows"])

    def test_questions_that_do_not_fit_are_left_out_for_all_or_cut_for_all(self, checkpoint, tmp_path) -> None:
        asked = written(tmp_path / "q.jsonl", [question(1), question(2, "rag", ["ba " * 300])])
        command = ["run", checkpoint, "--questions", asked, "--drafters", "none", "--max-new-tokens", 4]
        result = cli(*command, "--out", tmp_path / "a")
        assert result.exit_code == 0, result.output
        assert "1 of 2 questions left out" in result.output
        assert [row["question_id"] for row in lines(tmp_path / "a/answers/none.jsonl")] == [1]
        assert json.loads((tmp_path / "a/report.json").read_text())["settings"]["left_out"] == [2]
        result = cli(*command, "--out", tmp_path / "b", "--truncate")
        assert result.exit_code == 0, result.output
        assert "1 questions had a prompt whose middle was taken out: 2" in result.output
        result = cli(*command, "--out", tmp_path / "c", "--categories", "rag")
        assert result.exit_code == 2
        assert "none fits the model's context of 256" in result.output

    def test_an_unfinished_run_can_be_reported(self, checkpoint, asked, tmp_path, monkeypatch) -> None:
        out = tmp_path / "out"
        ask, count = Asker.ask, 0

        def interrupted(*arguments):
            nonlocal count
            count += 1
            if count == 6:
                raise KeyboardInterrupt
            return ask(*arguments)

        monkeypatch.setattr(Asker, "ask", interrupted)
        command = ["run", checkpoint, "--questions", asked, "--out", out, "--drafters", "none", "--max-new-tokens", 4]
        result = cli(*command)
        assert result.exit_code == 130
        assert "the same command goes on" in result.output
        result = cli("report", out)
        assert result.exit_code == 0, result.output
        assert "partial: 3 of 5 questions" in result.output
        monkeypatch.undo()
        assert "partial" not in cli(*command).output
        result = cli(*command[:-1], 5)
        assert result.exit_code == 2
        assert "max_new_tokens was 4 and is 5" in result.output

    def test_processes_share_the_questions_and_the_parts_become_one(self, checkpoint, asked, tmp_path) -> None:
        out = tmp_path / "out"
        command = ["run", checkpoint, "--questions", asked, "--out", out, "--drafters", "none", "--max-new-tokens", 4]

        def process(rank: int) -> int:
            os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"})
            return cli(*command).exit_code

        children = [forked(lambda rank=rank: process(rank)) for rank in (0, 1)]
        assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
        result = cli("report", out)
        assert result.exit_code == 0, result.output
        assert "several processes answered at a time" in result.output
        assert not list((out / "parts").iterdir())
        sessions = RunFolder(out).record()[1]
        for name in ("hf-generate", "none"):
            assert [row["question_id"] for row in lines(out / f"answers/{name}.jsonl")] == [11, 12, 13, 14, 15]
            ranks = [sessions[d["session"]]["rank"] for d in lines(out / f"details/{name}.jsonl")]
            assert ranks == [0, 1, 0, 1, 0]

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (["--questions", "nowhere.jsonl"], "--questions nowhere.jsonl: No such file"),
            (["--categories", "poems"], "--categories 'poems'"),
            (["--template", "alpaca"], "--template 'alpaca': unknown"),
            (["--drafters", "sufix"], "did you mean suffix"),
            (["--drafters", "a/b=suffix"], "a method's answers lie in a file of its name"),
            (["--baselines", "hf"], "--baselines 'hf': unknown"),
            (["--baselines", "hf-assisted"], "hf-assisted: give --draft-model"),
            (["--against", "localhost:8000"], "write NAME=URL"),
            (["--against", "none=http://localhost"], "already names something else"),
            (["--max-new-tokens", "256"], "leaves no room for a question"),
            (["--out", f"{__file__}/x"], "cannot write there"),
        ],
    )
    def test_mistakes_are_one_line(self, checkpoint, asked, tmp_path, options: list[str], said: str) -> None:
        command = ["run", checkpoint, "--questions", asked, "--out", tmp_path / "out", "--drafters", "none"]
        result = cli(*command, "--max-new-tokens", "4", *options)
        assert result.exit_code == 2
        assert said in result.output
        assert len(result.output.strip().splitlines()) == 1

    def test_reports_and_comparisons_say_what_they_miss(self, tmp_path) -> None:
        assert "settings.json is missing or damaged" in cli("report", tmp_path).output
        for name, numbers in (("a", (1, 2)), ("b", (2, 3))):
            made = "".join(answer(n, "qa", [4], [1.0], [1]).line() for n in numbers)
            (tmp_path / f"{name}.jsonl").write_text(made)
        result = cli("compare", tmp_path / "a.jsonl", tmp_path / "b.jsonl")
        assert result.exit_code == 2
        said = " ".join(result.output.split())
        assert "b.jsonl: 3" in said
        assert "a.jsonl: 1" in said
        assert "two or more" in cli("compare", tmp_path / "a.jsonl").output
        assert (
            "none of the files" in cli("compare", tmp_path / "a.jsonl", tmp_path / "b.jsonl", "--baseline", "c").output
        )
