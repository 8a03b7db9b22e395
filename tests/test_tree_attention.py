"""Tree attention: the step's packed form, the launches, what the kernels compile to, and which models use them.

What the kernels compute is tested in interpreted_tree_attention.py, which runs from here in a process of its own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import OracleDrafter, on_gpu
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny_gemma2, tiny_gpt_oss, tiny_llama, tiny_mistral
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from tree_attention_cases import LIMIT, Case, check

from specdec import Decoder
from specdec.errors import CompatibilityError, UsageError
from specdec.target import Target
from specdec.tree_attention import reference
from specdec.tree_attention.compact import compact
from specdec.tree_attention.config import MAX_COLUMNS, Chip, choose, padded, tiles
from specdec.tree_attention.decode import tree_attention
from specdec.tree_attention.masks import step_mask
from specdec.tree_attention.registration import NAMES, register, supported
from specdec.tree_attention.step import Step, StepMask, pack, unpack

# bytes of shared memory one program may use
CHIPS = {80: Chip(108, 163 * 1024), 90: Chip(132, 227 * 1024)}
DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


def test_kernels_agree_with_the_reference_under_the_interpreter():
    pytest.importorskip("triton")
    inner = Path(__file__).with_name("interpreted_tree_attention.py")
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", str(inner)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=inner.parent.parent)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


# ---- the step ----------------------------------------------------------------------------------------------------


@given(st.integers(1, 200), st.integers(0, 99))
def test_packing_is_undone_by_unpacking(seen: int, seed: int):
    block = torch.rand(2, 3, seen, generator=torch.Generator().manual_seed(seed)) < 0.5
    bits = pack(block)
    assert (bits.dtype, bits.shape) == (torch.int64, (2, 3, (seen + 63) // 64))
    assert torch.equal(unpack(bits, seen), block)


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    columns=st.integers(1, 9),
    extra=st.integers(0, 4),
    window=st.sampled_from([None, 1, 5, 30]),
    chunk=st.sampled_from([None, 8]),
    gap=st.integers(0, 3),
)
def test_a_step_says_what_the_dense_mask_says(lengths, columns, extra, window, chunk, gap):
    base, rows = max(lengths) + gap, len(lengths)
    block = torch.rand(rows, columns, extra + columns) < 0.5
    positions = torch.tensor(lengths)[:, None] + torch.arange(extra + columns) // 2
    new, earlier = positions[:, extra:], positions[:, :extra] if extra else None
    step = Step.build(lengths, base, block, new, window, chunk, earlier)
    assert torch.equal(step.visible(), step_mask(lengths, base, block, new, window, chunk, earlier)[:, 0])
    hidden = step.visible()[:, :, :base].sum(dim=2).max()
    assert hidden <= step.reach, "reach bounds what a query reads"


def test_padding_in_a_row_does_not_pull_the_whole_prefix_into_a_window():
    block, positions = torch.eye(2, dtype=torch.bool)[None], torch.tensor([[1000, 0]])
    step = Step.build([1000], 1000, block, positions, window=16)
    assert step.low.tolist() == [[985, 985]]


def test_the_reference_is_softmax_attention_and_ignores_what_nobody_sees():
    query, key, value = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    block = torch.ones(3, 3, dtype=torch.bool).tril().expand(2, 3, 3)
    step = Step.build([5, 2], 5, block, torch.tensor([[5, 6, 7], [2, 3, 4]]))
    mask = step.visible()[:, None]
    want = torch.nn.functional.scaled_dot_product_attention(
        query, key[:, :, :8], value[:, :, :8], attn_mask=mask, enable_gqa=True
    )
    key[1, :, 2:5], value[1, :, 2:5], key[:, :, 8], value[:, :, 8] = (float("nan"),) * 4
    got = reference.tree_attention(query, key, value, step, scale=8**-0.5)
    assert torch.allclose(got, want.transpose(1, 2), atol=1e-6)


def test_a_sink_takes_its_share_of_the_softmax_and_gives_nothing():
    query, key, value = torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 2, 8), torch.ones(1, 1, 2, 8)
    step = Step.build([1], 1, torch.ones(1, 1, 1, dtype=torch.bool), torch.tensor([[1]]))
    got = reference.tree_attention(query, key, value, step, scale=1.0, sinks=torch.zeros(1))
    assert torch.allclose(got, torch.full_like(got, 2 / 3))


# ---- launches ------------------------------------------------------------------------------------------------------


@given(
    rows=st.integers(1, 16),
    kv_heads=st.sampled_from([1, 2, 8, 32]),
    group=st.integers(1, 8),
    columns=st.integers(1, MAX_COLUMNS),
    reach=st.integers(0, 200_000),
    dim=st.integers(16, 256),
    itemsize=st.sampled_from([2, 4]),
    chip=st.sampled_from(list(CHIPS.values())),
)
def test_launches_are_ones_the_kernel_takes(rows, kv_heads, group, columns, reach, dim, itemsize, chip):
    config = choose(chip, rows, kv_heads, group, columns, reach, dim, itemsize)
    assert config.block_m in (16, 32, 64, 128)
    assert 64 % config.block_n == 0, "a tile of the step's columns lies in one word"
    assert 1 <= config.splits <= 128
    assert config.splits == 1 or reach // config.splits >= 2 * config.block_n, "a split has work to do"


def test_a_long_prefix_fills_the_chip_and_a_short_one_is_not_split():
    one = choose(CHIPS[90], 1, 8, 4, 16, 65_536, 128, 2)
    assert 132 <= 8 * one.splits <= 4 * 132
    assert choose(CHIPS[90], 1, 8, 4, 16, 100, 128, 2).splits == 1
    assert choose(CHIPS[90], 64, 8, 4, 16, 65_536, 128, 2).splits == 1, "rows fill the chip by themselves"


@cache
def _compiled(arch: int, dtype: torch.dtype, dim: int, query_rows: int, layer: str, split: bool) -> dict[str, int]:
    """Registers, stack bytes (spills) and shared memory of the decode kernel as the default launch compiles it."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from specdec.tree_attention.kernels import decode_kernel

    block_m, block_n, warps, stages = tiles(CHIPS[arch], query_rows, dim, dtype.itemsize)
    data = "*" + DTYPES[dtype]
    signature = dict.fromkeys(("q_b", "q_h", "q_n", "k_b", "k_h", "k_n", "v_b", "v_h", "v_n"), "i32")
    aligned = set(signature)
    signature |= dict.fromkeys(("q", "k", "v"), data) | {"out": "*fp32" if split else data}
    signature |= {"extent": "*i64", "bits": "*i64"}
    signature |= {"lse": "*fp32"} if split else {}
    signature |= {"low": "*i32"} if layer != "full" else {}
    signature |= {"sinks": data} if layer == "sliding, sinks" and not split else {}
    aligned |= set(signature)
    signature |= {"scale": "fp32", "cap": "fp32", "columns": "i32", "seen": "i32", "splits": "i32"}
    constants = {
        "HEADS": 8,
        "GROUP": 4,
        "D": dim,
        "E": dim,
        "BLOCK_D": padded(dim),
        "BLOCK_E": padded(dim),
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "SOFTCAP": layer == "sliding, softcap",
        "PRECISION": "ieee",
    }
    names = decode_kernel.arg_names
    source = ASTSource(
        decode_kernel,
        {name: signature.get(name, "constexpr") for name in names},
        {name: constants.get(name) for name in names if name not in signature},
        {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in aligned},
    )
    target = GPUTarget("cuda", arch, 32)
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    kernel = triton.compile(source, target=target, options=options)
    found = {"shared": kernel.metadata.shared, "registers": 0, "stack": 0}
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if tool.exists():
        code = Path(os.environ["PYTEST_TMP"]) / "kernel.cubin"
        code.write_bytes(kernel.asm["cubin"])
        command = [tool, "--dump-resource-usage", code]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found["registers"] = int(re.search(r"REG:(\d+)", usage)[1])
        found["stack"] = int(re.search(r"STACK:(\d+)", usage)[1])
    return found


LAYERS = ("full", "sliding, softcap", "sliding, sinks")
FULL_MATRIX = [
    (arch, dtype, dim, query_rows, layer, split)
    for arch in CHIPS
    for dtype in DTYPES
    for dim in (32, 64, 80, 96, 128, 256)
    for query_rows in (16, 32, 64, 128)
    for layer in LAYERS
    for split in (False, True)
    if dtype != torch.float32 or query_rows == 16  # it has one tile size
]
SMALL_MATRIX = [
    (80, torch.bfloat16, 128, 128, "sliding, softcap", True),
    (80, torch.float32, 128, 16, "full", True),
    (80, torch.float16, 80, 16, "full", False),
    (90, torch.bfloat16, 128, 16, "full", True),
    (90, torch.bfloat16, 64, 128, "sliding, sinks", False),
    (90, torch.float16, 96, 32, "full", True),
    (90, torch.bfloat16, 256, 64, "sliding, softcap", False),
    (90, torch.float32, 32, 16, "full", False),
]


def _check_compiled(case, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PYTEST_TMP", str(tmp_path))
    # what is compiled for a target that is not there must not be found in, or left in, the user's cache
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    found = _compiled(*case)
    assert found["stack"] == 0, "no register is spilled"
    assert found["shared"] <= CHIPS[case[0]].shared


@pytest.mark.parametrize("case", SMALL_MATRIX, ids=str)
def test_default_launches_compile_without_spills(case, tmp_path, monkeypatch):
    _check_compiled(case, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in FULL_MATRIX if c not in SMALL_MATRIX], ids=str)
def test_every_launch_compiles_without_spills(case, tmp_path, monkeypatch):
    _check_compiled(case, tmp_path, monkeypatch)


@pytest.mark.parametrize("bits", [8, 16, 32])
def test_the_compaction_kernel_compiles(bits, tmp_path, monkeypatch):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from specdec.tree_attention.kernels import compact_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = {"table": "*i64", "pairs": "*i64", "moves": "i32", "s_b": "i32", "s_h": "i32", "s_n": "i32", "heads": "i32"}
    constants = {"D": 96, "BLOCK_D": 128, "BLOCK_H": 8, "BITS": bits}
    names = compact_kernel.arg_names
    source = ASTSource(compact_kernel, {n: types.get(n, "constexpr") for n in names}, constants)
    kernel = triton.compile(
        source, target=GPUTarget("cuda", 80, 32), options={"num_warps": 4, "enable_fp_fusion": True}
    )
    # moves are ordered by barriers, and reads must not come from a cache that does not see the writes
    assert "bar.sync" in kernel.asm["ptx"] or "barrier.sync" in kernel.asm["ptx"]
    assert "ld.global.nc" not in kernel.asm["ptx"]


def test_the_merge_kernel_compiles(tmp_path, monkeypatch):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from specdec.tree_attention.kernels import merge_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = {"part": "*fp32", "lse": "*fp32", "out": "*bf16", "sinks": "*bf16", "splits": "i32"}
    constants = {"HEADS": 32, "E": 128, "BLOCK_E": 128, "BLOCK_S": 16}
    names = merge_kernel.arg_names
    source = ASTSource(merge_kernel, {n: types.get(n, "constexpr") for n in names}, constants)
    triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "enable_fp_fusion": True})


# ---- on a GPU ------------------------------------------------------------------------------------------------------


@on_gpu
@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize("dim", [32, 64, 80, 96, 128, 256])
def test_kernel_agrees_with_the_reference_on_this_gpu(dim: int, dtype: torch.dtype):
    features = (
        {},
        {"window": 300, "softcap": 5.0},
        {"sinks": True, "gap": 3},
        {"chunk": 512},
        {"group": 7},
        {"value_dim": 64},
    )
    for columns in (1, 5, 16, 64, 256):
        case = Case(lengths=(2000, 0, 333), columns=columns, group=4, kv_heads=2, dim=dim, dtype=dtype, device="cuda")
        for changes in features:
            check(replace(case, **changes))


@on_gpu
def test_compaction_on_this_gpu_equals_torch():
    pairs = [[(40 + 2 * i, 37 + i) for i in range(9)], [(40, 3)] + [(41, 4)] * 8]
    for dtype in LIMIT:
        buffers = [torch.randn(2, heads, 64, 96, dtype=dtype, device="cuda") for heads in (8, 8, 3)]
        want = [t.clone() for t in buffers]
        for t in want:
            for b, moves in enumerate(pairs):
                for source, target in moves:
                    t[b, :, target] = t[b, :, source]
        assert compact(buffers, pairs)
        assert all(torch.equal(mine, stock) for mine, stock in zip(buffers, want, strict=True))


@on_gpu
@pytest.mark.parametrize("make", [tiny_llama, tiny_mistral, tiny_gemma2, tiny_gpt_oss])
def test_the_decoder_writes_what_generate_writes_on_this_gpu(make):
    model = make().to("cuda")
    ids = torch.randint(3, 60, (3, 40), generator=torch.Generator().manual_seed(0)).cuda()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    want = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    decoder = Decoder(model, OracleDrafter(want[:, 40:].tolist(), depth=4, wrong=0.3, decoys=2))
    assert decoder.target.uses_kernel, decoder.target.capability.stock
    assert torch.equal(decoder.generate(**inputs, max_new_tokens=32, do_sample=False), want)


# ---- transformers --------------------------------------------------------------------------------------------------


def _step(rows: int = 1, columns: int = 3, base: int = 4, seed: int = 0) -> Step:
    block = torch.ones(rows, columns, columns, dtype=torch.bool).tril()
    return Step.build([base] * rows, base, block, base + torch.arange(columns).expand(rows, -1))


def test_transformers_hands_a_step_mask_through_untouched():
    register()
    for model in (tiny_llama(), tiny_mistral(), tiny_gemma2()):
        for name in (*NAMES.values(), "sdpa", "eager"):
            model.config._attn_implementation = name
            mask = StepMask.of(_step())
            for build in (create_causal_mask, create_sliding_window_causal_mask):
                if build is create_sliding_window_causal_mask and not getattr(model.config, "sliding_window", None):
                    continue
                assert build(model.config, torch.zeros(1, 3, 32), mask, None, position_ids=None) is mask


def test_a_step_mask_read_as_a_mask_is_loud():
    mask = StepMask.of(_step(rows=2))
    assert mask.shape == (2, 1, 3, 7)
    assert mask.untyped_storage().nbytes() == 4, "no memory behind it"
    assert type(mask[:, :, :, :5]) is torch.Tensor, "what is cut out of it has lost the step"
    assert (mask + torch.zeros(())).isnan().all()


def test_queries_cut_out_of_a_step_mask_keep_their_part_of_the_step():
    block = torch.ones(2, 3, 3, dtype=torch.bool).tril()
    step = Step.build([4, 2], 4, block, torch.tensor([[4, 5, 6], [2, 3, 4]]), window=3)
    last = StepMask.of(step)[:, :, slice(-2, None), :]
    assert isinstance(last, StepMask)
    assert torch.equal(last.step.visible(), step.visible()[:, 1:])


def test_the_kernel_is_refused_with_the_reason():
    model = tiny_llama()
    assert "CUDA" in supported(model, torch.device("cpu"), torch.float32)
    assert "CUDA" in supported(model, torch.device("meta"), torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        assert "float64" in supported(model, torch.device("cpu"), torch.float64)
        model.hf_device_map = {"a": 0, "b": 1}
        assert "several devices" in supported(model, torch.device("cpu"), torch.float32)
    target = Target(tiny_llama())
    assert not target.uses_kernel
    assert "CUDA" in target.capability.stock


def test_a_model_whose_logits_are_wrong_on_the_kernel_stays_on_stock_attention(monkeypatch):
    """Here the attention function is wrong; a model that changes its masks on the way looks the same."""
    monkeypatch.setattr("specdec.capability.supported", lambda *args: None)
    register()
    monkeypatch.setattr(
        "specdec.tree_attention.registration.tree_attention", lambda q, *args, **kwargs: torch.zeros_like(q.mT.mT)
    )
    target = Target(tiny_llama())
    assert not target.uses_kernel
    assert target.capability.tier == "tree"
    assert "off by" in target.capability.stock


def test_arguments_the_kernel_does_not_know_are_refused():
    register()
    from transformers import AttentionInterface

    attention = AttentionInterface()[NAMES["sdpa"]]
    query = torch.zeros(1, 2, 3, 16)
    with pytest.raises(CompatibilityError, match="position_bias"):
        attention(torch.nn.Module(), query, query, query, StepMask.of(_step()), position_bias=torch.zeros(1))
    wide, many = torch.zeros(1, 2, 3, 512), torch.zeros(1, 2, MAX_COLUMNS + 1, 16)
    with pytest.raises(UsageError, match="256"):
        tree_attention(wide, wide, wide, _step(), scale=1.0)
    with pytest.raises(UsageError, match="columns"):
        tree_attention(many, many, many, _step(), scale=1.0)


def test_long_steps_stay_on_stock_attention():
    target = Target(tiny_llama())
    target.capability = replace(target.capability, stock=None)
    for columns, kind in ((MAX_COLUMNS, StepMask), (MAX_COLUMNS + 1, torch.Tensor)):
        with target.session():
            target.open([0], 4)
            block = torch.ones(1, columns, columns, dtype=torch.bool)
            cache = target.caches[0]
            assert type(target._mask(cache, block, torch.arange(columns)[None], None)) is kind


def test_everything_but_the_kernels_runs_without_triton():
    program = """
import sys
sys.modules["triton"] = None  # importing it fails
sys.path.insert(0, "tests")
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "triton" else find(name, *a)
import torch
from tiny_models import tiny_llama
from specdec import Decoder
from specdec.tree_attention.config import unavailable
decoder = Decoder(tiny_llama(), "prompt-lookup")
assert decoder.generate(input_ids=torch.tensor([[5, 6, 7]]), max_new_tokens=4).shape == (1, 7)
import os
os.environ["TRITON_INTERPRET"] = "1"
print(unavailable(torch.device("cpu")))
"""
    top = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=top)
    assert "triton is not installed" in done.stdout, done.stderr[-2000:]
