"""Small random models of the installed transformers' families, and the table of them in the docs.

Two layers (or the fewest that show every layer type), 32 wide, 96 tokens, windows of 8 tokens: 48 new tokens cross
every window several times. The weights are drawn anew, large enough that argmaxes are clear and depend on context.
"""

from __future__ import annotations

import importlib.metadata
import math
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, GenerationConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

TRANSFORMERS = ".".join(importlib.metadata.version("transformers").split(".")[:2])
RELEASE = tuple(map(int, TRANSFORMERS.split(".")))
# until this release a cached forward of theirs was another than the whole one, and generate() wrote something else
SOUND_SINCE = dict.fromkeys(("big_bird", "megatron-bert", "rembert", "roformer"), (5, 18))
VOCABULARY = 96
WINDOW = 8
PAD = 0

# each config takes the names it knows (its own or those its attribute_map translates)
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "d_model": 32,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "ffn_hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "sliding_window": WINDOW,
    "attention_chunk_size": WINDOW,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "shared_expert_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "rotary_dim": 8,
    "is_decoder": True,
    "tie_word_embeddings": False,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MIX = {"layer_types": ["sliding_attention", "full_attention"]}


@dataclass(frozen=True)
class Family:
    """One kind of model.

    Attributes:
        name: as in the docs; usually transformers' ``model_type``.
        model_type: if the name is another.
        config: settings beside the common sizes.
        padded: False where ``generate()`` itself gives another text for a left-padded row than for the row alone;
            those rows are compared with the row alone.
        gain: size of the weights, see ``redraw``.
        refused: words of the reason, for families that cannot be decoded.
        auto: the class that builds the model.
    """

    name: str
    model_type: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    padded: bool = True
    gain: float = 1.5
    refused: str = ""
    auto: type = AutoModelForCausalLM

    @property
    def type(self) -> str:
        return self.model_type or self.name

    @property
    def installed(self) -> bool:
        """Whether this release of transformers has the family, and decodes it."""
        return self.type in CONFIG_MAPPING and SOUND_SINCE.get(self.name, RELEASE) <= RELEASE


def sizes(model_type: str, **settings: Any) -> dict[str, Any]:
    """The common sizes that a family's config knows, and ``settings``."""
    config_class = CONFIG_MAPPING[model_type]
    known = {*config_class().to_dict(), *getattr(config_class, "attribute_map", {})}
    return {name: value for name, value in _SIZES.items() if name in known} | settings


def build(family: Family, seed: int = 0) -> PreTrainedModel:
    """A model of the family that never ends by itself."""
    config = CONFIG_MAPPING[family.type](**sizes(family.type, **family.config))
    torch.manual_seed(seed)
    model = family.auto.from_config(config, dtype=torch.float32).eval()
    redraw(model, seed, family.gain)
    model.generation_config = GenerationConfig(pad_token_id=PAD)
    return model


@torch.no_grad()
def redraw(model: PreTrainedModel, seed: int, gain: float) -> None:
    """Draw weights so that every layer speaks up: matrices of norm ``gain``, embeddings and sinks of size 1."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if id(p) in embeddings or "sink" in name:
            p.copy_(noise)
        elif p.dim() > 1:
            p.copy_(noise * gain / math.sqrt(p.shape[-1]))
        else:
            p.add_(0.1 * noise)


@torch.no_grad()
def noisy_copy(model: PreTrainedModel, noise: float, seed: int = 1) -> PreTrainedModel:
    """A draft model that often, but not always, agrees with ``model``."""
    generator = torch.Generator().manual_seed(seed)
    copy = type(model)(model.config).eval()
    copy.load_state_dict(model.state_dict())
    for p in copy.parameters():
        p.add_(noise * p.std() * torch.randn(p.shape, generator=generator) if p.numel() > 1 else 0)
    return copy


def shows(model: PreTrainedModel) -> list[str]:
    """What a decoder must get right for this model, read off its configuration and modules."""
    config = model.config.get_text_config(decoder=True)
    kinds = {*(getattr(config, "layer_types", None) or ["sliding_attention" if _window(config) else "full_attention"])}
    heads, shared = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    tables = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Embedding)]
    facts = {
        "window": "sliding_attention" in kinds,
        "chunks": "chunked_attention" in kinds,
        "dict mask": len(kinds) > 1,
        "grouped heads": (shared or heads) < heads or bool(getattr(config, "multi_query", False)),
        "latent heads": getattr(config, "kv_lora_rank", None) is not None,
        "shared KV layers": bool(getattr(config, "num_kv_shared_layers", 0)),
        "learned positions": any("pos" in n or n.endswith("wpe") for n in tables),
        "ALiBi": bool(getattr(config, "alibi", False)) or config.model_type in ("bloom", "mpt"),
        "local window": "local" in getattr(config, "attention_layers", ()),
        "experts": any("expert" in n for n, _ in model.named_parameters()),
        "softcap": any(getattr(config, f"{n}_logit_softcapping", None) for n in ("attn", "final")),
        "sinks": any("sink" in n for n, _ in model.named_parameters()),
    }
    return [name for name, holds in facts.items() if holds]


def _window(config: Any) -> bool:
    return bool(getattr(config, "sliding_window", None)) and getattr(config, "use_sliding_window", True)


def row(family: Family, tier: str, reason: str, masks: str, attention: str, shown: list[str]) -> str:
    """The family's line in the table."""
    # what differs between machines and Python versions stays out: sizes of errors, texts of foreign exceptions
    reason = re.sub(r" \(\w+Error: .*\)$", "", re.sub(r" off by [\d.e+-]+", " off", reason))
    if not family.padded:
        reason += "; `generate()` itself gives padded rows another text, so rows are compared with the row alone"
    return f"| {family.name} | {tier} | {masks} | {attention} | {', '.join(shown)} | {reason} |"


def table(lines: list[str]) -> str:
    """The whole page."""
    tiers = [line.split(" | ")[1] for line in lines]
    return (
        f"""# Families

Written by `SPECDEC_WRITE_DOCS=1 pytest tests/test_families.py`, checked line by line by every run of the tests.

Small random models of the causal-LM families of transformers {TRANSFORMERS}: {tiers.count("tree")} take draft trees,
{tiers.count("chain")} take chains (of a tree the first child of each node), {tiers.count("none")} are refused with the
reason below. For the first two the greedy text equals `generate()`'s in float32 with `none`, token-recycling, a hybrid
of all tables, draft models as chains and trees, and (where trees and hidden states are to be had) lookahead, for one
row and for a left-padded batch of three, 48 new tokens. Windows are {WINDOW} tokens.

Models of images and sound are not here, whatever text they can be made to write.

| family | tier | masks | attention | what it shows | why this tier |
|---|---|---|---|---|---|
"""
        + "\n".join(lines)
        + "\n"
    )


def _each(names: str, **config: Any) -> list[Family]:
    return [Family(name, config=config) for name in names.split()]


_EXPERTS = {"n_shared_experts": 1, "num_experts_per_tok": 2}

_TYPES = {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4}
_SHARED_KV = {**_TYPES, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 96}
_HALF = {"decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
_BOTH = {**_HALF, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48}
_LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8}

DECODED = sorted(
    [
        # rotary positions, every layer sees everything
        *_each(
            "apertus arcee aria_text bitnet codegen diffllama ernie4_5 ernie4_5_moe falcon flex_olmo gemma glm glm4"
            " glm4_moe gpt_neox gpt_neox_japanese gptj granite granitemoe granitemoeshared helium hrm_text"
            " hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax jais2 jetmoe llama minimax_m2 nanochat nemotron olmo"
            " olmo2 olmoe persimmon qwen2_moe qwen3_moe seed_oss solar_open stablelm"
        ),
        *_each("axk1 deepseek_v2 deepseek_v3 glm4_moe_lite minicpm3 youtu", num_key_value_heads=4),
        Family("cohere", config={"logit_scale": 1.0}),
        Family(
            "dbrx",
            config={
                "n_heads": 4,
                "n_layers": 2,
                "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
                "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
            },
        ),
        Family(
            "longcat_flash",
            config={
                "num_layers": 1,
                "num_key_value_heads": 4,
                "expert_ffn_hidden_size": 16,
                "moe_topk": 2,
                "zero_expert_num": 2,
            },
        ),
        Family("minimax_m3_vl_text", config={"dense_intermediate_size": 48, "shared_intermediate_size": 16}),
        Family("phi", gain=4.0),
        # one window for all layers
        *_each("ministral ministral3 mistral mixtral phi3 phimoe starcoder2"),
        # two kinds of layers
        *_each(
            "afmoe cwm exaone4 exaone_moe flint gpt_oss granite_swa granitemoe_swa kolibri1 laguna mellum"
            " mimo_v2_flash modernbert-decoder olmo3 smollm3 vaultgemma",
            **_MIX,
        ),
        *_each("beam", **_MIX, mlp_layer_types=["dense", "sparse"]),
        *_each("qwen2 qwen3", **_MIX, use_sliding_window=True),
        *_each("cohere2 cohere2_moe", **_MIX, logit_scale=1.0),
        Family("dots1", config={**_MIX, "n_shared_experts": 1}),
        Family("gemma2", config={**_MIX, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 4.0}),
        Family("gemma3_text", config={**_MIX, "query_pre_attn_scalar": 8}, gain=2.5),
        Family("gemma3n_text", config={**_SHARED_KV, "laurel_rank": 4, "activation_sparsity_pattern": [0.0] * 4}),
        Family("gemma4_text", config={**_SHARED_KV, "global_head_dim": 8}),
        Family("llama4_text", config={"layer_types": ["chunked_attention", "full_attention"]}),
        # learned or sinusoidal positions
        *_each("bert bert-generation big_bird biogpt electra ernie gpt2 gpt_bigcode megatron-bert opt xglm"),
        Family("ctrl", config={"dff": 48}),
        Family("rembert", gain=4.0),
        # positions or distances counted in slots
        *_each("bloom mpt"),
        Family("falcon-alibi", "falcon", {"alibi": True}),
        Family(
            "gpt_neo", config={"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": WINDOW}
        ),
        *(Family(f"{name}-decoder", name, _BOTH, padded=False) for name in ("bart", "mbart", "pegasus")),
        Family("blenderbot-small-decoder", "blenderbot-small", _BOTH, padded=False),
        Family("roformer", padded=False, gain=0.7),
        Family("trocr-decoder", "trocr", _HALF, padded=False),
    ],
    key=lambda family: family.name,
)


def _no(names: str, refused: str, auto: type = AutoModelForCausalLM, **config: Any) -> list[Family]:
    return [Family(name, config=config, refused=refused, auto=auto) for name in names.split()]


_ROLLED = "linear_attention, which cannot be rolled back"

REFUSED = sorted(
    [
        *_no("bailing_hybrid falcon_mamba mamba", _ROLLED),
        *_no("minimax olmo_hybrid qwen3_5_text qwen3_next", _ROLLED, **_LINEAR),
        *_no("mamba2", _ROLLED, num_heads=8, head_dim=8, n_groups=2, state_size=8),
        *_no("jamba", _ROLLED, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8, mamba_dt_rank=4),
        *_no("bamba", _ROLLED, **_MAMBA, attn_layer_indices=[1]),
        *_no("granitemoehybrid", _ROLLED, **_MAMBA, layer_types=["mamba", "attention"]),
        *_no(
            "recurrent_gemma",
            "rolled back",
            num_hidden_layers=3,
            attention_window_size=WINDOW,
            lru_width=32,
        ),
        *_no("zamba", _ROLLED, num_hidden_layers=3),
        *_no("falcon_h1", "hybrid, which cannot be rolled back", **_MAMBA, mamba_d_ssm=64),
        *_no("lfm2", "conv, which cannot be rolled back", layer_types=["conv", "full_attention"]),
        *_no("rwkv", "recurrent state", attention_hidden_size=32),
        *_no("xlstm", "recurrent state", num_heads=4),
        *_no(
            "deepseek_v32",
            "(indexed|sparse)_attention",
            num_key_value_heads=4,
            index_n_heads=2,
            index_head_dim=8,
        ),
        *_no("doge", "dynamic mask"),
        *_no("moshi", "attention window"),
        *_no("openai-gpt", "no past_key_values"),
        *_no("roberta xlm-roberta", "not even a chain"),
        *_no("bart m2m_100 mbart pegasus", "encoder-decoder", AutoModelForSeq2SeqLM, **_BOTH),
        *_no("mt5 t5 umt5", "encoder-decoder", AutoModelForSeq2SeqLM, d_ff=48, d_kv=8, num_layers=2),
    ],
    key=lambda family: family.name,
)
