"""The proposer for vLLM, called as vLLM's runner calls it, with and without vLLM."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import tiny_llama

import specdec
from specdec import zoo
from specdec.bench.vllm.proposers import VllmArm, speculations
from specdec.decoder import Decoder
from specdec.drafters.suffix import Suffix
from specdec.errors import CompatibilityError, UsageError
from specdec.tree import DraftTree, Topology
from specdec.vllm import Proposer, best_path

V, K, LENGTH = 64, 4, 128
ALONE: dict[str, dict[str, Any]] = {  # drafts depend on the request's own text
    "prompt-lookup": {"drafter": "prompt-lookup"},
    "suffix": {"drafter": "suffix", "scope": "request"},
    "aded": {"drafter": "aded", "scope": "request", "rows": 4096},
}


def vllm_config(options: Any = None, k: int = K, length: int = LENGTH, tokenizer: Path | None = None) -> Any:
    """What the proposer reads of vLLM's configuration."""
    model = SimpleNamespace(
        tokenizer=str(tokenizer),
        tokenizer_revision=None,
        trust_remote_code=False,
        skip_tokenizer_init=tokenizer is None,
        max_model_len=length,
        hf_text_config=SimpleNamespace(eos_token_id=1),
        try_get_generation_config=lambda: {"eos_token_id": [1]},
        get_vocab_size=lambda: V,
    )
    return SimpleNamespace(
        additional_config={} if options is None else {"specdec": options},
        model_config=model,
        device_config=SimpleNamespace(device_type="cpu"),
        speculative_config=SimpleNamespace(num_speculative_tokens=k),
    )


def repetitive(seed: int, n: int) -> list[int]:
    """A text that copies itself often, with mistakes."""
    rng = random.Random(seed)
    text = [rng.randrange(2, 12) for _ in range(12)]
    while len(text) < n:
        start = rng.randrange(len(text) - 6)
        text += text[start : start + rng.randrange(3, 7)]
        text.append(rng.randrange(2, 12))
    return text[:n]


@dataclass
class Request:
    """``text`` is what the target writes; the first ``n`` tokens exist, ``prompt`` of them were given."""

    text: list[int]
    prompt: int
    n: int = 0
    chunks: int = 1
    drafts: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.n = self.prompt

    @property
    def done(self) -> bool:
        return self.n == len(self.text)


class Runner:
    """vLLM's side: one row per running request in arrays that are written over, and rows that move."""

    def __init__(self, proposer: Proposer, rows: int = 4, length: int = LENGTH):
        self.proposer = proposer
        self.texts = np.zeros((rows, length), dtype=np.int32)
        self.lengths = np.zeros(rows, dtype=np.int32)
        self.rows: list[Request] = []

    def step(self) -> list[list[int]]:
        """Every row gains its accepted drafts and one token more; then the proposer is asked."""
        sampled = [self.advance(request) for request in self.rows]
        for i, request in enumerate(self.rows):  # as after any reordering of the batch
            self.texts[i, : request.n] = request.text[: request.n]
            self.lengths[i] = request.n
        drafts = self.proposer.propose(sampled, self.lengths, self.texts, slot_mappings=None)
        for request, drafted in zip(self.rows, drafts, strict=True):
            request.drafts = drafted
        return drafts

    @staticmethod
    def advance(request: Request) -> list[int]:
        if request.chunks > 1:
            request.chunks -= 1
            return []
        rest = request.text[request.n :]
        accepted = 0
        while accepted < min(len(request.drafts), len(rest) - 1) and request.drafts[accepted] == rest[accepted]:
            accepted += 1
        request.n += accepted + 1
        return rest[: accepted + 1]

    def write(self, request: Request) -> list[list[int]]:
        """A request by itself from beginning to end; its drafts."""
        self.rows, found = [request], []
        while not request.done:
            found += self.step()
        self.rows = []
        return found


def first_drafts(proposer: Proposer, text: list[int]) -> list[int]:
    """What is drafted for a request that begins with this text."""
    return Runner(proposer).write(Request(text, len(text) - 1))[0]


@pytest.mark.parametrize("name", ALONE)
def test_rows_that_move_end_and_come_back_get_the_drafts_of_their_own_text(name):
    runner, alone = Runner(Proposer(vllm_config(ALONE[name]))), Proposer(vllm_config(ALONE[name]))
    rng = random.Random(1)
    waiting = [Request(repetitive(seed, 100), 20, chunks=1 + seed % 3) for seed in range(8)]
    twins = [Request(repetitive(99, 60), 20) for _ in range(2)]  # of the same text
    waiting[3:3] = twins
    preempted: list[Request] = []
    seen = {"drafted": 0, "several": 0, "rejected": 0, "partly": 0}
    while waiting or preempted or runner.rows:
        runner.rows = [request for request in runner.rows if not request.done]
        if runner.rows and rng.random() < 0.1:
            gone = runner.rows.pop(rng.randrange(len(runner.rows)))
            gone.drafts, gone.chunks = [], 2  # its text is read again
            preempted.append(gone)
        elif preempted and len(runner.rows) < 4 and rng.random() < 0.5:
            runner.rows.append(preempted.pop())
        while waiting and len(runner.rows) < 4:
            runner.rows.insert(rng.randrange(len(runner.rows) + 1), waiting.pop(0))
        if rng.random() < 0.3:
            rng.shuffle(runner.rows)
        before = [(request.n, len(request.drafts)) for request in runner.rows]
        for request, drafted, (n, asked) in zip(runner.rows, runner.step(), before, strict=True):
            gained = request.n - n
            if not gained:
                assert drafted == []
                continue
            assert drafted == first_drafts(alone, request.text[: request.n])
            assert len(drafted) <= K
            seen["drafted"] += bool(drafted)
            seen["several"] += gained > 2
            seen["rejected"] += asked > 0 and gained == 1
            seen["partly"] += 1 < gained <= asked
    assert min(seen.values()) > 3, seen


@pytest.mark.parametrize("name", ["prompt-lookup", "suffix", "aded"])
def test_drafts_are_the_best_paths_of_the_decoders_trees_on_the_same_text(name):
    """Steps as the Decoder took them; as deep as its trees."""
    model = tiny_llama(V)
    model.generation_config.eos_token_id = 1
    decoder = Decoder(model, name)
    trees: list[tuple[list[int], DraftTree]] = []
    propose = decoder.drafter.propose

    def recorded(state):
        proposals = propose(state)
        trees.append((state.rows[0].tokens.tolist(), proposals[0].tree))
        return proposals

    decoder.drafter.propose = recorded  # type: ignore[method-assign]
    prompt = repetitive(5, 40)
    decoder.generate(torch.tensor([prompt]), max_new_tokens=LENGTH - 40, do_sample=False)
    proposer = Proposer(vllm_config({"drafter": name}, k=LENGTH))
    rows, compared = np.zeros((1, LENGTH), dtype=np.int32), 0
    for (before, _), (text, tree) in pairwise(trees):
        rows[0, : len(text)] = text
        [drafted] = proposer.propose([text[len(before) :]], np.array([len(text)]), rows)
        assert drafted == likeliest(tree)
        compared += bool(drafted)
    assert compared > 3


def likeliest(tree: DraftTree) -> list[int]:
    """By trying every node's path."""

    def gain(node: int) -> float:
        path = tree.topology.path(node)
        return sum(float(np.prod(tree.prior[path[: i + 1]].astype(np.float64))) for i in range(len(path)))

    best = max(range(len(tree)), key=lambda v: round(gain(v), 9))
    return tree.tokens[tree.topology.path(best)].tolist() if best else []


def test_the_best_path_is_the_one_of_the_largest_sum_of_chances():
    #  0 - 1 (.5)                         .5
    #    - 2 (.4) - 3 (.9) - 4 (.1)       .4 + .36 + .036
    tree = DraftTree(
        Topology([-1, 0, 0, 2, 3]), np.array([9, 11, 12, 13, 14]), prior=np.float32([1, 0.5, 0.4, 0.9, 0.1])
    )
    assert best_path(tree) == [12, 13, 14]
    assert best_path(DraftTree.root(3)) == []


@pytest.mark.parametrize("name", ALONE)
def test_nothing_is_drafted_beyond_the_longest_text_vllm_takes(name):
    proposer = Proposer(vllm_config(ALONE[name], length=32))
    for n in range(20, 33):
        assert len(first_drafts(proposer, ([2, 3, 4, 5] * 8)[:n])) == min(K, max(32 - n - 1, 0))


def test_a_text_with_nothing_to_copy_gets_an_empty_list():
    proposer = Proposer(vllm_config(ALONE["suffix"]))
    assert first_drafts(proposer, list(range(2, 30))) == []


def test_a_missed_call_restarts_the_request_from_its_text():
    """vLLM does not ask while any row is near the longest text."""
    proposer, text = Proposer(vllm_config({"drafter": "suffix"})), repetitive(3, 60)
    rows = np.array([text], dtype=np.int32)
    for n in (30, 31, 40, 41):
        [drafted] = proposer.propose([[text[n - 1]]], np.array([n]), rows)
        assert drafted == first_drafts(Proposer(vllm_config(ALONE["suffix"])), text[:n])


def test_finished_requests_teach_later_ones_their_outputs_and_never_their_prompts():
    proposer = Proposer(vllm_config({"drafter": "suffix"}))
    runner = Runner(proposer)
    prompt, output = list(range(2, 30)), list(range(30, 60))
    assert not any(runner.write(Request(prompt + output, len(prompt))))
    assert proposer.drafter.table.documents == []  # vLLM has not said yet that it is over
    again = runner.write(Request(prompt[:9] + output, 9))
    assert [list(d) for d in proposer.drafter.table.documents] == [output]
    assert any(again)
    turn = prompt[:9] + output + prompt + output  # a conversation goes on: the prompt begins with a known text
    runner.write(Request(turn, len(turn) - len(output)))
    runner.write(Request(prompt, len(prompt) - 1))
    assert [list(d) for d in proposer.drafter.table.documents] == [output, output, output]


def test_a_preempted_request_teaches_its_output_once():
    proposer = Proposer(vllm_config({"drafter": "suffix"}))
    runner, other = Runner(proposer), Request(repetitive(1, 90), 20)
    request = Request(list(range(2, 40)), 10)
    runner.rows = [request, other]
    for _ in range(9):
        runner.step()
    runner.rows = [other]
    runner.step()
    request.drafts = []
    runner.rows = [request, other]
    while not request.done:
        runner.step()
    runner.rows = [other]
    runner.step()
    assert np.concatenate(proposer.drafter.table.documents).tolist() == request.text[10:]


def test_running_requests_share_what_adapts_to_the_text():
    """aded's table is written at once; with scope="request" by its own text only."""
    text = repetitive(7, 50)
    for options, shares in (({"drafter": "aded"}, True), (ALONE["aded"], False)):
        runner = Runner(Proposer(vllm_config(options)))
        runner.rows = [Request(text, 48), Request([20, *text[10:12], 5], 3)]
        drafts = runner.step()
        assert bool(drafts[1]) is False  # its last token is its own
        runner.rows = [runner.rows[0], Request([21, *text[10:12]], 2)]
        assert bool(runner.step()[1]) is shares


def test_members_of_a_hybrid_serve_every_row_from_its_own_text():
    runner = Runner(Proposer(vllm_config({"drafter": "hybrid", "scope": "request"})))
    low = repetitive(2, 100)
    runner.rows = [Request(low, 30), Request([token + 30 for token in repetitive(3, 100)], 30)]
    drafts = [runner.step() for _ in range(12)]
    first, second = ({token for row in rows for token in row} for rows in zip(*drafts, strict=True))
    assert first <= set(low)
    assert min(second) > max(low)


def test_hybrid_learns_from_what_vllm_accepted():
    proposer = Proposer(vllm_config({"drafter": "hybrid"}))
    assert not proposer.drafter.mixture.tried.any()  # the rehearsal leaves no trace
    assert any(Runner(proposer).write(Request(repetitive(2, 100), 30)))
    assert proposer.drafter.mixture.accepted.any()


def test_token_recycling_needs_a_table_and_then_only_reads_it(tmp_path, tokenizer):
    with pytest.raises(CompatibilityError, match=r"token-recycling.*tokens only.*with a table"):
        Proposer(vllm_config({"drafter": "token-recycling"}))
    tokenizer.save_pretrained(tmp_path)
    teacher = Decoder(tiny_llama(V), "token-recycling", tokenizer=tokenizer)
    teacher.generate(torch.tensor([repetitive(4, 40)]), max_new_tokens=20, do_sample=False)
    teacher.drafter.save(tmp_path / "table")
    options = {"drafter": "token-recycling", "table": str(tmp_path / "table")}
    proposer = Proposer(vllm_config(options, tokenizer=tmp_path))
    known = proposer.drafter.table.arrays()
    assert any(Runner(proposer).write(Request(repetitive(4, 60), 20)))
    successors = max(known, key=lambda name: known[name].size)
    assert (proposer.drafter.table.arrays()[successors] == known[successors]).all()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"drafter": "sufix"}, "unknown drafter 'sufix'.*suffix"),
        ({"drafter": "suffix", "sise": 3}, "specdec.sise is no option of drafter 'suffix'; it takes size, alpha"),
        ({"drafter": "suffix", "size": 0}, "size=0 must be at least 1"),
        ("suffix", "specdec='suffix' must be an object"),
        ({"drafter": "jacobi"}, "'jacobi' asks for the target's.*take suffix, prompt-lookup"),
        ({"drafter": "lookahead"}, "'lookahead' asks for the target's.*take suffix, prompt-lookup"),
        ({"drafter": "aded", "logit_update": 2}, "'aded' asks for the target's"),
        ({"drafter": "lexical-units", "mode": "trusting"}, "unverified"),
    ],
)
def test_what_cannot_work_is_refused_when_the_engine_starts(options, says):
    with pytest.raises((UsageError, CompatibilityError), match=says):
        Proposer(vllm_config(options))


def test_without_options_it_is_the_suffix_drafter():
    assert isinstance(Proposer(vllm_config()).drafter, Suffix)


def vllm_python() -> Path | None:
    named = os.environ.get("SPECDEC_VLLM_PYTHON")
    python = Path(named) if named else Path(specdec.__file__).parents[1] / ".venv-vllm" / "bin" / "python"
    return python if python.exists() else None


@pytest.mark.slow
@pytest.mark.skipif(vllm_python() is None, reason="no vLLM: neither .venv-vllm nor SPECDEC_VLLM_PYTHON")
def test_vllm_writes_the_same_greedy_text_with_our_drafters(tmp_path):
    python = vllm_python()
    assert python is not None
    _, tokenizer = zoo.load("tiny")
    prompts = [tokenizer(p.prompt).input_ids for p in zoo.prompts("tiny")[::12]]
    texts = {}
    for name in ("vllm", "vllm+suffix", "vllm+hybrid"):
        speculative, additional = speculations(5)[name]
        engine = {
            "model": str(zoo.path("tiny")),
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 512,
            "disable_log_stats": False,
            "speculative_config": speculative,
            "additional_config": additional,
        }
        arm = VllmArm(name, python, engine, 1, tmp_path)
        try:
            texts[name] = [arm._ask(prompt=ids, max_new_tokens=48)["ids"] for ids in prompts]
            about = arm._ask(prompt=prompts[0], max_new_tokens=48)
        finally:
            arm.close()
        if name != "vllm":
            assert texts[name] == texts["vllm"]
            assert about["accepted"] > 0
