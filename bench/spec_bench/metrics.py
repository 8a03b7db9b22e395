"""Figures of answer files. Two kinds, which are never mixed.

The protocol's (``Protocol``), as the original's speed.py computes them, per question q:

    s_q = sum(new_tokens) / sum(wall_time)                     the method, tokens as it reports them
    b_q = sum(len(tokenizer(text)) - 1) / sum(wall_time)       the baseline, its text tokenised again, less BOS
    speed-up = mean_q(s_q) / mean_q(b_q)
    MAT = mean of accept_lengths, all steps of all questions (and runs) in one list

Ours (``Ours``), from token ids up to and including the end token:

    tokens/s   all tokens over all seconds
    speed-up   tokens/s over the baseline's, same questions; interval: bootstrap over questions
    MAT        tokens over target forwards
    overhead   share of time outside the target's forward
    equal      questions whose ids, in every turn and run, are the baseline's (greedy only)
    distinct-4 different 4-grams over 4-grams of a turn's ids, mean over turns

and per step, of methods that tell (``Steps``), over all turns and runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import Any

import numpy as np

from specdec.bench.spec_bench.answers import Answer, Answers, Detail
from specdec.bench.spec_bench.questions import OVERALL, columns, subtask
from specdec.bench.statistics import distinct_n, speedup_interval

Count = Callable[[Answer], int]  # tokens of a baseline's answer, all turns


def retokenised(tokenizer: Any) -> Count:
    """The protocol's count: special tokens included, less one a turn for BOS (also where the tokenizer adds none)."""
    return lambda answer: sum(len(tokenizer(text, verbose=False).input_ids) - 1 for text in answer.turns)


def reported(answer: Answer) -> int:
    """The file's own count, where there is no tokenizer."""
    return sum(answer.new_tokens)


@dataclass(frozen=True)
class Protocol:
    """The protocol's figures; of several runs the mean, and the standard deviation with ddof 1.

    Attributes:
        speedup: None where the baseline's speed is zero.
        mat: None where no step lengths are known.
    """

    tokens_per_second: float
    baseline_tokens_per_second: float
    speedup: float | None
    mat: float | None
    tokens_per_second_std: float | None
    speedup_std: float | None


@dataclass(frozen=True)
class Ours:
    """Our figures, all runs together; None where something was not measured.

    Attributes:
        accepted: share of target forwards that accepted at least 1, 2, ... drafted tokens.
    """

    speedup: float | None
    speedup_ci: tuple[float, float] | None
    tokens_per_second: float
    mat: float | None
    accepted: list[float]
    overhead: float | None
    equal_share: float | None
    distinct4: float | None
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Row:
    """One method on one subtask (or overall)."""

    method: str
    subtask: str
    questions: int
    protocol: Protocol
    ours: Ours | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Steps:
    """When a method's tokens come.

    Attributes:
        first: median time to the first token in seconds, prompt and set-up included.
        median, high: of the times between later emissions in seconds, median and 95th percentile; None without any.
        tokens_per_second: after the first emission; None likewise.
    """

    first: float
    median: float | None
    high: float | None
    tokens_per_second: float | None


@dataclass
class Method:
    """A method's answers.

    Attributes:
        name: the row's.
        answers: one entry per run.
        details: the same; empty for other tools' files.
    """

    name: str
    answers: list[Answers]
    details: list[dict[int, Detail]]

    def usable(self) -> set[int]:
        """Questions that every run answered in a time above zero and without error."""
        runs = ({q for q, a in run.items() if not a.failed and sum(a.wall_time) > 0} for run in self.answers)
        return set.intersection(*runs)

    def exact(self, run: int, question: int) -> bool:
        """Whether the ids are known that the model itself produced."""
        return bool(self.details) and not self.details[run][question].retokenised

    def errors(self) -> list[int]:
        return sorted({q for run in self.answers for q, a in run.items() if a.failed})


@dataclass(frozen=True)
class Divergence:
    """Where a method's text leaves the baseline's.

    Attributes:
        run, turn: counted from 1.
        index: of the first token that differs, from 0; None where only texts are known.
    """

    method: str
    question: int
    run: int
    turn: int
    index: int | None


def comparable(methods: Sequence[Method]) -> list[int]:
    """Questions that all methods can be compared on, ascending."""
    return sorted(set.intersection(*(m.usable() for m in methods)))


def rows(methods: Sequence[Method], baseline: Method, count: Count, greedy: bool) -> list[Row]:
    """Every method on every subtask and overall; the methods must have answered the same questions.

    Args:
        methods: the baseline among them.
        baseline: what speed-ups are relative to.
        count: tokens of the baseline's answers.
        greedy: texts are argmax ones, which can be compared.
    """
    questions = comparable(methods)
    found: list[Row] = []
    if not questions:
        return found
    categories = {q: baseline.answers[0][q].category for q in questions}
    for column in [*columns(list(categories.values())), OVERALL]:
        chosen = [q for q in questions if column in (OVERALL, subtask(categories[q]))]
        for method in methods:
            ours = _ours(method, baseline, chosen, greedy) if method.details and baseline.details else None
            found.append(Row(method.name, column, len(chosen), protocol(method, baseline, chosen, count), ours))
    return found


def protocol(method: Method, baseline: Method, questions: Sequence[int], count: Count) -> Protocol:
    """The protocol's figures on some questions; both must have as many runs."""
    pairs = list(zip(method.answers, baseline.answers, strict=True))
    speeds, base_speeds, ratios = [], [], []
    for mine, theirs in pairs:
        s = np.array([sum(mine[q].new_tokens) / sum(mine[q].wall_time) for q in questions]).mean()
        b = np.array([count(theirs[q]) / sum(theirs[q].wall_time) for q in questions]).mean()
        speeds.append(float(s))
        base_speeds.append(float(b))
        if b > 0:
            ratios.append(float(s / b))
    lengths = [length for run, _ in pairs for q in questions for length in run[q].accept_lengths]
    return Protocol(
        tokens_per_second=float(np.mean(speeds)),
        baseline_tokens_per_second=float(np.mean(base_speeds)),
        speedup=float(np.mean(ratios)) if len(ratios) == len(pairs) else None,
        mat=float(np.mean(lengths)) if lengths else None,
        tokens_per_second_std=_deviation(speeds),
        speedup_std=_deviation(ratios),
    )


def accepted_by_position(lengths: Sequence[int]) -> list[float]:
    """Share of steps that accepted at least 1, 2, ... drafted tokens; one token of each step is the target's own."""
    drafted = np.array(lengths) - 1
    return [float((drafted >= k).mean()) for k in range(1, int(drafted.max(initial=0)) + 1)]


def divergences(methods: Sequence[Method], baseline: Method, questions: Sequence[int]) -> list[Divergence]:
    """First difference of every question and run whose text is not the baseline's of the same run."""
    found = []
    for method in methods:
        if method is not baseline:
            for run, (mine, theirs) in enumerate(zip(method.answers, baseline.answers, strict=True)):
                for q in questions:
                    if method.exact(run, q) and baseline.exact(run, q):
                        at = _first_token(method.details[run][q].ids, baseline.details[run][q].ids)
                    else:
                        at = _first_text(mine[q].turns, theirs[q].turns)
                    if at is not None:
                        found.append(Divergence(method.name, q, run + 1, at[0] + 1, at[1]))
    return found


def steps(method: Method, questions: Sequence[int]) -> Steps | None:
    """None for methods that do not tell their steps."""
    firsts: list[float] = []
    later: list[float] = []
    tokens = 0
    for answers, details in zip(method.answers, method.details, strict=True):
        for q in questions:
            lengths = iter(answers[q].accept_lengths)
            for times in details[q].step_seconds:
                if times is None:
                    return None
                firsts += times[:1]
                later += times[1:]
                tokens += sum([next(lengths) for _ in times][1:])
    if not firsts:
        return None
    if not later:
        return Steps(float(np.median(firsts)), None, None, None)
    middle, high = np.quantile(later, [0.5, 0.95])
    return Steps(float(np.median(firsts)), float(middle), float(high), tokens / sum(later))


def _first_token(mine: Sequence[list[int]], theirs: Sequence[list[int]]) -> tuple[int, int | None] | None:
    for turn, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        if a != b:
            return turn, next(i for i, (x, y) in enumerate(zip_longest(a, b)) if x != y)
    return None


def _first_text(mine: Sequence[str], theirs: Sequence[str]) -> tuple[int, int | None] | None:
    return next(((turn, None) for turn, (a, b) in enumerate(zip_longest(mine, theirs)) if a != b), None)


def _ours(method: Method, baseline: Method, questions: Sequence[int], greedy: bool) -> Ours:
    tokens, seconds = _totals(method, questions)
    base_tokens, base_seconds = _totals(baseline, questions)
    details = [run[q] for run in method.details for q in questions]
    answers = [run[q] for run in method.answers for q in questions]
    forwards = [sum(a.decoding_steps) for a in answers]
    inside = [s for d in details for s in d.forward_seconds]
    loops = [d for detail in details for d in map(distinct_n, detail.ids) if d is not None]
    differ = {d.question for d in divergences([method], baseline, questions)}
    speed, base_speed = tokens.sum() / seconds.sum(), base_tokens.sum() / base_seconds.sum()
    timed = [s for s in inside if s is not None]
    return Ours(
        speedup=float(speed / base_speed) if base_speed > 0 else None,
        # a resample of nothing but empty answers would have no speed
        speedup_ci=speedup_interval(tokens, seconds, base_tokens, base_seconds) if base_tokens.all() else None,
        tokens_per_second=float(speed),
        mat=float(tokens.sum() / sum(forwards)) if all(forwards) else None,
        accepted=accepted_by_position([length for a in answers for length in a.accept_lengths]),
        overhead=1 - sum(timed) / float(seconds.sum()) if len(timed) == len(inside) else None,
        equal_share=1 - len(differ) / len(questions) if greedy else None,
        distinct4=sum(loops) / len(loops) if loops else None,
        tokens=int(tokens.sum()),
        seconds=float(seconds.sum()),
    )


def _totals(method: Method, questions: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and seconds per question, all turns and runs together: float [Q] each."""
    tokens = [sum(len(ids) for run in method.details for ids in run[q].ids) for q in questions]
    seconds = [sum(sum(run[q].wall_time) for run in method.answers) for q in questions]
    return np.array(tokens, dtype=float), np.array(seconds)


def _deviation(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None
