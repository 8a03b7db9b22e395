"""Entropy adaptive decoding (Simonds, arXiv 2502.06833): a small model and the target take turns. A lossy router.

One of the two writes each token. While the rolling mean of the writer's entropy is below a threshold the small model
writes, otherwise the target does; nothing is verified, so the text is neither model's own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from specdec.contracts import Verdict
from specdec.drafters.draft_model import DraftModel
from specdec.errors import UsageError
from specdec.state import DecodeState
from specdec.target import StepOutput, Target
from specdec.tree import DraftTree, Proposal

_CHUNK = 512  # tokens fed to the small model per forward when it has fallen behind


@dataclass
class Work:
    """One model's part.

    Attributes:
        parameters: of the model, N_S or N_L; of a mixture of experts, all experts.
        written: tokens of the text it wrote.
        fed: tokens it read: prompt, text and drafts, without the padding of batches.
        caught_up: those among them that it had missed when its turn came: what the other model had written meanwhile,
            and the prompt, if the other began. With ``speculate`` also accepted drafts, which the small model reads
            once more.
    """

    parameters: int
    written: int = 0
    fed: int = 0
    caught_up: int = 0

    @property
    def flops(self) -> int:
        """Estimate: two per parameter and token fed."""
        return 2 * self.parameters * self.fed

    def __add__(self, other: Work) -> Work:
        return Work(
            self.parameters, self.written + other.written, self.fed + other.fed, self.caught_up + other.caught_up
        )


@dataclass
class Cost:
    """What texts took, in tokens and arithmetic. It is not latency: a token of a model of a quarter of the parameters
    does not take a quarter of the time. Measure that with ``specdec bench``.

    Nor is much arithmetic saved: the target reads all that the small model has written when its turn comes, save the
    last stretch. What becomes fewer is the target's forwards.

    Attributes:
        small, large: the work of the small model and of the target; ``written`` of both add up to the new tokens.
        switches: how often another model went on writing.
        alone: tokens that the target would have been fed to write texts of these lengths by itself.
    """

    small: Work
    large: Work
    switches: int = 0
    alone: int = 0

    @property
    def paper_cost(self) -> float:
        """The paper's parameter-weighted cost, (f N_L + (1 - f) N_S) / N_L with f the target's share of the tokens.

        It leaves out the prompt and catching up.
        """
        weighted = self.large.written * self.large.parameters + self.small.written * self.small.parameters
        return weighted / (max(self.large.written + self.small.written, 1) * self.large.parameters)

    @property
    def flops(self) -> int:
        """Estimate for both models, everything they were fed included."""
        return self.small.flops + self.large.flops

    @property
    def flops_alone(self) -> int:
        """Estimate for the target by itself."""
        return 2 * self.large.parameters * self.alone

    @property
    def saved(self) -> float:
        """Share of ``flops_alone`` that was saved; negative when more was spent. 0 before anything is written."""
        return 1 - self.flops / self.flops_alone if self.alone else 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.small + other.small,
            self.large + other.large,
            self.switches + other.switches,
            self.alone + other.alone,
        )


@dataclass
class _Turn:
    """Who writes one row.

    Attributes:
        small: the small model writes next.
        stay: c, tokens written since the last switch.
        entropies: the last w, in bits.
    """

    small: bool
    stay: int
    entropies: list[float] = field(default_factory=list)


class EAD(DraftModel):
    """The small model writes while the rolling mean of entropies is below ``tau``, the target while it is not.

    H is the entropy of the raw logits of the model that wrote a token, before temperature and processors, over the
    tokenizer's ids; give ``Decoder`` the tokenizer if the models' embeddings are padded. Tokens are drawn as the
    request says, from whichever model writes. A model reads what it has missed when its turn comes. Rows of a batch
    take turns on their own. When the text outgrows the small model's context, the target writes the rest.

    With tau=0 and start="large" the text is the target's own, with tau=inf and start="small" the small model's. The
    models must share one tokenizer; that their vocabularies are of one size is all that is checked.

    Args:
        draft, same_tokenizer: see ``DraftModel``.
        tau: threshold in bits; at equality the target writes. ``calibrate`` finds one to start from.
        window: w, tokens that the mean is taken over; fewer at the start.
        min_stay: d_min, tokens a model writes before the other may take over.
        start: who writes the first token.
        stay_at_start: the first writer stays for ``min_stay`` tokens too; otherwise it may be relieved after one.
        speculate: longest chain that the small model drafts for the target where the target is sure to go on writing,
            whatever comes: early in its stay, or with a mean so high that no token can bring it below ``tau``. With a
            lossless verifier this changes no text and no distribution. 0: none.

    Attributes:
        cost: what the last request took.
        total: what all requests took.

    Raises:
        UsageError: an option out of range.
    """

    name = "ead"
    summary = "lossy router: a smaller model and the target take turns by the writer's rolling entropy"
    lossless = False

    def __init__(
        self,
        draft: PreTrainedModel | str | Path,
        tau: float = 0.5,
        window: int = 5,
        min_stay: int = 10,
        start: Literal["large", "small"] = "large",
        stay_at_start: bool = False,
        speculate: int = 0,
        same_tokenizer: bool = False,
    ):
        if not tau >= 0:
            raise UsageError(f"tau={tau} must be an entropy in bits from 0 up; at 0 the target writes everything")
        if window < 1:
            raise UsageError(f"window={window} must be at least 1 token")
        if min_stay < 0:
            raise UsageError(f"min_stay={min_stay} must be a number of tokens from 0 up")
        if start not in ("large", "small"):
            raise UsageError(f"start={start!r} must be 'large' (the target) or 'small'")
        if speculate < 0:
            raise UsageError(f"speculate={speculate} must be the length of a chain, or 0 for none")
        super().__init__(draft, length=max(speculate, 1), same_tokenizer=same_tokenizer)
        self.budget = 1 + speculate
        self.tau, self.window, self.min_stay, self.speculate = tau, window, min_stay, speculate
        self.start, self.stay_at_start = start, stay_at_start

    def bind(self, target: Target) -> None:
        super().bind(target)
        sizes = [target.vocab_size, self.draft.vocab_size]
        if target.tokenizer is not None:
            sizes.append(max(target.tokenizer.get_vocab().values()) + 1)
        self._ids = min(sizes)  # embeddings may be padded beyond the tokenizer's ids, with noise in those logits
        self.cost = self.total = self._nothing(target)

    def _nothing(self, target: Target) -> Cost:
        return Cost(Work(self.draft.model.num_parameters()), Work(target.model.num_parameters()))

    def begin(self, state: DecodeState) -> None:
        super().begin(state)
        self.cost = self._nothing(state.target)
        stay = 0 if self.stay_at_start else self.min_stay
        self._turns: dict[int, _Turn] = {}
        for row, cached in zip(state.rows, state.target.lengths, strict=True):
            self._turns[row.index] = _Turn(self.start == "small" and self._room(len(row.tokens)) > 0, stay)
            self.cost.alone += len(row.tokens) - cached - 1  # the last new token is never fed

    def end(self, state: DecodeState) -> None:
        super().end(state)
        self.total += self.cost

    def propose(self, state: DecodeState) -> list[Proposal | None]:
        turns = [self._turns[row.index] for row in state.rows]
        writing = [b for b, row in enumerate(state.rows) if turns[b].small and not row.done]
        depths = self._depths(state, turns)
        drafting = [b for b, depth in enumerate(depths) if depth]
        proposals: list[Proposal | None] = [Proposal(DraftTree.root(int(row.tokens[-1]))) for row in state.rows]
        if not writing and not drafting:
            return proposals
        logits = self._read_text(state, [*writing, *drafting])
        if drafting:
            with self.draft.scratch():
                # rows that do not draft are taken along, unread
                chains = self.grow(state, logits, max(depths))
            for b in drafting:
                proposals[b] = Proposal(chains[b].cut(depths[b]))
                self.cost.small.fed += depths[b] - 1  # nothing is read after the last node
        bits = entropy(logits[:, : self._ids]).tolist()
        for b in writing:
            row = state.rows[b]
            scores = state.scores(b, [], logits[b])
            if row.sampler.do_sample:
                token = row.randomness.draw(row.sampler.probabilities(scores))
            else:
                token = row.sampler.argmax(scores)
            proposals[b] = Proposal(trusted=(token,))
            self._written(turns[b], bits[b], len(row.tokens) + 1)
        return proposals

    def observe(
        self,
        state: DecodeState,
        proposals: Sequence[Proposal | None],
        output: StepOutput,
        verdicts: Sequence[Verdict | None],
    ) -> None:
        bits = entropy(output.logits[..., : self._ids]).tolist()  # [B, N]
        for b, (row, verdict) in enumerate(zip(state.rows, verdicts, strict=True)):
            if verdict is None:
                continue
            turn = self._turns[row.index]
            self.cost.large.fed += output.pending[b] + output.nodes[b]
            begins = not turn.small and len(row.new_tokens) == len(verdict.emitted)
            if not begins:
                # of a chunk that emits nothing the root too had been missed
                self.cost.large.caught_up += output.pending[b] + (not verdict.emitted)
            for node, _ in zip([0, *verdict.path], verdict.emitted, strict=False):
                self._written(turn, bits[b][node], len(row.tokens))

    def _written(self, turn: _Turn, bits: float, length: int) -> None:
        """The writer has made the text ``length`` tokens long, with a token of ``bits`` of entropy: who goes on?"""
        self.cost.switches += turn.stay == 0 and bool(turn.entropies)
        work = self.cost.small if turn.small else self.cost.large
        work.written += 1
        self.cost.alone += 1
        turn.stay += 1
        turn.entropies = [*turn.entropies, bits][-self.window :]
        room = self._room(length) > 0
        small = self._mean(turn.entropies) < self.tau and room
        if small != turn.small and (turn.stay >= self.min_stay or not room):
            turn.small, turn.stay = small, 0

    def _mean(self, entropies: Sequence[float]) -> float:
        last = entropies[-self.window :]
        return math.fsum(last) / len(last)  # rounded once, so that the mean never falls when a term grows

    def _room(self, length: int) -> float:
        """How many tokens the small model can add to a text of ``length`` tokens."""
        context = self.draft.context
        return math.inf if context is None else context - length + 1

    def _depths(self, state: DecodeState, turns: Sequence[_Turn]) -> list[int]:
        """Per row, how deep the small model may draft so that the turn cannot end inside an accepted block."""
        longest = max(len(row.tokens) for row in state.rows)
        most = min(self.speculate, max(self._room(longest), 0))
        depths = []
        for b, (row, turn) in enumerate(zip(state.rows, turns, strict=True)):
            here = 0 if turn.small or row.done else min(most, state.depth_left(b))
            depth = 0
            while depth < here and self._goes_on(turn, depth + 1):
                depth += 1
            depths.append(depth)
        return depths

    def _goes_on(self, turn: _Turn, tokens: int) -> bool:
        """Whether the target's turn lasts beyond its next ``tokens`` tokens, the least mean being that of zeros."""
        return turn.stay + tokens < self.min_stay or self._mean([*turn.entropies, *[0.0] * tokens]) >= self.tau

    def _read_text(self, state: DecodeState, asked: Sequence[int]) -> torch.Tensor:
        """Feed the small model what it has not seen of the rows ``asked``; its logits [B, V] there, 0 elsewhere."""
        draft = self.draft
        draft.align([row.index for row in state.rows])
        for b in asked:
            row = state.rows[b]
            missing = len(row.tokens) - draft.lengths[b]
            self.cost.small.fed += missing
            if not self._turns[row.index].small or len(row.new_tokens):
                self.cost.small.caught_up += missing - 1
        after = torch.zeros(len(state.rows), self._vocab, device=state.target.device)
        waiting = set(asked)
        while waiting:
            texts = [row.tokens[: n + _CHUNK] for row, n in zip(state.rows, draft.lengths, strict=True)]
            roots = [Proposal(DraftTree.root(int(t[-1]))) if b in waiting else None for b, t in enumerate(texts)]
            output = draft.step(texts, roots)
            draft.commit(output, [[]] * len(roots))
            for b in [b for b in waiting if len(texts[b]) == len(state.rows[b].tokens)]:
                after[b] = self._fit(output.logits[b, 0])
                waiting.remove(b)
        return after


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """Entropy in bits, float32 [...], of the softmax of raw logits [..., V]."""
    p = logits.float().softmax(dim=-1)
    return -(p * p.clamp_min(torch.finfo(p.dtype).tiny).log2()).sum(dim=-1)  # a p of 0 adds 0, not NaN


def calibrate(
    model: PreTrainedModel,
    prompts: Iterable[torch.Tensor],
    quantile: float = 0.7,
    window: int = 5,
    vocabulary: int | None = None,
    **settings: Any,
) -> float:
    """A ``tau`` to start from: a quantile of the small model's rolling entropy in its own answers, in bits.

    Tune it on texts that are not those you report on.

    Args:
        model: the small model.
        prompts: int64 [n] each; about 200.
        quantile: share of its tokens below the threshold, 0.6 to 0.8.
        window: as in ``EAD``.
        vocabulary: how many ids the tokenizer has, if the model's embedding is padded.
        settings: of ``generate``: max_new_tokens, do_sample and so on.

    Raises:
        UsageError: a quantile outside 0 to 1, a window below 1, or no prompts.
    """
    if not 0 <= quantile <= 1 or window < 1:
        raise UsageError(f"quantile={quantile} must be from 0 to 1, and window={window} at least 1")
    means: list[torch.Tensor] = []
    for prompt in prompts:
        ids = prompt[None].to(model.device)
        mask = torch.ones_like(ids)
        made = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, output_logits=True, **settings)
        bits = entropy(torch.cat(made.logits)[:, :vocabulary]).double().cpu()  # [new tokens]
        sums = torch.nn.functional.pad(bits.cumsum(0), (window, 0))
        counts = torch.arange(1, len(bits) + 1).clamp(max=window)
        means.append((sums[window:] - sums[:-window]) / counts)
    if not means:
        raise UsageError("prompts is empty; give some texts that the small model should answer")
    return float(torch.cat(means).quantile(quantile))
