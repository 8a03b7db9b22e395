"""Times arms side by side: one process, every prompt through every arm before the next prompt, in random order.

So a slow minute of the machine hits all arms alike. Only ``generate`` is inside the clock: no tokenising, no
resetting. Tokens are counted as generated ids, for every arm by the same lines.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from transformers import PreTrainedModel

from specdec.bench.arms import Arm, Settings
from specdec.bench.statistics import Record
from specdec.processes import ALONE, Process

Progress = Callable[[int, int, str], None]  # calls done, calls in all, what has just been done


@dataclass
class Run:
    """What was measured.

    Attributes:
        records: one per timed call.
        failure: what ended the run early (an interrupt, an error), or None.
    """

    records: list[Record] = field(default_factory=list)
    failure: BaseException | None = None


class ForwardMeter:
    """Counts the target's forwards and, on a CPU, their time. Its hooks cost every arm the same microseconds.

    Forwards of fewer layers are drafts of its own first layers, and do not count.
    """

    def __init__(self, model: PreTrainedModel):
        self._device = model.device
        self._config = model.config.get_text_config(decoder=True)
        self._layers = getattr(self._config, "num_hidden_layers", None)
        self._handles = [
            model.register_forward_pre_hook(self._enter),
            model.register_forward_hook(self._leave),
        ]
        self.clear()

    def clear(self) -> None:
        self.count, self._seconds, self._start = 0, 0.0, 0.0

    @property
    def seconds(self) -> float | None:
        """None on a GPU, whose forwards return before they are finished."""
        return self._seconds if self._device.type == "cpu" else None

    def _enter(self, *_: Any) -> None:
        self._start = perf_counter()

    def _leave(self, *_: Any) -> None:
        if getattr(self._config, "num_hidden_layers", None) != self._layers:
            return
        self.count += 1
        self._seconds += perf_counter() - self._start

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


@dataclass(frozen=True)
class Group:
    """Prompts decoded in one call; ``prompts`` are their ids, ``ids`` their tokens."""

    prompts: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]

    def tensors(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Left-padded input ids and attention mask, int64 [B, S]."""
        width = max(map(len, self.ids))
        input_ids = torch.tensor([[0] * (width - len(i)) + list(i) for i in self.ids], device=device)
        mask = torch.tensor([[0] * (width - len(i)) + [1] * len(i) for i in self.ids], device=device)
        return input_ids, mask


def grouped(prompts: Sequence[str], ids: Sequence[Sequence[int]], batch_size: int) -> list[Group]:
    """Prompt ids and their tokens, ``batch_size`` at a time, in order."""
    return [
        Group(tuple(prompts[i : i + batch_size]), tuple(tuple(t) for t in ids[i : i + batch_size]))
        for i in range(0, len(prompts), batch_size)
    ]


def end_tokens(model: PreTrainedModel) -> frozenset[int]:
    """The tokens that end a text."""
    eos = model.generation_config.eos_token_id
    return frozenset() if eos is None else frozenset([eos] if isinstance(eos, int) else eos)


def generated(output: torch.Tensor, start: int, ends: frozenset[int]) -> list[list[int]]:
    """New ids of every row, up to and including its end token: what follows is padding."""
    rows = []
    for row in output[:, start:].tolist():
        stop = next((i for i, token in enumerate(row) if token in ends), len(row) - 1)
        rows.append(row[: stop + 1])
    return rows


class Harness:
    """Measures arms on groups of prompts.

    Args:
        model: the target of every arm.
        seed: of the order of the arms and of what they sample.
    """

    def __init__(self, model: PreTrainedModel, seed: int = 0):
        self.model, self.seed = model, seed
        self.device: torch.device = model.get_input_embeddings().weight.device
        self.ends = end_tokens(model)

    def warm_up(self, arm: Arm, group: Group, settings: Settings) -> None:
        """Run an arm untimed: kernels are compiled and caches filled here. What it learned is dropped."""
        arm.generate(*group.tensors(self.device), Settings(min(settings.max_new_tokens, 32), settings.temperature))
        arm.forget()

    def run(
        self,
        arms: Sequence[Arm],
        groups: Sequence[Group],
        settings: Sequence[Settings],
        repeats: int = 1,
        progress: Progress | None = None,
        process: Process = ALONE,
    ) -> Run:
        """Time every arm on every group under every setting; arms must be warmed up.

        An interrupt or an error ends the run; what was measured until then is returned with it. ``process`` measures
        only its share of the groups, with the orders and seeds that they have in one process.
        """
        run = Run()
        mine = range(len(groups))[process.rank :: process.count]
        total = len(arms) * len(mine) * len(settings) * repeats
        try:
            with self._meter() as meter:
                for setting, number, repeat, arm in self._order(arms, groups, settings, repeats):
                    if number not in mine:
                        continue
                    run.records.append(self._time(meter, arm, groups[number], setting, number, repeat))
                    if progress is not None:
                        progress(len(run.records), total, f"temperature {setting.temperature:g}, {arm.name}")
        except (KeyboardInterrupt, Exception) as error:
            run.failure = error
        return run

    def _order(
        self, arms: Sequence[Arm], groups: Sequence[Group], settings: Sequence[Settings], repeats: int
    ) -> Iterator[tuple[Settings, int, int, Arm]]:
        """Every arm on a group, in a new random order each time, before the next group."""
        order = random.Random(self.seed)
        for setting in settings:
            for arm in arms:
                arm.forget()  # the prompts come again: a warm arm would know their texts
            for number in range(len(groups)):
                for repeat in range(repeats):
                    for arm in order.sample(list(arms), len(arms)):
                        yield setting, number, repeat, arm

    def _time(
        self, meter: ForwardMeter, arm: Arm, group: Group, settings: Settings, number: int, repeat: int
    ) -> Record:
        input_ids, mask = group.tensors(self.device)
        arm.reset()
        torch.manual_seed(self.seed + 1000 * number + repeat)
        meter.clear()
        self._wait()
        start = perf_counter()
        output = arm.generate(input_ids, mask, settings)
        self._wait()
        seconds = perf_counter() - start
        ids = generated(output, input_ids.shape[1], self.ends)
        if arm.stats is not None:
            forwards = arm.stats.row_forwards
            inside: float | None = arm.stats.seconds_by_phase()["forward"]
        else:
            # rows of a batch that have ended ride along in forwards that emit nothing for them
            forwards = min(meter.count * len(ids), sum(map(len, ids)))
            inside = meter.seconds if meter.count else None  # a server's are not seen
        accepted = [n for step in arm.stats.steps for n in step.accepted] if arm.stats is not None else None
        phases = arm.stats.seconds_by_phase() if arm.stats is not None else None
        timed = (arm.name, settings.temperature, number, group.prompts, repeat, seconds, forwards, inside, ids)
        return Record(*timed, accepted, phases)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @contextmanager
    def _meter(self) -> Iterator[ForwardMeter]:
        meter = ForwardMeter(self.model)
        try:
            yield meter
        finally:
            meter.close()
