"""The verifier `judge`: the standard rule, or a judge's word."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from specdec.contracts import Verdict, Verifier
from specdec.errors import UsageError
from specdec.sampling import check_finite
from specdec.state import DecodeState
from specdec.target import StepOutput, Target
from specdec.tree import DraftTree, Proposal
from specdec.verifiers.judge.module import JudgeHead
from specdec.verifiers.standard import choose


class Judge(Verifier):
    """Judge Decoding (Bachmann et al., arXiv 2501.19309): keeps drafted tokens that are right though not the target's.

    At a node with standard rule a (argmax, or speculative sampling) and judge j = [P(acceptable) > threshold], a
    drafted token is kept iff a OR j; of several children one that the standard rule accepts, else the one the judge
    finds likeliest. Where none is kept, the target's token is the standard rule's: its argmax, or a draw from the
    residual. With threshold=1 this is the verifier ``standard``, to the last random number; below 0 every drafted token
    is kept that is not protected.

    LOSSY: the text is neither the target's nor drawn from its law. Its quality is bounded by the judge's and the draft
    model's, and so is its safety: a draft that says what the target would refuse can be kept. Where that matters use
    ``standard``, or ``decoder.generate(..., lossless=True)``, which refuses this verifier. A judge serves one target,
    in the precision, prompt format and kind of text that it was trained on.

    Never kept on the judge's word alone: tokens that end a row, added tokens of the tokenizer (ends of turns, tool
    calls; where the Decoder has one), ``protect``, and tokens that a logits processor forbids (when sampling also those
    outside top-k and top-p).

    Args:
        checkpoint: a folder written by `specdec train judge`, or a ``JudgeHead``.
        threshold: delta; None takes the checkpoint's. With many siblings take a higher one: the best of several noisy
            scores is optimistic.
        protect: further token ids under the standard rule, such as those of digits or code fences.
        max_judge_run: most tokens in a row kept on the judge's word alone.
        floor: keep no token on the judge's word to which the target's processed law gives no more than this.

    Attributes:
        judged: drafted tokens kept on the judge's word alone so far.

    Raises:
        UsageError: an option out of range, or a checkpoint that cannot be read.
    """

    name = "judge"
    summary = "lossy: the target's tokens, and drafted ones that a trained judge finds right (Judge Decoding)"
    lossless = False

    def __init__(
        self,
        checkpoint: str | Path | JudgeHead,
        threshold: float | None = None,
        protect: Sequence[int] = (),
        max_judge_run: int | None = None,
        floor: float = 0.0,
    ):
        if threshold is not None and math.isnan(threshold):
            raise UsageError("threshold=nan must be a number: 1 is the standard rule, 0.5 the paper's")
        if max_judge_run is not None and max_judge_run < 1:
            raise UsageError(f"max_judge_run={max_judge_run} must be at least 1; threshold=1 switches the judge off")
        if not 0 <= floor < 1:
            raise UsageError(f"floor={floor} must be a probability, at least 0 and below 1; 1e-4 is a cautious one")
        self.head = checkpoint if isinstance(checkpoint, JudgeHead) else JudgeHead.from_pretrained(checkpoint)
        self.threshold = self.head.config.delta if threshold is None else threshold
        self.protect = frozenset(protect)
        self.max_judge_run = math.inf if max_judge_run is None else max_judge_run
        self._least = math.log(floor) if floor else -math.inf  # a forbidden token has exactly -inf
        self.needs = self.head.needs
        self.judged = 0

    def bind(self, target: Target) -> None:
        self.head.check(target)
        wrong = [token for token in self.protect if not 0 <= token < target.vocab_size]
        if wrong:
            raise UsageError(f"protect: token id {wrong[0]} is outside the vocabulary of {target.vocab_size} tokens")
        self.head.to(target.device)
        added = target.tokenizer.get_added_vocab().values() if target.tokenizer is not None else ()
        self._protected = self.protect | set(added)

    def verify(
        self, state: DecodeState, proposals: Sequence[Proposal | None], output: StepOutput
    ) -> list[Verdict | None]:
        chances = self._acceptable(output)
        answers: list[list[tuple[float, int]]] | None = None
        if state.rows[0].sampler.is_argmax and not (state.record_scores or state.record_logits):
            best, token = output.logits.max(dim=-1)  # [B, N], read from the device once
            answers = [list(zip(*row)) for row in zip(best.tolist(), token.tolist())]
        return [
            self._walk(state, b, p.tree, output.logits[b], chances[b], answers[b] if answers else None)
            if p is not None and p.tree is not None
            else None
            for b, p in enumerate(proposals)
        ]

    def _acceptable(self, output: StepOutput) -> list[list[float]]:
        """The judge's probability for every node, from the hidden state at the node itself: [B][N]."""
        hidden = output.taps[self.head.tap]  # [B, C, d]
        rows, nodes = torch.arange(len(output.root))[:, None], torch.arange(max(output.nodes))
        columns = torch.tensor(output.root)[:, None] + nodes  # [B, N]; a smaller tree's go on into what is not read
        return self.head.acceptable(hidden[rows, columns.clamp(max=hidden.shape[1] - 1)]).tolist()

    def _walk(
        self,
        state: DecodeState,
        b: int,
        tree: DraftTree,
        logits: torch.Tensor,
        chances: list[float],
        answers: list[tuple[float, int]] | None,
    ) -> Verdict:
        """Descend from the root; ``answers`` are the largest logit and its token per node, where no more is needed."""
        row = state.rows[b]
        path: list[int] = []
        tokens: list[int] = []
        node = run = 0
        while True:
            children = tree.topology.children[node]
            scores = logits[node] if answers else state.scores(b, tokens, logits[node])  # [V]
            if row.sampler.do_sample:
                token, child = choose(row.sampler.probabilities(scores), tree, children, row.randomness)
            else:
                if answers:
                    check_finite(answers[node][0])
                token = answers[node][1] if answers else row.sampler.argmax(scores)
                child = next((c for c in children if tree.tokens[c] == token), None)
            if child is not None:
                run = 0
            elif run < self.max_judge_run:
                child = self._kept(state, tree, children, chances, scores)
                if child is not None:
                    token, run = int(tree.tokens[child]), run + 1
                    self.judged += 1
            # after an accepted end token nothing more may be asked of the processors
            if child is None or token in state.eos:
                return Verdict(path, token)
            path.append(child)
            tokens.append(token)
            node = child

    def _kept(
        self, state: DecodeState, tree: DraftTree, children: Sequence[int], chances: list[float], scores: torch.Tensor
    ) -> int | None:
        """The child that the judge finds likeliest to be acceptable, of those that it may keep."""
        for child in sorted(children, key=lambda c: -chances[c]):
            if not chances[child] > self.threshold:
                return None
            token = int(tree.tokens[child])
            if token in state.eos or token in self._protected:
                continue
            if float(scores.float().log_softmax(-1)[token]) > self._least:
                return child
        return None
