"""The certificate passes what is right and names the section of what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import typer
from conftest import OracleDrafter, word_tokenizer
from tiny_models import tiny_llama, tiny_mistral
from transformers import AutoModelForCausalLM, BloomConfig, BloomForCausalLM
from typer.testing import CliRunner

from specdec import Decoder
from specdec.bench import certificate
from specdec.bench.certificate import Certificate, Section, certify, weights_hash
from specdec.bench.enumeration import NotEnumerable, law, total_variation
from specdec.cache import TreeCache
from specdec.cli import Commands
from specdec.cli.verify import verify as command
from specdec.contracts import Verdict
from specdec.errors import UsageError
from specdec.verifiers import standard
from specdec.verifiers.standard import Standard

IDS = [[5, 9, 14, 5, 9, 14, 5, 9, 14], [7, 3, 18, 7, 3]]
NEW = 16


def silent(done: int, total: int, text: str) -> None:
    assert 0 <= done <= total


@pytest.fixture(autouse=True)
def _less_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certificate, "_SAMPLES", 200)
    monkeypatch.setattr(certificate, "_OUTCOMES", 100)


def statuses(decoder: Decoder, exact: Decoder | str | None = None, new: int = NEW) -> dict[str, str]:
    sections = certify(decoder, exact or decoder, IDS, new, silent)
    assert [s.name for s in sections] == ["greedy", "near ties", "law", "cache"]
    json.dumps([s.figures for s in sections], allow_nan=False)
    return {s.name: s.status for s in sections}


def model(**changes):
    return tiny_llama(vocab_size=24, **changes)


def drafting(dtype: torch.dtype = torch.float32) -> Decoder:
    """Draws trees without replacement, so residuals and rejected columns all occur."""
    return Decoder(model().to(dtype), "draft-model", draft=model(seed=1).to(dtype), branching=(2, 1))


PASSED = dict.fromkeys(["greedy", "near ties", "law", "cache"], "passed")


def test_what_is_right_passes():
    assert statuses(drafting()) == PASSED


def test_windows_and_learning_drafters_pass():
    assert statuses(Decoder(tiny_mistral(vocab_size=24), "suffix")) == PASSED


def test_rows_of_chain_models_are_compared_with_the_row_alone():
    config = BloomConfig(vocab_size=24, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3, eos_token_id=None)
    assert statuses(Decoder(BloomForCausalLM(config).eval(), "suffix")) == PASSED


def test_texts_that_end_early_pass():
    ends = model()
    text = ends.generate(torch.tensor([IDS[0]]), do_sample=False, max_new_tokens=NEW)[0, len(IDS[0]) :].tolist()
    ends.generation_config.eos_token_id = text[7]
    assert statuses(Decoder(ends, "suffix")) == PASSED
    assert ends.generation_config.eos_token_id == text[7], "the caller's settings come back"


def test_the_models_own_penalties_do_not_blur_the_audit():
    penalised = model()
    penalised.generation_config.repetition_penalty = 3.0
    assert statuses(Decoder(penalised, "suffix")) == PASSED
    assert penalised.generation_config.repetition_penalty == 3.0


def test_half_precision_is_audited_beside_float32():
    sections = certify(drafting(torch.bfloat16), drafting(), IDS, NEW, silent)
    assert {s.name: s.status for s in sections} == PASSED
    ties = sections[1].figures
    assert ties["dtype"] == "bfloat16"
    assert ties["limit"] > 1e-3, "rounding of bfloat16 is seen"
    assert ties["float32"]["largest_gap"] <= ties["float32"]["limit"]
    assert sections[0].figures["limit"] < 1e-3, "float32 is held to its own noise"


def test_without_float32_the_rest_is_run():
    got = statuses(drafting(torch.bfloat16), "its weights are quantised")
    assert got == {"greedy": "skipped", "near ties": "passed", "law": "skipped", "cache": "passed"}


# ---- seeded faults ------------------------------------------------------------------------------------------------


def one_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accepts one token more than the target said."""
    match = Standard._match

    def greedy(tree, answers, best):
        verdict = match(tree, answers, best)
        children = tree.topology.children[verdict.path[-1] if verdict.path else 0]
        if children:
            return Verdict([*verdict.path, children[0]], answers[children[0]])
        return verdict

    monkeypatch.setattr(Standard, "_match", staticmethod(greedy))


def no_residual(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a rejection it draws from the target's law, not from the residual."""

    def choose(p, tree, children, randomness):
        for child in children:
            x = int(tree.tokens[child])
            if tree.q is not None and randomness.accept(float(p[x] / tree.q[tree.q_row[child]][x])):
                return x, child
        return randomness.draw(p), None

    monkeypatch.setattr(standard, "choose", choose)


def off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The node after each accepted one enters the cache."""
    commit = Decoder._commit

    def shifted(self, output, verdicts):
        real = [v.path if v is not None else None for v in verdicts]
        for verdict, nodes in zip(verdicts, output.nodes, strict=True):
            if verdict is not None:
                verdict.path = [min(v + 1, nodes - 1) for v in verdict.path]
        commit(self, output, verdicts)
        for verdict, path in zip(verdicts, real, strict=True):
            if verdict is not None:
                verdict.path = path

    monkeypatch.setattr(Decoder, "_commit", shifted)


def swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two kept columns change places."""
    keep = TreeCache.keep
    monkeypatch.setattr(
        TreeCache, "keep", lambda self, base, kept: keep(self, base, [k[:-2] + k[:-3:-1] for k in kept])
    )


def unmoved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rejected columns stay where accepted ones should have come."""
    keep = TreeCache.keep
    monkeypatch.setattr(
        TreeCache, "keep", lambda self, base, kept: keep(self, base, [list(range(len(k))) for k in kept])
    )


FAULTS = {
    one_more: {"greedy", "near ties"},
    no_residual: {"law"},
    off_by_one: {"cache"},
    swapped: {"cache"},
    unmoved: {"cache"},
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_a_fault_fails_the_section_that_looks_for_it(fault, monkeypatch: pytest.MonkeyPatch):
    if FAULTS[fault] == {"law"}:
        decoder = drafting()
        fault(monkeypatch)
        assert statuses(decoder) == PASSED | {"law": "failed"}
        return
    target = model()
    want = [target.generate(torch.tensor([p]), do_sample=False, max_new_tokens=99)[0, len(p) :].tolist() for p in IDS]

    def sections() -> list[Section]:
        """With a drafter that knows the text, between decoys, so that columns move in every step."""
        found = []
        for text, prompt in zip(want, IDS, strict=True):
            knowing = Decoder(target, OracleDrafter([text], depth=3, wrong=0.2, decoys=1))
            noise = certificate.measure_noise(knowing, [prompt], NEW, silent)
            asked = ([prompt], NEW, noise, silent)
            found += [check(knowing, *asked) for check in (certificate.greedy, certificate.caches)]
            found.append(certificate.near_ties(knowing, None, *asked))
        return found

    assert {s.status for s in sections()} == {"passed"}
    fault(monkeypatch)
    failed = [s for s in sections() if s.status == "failed"]
    assert FAULTS[fault] <= {s.name for s in failed}
    if fault is one_more:
        assert max(s.figures["largest_gap"] for s in failed if s.name == "near ties") > 0.1, "a bug has a large gap"


def test_a_biased_sampler_fails_the_law(monkeypatch: pytest.MonkeyPatch):
    def greedy_drafts(p, tree, children, randomness):
        for child in children:
            if p[tree.tokens[child]] > 0:
                return int(tree.tokens[child]), child
        return randomness.draw(p), None

    decoder = Decoder(model(), "suffix")
    monkeypatch.setattr(standard, "choose", greedy_drafts)
    section = certificate.sampling_law(decoder, IDS, silent)
    assert section.status == "failed"
    assert max(r["total_variation"] for r in section.figures["enumerated"]) > 0.01
    assert min(section.figures["p_values"]) < 1e-6


def test_what_cannot_be_enumerated_is_sampled():
    section = certificate.sampling_law(Decoder(model(), "rsd", draft=model(seed=1)), IDS[:1], silent)
    assert section.status == "passed"
    assert section.figures["enumerated"] == []
    assert "continuous" in section.finding
    assert len(section.figures["p_values"]) == 1


def test_the_law_of_a_drafter_with_trees_is_enumerated_and_drafted():
    section = certificate.sampling_law(drafting(), IDS[:2], silent)
    assert {(r["prompt"], r["tokens"]) for r in section.figures["enumerated"]} >= {(0, 2), (1, 2)}
    assert any(r["drafted"] for r in section.figures["enumerated"])


def test_a_procedure_that_does_not_repeat_itself_is_not_enumerated():
    turns = iter(range(100))
    with pytest.raises(NotEnumerable, match="led elsewhere"):
        law(lambda random: random.draw(torch.ones(2 + next(turns) % 2)) + random.draw(torch.ones(2)))
    with pytest.raises(NotEnumerable, match="more than 5 outcomes"):
        law(lambda random: random.draw(torch.ones(9)), limit=5)


def test_enumeration_is_exact():
    p = torch.tensor([0.5, 0.0, 0.2, 0.3])
    assert total_variation(law(lambda r: r.draw(p)), {0: 0.5, 2: 0.2, 3: 0.3}) < 1e-7
    pairs = law(lambda r: tuple(r.draws(p[None], 2, replace=False)[0].tolist()))
    assert pairs[(0, 2)] == pytest.approx(0.5 * 0.2 / 0.5)
    assert law(lambda r: r.accept(0.3)) == pytest.approx({True: 0.3, False: 0.7})


# ---- the certificate and the command ------------------------------------------------------------------------------


def test_lossy_methods_get_no_certificate():
    with pytest.raises(UsageError, match="typical: not lossless by definition"):
        certify(Decoder(model(), "suffix", "typical"), "unused", IDS, NEW, silent)


def test_the_verdict_names_what_failed_and_what_was_left_out():
    def of(*states: str) -> str:
        return Certificate("t", [Section(f"s{i}", s, "") for i, s in enumerate(states)], {}).verdict

    assert of("passed", "passed") == "PASSED"
    assert of("skipped", "passed") == "PASSED, without s0 (skipped)"
    assert of("skipped", "failed") == "FAILED: s1"


def test_weights_are_told_apart(tmp_path: Path):
    assert weights_hash(model()) == weights_hash(model())
    assert weights_hash(model()) != weights_hash(model(seed=1))
    model().save_pretrained(tmp_path)
    assert list(weights_hash(AutoModelForCausalLM.from_pretrained(tmp_path))) == ["model.safetensors"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_llama(vocab_size=96, eos_token_id=2).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    (folder / "prompts.txt").write_text("ba be bi bo bu ba be\nda de\nfa fe fi\n")
    return str(folder)


app = typer.Typer(cls=Commands)
app.callback()(lambda: None)
app.command("verify")(command)


def run(checkpoint: str, *args: str):
    prompts = str(Path(checkpoint) / "prompts.txt")
    return CliRunner().invoke(app, ["verify", checkpoint, "--prompts", prompts, "--max-new-tokens", "12", *args])


def test_the_command_writes_the_certificate(checkpoint: str, tmp_path: Path):
    result = run(checkpoint, "--drafter", "suffix", "--set", "suffix.size=5", "--out", str(tmp_path / "c"))
    assert result.exit_code == 0, result.output
    assert "suffix, standard: PASSED" in result.stdout
    written = json.loads((tmp_path / "c" / "certificate.json").read_text())
    assert written["passed"] is True
    assert {"commit", "command", "date", "packages", "cpu", "sha256"} <= set(written["provenance"])
    assert written["provenance"]["drafter"] == {"name": "suffix", "size": "5"}
    page = (tmp_path / "c" / "certificate.md").read_text()
    assert "**PASSED**" in page
    assert written["provenance"]["sha256"]["model.safetensors"] in page
    result = run(checkpoint, "--drafter", "none", "--json", "--out", str(tmp_path / "one.json"))
    assert json.loads(result.stdout) == json.loads((tmp_path / "one.json").read_text())
    assert (tmp_path / "one.md").is_file()


def test_another_dtype_is_held_to_float32_too(checkpoint: str):
    result = run(
        checkpoint,
        "--drafter",
        "draft-model",
        "--draft-model",
        checkpoint,
        "--dtype",
        "bfloat16",
        "--limit",
        "1",
        "--json",
    )
    assert result.exit_code == 0, result.output
    written = json.loads(result.stdout)
    assert [s["status"] for s in written["sections"]] == ["passed"] * 4
    assert written["provenance"]["dtype"] == "bfloat16"
    assert written["provenance"]["sha256_of_draft"] == written["provenance"]["sha256"]
    assert "float32" in written["sections"][1]["figures"]


def test_a_failed_certificate_is_written_and_exits_with_one(checkpoint: str, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(standard, "choose", lambda p, tree, children, randomness: (int(p.argmin()), None))
    result = run(checkpoint, "--drafter", "none", "--out", str(tmp_path))
    assert result.exit_code == 1
    assert "FAILED: law" in result.stdout
    assert "**FAILED: law**" in (tmp_path / "certificate.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--verifier", "typical"], "typical: not lossless by definition"),
        (["--drafter", "draft-model"], "needs --draft-model"),
        (["--drafter", "sufix"], "did you mean"),
        (["--dtype", "int3"], "--dtype 'int3'"),
        (["--max-new-tokens", "999"], "exceed the model's context"),
        (["--out", "/dev/null/x"], "cannot write there"),
    ],
)
def test_every_mistake_is_one_line(checkpoint: str, arguments: list[str], error: str):
    result = run(checkpoint, *arguments)
    assert result.exit_code == 2
    assert error in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
