"""`specdec table` and `specdec bench-tables`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_cli import fails, run, save
from tiny_models import tiny_llama

from specdec import registry
from specdec.bench import tables
from specdec.bench.tables import NeedsModel, PlainStep, Simulation, StandIn, Text, growth, measure
from specdec.cli.table import documents
from specdec.contracts import Drafter
from specdec.drafters.token_recycling import TokenRecycling
from specdec.errors import UsageError
from specdec.structure import Needs
from specdec.tables import store
from specdec.tree import DraftTree, ProbeLayout, Probes, Proposal, Topology

TEXT = "Once upon a time\n<|endoftext|>\nNo more.\nReally none.\n<|endoftext|>\n \n<|endoftext|>\nthe end"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """A random model with a tokenizer on disk."""
    return save(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("corpus") / "c.txt"
    file.write_text(TEXT)
    return file


def build(checkpoint: str, corpus: Path | str, out: Path | str, *more: str, drafter: str = "token-recycling"):
    return ["table", "build", checkpoint, "--drafter", drafter, "--corpus", str(corpus), "--out", str(out), *more]


# ---- corpora ------------------------------------------------------------------------------------------------------


def test_documents_of_text_files_end_with_a_line_or_with_the_file(tmp_path: Path):
    (tmp_path / "b.txt").write_text(TEXT)
    (tmp_path / "a.txt").write_text("one\n\ndocument with <|endoftext|> inside\n")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "c.jsonl").write_text('{"text": "x", "body": "y"}\n\n{"text": "z", "body": "w"}\n')
    (tmp_path / "notes.md").write_text("not read")
    first = ["one\n\ndocument with <|endoftext|> inside\n"]
    second = ["Once upon a time\n", "No more.\nReally none.\n", "the end"]
    assert list(documents(tmp_path / "a.txt", "text")) == first
    assert list(documents(tmp_path / "b.txt", "text")) == second
    assert list(documents(tmp_path / "deep", "body")) == ["y", "w"]
    assert list(documents(tmp_path, "text")) == [*first, *second, "x", "z"]


@pytest.mark.parametrize(("name", "content", "says"), [
    ("c.jsonl", '{"text": "a"}\n{broken\n', "c.jsonl:2: not JSON"),
    ("c.jsonl", '{"text": "a"}\n["b"]\n', "c.jsonl:2: no text under 'text' (a list)"),
    ("c.jsonl", '{"body": "a"}\n', "c.jsonl:1: no text under 'text' (keys: body); name the key with --field"),
    ("c.txt", b"\xff\xfe", "not UTF-8"), ("c.md", "text", "neither .txt nor .jsonl"),
])  # fmt: skip
def test_a_malformed_corpus_is_named_by_file_and_line(tmp_path: Path, name: str, content: str | bytes, says: str):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError) as caught:
        list(documents(file, "text"))
    assert says in str(caught.value)
    # and before any model is looked for
    fails(*build("/no/such/model", file, tmp_path / "t"), says=says)


# ---- table --------------------------------------------------------------------------------------------------------


def test_a_built_table_serves_generate_and_bench(checkpoint: str, corpus: Path, tmp_path: Path):
    out = tmp_path / "t.safetensors"
    result = run(*build(checkpoint, corpus, out))
    assert result.exit_code == 0, result.stderr
    assert "token-recycling" in result.stdout
    assert "documents 3 tokens" in " ".join(result.stdout.split())

    arguments = ["generate", checkpoint, "--prompt", "Once upon a", "--max-new-tokens", "12", "--json"]
    arguments += ["--drafter", "token-recycling"]
    plain, served = (
        json.loads(run(*arguments, *more).stdout) for more in ([], ["--set", f"token-recycling.table={out}"])
    )
    assert served["ids"] == plain["ids"]
    assert served["options"] == {"table": str(out)}

    (tmp_path / "p.txt").write_text("Once upon a time\nNo more.\n")
    arguments = ["bench", checkpoint, "--drafters", "cold=token-recycling,filled=token-recycling", "--json",
                 "--baselines", "hf-generate", "--prompts", str(tmp_path / "p.txt"), "--max-new-tokens", "8",
                 "--set", f"filled.table={out}"]  # fmt: skip
    for extra, states in (([], ["cold", "corpus"]), (["--warm"], ["warm", "corpus+warm"])):
        report = json.loads(run(*arguments, *extra).stdout)
        assert [row["state"] for row in report["rows"]] == [None, *states]
        assert all(any(note.startswith(f"{state}: ") for note in report["notes"]) for state in states)


def test_build_learns_the_documents_it_was_given_and_no_more(checkpoint: str, corpus: Path, tmp_path: Path):
    seen = []
    for limit in ("1", "2", "3"):
        assert run(*build(checkpoint, corpus, tmp_path / limit, "--limit", limit)).exit_code == 0
        header = store.header(tmp_path / limit)
        arrays, _ = store.read(tmp_path / limit, header["kind"], header["fingerprint"], header["vocab_size"])
        seen.append(int(arrays["seen"].sum()))
    assert 0 < seen[0] < seen[1] < seen[2]


def test_info_tells_what_a_file_is(checkpoint: str, corpus: Path, tmp_path: Path):
    out = tmp_path / "t"
    run(*build(checkpoint, corpus, out, "--set", "token-recycling.k=4"))
    found = json.loads(run("table", "info", str(out), "--json").stdout)
    assert (found["kind"], found["vocab_size"]) == ("token-recycling", 99)
    assert found["facts"]["k"] == 4
    assert found["shapes"]["successors"] == [99, 4]
    assert found["bytes"] == out.stat().st_size
    assert "token-recycling" in run("table", "info", str(out)).stdout
    fails("table", "info", str(tmp_path / "no"), says=("no such file", "table build"))
    out.write_bytes(out.read_bytes()[:100])
    fails("table", "info", str(out), says="cut short")


def test_merge_holds_what_its_parts_hold(checkpoint: str, tmp_path: Path):
    parts = []
    for name, text in (("a", "abcdef"), ("b", "uvwxyz")):
        (tmp_path / f"{name}.txt").write_text(text)
        parts.append(str(tmp_path / name))
        run(*build(checkpoint, tmp_path / f"{name}.txt", parts[-1], "--set", "token-recycling.k=4"))
    out = tmp_path / "both"
    result = run("table", "merge", *parts, "--model", checkpoint, "--out", str(out))
    assert result.exit_code == 0, result.stderr
    header = store.header(out)
    seen = [store.read(f, header["kind"], header["fingerprint"], 99)[0]["seen"] for f in (*parts, out)]
    assert not (seen[0] & seen[1]).any()
    assert (seen[2] == (seen[0] | seen[1])).all()


def test_merge_refuses_what_does_not_belong_together(checkpoint: str, corpus: Path, tmp_path: Path):
    other, out = save(tmp_path / "other", vocab_size=120), str(tmp_path / "out")
    one, two, three = (str(tmp_path / n) for n in "123")
    run(*build(checkpoint, corpus, one))
    run(*build(checkpoint, corpus, two, "--set", "token-recycling.k=4"))
    run(*build(other, corpus, three))
    arguments = ["--model", "/no/such/model", "--out", out]
    fails("table", "merge", one, *arguments, says=("two or more",))
    fails("table", "merge", one, str(tmp_path / "no"), *arguments, says="no such file")
    fails("table", "merge", one, two, *arguments, says=("made with k=4", "with k=8"))
    fails("table", "merge", one, three, *arguments, says="of another vocabulary (120)")
    fails("table", "merge", one, one, "--out", str(tmp_path / "no" / "t"), says=("--out", "there is no folder"))
    header = store.header(one)
    arrays, facts = store.read(one, header["kind"], header["fingerprint"], 99)
    store.write(tmp_path / "4", "hybrid", header["fingerprint"], 99, arrays, facts)
    fails("table", "merge", one, str(tmp_path / "4"), *arguments, says="of another drafter (hybrid)")
    store.write(tmp_path / "5", header["kind"], "0" * 64, 99, arrays, facts)
    fails(
        "table", "merge", *[str(tmp_path / "5")] * 2, "--model", checkpoint, "--out", out, says="its tokenizer is not"
    )
    assert not Path(out).exists()


def test_mistakes_in_build_show_before_a_model_is_looked_for(corpus: Path, tmp_path: Path):
    nothing, out = "/no/such/model", tmp_path / "t"
    (tmp_path / "empty.txt").write_text(" \n<|endoftext|>\n\n")
    (tmp_path / "folder").mkdir()
    fails(*build(nothing, tmp_path / "empty.txt", out), says=("--corpus", "no text in it"))
    fails(*build(nothing, tmp_path / "folder", out), says=("--corpus", "no .txt or .jsonl file"))
    fails(*build(nothing, tmp_path / "no.txt", out), says=("--corpus", "no such file"))
    fails(*build(nothing, corpus, tmp_path / "no" / "t"), says=("--out", "there is no folder"))
    fails(*build(nothing, corpus, tmp_path), says=("--out", "this is a folder"))
    fails(*build(nothing, corpus, out, drafter="none"), says=("none: it keeps no table", "token-recycling"))
    fails(*build(nothing, corpus, out, drafter="token-recyclin"), says="did you mean token-recycling")
    fails(*build(nothing, corpus, out, "--set", "token-recycling.kk=4"), says="no option 'kk'")
    fails(*build(nothing, corpus, out, "--limit", "0"), says="--limit")
    fails(*build(nothing, corpus, out), says="MODEL '/no/such/model'")
    assert not out.exists()


def test_documents_without_a_token_are_refused_before_the_model_is_loaded(checkpoint: str, tmp_path: Path):
    (tmp_path / "c.txt").write_text("ééé\n<|endoftext|>\nüüü")
    (Path(save(tmp_path / "model")) / "model.safetensors").unlink()
    fails(*build(str(tmp_path / "model"), tmp_path / "c.txt", tmp_path / "t"), says=("--corpus", "no token of any"))


@pytest.mark.parametrize("moment", ["document", "os.fsync"])
def test_control_c_leaves_no_file(checkpoint: str, corpus: Path, tmp_path: Path, monkeypatch, moment: str):
    out = tmp_path / "t"
    out.write_text("an earlier file")
    learn, calls = TokenRecycling.learn, []

    def interrupted(self, tokens):
        calls.append(len(tokens))
        if len(calls) == 2:
            raise KeyboardInterrupt
        learn(self, tokens)

    def crash(*_):
        raise KeyboardInterrupt

    if moment == "document":
        monkeypatch.setattr(TokenRecycling, "learn", interrupted)
    else:
        monkeypatch.setattr(moment, crash)
    result = run(*build(checkpoint, corpus, out))
    assert result.exit_code == 130
    assert f"after {1 if moment == 'document' else 3} of 3 documents: nothing was saved" in result.stderr
    assert out.read_text() == "an earlier file"
    assert [p.name for p in tmp_path.iterdir()] == ["t"]


# ---- a request loop without a model -------------------------------------------------------------------------------


def test_made_up_text_is_zipfian_repeats_itself_and_is_the_same_for_a_seed():
    text = Text(1000, seed=3).write(20_000)
    assert (text == Text(1000, seed=3).write(20_000)).all()
    assert (text != Text(1000, seed=4).write(20_000)).any()
    assert text.min() >= 0
    assert text.max() < 1000
    counts = np.sort(np.bincount(text, minlength=1000))[::-1]
    assert counts[:10].sum() > 10 * counts[100:110].sum()
    likely = sum(int(text[i + 2]) in Text(1000, seed=3).successors(*text[i : i + 2].tolist()) for i in range(5000))
    assert likely > 0.9 * 5000


class Watching(Drafter):
    """Drafts the two likeliest successors it last saw, and checks that it is served as by the Decoder."""

    name = "watching"
    summary = "checks"
    budget = 3

    def __init__(self):
        self.seen: dict[int, list[int]] = {}
        self.requests = self.accepted = self.fed = 0

    def begin(self, state):
        self.requests += 1
        (row,) = state.rows
        assert len(row.tokens) == tables.PROMPT
        self.fed = 0

    def propose(self, state):
        root = int(state.rows[0].tokens[-1])
        below = self.seen.get(root, [])
        return [Proposal(DraftTree(Topology([-1, *[0] * len(below)]), np.array([root, *below])))]

    def observe(self, state, proposals, output, verdicts):
        (row,), (verdict,), (proposal,) = state.rows, verdicts, proposals
        top, tree = output.top(2), proposal.tree
        # a greedy target: what follows a node on the path is its likeliest token
        for node, token in zip([0, *verdict.path], verdict.emitted, strict=True):
            assert top[0, node, 0] == token
        assert len(output.kept[0]) == len(row.tokens) - 1 - self.fed
        self.fed = len(row.tokens) - 1
        assert state.target.lengths == [self.fed]
        assert output.nodes == [len(tree)]
        assert row.tokens[-len(verdict.emitted) :].tolist() == verdict.emitted
        assert top.flags.c_contiguous, "as the Decoder hands it over"
        self.seen.update({int(t): top[0, v].tolist() for v, t in enumerate(tree.tokens)})
        self.accepted += len(verdict.path)


def test_drafters_are_served_as_by_the_decoder():
    drafter = Watching()
    simulation = Simulation(drafter, 128)
    steps = [simulation.step() for _ in range(1200)]
    assert drafter.requests == sum(step.first for step in steps) > 1
    assert drafter.accepted > 100, "something must be accepted for this test to say anything"
    assert sum(step.emitted for step in steps) == len(steps) + drafter.accepted
    assert all(step.top > 0 for step in steps[1:])


def test_a_measurement_has_sizes_and_times_in_order():
    row = measure("x", lambda: TokenRecycling(size=8), 300, 8, 200, plain_step=0.001)
    assert 1 < row.nodes <= 8
    assert 1 < row.mat <= row.nodes
    assert 0 < row.propose[0] <= row.propose[1]
    assert 0 < row.observe[0] <= row.observe[1]
    assert row.table_bytes is not None
    assert row.table_bytes >= 300 * 8 * 4
    assert row.share == pytest.approx((row.propose[0] + row.observe[0]) / 1000)
    json.dumps(row.to_json(), allow_nan=False)


class Leaking(Watching):
    def propose(self, state):
        self.kept = [*getattr(self, "kept", []), np.zeros(1000)]
        return super().propose(state)


def test_growth_sees_a_leak_and_none_where_there_is_none():
    assert growth(TokenRecycling(size=8), 256, steps=400, after=400)[0] < 100_000
    assert growth(Leaking(), 256, steps=400, after=100)[0] > 400 * 8000


def test_drafters_that_need_a_model_say_why():
    class Reads(Watching):
        needs = Needs(final_hidden=True)

    class Probing(Watching):
        def propose(self, state):
            one = np.zeros(1, dtype=np.int64)
            probes = Probes(ProbeLayout(one, one + 1, np.ones((1, 1), dtype=bool), one), one)
            return [Proposal(DraftTree.root(int(state.rows[0].tokens[-1])), probes)]

    class Asks(Watching):
        def bind(self, target):
            target.model.eval()

    with pytest.raises(NeedsModel, match="hidden states"):
        Simulation(Reads(), 64)
    with pytest.raises(NeedsModel, match="probe columns"):
        Simulation(Probing(), 64).step()
    with pytest.raises(NeedsModel, match="asks the target for 'model'"):
        Simulation(Asks(), 64)
    assert not hasattr(StandIn(64), "logits")


def test_a_plain_step_takes_time_and_leaves_the_model_as_it_was():
    model = tiny_llama(max_position_embeddings=512)
    assert PlainStep(model).seconds(3) > 0
    assert not model.training
    assert model(torch.tensor([[3, 4]])).logits.shape == (1, 2, 64)


# ---- bench-tables -------------------------------------------------------------------------------------------------

TABLES = ["bench-tables", "--vocab", "256", "--steps", "50"]


def test_bench_tables_prints_json_and_writes_its_files(tmp_path: Path):
    result = run(*TABLES, "--drafters", "token-recycling,k4=token-recycling,none", "--size", "8", "--json", "--out",
                 str(tmp_path), "--set", "k4.k=4")  # fmt: skip
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    rows = {row["label"]: row for row in report["rows"]}
    assert list(rows) == ["token-recycling", "k4", "none"]
    assert (rows["token-recycling"]["size"], rows["none"]["size"]) == (8, None)
    assert rows["token-recycling"]["table_bytes"] > rows["k4"]["table_bytes"]
    assert rows["none"]["table_bytes"] is None
    for row in rows.values():
        assert row["vocab_size"] == 256
        assert row["steps"] == 50
        assert row["plain_step"] > 0
        assert 0 < row["share"] < 100
        assert all(0 <= low <= high for low, high in (row["propose"], row["observe"]))
    assert report["partial"] is False
    assert report["skipped"] == {}
    assert report["settings"]["words"] is None
    assert report["settings"]["drafters"]["k4"] == {"drafter": "token-recycling", "options": {"k": 4}}
    assert report["environment"]["cpu"]
    assert json.loads((tmp_path / "tables.json").read_text()) == report
    lines = (tmp_path / "tables.md").read_text().splitlines()
    assert sum(line.startswith(("| token-recycling |", "| k4 |", "| none |")) for line in lines) == 3
    assert "- k4: token-recycling, k=4" in lines
    assert "observe us" in result.stderr


def test_what_needs_a_model_is_left_out_with_the_reason_unless_it_was_named(monkeypatch):
    fails(*TABLES, "--drafters", "draft-model", says=("draft-model", "a smaller model", "without a model"))
    monkeypatch.setattr(registry, "drafter_names", lambda: ["draft-model", "none", "broken"])
    monkeypatch.setattr(registry, "_names", lambda package: ["draft-model", "none", "broken"])
    result = run(*TABLES)
    assert result.exit_code == 0, result.stderr
    assert "draft-model left out: it needs a smaller model" in result.stdout
    assert "broken left out: it cannot be loaded" in result.stdout


def test_an_interrupted_table_shows_what_it_has(monkeypatch):
    step, calls = Simulation.step, []

    def interrupted(self):
        calls.append(1)
        if len(calls) > 100:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Simulation, "step", interrupted)
    result = run(*TABLES, "--drafters", "none,token-recycling", "--size", "4", "--json")
    assert result.exit_code == 130
    report = json.loads(result.stdout)
    assert report["partial"] is True
    assert [row["label"] for row in report["rows"]] == ["none"]


@pytest.mark.parametrize(("args", "says"), [
    (["--vocab", "8192,many"], ("--vocab '8192,many'", "whole number")), (["--vocab", "3"], ("--vocab '3'", "64 up")),
    (["--size", "0"], ("--size '0'", "1 up")), (["--steps", "0"], ("--steps",)),
    (["--drafters", "nome"], ("'nome'", "did you mean none")),
    (["--drafters", "none", "--set", "none.size=4"], ("none has no options",)),
    (["--drafters", "none", "--out", "/proc/nothing"], ("--out /proc/nothing", "cannot write")),
])  # fmt: skip
def test_bad_arguments_of_bench_tables(args: list[str], says: tuple[str, ...]):
    fails("bench-tables", *args, says=says)


def test_a_text_of_few_words_makes_full_trees():
    full = ("--drafters", "aded", "--size", "32", "--set", "aded.min_prob=0", "--json")
    nodes = [json.loads(run(*TABLES, *full, *words).stdout)["rows"][0]["nodes"] for words in ((), ("--words", "8"))]
    assert nodes[1] > 2 * nodes[0]
