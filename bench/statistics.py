"""From measurements to a row of the table. Definitions stand here once; reports only print them.

    tokens/s   generated tokens of all prompts over wall time of all prompts
    speed-up   tokens/s over hf-generate's tokens/s, on the same prompts
    interval   95 % percentile bootstrap of the speed-up, resampling prompts (groups of prompts at batch size > 1)
    MAT        generated tokens over target forwards that emitted for the row (hf-generate: 1)
    overhead   share of wall time outside the target's forward
    equal      every prompt's ids are hf-generate's (greedy only)
    distinct4  different 4-grams over 4-grams of a prompt's generated ids, mean over prompts

Of several repeats, the one of median speed stands for the prompt.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Record:
    """One timed call: one arm, one group of prompts, one repeat.

    Attributes:
        arm: name of the method.
        temperature: 0 is greedy.
        group: number of the group of prompts (one prompt at batch size 1).
        prompts: ids of the prompts in it.
        repeat: 0 for the first.
        seconds: wall time.
        forwards: target forwards that emitted, summed over rows.
        forward_seconds: wall time inside the target's forward; None where it cannot be told.
        ids: generated ids per prompt, up to and including the end token.
        accepted: drafted tokens that each of these forwards accepted; None for methods that do not tell.
        phases: wall time by phase of the loop (``specdec.stats.PHASES``); None likewise.
    """

    arm: str
    temperature: float
    group: int
    prompts: tuple[str, ...]
    repeat: int
    seconds: float
    forwards: int
    forward_seconds: float | None
    ids: list[list[int]]
    accepted: list[int] | None = None
    phases: dict[str, float] | None = None

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> Record:
        """A line of records.jsonl; older ones lack the last fields."""
        known = {field.name: entry[field.name] for field in fields(cls) if field.name in entry}
        return cls(**{**known, "prompts": tuple(entry["prompts"])})

    @property
    def tokens(self) -> int:
        return sum(map(len, self.ids))

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "tokens": self.tokens}


@dataclass(frozen=True)
class Row:
    """One method at one temperature; the fields are defined at the top of this file.

    Attributes:
        speedup_of_means: Spec-Bench's figure, the mean of prompts' tokens/s over the baseline's mean; for comparison
            with its tables only.
        equal_share: share of prompts whose ids are hf-generate's.
        state: one of ``bench.arms.STATES`` for methods that learn, else None.
    """

    name: str
    temperature: float
    lossless: bool
    speedup: float
    speedup_ci: tuple[float, float] | None
    speedup_of_means: float
    mat: float | None
    tokens_per_second: float
    overhead: float | None
    equal: bool | None
    equal_share: float | None
    distinct4: float | None
    state: str | None
    prompts: int
    tokens: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def distinct_n(ids: Sequence[int], n: int = 4) -> float | None:
    """Different n-grams over n-grams; None for a text shorter than n. Looping text scores low."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def speedup_interval(
    tokens: np.ndarray, seconds: np.ndarray, base_tokens: np.ndarray, base_seconds: np.ndarray, resamples: int = 10_000
) -> tuple[float, float] | None:
    """95 % bootstrap interval of a ratio of total speeds.

    Args:
        tokens, seconds: [G] per group of prompts, the method.
        base_tokens, base_seconds: [G], the baseline on the same groups, which are resampled together.
        resamples: bootstrap samples.

    Returns:
        (low, high), or None for fewer than two groups.
    """
    groups = len(tokens)
    if groups < 2:
        return None
    pick = np.random.default_rng(0).integers(0, groups, (resamples, groups))
    t, s, bt, bs = (x[pick].sum(axis=1) for x in (tokens, seconds, base_tokens, base_seconds))
    low, high = np.quantile((t / s) / (bt / bs), [0.025, 0.975])
    return float(low), float(high)


def median_repeat(records: Sequence[Record]) -> Record:
    """The record of (lower) median speed."""
    return sorted(records, key=lambda r: r.tokens / r.seconds)[(len(records) - 1) // 2]


def summarise(
    records: Sequence[Record],
    lossless: dict[str, bool],
    states: dict[str, str | None],
    repeats: int,
    reference: str,
) -> list[Row]:
    """One row per temperature and arm, from the groups that every arm has finished.

    Args:
        records: any order, possibly cut off by an interrupt.
        lossless, states: per arm, in the order of the table.
        repeats: calls per arm and group.
        reference: the arm that speed-ups are relative to.
    """
    rows = []
    for temperature in dict.fromkeys(r.temperature for r in records):
        calls = finished([r for r in records if r.temperature == temperature], lossless, repeats)
        for arm in lossless if calls[reference] else ():
            rows.append(_row(arm, temperature, lossless[arm], states[arm], calls[arm], calls[reference]))
    return rows


def finished(records: Sequence[Record], arms: Collection[str], repeats: int) -> dict[str, list[list[Record]]]:
    """Per arm, the repeats of every group that all arms have finished, by group; of records of one temperature."""
    calls: dict[tuple[str, int], list[Record]] = {}
    for r in records:
        calls.setdefault((r.arm, r.group), []).append(r)
    groups = sorted({g for _, g in calls if all(len(calls.get((a, g), ())) == repeats for a in arms)})
    return {arm: [calls[arm, g] for g in groups] for arm in arms}


def _row(
    arm: str,
    temperature: float,
    lossless: bool,
    state: str | None,
    mine: list[list[Record]],
    theirs: list[list[Record]],
) -> Row:
    """``mine`` and ``theirs``: the repeats of each group, the method's and the baseline's."""
    chosen, base = [median_repeat(c) for c in mine], [median_repeat(c) for c in theirs]
    tokens, base_tokens = (np.array([r.tokens for r in c], dtype=float) for c in (chosen, base))
    seconds, base_seconds = (np.array([r.seconds for r in c]) for c in (chosen, base))
    speed, base_speed = tokens.sum() / seconds.sum(), base_tokens.sum() / base_seconds.sum()
    forwards = sum(r.forwards for r in chosen)
    inside = [r.forward_seconds for r in chosen if r.forward_seconds is not None]
    texts = [ids for r in chosen for ids in r.ids]
    same = None
    if temperature == 0:
        # every repeat must agree, not only the one that was timed as the median
        pairs = ((calls, b, i) for calls, b in zip(mine, base, strict=True) for i in range(len(b.ids)))
        same = [all(r.ids[i] == b.ids[i] for r in calls) for calls, b, i in pairs]
    loops = [d for d in map(distinct_n, texts) if d is not None]
    return Row(
        name=arm,
        temperature=temperature,
        lossless=lossless,
        speedup=float(speed / base_speed),
        speedup_ci=speedup_interval(tokens, seconds, base_tokens, base_seconds),
        speedup_of_means=float(np.mean(tokens / seconds) / np.mean(base_tokens / base_seconds)),
        mat=float(tokens.sum() / forwards) if forwards else None,
        tokens_per_second=float(speed),
        overhead=1 - sum(inside) / float(seconds.sum()) if len(inside) == len(chosen) else None,
        equal=all(same) if same is not None else None,
        equal_share=sum(same) / len(same) if same is not None else None,
        distinct4=sum(loops) / len(loops) if loops else None,
        state=state,
        prompts=len(texts),
        tokens=int(tokens.sum()),
        seconds=float(seconds.sum()),
    )
