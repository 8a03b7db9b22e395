"""Which drafts a model can verify: trees, chains, or none. Rules first, then a numeric self-test.

Rules alone are wrong in both directions (a model's class may take a 4-D mask and ignore it), so a small tree is
forwarded over a cached prefix and compared with plain forwards of each path.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from specdec.errors import first_line
from specdec.tree import DraftTree, Proposal, Topology
from specdec.tree_attention.registration import supported

if TYPE_CHECKING:
    from specdec.target import Target

# windows or distances counted in cache slots, which no short self-test can see
_BY_SLOT = {"gpt_neo": "its local attention window counts cache slots, which tree nodes shift"}
_KINDS = {"full_attention", "sliding_attention", "chunked_attention", "attention"}
_WINDOWED = {"sliding_attention", "chunked_attention"}
# what a model does in long contexts only, so that no short self-test can see it
_INEXACT = {"doge": "its dynamic mask makes the text depend on how many tokens share a forward"}


@dataclass(frozen=True)
class Capability:
    """The tier of a model and why.

    Attributes:
        tier: "tree" (any draft), "chain" (one candidate per depth), "none" (cannot be decoded here).
        reason: one sentence.
        stock: why steps run on stock attention; None when they run on the tree attention kernel.
    """

    tier: Literal["tree", "chain", "none"]
    reason: str
    stock: str | None = "only tree-capable models use the kernel"


def detect(target: Target) -> Capability:
    """Decide the tier of ``target``'s model with about eight forwards of a few tokens."""
    model, config = target.model, target.config
    if model.config.is_encoder_decoder:
        return Capability("none", "encoder-decoder models are not supported; use a decoder-only model")
    recurrent = sorted(set(getattr(config, "layer_types", None) or []) - _KINDS)
    if getattr(model, "_is_stateful", False) or recurrent:
        what = f"layers of kind {', '.join(recurrent)}" if recurrent else "a recurrent state"
        return Capability("none", f"it has {what}, which cannot be rolled back when a draft is rejected")
    if config.model_type in _INEXACT:
        return Capability("none", _INEXACT[config.model_type])
    if "past_key_values" not in target.inputs:
        return Capability("none", "its forward takes no past_key_values, so nothing can be cached")
    try:
        want, effect = _references(target)
    except Exception as error:  # any failure of foreign modelling code means: not decodable
        return Capability("none", f"a plain forward fails: {type(error).__name__}: {error}")
    if not bool(torch.isfinite(want.max())):
        return Capability("none", "its logits contain NaN or inf; load it in float32 or bfloat16 and check its weights")
    half = model.dtype in (torch.float16, torch.bfloat16)
    # a wrong context changes the logits by `effect`; rounding in half precision is far below a fifth of it
    tolerance = (0.2 if half else 0.05) * effect

    slots = _BY_SLOT.get(model.config.model_type)
    if slots is None and "position_ids" in target.inputs:
        problem = _try(target, Topology([-1, 0, 0]), [11, 12, 13], want[[0, 1, 3]], tolerance)
        if problem is None:
            tree = Capability("tree", "a tree over a cached prefix gives the logits of each path", stock=None)
            return replace(tree, stock=_kernel(target, tree, want[[0, 1, 3]], tolerance))
    else:
        problem = slots or "its forward takes no position_ids, so siblings cannot share a position"
    if problem is not None and _WINDOWED & set(target.layer_kinds):
        # a chain would go without our mask, and whether the model applies its window then shows in long contexts only
        return Capability("none", f"its attention window cannot be checked: {problem}")
    target.capability = Capability("chain", "being tested")
    failure = _try(target, Topology.chain(2), [11, 12, 13], want[:3], tolerance)
    if failure is None:
        return Capability("chain", f"chains only: {problem}")
    return Capability("none", f"not even a chain over a cached prefix is exact: {failure}")


def _kernel(target: Target, tree: Capability, want: torch.Tensor, tolerance: float) -> str | None:
    """Why steps do not run on the tree attention kernel; None when they do, tried with the model's own forward."""
    reason = supported(target.model, target.device, target.model.dtype)
    if target.ranks is not None:  # one that cannot is enough: all must run the same trial
        reason = next(filter(None, target.ranks.gather(reason)), None)
    if reason is not None:
        return reason
    target.capability = tree
    problem = _try(target, Topology([-1, 0, 0]), [11, 12, 13], want, tolerance)
    if problem == "its logits are off by nan":  # what a StepMask read as numbers gives
        return "its attention does not take registered functions, or changes the mask on the way"
    return problem


def _ids(target: Target, tokens: list[int]) -> list[int]:
    return [t % target.vocab_size for t in tokens]


_PREFIX = list(range(3, 11))


def _references(target: Target) -> tuple[torch.Tensor, float]:
    """Logits [4, V] after the paths 11; 11 12; 11 12 13; 11 13, and how much one wrong token changes them."""
    paths = ([11], [11, 12], [11, 12, 13], [11, 13])
    rows = []
    with torch.inference_mode():
        for path in paths:
            ids = torch.tensor([_ids(target, _PREFIX + path)], device=target.device)
            rows.append(target.model(input_ids=ids).logits[0, -1].float())
    want = torch.stack(rows)
    return want, float((want[2] - want[3]).abs().max())


def _try(target: Target, topology: Topology, tokens: list[int], want: torch.Tensor, tolerance: float) -> str | None:
    """Forward a draft over a cached prefix; None when its logits are right, else what is wrong."""
    prefix = np.array(_ids(target, _PREFIX))
    committed = np.array(_ids(target, _PREFIX + tokens[:1]))
    tree = DraftTree(topology, np.array(_ids(target, tokens)))
    try:
        with target.session():
            target.open([0], 32)
            first = target.step([prefix], [Proposal(DraftTree.root(int(prefix[-1])))])
            target.commit(first, [[]])
            got = target.step([committed], [Proposal(tree)]).logits[0].float()
            off = float((got - want).abs().max())
    except Exception as error:  # foreign modelling code: whatever it raises is the answer
        return f"the draft's forward fails ({first_line(error, 120)})"
    if not off < tolerance:  # NaN included
        return f"its logits are off by {off:.2g}"
    return None
