"""What drafters cost by themselves: propose and observe on made-up text, for vocabularies of any size, without a model.

Text and logits are invented, rows, trees, verdicts and step outputs are the real ones, so drafters run unchanged. The
text is an order-2 Markov chain over Zipfian words in which passages come back; logits rank the chain's own successors
first. Speeds of drafting are realistic, rates of acceptance are those of the made-up text.
"""

from __future__ import annotations

import ctypes
import gc
import os
import random
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NoReturn

import numpy as np
import torch
from transformers import PreTrainedModel

from specdec.capability import Capability
from specdec.contracts import Drafter, Verdict
from specdec.sampling import Randomness, Sampler
from specdec.state import DecodeState, Row
from specdec.tables import TableDrafter
from specdec.target import StepOutput, Target
from specdec.tree import DraftTree, Proposal

PROMPT, NEW = 256, 768  # tokens of a request
_WEIGHTS = (0.45, 0.35, 0.1, 0.05)  # of a context's successors; the rest is any word


class NeedsModel(AttributeError):
    """This drafter cannot run without a model; the message says why."""


class StandIn:
    """As much of a ``Target`` as a drafter needs that neither runs the model nor reads its hidden states."""

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size
        self.device = torch.device("cpu")
        self.tokenizer, self.context = None, None
        self.capability = Capability("tree", "there is no model")
        self.lengths, self.row_ids = [0], [0]
        self.forwards = self.scratch_forwards = 0

    def __getattr__(self, name: str) -> NoReturn:
        raise NeedsModel(f"it asks the target for {name!r}")


class Text:
    """Endless made-up text over ``vocab_size`` words, the same for the same seed."""

    def __init__(self, vocab_size: int, seed: int = 0):
        self.vocab_size, self.seed = vocab_size, seed
        self._dice = random.Random(seed)

    def successors(self, a: int, b: int) -> list[int]:
        """The words most likely after a, b, likeliest first: by a hash, so that nothing is stored.

        Every second one follows b whatever came before it.
        """
        words = []
        for rank in range(len(_WEIGHTS)):
            x = (
                (rank + 1) % 2 * a * 0x9E3779B97F4A7C15
                + b * 0xBF58476D1CE4E5B9
                + (rank + self.seed) * 0x94D049BB133111EB
            ) % 2**64
            x = ((x ^ (x >> 31)) * 0xD6E8FEB86659FD93) % 2**64
            words.append(self._zipf((x ^ (x >> 32)) / 2**64))
        return words

    def _zipf(self, u: float) -> int:
        """Word of rank r with a chance of about 1 / r."""
        return min(int((self.vocab_size + 1) ** u), self.vocab_size) - 1

    def write(self, n: int) -> np.ndarray:
        """The next document, int64 [n]."""
        dice = self._dice
        text = [self._zipf(dice.random()), self._zipf(dice.random())]
        while len(text) < n:
            if len(text) > 64 and dice.random() < 0.02:  # a passage comes back
                start = dice.randrange(len(text) - 48)
                text += text[start : start + dice.randint(8, 48)]
                continue
            successors = [*self.successors(text[-2], text[-1]), self._zipf(dice.random())]
            text += dice.choices(successors, [*_WEIGHTS, 1 - sum(_WEIGHTS)])
        return np.array(text[:n], dtype=np.int64)


@dataclass
class _Output(StepOutput):
    """Remembers how many of the likeliest tokens were asked for."""

    asked: int = 0

    def top(self, k: int) -> np.ndarray:
        self.asked = max(self.asked, k)
        return super().top(k)


@dataclass(frozen=True)
class Step:
    """One step: seconds of propose, observe and of top-k over the logits, columns of the tree, tokens emitted.

    Attributes:
        first: it brought the prompt; ``propose`` includes ``begin``.
    """

    propose: float
    observe: float
    top: float
    nodes: int
    emitted: int
    first: bool


class Simulation:
    """Requests of made-up text, one after the other, through one drafter.

    Args:
        drafter: not bound yet.
        vocab_size: V.
        seed: of the text.
        asked: how many of the likeliest tokens the drafter is going to ask for, where that is known.
        words: how many different ones the text has; few make full trees. None: all V.

    Raises:
        NeedsModel: here or in ``step``: the drafter cannot run like this.
    """

    def __init__(self, drafter: Drafter, vocab_size: int, seed: int = 0, asked: int = 0, words: int | None = None):
        if drafter.needs:
            raise NeedsModel("it reads the model's hidden states")
        self.drafter, self.target = drafter, StandIn(vocab_size)
        drafter.bind(self.target)  # type: ignore[arg-type]
        self._text = Text(min(words or vocab_size, vocab_size), seed)
        generator = torch.Generator().manual_seed(seed)
        self._logits = torch.rand(1, drafter.budget, vocab_size, generator=generator)
        self._state: DecodeState | None = None
        self._words = np.zeros(0, dtype=np.int64)  # the running request: prompt and what will be generated
        self.asked = asked

    def step(self) -> Step:
        """Propose, verify against the text, observe."""
        first = self._state is None
        state = self._state or self._request()
        start = perf_counter()
        if first:
            self.drafter.begin(state)
        (proposal,) = self.drafter.propose(state)
        propose = perf_counter() - start
        if proposal is None or proposal.tree is None or proposal.probes or proposal.trusted:
            raise NeedsModel("it asks for more than a tree to be verified (probe columns, or tokens kept unverified)")
        row, target = state.rows[0], self.target
        proposal.tree = tree = proposal.tree.cut(state.depth_left(0))
        verdict = Verdict(self._accepted(tree, len(row)), 0)
        verdict.token = int(self._words[len(row) + len(verdict.path)])
        written = self._predict(row, tree, verdict)
        root = pending = len(row) - target.lengths[0] - 1
        output = _Output(
            self._logits[:, : len(tree)], {}, [root], [pending], [len(tree)], [root + len(tree)], [target.lengths[0]]
        )
        start = perf_counter()
        if self.asked:
            output.top(self.asked)
        top = perf_counter() - start

        verdict.emitted = [*tree.tokens[verdict.path].tolist(), verdict.token]
        for token in verdict.emitted:
            row.append(token)
        verdict.kept = [*range(root + 1), *(root + v for v in verdict.path)]
        output.kept = [verdict.kept]
        target.lengths = [len(row) - 1]
        start = perf_counter()
        self.drafter.observe(state, [proposal], output, [verdict])
        observe = perf_counter() - start
        self.asked = max(self.asked, output.asked)
        self._logits[0, written[:, 0], written[:, 1]] = 0.5  # nobody's favourite again
        if row.tokens_left <= 0:
            self.drafter.end(state)
            self._state = None
        return Step(propose, observe, top, len(tree), len(verdict.emitted), first)

    def _request(self) -> DecodeState:
        self._words = self._text.write(PROMPT + NEW + 1)
        row = Row(0, torch.from_numpy(self._words[:PROMPT]), 0, PROMPT + NEW, Randomness(0), Sampler())
        self.target.lengths = [0]
        self._state = DecodeState([row], self.target, self.drafter.budget)  # type: ignore[arg-type]
        return self._state

    def _accepted(self, tree: DraftTree, at: int) -> list[int]:
        """Nodes of ``tree`` that go on as the text does from ``at``."""
        path: list[int] = []
        node = 0
        while True:
            word = self._words[at + len(path)]
            node = next((v for v in tree.topology.children[node] if tree.tokens[v] == word), -1)
            if node < 0:
                return path
            path.append(node)

    def _predict(self, row: Row, tree: DraftTree, verdict: Verdict) -> np.ndarray:
        """Write every node's logits; returns where, int64 [n, 2]: node and word."""
        before = int(row.tokens[-2])
        truth = dict(zip([0, *verdict.path], self._words[len(row) :].tolist(), strict=False))
        written: list[tuple[int, int]] = []
        values: list[float] = []
        for v, parent in enumerate(tree.topology.parents):
            a = before if parent < 0 else int(tree.tokens[parent])
            words = self._text.successors(a, int(tree.tokens[v]))
            if v in truth:
                words = [truth[v], *words]
            ranked = list(dict.fromkeys(words))
            written += [(v, word) for word in ranked]
            values += [float(10 - i) for i in range(len(ranked))]
        where = np.array(written)
        self._logits[0, where[:, 0], where[:, 1]] = torch.tensor(values)
        return where


class PlainStep:
    """What a drafter's time is compared with: a step of one column of a real model.

    Args:
        model: in eval mode.
    """

    def __init__(self, model: PreTrainedModel):
        self._target = Target(model)

    def seconds(self, repeats: int = 15) -> float:
        """Median of ``repeats`` steps after 256 cached tokens."""
        target = self._target
        tokens = np.arange(3, PROMPT + 4) % target.vocab_size
        times = []
        with target.session():
            target.open([0], PROMPT + 1)
            for _ in range(repeats + 3):
                start = perf_counter()
                output = target.step([tokens], [Proposal(DraftTree.root(int(tokens[-1])))])
                times.append(perf_counter() - start)
                target.commit(output, [[]])
                target.truncate([PROMPT])
        return median(times[3:])  # the first one reads the prompt


@dataclass(frozen=True)
class Measured:
    """One drafter at one vocabulary and tree size; times in microseconds.

    Attributes:
        size: the size asked for; None where the drafter has no such option.
        nodes: mean columns per step.
        mat: tokens per step, of the made-up text.
        propose, observe: (median, 99th percentile) per step.
        top: median of top-k over the logits, which observe then finds done.
        first: median of begin, propose and observe where a request starts, ``PROMPT`` tokens long.
        table_bytes: what ``save`` would write; None for a drafter without a table.
        resident_bytes: growth of the process from before the drafter was made; None where it cannot be told.
        plain_step: one token of plain decoding with the embedded model, measured beside it.
        share: medians of propose and observe over ``plain_step``.
    """

    label: str
    vocab_size: int
    size: int | None
    steps: int
    nodes: float
    mat: float
    propose: tuple[float, float]
    observe: tuple[float, float]
    top: float
    first: float
    table_bytes: int | None
    resident_bytes: int | None
    plain_step: float
    share: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def measure(
    label: str,
    make: Callable[[], Drafter],
    vocab_size: int,
    size: int | None,
    steps: int,
    plain_step: float,
    seed: int = 0,
    words: int | None = None,
) -> Measured:
    """Run ``steps`` steps, after a rehearsal on a small vocabulary in which everything is compiled.

    Args:
        label: what the row is called.
        make: a new drafter.
        vocab_size, size: see ``Measured``; ``make`` already knows the size.
        steps: at least 1.
        plain_step: seconds, of ``PlainStep``.
        seed: of the text.
        words: see ``Simulation``.

    Raises:
        NeedsModel: the drafter cannot run without a model.
    """
    rehearsal = Simulation(make(), min(vocab_size, 512), seed)
    for _ in range(20):
        rehearsal.step()
    asked = rehearsal.asked
    del rehearsal
    gc.collect()
    _give_back()
    before = resident()
    simulation = Simulation(make(), vocab_size, seed, asked, words)
    done = [simulation.step() for _ in range(steps)]
    after = resident()
    logits = simulation._logits.nbytes  # not the drafter's
    table = simulation.drafter
    usual = [s for s in done if not s.first] or done
    propose, observe = _spread([s.propose for s in usual]), _spread([s.observe for s in usual])
    return Measured(
        label,
        vocab_size,
        size,
        steps,
        nodes=sum(s.nodes for s in done) / steps,
        mat=sum(s.emitted for s in done) / steps,
        propose=propose,
        observe=observe,
        top=1e6 * median(s.top for s in usual),
        first=1e6 * median(s.propose + s.observe for s in done if s.first),
        table_bytes=sum(a.nbytes for a in table.table.arrays().values()) if isinstance(table, TableDrafter) else None,
        resident_bytes=None if before is None or after is None else max(after - before - logits, 0),
        plain_step=1e6 * plain_step,
        share=(propose[0] + observe[0]) / (1e6 * plain_step),
    )


def growth(drafter: Drafter, vocab_size: int, steps: int, after: int, seed: int = 0) -> tuple[int, int | None]:
    """Memory that ``steps`` steps added, once ``after`` steps had been made.

    Args:
        drafter: not bound yet.
        vocab_size: V.
        steps, after: how many.
        seed: of the text.

    Returns:
        Bytes of Python objects and NumPy arrays, and bytes of the whole process (None where it cannot be told).
    """
    simulation = Simulation(drafter, vocab_size, seed)
    for _ in range(after):
        simulation.step()
    gc.collect()
    tracing = tracemalloc.is_tracing()
    if not tracing:
        tracemalloc.start()
    traced, process = tracemalloc.get_traced_memory()[0], resident()
    for _ in range(steps):
        simulation.step()
    gc.collect()
    now, process_now = tracemalloc.get_traced_memory()[0], resident()
    if not tracing:
        tracemalloc.stop()
    return now - traced, None if process is None or process_now is None else process_now - process


def resident() -> int | None:
    """Bytes of this process in memory; None off Linux."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None


def _give_back() -> None:
    """Let the C library return freed memory, so that what is allocated next shows as growth."""
    with suppress(OSError, AttributeError):  # off glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def why_not(drafter: type[Drafter]) -> str | None:
    """Why a drafter cannot be measured here, as far as its class tells."""
    if drafter.training not in ("none", "online"):
        return f"it must be trained ({drafter.training})"
    if drafter.requires != "nothing":
        return f"it needs {drafter.requires}"
    return None


def _spread(seconds: list[float]) -> tuple[float, float]:
    """Median and 99th percentile in microseconds."""
    return float(1e6 * np.median(seconds)), float(1e6 * np.quantile(seconds, 0.99))
