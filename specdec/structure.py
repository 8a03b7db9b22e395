"""Finding a model's parts by structure, and reading or rewriting what flows between them.

Hidden states are tapped with hooks on the blocks that carry [B, n, d]; nothing depends on a model's class.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from specdec.errors import CompatibilityError
from specdec.tree import Probes

# fn(layer, x_anchor [Q, d], x_probe [Q, d], probes) -> x_probe [Q, d]
LayerHook = Callable[[int, torch.Tensor, torch.Tensor, Probes], torch.Tensor]
Tap = str | int


@dataclass(frozen=True)
class Needs:
    """What a drafter or verifier asks the Target for.

    Attributes:
        final_hidden: tap "final_hidden", the output of the final norm (what the head reads).
        pre_norm_hidden: tap "pre_norm_hidden", the output of the last layer.
        layers: taps by number l, the residual stream entering layer l, i.e. HF's ``hidden_states[l]`` (so l = 0 is
            the embedding, and l = L, like HF's, the post-norm state).
        hooks: layer -> function rewriting the hidden states of probe columns as they enter that layer.
    """

    final_hidden: bool = False
    pre_norm_hidden: bool = False
    layers: tuple[int, ...] = ()
    hooks: Mapping[int, LayerHook] = field(default_factory=dict)

    def __or__(self, other: Needs) -> Needs:
        both = set(self.hooks) & set(other.hooks)
        if both:
            raise CompatibilityError(f"hooks: drafter and verifier both rewrite layer {min(both)}; only one may")
        return Needs(
            self.final_hidden or other.final_hidden,
            self.pre_norm_hidden or other.pre_norm_hidden,
            tuple(sorted(set(self.layers) | set(other.layers))),
            {**self.hooks, **other.hooks},
        )

    def __bool__(self) -> bool:
        return bool(self.final_hidden or self.pre_norm_hidden or self.layers or self.hooks)


NOTHING = Needs()


def text_config(model: PreTrainedModel) -> Any:
    """The configuration of the language model inside ``model``."""
    return model.config.get_text_config(decoder=True)


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The list of the model's transformer blocks.

    Raises:
        CompatibilityError: no list of ``num_hidden_layers`` blocks of one kind exists.
    """
    count = text_config(model).num_hidden_layers
    found = [
        m
        for m in model.modules()
        if isinstance(m, nn.ModuleList) and len(m) == count and next(m[0].parameters(), None) is not None
    ]
    if not found:
        raise CompatibilityError(
            f"{type(model).__name__} keeps no list of its {count} layers, so hidden states cannot be tapped; "
            "use a drafter that needs none (`specdec list`)"
        )
    return max(found, key=lambda m: sum(p.numel() for p in m.parameters()))


def _hidden_argument(args: tuple, kwargs: dict) -> torch.Tensor:
    x = args[0] if args else kwargs["hidden_states"]
    if x.dim() != 3:
        raise CompatibilityError(
            f"the model's layers carry tensors of shape {tuple(x.shape)} and not [batch, tokens, hidden]; "
            "hidden states cannot be tapped, use a drafter that needs none"
        )
    return x


def _first_tensor(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


@dataclass
class ProbeColumns:
    """Where one row's probes and their anchors stand in the running forward."""

    row: int
    anchors: torch.Tensor  # int64 [Q]
    columns: torch.Tensor  # int64 [Q]
    probes: Probes


class Taps:
    """Hooks for one set of needs, installed once and active only inside ``recording``.

    Args:
        model: the target's model.
        needs: what to read and rewrite.
        final: the module whose output is the head's input, found by ``Head``; needed for final_hidden.
    """

    def __init__(self, model: PreTrainedModel, needs: Needs, final: nn.Module | None):
        self._on = False
        self._seen: dict[Tap, torch.Tensor] = {}
        self._probes: Sequence[ProbeColumns] = ()
        layers = decoder_layers(model) if needs.layers or needs.hooks or needs.pre_norm_hidden else nn.ModuleList()
        wanted = set(needs.layers)
        for layer in sorted(wanted | set(needs.hooks)):
            if not 0 <= layer <= len(layers) or (layer == len(layers) and layer in needs.hooks):
                raise CompatibilityError(f"layer {layer} does not exist: the model has layers 0..{len(layers) - 1}")
        self._handles = []
        if needs.final_hidden or len(layers) in wanted:
            if final is None:
                raise CompatibilityError(
                    f"{type(model).__name__}: no module's output is what the head reads, so final_hidden cannot be "
                    "tapped; use a drafter that does not need it"
                )
            names = [n for n, w in (("final_hidden", needs.final_hidden), (len(layers), len(layers) in wanted)) if w]
            self._handles.append(final.register_forward_hook(self._reader(names)))
        if needs.pre_norm_hidden:
            self._handles.append(layers[-1].register_forward_hook(self._reader(["pre_norm_hidden"])))
        for layer in sorted((wanted | set(needs.hooks)) - {len(layers)}):
            hook = self._entry(layer, layer in wanted, needs.hooks.get(layer))
            self._handles.append(layers[layer].register_forward_pre_hook(hook, with_kwargs=True))

    def _reader(self, names: list[Any]) -> Callable:
        def read(module: nn.Module, args: Any, output: Any) -> None:
            if self._on:
                for name in names:
                    self._seen[name] = _first_tensor(output)

        return read

    def _entry(self, layer: int, tap: bool, rewrite: LayerHook | None) -> Callable:
        def enter(module: nn.Module, args: tuple, kwargs: dict) -> Any:
            if not self._on:
                return None
            x = _hidden_argument(args, kwargs)
            if rewrite is None or not self._probes:
                if tap:
                    self._seen[layer] = x
                return None
            x = x.clone()
            for p in self._probes:
                # only probe columns are written back, so a hook cannot touch a real column
                x[p.row, p.columns] = rewrite(layer, x[p.row, p.anchors], x[p.row, p.columns], p.probes).to(x.dtype)
            if tap:
                self._seen[layer] = x
            return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

        return enter

    def start(self, probes: Sequence[ProbeColumns]) -> None:
        """Record the next forward."""
        self._on, self._probes, self._seen = True, probes, {}

    def stop(self) -> dict[Tap, torch.Tensor]:
        """What was read: tap -> [B, C, d]."""
        self._on = False
        seen, self._seen = self._seen, {}
        return seen

    def remove(self) -> None:
        """Take the hooks off the model again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _sees_every_column(model: PreTrainedModel, module: nn.Module, ids: torch.Tensor) -> bool:
    """False for heads of several layers (BERT's), which run on the columns of ``logits_to_keep`` alone."""
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return True
    widths: list[int] = []
    handle = module.register_forward_hook(lambda m, args, output: widths.append(output.shape[1]))
    try:
        model(input_ids=ids, use_cache=True, logits_to_keep=1)
    finally:
        handle.remove()
    return widths[-1] == ids.shape[1]


class Head:
    """The output head with whatever the model does to logits afterwards, checked against the model itself.

    Args:
        model: any causal LM.
        ids: int64 [1, n], tokens to check with.

    Attributes:
        final: the module whose output the head reads, or None.
        module: the head itself.
        scale, cap: what happens to its logits; cap is None where nothing squashes them.

    Raises:
        CompatibilityError: the model's logits are not softcap(scale * head(hidden)).
    """

    def __init__(self, model: PreTrainedModel, ids: torch.Tensor):
        head = model.get_output_embeddings()
        if head is None:
            raise CompatibilityError(f"{type(model).__name__} has no output embeddings to compute logits with")
        self.module = head
        outputs: list[tuple[nn.Module, torch.Tensor]] = []
        inputs: list[torch.Tensor] = []

        def record(module: nn.Module, args: Any, output: Any) -> None:
            if torch.is_tensor(output):
                outputs.append((module, output))

        handles = [m.register_forward_hook(record) for m in model.modules() if m is not head]
        handles.append(head.register_forward_pre_hook(lambda m, args: inputs.append(args[0])))
        try:
            logits = model(input_ids=ids, use_cache=True).logits.float()
        finally:
            for handle in handles:
                handle.remove()
        hidden = inputs[-1]
        same = [m for m, x in outputs if x.shape == hidden.shape and torch.equal(x, hidden)]
        self.final = same[-1] if same and _sees_every_column(model, same[-1], ids) else None
        raw = head(hidden).float()
        # softcap first squashes, so its inverse is compared; no softcap: the identity
        cap = getattr(text_config(model), "final_logit_softcapping", None)
        self.cap = float(cap) if cap and not torch.allclose(logits, raw, rtol=1e-3, atol=1e-4) else None
        flat = torch.atanh((logits / self.cap).clamp(-0.999, 0.999)) * self.cap if self.cap else logits
        self.scale = float((flat * raw).sum() / (raw * raw).sum())
        if abs(self.scale - 1) < 1e-3:
            self.scale = 1.0
        error = (self(hidden) - logits).abs().max()
        if error > 1e-2 * logits.abs().max():
            raise CompatibilityError(
                f"{type(model).__name__} changes its logits after the head in a way that is neither a scale nor a "
                f"softcap (error {error:.3g}); drafters that read hidden states cannot be used with it"
            )

    @torch.no_grad()
    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits float32 [..., V] of final hidden states [..., d]."""
        logits = self.module(hidden).float()
        if self.scale != 1.0:
            logits = logits * self.scale
        return torch.tanh(logits / self.cap) * self.cap if self.cap else logits
