"""Jacobi decoding (Santilli et al., "Accelerating Transformer Inference for Translation via Parallel Decoding",
arXiv 2305.10427).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from specdec.contracts import Drafter, Verdict
from specdec.errors import UsageError
from specdec.state import DecodeState
from specdec.target import StepOutput, Target
from specdec.tree import DraftTree, Proposal, Topology

CPU_WINDOW, GPU_WINDOW = 3, 15
# Chance that a guess is right, the first and those after a right one: few are, they were predicted after wrong tokens.
# Rough, from 1.06 tokens a step with the embedded model on training text.
FIRST, LATER = 0.05, 0.2


class Jacobi(Drafter):
    """Greedy decoding as a fixed point: the target's argmaxes at all guesses are the guesses of the next step.

    A chain of W guesses follows the root, at first random tokens of the prompt. Each step moves it on by what was
    accepted and fills it up with random tokens again. It finds n tokens in at most n steps and rarely in far fewer.

    Args:
        window: W, guesses per step. None: 15 on a GPU, 3 on a CPU.
        seed: of the random tokens.

    Raises:
        UsageError: an option out of range.
    """

    name = "jacobi"
    summary = "the target's own argmaxes at wrong guesses, iterated; a baseline"

    def __init__(self, window: int | None = None, seed: int = 0):
        if window is not None and window < 1:
            raise UsageError(f"window={window} must be at least 1")
        if seed < 0:
            raise UsageError(f"seed={seed} must not be negative")
        self.seed, self._asked = seed, window
        self._set_window(GPU_WINDOW)

    def _set_window(self, default: int) -> None:
        self.window = self._asked or default
        self.budget = 1 + self.window
        self._prior = np.full(self.budget, LATER, dtype=np.float32)
        self._prior[:2] = 1.0, FIRST

    def bind(self, target: Target) -> None:
        self._set_window(GPU_WINDOW if target.device.type == "cuda" else CPU_WINDOW)

    def begin(self, state: DecodeState) -> None:
        self._random = {row.index: np.random.default_rng((self.seed, row.index)) for row in state.rows}
        self._guesses = {row.index: np.empty(0, dtype=np.int64) for row in state.rows}

    def propose(self, state: DecodeState) -> list[Proposal | None]:
        return [Proposal(self._chain(state, b)) for b in range(len(state.rows))]

    def _chain(self, state: DecodeState, b: int) -> DraftTree:
        row = state.rows[b]
        prompt = row.tokens[: row.prompt_length - row.pad]
        fill = self._random[row.index].integers(len(prompt), size=self.window - len(self._guesses[row.index]))
        guesses = self._guesses[row.index] = np.concatenate([self._guesses[row.index], prompt[fill]])
        guesses = guesses[: state.depth_left(b)]
        over = np.flatnonzero(np.isin(guesses, list(state.eos)))
        tokens = np.concatenate([row.tokens[-1:], guesses[: over[0] + 1] if len(over) else guesses])
        return DraftTree(Topology.chain(len(tokens) - 1), tokens, prior=self._prior[: len(tokens)])

    def observe(
        self,
        state: DecodeState,
        proposals: Sequence[Proposal | None],
        output: StepOutput,
        verdicts: Sequence[Verdict | None],
    ) -> None:
        best = output.top(1)[..., 0]  # [B, N]
        for b, (row, proposal, verdict) in enumerate(zip(state.rows, proposals, verdicts, strict=True)):
            if proposal is None or proposal.tree is None or verdict is None or not verdict.emitted:
                continue
            # the argmaxes below the last accepted node, along first children: of any drafter's tree, a chain's are all
            node = verdict.path[-1] if verdict.path else 0
            after: list[int] = []
            children = proposal.tree.topology.children
            while children[node]:
                node = children[node][0]
                after.append(int(best[b, node]))
            self._guesses[row.index] = np.array(after[: self.window], dtype=np.int64)
