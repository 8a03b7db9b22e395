"""The kernels on triton's interpreter. Run by test_tree_attention.py in a process of its own.

Triton decides what to interpret when it is imported, so this cannot share a process with tests that compile.
"""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
import triton.language as tl
from conftest import OracleDrafter
from hypothesis import example, given, settings
from hypothesis import strategies as st
from recorder import install
from tiny_models import tiny_gemma2, tiny_gpt_oss, tiny_llama, tiny_mistral
from tree_attention_cases import LIMIT, Case, check, launch
from triton.runtime import interpreter

from specdec import Decoder
from specdec.bench import gpu
from specdec.cache import TreeCache, TreeLayer
from specdec.target import Target
from specdec.tree import DraftTree, ProbeLayout, Probes, Proposal, Topology
from specdec.tree_attention import reference, registration
from specdec.tree_attention.compact import compact, works
from specdec.tree_attention.decode import tree_attention
from specdec.tree_attention.step import Step

assert os.environ.get("TRITON_INTERPRET") == "1", "run by tests/test_tree_attention.py"

# the interpreter keeps bfloat16 as raw 16-bit words, and its dot multiplies the words
_dot = interpreter.InterpreterBuilder.create_dot


def _bf16_dot(self, a, b, d, *rest):
    def wide(x):
        return self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x

    return _dot(self, wide(a), wide(b), d, *rest)


interpreter.InterpreterBuilder.create_dot = _bf16_dot

# and it cuts float32 off where a GPU rounds to nearest even
_convert = interpreter._convert_float


def _rounded(data, before, after, rounding):
    if (before, after) != (tl.float32, tl.bfloat16):
        return _convert(data, before, after, rounding)
    words = data.view(np.uint32).astype(np.uint64)
    return ((words + 0x7FFF + ((words >> 16) & 1)) >> 16).astype(np.uint16)


interpreter._convert_float = _rounded
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@settings(max_examples=30)
@given(
    st.builds(
        Case,
        lengths=st.lists(st.sampled_from([0, 1, 15, 16, 17, 31, 33, 64, 65, 100]), min_size=1, max_size=2),
        columns=st.integers(1, 20),
        group=st.integers(1, 3),
        dim=st.sampled_from([8, 16, 24]),
        dtype=st.sampled_from(list(LIMIT)),
        gap=st.sampled_from([0, 5]),
        earlier=st.sampled_from([0, 0, 9]),
        window=st.sampled_from([None, None, 1, 4, 40]),
        chunk=st.sampled_from([None, None, None, 16]),
        softcap=st.sampled_from([None, 3.0]),
        sinks=st.booleans(),
        config=st.builds(launch, st.sampled_from([16, 32, 64]), st.integers(1, 4)),
        seed=st.integers(0, 9),
    )
)
@example(Case(lengths=(0,), columns=1, config=launch(splits=2)))
@example(Case(lengths=(0, 0), columns=2, sinks=True))
@example(Case(lengths=(64, 128), columns=16, config=launch(64, 2)))
@example(Case(lengths=(100,), columns=3, window=1, config=launch(16, 3)))
def test_any_shape_agrees_with_the_reference(case: Case):
    check(case)


@pytest.mark.parametrize("dim", [32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", LIMIT)
def test_every_head_size_and_dtype_agrees_with_the_reference(dim: int, dtype: torch.dtype):
    check(Case(dim=dim, dtype=dtype))
    check(Case(dim=dim, dtype=dtype, sinks=True, softcap=5.0, window=20, config=launch(splits=3)))


@pytest.mark.parametrize(("columns", "block_n"), [(63, 32), (64, 64), (65, 16), (130, 32), (256, 64)])
def test_a_step_of_many_words_agrees_with_the_reference(columns: int, block_n: int):
    check(Case(columns=columns, lengths=(40,), group=1, config=launch(block_n, 1 + columns % 2, block_m=64)))


@pytest.mark.parametrize(("dim", "value_dim"), [(24, 16), (8, 40)])
def test_values_may_have_heads_of_their_own_size(dim: int, value_dim: int):
    for splits in (1, 3):
        check(Case(dim=dim, value_dim=value_dim, config=launch(splits=splits)))


def test_more_splits_than_tiles_leave_no_hole():
    check(Case(lengths=(20, 0), config=launch(splits=20)))


def test_the_kernel_takes_views_and_other_layouts():
    """Keys as [B, capacity, H, D] underneath, and queries whose last dimension is not contiguous."""
    g = torch.Generator().manual_seed(0)
    step = Step.build([20], 20, torch.ones(3, 3, dtype=torch.bool).tril()[None], torch.tensor([[20, 21, 22]]))
    query = torch.randn(1, 4, 16, 3, generator=g).transpose(2, 3)
    key, value = (torch.randn(1, 40, 2, 16, generator=g).transpose(1, 2)[:, :, 2:30] for _ in range(2))
    got = tree_attention(query, key, value, step, scale=0.25)
    want = reference.tree_attention(query.double(), key.double(), value.double(), step, scale=0.25)
    assert torch.allclose(got.double(), want, atol=1e-5)


# ---- whole models ----------------------------------------------------------------------------------------------

MODELS = {"llama": tiny_llama, "mistral": tiny_mistral, "gemma2": tiny_gemma2, "gpt_oss": tiny_gpt_oss}


def without_kernel(target: Target) -> None:
    target.capability = replace(target.capability, stock="switched off")


@pytest.mark.parametrize("name", MODELS)
def test_logits_of_trees_and_probes_equal_stock_attentions(name: str):
    target = Target(MODELS[name]())
    assert target.uses_kernel, target.capability.stock
    texts = [np.arange(5, 25) % 60 + 3, np.array([7, 8, 9])]
    later = [np.append(texts[0], [30, 31]), np.append(texts[1], [40])]
    tree = [DraftTree(Topology([-1, 0, 0, 1, 1, 2]), np.array([t[-1], 20, 30, 40, 41, 42])) for t in later]
    layout = ProbeLayout(np.array([3, 3]), np.array([1, 2]), np.tri(2, dtype=bool), np.zeros(2, dtype=np.int64))
    proposals = [Proposal(tree[0], Probes(layout, np.array([3, 4]))), Proposal(tree[1].cut(1))]

    def run() -> list[torch.Tensor]:
        with target.session():
            target.open([0, 1], 16)
            first = target.step(texts, [Proposal(DraftTree.root(int(t[-1]))) for t in texts])
            target.commit(first, [[], []])
            second = target.step(later, proposals)
            target.commit(second, [[1, 4], [2]])
            more = [np.append(later[0], [20, 41, 50]), np.append(later[1], [30, 50])]
            third = target.step(more, [Proposal(DraftTree.root(50)), None])
            logits = [first.logits, second.logits[0], second.logits[1, :3], third.logits[0]]
            layers = [t.clone() for layer in target.caches[0].layers for t in (layer.keys[0], layer.values[0])]
            return [*logits, *layers]

    got = run()
    without_kernel(target)
    for mine, stock in zip(got, run(), strict=True):
        assert torch.allclose(mine, stock, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_the_decoder_writes_what_generate_writes(name: str, rows: int):
    model = MODELS[name]()
    lengths = [12, 5, 9][:rows]
    ids = torch.zeros(rows, max(lengths), dtype=torch.long)
    for b, n in enumerate(lengths):
        ids[b, -n:] = torch.randint(3, 60, (n,), generator=torch.Generator().manual_seed(b))
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    want = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    texts = want[:, ids.shape[1] :].tolist()
    decoder = Decoder(model, OracleDrafter(texts, depth=3, wrong=0.3, decoys=1))
    assert decoder.target.uses_kernel
    assert torch.equal(decoder.generate(**inputs, max_new_tokens=6, do_sample=False), want)


def test_other_forwards_of_the_model_are_stock_attention_during_a_session():
    model = tiny_llama()
    target, ids = Target(model), torch.tensor([[5, 9, 33]])
    with torch.no_grad():
        want = model(ids).logits
    with target.session():
        assert torch.equal(model(ids).logits, want)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma2])
def test_a_long_prompt_runs_on_stock_attention_and_the_next_step_on_the_kernel(make, monkeypatch):
    target = Target(make(max_position_embeddings=512))
    prompt = np.arange(300) % 60 + 3
    tree = DraftTree(Topology([-1, 0, 0]), np.array([7, 20, 30]))
    calls, kernel = [], registration.tree_attention

    def count(query, *args, **options):
        calls.append(query.shape[2])
        return kernel(query, *args, **options)

    monkeypatch.setattr(registration, "tree_attention", count)
    results = []
    for _ in range(2):
        with target.session():
            target.open([0], 16)
            target.commit(target.step([prompt], [Proposal(DraftTree.root(int(prompt[-1])))]), [[]])
            results.append(target.step([np.append(prompt, 7)], [Proposal(tree)]).logits)
        without_kernel(target)
    assert calls == [3, 3], "one call per layer, none for the prompt"
    assert torch.allclose(results[0], results[1], atol=1e-4)


def test_scratch_growth_runs_on_the_kernel():
    target = Target(tiny_mistral())
    prefix = np.arange(5, 16)
    results = []
    for _ in range(2):
        with target.session():
            target.open([0], 64)
            target.commit(target.step([prefix], [Proposal(DraftTree.root(15))]), [[]])
            with target.scratch():
                target.forward(torch.tensor([[20, 30]]), torch.tensor([[11, 11]]), torch.eye(2, dtype=torch.bool)[None])
                visible = torch.tensor([[[True, False, True]]])
                results.append(target.forward(torch.tensor([[40]]), torch.tensor([[12]]), visible))
        without_kernel(target)
    assert torch.allclose(results[0], results[1], atol=1e-5)


@pytest.mark.parametrize("name", ["mistral", "gpt_oss"])
def test_a_recorded_step_repeats_the_kernel_on_other_texts_and_trees(name: str, monkeypatch):
    install(monkeypatch, tree_attention)
    make = TreeLayer._buffer

    def worst(self, like: torch.Tensor) -> torch.Tensor:
        """Memory as it may be found."""
        buffer = make(self, like)
        return buffer if self._new is torch.zeros else buffer.fill_(float("nan"))

    monkeypatch.setattr(TreeLayer, "_buffer", worst)
    target = Target(MODELS[name](), compile_mode="graphs")
    target.compile()
    graphs = target.run
    for text, parents in ((np.arange(5, 25) % 60 + 3, [-1, 0, 0, 1]), (np.array([7, 8, 9]), [-1, 0, 1])):
        tree = DraftTree(Topology(parents), np.arange(20, 20 + len(parents)))
        logits = []
        for run in (target.model, graphs):
            target.run = run
            with target.session():
                target.open([0], 64)
                target.commit(target.step([text], [Proposal(DraftTree.root(int(text[-1])))]), [[]])
                output = target.step([np.append(text, 20)], [Proposal(tree)])
                target.commit(output, [[]])
                with target.scratch():  # its second level sees columns of the first, and whole words of it are read
                    at = torch.tensor([[len(text) + 1] * 2])
                    target.forward(torch.tensor([[20, 30]]), at, torch.eye(2, dtype=torch.bool)[None])
                    visible = torch.tensor([[[True, False, True]]])
                    level = target.forward(torch.tensor([[40]]), at[:, :1] + 1, visible)
                logits.append(torch.cat([output.logits, level], dim=1))
        assert torch.allclose(*logits, atol=1e-4)
    assert graphs.count == 4, "one node, up to four, and two levels of scratch columns"


# ---- compaction ------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(data=st.data())
def test_compaction_equals_torch_on_any_kept_columns(data: st.DataObject):
    rows = data.draw(st.integers(1, 3))
    lengths = [data.draw(st.integers(0, 6)) for _ in range(rows)]
    step = data.draw(st.integers(1, 9))
    kept = [sorted(data.draw(st.sets(st.integers(0, step - 1)))) for _ in range(rows)]
    base = max(lengths)
    dtype = data.draw(st.sampled_from(list(LIMIT)))
    caches = [TreeCache(3, rows, 32) for _ in range(2)]
    shapes = [(2, 8), (3, 24), (2, 8)]  # heads and their size, differing per layer
    for i, (heads, dim) in enumerate(shapes):
        filled = torch.randn(2, rows, heads, base + step, dim).to(dtype)
        for cache in caches:
            cache.layers[i].update(*filled)
    for cache in caches:
        cache.lengths, cache.width = list(lengths), base + step
    caches[0].keep(base, kept)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("specdec.cache.compact", lambda *args: False)
        caches[1].keep(base, kept)
    assert caches[0].lengths == caches[1].lengths
    for mine, stock in zip(caches[0].layers, caches[1].layers, strict=True):
        for b, length in enumerate(caches[0].lengths):
            assert torch.equal(mine.keys[b, :, :length], stock.keys[b, :, :length])
            assert torch.equal(mine.values[b, :, :length], stock.values[b, :, :length])


def test_compaction_falls_back_to_torch_where_the_kernel_fails(monkeypatch):
    monkeypatch.setattr("specdec.tree_attention.compact._launch", lambda *args: 1 / 0)
    works.cache_clear()
    cache = TreeCache(2, 1, 16)
    for layer in cache.layers:
        layer.update(*torch.arange(6.0).view(1, 1, 1, 6, 1).expand(2, 1, 2, 6, 4))
    cache.width = 6
    cache.keep(0, [[1, 3, 5]])
    works.cache_clear()
    assert cache.layers[1].keys[0, 0, :, 0].tolist() == [1, 3, 5]


def test_compaction_moves_overlapping_columns_in_order():
    buffer = torch.arange(10.0).view(1, 1, 10, 1).expand(1, 2, 10, 4).clone()
    assert compact([buffer], [[(2, 1), (3, 2), (5, 3), (6, 4), (9, 5)]])
    assert buffer[0, 0, :, 0].tolist() == [0, 2, 3, 5, 6, 9, 6, 7, 8, 9]


# ---- what only GPUs do otherwise ---------------------------------------------------------------------------------


def _trial() -> str | None:
    cpu = torch.device("cpu")
    return registration._trial.__wrapped__(
        cpu, torch.float16, 2, 1, (8, 16), windowed=True, softcap=3.0, sinks=True, prefix=90
    )


def test_the_trial_before_first_use_accepts_this_kernel():
    assert _trial() is None


def test_the_trial_before_first_use_refuses_a_wrong_or_failing_kernel(monkeypatch):
    monkeypatch.setattr(registration, "tree_attention", lambda *args, **kwargs: torch.zeros(()))
    assert "off by" in _trial()
    monkeypatch.setattr(registration, "tree_attention", lambda *args, **kwargs: 1 / 0)
    assert "ZeroDivisionError" in _trial()


def test_the_measurement_runs(tmp_path):
    assert gpu.main(["--small", "--out", str(tmp_path)]) == 0
    assert "float16" in (tmp_path / "gpu.md").read_text()
