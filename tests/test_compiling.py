"""Compiled steps: the same text, no compiler inside a request, and a reason wherever there are none."""

from __future__ import annotations

import shutil

import pytest
import torch
from conftest import left_padded, new_tokens
from heads_suite import random_head
from tiny_models import tiny_gemma2, tiny_llama
from torch._dynamo.utils import counters
from transformers import BloomConfig, BloomForCausalLM

from specdec import Decoder, compiling
from specdec.cli import common
from specdec.errors import CompatibilityError, UsageError
from specdec.target import Target

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
PROMPT = {"input_ids": torch.tensor([[5, 9, 33, 5, 9, 33, 5, 9]])}
GREEDY = {"do_sample": False, "max_new_tokens": 60}


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma2])
def test_compiled_steps_leave_the_text_alone_and_compile_nothing_more(make):
    model = make()
    want = new_tokens(model, PROMPT, **GREEDY)
    # one at a time: another Decoder on the same model costs the earlier ones a compilation
    for name in ("none", "token-recycling", "lookahead", "suffix"):
        decoder = Decoder(model, name, compile="inductor")
        assert decoder.target.compilation.mode == "inductor"
        before = graphs()
        for _ in range(2):
            assert new_tokens(decoder, PROMPT, **GREEDY) == want, name
        if name != "lookahead":  # its steps carry probes and run uncompiled
            assert graphs() == before, f"{name}: a request waited for the compiler"
        assert decoder.stats.compilation.startswith("inductor")
    # rows of a batch, of different lengths
    rows = left_padded([torch.tensor([5, 9, 33, 5, 9]), torch.tensor([7, 8])])
    assert new_tokens(decoder, rows, **GREEDY) == new_tokens(model, rows, **GREEDY)


def test_a_graph_without_taps_does_not_serve_a_drafter_that_needs_them():
    model = tiny_llama()
    want = new_tokens(model, PROMPT, **GREEDY)
    assert new_tokens(Decoder(model, compile="inductor"), PROMPT, **GREEDY) == want
    medusa = Decoder(model, "medusa", checkpoint=random_head("medusa", Target(model)), compile="inductor")
    assert new_tokens(medusa, PROMPT, **GREEDY) == want
    assert new_tokens(Decoder(model, "suffix", compile="inductor"), PROMPT, **GREEDY) == want
    assert new_tokens(medusa, PROMPT, **GREEDY) == want


def test_a_draft_model_is_compiled_too():
    model = tiny_llama()
    decoder = Decoder(model, "draft-model", draft=tiny_llama(seed=1), branching=(2, 2, 1), compile="inductor")
    assert decoder.drafter.draft.compilation.mode == "inductor"
    before = graphs()
    assert new_tokens(decoder, PROMPT, **GREEDY) == new_tokens(model, PROMPT, **GREEDY)
    assert graphs() == before


@pytest.mark.parametrize(
    ("message", "shown"), [("no such backend\nsecond line", "no such backend"), ("", "no message")]
)
def test_auto_falls_back_with_the_reason(message: str, shown: str, monkeypatch: pytest.MonkeyPatch):
    def broken(*args, **kwargs):
        raise RuntimeError(message)

    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: broken)
    decoder = Decoder(tiny_llama(), compile="auto")
    assert decoder.target.compilation == compiling.Compilation("off", f"compiling fails (RuntimeError: {shown})")
    assert new_tokens(decoder, PROMPT, **GREEDY) == new_tokens(decoder.model, PROMPT, **GREEDY)
    with pytest.raises(CompatibilityError, match=rf"{shown}.*use compile='off'"):
        Decoder(tiny_llama(), compile="inductor")


def test_wrong_logits_are_noticed(monkeypatch: pytest.MonkeyPatch):
    def slightly_wrong(forward, **kwargs):
        def run(**inputs):
            output = forward(**inputs)
            output.logits = output.logits.roll(1, dims=1) if output.logits.shape[1] > 1 else output.logits
            return output

        return run

    monkeypatch.setattr(torch, "compile", slightly_wrong)
    assert "its logits are off by" in Decoder(tiny_llama(), compile="auto").target.compilation.reason


def test_what_stands_in_the_way_is_said(monkeypatch: pytest.MonkeyPatch):
    bloom = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)).eval()
    assert "row by row" in Decoder(bloom, compile="auto").target.compilation.reason
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "C++ compiler" in Decoder(tiny_llama(), compile="auto").target.compilation.reason


def test_an_unknown_mode_is_refused_before_anything_else():
    with pytest.raises(UsageError, match="compile='graph' must be one of 'off', 'auto', 'inductor', 'graphs'"):
        Decoder(tiny_llama(), compile="graph")
    assert common.COMPILE == compiling.MODES
