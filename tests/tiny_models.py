"""Small random models whose argmaxes are clear."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

_SHAPE = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    initializer_range=0.3,  # wide enough that argmaxes are not near ties
    max_position_embeddings=256,
    bos_token_id=1,
    eos_token_id=None,
    pad_token_id=0,
)


def tiny_llama(vocab_size: int = 64, seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **{**_SHAPE, **changes})).eval()


def tiny_mistral(vocab_size: int = 64, seed: int = 0, window: int = 8, **changes: Any) -> MistralForCausalLM:
    """Every layer slides."""
    torch.manual_seed(seed)
    config = MistralConfig(vocab_size=vocab_size, sliding_window=window, **{**_SHAPE, **changes})
    return MistralForCausalLM(config).eval()


def tiny_gemma2(vocab_size: int = 64, seed: int = 0, window: int = 8, **changes: Any) -> Gemma2ForCausalLM:
    """Sliding and full layers in turn, softcaps on attention and logits."""
    torch.manual_seed(seed)
    shape = {**_SHAPE, "head_dim": 8, **changes}
    return Gemma2ForCausalLM(Gemma2Config(vocab_size=vocab_size, sliding_window=window, **shape)).eval()


def tiny_gpt_oss(vocab_size: int = 64, seed: int = 0, window: int = 8, **changes: Any) -> GptOssForCausalLM:
    """Sliding and full layers in turn, a learned sink per attention head, experts."""
    torch.manual_seed(seed)
    shape = {**_SHAPE, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1, **changes}
    model = GptOssForCausalLM(GptOssConfig(vocab_size=vocab_size, sliding_window=window, **shape)).eval()
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks)
    return model
