"""Recursive speculative decoding: draft trees sampled without replacement (Jeon et al., arXiv 2402.14160).

Siblings never repeat a token, and the verifier ``standard`` accepts them by recursive rejection without replacement,
which is exact. RSD-C gives every node of a depth the same number of children, drawn by Gumbel-Top-k. RSD-S draws whole
sequences without replacement by stochastic beam search (Kool et al., arXiv 1903.06059).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from specdec.drafters.draft_model import DraftModel
from specdec.errors import UsageError
from specdec.state import DecodeState
from specdec.tree import DraftTree, Law, Topology


class RSD(DraftModel):
    """A smaller model drafts without replacement.

    RSD-S drafts width x depth nodes, RSD-C b_0 + b_0 b_1 + ... of them: 6 is 2 x 3 or (2, 2), 10 is 2 x 5, 14 is 2 x 7
    or (2, 2, 2), 21 is 3 x 7, 30 is 6 x 5 or (2, 2, 2, 2). Greedy requests draft without noise: the likeliest children,
    or a plain beam search.

    Args:
        draft, same_tokenizer: see ``DraftModel``.
        width: W, nodes per depth of RSD-S.
        depth: L, depths of RSD-S.
        branching: b, children per node at each depth, for RSD-C; replaces ``width`` and ``depth``.

    Raises:
        UsageError: a shape without nodes.
    """

    name = "rsd"
    summary = "a smaller model drafts a tree without replacement: stochastic beam search, or constant branching"

    def __init__(
        self,
        draft: PreTrainedModel | str | Path,
        width: int = 6,
        depth: int = 5,
        branching: Sequence[int] | None = None,
        same_tokenizer: bool = False,
    ):
        if width < 1 or depth < 1:
            raise UsageError(f"width={width} and depth={depth} must be at least 1")
        self.beam = width if branching is None else None
        # a beam has as many nodes as W chains below the root
        factors = (width, *(1,) * (depth - 1)) if branching is None else branching
        super().__init__(draft, branching=factors, same_tokenizer=same_tokenizer)

    def grow(self, state: DecodeState, logits: torch.Tensor, deepest: int) -> list[DraftTree]:
        if self.beam is None:
            return super().grow(state, logits, deepest)
        device = self.draft.device
        wide = torch.float32 if device.type == "mps" else torch.float64
        eos = torch.tensor(sorted(state.eos), dtype=torch.long, device=device)
        # per depth, all [B, W]; the root is the only node of depth 0
        tokens = [torch.tensor([[int(row.tokens[-1])] for row in state.rows], device=device)]
        parents = [torch.zeros_like(tokens[0])]
        exists = [torch.ones_like(tokens[0], dtype=torch.bool)]
        laws: list[torch.Tensor] = []  # per depth [B, W, V]
        # of the last depth: log-probability of the path, perturbed log-probability, whether children may follow
        phi = torch.zeros(tokens[0].shape, dtype=wide, device=device)
        g = torch.full_like(phi, float("inf"))  # any constant serves at the root
        going = exists[0]
        visible = torch.zeros(len(logits), 1, 0, dtype=torch.bool, device=device)  # [B, W, S]
        level_logits = logits[:, None]  # [B, W, V]
        first = 0  # number of the last depth's first node
        for depth in range(min(len(self.factors), deepest)):
            if depth:
                level_logits = self.read(state, tokens[-1], depth, visible)
            keys, q = self._keys(state, level_logits, phi, g)
            keys = keys.masked_fill(~going[..., None] | (q == 0), -float("inf"))
            vocabulary = keys.shape[-1]
            # best first, over all parents: siblings come in the order of their keys, which is their trial order
            g, best = keys.flatten(1).topk(min(self.beam, keys[0].numel()), dim=-1)  # [B, W']
            parent, token = best // vocabulary, best % vocabulary
            phi = phi.gather(1, parent) + q.to(wide).log().flatten(1).gather(1, best)
            parents.append(first + parent)
            first += tokens[-1].shape[1]
            tokens.append(token)
            exists.append(g > -float("inf"))  # fewer than W continuations may have a probability
            laws.append(q)
            going = exists[-1] & ~torch.isin(token, eos)
            above = visible.gather(1, parent[..., None].expand(-1, -1, visible.shape[-1]))
            itself = torch.eye(token.shape[1], dtype=torch.bool, device=device).expand(len(token), -1, -1)
            visible = torch.cat([above, itself], dim=-1)
        q = torch.cat(laws, dim=1)  # [B, R, V]; row of q = number of the parent node
        sample = state.rows[0].sampler.do_sample
        columns = (torch.cat(x, dim=1).cpu().numpy() for x in (tokens, parents, exists))  # [B, N] each
        return [_tree(t, p, e, q[b] if sample else None) for b, (t, p, e) in enumerate(zip(*columns, strict=True))]

    @staticmethod
    def _keys(
        state: DecodeState, logits: torch.Tensor, phi: torch.Tensor, g: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What ranks every possible child of a level, and the laws q of the children: [B, W, V] each."""
        if not state.rows[0].sampler.do_sample:
            q = torch.softmax(logits.float(), dim=-1)
            return phi[..., None] + q.to(phi.dtype).log(), q
        q = torch.stack([row.sampler.warp(level) for row, level in zip(state.rows, logits, strict=True)])
        rates = q.to(phi.dtype)
        times = torch.stack([row.randomness.race(level) for row, level in zip(state.rows, rates, strict=True)])
        return perturbed(times, phi, g), q


def perturbed(times: torch.Tensor, phi: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """Perturbed log-probabilities of all children, the largest of each parent's being the parent's own.

    With t = exp(-G) a Gumbel variable of location phi is an exponential time of rate exp(phi). Conditioning the
    earliest child on its parent's time is then a shift: what the others are late by has no memory of it.

        t_c = t_v + (T_c - min T) / exp(phi_v),  T_c ~ Exp(q(c | v)),  in logarithms since phi_v may be very small.

    Args:
        times: T, [..., W, V].
        phi: log-probabilities of the parents' paths, [..., W].
        g: G of the parents, [..., W].

    Returns:
        G of the children, [..., W, V].
    """
    late = (times - times.amin(dim=-1, keepdim=True)).log() - phi[..., None]
    return -torch.logaddexp(-g[..., None], late)


def _tree(tokens: np.ndarray, parents: np.ndarray, exists: np.ndarray, q: torch.Tensor | None) -> DraftTree:
    """The nodes that exist, of [N] each; ``q`` [R, V] holds the law of every parent's children."""
    number = np.cumsum(exists) - 1
    above = number[parents[exists]]
    above[0] = -1
    law = None if q is None else np.array([Law.POINT] + [Law.WOR] * (len(above) - 1), dtype=np.int8)
    return DraftTree(Topology(above), tokens[exists], law, parents[exists], q)
