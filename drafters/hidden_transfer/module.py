"""Hidden transfer's trained part: linear maps from a middle layer's hidden state to pseudo states of future tokens.

Pseudo column k (0-based here, 1-based in the paper) of a token at position t stands at position t + k + 1, is
written over with T_k(source) as it enters layer l_k, and runs through the remaining frozen layers. It may see what its
token sees, and the earlier pseudo columns of the same token; no real token ever sees it.

It is in the forward from layer 0 on, with a token that does not matter: below l_k nothing that is used later may see
it, because l_1 <= l_2 <= ... and a pseudo column sees only earlier ones. So one mask serves all layers.

Shapes: B rows, S positions, K steps, n tokens carrying pseudo columns, d hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from specdec.errors import UsageError
from specdec.heads import Drafts, Head, HeadConfig
from specdec.structure import Needs, ProbeColumns, Taps
from specdec.target import Target
from specdec.tree import ProbeLayout, Probes
from specdec.tree_attention.masks import additive, step_mask

SOURCES = ("from_real", "from_prev")


@dataclass(kw_only=True)
class HiddenTransferConfig(HeadConfig):
    """See ``HeadConfig``.

    Attributes:
        num_steps: K.
        transfer_layers: l_k per step, never decreasing: T_k reads and writes the residual stream entering layer l_k.
        source: T_k reads the real token's state ("from_real") or pseudo column k - 1's ("from_prev").
        pseudo_sees_pseudo: a pseudo column attends to the earlier ones of its token.
        rank: T_k x = x + B A x with A [rank, d]; None: a full matrix.
        bias: T_k has one (full matrices only).
        share: of the learned positions, how many carry pseudo columns in a training step.
    """

    num_steps: int
    transfer_layers: list[int]
    source: Literal["from_real", "from_prev"] = "from_real"
    pseudo_sees_pseudo: bool = True
    rank: int | None = None
    bias: bool = True
    share: float = 0.5


class LowRank(nn.Module):
    """x + B A x; B is zero at first."""

    def __init__(self, d: int, rank: int):
        super().__init__()
        self.down = nn.Linear(d, rank, bias=False)
        self.up = nn.Linear(rank, d, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(self.down(x))


def full(d: int, bias: bool) -> nn.Linear:
    """The identity, to be trained."""
    linear = nn.Linear(d, d, bias=bias)
    nn.init.eye_(linear.weight)
    if bias:
        nn.init.zeros_(linear.bias)
    return linear


def default_layers(num_layers: int, num_steps: int) -> list[int]:
    """l_k = 0.6, 0.7, ... of the layers, leaving at least four (all but one in models of fewer) above."""
    return [max(1, min(round(num_layers * (0.6 + 0.1 * k)), num_layers - 4)) for k in range(num_steps)]


class HiddenTransfer(Head):
    """K linear maps T_k, the identity at first (arXiv 2404.12022)."""

    method = "hidden-transfer"
    config_class = HiddenTransferConfig
    config: HiddenTransferConfig

    def __init__(self, config: HiddenTransferConfig):
        super().__init__(config)
        K, layers, d = config.num_steps, config.transfer_layers, config.hidden_size
        if K < 1:
            raise UsageError(f"num_steps={K} must be at least 1")
        if len(layers) != K or min(layers) < 1 or layers != sorted(layers):
            raise UsageError(
                f"transfer_layers={layers} must be {K} layers (one per step), 1 or above, and never decrease"
            )
        if config.source not in SOURCES:
            raise UsageError(f"source={config.source!r} must be one of {', '.join(SOURCES)}")
        if config.rank is not None and not 1 <= config.rank < d:
            raise UsageError(f"rank={config.rank} must be at least 1 and below the hidden size {d}, or None")
        if not 0 < config.share <= 1:
            raise UsageError(f"share={config.share} must be above 0 and at most 1")
        self.transfer = nn.ModuleList(
            full(d, config.bias) if config.rank is None else LowRank(d, config.rank) for _ in range(K)
        )

    @property
    def depths(self) -> int:
        return self.config.num_steps

    @property
    def needs(self) -> Needs:
        return Needs(final_hidden=True, hooks=dict.fromkeys(self.config.transfer_layers, self.rewrite))

    @classmethod
    def fresh(
        cls,
        target: Target,
        num_steps: int = 3,
        transfer_layers: list[int] | None = None,
        source: Literal["from_real", "from_prev"] = "from_real",
        pseudo_sees_pseudo: bool = True,
        rank: int | None = None,
        bias: bool = True,
        share: float = 0.5,
        **_: Any,
    ) -> HiddenTransfer:
        facts = HiddenTransferConfig.facts(target)
        return cls(
            HiddenTransferConfig(
                **facts,
                num_steps=num_steps,
                transfer_layers=transfer_layers or default_layers(facts["num_hidden_layers"], num_steps),
                source=source,
                pseudo_sees_pseudo=pseudo_sees_pseudo,
                rank=rank,
                bias=bias,
                share=share,
            )
        )

    def fits(self, target: Target) -> str | None:
        last = self.config.transfer_layers[-1]
        if last >= target.config.num_hidden_layers:
            return f"transfer_layers names layer {last}, the target has layers 0..{target.config.num_hidden_layers - 1}"
        if target.capability.tier != "tree":
            return f"pseudo columns need a model that can verify trees: {target.capability.reason}"
        limits = [name for name, value in target.config.to_dict().items() if "capacity" in name and value]
        if limits:
            return (
                f"experts with a limited capacity ({limits[0]}) may drop real tokens for pseudo ones; remove the limit"
            )
        return None

    # ---- pseudo columns -----------------------------------------------------------------------------------------

    def inject(self, layer: int, x: Tensor, pseudo: Tensor) -> Tensor:
        """What pseudo columns are as they enter ``layer``.

        Args:
            layer: which.
            x: [n, d], the real tokens' residual stream entering it.
            pseudo: [k, n, d], the pseudo columns', k <= K.

        Returns:
            [k, n, d].
        """
        states = list(pseudo)
        for k, at in enumerate(self.config.transfer_layers[: len(states)]):
            if at == layer:
                source = states[k - 1] if k and self.config.source == "from_prev" else x
                dtype = next(self.transfer[k].parameters()).dtype  # in training higher than the stream's
                states[k] = self.transfer[k](source.to(dtype)).to(pseudo.dtype)
        return torch.stack(states)

    def rewrite(self, layer: int, x_anchor: Tensor, x_probe: Tensor, probes: Probes) -> Tensor:
        """A ``LayerHook`` for probes of this ``layout``."""
        steps = int(probes.layout.kind[-1]) + 1
        pseudo = x_probe.unflatten(0, (steps, -1))  # [k, n, d]
        return self.inject(layer, x_anchor[: pseudo.shape[1]], pseudo).flatten(0, 1)

    def layout(self, anchors: Sequence[int] | np.ndarray, steps: int) -> ProbeLayout:
        """Pseudo columns 0..steps - 1 of n nodes, ``[pseudo-0 of all | pseudo-1 of all | ...]``; kind = k."""
        n = len(anchors)
        kind = np.repeat(np.arange(steps), n)
        sees = np.tri(steps, dtype=bool) if self.config.pseudo_sees_pseudo else np.eye(steps, dtype=bool)
        return ProbeLayout(np.tile(anchors, steps), kind + 1, np.kron(sees, np.eye(n, dtype=bool)), kind)

    # ---- training -------------------------------------------------------------------------------------------------

    def along(self, target: Target, ids: Tensor, mask: Tensor) -> tuple[Tensor, Drafts]:
        """One forward of ``[S real | n pseudo-0 | n pseudo-1 | ...]`` columns through the hooks used in decoding.

        Gradients begin at the first transfer layer, so the layers below keep nothing for the backward pass.
        """
        B, S = ids.shape
        ids, (d, device) = ids.to(target.device), (self.config.hidden_size, target.device)
        carriers = [self._carriers(row) for row in mask.cpu()]
        layouts = [self.layout(i.numpy(), self.depths) for i in carriers]
        Q = max(map(len, layouts))
        positions = torch.arange(S + Q, device=device).repeat(B, 1)  # [B, S + Q]
        block = torch.eye(S + Q, dtype=torch.bool, device=device).repeat(B, 1, 1)  # padding sees itself
        block[:, :S, :S] = causal = torch.ones(S, S, dtype=torch.bool, device=device).tril_()
        places = []
        for b, layout in enumerate(layouts):
            anchors, columns = torch.from_numpy(layout.anchor).to(device), slice(S, S + len(layout))
            positions[b, columns] = anchors + torch.from_numpy(layout.offset).to(device)
            block[b, columns, :S] = causal[anchors]
            block[b, columns, columns] = torch.from_numpy(layout.see).to(device)
            probes = Probes(layout, np.zeros(len(layout), dtype=np.int64))
            places.append(ProbeColumns(b, anchors, torch.arange(S, S + len(layout), device=device), probes))
        if target.context is not None:
            positions.clamp_(max=target.context - 1)
        hidden = self._forward(target, nn.functional.pad(ids, (0, Q)), positions, block, places)
        states = [hidden.new_zeros(B, S, d) for _ in range(self.depths)]
        there = torch.zeros(B, S, dtype=torch.bool, device=device)
        for b, i in enumerate(carriers):
            there[b, i] = True
            for k, state in enumerate(states):
                state[b, i] = hidden[b, S + k * len(i) : S + (k + 1) * len(i)]
        return hidden[:, :S].detach(), Drafts(states, [self.shared.output] * self.depths, where=there)

    def _carriers(self, learned: Tensor) -> Tensor:
        """int64 [n], the positions of a row that carry pseudo columns: those whose drafts would be learned tokens.

        Training draws a share of them; ``eval()`` takes all.
        """
        S = len(learned)
        useful = torch.zeros(S, dtype=torch.bool)
        for k in range(self.depths):
            useful[: max(S - k - 2, 0)] |= learned[k + 2 :]  # pseudo column k of position i predicts token i + k + 2
        i = useful.nonzero()[:, 0]
        if len(i) == 0:
            return torch.zeros(1, dtype=torch.long)  # nothing is learned here, but gradients must exist
        if self.training:
            i = i[torch.randperm(len(i))[: max(round(self.config.share * len(i)), 1)]]
        return i

    def _forward(
        self, target: Target, ids: Tensor, positions: Tensor, block: Tensor, places: list[ProbeColumns]
    ) -> Tensor:
        """Final hidden states [B, C, d] of one forward without a cache."""

        def mask(kind: str) -> Tensor:
            window = target.config.sliding_window if kind == "sliding_attention" else None
            chunk = target.config.attention_chunk_size if kind == "chunked_attention" else None
            seen = step_mask([0] * len(ids), 0, block, positions, window, chunk)
            return seen if target.attention == "sdpa" else additive(seen, target.model.dtype)

        masks = {kind: mask(kind) for kind in target.layer_kinds}
        inputs: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in target.inputs else {}
        taps = Taps(target.model, self.needs, target.head.final)
        try:
            taps.start(places)
            with _attention(target):
                target.model(
                    input_ids=ids,
                    position_ids=positions,
                    attention_mask=masks if len(masks) > 1 else masks[target.layer_kinds[0]],
                    use_cache=False,
                    **inputs,
                )
            return taps.stop()["final_hidden"]
        finally:
            taps.remove()


@contextmanager
def _attention(target: Target) -> Iterator[None]:
    """Attention that takes any mask."""
    before = target.model.config._attn_implementation
    if before == target.attention:
        yield
        return
    target.model.set_attn_implementation(target.attention)
    try:
        yield
    finally:
        target.model.set_attn_implementation(before)
