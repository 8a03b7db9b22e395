"""Chimera's network: a trigram encoder, one decoder layer over it and the target's hidden states, and a head per depth.

Notation: H_j the target's final hidden state at position j, x_m the token at m, G_m the trigram encoder's state of
(x_{m-2}, x_{m-1}, x_m), F^(k)_j the layer's estimate of H_{j+k} from H_{<=j} and the tokens up to j + k. The head of
depth k (0-based) reads H_j and F^(k+1)_j and imitates p_{j+k+1}.

Shapes: B rows, S positions, n queries, d the target's hidden size, V its vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from specdec.drafters.chimera import formats
from specdec.errors import UsageError
from specdec.heads import Batch, Drafts, Head, HeadConfig, Output
from specdec.heads.layer import DraftLayer, attend, chain_attend, layer_config
from specdec.structure import Needs
from specdec.target import Target

_CHOICES = {
    "head_form": ("low_memory", "full"),
    "mask_variant": ("own", "all_trigrams"),
    "edge_rule": ("oldest", "newest"),
    "query_rows": ("trigram",),
}
_ALPHA = 0.1  # weight of the estimates' error against the cross-entropy


@dataclass(kw_only=True)
class ChimeraConfig(HeadConfig):
    """See ``HeadConfig``.

    Attributes:
        num_heads: K; the head of depth k predicts token t + 2 + k.
        layer: keywords of the layer's ``LlamaConfig``, its rope among them.
        head_form: "low_memory", the target's output matrix on R [H; F], R [d, 2d] per head; "full", an
            output matrix [V, 2d] per head.
        mask_variant: what an estimate sees besides H and its own trigram: "own", the chain's earlier estimates;
            "all_trigrams", every trigram up to its own and no estimate.
        edge_rule: which token the trigram (x_0, x_1) of position 1 repeats, the "oldest" or the "newest".
        query_rows: whose row of the layer is the estimate: the "trigram"'s.
    """

    num_heads: int
    layer: dict[str, Any]
    head_form: str = "low_memory"
    mask_variant: str = "own"
    edge_rule: str = "oldest"
    query_rows: str = "trigram"


class TrigramEncoder(nn.Module):
    """B (c + SiLU(A c + b)) of three embeddings side by side; A and b are zero at first."""

    def __init__(self, d: int):
        super().__init__()
        self.A = nn.Linear(3 * d, 3 * d)
        self.B = nn.Linear(3 * d, d, bias=False)
        nn.init.zeros_(self.A.weight)
        nn.init.zeros_(self.A.bias)

    def forward(self, c: Tensor) -> Tensor:
        """[..., 3d] -> [..., d]."""
        return self.B(c + functional.silu(self.A(c)))


class Chimera(Head):
    """Trigram encoder, full context encoder and residual heads (Zeng et al., arXiv 2402.15758).

    Raises:
        UsageError: fewer than one head, or an unknown name of a variant.
    """

    method = "chimera"
    config_class = ChimeraConfig
    config: ChimeraConfig
    needs = Needs(final_hidden=True)

    def __init__(self, config: ChimeraConfig):
        super().__init__(config)
        if config.num_heads < 1:
            raise UsageError(f"num_heads={config.num_heads} must be at least 1")
        for name, known in _CHOICES.items():
            if getattr(config, name) not in known:
                raise UsageError(f"{name}={getattr(config, name)!r} must be one of {', '.join(known)}")
        d = config.hidden_size
        self.trigram = TrigramEncoder(d)
        self.fce = DraftLayer(config.layer)
        rows = d if config.head_form == "low_memory" else config.vocab_size
        self.heads = nn.ModuleList(nn.Linear(2 * d, rows, bias=False) for _ in range(config.num_heads))

    @property
    def depths(self) -> int:
        return self.config.num_heads

    @property
    def all_trigrams(self) -> bool:
        return self.config.mask_variant == "all_trigrams"

    @classmethod
    def fresh(
        cls,
        target: Target,
        num_heads: int = 4,
        head_form: str = "low_memory",
        mask_variant: str = "own",
        edge_rule: str = "oldest",
        **_: Any,
    ) -> Chimera:
        head = cls(
            ChimeraConfig(
                **ChimeraConfig.facts(target),
                num_heads=num_heads,
                layer=layer_config(target.config),
                head_form=head_form,
                mask_variant=mask_variant,
                edge_rule=edge_rule,
            )
        )
        # logits start as LM(H) + LM(F)
        half = target.head.module.weight if head_form == "full" else torch.eye(head.config.hidden_size)
        for own in head.heads:
            own.get_parameter("weight").data.copy_(half.repeat(1, 2))
        return head

    # ---- the parts, in training as in use -------------------------------------------------------------------------

    def encode(self, grams: Tensor, positions: Tensor) -> Tensor:
        """G [..., d] of trigrams int64 [..., 3], padded on the left with x_0, that end at positions int64 [...]."""
        if self.config.edge_rule == "newest":
            oldest, middle, newest = grams.unbind(-1)
            grams = torch.stack([oldest, torch.where(positions == 1, newest, middle), newest], dim=-1)
        return self.trigram(self.shared.embed(grams).flatten(-2).to(self.trigram.B.weight.dtype))

    def key_value(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's keys and values of H, G or F [B, n, d] at positions int64 [B, n]."""
        return self.fce.key_value(self.fce.input_layernorm(x), positions)

    def query(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The layer's queries, keys and values of G [B, n, d] at positions int64 [B, n]."""
        x = self.fce.input_layernorm(x)
        return self.fce.query(x, positions), *self.fce.key_value(x, positions)

    def state(self, k: int, h: Tensor, F: Tensor) -> Tensor:
        """What head k's output matrix reads, [..., d] or [..., 2d], of H [..., d] and F^(k+1) [..., d]."""
        both = torch.cat([h.expand_as(F), F], dim=-1)
        return self.heads[k](both) if self.config.head_form == "low_memory" else both

    def output(self, k: int) -> Output:
        shared = self.shared.output
        if self.config.head_form == "low_memory":
            return shared
        return Output(self.heads[k].get_parameter("weight"), shared.bias, shared.scale, shared.cap)

    def logits(self, k: int, h: Tensor, F: Tensor) -> Tensor:
        """Head k's [..., V]."""
        return self.output(k)(self.state(k, h, F))

    # ---- training -------------------------------------------------------------------------------------------------

    def estimates(self, H: Tensor, ids: Tensor) -> list[Tensor]:
        """F^(1) .. F^(K), [B, S, d] each, along a text: H [B, S, d], ids int64 [B, S].

        F^(k)_j means nothing for j >= S - k, where its trigram would end beyond the text.
        """
        B, S = ids.shape
        at = torch.arange(S, device=ids.device).expand(B, -1)
        padded = torch.cat([ids[:, :1], ids[:, :1], ids], dim=1)
        G = self.encode(padded.unfold(1, 3, 1), at)
        q, *grams = self.query(G, at)  # [B, heads, S, D]
        text = self.key_value(H, at)
        k_all, v_all = (torch.cat(pair, dim=2) for pair in zip(text, grams, strict=True))
        everything = torch.ones(S, S, dtype=torch.bool, device=ids.device)
        made: list[Tensor] = []
        chain: list[tuple[Tensor, Tensor]] = []
        for k in range(1, self.depths + 1):
            # the trigram that ends k tokens later; what wraps around is not learned
            query, key, value = (t.roll(-k, 2) for t in (q, *grams))
            if self.all_trigrams:
                visible = torch.cat([everything.tril(), everything.tril(k)], dim=1)
                attended = attend(query, k_all, v_all, visible[None])
            else:
                attended = chain_attend(query, *text, [*chain, (key, value)])
            made.append(self.fce.finish(G.roll(-k, 1), attended))
            chain.append(self.key_value(made[-1], at + k))
        return made

    def drafts(self, batch: Batch) -> Drafts:
        H = batch.taps["final_hidden"].to(self.trigram.B.weight.dtype)
        F = self.estimates(H, batch.ids)
        K = range(self.depths)
        states = [self.state(k, H, F[k]) for k in K]
        return Drafts(states, [self.output(k) for k in K], self._error(F, H, batch.mask))

    def _error(self, F: list[Tensor], H: Tensor, mask: Tensor) -> Tensor:
        """Smooth L1 distance of the estimates from what they estimate, in units of H's root mean square.

        A mean over channels and a sum over the positions that the main loss looks at, weighted as there by depth.
        """
        b, m = mask[:, 1:].nonzero().unbind(1)  # H_m predicts a token to be learned
        rms = H[b, m].square().mean().sqrt()
        total = H.new_zeros(())
        for k, estimate in enumerate(F, start=1):
            there = m >= k
            bi, mi = b[there], m[there]
            error = functional.smooth_l1_loss(estimate[bi, mi - k] / rms, H[bi, mi] / rms, reduction="none")
            total = total + _ALPHA * self.decay ** (k - 1) * error.mean(-1).sum()
        return total

    @classmethod
    def foreign(
        cls, config: dict[str, Any], tensors: dict[str, Tensor]
    ) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        return formats.read(config, tensors)
