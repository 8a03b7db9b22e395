"""The loop: propose, trust, forward, verify, emit, commit, observe. It names no method.

The drop-in surface (what ``generate()`` passes and wants back) is in ``surface``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from time import perf_counter
from typing import Any

from transformers import PreTrainedModel

from specdec import registry
from specdec.compiling import MODES, Mode
from specdec.contracts import Drafter, Verdict, Verifier
from specdec.errors import CompatibilityError, UsageError
from specdec.state import DecodeState, Row
from specdec.stats import Clock, GenerationStats, StepStats
from specdec.stopping import StopRules
from specdec.surface import GenerateSurface
from specdec.target import StepOutput, Target
from specdec.tree import DraftTree, Proposal

Emit = Callable[[Row, list[int], int], None]


class Decoder(GenerateSurface):
    """A model that generates faster: the same arguments and return types as its ``generate``.

    Args:
        model: any decoder-only Hugging Face causal LM, in eval mode; also one of several ranks (``tp_plan``), of which
            the first decodes for all, or one spread or offloaded by a ``device_map``.
        drafter: a name (``specdec list``) or a ``Drafter``.
        verifier: a name or a ``Verifier``.
        tokenizer: only needed for ``stop_strings``, and to save or load tables.
        prefill_chunk: prompt tokens per forward.
        compile: what becomes of the forward of the target, and of a draft model. "inductor" puts it through
            torch.compile: tens of seconds once, less when torch finds its kernels on disk; rows decoded together are
            compiled when they first come. "graphs" records CUDA graphs, one per size when it first comes, and keeps its
            caches from one request to the next. "auto" takes graphs where steps run on the tree attention kernel of a
            GPU and torch.compile elsewhere, where it can; ``target.compilation`` tells what came of it.
        options: passed to the named drafter.

    Attributes:
        stats: ``GenerationStats`` of the last call.
        lossless: drafter and verifier both leave the target's text (or its distribution) unchanged.

    Raises:
        CompatibilityError: this model cannot be decoded, or not with this drafter or verifier.
        UsageError: unknown name or option.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        drafter: str | Drafter = "none",
        verifier: str | Verifier = "standard",
        *,
        tokenizer: Any = None,
        prefill_chunk: int = 512,
        compile: Mode = "off",
        **options: Any,
    ):
        if prefill_chunk < 1:
            raise UsageError(f"prefill_chunk must be at least 1, got {prefill_chunk}")
        if compile not in MODES:
            raise UsageError(f"compile={compile!r} must be one of {', '.join(map(repr, MODES))}")
        if options and not isinstance(drafter, str):
            raise UsageError(
                f"options {sorted(options)} only go with a drafter's name; pass them to the drafter itself"
            )
        self.drafter = registry.drafter(drafter, **options) if isinstance(drafter, str) else drafter
        self.verifier = registry.verifier(verifier) if isinstance(verifier, str) else verifier
        self.tokenizer = tokenizer
        self.prefill_chunk = prefill_chunk
        self.target = Target(model, tokenizer=tokenizer, compile_mode=compile)
        self.drafter.bind(self.target)
        self.verifier.bind(self.target)
        self.target.bind(self.drafter.needs | self.verifier.needs, self.drafter.wishes)
        self.target.compile()
        self.stats: GenerationStats | None = None

    @property
    def model(self) -> PreTrainedModel:
        return self.target.model

    @property
    def lossless(self) -> bool:
        return self.drafter.lossless and self.verifier.lossless

    # ---- the loop -------------------------------------------------------------------------------------------

    def run(self, state: DecodeState, rules: StopRules, emit: Emit, keep_rows: bool = False) -> None:
        """Decode every row of ``state`` to its end, inside ``target.session()`` with caches open.

        On a model sharded over several ranks the first one decodes, and the others repeat its forwards and get its rows
        at the end (see ``sharding``).

        Args:
            state: rows whose prompts are set.
            rules: when a row stops.
            emit: called with (row, tokens, how many of them were drafted) as tokens are committed.
            keep_rows: leave finished rows in the cache (the caller wants it back).
        """
        ranks = self.target.ranks
        if ranks is None:
            self._decode(state, rules, emit, keep_rows)
        elif ranks.leads:
            with ranks.lead():
                self._decode(state, rules, emit, keep_rows)
            decoded = [(r.new_tokens.tolist(), r.done, r.recorded_scores, r.recorded_logits) for r in state.rows]
            ranks.share((self.stats, decoded))
        else:
            ranks.follow()
            self.stats, decoded = ranks.share()
            for row, (tokens, done, scores, logits) in zip(state.rows, decoded, strict=True):
                for token in tokens:
                    row.append(token)
                row.done = done
                row.recorded_scores = [x.to(self.target.device) for x in scores]
                row.recorded_logits = [x.to(self.target.device) for x in logits]
                emit(row, tokens, 0)

    def _decode(self, state: DecodeState, rules: StopRules, emit: Emit, keep_rows: bool) -> None:
        start = perf_counter()
        clock = Clock(self.target.device)
        everyone = list(state.rows)
        stats = self.stats = GenerationStats(self.drafter.name, self.verifier.name, self.lossless, len(everyone))
        stats.prompt_tokens = sum(len(row.tokens) for row in everyone)
        scratch_forwards = self.drafter.forwards
        self.drafter.begin(state)
        try:
            self._read(state, [True] * len(state.rows), clock)
            while state.rows:
                step = StepStats()
                stats.steps.append(step)
                with clock.phase(step, "propose"):
                    proposals = self._propose(state)
                with clock.phase(step, "emit"):
                    self._trust(state, proposals, rules, emit, step)
                if any(p is not None and p.tree is not None for p in proposals):
                    self._step(state, proposals, rules, emit, step, clock)
                if any(row.done for row in state.rows):
                    state.rows = [row for row in state.rows if not row.done or keep_rows]
                    if all(row.done for row in state.rows):
                        break
                    self.target.align([row.index for row in state.rows])
        finally:
            self.drafter.end(state)
            state.rows = everyone
            stats.new_tokens = sum(len(row) - row.prompt_length for row in everyone)
            stats.draft_forwards = self.drafter.forwards - scratch_forwards
            stats.seconds = perf_counter() - start
            stats.compilation = str(self.target.compilation)  # which may have gone on

    def _step(
        self,
        state: DecodeState,
        proposals: list[Proposal | None],
        rules: StopRules,
        emit: Emit,
        step: StepStats,
        clock: Clock,
    ) -> None:
        # a row that skipped many forwards reads what it missed in chunks, as it would a prompt
        self._read(state, [p is not None and p.tree is not None for p in proposals], clock)
        with clock.phase(step, "forward"):
            output = self.target.step([row.tokens for row in state.rows], proposals)
        with clock.phase(step, "verify"):
            verdicts = self.verifier.verify(state, proposals, output)
        with clock.phase(step, "emit"):
            for row, proposal, verdict in zip(state.rows, proposals, verdicts, strict=True):
                if verdict is not None and proposal is not None and proposal.tree is not None:
                    drafted = [int(proposal.tree.tokens[v]) for v in verdict.path]
                    verdict.emitted = rules.commit(row, [*drafted, verdict.token])
                    accepted = min(len(drafted), len(verdict.emitted))
                    step.accepted.append(accepted)
                    step.emitted.append(len(verdict.emitted))
                    emit(row, verdict.emitted, accepted)
        with clock.phase(step, "commit"):
            self._commit(output, verdicts)
        with clock.phase(step, "observe"):
            self.drafter.observe(state, proposals, output, verdicts)
        step.columns = max(p + n for p, n in zip(output.pending, output.nodes, strict=True))

    def _commit(self, output: StepOutput, verdicts: Sequence[Verdict | None]) -> None:
        # the last emitted token is the next root, so the nodes before it are what enters the cache
        paths = [v.path[: max(len(v.emitted) - 1, 0)] if v is not None else [] for v in verdicts]
        kept = self.target.commit(output, paths)
        for verdict, columns in zip(verdicts, kept, strict=True):
            if verdict is not None:
                verdict.kept = columns

    def _read(self, state: DecodeState, asked: Sequence[bool], clock: Clock) -> None:
        """Forward long texts of the rows ``asked`` in chunks, until what is pending fits into one real step."""
        ends = [
            len(row.tokens) - self.prefill_chunk if wanted else 0 for row, wanted in zip(state.rows, asked, strict=True)
        ]
        for chunk, output, verdicts, step in self._feed(state, ends, clock):
            with clock.phase(step, "observe"):
                self.drafter.observe(state, chunk, output, verdicts)

    def catch_up(self, state: DecodeState) -> None:
        """Bring every token but the last into the cache, for a caller who wants the cache back."""
        ends = [len(row.tokens) - 1 for row in state.rows]
        for _ in self._feed(state, ends, Clock(self.target.device)):
            pass

    def _feed(
        self, state: DecodeState, ends: Sequence[int], clock: Clock
    ) -> Iterator[tuple[list[Proposal | None], StepOutput, list[Verdict | None], StepStats]]:
        """Commit each row's tokens up to ``ends`` in root-only chunks that emit nothing."""
        assert self.stats is not None
        while any(n < end for n, end in zip(self.target.lengths, ends, strict=True)):
            step = StepStats(columns=self.prefill_chunk)
            self.stats.steps.append(step)
            stops = [min(n + self.prefill_chunk, end) for n, end in zip(self.target.lengths, ends, strict=True)]
            tokens = [row.tokens[: max(stop, 0)] for row, stop in zip(state.rows, stops, strict=True)]
            chunk = [
                Proposal(DraftTree.root(int(t[-1]))) if len(t) > n else None
                for t, n in zip(tokens, self.target.lengths, strict=True)
            ]
            with clock.phase(step, "forward"):
                output = self.target.step(tokens, chunk)
            verdicts = [Verdict([], -1) if p is not None else None for p in chunk]
            with clock.phase(step, "commit"):
                self._commit(output, verdicts)
            yield chunk, output, verdicts, step

    def _propose(self, state: DecodeState) -> list[Proposal | None]:
        """Ask the drafter, and cut its trees to what this model and this row can use."""
        proposals = self.drafter.propose(state)
        if len(proposals) != len(state.rows):
            raise RuntimeError(f"{self.drafter.name} made {len(proposals)} proposals for {len(state.rows)} rows")
        proposals = [None if row.done else p for row, p in zip(state.rows, proposals, strict=True)]
        if not any(p is not None and (p.tree is not None or p.trusted) for p in proposals):
            raise RuntimeError(f"{self.drafter.name} proposed nothing for any row; at least one needs a root-only tree")
        for b, proposal in enumerate(proposals):
            if proposal is not None and proposal.tree is not None:
                columns = len(proposal.tree) + (len(proposal.probes) if proposal.probes else 0)
                if columns > state.budget:
                    raise RuntimeError(f"{self.drafter.name} used {columns} columns, its budget is {state.budget}")
                if proposal.probes is not None:
                    if self.target.capability.tier != "tree":
                        raise CompatibilityError(f"probes need a tree-capable model: {self.target.capability.reason}")
                    continue  # probes hang under nodes, so the drafter itself must respect depth_left
                tree = proposal.tree.cut(max(state.depth_left(b) - len(proposal.trusted), 0))
                proposal.tree = tree if self.target.capability.tier == "tree" else tree.principal_chain()
        return proposals

    @staticmethod
    def _trust(
        state: DecodeState, proposals: list[Proposal | None], rules: StopRules, emit: Emit, step: StepStats
    ) -> None:
        """Commit trusted tokens before the forward; a row that stops among them is not forwarded."""
        for b, (row, proposal) in enumerate(zip(state.rows, proposals, strict=True)):
            if proposal is not None and proposal.trusted:
                emitted = rules.commit(row, list(proposal.trusted))
                step.trusted += len(emitted)
                emit(row, emitted, len(emitted))
                if row.done:
                    proposals[b] = None
