"""Standard verification: the emitted text is the target's own, greedy or sampled, for any draft tree.

Greedy: the longest root path in which every token is its parent's argmax. Sampling: speculative sampling (Leviathan
et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318) generalised to trees of POINT, IID and WOR nodes (SpecInfer,
arXiv 2305.09781; RSD, arXiv 2402.14160).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from specdec.contracts import Verdict, Verifier
from specdec.sampling import Randomness, check_finite
from specdec.state import DecodeState
from specdec.target import StepOutput
from specdec.tree import DraftTree, Law, Proposal


class Standard(Verifier):
    """Lossless for every drafter."""

    name = "standard"
    summary = "exact: the target's own tokens (greedy) or distribution (sampling)"

    def verify(
        self, state: DecodeState, proposals: Sequence[Proposal | None], output: StepOutput
    ) -> list[Verdict | None]:
        sampler = state.rows[0].sampler
        if sampler.is_argmax and not (state.record_scores or state.record_logits):
            best, token = output.logits.max(dim=-1)  # [B, N]; the step's one host-device sync
            answers, values = token.tolist(), best.tolist()
            return [
                self._match(p.tree, answers[b], values[b]) if p is not None and p.tree is not None else None
                for b, p in enumerate(proposals)
            ]
        return [
            self._walk(state, b, p.tree, output.logits[b]) if p is not None and p.tree is not None else None
            for b, p in enumerate(proposals)
        ]

    @staticmethod
    def _match(tree: DraftTree, answers: list[int], best: list[float]) -> Verdict:
        """The greedy walk over argmaxes already on the host."""
        tokens, children = tree.tokens, tree.topology.children
        path: list[int] = []
        node = 0
        while True:
            check_finite(best[node])
            answer = answers[node]
            node = next((c for c in children[node] if tokens[c] == answer), -1)
            if node < 0:
                return Verdict(path, answer)
            path.append(node)

    @staticmethod
    def _walk(state: DecodeState, b: int, tree: DraftTree, logits: torch.Tensor) -> Verdict:
        """Descend from the root; processors see each visited node once, with its own prefix."""
        row = state.rows[b]
        path: list[int] = []
        tokens: list[int] = []
        node = 0
        while True:
            scores = state.scores(b, tokens, logits[node])
            children = tree.topology.children[node]
            if row.sampler.do_sample:
                token, child = choose(row.sampler.probabilities(scores), tree, children, row.randomness)
            else:
                token = row.sampler.argmax(scores)
                child = next((c for c in children if tree.tokens[c] == token), None)
            # after an accepted end token nothing more may be asked of the processors
            if child is None or token in state.eos:
                return Verdict(path, token)
            path.append(child)
            tokens.append(token)
            node = child


def choose(p: torch.Tensor, tree: DraftTree, children: Sequence[int], randomness: Randomness) -> tuple[int, int | None]:
    """One token of law ``p`` [V], and the child that carries it if one was accepted.

    The general sequential rule: with r = p and pi_i the law child i was really drawn from,

        accept x_i  iff  U < r(x_i) / pi_i(x_i);   on rejection  r <- norm(max(0, r - pi_i)).

    If every child fails, the token is drawn from r. Nodes without sampled children are served by
    sample-then-match, which has the same law and one draw.
    """
    if tree.law is None or not any(tree.law[c] for c in children):
        token = randomness.draw(p)
        return token, next((c for c in children if tree.tokens[c] == token), None)
    r = p.double()  # [V]
    tried: list[int] = []
    for child in children:
        x = int(tree.tokens[child])
        pi = drafted_law(tree, child, tried, r)
        tried.append(x)
        if randomness.accept(float(r[x] / pi[x])):
            return x, child
        r = (r - pi).clamp_(min=0.0)
        total = r.sum()
        if total <= 0:  # r equals pi up to rounding, so the test could only fail by rounding
            return x, child
        r = r / total
    return randomness.draw(r), None


def point_law(x: int, like: torch.Tensor) -> torch.Tensor:
    """The law [V] of a token chosen without randomness, of the type and device of ``like``."""
    pi = torch.zeros_like(like)
    pi[x] = 1.0
    return pi


def drafted_law(tree: DraftTree, child: int, tried: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    """The law [V] that ``child`` was drawn from, given the tokens ``tried`` of the siblings before it."""
    x = int(tree.tokens[child])
    if tree.law is None or tree.law[child] == Law.POINT:
        return point_law(x, like)
    assert tree.q is not None, "checked by DraftTree"
    assert tree.q_row is not None, "checked by DraftTree"
    pi = tree.q[tree.q_row[child]].to(like)
    if tree.law[child] == Law.WOR and tried:
        pi = pi.clone()
        pi[list(tried)] = 0.0
    if not pi[x] > 0:
        raise ValueError(f"drafted token {x} has probability 0 under its recorded q: the drafter's law is wrong")
    return pi / pi.sum()
