"""One decoder layer that drafters own, with its keys and values: the whole of EAGLE-3's and Chimera's depth.

Norms, MLP and rotary embedding are transformers'; attention is ours, since in training a query sees a causal text and
then only its own chain, and in use a cache and its ancestors among the draft nodes.

Shapes: B rows, n positions, S keys, H heads, G key/value heads, D head size, d hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, PretrainedConfig
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

_SHAPE = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "max_position_embeddings",
    "rope_parameters",
)


def layer_config(target: PretrainedConfig, **changes: Any) -> dict[str, Any]:
    """Keywords of a ``LlamaConfig`` for a layer shaped like the target's, as far as it says, for a head's config."""
    said = {name: getattr(target, name) for name in _SHAPE if getattr(target, name, None) is not None}
    rope = said.get("rope_parameters")
    if rope is not None and "rope_type" not in rope:  # one per kind of layer: take the one for full attention
        said["rope_parameters"] = rope.get("full_attention")
    made = LlamaConfig(**{"intermediate_size": 4 * target.hidden_size, **said, **changes})
    return {name: getattr(made, name) for name in _SHAPE}


class DraftLayer(nn.Module):
    """A Llama layer whose input may be two streams side by side (EAGLE-3).

    Args:
        config: keywords of a ``LlamaConfig``.
        inputs: streams the attention reads, 1 or 2; each has hidden_size channels and is normed by the caller.
        bias: of the attention's projections.
        qk_norm: RMSNorm on every query and key head, as in Qwen3.
    """

    def __init__(self, config: dict[str, Any], inputs: int = 1, bias: bool = False, qk_norm: bool = False):
        super().__init__()
        self.config = c = LlamaConfig(**config)
        d, wide = c.hidden_size, inputs * c.hidden_size
        self.heads, self.kv_heads, self.head_dim = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.self_attn = nn.ModuleDict(
            {
                "q_proj": nn.Linear(wide, self.heads * self.head_dim, bias=bias),
                "k_proj": nn.Linear(wide, self.kv_heads * self.head_dim, bias=bias),
                "v_proj": nn.Linear(wide, self.kv_heads * self.head_dim, bias=bias),
                "o_proj": nn.Linear(self.heads * self.head_dim, d, bias=False),
            }
        )
        if qk_norm:
            self.self_attn["q_norm"] = LlamaRMSNorm(self.head_dim, c.rms_norm_eps)
            self.self_attn["k_norm"] = LlamaRMSNorm(self.head_dim, c.rms_norm_eps)
        self.qk_norm = qk_norm
        self.input_layernorm = LlamaRMSNorm(d, c.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(d, c.rms_norm_eps)
        self.mlp = LlamaMLP(c)
        self.rotary = LlamaRotaryEmbedding(c)

    def query(self, x: Tensor, positions: Tensor) -> Tensor:
        """Queries [B, H, n, D] of inputs [B, n, inputs * d] at positions int64 [B, n]."""
        return self._rotate(self._split(self.self_attn["q_proj"](x), self.heads, "q_norm"), positions)

    def key_value(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, G, n, D] of inputs [B, n, inputs * d] at positions int64 [B, n]."""
        k = self._rotate(self._split(self.self_attn["k_proj"](x), self.kv_heads, "k_norm"), positions)
        return k, self._split(self.self_attn["v_proj"](x), self.kv_heads)

    def finish(self, residual: Tensor, attended: Tensor) -> Tensor:
        """The rest of the layer: residual [B, n, d] and attended [B, H, n, D] -> [B, n, d]."""
        y = residual + self.self_attn["o_proj"](attended.transpose(1, 2).flatten(2))
        return y + self.mlp(self.post_attention_layernorm(y))

    def _split(self, x: Tensor, heads: int, norm: str | None = None) -> Tensor:
        x = x.unflatten(-1, (heads, self.head_dim))
        if self.qk_norm and norm is not None:
            x = self.self_attn[norm](x)
        return x.transpose(1, 2)

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        cos, sin = self.rotary(x, positions)
        return apply_rotary_pos_emb(x, x, cos, sin)[0]


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """Attention [B, H, n, D] of queries [B, H, n, D] over keys [B, G, S, D] where ``visible`` bool [B, n, S]."""
    return nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=visible[:, None], enable_gqa=q.shape[1] != k.shape[1]
    )


def chain_attend(q: Tensor, k: Tensor, v: Tensor, own: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Attention of a draft step in training: a causal text, then the query's own chain, in one softmax.

    Query i sees keys 0..i of ``k`` and, of each pair in ``own``, the key at index i alone.

    Args:
        q: [B, H, S, D].
        k, v: [B, G, S, D], of the text.
        own: pairs [B, G, S, D], of the chain's earlier steps and of the step itself.

    Returns:
        [B, H, S, D].
    """
    B, H, S, D = q.shape
    G = k.shape[1]
    q = q.view(B, G, H // G, S, D) * D**-0.5
    causal = torch.ones(S, S, dtype=torch.bool, device=q.device).tril_()
    scores = (q @ k[:, :, None].mT).masked_fill(~causal, float("-inf"))  # [B, G, H/G, S, S]
    alone = [(q * ki[:, :, None]).sum(-1, keepdim=True) for ki, _ in own]  # [B, G, H/G, S, 1]
    a = torch.cat([scores, *alone], dim=-1).softmax(-1, dtype=torch.float32).to(q.dtype)
    out = a[..., :S] @ v[:, :, None]
    for j, (_, vi) in enumerate(own):
        out = out + a[..., S + j, None] * vi[:, :, None]
    return out.reshape(B, H, S, D)
