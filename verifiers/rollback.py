"""BiLD's rollback policy (Kim et al., arXiv 2302.07863, NeurIPS 2023). Lossy: the text is not the target's own."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from specdec.contracts import Verdict, Verifier
from specdec.errors import UsageError
from specdec.state import DecodeState
from specdec.target import StepOutput
from specdec.tree import DraftTree, Proposal


class Rollback(Verifier):
    """Keeps drafted tokens until the target finds one too unlikely, puts its own in that place and drops the rest.

    A drafted token y is kept when it is the target's own choice (the argmax, or when sampling a draw from the processed
    law), or when its distance d = -log p(y), in nats and by the target's raw logits, is below the threshold and no
    processor forbids it. Of several such children the target's choice goes first, then the likeliest. When sampling,
    the law of the text is not the target's. A threshold of 0 is the target's plain decoding, exactly.

    Args:
        threshold: a_RB; 3 keeps tokens down to a probability of exp(-3) = 0.05.

    Raises:
        UsageError: a negative threshold.
    """

    name = "rollback"
    summary = "lossy: keeps drafted tokens unless the target finds them too unlikely (BiLD, with the drafter bild)"
    lossless = False

    def __init__(self, threshold: float = 5.0):
        if not threshold >= 0:
            raise UsageError(f"threshold={threshold} must be a distance in nats from 0 up; 0 keeps only the target's")
        self.threshold = threshold

    def verify(
        self, state: DecodeState, proposals: Sequence[Proposal | None], output: StepOutput
    ) -> list[Verdict | None]:
        return [
            self._walk(state, b, p.tree, output.logits[b]) if p is not None and p.tree is not None else None
            for b, p in enumerate(proposals)
        ]

    def _walk(self, state: DecodeState, b: int, tree: DraftTree, logits: torch.Tensor) -> Verdict:
        """Descend from the root; a token that the target has chosen itself is not judged."""
        row = state.rows[b]
        path: list[int] = []
        tokens: list[int] = []
        node = 0
        while True:
            scores = state.scores(b, tokens, logits[node])  # [V]
            if row.sampler.do_sample:
                choice = row.randomness.draw(row.sampler.probabilities(scores))
            else:
                choice = row.sampler.argmax(scores)
            child = self._child(tree, node, choice, scores, logits[node])
            token = choice if child is None else int(tree.tokens[child])
            if child is None or token in state.eos:
                return Verdict(path, token)
            path.append(child)
            tokens.append(token)
            node = child

    def _child(self, tree: DraftTree, node: int, choice: int, scores: torch.Tensor, logits: torch.Tensor) -> int | None:
        """The child to go on with, if one is kept."""
        children = tree.topology.children[node]
        if not children:
            return None
        chosen = next((c for c in children if tree.tokens[c] == choice), None)
        if chosen is not None:
            return chosen
        drafted = torch.from_numpy(tree.tokens[list(children)]).to(logits.device)
        distance = -logits.float().log_softmax(dim=-1)[drafted]  # [children]
        distance[scores[drafted] == -float("inf")] = float("inf")
        nearest = int(distance.argmin())
        return children[nearest] if distance[nearest] < self.threshold else None
