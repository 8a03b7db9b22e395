"""Tree attention as an attention implementation of transformers, and whether a model can use it.

The Target passes a ``StepMask`` where a mask belongs. transformers and the models hand 4-D masks down untouched, per
kind of layer where kinds differ, so the step reaches the attention function of each layer. Windows and chunks are the
step's, never the layer's keyword arguments: they are decided once, for stock attention and for this one alike.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from specdec.errors import CompatibilityError, first_line
from specdec.tree_attention import reference
from specdec.tree_attention.compact import works
from specdec.tree_attention.config import Chip, Config, tiles, unavailable
from specdec.tree_attention.decode import tree_attention
from specdec.tree_attention.step import Step, StepMask

# name of the implementation that runs steps through the kernel and everything else through the stock one
NAMES = {"sdpa": "specdec_tree", "eager": "specdec_tree_eager"}
# arguments that change what attention means, and that the kernel does not know
_FOREIGN = ("position_bias", "cache", "head_mask")


def _implementation(stock: str) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
    def attention(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """query [B, Hq, C, D], key [B, Hkv, width, D], value [B, Hkv, width, E] -> ([B, C, Hq, E], None)."""
        if not isinstance(attention_mask, StepMask):  # a prefill, or somebody else's forward
            return _stock(stock, module)(module, query, key, value, attention_mask, **kwargs)
        foreign = [name for name in _FOREIGN if kwargs.get(name) is not None]
        if foreign:
            raise CompatibilityError(
                f"tree attention does not know {type(module).__name__}'s argument {foreign[0]}; "
                f'use attn_implementation="{stock}"'
            )
        scale = kwargs.get("scaling")
        out = tree_attention(
            query,
            key,
            value,
            attention_mask.step,
            scale=query.shape[3] ** -0.5 if scale is None else float(scale),
            softcap=kwargs.get("softcap") if stock == "eager" else None,  # sdpa leaves it out, where it takes it at all
            sinks=kwargs.get("s_aux"),
        )
        return out, None

    return attention


def _stock(name: str, module: torch.nn.Module) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
    if name != "eager":
        return AttentionInterface()[name]
    # every modelling file that takes registered attention functions has its own eager one, by this name
    return sys.modules[type(module).__module__].eager_attention_forward


@cache
def register() -> None:
    """Make ``NAMES`` known to transformers. Masks it builds itself are those of the stock implementation."""
    for stock, name in NAMES.items():
        AttentionInterface.register(name, _implementation(stock))
        AttentionMaskInterface.register(name, AttentionMaskInterface()[stock])


def supported(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the steps of ``model`` do not run on the kernel; None when they may, the model's own forward not yet tried.

    On a GPU the kernel's launches are compiled and compared with the reference here, so that nothing is compiled, or
    found to be wrong, inside a request.
    """
    reason = unavailable(device)
    if reason is not None:
        return reason
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"it has no {dtype} form"
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        return "the model is spread over several devices"
    config = model.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if getattr(config, "qk_nope_head_dim", None):  # multi-head latent attention
        dim, value_dim = config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
    else:
        dim = value_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    if max(dim, value_dim) > 256 or heads % kv_heads:
        return f"it takes heads of at most 256 numbers in even groups, not {heads} heads of {dim} over {kv_heads}"
    register()
    if device.type != "cuda":
        return None
    windowed = any("full" not in kind for kind in getattr(config, "layer_types", None) or ()) or bool(
        getattr(config, "sliding_window", None)
    )
    softcap = getattr(config, "attn_logit_softcapping", None)
    sinks = any(name.endswith("sinks") for name, _ in model.named_parameters())
    return _trial(device, dtype, heads, kv_heads, (dim, value_dim), windowed, softcap, sinks)


@cache
def _trial(
    device: torch.device,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    dims: tuple[int, int],
    windowed: bool,
    softcap: float | None,
    sinks: bool,
    prefix: int = 700,
) -> str | None:
    """Compile and check every launch that steps of up to 64 columns choose: tile sizes, split or not, window or not."""
    for d in dims:
        works(device, kv_heads, d, dtype.itemsize)
    group, chip, itemsize, dim = heads // kv_heads, Chip.of(device), dtype.itemsize, dims[0]
    generator = torch.Generator(device).manual_seed(0)
    seen = set()
    for columns in (1, 2, 4, 8, 16, 32, 64):
        shape = tiles(chip, group * columns, max(dims), itemsize)
        if shape in seen:
            continue
        seen.add(shape)
        lengths = [prefix, prefix // 2 - 1]
        base, width = prefix, prefix + columns
        new: dict[str, Any] = {"dtype": dtype, "device": device, "generator": generator}
        query = torch.randn(2, heads, columns, dim, **new)
        key, value = (torch.randn(2, kv_heads, width, d, **new) for d in dims)
        block = torch.ones(columns, columns, dtype=torch.bool, device=device).tril().expand(2, -1, -1)
        positions = torch.tensor(lengths, device=device)[:, None] + torch.arange(columns, device=device)
        for window in (None, prefix // 4) if windowed else (None,):
            step = Step.build(lengths, base, block, positions, window)
            sink = torch.zeros(heads, dtype=dtype, device=device) if sinks else None
            options: dict[str, Any] = {"scale": dim**-0.5, "softcap": softcap, "sinks": sink}
            want = reference.tree_attention(query.double(), key.double(), value.double(), step, **options)
            for splits in (1, 3):
                config = Config(shape[0], shape[1], splits, shape[2], shape[3])
                try:
                    got = tree_attention(query, key, value, step, config=config, **options).double()
                except Exception as error:  # a compiler or driver: whatever it raises is the reason
                    return f"it does not run here ({first_line(error)})"
                off = float((got - want).abs().max() / want.abs().max())
                if not off < (1e-4 if dtype == torch.float32 else 2e-2):  # NaN included
                    return f"its results are off by {off:.2g} on this device"
    return None
