"""Steps as graphs: what a replay computes, and when there are none. Without a GPU ``recorder`` stands in for CUDA."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import left_padded, new_tokens, on_gpu
from heads_suite import random_head
from recorder import install, record
from tiny_models import tiny_gemma2, tiny_gpt_oss, tiny_llama, tiny_mistral

from specdec import Decoder, capability, graphs
from specdec.errors import CompatibilityError
from specdec.graphs import Graphs
from specdec.target import Target
from specdec.tree import DraftTree, Proposal, Topology
from specdec.tree_attention import reference, registration
from specdec.tree_attention.step import Step

PROMPT = {"input_ids": torch.tensor([[5, 9, 33, 5, 9, 33, 5, 9]])}
GREEDY = {"do_sample": False, "max_new_tokens": 24}
MODELS = {"llama": tiny_llama, "mistral": tiny_mistral, "gemma2": tiny_gemma2, "gpt_oss": tiny_gpt_oss}


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, step: Step, **options: Any) -> torch.Tensor:
    """The reference, which knows of a step what the kernel reads from memory and nothing else."""
    return reference.tree_attention(query, key, value, replace(step, base=int(step.extent[0, 1])), **options)


@pytest.fixture(autouse=True)
def _recorder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "gpu" in request.keywords:
        return
    registration.register()
    monkeypatch.setattr(capability, "supported", lambda *_: None)
    install(monkeypatch, attend)


def recorded(target: Target) -> int:
    assert isinstance(target.run, Graphs), target.compilation
    return target.run.count


# ---- the recorder ------------------------------------------------------------------------------------------------


def test_the_recorder_repeats_a_computation_on_new_numbers_and_refuses_host_reads():
    x = torch.arange(3.0)
    total = torch.zeros(3)

    def run() -> torch.Tensor:
        total.add_(x)
        return (x * 2).view(3, 1) + 1

    out, replay = record(run, x.device, None)
    x.copy_(torch.tensor([10.0, 20.0, 30.0]))
    total.zero_()
    replay()
    assert out.flatten().tolist() == [21, 41, 61]
    assert total.tolist() == [10, 20, 30]
    for wrong in (lambda: x * x.max().item(), lambda: x + torch.tensor([1.0, 2.0, 3.0]), lambda: x[x > 15]):
        with pytest.raises(RuntimeError, match="number"):
            record(wrong, x.device, None)
    kept = [float(x[0])]  # a number of the host stays what it was
    out, replay = record(lambda: x * kept[0], x.device, None)
    kept[0] = 0.0
    replay()
    assert out.tolist() == [100, 200, 300]


# ---- whole models ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_texts_are_those_of_generate(name: str):
    model = MODELS[name]()
    want = new_tokens(model, PROMPT, **GREEDY)
    for drafter in ("none", "token-recycling", "prompt-lookup"):
        decoder = Decoder(model, drafter, compile="graphs")
        assert decoder.target.compilation.mode == "graphs"
        assert new_tokens(decoder, PROMPT, **GREEDY) == want, drafter
        assert decoder.stats.compilation.startswith("graphs, ")


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_cache_of_every_size_equal_eager_steps(name: str):
    """Random trees of every width after texts of several lengths; the second text of a width is a replay only."""
    g = np.random.default_rng(0)
    target = Target(MODELS[name](max_position_embeddings=512), compile_mode="graphs")
    target.compile()
    for n in (1, 2, 3, 5, 9, 17, 30):
        for length in (7, 21):
            text = g.integers(3, 60, length)
            tree = DraftTree(Topology([-1, *(int(g.integers(0, i)) for i in range(1, n))]), g.integers(3, 60, n))
            results = []
            for run in (target.model, target.run):
                mine, target.run = target.run, run
                with target.session():
                    target.open([0], 64)
                    target.commit(target.step([text], [Proposal(DraftTree.root(int(text[-1])))]), [[]])
                    output = target.step([np.append(text, tree.tokens[0])], [Proposal(tree)])
                    path = tree.topology.path(n - 1)
                    target.commit(output, [path])
                    layers = target.caches[0].layers
                    cached = [t[..., : length + 1 + len(path), :].clone() for x in layers for t in x.buffers()]
                    results.append([output.logits.clone(), *cached])
                target.run = mine
            for eager, graph in zip(*results, strict=True):
                assert torch.allclose(eager, graph, atol=1e-4), (n, length)


def test_rows_of_a_batch_stop_one_by_one_and_the_next_request_records_nothing():
    model = tiny_llama(eos_token_id=2)
    texts = [torch.tensor([5, 9, 33, 5, 9]), torch.tensor([7, 8]), torch.tensor([11, 12, 13])]
    rows = left_padded(texts)
    asked = {"max_new_tokens": 20, "do_sample": False}
    want = new_tokens(model, rows, **asked)
    decoder = Decoder(model, "token-recycling", size=8, compile="graphs")
    assert new_tokens(decoder, rows, **asked) == want
    before, address = recorded(decoder.target), decoder.target.run._cache.layers[0].whole[0].data_ptr()
    assert new_tokens(decoder, rows, **asked) == want
    assert recorded(decoder.target) == before
    for text, alone in zip(texts, want, strict=True):
        (row,) = new_tokens(decoder, {"input_ids": text[None]}, **asked)
        assert row == alone[: len(row)]
        assert set(alone[len(row) :]) <= {0}
    assert decoder.target.run._cache.layers[0].whole[0].data_ptr() == address


def test_a_cache_that_grows_is_recorded_again(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(graphs, "_CAPACITY", 8)
    model = tiny_llama()
    target = Target(model, compile_mode="graphs")
    target.compile()
    text = np.arange(5, 15)
    with target.session(), torch.inference_mode():
        target.open([0], 8)
        target.commit(target.step([text], [Proposal(DraftTree.root(14))]), [[]])
        for token in range(20, 50):
            text = np.append(text, token)
            output = target.step([text], [Proposal(DraftTree.root(token))])
            target.commit(output, [[]])
            want = model(input_ids=torch.from_numpy(text)[None]).logits[0, -1]
            assert torch.allclose(output.logits[0, 0], want, atol=1e-4)
        assert target.caches[0].capacity >= 40


def test_results_of_one_step_survive_the_next():
    target = Target(tiny_llama(), compile_mode="graphs")
    target.compile()
    with target.session():
        target.open([0], 64)
        target.commit(target.step([np.arange(5, 15)], [Proposal(DraftTree.root(14))]), [[]])
        first = target.step([np.arange(5, 16)], [Proposal(DraftTree.root(15))])
        kept = first.logits.clone()
        target.commit(first, [[]])
        target.step([np.arange(5, 17)], [Proposal(DraftTree.root(16))])
        assert torch.equal(first.logits, kept)


@pytest.mark.parametrize("name", ["medusa", "eagle3", "hidden-transfer"])
def test_taps_of_trained_drafters_come_out_of_graphs(name: str):
    model = tiny_llama()
    head = random_head(name, Target(model))
    eager, decoder = (Decoder(model, name, checkpoint=head, compile=mode) for mode in ("off", "graphs"))
    assert new_tokens(decoder, PROMPT, **GREEDY) == new_tokens(eager, PROMPT, **GREEDY)
    # the same drafts were accepted, so the drafter read the same hidden states
    assert [s.emitted for s in decoder.stats.steps] == [s.emitted for s in eager.stats.steps]
    assert recorded(decoder.target) > 0


def test_a_draft_model_s_levels_are_graphs_too():
    model, draft = tiny_llama(), tiny_llama(seed=1)
    options = {"draft": draft, "branching": (3, 2, 1)}
    eager, decoder = (Decoder(model, "draft-model", **options, compile=mode) for mode in ("off", "graphs"))
    assert new_tokens(decoder, PROMPT, **GREEDY) == new_tokens(eager, PROMPT, **GREEDY)
    assert [s.emitted for s in decoder.stats.steps] == [s.emitted for s in eager.stats.steps]
    before = recorded(decoder.drafter.draft)
    assert before > 0
    new_tokens(decoder, PROMPT, **GREEDY)
    assert recorded(decoder.drafter.draft) == before


def test_sampling_draws_the_same_text():
    model = tiny_llama()
    eager, decoder = (Decoder(model, "token-recycling", compile=mode) for mode in ("off", "graphs"))
    texts = []
    for one in (eager, decoder):
        torch.manual_seed(3)
        texts.append(new_tokens(one, PROMPT, do_sample=True, temperature=1.0, max_new_tokens=24))
    assert texts[0] == texts[1]


def test_a_model_that_reads_numbers_in_its_forward_has_no_graphs():
    model = tiny_llama()

    def read(module: torch.nn.Module, args: tuple) -> None:
        args[0].sum().item()

    model.model.norm.register_forward_pre_hook(read)
    with pytest.raises(CompatibilityError, match=r"a number is read from the device.*use compile='off'"):
        Decoder(model, compile="graphs")


def test_a_length_that_stays_in_the_graph_is_noticed():
    """What a model computes from the cache's length on the host is the same in every replay."""
    model = tiny_llama()
    forward = model.model.forward

    def by_length(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("past_key_values") is not None and kwargs.get("position_ids") is not None:
            positions = kwargs["position_ids"]
            kwargs["position_ids"] = positions - positions[:, :1] + kwargs["past_key_values"].get_seq_length()
        return forward(*args, **kwargs)

    model.model.forward = by_length
    assert new_tokens(Decoder(model, "token-recycling"), PROMPT, **GREEDY) == new_tokens(model, PROMPT, **GREEDY)
    with pytest.raises(CompatibilityError, match="its logits are off by"):
        Decoder(model, compile="graphs")


# ---- a real GPU -------------------------------------------------------------------------------------------------


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_texts_from_real_graphs_are_those_of_eager_steps(name: str, dtype: torch.dtype):
    model = MODELS[name]().to("cuda", dtype)
    ids = torch.randint(3, 60, (3, 40), generator=torch.Generator().manual_seed(0)).cuda()
    for rows in (1, 3):
        inputs = {"input_ids": ids[:rows], "attention_mask": torch.ones_like(ids[:rows])}
        asked = {"max_new_tokens": 48, "do_sample": False}
        for drafter in ("none", "token-recycling", "prompt-lookup"):
            eager, decoder = (Decoder(model, drafter, compile=mode) for mode in ("off", "graphs"))
            for _ in range(2):
                texts = [new_tokens(one, inputs, **asked) for one in (eager, decoder)]
                # padding a step changes which matrix kernels run, so bfloat16 may part at near ties
                assert texts[0] == texts[1] if dtype == torch.float32 else texts[0][0][:4] == texts[1][0][:4], drafter


@on_gpu
def test_a_real_recording_that_fails_leaves_the_gpu_usable():
    model = tiny_llama().to("cuda")

    def read(module: torch.nn.Module, args: tuple) -> None:
        args[0].sum().item()

    handle = model.model.norm.register_forward_pre_hook(read)
    want = new_tokens(model, {"input_ids": PROMPT["input_ids"].cuda()}, **GREEDY)
    decoder = Decoder(model, compile="auto")
    assert decoder.target.compilation.mode == "off"
    assert new_tokens(decoder, {"input_ids": PROMPT["input_ids"].cuda()}, **GREEDY) == want
    handle.remove()
    assert Decoder(model, compile="graphs").target.compilation.mode == "graphs"
