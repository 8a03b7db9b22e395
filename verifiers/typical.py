"""Typical acceptance (Medusa, Cai et al., arXiv 2401.10774): longer accepted paths, and no longer the target's law.

The threshold is that of truncation sampling (Hewitt et al., arXiv 2210.15191): low where the target is undecided.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from specdec.contracts import Verdict, Verifier
from specdec.errors import UsageError
from specdec.state import DecodeState, Row
from specdec.target import StepOutput
from specdec.tree import DraftTree, Proposal
from specdec.verifiers.standard import Standard


class Typical(Verifier):
    """Takes every drafted token that is likely enough, given how undecided the target is.

    With p the target's processed law at a node and H its entropy in nats, a child x is accepted iff

        p(x) > min(epsilon, delta * exp(-H(p))).

    The longest accepted path is kept; of equally long ones that of the larger sum of log p. The token after it is
    drawn from p there, so every step emits one token that no threshold has seen. (Medusa's own code takes the argmax
    in its place, so that nothing is ever sampled.) Greedy requests go to ``standard`` and lose nothing.

    What it costs: a sampled text is no longer drawn from the target's law. Where a drafted token is likely enough it
    is always taken, whatever law it was drafted from, so texts are less varied and lean towards the drafter. The
    larger the thresholds, the fewer drafts pass and the nearer is the target's law; with epsilon=1 and delta of at
    least the vocabulary's size the threshold is 1, no draft passes, and the law is the target's own.

    Processors see every node that is tried, branches that are not kept included: one that keeps a state between
    calls sees more than the text.

    Args:
        epsilon: the threshold where the target is sure, in (0, 1].
        delta: scales the threshold where it is not; positive. Medusa recommends sqrt(epsilon).

    Raises:
        UsageError: an option out of range.
    """

    name = "typical"
    summary = "lossy when sampling: drafted tokens that are likely enough for the target's entropy (Medusa)"
    lossless = False

    def __init__(self, *, epsilon: float = 0.09, delta: float = 0.3):
        if not 0 < epsilon <= 1:
            raise UsageError(f"epsilon={epsilon} must be above 0 and at most 1: it is a probability")
        if not delta > 0:
            raise UsageError(f"delta={delta} must be above 0; Medusa recommends sqrt(epsilon), here {epsilon**0.5:.2g}")
        self.epsilon, self.delta = epsilon, delta

    def verify(
        self, state: DecodeState, proposals: Sequence[Proposal | None], output: StepOutput
    ) -> list[Verdict | None]:
        if not state.rows[0].sampler.do_sample:
            return Standard().verify(state, proposals, output)
        return [
            self._longest(state, b, p.tree, output.logits[b]) if p is not None and p.tree is not None else None
            for b, p in enumerate(proposals)
        ]

    def threshold(self, p: torch.Tensor) -> float:
        """What a drafted token's probability must exceed under the law ``p`` [V]."""
        entropy = float(torch.special.entr(p).sum())  # exact at p = 0; the published code adds 1e-5 to every p
        return min(self.epsilon, self.delta * math.exp(-entropy))

    def _longest(self, state: DecodeState, b: int, tree: DraftTree, logits: torch.Tensor) -> Verdict:
        """Accept from the root downwards, then choose among what was accepted."""
        row, topology, tokens = state.rows[b], tree.topology, tree.tokens.tolist()
        laws: dict[int, torch.Tensor] = {}  # tried node -> p [V], in the order of trial

        def law(node: int) -> torch.Tensor:
            if node not in laws:
                prefix = [tokens[v] for v in topology.path(node)]
                laws[node] = row.sampler.probabilities(state.scores(b, prefix, logits[node]))
            return laws[node]

        score = {0: 0.0}  # accepted node -> sum of log p down to it
        for node, children in enumerate(topology.children):
            # after an accepted end token nothing more may be asked of the processors; the root may be any token
            if node not in score or not children or (node > 0 and tokens[node] in state.eos):
                continue
            p = law(node)
            least = self.threshold(p)
            for child, chance in zip(children, p[[tokens[c] for c in children]].tolist(), strict=True):
                if chance > least:
                    score[child] = score[node] + math.log(chance)
        last = max(score, key=lambda v: (topology.depth[v], score[v]))
        path = topology.path(last)
        if path and tokens[last] in state.eos:
            verdict = Verdict(path[:-1], tokens[last])
        else:
            verdict = Verdict(path, row.randomness.draw(law(last)))
        forget_others(row, list(laws), [0, *verdict.path])
        return verdict


def forget_others(row: Row, tried: list[int], kept: list[int]) -> None:
    """Of the scores and logits recorded for the ``tried`` nodes leave those of the emitted tokens."""
    for recorded in (row.recorded_scores, row.recorded_logits):
        if recorded:
            of_node = dict(zip(tried, recorded[-len(tried) :], strict=True))
            recorded[-len(tried) :] = [of_node[v] for v in kept]
