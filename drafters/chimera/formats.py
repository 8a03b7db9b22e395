"""Chimera checkpoints of the authors' code (github.com/kafkayu/Chimera): compat, unverified.

Written from the code that saves them; no such checkpoint was at hand. A folder holds ``trimlp.pt``, ``fast_layer1.pt``
and ``chimera_head.pt``, all of a Llama-1 or Llama-2 of head size 128; that code trained the target's embedding along
without saving it, so trigrams may be read with a slightly different table than they were trained on. It also hid the
text's first k - 1 trigrams from the estimates of depth k, which see them here.
"""

from __future__ import annotations

import re
from typing import Any

import torch

_HEAD_DIM = 128
_TRIGRAM = {"0.linear.weight": "trigram.A.weight", "0.linear.bias": "trigram.A.bias", "1.weight": "trigram.B.weight"}
_LAYER = re.compile(r"0\.((self_attn|mlp|input_layernorm|post_attention_layernorm)\..+)")
_HEAD = re.compile(r"(\d+)\.0\.weight")

Tensors = dict[str, torch.Tensor]


def read(config: dict[str, Any], tensors: Tensors) -> tuple[dict[str, Any], Tensors] | None:
    """(keywords of ``ChimeraConfig``, tensors) of a released checkpoint; None if it is not one."""
    if "chimera_num_heads" not in config:
        return None
    ours: Tensors = {}
    for name, tensor in tensors.items():
        if name.endswith("rotary_emb.inv_freq"):
            continue
        if name in _TRIGRAM:
            ours[_TRIGRAM[name]] = tensor
        elif match := _LAYER.fullmatch(name):
            ours["fce." + match[1]] = tensor
        elif match := _HEAD.fullmatch(name):
            ours[f"heads.{match[1]}.weight"] = tensor
        else:
            ours[name] = tensor  # unknown: reported as such
    needed = ("trigram.B.weight", "heads.0.weight", "fce.self_attn.k_proj.weight", "fce.mlp.up_proj.weight")
    if not ours.keys() >= set(needed):
        return None
    B, head, key, up = (ours[name] for name in needed)
    d = B.shape[0]
    base = str(config.get("base_model_name_or_path", ""))
    layer = {
        "hidden_size": d,
        "intermediate_size": up.shape[0],
        "num_attention_heads": d // _HEAD_DIM,
        "num_key_value_heads": key.shape[0] // _HEAD_DIM,
        "head_dim": _HEAD_DIM,
        "rms_norm_eps": 1e-5 if "llama-2" in base.lower() else 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    facts = {
        "hidden_size": d,
        "vocab_size": head.shape[0],
        "target_id": base,
        "num_heads": config["chimera_num_heads"],
        "layer": layer,
        "head_form": "full",
        "mask_variant": "all_trigrams",
        "edge_rule": "newest",
    }
    return facts, ours
