"""EAGLE-3's head: one layer that reads the next token's embedding beside fused features of three target layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from specdec.cache import TreeCache
from specdec.drafters.eagle3 import formats
from specdec.errors import UsageError
from specdec.heads import Batch, Drafts, Head, HeadConfig, Output
from specdec.heads.layer import DraftLayer, attend, chain_attend, layer_config
from specdec.structure import Needs, Tap
from specdec.target import Target


@dataclass(kw_only=True)
class Eagle3Config(HeadConfig):
    """See ``HeadConfig``.

    Attributes:
        layer: keywords of the draft layer's ``LlamaConfig``, with its own rotary embedding.
        aux_layers: target layers whose entering streams are fused, i.e. indices of HF's ``hidden_states``; None: the
            method's default for the target's depth, known once attached.
        steps: T, draft steps unrolled in training.
        draft_vocab_size: V_d; None: the target's whole vocabulary.
        use_aux: False reads the target's final hidden state as it is, without ``fc``.
        norm_before_residual: the layer's residual is the normed hidden input.
        norm_before_fc: one norm on the concatenated features.
        fc_norm: a norm on each feature.
        norm_output: the normed state, not the raw one, is what the next draft step reads (speculators' meaning).
        attention_bias, qk_norm: see ``DraftLayer``.
        own_embedding: the checkpoint ships an embedding table; else the target's is used.
        shared_output: logits come from the target's own output matrix.
        target_architectures: the target's, for exports.
    """

    layer: dict[str, Any]
    aux_layers: list[int] | None = None
    steps: int = 7
    draft_vocab_size: int | None = None
    use_aux: bool = True
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    attention_bias: bool = False
    qk_norm: bool = False
    own_embedding: bool = False
    shared_output: bool = False
    target_architectures: list[str] = field(default_factory=list)


class MidLayer(DraftLayer):
    """A layer whose attention reads [norm(embedding) ; norm(hidden)] and whose residual is the hidden input."""

    def __init__(self, config: Eagle3Config):
        super().__init__(config.layer, inputs=2, bias=config.attention_bias, qk_norm=config.qk_norm)
        self.hidden_norm = LlamaRMSNorm(self.config.hidden_size, self.config.rms_norm_eps)
        self.norm_before_residual = config.norm_before_residual

    def streams(self, embedded: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """What the attention reads [B, n, 2d], and the residual [B, n, d]."""
        normed = self.hidden_norm(hidden)
        x = torch.cat([self.input_layernorm(embedded), normed], dim=-1)
        return x, normed if self.norm_before_residual else hidden

    def read(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``query`` and ``key_value`` at once, whose rotation is the dearest small part of a draft step."""
        q = self._split(self.self_attn["q_proj"](x), self.heads, "q_norm")
        k = self._split(self.self_attn["k_proj"](x), self.kv_heads, "k_norm")
        q, k = apply_rotary_pos_emb(q, k, *self.rotary(x, positions))
        return q, k, self._split(self.self_attn["v_proj"](x), self.kv_heads)


class Eagle3(Head):
    """One layer that drafts token by token on the target's fused features (Li et al., arXiv 2503.01840).

    At index i it reads (g_i, x_{i+1}) and predicts x_{i+2}; later draft steps read its own state in place of g. Names
    of parameters are the official checkpoints'.

    Shapes: B rows, n positions, d the layer's hidden size, V_d the draft vocabulary.

    Raises:
        UsageError: settings that contradict each other.
    """

    method = "eagle3"
    config_class = Eagle3Config
    config: Eagle3Config

    def __init__(self, config: Eagle3Config):
        super().__init__(config)
        self.midlayer = MidLayer(config)
        d, eps = self.midlayer.config.hidden_size, self.midlayer.config.rms_norm_eps
        V, V_d = config.vocab_size, config.draft_vocab_size or config.vocab_size
        if config.steps < 1:
            raise UsageError(f"steps={config.steps} must be at least 1")
        if not 1 <= V_d <= V:
            raise UsageError(f"draft_vocab_size={V_d} must be between 1 and the vocabulary's {V}")
        if config.shared_output and (V_d < V or d != config.hidden_size):
            raise UsageError(
                f"shared_output=True uses the target's matrix [{V}, {config.hidden_size}], which fits neither "
                f"draft_vocab_size={V_d} nor hidden_size={d} unless they are equal; use shared_output=False"
            )
        if d != config.hidden_size and not (config.own_embedding and config.use_aux):
            raise UsageError(
                f"hidden_size={d} of the layer differs from the target's {config.hidden_size}: the head then needs "
                "an embedding of its own (own_embedding) and fused features (use_aux)"
            )
        if config.use_aux:
            count = 3 if config.aux_layers is None else len(config.aux_layers)
            if config.norm_before_fc:
                self.input_norm = LlamaRMSNorm(count * config.hidden_size, eps)
            if config.fc_norm:
                self.fc_norm = nn.ModuleList(LlamaRMSNorm(config.hidden_size, eps) for _ in range(count))
            self.fc = nn.Linear(count * config.hidden_size, d, bias=False)
        self.norm = LlamaRMSNorm(d, eps)
        if not config.shared_output:
            self.lm_head = nn.Linear(d, V_d, bias=False)
        if config.own_embedding:
            self.embed_tokens = nn.Embedding(V, d)
            self.embed_tokens.weight.requires_grad_(False)
        if V_d < V:
            self.register_buffer("d2t", torch.zeros(V_d, dtype=torch.long))  # offsets: target id = i + d2t[i]
            self.register_buffer("t2d", torch.arange(V) < V_d)

    @classmethod
    def fresh(
        cls,
        target: Target,
        *,
        draft_vocab_size: int | None = None,
        steps: int = 7,
        shared_output: bool = False,
        copy_output: bool = False,
        layers: list[int] | None = None,
        intermediate_size: int | None = None,
        counts: Tensor | None = None,
        always: Sequence[int] = (),
        **_: Any,
    ) -> Eagle3:
        """An untrained head.

        Args:
            target: the model to draft for; the layer is shaped like one of its own.
            draft_vocab_size: V_d; None: the whole vocabulary.
            steps: T.
            shared_output: use the target's output matrix instead of an own one.
            copy_output: let the own one start as the target's rows; the official code starts at random, and has more
                data to learn it from.
            layers: see ``Eagle3Config.aux_layers``.
            intermediate_size: of the layer's MLP; None: the target's.
            counts: int64 [V], how often each token is learned; needed to choose a smaller vocabulary.
            always: tokens that the smaller vocabulary holds besides the target's special tokens.

        Raises:
            UsageError: an option out of range, or a smaller vocabulary without counts.
        """
        N = target.config.num_hidden_layers
        if layers is not None and (
            not layers or sorted(set(layers)) != list(layers) or not 0 <= layers[0] <= layers[-1] <= N
        ):
            raise UsageError(f"layers={list(layers)} must be increasing numbers from 0 (embedding) to {N}")
        V = target.vocab_size
        V_d = V if draft_vocab_size is None else draft_vocab_size
        changes = {} if intermediate_size is None else {"intermediate_size": intermediate_size}
        head = cls(
            Eagle3Config(
                **Eagle3Config.facts(target),
                layer=layer_config(target.config, **changes),
                aux_layers=default_layers(N) if layers is None else list(layers),
                steps=steps,
                draft_vocab_size=None if V_d == V else V_d,
                shared_output=shared_output,
                target_architectures=_architectures(target),
            )
        )
        if V_d < V:
            if counts is None:
                raise UsageError(f"draft_vocab_size={V_d} is below {V}: give counts, how often each token is learned")
            head.set_vocabulary(cls.vocabulary(counts, V_d, [*special_tokens(target), *always]))
        if copy_output and not shared_output:
            rows = target.head.module.weight.detach()
            head.lm_head.weight.data.copy_(rows if V_d == V else rows[head.t2d.to(rows.device)])
        return head

    @staticmethod
    def vocabulary(counts: Tensor, size: int, always: Sequence[int] = ()) -> Tensor:
        """The draft vocabulary, int64 [size], ascending: ``always``, then the most frequent; of equals the lower id.

        Args:
            counts: int64 [V].
            size: V_d.
            always: tokens it must hold.

        Raises:
            UsageError: size out of range or below the number of ``always``, or a token out of range.
        """
        V, forced = len(counts), sorted(set(always))
        if not max(len(forced), 1) <= size <= V:
            raise UsageError(
                f"draft_vocab_size={size} must be between {max(len(forced), 1)} (tokens forced in) and {V}"
            )
        if forced and not 0 <= forced[0] <= forced[-1] < V:
            raise UsageError(f"always={forced[:8]} must hold tokens between 0 and {V - 1}")
        rank = counts.clone().cpu()
        rank[forced] = rank.max() + 1
        return rank.sort(descending=True, stable=True).indices[:size].sort().values

    def set_vocabulary(self, ids: Tensor) -> None:
        """Take int64 [V_d], ascending target ids, as the draft vocabulary."""
        self.d2t.copy_(ids - torch.arange(len(ids)))  # type: ignore[operator]
        self.t2d.zero_()[ids] = True  # type: ignore[operator]

    # ---- the parts, shared by training and drafting -----------------------------------------------------------

    @property
    def needs(self) -> Needs:
        if not self.config.use_aux:
            return Needs(final_hidden=True)
        return Needs(layers=tuple(self.config.aux_layers or ()))

    @property
    def depths(self) -> int:
        return self.config.steps

    def attach(self, target: Target) -> None:
        if self.config.use_aux and self.config.aux_layers is None:
            self.config.aux_layers = default_layers(target.config.num_hidden_layers)
        super().attach(target)
        self.config.target_architectures = _architectures(target)

    def fits(self, target: Target) -> str | None:
        layers, N = self.config.aux_layers or [], target.config.num_hidden_layers
        if any(not 0 <= layer <= N for layer in layers):
            return f"it reads target layers {layers}, this target has {N}"
        return None

    def fuse(self, taps: dict[Tap, Tensor]) -> Tensor:
        """g [B, n, d] from the target's hidden states [B, n, d_t]."""
        dtype = self.norm.weight.dtype
        if not self.config.use_aux:
            return taps["final_hidden"].to(dtype)
        features = [taps[layer].to(dtype) for layer in self.config.aux_layers or ()]
        if self.config.fc_norm:
            features = [norm(x) for norm, x in zip(self.fc_norm, features, strict=True)]
        x = torch.cat(features, dim=-1)
        return self.fc(self.input_norm(x) if self.config.norm_before_fc else x)

    def embed(self, tokens: Tensor) -> Tensor:
        """[..., d] of int64 [...], frozen."""
        table = self.embed_tokens if self.config.own_embedding else self.shared.embed
        return table(tokens).to(self.norm.weight.dtype)

    def finish(self, a: Tensor) -> tuple[Tensor, Tensor]:
        """What the output matrix reads, and what the next draft step reads, from the layer's states a [..., d]."""
        normed = self.norm(a)
        return normed, normed if self.config.norm_output else a

    def output(self) -> Output:
        """From ``finish``'s first to logits over the draft vocabulary."""
        if self.config.shared_output:
            return self.shared.output
        return Output(self.lm_head.weight, ids=self.ids)

    @property
    def ids(self) -> Tensor | None:
        """int64 [V_d], target tokens of the draft vocabulary; None: all."""
        if self.config.draft_vocab_size is None:
            return None
        return self.d2t + torch.arange(len(self.d2t), device=self.d2t.device)  # type: ignore[operator,arg-type]

    # ---- training ---------------------------------------------------------------------------------------------

    def drafts(self, batch: Batch) -> Drafts:
        """Training-time test: T draft steps from every position at once, on the head's own states.

        Step s at index i reads (a^{s-1}_i or g_i, x_{i+1+s}) at position i + s. It sees step 0 up to i, which are real
        features, and of later steps only its own chain: what it will see in use.
        """
        layer = self.midlayer
        embedded, hidden = self.embed(batch.ids), self.fuse(batch.taps)
        B, S = batch.ids.shape
        positions = torch.arange(S, device=hidden.device).expand(B, -1)
        output = self.output()
        states: list[Tensor] = []
        pairs: list[tuple[Tensor, Tensor]] = []
        for s in range(self.config.steps):
            shift = min(1 + s, S)  # indices that run out of tokens read zeros, and are never learned
            x, residual = layer.streams(nn.functional.pad(embedded[:, shift:], (0, 0, 0, shift)), hidden)
            q, k, v = layer.read(x, positions + s)
            pairs.append((k, v))
            attended = chain_attend(q, *pairs[0], pairs[1:])
            state, hidden = self.finish(layer.finish(residual, attended))
            states.append(state.to(output.weight.dtype))  # the target's may be of lower precision
        return Drafts(states, [output] * self.config.steps)

    # ---- drafting ---------------------------------------------------------------------------------------------

    def extend(self, tokens: Tensor, hidden: Tensor, positions: Tensor, cache: TreeCache, visible: Tensor) -> Tensor:
        """The layer's states a [B, n, d] of n more columns, whose keys and values are appended to ``cache``.

        Args:
            tokens: int64 [B, n], target ids.
            hidden: [B, n, d], g or the parents' states.
            positions: int64 [B, n].
            cache: of one layer.
            visible: bool [B, n, S], S = cached columns, these n included.
        """
        layer = self.midlayer
        x, residual = layer.streams(self.embed(tokens), hidden)
        q, k, v = layer.read(x, positions)
        k, v = cache.layers[0].update(k, v)
        cache.advance(tokens.shape[1])
        return layer.finish(residual, attend(q, k, v, visible))

    @classmethod
    def foreign(
        cls, config: dict[str, Any], tensors: dict[str, Tensor]
    ) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        return formats.read(config, tensors)


def default_layers(N: int) -> list[int]:
    """A low, a middle and a high layer of an N-layer target: 2, N // 2, N - 3, or distinct ones where those collide."""
    if N >= 7:
        return [2, N // 2, N - 3]
    return [1, N // 2, N - 1] if N >= 4 else list(range(max(N - 2, 0), N + 1))


def special_tokens(target: Target) -> list[int]:
    """Tokens that end or frame a text, which no draft vocabulary should lack."""
    found: set[int] = set(getattr(target.tokenizer, "all_special_ids", None) or ())
    for source in (target.config, target.model.generation_config):
        for name in ("bos_token_id", "eos_token_id"):
            value = getattr(source, name, None)
            found |= set(value if isinstance(value, (list, tuple)) else [] if value is None else [value])
    return sorted(t for t in found if 0 <= t < target.vocab_size)


def _architectures(target: Target) -> list[str]:
    return [type(target.model).__name__]
