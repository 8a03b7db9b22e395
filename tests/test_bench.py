"""The bench measures what its definitions say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import tiny_llama

from specdec import Decoder
from specdec.bench import report as reports
from specdec.bench.arms import STATES, DecoderArm, Settings
from specdec.bench.baselines import BASELINES, baseline
from specdec.bench.environment import environment
from specdec.bench.harness import ForwardMeter, Harness, generated, grouped
from specdec.bench.prompts import load_prompts
from specdec.bench.statistics import Record, distinct_n, median_repeat, speedup_interval, summarise
from specdec.errors import CompatibilityError, UsageError


def record(
    arm: str, group: int = 0, seconds: float = 1.0, ids=((1, 2, 3, 4, 5),), repeat: int = 0, **changes
) -> Record:
    fields = dict(temperature=0.0, forwards=sum(map(len, ids)), forward_seconds=seconds / 2) | changes
    return Record(
        arm, group=group, prompts=(f"p{group}",), repeat=repeat, seconds=seconds, ids=list(map(list, ids)), **fields
    )


def rows_of(records: list[Record], repeats: int = 1):
    arms = list(dict.fromkeys(r.arm for r in records))
    rows = summarise(records, dict.fromkeys(arms, True), dict.fromkeys(arms), repeats, "hf-generate")
    return {(row.name, row.temperature): row for row in rows}


# ---- statistics ---------------------------------------------------------------------------------------------------


def test_distinct4_is_one_without_repetition_and_low_for_a_loop():
    assert distinct_n(list(range(20))) == 1.0
    assert distinct_n([1, 2] * 50) == pytest.approx(2 / 97)
    assert distinct_n([1, 2, 3]) is None  # no 4-gram: no opinion


def test_speedup_is_the_ratio_of_total_speeds_not_the_mean_of_ratios():
    records = [
        record("hf-generate", 0, seconds=1.0), record("hf-generate", 1, seconds=9.0),
        record("x", 0, seconds=0.1), record("x", 1, seconds=8.9),
    ]  # fmt: skip
    row = rows_of(records)["x", 0.0]
    assert row.speedup == pytest.approx(10 / 9)  # the mean of ratios would be 5.5
    assert row.speedup_of_means == pytest.approx(((50 + 5 / 8.9) / 2) / ((5 + 5 / 9) / 2))
    assert row.tokens_per_second == pytest.approx(10 / 9)


def test_speedup_counts_tokens_of_both_arms_when_their_lengths_differ():
    records = [record("hf-generate", ids=[[1] * 10]), record("x", ids=[[1] * 30])]
    assert rows_of(records)["x", 0.0].speedup == pytest.approx(3)


def test_interval_resamples_method_and_baseline_together():
    rng = np.random.default_rng(1)
    base = rng.uniform(1, 20, 30)  # prompts differ wildly, the ratio does not
    low, high = speedup_interval(np.full(30, 8.0), base / 2, np.full(30, 8.0), base)
    assert low == pytest.approx(2)
    assert high == pytest.approx(2)


def test_interval_covers_the_true_ratio_about_95_times_in_100():
    rng, hits = np.random.default_rng(2), 0
    for _ in range(200):
        base = rng.uniform(1, 2, 40)
        mine = base / 2 * rng.uniform(0.8, 1.2, 40)
        low, high = speedup_interval(np.ones(40), mine, np.ones(40), base, resamples=500)
        hits += low <= 2 <= high
    assert 0.88 <= hits / 200 <= 0.99


def test_no_interval_from_a_single_prompt():
    assert speedup_interval(np.ones(1), np.ones(1), np.ones(1), np.ones(1)) is None


def test_median_repeat_is_neither_the_fastest_nor_the_slowest():
    calls = [record("x", seconds=s, repeat=i) for i, s in enumerate([5.0, 1.0, 2.0])]
    assert median_repeat(calls).seconds == 2.0
    assert rows_of([*calls, *(record("hf-generate", repeat=i) for i in range(3))], 3)["x", 0.0].seconds == 2.0


def test_groups_that_some_arm_did_not_finish_are_left_out_for_all():
    records = [record("hf-generate", 0), record("x", 0, seconds=0.5), record("hf-generate", 1, seconds=100.0)]
    rows = rows_of(records)
    assert rows["x", 0.0].speedup == pytest.approx(2)
    assert rows["hf-generate", 0.0].prompts == 1
    assert rows_of([*records[:1], record("x", 5)]) == {}  # no common group at all


def test_equal_sees_one_wrong_token_in_any_repeat():
    base = [record("hf-generate", g, repeat=r) for g in (0, 1) for r in (0, 1)]
    same = [record("x", g, repeat=r) for g in (0, 1) for r in (0, 1)]
    row = rows_of(base + same, 2)["x", 0.0]
    assert (row.equal, row.equal_share) == (True, 1.0)
    same[3] = record("x", 1, repeat=1, ids=[[1, 2, 3, 4, 6]])
    row = rows_of(base + same, 2)["x", 0.0]
    assert (row.equal, row.equal_share) == (False, 0.5)


def test_equal_says_nothing_about_sampled_text():
    rows = rows_of([record("hf-generate", temperature=1.0), record("x", temperature=1.0, ids=[[9]])])
    assert rows["x", 1.0].equal is None
    assert rows["x", 1.0].equal_share is None


def test_mat_is_tokens_over_emitting_forwards_and_overhead_what_is_outside_them():
    rows = rows_of([record("hf-generate"), record("x", seconds=4.0, forwards=2, forward_seconds=3.0)])
    assert rows["x", 0.0].mat == 2.5
    assert rows["x", 0.0].overhead == pytest.approx(0.25)
    rows = rows_of([record("hf-generate"), record("x", forwards=0, forward_seconds=None)])
    assert rows["x", 0.0].mat is None
    assert rows["x", 0.0].overhead is None


# ---- harness ------------------------------------------------------------------------------------------------------


class FakeArm:
    """Writes down what the harness does to it."""

    lossless, state, stats = True, None, None

    def __init__(self, name: str, log: list, fail_at: int | None = None):
        self.name, self.log, self.fail_at, self.calls = name, log, fail_at, 0

    def reset(self) -> None:
        self.log.append((self.name, "reset"))

    def forget(self) -> None:
        self.log.append((self.name, "forget"))

    def generate(self, input_ids, attention_mask, settings):
        self.log.append((self.name, int(input_ids[0, 0])))
        self.calls += 1
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        return torch.cat([input_ids, torch.full((len(input_ids), 3), 7)], dim=1)


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


GROUPS = grouped(["a", "b", "c", "d", "e"], [[10], [11], [12], [13], [14]], 1)


def test_every_arm_meets_a_prompt_before_the_next_prompt_comes_in_an_order_that_varies(model):
    log: list = []
    arms = [FakeArm(n, log) for n in "xyz"]
    run = Harness(model).run(arms, GROUPS, [Settings(3, 0.0)])
    calls = [entry for entry in log if isinstance(entry[1], int)]
    for i in range(5):
        assert {(n, 10 + i) for n in "xyz"} == set(calls[3 * i : 3 * i + 3])
    assert len({tuple(n for n, _ in calls[3 * i : 3 * i + 3]) for i in range(5)}) > 1
    assert run.failure is None
    assert [r.ids for r in run.records] == [[[7, 7, 7]]] * 15


def test_arms_are_reset_before_every_call_and_forget_between_temperatures(model):
    log: list = []
    Harness(model).run([FakeArm("x", log)], GROUPS[:2], [Settings(3, 0.0), Settings(3, 1.0)])
    once = [("x", "forget"), ("x", "reset"), ("x", 10), ("x", "reset"), ("x", 11)]
    assert log == once * 2


def test_warm_up_leaves_nothing_learned(model):
    log: list = []
    Harness(model).warm_up(FakeArm("x", log), GROUPS[0], Settings(3, 0.0))
    assert log == [("x", 10), ("x", "forget")]


def test_an_interrupt_keeps_what_was_measured_and_takes_the_hooks_off(model):
    log: list = []
    run = Harness(model).run([FakeArm("x", log, fail_at=3), FakeArm("y", log)], GROUPS, [Settings(3, 0.0)])
    assert isinstance(run.failure, KeyboardInterrupt)
    assert {(r.arm, r.group) for r in run.records} >= {("x", 0), ("y", 0), ("x", 1), ("y", 1)}
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


class Learner:
    """What DecoderArm asks of a decoder."""

    lossless, stats = True, None

    def __init__(self, warm):
        self.drafter, self.resets = self, 0
        self.warm = warm

    def reset(self):
        self.resets += 1


@pytest.mark.parametrize(("after_reset", "keep", "state", "resets"), [
    (False, False, "cold", 3), (False, True, "warm", 2), (None, False, None, 0),
    (True, False, "corpus", 3), (True, True, "corpus+warm", 2),
])  # fmt: skip
def test_learning_drafters_are_cold_unless_asked_otherwise(after_reset, keep, state, resets):
    decoder = Learner(after_reset)
    arm = DecoderArm("x", decoder, warm=keep)
    arm.reset()
    arm.forget()
    assert arm.state == state
    assert state is None or state in STATES
    assert decoder.resets == resets


def test_a_drafter_that_was_used_before_is_still_cold(model):
    decoder = Decoder(model, "token-recycling")
    decoder.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=4, do_sample=False)
    assert decoder.drafter.warm
    assert DecoderArm("x", decoder).state == "cold"


def test_generated_ids_end_with_the_end_token_and_without_padding():
    output = torch.tensor([[5, 5, 1, 2, 9, 0, 0], [5, 5, 1, 2, 3, 4, 5]])
    assert generated(output, 2, frozenset([9])) == [[1, 2, 9], [1, 2, 3, 4, 5]]


def test_groups_are_left_padded():
    groups = grouped(["a", "b", "c"], [[1, 2, 3], [4], [5]], 2)
    assert [g.prompts for g in groups] == [("a", "b"), ("c",)]
    ids, mask = groups[0].tensors(torch.device("cpu"))
    assert ids.tolist() == [[1, 2, 3], [0, 0, 4]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


# ---- arms ---------------------------------------------------------------------------------------------------------


def test_every_baseline_and_decoder_gives_the_same_greedy_ids_and_hf_generate_is_the_unit(model):
    draft = tiny_llama(seed=1)
    names = [n for n in BASELINES if n != "hf-generate-compiled"]  # that one takes its time, below
    arms = [*(baseline(n, model, draft) for n in names), DecoderArm("none", Decoder(model, "none"))]
    groups = grouped(["a", "b"], [[3, 4, 5, 3, 4, 5], [6, 7]], 1)
    run = Harness(model).run(arms, groups, [Settings(12, 0.0)])
    assert run.failure is None
    rows = rows_of(run.records)
    assert all(row.equal and row.tokens == 24 for row in rows.values())
    assert rows["hf-generate", 0.0].speedup == 1.0
    assert rows["hf-generate", 0.0].mat == 1.0
    assert rows["none", 0.0].mat == 1.0
    assert rows["hf-assisted", 0.0].mat >= 1.0
    assert all(0 < row.overhead < 1 for row in rows.values())


@pytest.mark.slow
def test_a_compiled_baseline_gives_the_same_ids_and_compiles_in_the_warm_up_alone(model):
    groups = grouped(["a", "b", "c"], [[3, 4, 5, 3, 4, 5], [6, 7], [8]], 2)
    arms = [baseline("hf-generate", model), baseline("hf-generate-compiled", model, longest=18)]
    harness, compiled = Harness(model), arms[1]
    for group in groups:  # two rows and one
        harness.warm_up(compiled, group, Settings(12, 0.0))
    graphs = compiled.graphs
    assert graphs > 0
    run = harness.run(arms, groups, [Settings(12, 0.0)])
    assert run.failure is None
    assert compiled.graphs == graphs
    rows = rows_of(run.records)
    assert rows["hf-generate-compiled", 0.0].equal
    assert rows["hf-generate-compiled", 0.0].mat == 1.0  # its forwards are seen
    assert "forward" not in model.__dict__


def test_drafts_of_the_models_own_first_layers_are_no_forwards_of_the_target(model):
    arm, meter = baseline("hf-early-exit", model), ForwardMeter(model)
    ids = torch.tensor([[3, 4, 5]])
    arm.generate(ids, torch.ones_like(ids), Settings(6, 0.0))
    assert meter.count <= 6
    meter.close()


def test_an_error_while_the_first_layers_draft_leaves_the_model_whole(model, monkeypatch):
    layers = model.config.num_hidden_layers
    monkeypatch.setattr(type(model.lm_head), "forward", lambda *_: 1 / (model.config.num_hidden_layers - 1))
    ids = torch.tensor([[3, 4, 5]])
    with pytest.raises(ZeroDivisionError):  # in the draft of one layer
        baseline("hf-early-exit", model).generate(ids, torch.ones_like(ids), Settings(6, 0.0))
    assert model.config.num_hidden_layers == layers


def test_a_batch_counts_only_its_own_tokens(model):
    ends = tiny_llama(eos_token_id=[5, 9, 17, 23, 31, 40, 51, 60])
    groups = grouped(["a", "b", "c"], [[3, 4, 5], [6, 7], [11]], 3)
    arms = [baseline("hf-generate", ends), DecoderArm("none", Decoder(ends, "none"))]
    run = Harness(ends).run(arms, groups, [Settings(24, 0.0)])
    assert run.failure is None
    rows = rows_of(run.records)
    assert rows["none", 0.0].equal
    lengths = {len(ids) for ids in run.records[0].ids}
    assert len(lengths) > 1, "rows must end at different times for this test to say anything"
    assert rows["hf-generate", 0.0].mat == 1.0


def test_sampling_arms_switch_off_transformers_own_top_k(model):
    seen: list = []
    arguments = Settings(2, 1.0).arguments()
    decoder = Decoder(model, "none")

    def spy(_model, input_ids, logits_processor, **kwargs):
        seen.extend(type(p).__name__ for p in logits_processor)
        return input_ids

    model.generate(torch.tensor([[3, 4]]), custom_generate=spy, **arguments)
    assert seen == []  # temperature 1 without filters is the model's own law
    assert decoder.generate(torch.tensor([[3, 4]]), **arguments).shape == (1, 4)


def test_an_assistant_of_another_vocabulary_is_refused(model):
    with pytest.raises(CompatibilityError, match="32 tokens, the target's 64"):
        baseline("hf-assisted", model, tiny_llama(vocab_size=32))


def test_the_forward_meter_counts_the_targets_forwards_only_while_it_is_there(model):
    meter = ForwardMeter(model)
    model.generate(torch.tensor([[3, 4]]), max_new_tokens=5, do_sample=False)
    assert meter.count == 5
    assert meter.seconds > 0
    meter.close()
    model.generate(torch.tensor([[3, 4]]), max_new_tokens=5, do_sample=False)
    assert meter.count == 5


# ---- prompts ------------------------------------------------------------------------------------------------------


def test_prompt_files_are_read_by_their_ending(tmp_path: Path):
    text = tmp_path / "p.txt"
    text.write_text("Once upon\n\n{not json}\n")
    assert [p.text for p in load_prompts(str(text))] == ["Once upon", "{not json}"]
    objects = tmp_path / "p.jsonl"
    objects.write_text('{"prompt": "one", "id": "x", "category": "qa"}\n{"prompt": "two"}\n')
    assert [(p.id, p.text, p.category) for p in load_prompts(str(objects))] == [("x", "one", "qa"), ("2", "two", None)]
    assert len(load_prompts(str(objects), limit=1)) == 1


@pytest.mark.parametrize(("line", "problem"), [
    ("{broken", "not JSON"), ('["a"]', "not an object"), ('{"text": "a"}', '"prompt" is missing (keys: text)'),
    ('{"prompt": 3}', "is not text"), ('{"prompt": "  "}', "is empty"), ('{"prompt": "b", "id": "1"}', "already used"),
])  # fmt: skip
def test_a_malformed_prompt_is_named_by_its_line(tmp_path: Path, line: str, problem: str):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "fine", "id": 1}\n\n' + line + "\n")
    with pytest.raises(UsageError) as caught:
        load_prompts(str(file))
    assert f"{file}:3: " in str(caught.value)
    assert problem in str(caught.value)


def test_bytes_that_are_not_text_are_named_by_their_line(tmp_path: Path):
    file = tmp_path / "p.txt"
    file.write_bytes(b"fine\n\xff\xfe\n")
    with pytest.raises(UsageError, match=r"p\.txt:2: not UTF-8"):
        load_prompts(str(file))


# ---- report -------------------------------------------------------------------------------------------------------


def a_report(model) -> tuple[reports.Report, list[Record]]:
    records = [record(a, g, seconds=s, temperature=t) for t in (0.0, 1.0) for g in (0, 1) for a, s in
               (("hf-generate", 2.0), ("x", 1.0))]  # fmt: skip
    settings = {"model": "m", "max_new_tokens": 5, "batch_size": 1, "state": "cold", "compile": "off"}
    return reports.Report(list(rows_of(records).values()), environment(model, "m"), settings, ["a note"]), records


def test_files_hold_the_same_rows_and_leave_no_temporary_behind(model, tmp_path: Path):
    report, records = a_report(model)
    reports.prepare_folder(tmp_path / "new" / "folder")
    assert reports.write(report, records, tmp_path / "new" / "folder") == []
    names = sorted(p.name for p in (tmp_path / "new" / "folder").iterdir())
    assert names == ["records.jsonl", "results.json", "results.md", "speedup.png"]
    saved = json.loads((tmp_path / "new" / "folder" / "results.json").read_text())
    assert [row["name"] for row in saved["rows"]] == ["hf-generate", "x"] * 2
    assert saved["rows"][1]["speedup"] == 2.0
    assert "| x | yes | 2.00 [2.00, 2.00] |" in (tmp_path / "new" / "folder" / "results.md").read_text()
    lines = (tmp_path / "new" / "folder" / "records.jsonl").read_text().splitlines()
    assert [json.loads(line)["ids"] for line in lines] == [r.ids for r in records]


def test_without_matplotlib_there_is_a_note_and_no_plot(model, tmp_path: Path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    report, records = a_report(model)
    (note,) = reports.write(report, records, tmp_path)
    assert "pip install 'specdec[bench]'" in note
    assert not (tmp_path / "speedup.png").exists()


def test_looping_text_is_pointed_out():
    loop = [record(a, ids=[[1, 2] * 30]) for a in ("hf-generate", "x")]
    (note,) = reports.cautions(list(rows_of(loop).values()), "hf-generate", "float32")
    assert "repeats itself" in note
    fine = list(rows_of([record("hf-generate", ids=[list(range(30))])]).values())
    assert reports.cautions(fine, "hf-generate", "float32") == []


def test_a_lossless_row_with_other_ids_is_pointed_out():
    rows = rows_of([record("hf-generate"), record("x", ids=[[1, 2, 3, 4, 6]])])
    (note,) = reports.cautions(list(rows.values()), "hf-generate", "bfloat16")
    assert "x is lossless, yet 100% of its greedy texts differ" in note
    assert "bfloat16" in note


def test_environment_names_machine_versions_and_threads(model):
    e = environment(model, "m")
    assert e["dtype"] == "float32"
    assert e["torch_threads"] == torch.get_num_threads()
    assert {"cpu", "commit", "date", "command", "packages", "device"} <= set(e)
    json.dumps(e, allow_nan=False)


def test_the_readmes_figures_of_larger_models_and_of_vllm_are_those_of_the_results() -> None:
    root = Path(__file__).resolve().parents[1]
    readme = " ".join((root / "README.md").read_text(encoding="utf-8").split())
    results = root / "bench" / "results"
    grown = json.loads((results / "grown-300M" / "results.json").read_text(encoding="utf-8"))
    rows = {row["name"]: row for row in grown["rows"]}
    for name in ("hybrid-draft", "hf-assisted", "hf-prompt-lookup"):
        assert "{:.2f} [{:.2f}, {:.2f}]".format(rows[name]["speedup"], *rows[name]["speedup_ci"]) in readme
    verdict = json.loads((results / "grown-300M" / "certificate" / "certificate.json").read_text(encoding="utf-8"))
    assert verdict["passed"]
    for run in ("float32", "bfloat16", "float32-compiled", "bfloat16-compiled"):
        notes = json.loads((results / f"vllm-{run}" / "results.json").read_text(encoding="utf-8"))["notes"]
        duel = next(note for note in notes if "(our best, vLLM's best)" in note)
        assert re.search(r"\d\.\d\d \[.*\]", duel)[0] in readme
