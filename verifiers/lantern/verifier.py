"""LANTERN (Jang et al., arXiv 2410.03355) and LANTERN++ (Park et al., arXiv 2502.06352). Lossy by design."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from specdec.contracts import Verdict, Verifier
from specdec.errors import CompatibilityError, UsageError
from specdec.sampling import Randomness
from specdec.state import DecodeState
from specdec.target import StepOutput, Target
from specdec.tree import DraftTree, Proposal
from specdec.verifiers.lantern.neighbours import FILE, Neighbours
from specdec.verifiers.standard import drafted_law, point_law
from specdec.verifiers.typical import forget_others


class Lantern(Verifier):
    """A drafted image token may borrow the target's probability of its nearest codes before it is judged.

    Image models spread their probability over many codes that decode to nearly the same patch, so that exact
    verification rejects most drafts. With W the target's processed law at a node, n_1, n_2, ... the codes nearest to
    x and S_m = W[n_1] + ... + W[n_m], x borrows from the longest prefix whose S_m is within the bound

        S_m <= delta  (LANTERN)    or    S_m <= (factor - 1) W[x]  (LANTERN++),

    and W_x, the law with that mass moved onto x, is W's at total variation S_m. Sampling: x, drafted from pi, is
    accepted with probability min(1, W_x[x] / pi[x]); else W becomes the residual, and the next sibling borrows from
    that. Greedy: x is accepted if W_x[x] is at least every other W; the longest accepted path is kept. The token
    after the path is always the target's own. Tokens that are no codes borrow nothing and are lent to none.

    What it costs: the text is no longer the target's, when sampling nor greedy, and errors add up along it; look at
    the pictures and measure them. ``delta`` bounds the relaxed law of each *proposal*, not the law of what is
    emitted. Let W be uniform over codes A and the drafter's law over others B, B's next to A's, every probability at
    most delta: whatever is drafted borrows enough to be accepted, and the law emitted is the drafter's, at total
    variation 1. With ``factor`` no token is accepted at a node with more than ``factor`` times its probability, so
    that one which top-k cut, or a processor forbids, never is; with ``delta`` it may be.

    ``k=1``, ``delta=0`` and ``factor=1`` borrow nothing: that is ``standard``, draw for draw.

    Args:
        codebook: a table made by `specdec codebook` (or ``Neighbours``). None: neighbours.safetensors beside the
            model's weights.
        k: codes in a neighbourhood, x itself included. The published code leaves x out: its k is one less.
        delta: most probability to borrow, 0 to 1.
        factor: most that borrowing may multiply W[x] by, lambda of LANTERN++; at least 1.
        residual: what a rejection leaves. "consistent": max(W_x - pi, 0), so x and what it borrowed are gone.
            "repo-dynamic" (published, dynamic trees): every drafted token counts as chosen without randomness, and
            if it borrowed its whole neighbourhood is removed. "repo-static" (published, static trees): max(W - pi, 0)
            with pi zeroed in the neighbourhood if x borrowed, so that its neighbours keep their probability. Both
            break the cap of ``factor`` for later siblings, and both are here without the published code's slips:
            k + 1 codes removed for k lent, and removed though nothing was lent.
        offset: token id of code 0 where the table does not say and the vocabulary holds more than codes.

    Without ``delta`` and ``factor`` the bound is ``factor=2``.

    Raises:
        UsageError: both bounds, a value out of range, a table narrower than k, or no table.
        CompatibilityError: the codes do not fit the model's vocabulary.
    """

    name = "lantern"
    summary = "lossy, for image models: a drafted code may borrow its nearest codes' probability (LANTERN, LANTERN++)"
    lossless = False

    def __init__(
        self,
        codebook: str | Path | Neighbours | None = None,
        *,
        k: int = 11,
        delta: float | None = None,
        factor: float | None = None,
        residual: Literal["consistent", "repo-dynamic", "repo-static"] = "consistent",
        offset: int | None = None,
    ):
        if delta is not None and factor is not None:
            raise UsageError(f"delta={delta} and factor={factor}: give one bound, delta (added) or factor (multiplied)")
        if delta is None and factor is None:
            factor = 2.0
        if delta is not None and not 0 <= delta <= 1:
            raise UsageError(f"delta={delta} must be from 0 (borrow nothing) to 1: it is a probability")
        if factor is not None and not 1 <= factor < float("inf"):
            raise UsageError(f"factor={factor} must be at least 1 (borrow nothing); LANTERN++ uses 5 to 20")
        if k < 1:
            raise UsageError(f"k={k} must be at least 1: the neighbourhood includes the code itself")
        if residual not in ("consistent", "repo-dynamic", "repo-static"):
            raise UsageError(f"residual={residual!r} must be 'consistent', 'repo-dynamic' or 'repo-static'")
        if offset is not None and offset < 0:
            raise UsageError(f"offset={offset} must be the token id of code 0, from 0 up")
        self.k, self.delta, self.factor, self.residual, self.offset = k, delta, factor, residual, offset
        if codebook is not None and not isinstance(codebook, Neighbours):
            codebook = Neighbours.load(codebook)
        self._table = codebook
        if codebook is not None:
            self._check_width(codebook)

    def _check_width(self, table: Neighbours) -> None:
        codes, columns = table.ids.shape
        if self.k > codes:
            raise UsageError(f"k={self.k}: the codebook has {codes} codes; give at most {codes}")
        if self.k > columns + 1:
            raise UsageError(
                f"k={self.k}: the table holds {columns} neighbours of each code; give at most {columns + 1}, or make a "
                f"wider one with `specdec codebook MODEL --out FILE -k {self.k - 1}`"
            )

    def bind(self, target: Target) -> None:
        table, vocabulary = self._table, target.vocab_size
        if table is None:
            beside = Path(target.model.config._name_or_path) / FILE
            if not beside.is_file():
                raise CompatibilityError(
                    f"lantern needs the model's neighbouring codes: codebook=FILE, made by `specdec codebook MODEL "
                    f"--out FILE` for a model that writes images ({type(target.model).__name__} brings no {FILE})"
                )
            table = Neighbours.load(beside)
            self._check_width(table)
        codes = len(table.ids)
        tokens = table.tokens if self.offset is None else np.arange(codes) + self.offset
        if tokens is None:
            if codes != vocabulary:
                raise CompatibilityError(
                    f"codebook: it has {codes} codes, the model {vocabulary} tokens; say with offset which token is "
                    "code 0"
                )
            tokens = np.arange(codes)
        if len(tokens) != codes or tokens.max() >= vocabulary:
            raise CompatibilityError(
                f"codebook: its {codes} codes are tokens up to {tokens.max()}, the model has {vocabulary}; use the "
                "table of this model, or correct offset"
            )
        self._code = np.full(vocabulary, -1)  # token -> code, -1 for tokens that are none
        self._code[tokens] = np.arange(codes)
        # [K, k - 1] token ids of the neighbours
        self._near = torch.from_numpy(tokens[table.ids[:, : self.k - 1].astype(np.int64)]).to(target.device)

    def neighbours(self, x: int) -> torch.Tensor:
        """Tokens nearest to token ``x``, x left out: int64 [k - 1], or [0] where x is no code."""
        code = int(self._code[x])
        return self._near[code] if code >= 0 else self._near[0, :0]

    def borrowed(self, w: torch.Tensor, x: int) -> torch.Tensor:
        """Tokens whose probability token ``x`` borrows under the law ``w`` float64 [V]: int64 [m]; none without mass.

        Neighbours that top-k cut have no probability: they fill places in the neighbourhood and lend nothing.
        """
        near = self.neighbours(x)
        mass = w[near].cumsum(0)  # S_1, S_2, ...
        bound = self.delta if self.factor is None else (self.factor - 1) * float(w[x])
        assert bound is not None, "the constructor sees to one"
        m = int((mass <= bound).sum())
        return near[:m] if m and mass[m - 1] > 0 else near[:0]

    def verify(
        self, state: DecodeState, proposals: Sequence[Proposal | None], output: StepOutput
    ) -> list[Verdict | None]:
        walk = self._walk if state.rows[0].sampler.do_sample else self._longest
        return [
            walk(state, b, p.tree, output.logits[b]) if p is not None and p.tree is not None else None
            for b, p in enumerate(proposals)
        ]

    # ---- sampling ---------------------------------------------------------------------------------------------

    def _walk(self, state: DecodeState, b: int, tree: DraftTree, logits: torch.Tensor) -> Verdict:
        """Descend from the root; processors see each visited node once, with its own prefix."""
        row = state.rows[b]
        path: list[int] = []
        tokens: list[int] = []
        node = 0
        while True:
            p = row.sampler.probabilities(state.scores(b, tokens, logits[node]))
            token, child = self.choose(p, tree, tree.topology.children[node], row.randomness)
            # after an accepted end token nothing more may be asked of the processors
            if child is None or token in state.eos:
                return Verdict(path, token)
            path.append(child)
            tokens.append(token)
            node = child

    def choose(
        self, p: torch.Tensor, tree: DraftTree, children: Sequence[int], randomness: Randomness
    ) -> tuple[int, int | None]:
        """A token, and the child that carries it if one was accepted; ``standard.choose`` with relaxed laws.

        Args:
            p: the target's law at the node, [V].
            tree: holds the laws the children were drawn from.
            children: in the order of trial.
            randomness: the row's.
        """
        sampled = tree.law is not None and any(tree.law[c] for c in children)
        if self.residual == "consistent" and not sampled:
            return self._match(p, tree, children, randomness)
        w = p.double()  # [V]
        tried: list[int] = []
        for child in children:
            x = int(tree.tokens[child])
            pi = point_law(x, w) if self.residual == "repo-dynamic" else drafted_law(tree, child, tried, w)
            # a repeated draw was judged before, with all that it could borrow
            lent = self._near[0, :0] if x in tried else self.borrowed(w, x)
            tried.append(x)
            if randomness.accept(float((w[x] + w[lent].sum()) / pi[x])):
                return x, child
            left = self._left(w, x, pi, lent)
            total = left.sum()
            if total <= 0:
                if self.residual != "repo-dynamic" or not len(lent):
                    return x, child  # w_x equals pi up to rounding, so the test could only fail by rounding
                left = (p > 0).to(w)  # published: uniform; here over what the target allows
                total = left.sum()
            w = left / total
        return randomness.draw(w), None

    def _match(
        self, p: torch.Tensor, tree: DraftTree, children: Sequence[int], randomness: Randomness
    ) -> tuple[int, int | None]:
        """Children chosen without randomness: draw the target's token once; whoever owns or borrows it is accepted.

        That has the law of trying one after the other, since given that the token is not among them it has the law
        that the earlier ones leave.
        """
        token = randomness.draw(p)
        w = p.double()
        tried: list[int] = []
        for child in children:
            x = int(tree.tokens[child])
            if x in tried:
                continue
            tried.append(x)
            lent = self.borrowed(w, x)
            if token == x or bool((lent == token).any()):
                return x, child
            w[x] = 0.0
            w[lent] = 0.0
            w = w / w.sum()
        return token, None

    def _left(self, w: torch.Tensor, x: int, pi: torch.Tensor, lent: torch.Tensor) -> torch.Tensor:
        """What the rejection of ``x`` leaves of ``w`` [V], not normalised."""
        near = self.neighbours(x) if len(lent) else lent
        if self.residual == "repo-dynamic":
            left = w.clone()
            left[x] = 0.0
            left[near] = 0.0
            return left
        if self.residual == "repo-static":
            pi = pi.clone()
            pi[near] = 0.0
            return (w - pi).clamp_(min=0.0)
        w = w.clone()
        w[x] += w[lent].sum()
        w[lent] = 0.0
        return (w - pi).clamp_(min=0.0)

    # ---- greedy -----------------------------------------------------------------------------------------------

    def _longest(self, state: DecodeState, b: int, tree: DraftTree, logits: torch.Tensor) -> Verdict:
        """The longest path of acceptable tokens, the first of equally long ones, and the argmax after it."""
        row, topology, tokens = state.rows[b], tree.topology, tree.tokens.tolist()
        seen: dict[int, torch.Tensor] = {}  # tried node -> scores [V], in the order of trial

        def scores(node: int) -> torch.Tensor:
            if node not in seen:
                seen[node] = state.scores(b, [tokens[v] for v in topology.path(node)], logits[node])
            return seen[node]

        reached = {0}
        for node, children in enumerate(topology.children):
            # after an accepted end token nothing more may be asked of the processors; the root may be any token
            if node not in reached or not children or (node > 0 and tokens[node] in state.eos):
                continue
            best = row.sampler.argmax(scores(node))
            w = torch.softmax(scores(node).double(), dim=-1)
            reached.update(c for c in children if self._acceptable(w, tokens[c], best))
        last = min(reached, key=lambda v: (-topology.depth[v], v))
        path = topology.path(last)
        if path and tokens[last] in state.eos:
            verdict = Verdict(path[:-1], tokens[last])
        else:
            verdict = Verdict(path, row.sampler.argmax(scores(last)))
        forget_others(row, list(seen), [0, *verdict.path])
        return verdict

    def _acceptable(self, w: torch.Tensor, x: int, best: int) -> bool:
        """Whether ``x`` is the argmax of ``w`` [V], or would be with what it borrows."""
        if x == best:
            return True
        lent = self.borrowed(w, x)
        return len(lent) > 0 and bool(w[x] + w[lent].sum() >= w[best])
