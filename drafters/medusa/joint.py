"""Medusa-2: the target learns together with its heads (Cai et al., arXiv 2401.10774)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from specdec.drafters.medusa.module import Medusa
from specdec.heads import Batch, Drafts, Learner, Output
from specdec.heads.loss import HeadLoss, head_loss
from specdec.structure import Needs, Taps, decoder_layers
from specdec.target import Target

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

FINAL = Needs(final_hidden=True)


class JointLearner(Learner):
    """L = L_LM + lambda0 * sum over k = 1..K of decay^k L_k; an optimiser sees what is trained, and nothing else.

    L_LM is the target's own cross-entropy; with self-distillation it is the cross-entropy of the target as it was,
    which is KL(as it was || as it is) plus a constant of the text, and lambda0 grows as sin(pi / 2 * progress).
    ``eval()`` makes ``target.model`` ready to be decoded with, ``train()`` to be trained.

    Args:
        head: float32; attached to ``target``.
        target: changed in place. Its model needs float32 or bfloat16 weights.
        lora: (rank, alpha, dropout) of adapters on every linear layer of the blocks, and on the output matrix unless
            that is the embedding too, which would change with it; None: every weight of the target is trained.
        self_distill: see above; needs ``lora``, as the target as it was is the one without adapters.
        lambda0: weight of the heads.
        objective, decay: of the heads, see ``Learner``.

    Attributes:
        progress: share of the training that is done, in [0, 1]; the trainer sets it.

    Raises:
        UsageError, CompatibilityError: see ``Learner``.
    """

    head: Medusa

    def __init__(
        self,
        head: Medusa,
        target: Target,
        lora: tuple[int, float, float] | None,
        self_distill: bool,
        lambda0: float,
        objective: str | None = None,
        decay: float | None = None,
    ):
        super().__init__(head, target, objective, decay)
        self.self_distill, self.lambda0, self.progress = self_distill, lambda0, 0.0
        target.model.requires_grad_(lora is None)
        # in lists, so that checkpoints of a run hold what is trained alone, and each tied matrix once
        self._adapters = [] if lora is None else [_adapted(target, *lora)]
        self._output = [target.model.get_output_embeddings()]
        self.trained = nn.ParameterList(p for p in target.model.parameters() if p.requires_grad)

    def output(self) -> Output:
        """The target's output as it is now, differentiable. Its adapter has no dropout."""
        found, module = self.target.head, self._output[0]
        weight = found.module.weight
        if module is not found.module:
            A, B = module.lora_A["default"].weight, module.lora_B["default"].weight
            weight = weight + (B @ A * module.scaling["default"]).to(weight.dtype)
        return Output(weight, getattr(found.module, "bias", None), found.scale, found.cap)

    def read(self, ids: Tensor) -> Tensor:
        """Final hidden states [B, S, d] of texts int64 [B, S], with gradients."""
        target = self.target
        taps = Taps(target.model, FINAL, target.head.final)
        inputs: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in target.inputs else {}
        try:
            taps.start([])
            target.model(input_ids=ids, use_cache=False, **inputs)
            return taps.stop()["final_hidden"]
        finally:
            taps.remove()

    def forward(self, input_ids: Tensor, loss_mask: Tensor) -> HeadLoss:
        """Sums over the learned positions of int64 and bool [B, S]; depth 0 is the target, 1 to K the heads."""
        ids, mask = input_ids, loss_mask
        final, output = self.read(ids), self.output()
        teacher, teacher_output = (self._original(ids), self.head.shared.output) if self.self_distill else (None, None)
        own = next_token_loss(final, output, ids, mask, teacher, teacher_output)
        drafts = self.head.drafts(Batch(ids, mask, {"final_hidden": final}))
        if self.head.config.shared_output:
            drafts = replace(drafts, outputs=[output] * self.head.depths)  # the one that is trained
        heads = head_loss(drafts, final, output, ids, mask, self.objective, self.decay)
        total = own.total + self.weight() * self.decay * heads.total  # head_loss counts depths from 0, the paper from 1
        pairs = ((own.loss, heads.loss), (own.hits, heads.hits), (own.count, heads.count))
        return HeadLoss(total, *map(torch.cat, pairs))

    def weight(self) -> float:
        """lambda0, with self-distillation on its way up."""
        return self.lambda0 * (math.sin(math.pi / 2 * self.progress) if self.self_distill else 1.0)

    @torch.no_grad()
    def _original(self, ids: Tensor) -> Tensor:
        """Final hidden states of the target as it was."""
        model, training = self.target.model, self.training
        with self._adapters[0].disable_adapter():
            model.eval()
            final = self.read(ids)
        model.train(training)
        return final

    def train(self, mode: bool = True) -> JointLearner:
        model, module = self.target.model, self._output[0]
        if module is not self.target.head.module:
            # heads that share the output matrix read its weight, so while decoding the adapter must be in it
            model.set_output_embeddings(module if mode else self._plain_output())
        model.train(mode)
        super().train(mode)
        return self

    def _plain_output(self) -> nn.Linear:
        output = self.output()
        V, d = output.weight.shape
        plain = nn.Linear(d, V, bias=output.bias is not None, device="meta")
        plain.weight = nn.Parameter(output.weight.detach())
        if output.bias is not None:
            plain.bias = nn.Parameter(output.bias.detach())
        return plain

    def merged(self) -> PreTrainedModel:
        """The target that came out, an ordinary model; this learner is used up."""
        self.eval()
        return self._adapters[0].merge_and_unload() if self._adapters else self.target.model


def next_token_loss(
    final: Tensor,
    output: Output,
    ids: Tensor,
    mask: Tensor,
    teacher: Tensor | None = None,
    teacher_output: Output | None = None,
) -> HeadLoss:
    """The target's own loss, one depth.

    Args:
        final: [B, S, d], its final hidden states.
        output: its output.
        ids, mask: int64 and bool [B, S].
        teacher, teacher_output: whose distribution it imitates; None: it learns the text.
    """
    objective = "labels" if teacher is None else "teacher"
    # head_loss compares its first depth at i with the target at i + 1: a column before the text makes that one place
    drafts = Drafts([pad(final, (0, 0, 0, 1))], [output])
    compared = pad(final if teacher is None else teacher, (0, 0, 1, 0))
    return head_loss(drafts, compared, teacher_output or output, pad(ids, (1, 0)), pad(mask, (1, 0)), objective, 1.0)


def _adapted(target: Target, rank: int, alpha: float, dropout: float) -> PeftModel:
    """Put adapters into the target's model; without them it computes what it did."""
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    model, output = target.model, target.head.module  # found now: an adapter would stand in its way
    chosen = {m for layer in decoder_layers(model) for m in layer.modules() if isinstance(m, (nn.Linear, Conv1D))}
    if output.weight is not model.get_input_embeddings().weight:
        chosen.add(output)
    names = [name for name, module in model.named_modules() if module in chosen]
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=names))
