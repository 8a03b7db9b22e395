"""Training a model to fill placeholders: LoRA adapters on its linear layers, and the placeholder's embedding row."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from specdec.structure import Needs, Taps, decoder_layers
from specdec.target import Target
from specdec.tree_attention.masks import additive, step_mask

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROWS = 512  # columns whose logits are alive at once


@dataclass(frozen=True)
class UnitLoss:
    """What a batch of packed texts costs.

    Attributes:
        total: CE of the text + lam * weighted CE of the placeholders, each a mean; differentiable.
        loss: [K], mean nats of the text (0) and of placeholder j.
        hits, count: [K], columns whose likeliest token is the label, and columns.
    """

    total: Tensor
    loss: Tensor
    hits: Tensor
    count: Tensor


class UnitLearner(nn.Module):
    """What an optimiser sees: adapters and one embedding row, no other weight.

    ``eval()`` makes ``target.model`` ready to be decoded with, ``train()`` to be trained.

    Args:
        target: changed in place. Its model needs float32 or bfloat16 weights.
        placeholder: token whose embedding is learned.
        K: most tokens of a unit.
        lora: (rank, alpha, dropout) of adapters on every linear layer of the blocks.
        lam: lambda, weight of the placeholders.
    """

    def __init__(self, target: Target, placeholder: int, K: int, lora: tuple[int, float, float], lam: float):
        super().__init__()
        from peft import LoraConfig, get_peft_model
        from transformers.pytorch_utils import Conv1D

        self.placeholder, self.K, self.lam = placeholder, K, lam
        model, self._target = target.model, [target]  # in a list, so that its weights are not this module's
        embedding, output = model.get_input_embeddings(), target.head.module
        self._table, self._tied = [embedding.weight], output.weight is embedding.weight
        linear = {m for layer in decoder_layers(model) for m in layer.modules() if isinstance(m, (nn.Linear, Conv1D))}
        names = [name for name, module in model.named_modules() if module in linear]
        rank, alpha, dropout = lora
        config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=names, task_type="CAUSAL_LM")
        self._adapted = [get_peft_model(model, config)]
        self.adapters = nn.ParameterList(p for p in model.parameters() if p.requires_grad)
        self.row = nn.Parameter(embedding.weight[placeholder].detach().float().clone())
        self._handle = embedding.register_forward_hook(self._embed)

    @property
    def target(self) -> Target:
        return self._target[0]

    def _embed(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return torch.where((args[0] == self.placeholder)[..., None], self.row.to(output.dtype), output)

    def forward(
        self, input_ids: Tensor, positions: Tensor, visible: Tensor, labels: Tensor, ahead: Tensor, weight: Tensor
    ) -> UnitLoss:
        """The loss of packed texts [B, C], ``visible`` [B, C, C]; see ``units.Packed``."""
        there = labels >= 0
        hidden, y = read(self.target, input_ids, positions, visible)[there], labels[there]  # [N, d], [N]
        parts = [
            checkpoint(self._cross_entropy, x, z, use_reentrant=False)
            for x, z in zip(hidden.split(ROWS), y.split(ROWS), strict=True)
        ]
        nats, hits = (torch.cat(part) for part in zip(*parts, strict=True))
        kind, w = ahead[there], weight[there]
        text = kind == 0
        total = nats[text].mean()
        if not text.all():
            total = total + self.lam * (nats * w)[~text].sum() / w[~text].sum()
        each = nn.functional.one_hot(kind, self.K).to(nats.dtype)  # [N, K]
        count = each.sum(0)
        return UnitLoss(total, (nats.detach() @ each) / count.clamp_min(1), hits.to(nats.dtype) @ each, count)

    def _cross_entropy(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.logits(x)
        return nn.functional.cross_entropy(logits, y, reduction="none"), logits.argmax(-1) == y

    def logits(self, x: Tensor) -> Tensor:
        """float32 [N, V] of final hidden states [N, d], differentiable."""
        head = self.target.head
        z = head.module(x).float()
        if self._tied:  # the row that is learned is in the output matrix too
            own = (x @ self.row.to(x.dtype)).float()
            z = z.index_copy(-1, torch.tensor([self.placeholder], device=z.device), own[:, None])
        z = z if head.scale == 1 else z * head.scale
        return torch.tanh(z / head.cap) * head.cap if head.cap else z

    def train(self, mode: bool = True) -> UnitLearner:
        if not mode:
            self._table[0].data[self.placeholder] = self.row.detach().to(self._table[0])
        self.target.model.train(mode)
        super().train(mode)
        return self

    def adapter(self, dtype: torch.dtype) -> tuple[Any, dict[str, Tensor]]:
        """peft's configuration, and the adapter's tensors; what is trained is rounded to ``dtype`` for good."""
        from peft import get_peft_model_state_dict

        with torch.no_grad():
            for p in self.parameters():
                p.copy_(p.to(dtype))
        tensors = get_peft_model_state_dict(self._adapted[0])
        return self._adapted[0].peft_config["default"], {name: t.to(dtype) for name, t in tensors.items()}

    def merged(self) -> PreTrainedModel:
        """The model that came out, an ordinary one; this learner is used up."""
        self.eval()
        self._handle.remove()
        return self._adapted[0].merge_and_unload()


def read(target: Target, ids: Tensor, positions: Tensor, visible: Tensor) -> Tensor:
    """Final hidden states [B, C, d] of one forward without a cache, with gradients.

    Args:
        ids, positions: int64 [B, C].
        visible: bool [B, C, C].
    """
    if target.context is not None:
        positions = positions.clamp(max=target.context - 1)

    def mask(kind: str) -> Tensor:
        window = target.config.sliding_window if kind == "sliding_attention" else None
        chunk = target.config.attention_chunk_size if kind == "chunked_attention" else None
        seen = step_mask([0] * len(ids), 0, visible, positions, window, chunk)
        return seen if target.attention == "sdpa" else additive(seen, target.model.dtype)

    masks = {kind: mask(kind) for kind in target.layer_kinds}
    inputs: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in target.inputs else {}
    taps = Taps(target.model, Needs(final_hidden=True), target.head.final)
    try:
        taps.start([])
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
    target.model.set_attn_implementation(target.attention)
    try:
        yield
    finally:
        target.model.set_attn_implementation(before)
