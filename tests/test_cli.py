"""The command line: what it prints where, and one line for every mistake."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from specdec import registry
from specdec.bench import harness
from specdec.bench.arms import DecoderArm
from specdec.cli import app, common
from specdec.cli.bench import DRAFTERS
from specdec.cli.streaming import TextStream

os.environ["HF_HUB_OFFLINE"] = "1"
VOCABULARY = 99  # four specials and the printable characters
SPECDEC = [sys.executable, "-c", "from specdec.cli import app; app()"]
SHORT = ["--max-new-tokens", "12"]


def byte_tokenizer(printable: bool = True) -> PreTrainedTokenizerFast:
    """One token per byte, after four specials; only bytes that print alone, or all."""
    specials = ["<pad>", "<s>", "</s>", "<unk>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols = specials + ([c for c in alphabet if "!" <= c <= "~"] + ["Ġ"] if printable else alphabet)
    tokenizer = Tokenizer(models.BPE({s: i for i, s in enumerate(symbols)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def save(folder: Path, **changes) -> str:
    tiny_llama(**{"vocab_size": VOCABULARY, **changes}).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """A random model with a tokenizer on disk."""
    return save(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def draft(tmp_path_factory) -> str:
    return save(tmp_path_factory.mktemp("draft"), seed=1)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("prompts") / "p.txt"
    file.write_text("aaa aaa aaa\nOnce upon a time\nNo\n")
    return str(file)


def run(*args: str, **more):
    return CliRunner().invoke(app, list(args), **more)


def environ() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


# ---- help and list ------------------------------------------------------------------------------------------------


def test_help_does_not_wait_for_torch():
    code = "import sys, specdec.cli; assert not {'torch', 'transformers', 'scipy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=environ())


def test_list_names_every_method_and_what_it_is():
    listed = json.loads(run("list", "--json").stdout)
    assert [m["name"] for m in listed["drafters"]] == registry.drafter_names()
    assert [m["name"] for m in listed["verifiers"]] == registry.verifier_names()
    for m in listed["drafters"] + listed["verifiers"]:
        assert {"lossless", "training", "requires", "summary"} <= set(m)
        assert not m["summary"].startswith("cannot be loaded")
    table = run("list").stdout
    assert all(m["name"] in table for m in listed["drafters"])


# ---- generate -----------------------------------------------------------------------------------------------------


def test_generate_gives_the_models_own_text(checkpoint: str):
    ids = byte_tokenizer()("Once upon", return_tensors="pt").input_ids
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    want = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)[0, 9:].tolist()
    result = json.loads(run("generate", checkpoint, "--prompt", "Once upon", *SHORT, "--json").stdout)
    assert result["ids"] == want
    assert result["text"] == byte_tokenizer().decode(want, skip_special_tokens=True)
    assert result["partial"] is False
    assert result["stats"]["new_tokens"] == 12


def test_the_streamed_text_is_the_text(checkpoint: str, tmp_path: Path):
    arguments = ["generate", checkpoint, "--drafter", "none", *SHORT]
    text = json.loads(run(*arguments, "--prompt", "Once upon", "--json").stdout)["text"]
    streamed = run(*arguments, "--file", "-", "--stats", input="Once upon")
    assert streamed.stdout == text + "\n"
    assert "MAT" in streamed.stderr
    file = tmp_path / "prompt.txt"
    file.write_text("Once upon")
    assert run(*arguments, "--file", str(file)).stdout == text + "\n"


def test_a_seed_repeats_a_sample(checkpoint: str):
    arguments = ["generate", checkpoint, "--prompt", "Once", *SHORT, "--temperature", "1", "--json", "--seed"]
    texts = [json.loads(run(*arguments, seed).stdout)["ids"] for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]


def test_the_stream_prints_whole_characters_and_colours_what_was_drafted():
    tokenizer = byte_tokenizer(printable=False)
    ids = tokenizer("naïve [b]🦊[/b]\t\r\n x").input_ids
    out = io.StringIO()
    stream = TextStream(tokenizer, out, colour=True)
    stream.put(torch.tensor([[1, 5, 6]]))  # the prompt
    stream.accepted(2)
    stream.put(torch.tensor(ids[:3]))
    for token in ids[3:]:
        stream.accepted(0)
        stream.put(torch.tensor([token]))
    stream.end()
    assert out.getvalue() == "\x1b[32mn\x1b[0m\x1b[32ma\x1b[0mïve [b]🦊[/b]\t\r\n x\n"
    assert stream.ids == ids


def test_show_accepted_colours_exactly_the_drafted_tokens(checkpoint: str):
    arguments = ["generate", checkpoint, "--prompt", "aaa", "--drafter", "prompt-lookup", "--max-new-tokens", "60"]
    stats = json.loads(run(*arguments, "--json").stdout)["stats"]
    drafted = stats["new_tokens"] - round(stats["new_tokens"] / stats["mat"])
    assert drafted > 0, "something must be accepted for this test to say anything"
    coloured = run(*arguments, "--show-accepted").stdout.count("\x1b[32m")
    assert coloured == drafted
    assert "\x1b[32m" not in run(*arguments).stdout


def test_more_tokens_than_the_context_holds_are_cut_with_a_note(checkpoint: str):
    result = run("generate", checkpoint, "--prompt", "a" * 250, "--max-new-tokens", "20", "--json")
    assert len(json.loads(result.stdout)["ids"]) == 6
    assert "--max-new-tokens lowered from 20 to 6" in result.stderr


def test_an_interrupted_text_is_kept_and_marked(checkpoint: str, monkeypatch):
    put = TextStream.put

    def interrupted(self, value):
        put(self, value)
        if len(self.ids) >= 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(TextStream, "put", interrupted)
    result = run("generate", checkpoint, "--prompt", "Once", "--drafter", "none", *SHORT, "--json")
    assert result.exit_code == 130
    report = json.loads(result.stdout)
    assert report["partial"] is True
    assert len(report["ids"]) == 3


# ---- bench --------------------------------------------------------------------------------------------------------

ROW = {"name", "lossless", "speedup", "speedup_ci", "mat", "tokens_per_second", "overhead", "equal", "distinct4"}


def test_bench_prints_json_alone_whatever_transformers_says(checkpoint: str, draft: str, prompts: str, tmp_path: Path):
    command = [*SPECDEC, "bench", checkpoint, "--draft-model", draft, "--prompts", prompts, "--max-new-tokens", "6",
               "--temperature", "0,1", "--json", "--out", str(tmp_path)]  # fmt: skip
    environment = {**environ(), "TRANSFORMERS_VERBOSITY": "info", "PYTHONWARNINGS": "always"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    names = [
        "hf-generate",
        "hf-prompt-lookup",
        "hf-assisted",
        "none",
        "prompt-lookup",
        "token-recycling",
        "aded",
        "suffix",
        "hybrid",
        "draft-model",
    ]
    assert [(r["temperature"], r["name"]) for r in report["rows"]] == [(t, n) for t in (0.0, 1.0) for n in names]
    assert all(set(row) >= ROW for row in report["rows"])
    greedy, sampled = report["rows"][:10], report["rows"][10:]
    assert all(row["equal"] is True and row["lossless"] for row in greedy)
    assert all(row["equal"] is None for row in sampled)
    assert greedy[0]["speedup"] == 1.0
    assert greedy[0]["mat"] == 1.0
    assert report["partial"] is False
    assert report["environment"]["model"] == checkpoint
    assert "speed-up" in done.stderr  # the table went there
    assert json.loads((tmp_path / "results.json").read_text()) == report
    assert len((tmp_path / "records.jsonl").read_text().splitlines()) == 2 * 3 * 10


def test_what_others_print_does_not_reach_the_json(checkpoint: str, monkeypatch):
    load = common.load_model

    def chatty(*args):
        print("loading, please wait")
        return load(*args)

    monkeypatch.setattr(common, "load_model", chatty)
    for command in (["generate", checkpoint, "--prompt", "a", *SHORT], ["doctor", checkpoint, "--seconds", "0"]):
        result = run(*command, "--json")
        json.loads(result.stdout)
        assert "loading, please wait" in result.stderr


def test_bench_shows_its_table_on_standard_output_otherwise(checkpoint: str, prompts: str):
    result = run("bench", checkpoint, "--drafters", "none", "--baselines", "hf-generate", "--prompts", prompts,
                 "--max-new-tokens", "4", "--limit", "1")  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert "hf-generate" in result.stdout
    assert "distinct-4" in result.stdout
    assert "warm-up" in result.stderr


def test_what_cannot_run_is_left_out_with_a_note_unless_it_was_named(checkpoint: str, prompts: str):
    arguments = ["bench", checkpoint, "--prompts", prompts, "--max-new-tokens", "4", "--json", "--batch-size", "2"]
    result = run(*arguments, "--repeats", "2")
    report = json.loads(result.stdout)
    assert [row["name"] for row in report["rows"]] == ["hf-generate", *DRAFTERS[:-1]]
    assert all(row["equal"] and row["prompts"] == 3 for row in report["rows"])
    left_out = " ".join(report["notes"])
    assert all(name in left_out for name in ("draft-model", "hf-prompt-lookup", "hf-assisted"))
    named = run(*arguments, "--drafters", "draft-model")
    assert named.exit_code == 2
    assert "--draft-model" in named.stderr


def test_learning_drafters_are_marked_cold_or_warm(checkpoint: str, prompts: str):
    arguments = ["bench", checkpoint, "--prompts", prompts, "--drafters", "token-recycling,none", "--json",
                 "--baselines", "hf-generate", "--max-new-tokens", "4"]  # fmt: skip
    for extra, state in (([], "cold"), (["--warm"], "warm")):
        rows = {row["name"]: row for row in json.loads(run(*arguments, *extra).stdout)["rows"]}
        assert rows["token-recycling"]["state"] == state
        assert rows["none"]["state"] is None


def test_an_interrupted_bench_writes_what_it_has_and_says_so(
    checkpoint: str, prompts: str, tmp_path: Path, monkeypatch
):
    generate, calls = DecoderArm.generate, []

    def interrupted(self, *args):
        calls.append(self.name)
        if len(calls) == 1 + 2 + 1:  # warm-up, two prompts, and in the third
            raise KeyboardInterrupt
        return generate(self, *args)

    monkeypatch.setattr(DecoderArm, "generate", interrupted)
    result = run("bench", checkpoint, "--drafters", "none", "--baselines", "hf-generate", "--prompts", prompts,
                 "--max-new-tokens", "4", "--json", "--out", str(tmp_path))  # fmt: skip
    assert result.exit_code == 130
    report = json.loads(result.stdout)
    assert report["partial"] is True
    assert [row["prompts"] for row in report["rows"]] == [2, 2]
    assert json.loads((tmp_path / "results.json").read_text()) == report
    assert "partial" in (tmp_path / "results.md").read_text()


def test_control_c_ends_a_real_run_with_130_and_json(checkpoint: str, prompts: str):
    command = [*SPECDEC, "bench", checkpoint, "--drafters", "none", "--baselines", "hf-generate",
               "--prompts", prompts, "--repeats", "2000", "--max-new-tokens", "8", "--json"]  # fmt: skip
    pipes: dict = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environ()}
    # a test run that was started in the background has Ctrl-C ignored, and children inherit that
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    with subprocess.Popen(command, preexec_fn=heard, **pipes) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("1/"):  # the first timed call is done
                break
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=240)
    assert process.returncode == 130
    assert json.loads(out)["partial"] is True


def test_an_error_in_the_middle_keeps_the_results_too(checkpoint: str, prompts: str, tmp_path: Path, monkeypatch):
    generated = harness.generated

    def full(output, start, ends):
        if start < 5:  # the third prompt
            raise MemoryError("no room")
        return generated(output, start, ends)

    monkeypatch.setattr(harness, "generated", full)
    result = run("bench", checkpoint, "--drafters", "none", "--baselines", "hf-generate", "--prompts", prompts,
                 "--max-new-tokens", "4", "--json", "--out", str(tmp_path))  # fmt: skip
    assert isinstance(result.exception, MemoryError)  # not the user's mistake: nothing hides it
    assert json.loads((tmp_path / "results.json").read_text())["partial"] is True


# ---- options of drafters ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "value"), [
    ("16", 16), ("-2", -2), ("0.5", 0.5), ("1e-3", 0.001), ("true", True), ("False", False), ("none", None),
    ("request", "request"), ("3,2,1", [3, 2, 1]), ("3,", [3]), ("suffix, aded", ["suffix", "aded"]), ("", ""),
    ("nan", "nan"), ("inf", "inf"),
])  # fmt: skip
def test_what_a_value_on_the_command_line_means(text: str, value: object):
    assert common.literal(text) == value
    assert type(common.literal(text)) is type(value)


def test_settings_become_options_of_the_right_kind():
    pairs = ["token-recycling.size=16", "t.scope=request", "t.update_on_prompt=false"]
    first, second = common.choose({"token-recycling": "token-recycling", "t": "token-recycling"}, pairs, "--drafters")
    assert (first.label, first.options) == ("token-recycling", {"size": 16})
    assert (second.drafter, second.options) == ("token-recycling", {"scope": "request", "update_on_prompt": False})
    assert str(second) == "t: token-recycling, scope=request, update_on_prompt=False"
    # a constructor that takes a sequence gets one, and a path is text whatever it looks like
    (draft,) = common.choose({"draft-model": "draft-model"}, ["draft-model.branching=3"], "--drafters")
    assert draft.options == {"branching": [3]}
    for name in ("12", "a,b.safetensors"):
        fails(*GENERATE[:1], *GENERATE[2:], f"token-recycling.table={name}", says=(repr(name), "no such file"))


def test_generate_uses_the_settings(checkpoint: str):
    arguments = ["generate", checkpoint, "--prompt", "aaaa aaaa", "--max-new-tokens", "40", "--json"]
    arguments += ["--drafter", "token-recycling"]
    usual, root = (json.loads(run(*arguments, *more).stdout) for more in ([], ["--set", "token-recycling.size=1"]))
    assert usual["ids"] == root["ids"]
    assert usual["stats"]["mat"] > 1.0 == root["stats"]["mat"]  # a tree of one node drafts nothing
    assert (usual["options"], root["options"]) == ({}, {"size": 1})


def test_bench_runs_a_drafter_twice_under_labels_and_says_what_they_were(checkpoint: str, prompts: str, tmp_path: Path):
    result = run("bench", checkpoint, "--drafters", "token-recycling, root=token-recycling", "--baselines",
                 "hf-generate", "--prompts", prompts, "--max-new-tokens", "24", "--set", "root.size=1", "--json",
                 "--out", str(tmp_path))  # fmt: skip
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == ["hf-generate", "token-recycling", "root"]
    assert rows["token-recycling"]["mat"] > rows["root"]["mat"] == 1.0
    assert report["settings"]["drafters"] == {
        "token-recycling": {"drafter": "token-recycling", "options": {}},
        "root": {"drafter": "token-recycling", "options": {"size": 1}},
    }
    assert "root: token-recycling, size=1" in report["notes"]
    assert any(note.startswith("cold: ") for note in report["notes"])
    assert "root: token-recycling, size=1" in result.stderr
    assert "- root: token-recycling, size=1" in (tmp_path / "results.md").read_text()


def test_settings_of_a_draft_model_reach_it(checkpoint: str, draft: str, prompts: str):
    arguments = ["bench", checkpoint, "--drafters", "short=draft-model", "--baselines", "hf-generate", "--prompts",
                 prompts, *SHORT, "--limit", "1", "--json"]  # fmt: skip
    report = json.loads(run(*arguments, "--draft-model", draft, "--set", "short.length=1").stdout)
    assert report["settings"]["drafters"] == {"short": {"drafter": "draft-model", "options": {"length": 1}}}
    fails(*arguments, says=("short", "--draft-model"))
    fails(*arguments, "--draft-model", draft, "--set", "short.length=0", says=("short: length=0", "at least 1"))


def test_list_shows_the_options_of_one_method():
    listed = json.loads(run("list", "--options", "token-recycling", "--json").stdout)
    options = {o["name"]: o for o in listed["options"]}
    assert options["k"]["default"] == "8"
    assert options["size"]["type"] == "int | None"
    assert options["table"]["meaning"].startswith("file to start from"), "the base class says what it is"
    assert all(o["meaning"] for o in options.values())
    draft = {o["name"]: o for o in json.loads(run("list", "--options", "draft-model", "--json").stdout)["options"]}
    assert draft["draft"]["required"]
    assert "Sequence[int]" in run("list", "--options", "draft-model").stdout, "brackets are no markup"
    assert "no options" in run("list", "--options", "none").stdout
    assert run("list", "--options", "standard").exit_code == 0


# ---- doctor -------------------------------------------------------------------------------------------------------


def test_doctor_tells_tier_reason_and_costs(checkpoint: str):
    report = json.loads(run("doctor", checkpoint, "--seconds", "0", "--json").stdout)
    assert report["tier"] == "tree"
    assert report["reason"]
    assert report["environment"]["dtype"] == "float32"
    assert report["environment"]["attention"]
    assert [p["columns"] for p in report["curve"]] == [1, 2, 4, 8, 16, 32, 64]
    assert report["curve"][0]["ratio"] == 1.0
    assert report["prefix"] == 256 - 65  # the context is 256
    assert "break-even" in run("doctor", checkpoint, "--seconds", "0").stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has graphs")
def test_doctor_refuses_what_cannot_be_compiled_here(checkpoint: str):
    fails("doctor", checkpoint, "--compile", "graphs", says=("compile='graphs'", "NVIDIA GPU", "use compile='off'"))


def test_doctor_explains_a_model_that_cannot_be_decoded(tmp_path: Path):
    from transformers import MambaConfig, MambaForCausalLM

    MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1)).save_pretrained(tmp_path)
    result = run("doctor", str(tmp_path), "--json")
    report = json.loads(result.stdout)
    assert report["tier"] == "none"
    assert report["reason"]
    assert report["curve"] == []


# ---- mistakes -----------------------------------------------------------------------------------------------------


def fails(*args: str, says: str | tuple[str, ...]) -> None:
    """Exit code 2, one line on standard error that says so, nothing on standard output."""
    result = run(*args)
    assert result.exit_code == 2, (result.exit_code, result.stdout, result.stderr, result.exception)
    (line,) = (line for line in result.stderr.splitlines() if not line.startswith("warm-up "))
    assert line.startswith("error: "), result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    for part in (says,) if isinstance(says, str) else says:
        assert part in line, line


# mistakes show before a model is looked for
GENERATE = ["generate", "/no/such/model", "--drafter", "token-recycling", "--prompt", "a", "--set"]


@pytest.mark.parametrize(("args", "says"), [
    (["generate"], ("--prompt", "--file")),
    (["generate", "--prompt", "a", "--file", "b"], ("--prompt", "not both")),
    (["generate", "--prompt", " \n"], ("--prompt", "empty")),
    (["generate", "--file", "/no/such/file"], ("--file /no/such/file", "No such file")),
    (["generate", "--prompt", "a", "--drafter", "promt-lookup"], ("'promt-lookup'", "did you mean prompt-lookup")),
    (["generate", "--prompt", "a", "--verifier", "standart"], ("'standart'", "did you mean standard")),
    (["generate", "--prompt", "a", "--set", "typical.epsilon=0.2"], ("typical was not chosen", "--verifier typical")),
    (
        ["generate", "--prompt", "a", "--verifier", "typical", "--set", "typical.epsilon=2"],
        ("epsilon=2", "at most 1"),
    ),
    (["generate", "--prompt", "a", "--verifier", "typical", "--set", "typical.eps=1"], ("no option 'eps'",)),
    (
        ["generate", "tiny-draft", "--prompt", "a", "--drafter", "medusa"],
        ("needs heads trained for this model", "--set medusa.checkpoint=FOLDER"),
    ),
    (["bench", "--drafters", "typical=suffix"], ("'typical' already names something else",)),
    (["generate", "--prompt", "a", "--dtype", "float23"], ("--dtype 'float23'", "float32")),
    (["generate", "--prompt", "a", "--device", "gpu"], ("--device 'gpu'", "cpu")),
    (["generate", "--prompt", "a", "--temperature", "-1"], ("--temperature", "0 is greedy")),
    (["generate", "--prompt", "a", "--temperature", "nan"], ("--temperature", "0 is greedy")),
    (["generate", "--prompt", "a", "--max-new-tokens", "0"], ("--max-new-tokens",)),
    (["generate", "/no/such/model", "--prompt", "a"], ("MODEL '/no/such/model'", "no such folder", "`tiny`")),
    (["generate", "tinny", "--prompt", "a"], ("MODEL 'tinny'", "did you mean tiny")),
    (["generate", "nobody/nothing", "--prompt", "a"], ("MODEL 'nobody/nothing'", "hub")),
    (["doctor", "/no/such/model"], ("MODEL '/no/such/model'", "no such folder")),
    (["bench", "--drafters", "none,nome"], ("'nome'", "did you mean none")),
    (["bench", "--drafters", "none,,none"], ("--drafters", "empty name")),
    (["bench", "--verifier", "tipical"], ("'tipical'", "specdec list")),
    (["bench", "--baselines", "hf-genrate"], ("--baselines 'hf-genrate'", "did you mean hf-generate")),
    (["bench", "--temperature", "0,warm"], ("--temperature '0,warm'", "0,1")),
    (["bench", "--temperature", "-1"], ("--temperature '-1'",)),
    (["bench", "--prompts", "/no/such/file"], ("--prompts /no/such/file", "No such file", "embedded")),
    (["list", "--options", "token-recyclin"], ("--options 'token-recyclin'", "did you mean token-recycling")),
    ([*GENERATE, "size"], ("--set 'size'", "DRAFTER.OPTION=VALUE")),
    ([*GENERATE, "token-recycling.size"], ("--set 'token-recycling.size'", "DRAFTER.OPTION=VALUE")),
    ([*GENERATE, "size=4"], ("--set 'size=4'", "DRAFTER.OPTION=VALUE")),
    ([*GENERATE, "token-recycling.=4"], ("DRAFTER.OPTION=VALUE",)),
    ([*GENERATE, "token-recyclin.size=4"], ("'token-recyclin'", "did you mean token-recycling")),
    ([*GENERATE, "token-recycling.sise=4"], ("no option 'sise'", "did you mean size", "scope, table")),
    ([*GENERATE, "token-recycling.size=big"], ("size takes int | None, not 'big'",)),
    ([*GENERATE, "token-recycling.size=true"], ("size takes int | None, not 'true'",)),
    ([*GENERATE, "token-recycling.size=1.5"], ("size takes int | None, not '1.5'",)),
    ([*GENERATE, "token-recycling.size=0"], ("token-recycling: size=0",)),
    ([*GENERATE, "token-recycling.scope=all"], ("scope takes Literal['shared', 'request'], not 'all'",)),
    ([*GENERATE, "token-recycling.paths=1,2"], ("paths takes", "not '1,2'")),
    ([*GENERATE, "token-recycling.table=/no/such"], ("table '/no/such'", "no such file")),
    ([*GENERATE, "none.size=4"], ("none was not chosen", "--drafter (token-recycling)")),
    ([*GENERATE, "none.size=4", "--drafter", "none"], ("none has no options",)),
    ([*GENERATE, "draft-model.draft=x", "--drafter", "draft-model"], ("given by --draft-model",)),
    (["bench", "--drafters", "none", "--set", "token-recycling.size=4"], ("was not chosen", "--drafters (none)")),
    (["bench", "--drafters", "a=none", "--set", "none.size=4"], ("none was not chosen", "--drafters (a)")),
    (["bench", "--drafters", "a=nome"], ("'nome'", "did you mean none")),
    (["bench", "--drafters", "a=none,a=token-recycling"], ("'a' already names something else",)),
    (["bench", "--drafters", "hf-generate=none"], ("'hf-generate' already names something else",)),
    (["bench", "--drafters", "none=token-recycling"], ("'none' already names something else",)),
    (["bench", "--drafters", "=none"], ("no label before the =",)),
    (["bench", "--warm", "--repeats", "2"], ("--warm", "--repeats 1")),
    (["bench", "--limit", "0"], ("--limit",)),
    (["bench", "--wat"], ("--wat",)),
    (["benhc"], ("benhc", "bench")),
])  # fmt: skip
def test_bad_arguments_get_one_line(args: list[str], says: tuple[str, ...]):
    fails(*args, says=says)


@pytest.mark.parametrize("out", ["/proc/nothing/here", "FILE/below"])
def test_an_unwritable_out_is_refused_before_anything_is_loaded(out: str, tmp_path: Path):
    (tmp_path / "file").write_text("")
    out = out.replace("FILE", str(tmp_path / "file"))
    fails("bench", "/no/such/model", "--out", out, says=(f"--out {out}", "cannot write", "another folder"))


def test_a_malformed_prompt_file_is_refused_before_anything_is_loaded(tmp_path: Path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    fails("bench", "/no/such/model", "--prompts", str(tmp_path / "p.jsonl"), says=("p.jsonl:2: not JSON", "{"))


def test_a_prompt_longer_than_the_context_is_refused(checkpoint: str, tmp_path: Path):
    fails("generate", checkpoint, "--prompt", "a" * 256, says=("--prompt", "256 tokens", "context is 256", "255"))
    file = tmp_path / "p.txt"
    file.write_text("fine\n" + "a" * 250 + "\n")
    arguments = ["bench", checkpoint, "--prompts", str(file), *SHORT]
    fails(*arguments, says=("p.txt:2", "250 tokens", "--max-new-tokens 12", "256"))


def test_a_draft_of_another_vocabulary_is_refused(checkpoint: str, tmp_path: Path):
    other = save(tmp_path, vocab_size=VOCABULARY - 1)
    arguments = [checkpoint, "--draft-model", other]
    fails("generate", *arguments, "--prompt", "a", "--drafter", "draft-model", says=("98 tokens", "99"))
    fails("bench", *arguments, "--drafters", "none", "--prompts", __file__, "--limit", "1", says=("98 tokens", "99"))


def test_drafting_with_a_model_needs_one(checkpoint: str):
    fails("generate", checkpoint, "--prompt", "a", "--drafter", "draft-model", says="needs --draft-model")


def test_damaged_checkpoints_are_told_apart(checkpoint: str, tmp_path: Path):
    model = tiny_llama(vocab_size=VOCABULARY)
    (tmp_path / "empty").mkdir()
    fails("doctor", str(tmp_path / "empty"), says=("MODEL", "no config.json", "save_pretrained"))
    fails("doctor", __file__, says=("MODEL", "this is a file"))

    cut = save(tmp_path / "cut")
    weights = Path(cut, "model.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    fails("doctor", cut, says=(f"MODEL '{cut}'", "cannot be read", "damaged"))
    weights.unlink()
    fails("doctor", cut, says=(f"MODEL '{cut}'", "cannot be read", "missing"))
    Path(cut, "config.json").write_text("{")
    fails("doctor", cut, says=(f"MODEL '{cut}'", "cannot be read"))

    state = model.state_dict()
    del state["model.layers.1.mlp.up_proj.weight"]
    model.save_pretrained(tmp_path / "part", state_dict=state)
    fails("doctor", str(tmp_path / "part"), says=("lacks 1 of the model's weights", "up_proj"))

    tiny_llama(vocab_size=VOCABULARY).save_pretrained(tmp_path / "mute")
    fails("generate", str(tmp_path / "mute"), "--prompt", "a", says=("tokenizer", "save_pretrained"))


def test_logits_that_are_not_numbers_are_one_clear_error(tmp_path: Path):
    model = tiny_llama(vocab_size=VOCABULARY, tie_word_embeddings=False)
    (letter,) = byte_tokenizer()("Z").input_ids
    with torch.no_grad():
        model.model.embed_tokens.weight[letter] = float("nan")  # only texts with a Z are hit
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    fails("generate", str(tmp_path), "--prompt", "aZ", *SHORT, says=("logit is nan", "float32"))
    file = tmp_path / "p.txt"
    file.write_text("aZ\n")
    arguments = ["bench", str(tmp_path), "--drafters", "none", "--prompts", str(file), *SHORT]
    fails(*arguments, says=("logit is nan", "float32"))


def test_a_chat_template_is_used_or_missed_clearly(checkpoint: str, tmp_path: Path):
    fails("generate", checkpoint, "--prompt", "a", "--chat", says=("--chat", "no chat template"))
    tiny_llama(vocab_size=VOCABULARY).save_pretrained(tmp_path)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    chat = json.loads(run("generate", str(tmp_path), "--prompt", "a", "--chat", *SHORT, "--json").stdout)
    plain = json.loads(run("generate", checkpoint, "--prompt", "[a]", *SHORT, "--json").stdout)
    assert chat["ids"] == plain["ids"]


# ---- the embedded model -------------------------------------------------------------------------------------------


def test_the_embedded_model_is_the_default_and_brings_its_own_draft():
    result = run("bench", "--limit", "1", "--max-new-tokens", "8", "--json", "--drafters", "draft-model")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["settings"]["draft_model"] == "tiny-draft"
    names = [row["name"] for row in report["rows"]]
    assert names == ["hf-generate", "hf-prompt-lookup", "hf-assisted", "draft-model"]
    assert all(row["equal"] for row in report["rows"])
