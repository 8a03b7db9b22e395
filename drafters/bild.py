"""BiLD's fallback policy: a small model writes until it is unsure (Kim et al., arXiv 2302.07863, NeurIPS 2023).

With the verifier ``rollback`` this is the Big Little Decoder, which is lossy: its text is only close to the target's.
With ``standard`` it is a lossless chain of adaptive length: whether to go on is decided before a token is chosen.

The paper's optional alignment of the small model needs nothing here: let the target answer prompts with
``specdec distill`` and fine-tune the small model on those texts as usual.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from specdec.drafters.draft_model import DraftModel
from specdec.errors import UsageError
from specdec.state import DecodeState
from specdec.tree import DraftTree, Law, Topology


class BiLD(DraftModel):
    """A smaller model drafts a chain that ends before the first token it is unsure of; the target writes that one.

    The first token of a text is the target's. An end token ends the chain.

    Args:
        draft, same_tokenizer: see ``DraftModel``.
        fallback: a_FB, least probability that the small model must give to its likeliest token, at temperature 1 and
            without filters whatever the request samples with. Above 1 the target writes every token.
        length: longest chain.

    Raises:
        UsageError: a negative threshold, or a length below 1.
    """

    name = "bild"
    summary = "a smaller model drafts until it is unsure; the Big Little Decoder (lossy) with the verifier rollback"

    def __init__(
        self,
        draft: PreTrainedModel | str | Path,
        fallback: float = 0.6,
        length: int = 10,
        same_tokenizer: bool = False,
    ):
        if not fallback >= 0:
            raise UsageError(f"fallback={fallback} must be a probability from 0 up; above 1 nothing is drafted")
        super().__init__(draft, length=length, same_tokenizer=same_tokenizer)
        self.fallback = fallback

    def grow(self, state: DecodeState, logits: torch.Tensor, deepest: int) -> list[DraftTree]:
        device = logits.device
        law = self.law if state.rows[0].sampler.do_sample else Law.POINT
        eos = torch.tensor(sorted(state.eos), dtype=torch.long, device=device)
        going = torch.tensor([len(row.new_tokens) > 0 for row in state.rows], device=device)  # [B]
        lengths = torch.zeros(len(logits), dtype=torch.long, device=device)
        tokens = [torch.tensor([[int(row.tokens[-1])] for row in state.rows], device=device)]  # per depth [B, 1]
        laws: list[torch.Tensor] = []  # per depth [B, 1, V]
        level_logits = logits[:, None]  # [B, 1, V]
        for depth in range(min(len(self.factors), deepest)):
            if depth:
                visible = torch.ones(len(logits), 1, depth, dtype=torch.bool, device=device)
                level_logits = self.read(state, tokens[-1], depth, visible)
            going = going & (level_logits[:, 0].float().softmax(dim=-1).amax(dim=-1) >= self.fallback)
            if not going.any():
                break
            # rows that have stopped draft along, unread
            token, q = self._children(state, level_logits, 1, law)
            tokens.append(token)
            laws.append(q)
            lengths += going
            going = going & ~torch.isin(token[:, 0], eos)
        host = torch.cat(tokens, dim=1).cpu().numpy()  # [B, 1 + depths]
        chains = [row[: n + 1] for row, n in zip(host, lengths.tolist(), strict=True)]
        if law is Law.POINT or not laws:
            return [DraftTree(Topology.chain(len(chain) - 1), chain) for chain in chains]
        q = torch.cat(laws, dim=1)  # [B, R, V]
        return [_drawn(chain, law, q[b]) for b, chain in enumerate(chains)]


def _drawn(chain: np.ndarray, law: Law, q: torch.Tensor) -> DraftTree:
    """A sampled chain, root first; row i of ``q`` is the law of what follows node i."""
    laws = np.array([Law.POINT] + [law] * (len(chain) - 1), dtype=np.int8)
    q_row = np.maximum(np.arange(len(chain)) - 1, 0)
    return DraftTree(Topology.chain(len(chain) - 1), chain, laws, q_row, q)
