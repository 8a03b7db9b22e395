"""Medusa checkpoints of other tools: FasterDecoding's (v0.1, the light "v2", Medusa-2 bundles) and vLLM's.

Ours: ``blocks.{k}.{j}.linear.{weight,bias}`` and, unless the output is shared, ``outputs.{k}.weight``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from specdec.errors import UsageError
from specdec.heads.checkpoint import read_config, read_tensors, write_folder

if TYPE_CHECKING:
    from specdec.drafters.medusa.module import Medusa
    from specdec.target import Target

Tensors = dict[str, torch.Tensor]
# vLLM takes a checkpoint for another method when its path holds one of these, whatever its config says
_MISREAD = ("eagle-", "eagle3", "dflash", "dspark")


def read(config: dict[str, Any], tensors: Tensors) -> tuple[dict[str, Any], Tensors] | None:
    """See ``Head.foreign``. K and L come from the tensors: published configs say less than the file has."""
    # a Medusa-2 bundle is a whole model with extra tensors "medusa_head."; vLLM strips "medusa_heads."
    extra = {name: t for name, t in tensors.items() if name.startswith("medusa_head")}
    renamed: Tensors = {}
    for name, tensor in (extra or tensors).items():
        new = _ours(re.sub(r"^medusa_heads?\.", "", name))
        if new is not None:
            renamed[new] = tensor
    blocks = {tuple(map(int, m.groups())) for n in renamed if (m := re.match(r"blocks\.(\d+)\.(\d+)\.", n))}
    if not blocks:
        return None
    K, L = (1 + max(place[i] for place in blocks) for i in (0, 1))
    if blocks != {(k, j) for k in range(K) for j in range(L)}:
        raise UsageError(f"checkpoint: its {len(blocks)} blocks do not make {K} heads of {L} layers; download it again")
    whole = config.get("vocab_size")
    if config.get("truncated_vocab_size") not in (None, whole) or "token_map" in tensors:
        raise UsageError("checkpoint: a truncated vocabulary (token_map) is not supported; use heads of the whole one")
    if config.get("original_lm_head"):
        renamed = {name: t for name, t in renamed.items() if not name.startswith("outputs.")}
    if config.get("model_type") == "medusa" and not config.get("medusa_fc_bias", False):
        renamed = {name: t for name, t in renamed.items() if not name.endswith(".bias")}  # as vLLM itself would
    outputs = [t for name, t in renamed.items() if name.startswith("outputs.")]
    return {
        "hidden_size": renamed["blocks.0.0.linear.weight"].shape[0],
        "vocab_size": outputs[0].shape[0] if outputs else whole or 0,
        "target_id": config.get("base_model_name_or_path", ""),
        "num_heads": K,
        "num_layers": L,
        "shared_output": not outputs,
        "bias": "blocks.0.0.linear.bias" in renamed,
    }, renamed


def _ours(name: str) -> str | None:
    """Our name of another tool's tensor; None for one that is not the heads'."""
    for pattern, new in (
        (r"(\d+)\.(\d+)\.linear\.(weight|bias)", r"blocks.\1.\2.linear.\3"),
        (r"blocks\.(\d+)\.layers\.(\d+)\.(weight|bias)", r"blocks.\1.\2.linear.\3"),
        (r"(\d+)\.\d+\.weight", r"outputs.\1.weight"),
        (r"lm_heads\.(\d+)\.weight", r"outputs.\1.weight"),
        (r"lm_head\.weight", "outputs.0.weight"),
    ):
        if re.fullmatch(pattern, name):
            return re.sub(pattern, new, name)
    return None


def write_fasterdecoding(head: Medusa, folder: Path) -> Path:
    """The v0.1 form, or the light "v2" form when the output is the target's own."""
    c, L = head.config, head.config.num_layers
    config = {"base_model_name_or_path": c.target_id, "medusa_num_heads": c.num_heads, "medusa_num_layers": L}
    if c.shared_output:
        config["version"] = "2"
    tensors = {}
    for name, tensor in head.state_dict().items():
        name = re.sub(r"blocks\.", "", name)
        tensors[re.sub(r"outputs\.(\d+)\.weight", rf"\g<1>.{L}.weight", name)] = tensor
    return write_folder(folder, config, tensors, "Medusa heads in FasterDecoding's format.\n")


def write_vllm(head: Medusa, folder: Path) -> Path:
    """vLLM's form. It runs the likeliest chain only; pass ``{"method": "medusa", ...}`` to it explicitly."""
    c = head.config
    config = {
        "model_type": "medusa",
        "architectures": ["MedusaModel"],
        "hidden_size": c.hidden_size,
        "vocab_size": c.vocab_size,
        "num_heads": c.num_heads,
        "num_hidden_layers": c.num_layers,
        "medusa_fc_bias": c.bias,  # without it vLLM drops the biases in silence
        "original_lm_head": c.shared_output,
        "truncated_vocab_size": c.vocab_size,
        "torch_dtype": str(head.blocks[0][0].linear.weight.dtype).removeprefix("torch."),
    }
    tensors = {}
    for name, tensor in head.state_dict().items():
        name = re.sub(r"blocks\.(\d+)\.(\d+)\.linear", r"blocks.\1.layers.\2", name)
        tensors[re.sub(r"outputs\.", "lm_heads.", name)] = tensor
    if c.shared_output:
        tensors["lm_head.weight"] = head.shared.output.weight.to(head.blocks[0][0].linear.weight.dtype)
    return write_folder(folder, config, tensors, "Medusa heads in vLLM's format.\n")


def check(folder: Path, target: Target | None = None) -> list[str]:
    """What is wrong with a vLLM folder, one sentence each; empty when nothing is.

    Args:
        folder: written by ``write_vllm`` or another tool.
        target: the model it was trained for, whose output matrix it may hold.
    """
    config, tensors = read_config(folder), read_tensors(folder)
    problems = []
    misread = [word for word in _MISREAD if word in str(folder.resolve()).lower()]
    if misread:
        problems.append(f"the path holds {misread[0]!r}: vLLM would take it for another method; rename the folder")
    if config.get("model_type") != "medusa":
        problems.append(f"model_type is {config.get('model_type')!r}, not 'medusa'")
    stray = [k for k in config if "num" in k and ("heads" in k or "layers" in k)]
    if sorted(stray) != ["num_heads", "num_hidden_layers"]:
        problems.append(
            f"keys {stray}: vLLM reads any with 'num' and 'heads' or 'layers'; keep num_heads, num_hidden_layers"
        )
    K, L = int(config.get("num_heads", 0)), int(config.get("num_hidden_layers", 1))
    expected = {f"blocks.{k}.layers.{j}.weight" for k in range(K) for j in range(L)}
    biases = {name.replace("weight", "bias") for name in expected}
    if config.get("medusa_fc_bias", False):
        expected |= biases
    elif biases & tensors.keys():
        problems.append("there are biases but medusa_fc_bias is not true: vLLM drops them in silence")
    shared = bool(config.get("original_lm_head", False))
    expected |= {"lm_head.weight"} if shared else {f"lm_heads.{k}.weight" for k in range(K)}
    if missing := sorted(expected - tensors.keys()):
        problems.append(f"tensors are missing: {missing[:4]}")
    if unknown := sorted(tensors.keys() - expected - biases):
        problems.append(f"tensors vLLM does not know: {unknown[:4]}")
    d, V = config.get("hidden_size", 4096), config.get("vocab_size")
    for name, tensor in tensors.items():
        want = (V, d) if name.startswith("lm_head") else (d, d) if name.endswith("weight") else (d,)
        if name in expected and tuple(tensor.shape) != want:
            problems.append(f"{name} has shape {tuple(tensor.shape)}, the config says {want}")
    if config.get("truncated_vocab_size") not in (None, V) and not shared:
        problems.append("truncated_vocab_size works with original_lm_head only")
    if len(list(folder.glob("*.safetensors"))) != 1 or list(folder.glob("*.bin")) + list(folder.glob("*.pt")):
        problems.append("there is more than one weight file: vLLM reads every one it finds")
    if target is not None and shared and "lm_head.weight" in tensors:
        mine, theirs = tensors["lm_head.weight"], target.head.module.weight.detach().cpu()
        if mine.shape != theirs.shape or not torch.equal(mine, theirs.to(mine.dtype)):
            problems.append("lm_head.weight differs from the target's")
    return problems


WRITERS: dict[str, Callable[..., Path]] = {"vllm-medusa": write_vllm, "fasterdecoding": write_fasterdecoding}
