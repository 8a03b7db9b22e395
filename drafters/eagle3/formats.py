"""EAGLE-3 checkpoints of other tools: the flat format (official, SpecForge, SGLang) and speculators' (vLLM).

They differ in more than names:

| | flat | speculators | ours |
|---|---|---|---|
| aux layer ids | outputs of 0-based layers (``eagle_config``) | streams entering layers | as speculators |
| norm_before_residual missing | false | true | false |
| norm_output true | a norm before the head, as always | the normed state is fed back | as speculators |
| layer's tensors | ``midlayer.*`` | ``layers.0.*`` | ``midlayer.*`` |
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig

from specdec.errors import UsageError, first_line
from specdec.heads.checkpoint import read_config, read_tensors, write_folder
from specdec.heads.layer import layer_config

if TYPE_CHECKING:
    from specdec.drafters.eagle3.module import Eagle3
    from specdec.target import Target

Tensors = dict[str, torch.Tensor]
_IDS = "eagle_aux_hidden_state_layer_ids"
_RECORD = "specdec_layers"  # our own note of the streams' numbers, by which a shift of the others is seen
_NEEDED = ("hidden_size", "vocab_size", "num_attention_heads", "intermediate_size")
_LAYER = (
    *("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps"),
    *("max_position_embeddings", "rope_parameters", "rope_theta", "rope_scaling"),
)
# parts of a path by which vLLM takes a checkpoint for another method's, before it reads its config
_OTHER_METHODS = ("eagle-", "dflash", "dspark")


def read(config: dict[str, Any], tensors: Tensors) -> tuple[dict[str, Any], Tensors] | None:
    """(keywords of ``Eagle3Config``, tensors under our names); None if it is neither format.

    Raises:
        UsageError: it is one of them, but contradicts itself or asks for what this method has not.
    """
    if not _known(config, tensors):
        return None
    settings, mine, problems = _convert(config, tensors)
    if problems:
        raise UsageError(f"checkpoint: {problems[0]}; it cannot be used, convert or download it again")
    return settings, mine


def _known(config: dict[str, Any], tensors: Tensors) -> bool:
    if "speculators_model_type" in config:
        return config["speculators_model_type"] in ("eagle3", "peagle")  # the latter to say why it is refused
    return any(name.endswith(".hidden_norm.weight") for name in tensors)


def _convert(config: dict[str, Any], tensors: Tensors) -> tuple[dict[str, Any], Tensors, list[str]]:
    """``read``'s result, and what is wrong with the files."""
    theirs = "speculators_model_type" in config
    inner: dict[str, Any] = config.get("transformer_layer_config", {}) if theirs else config
    mine, problems = _rename(tensors)
    if config.get("speculators_model_type") == "peagle" or "mask_hidden" in mine:
        problems.append("it drafts in parallel (P-EAGLE, mask_hidden), which this method does not")
    missing = [key for key in _NEEDED if key not in inner]
    if missing:
        return {}, mine, [*problems, f"config.json does not say {', '.join(missing)}"]
    kind = inner.get("model_type", "llama")
    if kind not in ("llama", "qwen3") or inner.get("hidden_act", "silu") != "silu":
        problems.append(f"its layer is a {kind} with {inner.get('hidden_act', 'silu')}, only llama and qwen3 with silu")
        kind = "llama"
    fields = {key: inner[key] for key in _LAYER if inner.get(key) is not None}
    if "rope_parameters" in fields:  # the older spelling of the same
        fields.pop("rope_theta", None)
        fields.pop("rope_scaling", None)
    try:
        layer = layer_config(AutoConfig.for_model(kind, **fields))
    except (TypeError, ValueError) as error:
        return {}, mine, [*problems, f"config.json describes no {kind} layer ({first_line(error)})"]

    V, d = inner["vocab_size"], inner["hidden_size"]
    d_t = config.get("target_hidden_size") or d
    use_aux = (config.get("eagle_config") or {}).get("use_aux_hidden_state", True)
    layers = _aux_layers(config)
    if use_aux:
        columns = mine["fc.weight"].shape[-1] if "fc.weight" in mine else 0
        count = 3 if layers is None else len(layers)
        if columns != count * d_t:
            problems.append(f"fc.weight has {columns} columns, {count} aux layers of {d_t} channels need {count * d_t}")
        if layers is not None and (layers != sorted(set(layers)) or layers[0] < 0):
            problems.append(f"its aux layers {layers} (numbers of hidden states) are not increasing")
        if layers is not None and config.get(_RECORD, layers) != layers:
            problems.append(f"its aux layers read as {layers}, but it was trained on {config[_RECORD]} ({_RECORD})")
    flags = {}
    for flag, tensor in (("norm_before_fc", "input_norm.weight"), ("fc_norm", "fc_norm.0.weight")):
        flags[flag] = tensor in mine
        if bool(config.get(flag, flags[flag])) != flags[flag]:
            problems.append(
                f"config.json says {flag}={config[flag]}, but {tensor} is {'' if flags[flag] else 'not '}there"
            )
    if not theirs and config.get("norm_output", True) is not True:
        problems.append("norm_output=false leaves out the norm before the head, which this method has not")
    V_d = len(mine["lm_head.weight"]) if "lm_head.weight" in mine else V
    if (config.get("draft_vocab_size") or V) != V_d:
        problems.append(
            f"config.json says draft_vocab_size={config.get('draft_vocab_size') or V}, its head has {V_d} rows"
        )
    problems += _vocabulary(mine, V, V_d)
    settings = {
        "hidden_size": d_t,
        "vocab_size": V,
        "layer": layer,
        "aux_layers": layers if use_aux else [],
        "draft_vocab_size": None if V_d == V else V_d,
        "use_aux": use_aux,
        "norm_before_residual": config.get("norm_before_residual", theirs),
        "norm_output": theirs and config.get("norm_output", False),
        **flags,
        "attention_bias": "midlayer.self_attn.q_proj.bias" in mine,
        "qk_norm": "midlayer.self_attn.q_norm.weight" in mine,
        "own_embedding": "embed_tokens.weight" in mine,
        "shared_output": "lm_head.weight" not in mine,
    }
    if theirs:
        verifier = (config.get("speculators_config") or {}).get("verifier") or {}
        settings["target_id"] = verifier.get("name_or_path") or ""
        settings["target_architectures"] = verifier.get("architectures") or []
    return settings, mine, problems


def _rename(tensors: Tensors) -> tuple[Tensors, list[str]]:
    mine: Tensors = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("model.")
        if name.startswith("verifier_") or name.endswith("rotary_emb.inv_freq"):
            continue  # the target's own, or computed
        mine["midlayer." + name.removeprefix("layers.0.") if name.startswith("layers.0.") else name] = tensor
    problems = []
    if any(name.startswith("layers.") for name in mine):
        problems.append("it has more than one layer, this method has one")
    return mine, problems


def _aux_layers(config: dict[str, Any]) -> list[int] | None:
    """Streams entering layers, i.e. indices of HF's ``hidden_states``; None where the file leaves it to the default."""
    if config.get(_IDS):
        return list(config[_IDS])
    outputs = (config.get("eagle_config") or {}).get(_IDS)
    return [i + 1 for i in outputs] if outputs else None


def _vocabulary(mine: Tensors, V: int, V_d: int) -> list[str]:
    """What is wrong with d2t and t2d, which are brought into our form."""
    d2t, t2d = mine.get("d2t"), mine.get("t2d")
    if V_d == V:
        mine.pop("d2t", None)
        mine.pop("t2d", None)
        if d2t is not None and bool(d2t.any()):
            return ["d2t moves tokens although the draft vocabulary is the whole vocabulary"]
        return []
    if d2t is None or d2t.shape != (V_d,):
        return [f"d2t must hold {V_d} offsets, it {'is missing' if d2t is None else f'has shape {tuple(d2t.shape)}'}"]
    ids = torch.arange(V_d) + d2t.long()
    if bool((ids.diff() <= 0).any()) or bool(ids[0] < 0) or bool(ids[-1] >= V):
        return [f"d2t: i + d2t[i] must be increasing tokens below {V}; it holds offsets, not ids"]
    made = torch.zeros(V, dtype=torch.bool)
    made[ids] = True
    if t2d is not None and not torch.equal(made, t2d.bool()):
        return [f"t2d [{len(t2d)}] does not mark the {V_d} of {V} tokens i + d2t[i] (d2t holds offsets, not ids)"]
    mine["d2t"], mine["t2d"] = d2t.long(), made
    return []


# ---- writing ---------------------------------------------------------------------------------------------------


def write_flat(head: Eagle3, folder: str | Path, dtype: torch.dtype | None = None) -> Path:
    """The flat format, which SGLang, vLLM and SpecForge load; an earlier folder is replaced.

    Args:
        head: its aux layers known (fresh, or attached).
        folder: where to.
        dtype: store floating-point weights so; None keeps them.

    Raises:
        UsageError: the format cannot say what this head does.
    """
    c, layers = head.config, _exportable(head)
    if c.qk_norm or c.norm_output or 0 in layers:
        raise UsageError(
            "the flat format has no words for qk_norm, for norm_output (fed back) and for the embedding as an aux "
            "layer; use write_speculators"
        )
    config: dict[str, Any] = {"architectures": ["LlamaForCausalLMEagle3"], **_inner(head, dtype)}
    config["norm_before_residual"] = c.norm_before_residual
    config |= {flag: True for flag in ("norm_before_fc", "fc_norm") if getattr(c, flag)}
    config["draft_vocab_size"] = c.draft_vocab_size or c.vocab_size
    if config["hidden_size"] != c.hidden_size:
        config["target_hidden_size"] = c.hidden_size
    config["eagle_config"] = {"use_aux_hidden_state": c.use_aux}
    if c.use_aux:
        config[_IDS] = config[_RECORD] = layers  # read by vLLM
        config["eagle_config"][_IDS] = [i - 1 for i in layers]  # read by SGLang, which counts layers' outputs
    return _write(folder, config, _tensors(head, dtype), c.target_id)


def write_speculators(
    head: Eagle3,
    folder: str | Path,
    verifier: str | None = None,
    dtype: torch.dtype | None = None,
    speculative_tokens: int = 3,
) -> Path:
    """The speculators format, which ``vllm serve FOLDER`` loads by itself; an earlier folder is replaced.

    Args:
        head: its aux layers and the target's architecture known (fresh, or attached).
        folder: where to.
        verifier: the target's hub id or path, as vLLM shall find it; None: the one it was trained for.
        dtype: store floating-point weights so; None keeps them.
        speculative_tokens: length of the chains vLLM drafts by default.

    Raises:
        UsageError: the format cannot say what this head does, or the target is not known.
    """
    c, layers = head.config, _exportable(head)
    name = verifier or c.target_id
    if not c.use_aux:
        raise UsageError("speculators' format has no word for use_aux=False; use write_flat")
    if not name or not c.target_architectures:
        raise UsageError(
            f"verifier={name!r}, architectures {c.target_architectures}: the format names the target; attach the head "
            "to it, and give its hub id or path"
        )
    config: dict[str, Any] = {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "speculators_version": "0.7.0",
        "draft_vocab_size": c.draft_vocab_size or c.vocab_size,
        "target_hidden_size": c.hidden_size if c.hidden_size != c.layer["hidden_size"] else None,
        "norm_before_residual": c.norm_before_residual,
        "norm_before_fc": c.norm_before_fc,
        "fc_norm": c.fc_norm,
        "norm_output": c.norm_output,
        "embed_requires_grad": False,
        _IDS: layers,
        _RECORD: layers,
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {
                    "proposal_type": "greedy",
                    "speculative_tokens": speculative_tokens,
                    "verifier_accept_k": 1,
                    "accept_tolerance": 0.0,
                }
            ],
            "verifier": {"name_or_path": name, "architectures": c.target_architectures},
        },
        "transformer_layer_config": _inner(head, dtype),
    }
    tensors = {
        "layers.0." + key.removeprefix("midlayer.") if key.startswith("midlayer.") else key: t
        for key, t in _tensors(head, dtype).items()
    }
    return _write(folder, config, tensors, name)


def _exportable(head: Eagle3) -> list[int]:
    if head.config.use_aux and not head.config.aux_layers:
        raise UsageError("its aux layers are the default of a target not yet known; attach the head to its target")
    if head.config.attention_bias:
        raise UsageError("vLLM puts a bias on o_proj wherever q, k and v have one; this head has none there")
    return list(head.config.aux_layers or ())


def _inner(head: Eagle3, dtype: torch.dtype | None) -> dict[str, Any]:
    """The layer's fields, in the older and the newer spelling of the rotary embedding."""
    c = head.config
    rope = dict(c.layer["rope_parameters"])
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    return {
        "model_type": "qwen3" if c.qk_norm else "llama",
        "num_hidden_layers": 1,
        **c.layer,
        "rope_theta": rope.get("rope_theta", 10000.0),
        "rope_scaling": None if rope.get("rope_type", "default") == "default" else scaling,
        "vocab_size": c.vocab_size,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "num_aux_hidden_states": len(c.aux_layers or ()) or 1,
        "torch_dtype": str(dtype or head.norm.weight.dtype).removeprefix("torch."),
    }


def _tensors(head: Eagle3, dtype: torch.dtype | None) -> Tensors:
    return {name: t.to(dtype) if dtype and t.is_floating_point() else t for name, t in head.state_dict().items()}


def _write(folder: str | Path, config: dict[str, Any], tensors: Tensors, target: str) -> Path:
    kind = "speculators" if "speculators_model_type" in config else "flat"
    card = (
        "---\ntags: [speculative-decoding, eagle3" + (", speculators" if kind == "speculators" else "") + "]\n---\n"
        f"# EAGLE-3 head for {target or 'a target of the sizes in config.json'}\n\nIn the {kind} format.\n"
    )
    return write_folder(folder, config, tensors, card)


# ---- checking --------------------------------------------------------------------------------------------------


def check(folder: str | Path, target: Target | None = None) -> list[str]:
    """What would go wrong when other engines load this folder, one sentence each; empty when nothing is seen.

    What no file shows: whether aux layers are off by one where the checkpoint carries no record of ours and the ids
    are not the other convention's default; whether norm_before_residual is what it was trained with; whether an
    embedding is random, unless ``target`` is given; whether the weights are any good.

    Args:
        folder: of either format.
        target: the model it was trained for, to compare with.

    Raises:
        UsageError: there is no readable checkpoint at all.
    """
    from specdec.drafters.eagle3.module import Eagle3

    folder = Path(folder)
    config, tensors = read_config(folder), read_tensors(folder)
    if not _known(config, tensors):
        return [
            "it is of neither format: no speculators_model_type in config.json and no hidden_norm among its weights"
        ]
    settings, mine, problems = _convert(config, tensors)
    problems += _folder_problems(folder) + _config_problems(config, settings)
    problems += [f"{name} must be of {kind}" for name, kind in (("d2t", torch.int64), ("t2d", torch.bool))
                 if name in tensors and tensors[name].dtype != kind]  # fmt: skip
    if "d2t" in mine and "t2d" not in tensors:
        problems.append("t2d is missing, SpecForge's exporter for SGLang needs it")
    problems += _embedding_problems(mine, settings, target)
    if problems:  # what follows repeats what has been said, or stumbles over it
        return problems
    try:
        head = Eagle3.from_pretrained(folder)
        if target is not None:
            head.attach(target)
    except UsageError as error:  # missing or unknown tensors, shapes, NaN, another target's sizes
        return [str(error)]
    return _layer_problems(head.config.aux_layers, target)


def _folder_problems(folder: Path) -> list[str]:
    problems = []
    index = folder / "model.safetensors.index.json"
    shards = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    weights = {file.name for pattern in ("*.safetensors", "*.bin", "*.pt") for file in folder.glob(pattern)}
    for name in sorted(weights - shards):
        problems.append(f"{name}: a weight file besides {', '.join(sorted(shards))}; vLLM loads every one it finds")
    for part in _OTHER_METHODS:
        if part in str(folder).lower():
            problems.append(f"{part!r} in its path {str(folder)!r} makes vLLM take it for another method; rename it")
    return problems


def _config_problems(config: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    problems = []
    theirs = "speculators_model_type" in config
    if "norm_before_residual" not in config:
        problems.append(
            "norm_before_residual is missing, which means true in the speculators format and false in the flat one"
        )
    layers = settings.get("aux_layers")
    inner = config.get("transformer_layer_config", {}) if theirs else config
    if layers and inner.get("num_aux_hidden_states", 3) != len(layers):
        where = "transformer_layer_config" if theirs else "config.json"
        problems.append(f"num_aux_hidden_states in {where} must be {len(layers)}, vLLM sizes fc by it")
    if not theirs:
        entering, outputs = config.get(_IDS), (config.get("eagle_config") or {}).get(_IDS)
        if settings.get("use_aux") and (not entering or not outputs):
            problems.append(f"{_IDS} must stand at the top level (for vLLM) and in eagle_config (for SGLang, less one)")
        elif entering and outputs and entering != [i + 1 for i in outputs]:
            problems.append(f"{_IDS} {entering} must be one more than eagle_config's {outputs} (outputs of layers)")
        return problems
    said = config.get("speculators_config") or {}
    verifier = said.get("verifier") or {}
    if not layers:
        problems.append(f"{_IDS} is missing")
    if said.get("algorithm") != "eagle3" or not said.get("proposal_methods"):
        problems.append("speculators_config must have algorithm 'eagle3' and proposal_methods")
    if not verifier.get("name_or_path") or not verifier.get("architectures"):
        problems.append("speculators_config.verifier must give name_or_path and architectures of the target")
    return problems


def _embedding_problems(mine: Tensors, settings: dict[str, Any], target: Target | None) -> list[str]:
    table = mine.get("embed_tokens.weight")
    if table is None or (settings and settings["hidden_size"] != settings["layer"]["hidden_size"]):
        return []  # the target's is used, or cannot be
    if target is None:
        return ["it ships embed_tokens, which engines use as it is; give the target to compare it, or leave it out"]
    theirs = target.model.get_input_embeddings().weight.detach().to(table)
    # stored in half precision, a copy differs by rounding
    if table.shape != theirs.shape or not torch.allclose(table.float(), theirs.float(), rtol=1e-2, atol=1e-4):
        return ["its embed_tokens is not the target's; leave it out, unless it was trained"]
    return []


def _layer_problems(layers: list[int] | None, target: Target | None) -> list[str]:
    if target is None or layers is None:
        return []
    N = target.config.num_hidden_layers
    if N >= 7 and layers == [1, N // 2 - 1, N - 4]:
        return [f"its aux layers {layers} look like numbers of layers' outputs; streams entering would be one more"]
    return []


WRITERS: dict[str, Callable[..., Path]] = {"eagle3": write_flat, "speculators": write_speculators}
