"""A small language model drafts for a large one (Leviathan et al., arXiv 2211.17192; SpecInfer, arXiv 2305.09781).

Any Hugging Face causal LM with the target's vocabulary, as a chain or as a tree of constant branching factors. When the
request samples, nodes are drawn from the draft model's own law: independently (IID) or without replacement (WOR).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from specdec.contracts import Drafter
from specdec.errors import CompatibilityError, UsageError
from specdec.state import DecodeState
from specdec.target import Target
from specdec.tree import DraftTree, Law, Proposal, Topology

_CHUNK = 512  # tokens fed to the draft model per forward when it has fallen behind


class DraftModel(Drafter):
    """Drafts with a smaller model that has its own cache, kept in step with the text.

    Args:
        draft: a loaded model in eval mode, a local path, or a hub id.
        length: depth of a chain.
        branching: children per node at each depth, for a tree; replaces ``length``.
        law: how nodes are drawn when the request samples: "wor" (without replacement), "iid", or "point" (the
            draft model's likeliest tokens). Greedy requests always use "point".
        same_tokenizer: accept a draft model whose embedding is padded to another size than the target's.
    """

    name = "draft-model"
    summary = "a smaller model of the same vocabulary drafts a chain or a tree"
    requires = "a smaller model of the same vocabulary (draft=...)"

    def __init__(
        self,
        draft: PreTrainedModel | str | Path,
        length: int = 4,
        branching: Sequence[int] | None = None,
        law: Literal["wor", "iid", "point"] = "wor",
        same_tokenizer: bool = False,
    ):
        if law not in ("wor", "iid", "point"):
            raise UsageError(f"law={law!r} must be 'wor', 'iid' or 'point'")
        if length < 1:
            raise UsageError(f"length={length} must be at least 1")
        self.factors = tuple(branching) if branching is not None else (1,) * length
        if not self.factors:
            raise UsageError("branching is empty; give the number of children at each depth, such as (3, 2, 1)")
        self.topology = Topology.branching(self.factors)
        self.budget = len(self.topology)
        self.law: Law = Law[law.upper()]
        self.same_tokenizer = same_tokenizer
        self._source = draft
        self._draft: Target | None = None

    @property
    def draft(self) -> Target:
        """The draft model, once bound."""
        assert self._draft is not None, "the draft model is loaded when the drafter is bound to a target"
        return self._draft

    @property
    def forwards(self) -> int:  # type: ignore[override]
        return self.draft.forwards + self.draft.scratch_forwards if self._draft else 0

    def bind(self, target: Target) -> None:
        model = self._source
        if not isinstance(model, PreTrainedModel):
            model = AutoModelForCausalLM.from_pretrained(model, dtype=target.model.dtype).to(target.device).eval()
        draft = Target(model, compile_mode=target.compile_mode)
        if draft.vocab_size != target.vocab_size and not self.same_tokenizer:
            raise CompatibilityError(
                f"draft: its vocabulary has {draft.vocab_size} tokens, the target's {target.vocab_size}; use a draft "
                "model of the same tokenizer (same_tokenizer=True if only the padding of the embeddings differs)"
            )
        if draft.capability.tier != "tree" and max(self.factors) > 1:
            raise CompatibilityError(f"branching={self.factors} needs a tree-capable draft: {draft.capability.reason}")
        draft.compile()
        self._draft, self._vocab = draft, target.vocab_size

    def begin(self, state: DecodeState) -> None:
        self._session = ExitStack()
        self._session.enter_context(self.draft.session())
        longest = max(row.max_length for row in state.rows)
        capacity = min(longest, max(len(row) for row in state.rows) + 1024) + self.budget
        self.draft.open([row.index for row in state.rows], capacity)

    def end(self, state: DecodeState) -> None:
        self._session.close()

    def propose(self, state: DecodeState) -> list[Proposal | None]:
        deepest = max(state.depth_left(b) for b in range(len(state.rows)))
        if deepest == 0:
            return [Proposal(DraftTree.root(int(row.tokens[-1]))) for row in state.rows]
        self.draft.align([row.index for row in state.rows])
        logits = self._catch_up(state)
        with self.draft.scratch():
            return [Proposal(tree) for tree in self.grow(state, logits, deepest)]

    def grow(self, state: DecodeState, logits: torch.Tensor, deepest: int) -> list[DraftTree]:
        """One tree per row, of at most ``deepest`` levels, from the draft's logits [B, V] after the roots."""
        factors = self.factors[:deepest]
        topology = Topology.branching(factors)
        ancestors = topology.mask(self.draft.device)
        law = self.law if state.rows[0].sampler.do_sample else Law.POINT
        roots = torch.tensor([int(row.tokens[-1]) for row in state.rows], device=self.draft.device)
        tokens = [roots[:, None]]  # per depth [B, W]
        laws: list[torch.Tensor] = []  # per depth [B, W, V], the laws of nodes whose children were drawn
        level_logits = logits[:, None]  # [B, W, V]
        for depth, factor in enumerate(factors):
            if depth:
                level = list(topology.levels[depth])
                # the root is committed to the draft's cache, so scratch columns are the nodes 1, 2, ...
                visible = ancestors[level, 1 : level[-1] + 1].expand(len(roots), -1, -1)
                level_logits = self.read(state, tokens[-1], depth, visible)
            drawn, q = self._children(state, level_logits, factor, law)
            tokens.append(drawn)
            laws.append(q)
        host = torch.cat(tokens, dim=1).cpu().numpy()  # [B, N]
        if law is Law.POINT:
            return [DraftTree(topology, row) for row in host]
        q = torch.cat(laws, dim=1)  # [B, R, V]; row of q = number of the parent node
        parents = np.maximum(np.array(topology.parents), 0)
        every = np.array([Law.POINT] + [law] * (len(topology) - 1), dtype=np.int8)
        return [DraftTree(topology, row, every, parents, q[b]).drawn() for b, row in enumerate(host)]

    def read(self, state: DecodeState, tokens: torch.Tensor, depth: int, visible: torch.Tensor) -> torch.Tensor:
        """The draft's logits [B, W, V] after the nodes ``tokens`` [B, W] of one depth (the root's children: 1).

        ``visible`` bool [B, W, S]: the nodes so far that each sees, itself included; S counts all but the root.
        """
        lengths = torch.tensor([len(row.tokens) for row in state.rows], device=self.draft.device)
        positions = (lengths + depth - 1)[:, None].expand(-1, tokens.shape[1])
        return self._fit(self.draft.forward(tokens, positions, visible))

    def _children(
        self, state: DecodeState, logits: torch.Tensor, k: int, law: Law
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """k children for every node of a level: tokens [B, W * k] and the laws drawn from [B, W, V]."""
        if law is Law.POINT:
            return logits.topk(k, dim=-1).indices.flatten(1), logits
        drawn, laws = [], []
        for row, level in zip(state.rows, logits, strict=True):
            q = row.sampler.warp(level)  # [W, V]
            drawn.append(row.randomness.draws(q, k, replace=law is Law.IID).flatten())
            laws.append(q)
        return torch.stack(drawn), torch.stack(laws)

    def _fit(self, logits: torch.Tensor) -> torch.Tensor:
        """The draft's logits [..., V'] on the target's vocabulary [..., V]."""
        missing = self._vocab - logits.shape[-1]
        if missing <= 0:
            return logits[..., : self._vocab]
        return torch.nn.functional.pad(logits, (0, missing), value=float("-inf"))

    def _catch_up(self, state: DecodeState) -> torch.Tensor:
        """Feed the tokens the draft has not seen, root last; its logits [B, V] after the root."""
        draft = self.draft
        # a row whose text has not grown is fed its last token again, for the logits after it
        draft.truncate([len(row.tokens) - 1 for row in state.rows])
        after: list[torch.Tensor | None] = [None] * len(state.rows)
        while any(rest is None for rest in after):
            ends = [min(len(row.tokens), n + _CHUNK) for row, n in zip(state.rows, draft.lengths, strict=True)]
            tokens = [row.tokens[:end] for row, end in zip(state.rows, ends, strict=True)]
            asked = [
                Proposal(DraftTree.root(int(t[-1]))) if rest is None else None
                for t, rest in zip(tokens, after, strict=True)
            ]
            output = draft.step(tokens, asked)
            draft.commit(output, [[]] * len(asked))
            for b, row in enumerate(state.rows):
                if asked[b] is not None and draft.lengths[b] == len(row.tokens):
                    after[b] = output.logits[b, 0]
        return self._fit(torch.stack([logits for logits in after if logits is not None]))
