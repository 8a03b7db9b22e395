"""What is trained: a float32 copy of the draft's weights, and a loss from records.

The copy is trained while the draft itself stays as it is; ``publish`` gives the draft the new weights. So nothing in
use is ever in training mode, and half precision loses no small updates.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any, Literal

import torch
from torch import Tensor, nn

from specdec.drafters.draft_model import DraftModel
from specdec.drafters.online.buffer import Record
from specdec.errors import CompatibilityError, UsageError
from specdec.heads import Batch, Head, HeadDrafter
from specdec.heads.loss import head_loss
from specdec.structure import NOTHING, Needs
from specdec.target import StepOutput, Target

Loss = Literal["forward", "reverse", "mixed"]
_LEAST = -50.0  # log of the smallest probability that reverse KL looks at


class DraftLearner:
    """A draft model that imitates the target's law at temperature 1, over the tokens both models have.

    A record's ``rows`` are ``p``, float16 [m, n], log-probabilities of the target, with ``top`` [m, k + 1]: its k
    likeliest tokens, int64 ``tokens`` [m, k], and in the last column all the others together.

    Args:
        drafter: bound.
        target: whose law is imitated.
        loss: "forward", KL(p || q) as soft cross-entropy; "reverse", KL(q || p); "mixed", 0.9 and 0.1 of them.
        top: k; None keeps whole rows.

    Attributes:
        module: the copy that is trained.
        served: the module that drafts.

    Raises:
        CompatibilityError: weights that cannot be trained, or that are the target's own.
    """

    needs = NOTHING

    def __init__(self, drafter: DraftModel, target: Target, loss: Loss = "forward", top: int | None = None):
        self.served: nn.Module = drafter.draft.model
        theirs = {p.data_ptr() for p in target.model.parameters()}
        if any(p.data_ptr() in theirs for p in self.served.parameters()):
            raise CompatibilityError("draft: it shares weights with the target, which training would change")
        _check_trainable(self.served)
        self.module: nn.Module = copy.deepcopy(self.served).float().requires_grad_(True)
        self.loss_kind, self.device = loss, drafter.draft.device
        sizes = [drafter.draft.vocab_size, target.vocab_size]
        if target.tokenizer is not None:
            sizes.append(len(target.tokenizer))  # rows that only pad the embedding are nobody's tokens
        self.n = min(sizes)
        self.top = None if top is None or top >= self.n else top
        self._keeps = "logits_to_keep" in inspect.signature(self.module.forward).parameters

    def rows(self, output: StepOutput, b: int, nodes: list[int]) -> dict[str, Tensor]:
        """What the target says after ``nodes`` of row b."""
        log_p = output.logits[b, nodes, : self.n].float().log_softmax(-1)  # [m, n]
        if self.top is None:
            return {"p": _copied(log_p.half())}
        tokens = log_p.topk(self.top, dim=-1).indices
        return {"p": _copied(_gathered(log_p, tokens).half()), "tokens": _copied(tokens)}

    def taps(self, output: StepOutput, b: int) -> dict[str, Tensor]:
        """Nothing: what it needs stands in rows."""
        return {}

    def loss(self, record: Record) -> Tensor:
        """The sum over a record's positions, in nats."""
        e = record.positions.to(self.device)
        # the row at e - 1 predicts token e
        inputs: dict[str, Any] = {"logits_to_keep": e - 1} if self._keeps else {}
        z = self.module(input_ids=record.ids[None].to(self.device), use_cache=False, **inputs).logits[0]
        log_q = (z if self._keeps else z[e - 1])[:, : self.n].float().log_softmax(-1)  # [m, n]
        log_p = record.rows["p"].to(self.device).float()
        if self.top is not None:
            log_q = _gathered(log_q, record.rows["tokens"].to(self.device))
        return divergence(log_p, log_q, self.loss_kind).sum()


class HeadLearner:
    """Heads that imitate the target at every depth, from hidden states that decoding has computed anyway.

    A record's ``taps`` are the hidden states [T, d] that the head reads, and "final_hidden", from which the target's
    own output makes the rows to be imitated. The last token has none; its place holds zeros, never learned from.

    Args:
        drafter: bound.
        target: the one it is bound to.

    Attributes:
        module, served: see ``DraftLearner``.

    Raises:
        CompatibilityError: the head's pseudo tokens run through the target itself, or its weights cannot be trained.
    """

    def __init__(self, drafter: HeadDrafter, target: Target):
        head = drafter.head
        if type(head).along is not Head.along:
            raise CompatibilityError(
                f"drafter: {drafter.name} runs the target itself while it is trained, which an online update cannot "
                "wait for; wrap medusa, chimera, eagle3 or a draft model"
            )
        _check_trainable(head)
        self.served: nn.Module = head
        self.module: Head = type(head)(head.config)  # a deep copy would copy what it shares with the target
        self.module.load_state_dict(head.state_dict())
        self.module.to(device=target.device, dtype=torch.float32).eval().attach(target)
        self.needs = head.needs | Needs(final_hidden=True)
        self._taps = {str(tap): tap for tap in self._named(self.needs)}
        self.device = target.device

    @staticmethod
    def _named(needs: Needs) -> list[str | int]:
        flags = {"final_hidden": needs.final_hidden, "pre_norm_hidden": needs.pre_norm_hidden}
        return [*(name for name, wanted in flags.items() if wanted), *needs.layers]

    def rows(self, output: StepOutput, b: int, nodes: list[int]) -> dict[str, Tensor]:
        """Nothing: what it needs stands in taps."""
        return {}

    def taps(self, output: StepOutput, b: int) -> dict[str, Tensor]:
        """Hidden states [K, d] of the columns that entered the cache."""
        return {name: _copied(output.kept_hidden(tap, b)) for name, tap in self._taps.items()}

    def loss(self, record: Record) -> Tensor:
        """The sum over a record's positions and the depths that predict them, weighted by the head's decay."""
        ids = record.ids[None].to(self.device)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        mask[0, record.positions.to(self.device)] = True
        taps = {self._taps[name]: tap[None].to(self.device) for name, tap in record.taps.items()}
        drafts = self.module.drafts(Batch(ids, mask, taps))
        output = self.module.shared.output
        return head_loss(drafts, taps["final_hidden"], output, ids, mask, "teacher", self.module.decay).total


Learner = DraftLearner | HeadLearner


def learner(drafter: DraftModel | HeadDrafter, target: Target, loss: Loss, top: int | None) -> Learner:
    """What trains ``drafter``, which is bound to ``target``."""
    if isinstance(drafter, DraftModel):
        return DraftLearner(drafter, target, loss, top)
    if loss != "forward" or top is not None:
        raise UsageError(f"loss={loss!r}, top={top}: heads learn by forward KL from whole rows; leave both out")
    return HeadLearner(drafter, target)


def divergence(log_p: Tensor, log_q: Tensor, loss: Loss) -> Tensor:
    """[m] of log-probabilities [m, n]: the teacher's p, the student's q. Forward KL without its constant."""
    forward = -(log_p.exp() * log_q.clamp_min(torch.finfo(log_q.dtype).min)).sum(-1)
    if loss == "forward":
        return forward
    reverse = (log_q.exp() * (log_q.clamp_min(_LEAST) - log_p.clamp_min(_LEAST))).sum(-1)
    # 2310.07177's code calls this sum "jsd"
    return reverse if loss == "reverse" else 0.9 * forward + 0.1 * reverse


def _gathered(log_p: Tensor, tokens: Tensor) -> Tensor:
    """Log-probabilities [m, k + 1] of ``tokens`` [m, k] and, last, of all others together, from [m, n]."""
    others = log_p.scatter(-1, tokens, float("-inf")).logsumexp(-1, keepdim=True)
    return torch.cat([log_p.gather(-1, tokens), others], dim=-1)


def _check_trainable(module: nn.Module) -> None:
    wrong = next((name for name, p in module.named_parameters() if not p.is_floating_point()), None)
    if wrong is not None or next(module.parameters(), None) is None:
        raise CompatibilityError(
            f"draft: {wrong or 'it has no weights that'} cannot be trained; load it unquantised (float32 or bfloat16)"
        )


@torch.no_grad()
def publish(learner: Learner) -> None:
    """Give the draft the trained weights."""
    with torch.inference_mode():
        for served, trained in zip(learner.served.parameters(), learner.module.parameters(), strict=True):
            served.copy_(trained)


def _copied(tensor: Tensor) -> Tensor:
    """An ordinary copy on the CPU. Decoding makes tensors that autograd refuses."""
    with torch.inference_mode(False):
        return tensor.detach().to("cpu", copy=True)
