"""The peers inside transformers, asked exactly as the Decoder is."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from specdec.bench.arms import Settings
from specdec.errors import CompatibilityError

BASELINES = ("hf-generate", "hf-prompt-lookup", "hf-assisted")
REFERENCE = "hf-generate"  # what every speed-up is relative to
ONE_ROW_ONLY = ("hf-prompt-lookup", "hf-assisted")  # transformers refuses batches for these


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


def baseline(name: str, model: PreTrainedModel, draft: PreTrainedModel | None = None) -> HFArm:
    """One of ``BASELINES`` on ``model``.

    Args:
        name: "hf-generate", "hf-prompt-lookup" (10 tokens a step, the number in transformers' documentation) or
            "hf-assisted" (transformers' defaults).
        model: the target.
        draft: the assistant of hf-assisted.

    Raises:
        CompatibilityError: the draft model has another vocabulary.
    """
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
