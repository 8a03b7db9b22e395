"""The peers inside transformers, asked exactly as the Decoder is."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig, PreTrainedModel

from specdec.bench.arms import Settings
from specdec.errors import CompatibilityError

DEFAULTS = ("hf-generate", "hf-prompt-lookup", "hf-assisted")
# on request only: one compiles for tens of seconds first, the other needs a checkpoint trained for it (LayerSkip)
BASELINES = (*DEFAULTS, "hf-generate-compiled", "hf-early-exit")
REFERENCE = "hf-generate"  # what every speed-up is relative to
ONE_ROW_ONLY = ("hf-prompt-lookup", "hf-assisted", "hf-early-exit")  # transformers refuses batches for these


class HFArm:
    """``model.generate`` with what selects the method.

    Args:
        name: one of ``BASELINES``.
        model: the target.
        extra: arguments that select the method.
    """

    lossless = True
    state = None
    stats = None

    def __init__(self, name: str, model: PreTrainedModel, **extra: Any):
        self.name, self.model, self.extra = name, model, extra

    def reset(self) -> None:
        pass

    def forget(self) -> None:
        pass

    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, settings: Settings) -> torch.Tensor:
        return self.model.generate(
            input_ids, attention_mask=attention_mask, **settings.arguments(), **self._pad(), **self.extra
        )

    def _pad(self) -> dict[str, int]:
        # without a pad token generate() picks the end token; what is padded is cut off anyway
        return {} if self.model.generation_config.pad_token_id is not None else {"pad_token_id": 0}


class CompiledArm(HFArm):
    """``generate`` with a static cache and its decode forward under ``torch.compile``, as transformers compiles it.

    transformers does so by itself on accelerators only; here it is done on every device, with the settings of its
    ``CompileConfig`` (mode reduce-overhead) and one cache that holds the longest text, so that there is one graph per
    batch size. Prompts run uncompiled, as they do there. Only the forward is compiled, inside the module's call: hooks
    still see it.

    Args:
        model: the target.
        longest: tokens of the longest text, prompt and answer.

    Attributes:
        graphs: compiled so far; those of calls that were timed are in their time.
    """

    def __init__(self, name: str, model: PreTrainedModel, longest: int):
        super().__init__(name, model, cache_implementation="static", max_cache_len=longest, disable_compile=True)
        self.graphs = 0
        eager = model.forward
        compiled = torch.compile(eager, **CompileConfig().to_dict())

        @functools.wraps(eager)  # generate() reads the signature
        def forward(*args: Any, input_ids: torch.Tensor, **kwargs: Any) -> Any:
            return (compiled if input_ids.shape[1] == 1 else eager)(*args, input_ids=input_ids, **kwargs)

        self._forward = forward

    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, settings: Settings) -> torch.Tensor:
        before, graphs = self.model.__dict__.get("forward"), counters["stats"]["unique_graphs"]
        self.model.forward = self._forward
        try:
            return super().generate(input_ids, attention_mask, settings)
        finally:
            self.graphs += counters["stats"]["unique_graphs"] - graphs
            if before is None:
                del self.model.forward
            else:  # accelerate's hooks stand there
                self.model.forward = before


class EarlyExitArm(HFArm):
    """The model's own first layers as its assistant (``assistant_early_exit``).

    Args:
        model: the target.
        layers: how many; transformers runs its final norm and head on them. A model that was not trained for this
            drafts little that is accepted.
    """

    def __init__(self, name: str, model: PreTrainedModel, layers: int):
        super().__init__(name, model, assistant_early_exit=layers)

    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, settings: Settings) -> torch.Tensor:
        config = self.model.config.get_text_config(decoder=True)
        layers = config.num_hidden_layers
        try:
            return super().generate(input_ids, attention_mask, settings)
        finally:
            config.num_hidden_layers = layers  # an error while drafting would leave the model cut short


def baseline(name: str, model: PreTrainedModel, draft: PreTrainedModel | None = None, longest: int = 0) -> HFArm:
    """One of ``BASELINES`` on ``model``.

    Args:
        name: "hf-generate", "hf-prompt-lookup" (10 tokens a step, the number in transformers' documentation),
            "hf-assisted" (transformers' defaults), "hf-generate-compiled", or "hf-early-exit" (after a third of the
            layers).
        model: the target.
        draft: the assistant of hf-assisted.
        longest: tokens of the longest text, prompt and answer, for the cache of hf-generate-compiled.

    Raises:
        CompatibilityError: the draft model has another vocabulary.
    """
    if name == "hf-generate-compiled":
        return CompiledArm(name, model, longest)
    if name == "hf-early-exit":
        return EarlyExitArm(name, model, max(1, model.config.get_text_config(decoder=True).num_hidden_layers // 3))
    if name == "hf-prompt-lookup":
        return HFArm(name, model, prompt_lookup_num_tokens=10)
    if name == "hf-assisted":
        assert draft is not None, "hf-assisted needs a draft model"
        sizes = [m.config.get_text_config(decoder=True).vocab_size for m in (model, draft)]
        if sizes[0] != sizes[1]:
            raise CompatibilityError(
                f"draft model: its vocabulary has {sizes[1]} tokens, the target's {sizes[0]}; "
                "use a draft model of the same tokenizer"
            )
        return HFArm(name, model, assistant_model=draft)
    return HFArm(name, model)
