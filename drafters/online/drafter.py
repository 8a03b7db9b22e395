"""The drafter: any that can be trained, trained between requests on what verification said about it."""

from __future__ import annotations

import copy
import shutil
import tempfile
import warnings
from collections import deque
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from specdec import registry
from specdec.contracts import Drafter, Verdict
from specdec.drafters.draft_model import DraftModel
from specdec.drafters.online.buffer import Buffer, Record
from specdec.drafters.online.learner import Loss, learner
from specdec.drafters.online.trainer import Guard, Trainer
from specdec.errors import UsageError, first_line
from specdec.heads import HeadDrafter
from specdec.heads.checkpoint import replace_folder
from specdec.sampling import Sampler
from specdec.state import DecodeState, Row
from specdec.target import StepOutput, Target
from specdec.tree import DraftTree, Law, Proposal

_FILE = "state.pt"
_HISTORY = 10_000  # requests whose figures are kept


@dataclass(frozen=True)
class Request:
    """What one call of ``generate`` was like.

    Attributes:
        alpha: mean chance that one draft from the draft's law is accepted, over the tested positions: the exact
            sum_v min(p_v, q_v) when the request samples, the share of agreement when it is greedy. None without any.
        tested: positions that had a draft.
        version: of the weights, the same throughout the request.
        seconds: time spent training after it.
    """

    alpha: float | None
    tested: int
    version: int
    seconds: float


@dataclass
class _Collected:
    """What a row of the running request has left so far."""

    row: Row
    positions: list[int] = field(default_factory=list)
    rows: list[dict[str, torch.Tensor]] = field(default_factory=list)
    taps: list[dict[str, torch.Tensor]] = field(default_factory=list)
    nbytes: int = 0


class Online(Drafter):
    """Online speculative decoding (Liu et al., arXiv 2310.07177): the draft is distilled from the target while serving.

    Verification computes the target's distributions on the users' own texts anyway. They are kept in a buffer, and
    between requests the draft takes a step of distillation on them, so that acceptance follows the traffic. What is
    emitted is the target's own as before: weights never change within a request, and verification is not touched.
    Labels are the target's raw law at temperature 1, whatever the request samples with.

    The buffer holds users' texts: in memory alone, until the next update or ``max_age`` (looked at when a request
    ends), unless ``state`` is given, whose folder holds them too. A draft model given here is copied, the caller's
    stays as it is; a ``Drafter`` object is trained in place. Beside the draft in use there are, in float32, the copy
    that is trained, its optimiser (twice its size) and up to two snapshots.

    Args:
        drafter: "draft-model", "rsd", "bild", a head's name, or one of them made ("hidden-transfer" cannot be).
        draft: for those that take one, see ``DraftModel``; heads leave it unused.
        positions: "all" learns every token of the answer: more signal, and more memory; "error_only" the tokens where
            the target corrected the draft, as the paper does.
        loss: "forward", KL(p || q); "reverse", KL(q || p); "mixed", 0.9 and 0.1 of them. Heads take "forward" alone.
        interval: requests (rows of a batch count each) per update.
        rate: learning rate of AdamW, constant. The paper's are 1e-4 for one domain and 1e-5 for mixed traffic; small
            drafts stand more.
        clip: largest norm of an update's gradient.
        train_seconds: most time that training takes after a request; an update goes on after the next ones. What
            cannot be divided, 32 tokens or the optimiser's step, may take longer where less is given. 0 measures
            acceptance and never trains.
        max_length: tokens of a text that are learned from, its last.
        top: keep the target's k likeliest tokens and their rest, not whole rows; biased, but small. None: whole rows.
        capacity, max_bytes: most records and bytes in the buffer.
        max_age: seconds after which even one record makes an update due, or is dropped while another update runs.
        guard: after every so many requests their mean acceptance is compared with the best so far; 0.05 below it, the
            weights of then come back.
        state: folder to go on from, if it exists, and to save to after every update; writing it takes time beyond
            ``train_seconds``.
        options: passed to the named drafter.

    Attributes:
        history: ``Request`` of the latest 10,000 requests, oldest first.
        alpha: the last request's.
        version: changes of the weights so far.
        rollbacks: times the guard brought weights back.

    Raises:
        UsageError: an option out of range, a drafter without weights, a state that is another model's.
        CompatibilityError: weights that cannot be trained, or that are the target's own.
    """

    name = "online"
    summary = "a draft model or heads, distilled from the target between requests as traffic comes in"
    training = "online"
    requires = "a smaller model of the same vocabulary (draft=...), or heads trained for the target"

    def __init__(
        self,
        drafter: str | Drafter = "draft-model",
        draft: PreTrainedModel | str | Path | None = None,
        positions: Literal["all", "error_only"] = "all",
        loss: Loss = "forward",
        interval: int = 8,
        rate: float = 1e-4,
        clip: float = 1.0,
        train_seconds: float = 1.0,
        max_length: int = 512,
        top: int | None = None,
        capacity: int = 64,
        max_bytes: int = 1 << 28,
        max_age: float = 600.0,
        guard: int = 200,
        state: str | Path | None = None,
        **options: Any,
    ):
        if positions not in ("all", "error_only"):
            raise UsageError(f"positions={positions!r} must be 'all' or 'error_only'")
        if loss not in ("forward", "reverse", "mixed"):
            raise UsageError(f"loss={loss!r} must be 'forward', 'reverse' or 'mixed'")
        if not train_seconds >= 0:
            raise UsageError(f"train_seconds={train_seconds} must be at least 0")
        for name, number in (("rate", rate), ("clip", clip), ("max_age", max_age)):
            if not number > 0:
                raise UsageError(f"{name}={number} must be above 0")
        counts = [("interval", interval, 1), ("max_length", max_length, 2), ("guard", guard, 1)]
        for name, count, least in [*counts, ("capacity", capacity, interval), ("max_bytes", max_bytes, 1)]:
            if count < least:
                raise UsageError(f"{name}={count} must be at least {least}")
        if top is not None and top < 1:
            raise UsageError(f"top={top} must be at least 1; None keeps whole rows")
        self.drafter = _made(drafter, draft, options)
        self.positions, self.loss, self.rate, self.clip, self.top = positions, loss, rate, clip, top
        self.train_seconds, self.max_length, self.guard = train_seconds, max_length, guard
        self.folder = None if state is None else Path(state).expanduser()
        if self.folder is not None:
            _found(self.folder)
        self.buffer = Buffer(interval, max_age, capacity, max_bytes)
        self.history: deque[Request] = deque(maxlen=_HISTORY)
        self.rollbacks = 0
        self.lossless = self.drafter.lossless
        self._trainer: Trainer | None = None

    # ---- the wrapped drafter ------------------------------------------------------------------------------------

    @property
    def trainer(self) -> Trainer:
        assert self._trainer is not None, "the trainer is made when the drafter is bound to a target"
        return self._trainer

    @property
    def alpha(self) -> float | None:
        return self.history[-1].alpha if self.history else None

    @property
    def version(self) -> int:
        return self._trainer.version if self._trainer else 0

    @property
    def warm(self) -> bool:
        return self.version > 0

    @property
    def forwards(self) -> int:  # type: ignore[override]
        return self.drafter.forwards

    @property
    def budget(self) -> int:  # type: ignore[override]
        return self.drafter.budget

    def bind(self, target: Target) -> None:
        earlier = self._state() if self._trainer else None
        self.drafter.bind(target)
        learns = learner(self.drafter, target, self.loss, self.top)
        self.needs = self.drafter.needs | learns.needs
        self.wishes = self.drafter.wishes
        self._trainer = Trainer(learns, self.rate, self.clip)
        self._belongs = {
            "drafter": self.drafter.name,
            "target": [target.config.model_type, target.config.num_hidden_layers, target.vocab_size],
            "weights": [list(p.shape) for p in learns.module.parameters()],
        }
        if earlier is not None:
            self._set_state(earlier)
            return
        self._start(self._trainer.weights(), 0)
        if self.folder is not None and _found(self.folder) is not None:
            self.load(self.folder)

    def begin(self, state: DecodeState) -> None:
        self._running = {row.index: _Collected(row) for row in state.rows}
        self._overlap, self._tested = 0.0, 0
        self.drafter.begin(state)

    def propose(self, state: DecodeState) -> list[Proposal | None]:
        return self.drafter.propose(state)

    def observe(
        self,
        state: DecodeState,
        proposals: Sequence[Proposal | None],
        output: StepOutput,
        verdicts: Sequence[Verdict | None],
    ) -> None:
        self.drafter.observe(state, proposals, output, verdicts)
        for b, (row, proposal, verdict) in enumerate(zip(state.rows, proposals, verdicts, strict=True)):
            if verdict is not None and proposal is not None and proposal.tree is not None:
                tree, nodes = proposal.tree, [0, *verdict.path][: len(verdict.emitted)]
                tested = [(v, x) for v, x in zip(nodes, verdict.emitted, strict=True) if tree.topology.children[v]]
                if tested:
                    self._overlap += overlap(tree, tested, output.logits[b], row.sampler)
                    self._tested += len(tested)
                if self.train_seconds:
                    self._collect(self._running[row.index], b, tree, nodes, output, len(verdict.path))

    def _collect(
        self, seen: _Collected, b: int, tree: DraftTree, nodes: list[int], output: StepOutput, accepted: int
    ) -> None:
        """Keep what the target said at ``nodes``, one for each token that row b has just got."""
        start = len(seen.row.tokens) - len(nodes)
        picked = list(range(len(nodes)))
        if self.positions == "error_only":
            # the token after the accepted ones is a correction if the node before it had drafts, else a bonus
            picked = [i for i in picked if i == accepted and tree.topology.children[nodes[i]]]
        taps = self.trainer.learner.taps(output, b)
        rows = self.trainer.learner.rows(output, b, [nodes[i] for i in picked]) if picked else {}
        seen.nbytes += sum(t.nbytes for t in (*taps.values(), *rows.values()))
        if seen.nbytes <= self.buffer.max_bytes:
            seen.positions += [start + i for i in picked]
            seen.taps.append(taps)
            seen.rows += [rows] if picked else []

    def end(self, state: DecodeState) -> None:
        self.drafter.end(state)
        now = monotonic()
        for seen in self._running.values():
            record = self._record(seen, now)
            if record is not None:
                self.buffer.add(record)
        self._running = {}
        before = self.version
        start = perf_counter()
        if self.trainer.running:
            self.buffer.expire(now)
        elif self.buffer.due(now):
            self.trainer.begin(self.buffer.take())
        self.trainer.run(self.train_seconds)
        alpha = self._overlap / self._tested if self._tested else None
        self.history.append(Request(alpha, self._tested, before, perf_counter() - start))
        if alpha is not None and self.train_seconds:
            self.rollbacks += self._guard.watch(alpha, self.trainer)
        if self.folder is not None and self.version > before:
            try:
                self.save(self.folder)
            except UsageError as error:  # a full disk must not cost the user the text
                warnings.warn(str(error), stacklevel=2)

    def _record(self, seen: _Collected, now: float) -> Record | None:
        """A row's text with what was collected along it; None if nothing was."""
        if not seen.positions:
            return None
        with torch.inference_mode(False):
            ids = torch.from_numpy(seen.row.tokens.copy())
            rows = {name: torch.cat([part[name] for part in seen.rows]) for name in seen.rows[0]}
            taps = {name: torch.cat([part[name] for part in seen.taps]) for name in seen.taps[0]}
            if any(len(tap) != len(ids) - 1 for tap in taps.values()):
                return None  # the request went on from a cache, and nobody has the hidden states of that part
            taps = {name: torch.nn.functional.pad(tap, (0, 0, 0, 1)) for name, tap in taps.items()}
            return Record(ids, torch.tensor(seen.positions), rows, taps, now).last(self.max_length)

    # ---- what was learned -----------------------------------------------------------------------------------------

    def _start(self, weights: list[torch.Tensor], version: int) -> None:
        """What ``reset`` goes back to."""
        self._origin = (weights, version)
        self._guard = Guard(self.guard, weights)

    def reset(self) -> None:
        """Go back to the weights it started from, or those of the state it was given."""
        weights, version = self._origin
        self.trainer.set_weights(weights)
        self.trainer.version = version
        self.buffer.take()
        self.history.clear()
        self.rollbacks = 0
        self._guard = Guard(self.guard, weights)

    def save(self, folder: str | Path) -> None:
        """Write weights, optimiser, counters and the texts in the buffer; an earlier folder goes when all is written.

        Raises:
            UsageError: the folder holds something else, or cannot be written.
        """
        folder = Path(folder).expanduser()
        _found(folder)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            part = Path(tempfile.mkdtemp(prefix=folder.name + ".part-", dir=folder.parent))
        except OSError as error:
            raise UsageError(f"state {str(folder)!r}: cannot write there ({first_line(error)})") from error
        try:
            torch.save(self._state(), part / _FILE)
            replace_folder(part, folder)
        except (OSError, RuntimeError) as error:
            raise UsageError(f"state {str(folder)!r}: could not be written ({first_line(error)})") from error
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def load(self, folder: str | Path) -> None:
        """Go on exactly where the drafter that was saved to ``folder`` stopped; only weights and numbers are read.

        Raises:
            UsageError: nothing there, a damaged file, or the state of another drafter, target or size.
        """
        folder = Path(folder).expanduser()
        found = _found(folder)
        if found is None:
            raise UsageError(f"state {str(folder)!r}: no such folder; drafter.save(folder) makes one")
        try:
            state = torch.load(found / _FILE, map_location="cpu", weights_only=True)
            belongs = state["belongs"]
        except Exception as error:  # the reader raises its own kinds
            raise UsageError(f"state {str(folder)!r}: cannot be read ({first_line(error)}); remove it") from error
        for what, mine in self._belongs.items():
            if belongs[what] != mine:
                theirs = "" if what == "weights" else f" ({belongs[what]}, not {mine})"
                raise UsageError(
                    f"state {str(folder)!r}: it was saved with another {what.removesuffix('s')}{theirs}; give another "
                    "folder, or the models it was saved with"
                )
        self._set_state(state)
        self._start(self.trainer.weights(), self.version)
        guard = state["guard"]
        self._guard.best, self._guard.alphas, self._guard.weights = guard["best"], guard["alphas"], guard["weights"]

    def _state(self) -> dict[str, Any]:
        now = monotonic()
        return {
            "belongs": self._belongs,
            "trainer": self.trainer.state(),
            "left": [_packed(record, now) for record in self.trainer.left],
            "buffer": [_packed(record, now) for record in self.buffer.records],
            "history": [astuple(request) for request in self.history],
            "rollbacks": self.rollbacks,
            "guard": {"best": self._guard.best, "alphas": self._guard.alphas, "weights": self._guard.weights},
        }

    def _set_state(self, state: dict[str, Any]) -> None:
        now = monotonic()
        self.trainer.set_state(state["trainer"], [_unpacked(packed, now) for packed in state["left"]])
        self.buffer.take()
        for packed in state["buffer"]:
            self.buffer.add(_unpacked(packed, now))
        self.history = deque((Request(*request) for request in state["history"]), maxlen=_HISTORY)
        self.rollbacks = state["rollbacks"]


def overlap(tree: DraftTree, tested: Sequence[tuple[int, int]], logits: torch.Tensor, sampler: Sampler) -> float:
    """The sum over nodes of sum_v min(p_v, q_v): the chance that one draft from the node's own law is accepted.

    min(p(x), q(x)) at the drafted x, which the paper's code adds up, is not an estimate of it: with p = q uniform over
    two tokens it is 1/2 and the chance 1. Of several children the first counts. Processors that look at the text are
    left out of p, as they are of q.

    Args:
        tree: drafted.
        tested: nodes with children, and the token that came after each.
        logits: [N, V], the target's raw ones.
        sampler: the request's.
    """
    first = [tree.topology.children[node][0] for node, _ in tested]
    if not sampler.do_sample:
        return float(sum(tree.tokens[child] == token for child, (_, token) in zip(first, tested, strict=True)))
    p = sampler.warp(logits[[node for node, _ in tested]])  # [m, V]
    total = p.new_zeros(())
    for p_v, child in zip(p, first, strict=True):
        if tree.law is None or tree.law[child] == Law.POINT:
            total += p_v[tree.tokens[child]]
        else:
            assert tree.q is not None, "checked by DraftTree"
            assert tree.q_row is not None, "checked by DraftTree"
            total += torch.minimum(p_v, tree.q[tree.q_row[child]]).sum()
    return float(total)


def _made(drafter: str | Drafter, draft: PreTrainedModel | str | Path | None, options: dict[str, Any]) -> Any:
    """The drafter to be trained, checked."""
    cls = registry.drafter_class(drafter) if isinstance(drafter, str) else type(drafter)
    if not issubclass(cls, (DraftModel, HeadDrafter)):
        raise UsageError(
            f"drafter: {cls.name!r} has no weights to train; wrap draft-model, rsd, bild, medusa, chimera or eagle3"
        )
    if not isinstance(drafter, str):
        if draft is not None or options:
            given = sorted([*options, *(["draft"] if draft is not None else [])])
            raise UsageError(f"{', '.join(given)}: only go with a drafter's name; pass them to the drafter itself")
        return drafter
    if issubclass(cls, DraftModel):
        if draft is None:
            raise UsageError(f"draft: {drafter} needs a smaller model of the target's vocabulary; give draft=...")
        # the caller's model may serve others, whose figures training would change
        options["draft"] = copy.deepcopy(draft)
    return registry.drafter(drafter, **options)


def _found(folder: Path) -> Path | None:
    """The folder that holds a saved state; None if there is none yet.

    Raises:
        UsageError: something else is there, which saving would replace.
    """
    if folder.exists() and (not folder.is_dir() or any(file.name != _FILE for file in folder.iterdir())):
        raise UsageError(f"state {str(folder)!r}: something else is there; give a new folder, or one made by save()")
    # killed between two renames, saving leaves the earlier state aside
    places = (folder, folder.with_name(folder.name + ".old"))
    return next((place for place in places if (place / _FILE).is_file()), None)


def _packed(record: Record, now: float) -> dict[str, Any]:
    """A record as plain tensors and its age: the clock of another process started at another time."""
    return {**vars(record), "born": now - record.born}


def _unpacked(packed: dict[str, Any], now: float) -> Record:
    return Record(**{**packed, "born": now - packed["born"]})
