"""The drafter: one small model of nested sub-models, each token leaves at the first that is sure of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from specdec.drafters.draft_model import DraftModel
from specdec.drafters.s2d.nested import Nested
from specdec.drafters.s2d.segments import Segments, Text
from specdec.errors import CompatibilityError, UsageError
from specdec.state import DecodeState
from specdec.target import Target
from specdec.tree import DraftTree, Law, Proposal, Topology


class S2D(DraftModel):
    """A smaller model drafts a chain, each token by the fewest layers that are sure of it (arXiv 2407.01955).

    The model's first n layers, for a few n, are language models too: they share embedding, final norm and head, and
    are trained together (``specdec train s2d``). A token is drafted by the first of them whose largest probability, at
    temperature 1, is above its threshold; the first token of a request by the deepest one that can be reached. One
    draft model serves targets of any size. An end token ends the chain. Rows of a batch are drafted one by one, since
    they leave at different depths.

    Args:
        draft, length, same_tokenizer: see ``DraftModel``.
        submodels: D, layers of each sub-model, rising to all of the model's. None: as written beside the checkpoint.
        thresholds: T, one for each, see ``Nested``; (0, ...) is the first sub-model alone, (1, ..., 1, 0) the whole
            model. None: as written beside the checkpoint, or 0.5 for ``submodels`` that were given.
        law: when the request samples, "point" drafts likeliest tokens as the paper does, "iid" draws them from the
            sub-model where they leave. Both are lossless. Greedy requests always use "point".

    Attributes:
        exits: int64 [|D|], tokens drafted by each sub-model in this request, or the last one.
        layers: layers run for them, the reading of the prompt and of what deeper layers had missed included; a layer
            counts once however many tokens it reads.

    Raises:
        UsageError: sub-models or thresholds that do not fit, or are not known.
        CompatibilityError: a model that cannot be run in parts (``bind``).
    """

    name = "s2d"
    summary = "a smaller model of nested sub-models, each token drafted by the fewest layers that are sure of it"
    requires = "a smaller model of the same vocabulary (draft=...), sorted: `specdec train s2d`"

    def __init__(
        self,
        draft: PreTrainedModel | str | Path,
        submodels: Sequence[int] | None = None,
        thresholds: Sequence[float] | None = None,
        length: int = 5,
        law: Literal["point", "iid"] = "point",
        same_tokenizer: bool = False,
    ):
        if law not in ("point", "iid"):
            raise UsageError(f"law={law!r} must be 'point' or 'iid'")
        super().__init__(draft, length=length, law=law, same_tokenizer=same_tokenizer)
        self._thresholds = thresholds
        # without it, what stands beside the draft is read when the draft is
        self._given = None if submodels is None else Nested.of(submodels, thresholds)
        self.exits, self.layers, self._reads = np.zeros(0, dtype=np.int64), 0, 0

    def _nested(self) -> Nested:
        if self._given is not None:
            return self._given
        source = self._source
        found = Nested.beside(source.name_or_path if isinstance(source, PreTrainedModel) else source)
        if found is None:
            raise UsageError(
                "submodels: no s2d.json beside the draft says what they are; give submodels=(2, 4, 6), the layers of "
                "each, or make a sorted model with `specdec train s2d`"
            )
        return found if self._thresholds is None else Nested.of(found.submodels, self._thresholds)

    @property
    def forwards(self) -> int:  # type: ignore[override]
        """Of any depth."""
        return self._reads

    def bind(self, target: Target) -> None:
        nested, model = self._nested(), self._source
        if not isinstance(model, PreTrainedModel):
            model = AutoModelForCausalLM.from_pretrained(model, dtype=target.model.dtype).to(target.device).eval()
        draft = Target(model)
        if draft.ranks is not None:
            raise CompatibilityError(
                "draft: it is sharded over several ranks, and its layers are run apart; load it without tp_plan"
            )
        if draft.vocab_size != target.vocab_size and not self.same_tokenizer:
            raise CompatibilityError(
                f"draft: its vocabulary has {draft.vocab_size} tokens, the target's {target.vocab_size}; use a draft "
                "model of the same tokenizer (same_tokenizer=True if only the padding of the embeddings differs)"
            )
        self._draft, self._vocab = draft, target.vocab_size
        self._segments = Segments(draft, nested)

    def begin(self, state: DecodeState) -> None:
        self.exits, self.layers = np.zeros(len(self._segments.nested.submodels), dtype=np.int64), 0
        self._texts = {row.index: Text(self._segments) for row in state.rows}

    def end(self, state: DecodeState) -> None:
        self._texts = {}

    def propose(self, state: DecodeState) -> list[Proposal | None]:
        return [Proposal(self._chain(state, b)) for b in range(len(state.rows))]

    def _chain(self, state: DecodeState, b: int) -> DraftTree:
        row = state.rows[b]
        text = self._texts[row.index]
        drawn = row.sampler.do_sample and self.law is Law.IID
        root = int(row.tokens[-1])
        length = min(len(self.factors), state.depth_left(b))
        if length == 0:
            return DraftTree.root(root)
        first, before = len(text.tokens) == 0, text.layers
        unread = text.roll_back(row.tokens)
        chain, laws = [root], []
        for i in range(length):
            logits, left = text.read(unread, full=first and i == 0)
            self.exits[left] += 1
            self._reads += 1
            logits = self._fit(logits)
            if drawn:
                q = row.sampler.warp(logits[None])  # [1, V]
                laws.append(q)
                token = row.randomness.draw(q[0])
            else:
                token = int(logits.argmax())
            chain.append(token)
            if token in state.eos:
                break
            unread = np.array([token])
        self.layers += text.layers - before
        if not drawn:
            return DraftTree.chain(root, chain[1:])
        n = len(chain)
        law = np.array([Law.POINT] + [Law.IID] * (n - 1), dtype=np.int8)
        return DraftTree(Topology.chain(n - 1), np.array(chain), law, np.maximum(np.arange(n) - 1, 0), torch.cat(laws))
