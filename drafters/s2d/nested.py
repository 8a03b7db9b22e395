"""Which sub-models a sorted model holds, and when a draft token leaves: `s2d.json` beside the checkpoint."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

from transformers.utils import cached_file

from specdec.errors import UsageError

FILE = "s2d.json"


@dataclass(frozen=True)
class Nested:
    """The sub-models of a sorted model.

    Attributes:
        submodels: D, the layers of each, rising up to all of the model's.
        thresholds: T, one for each; a token leaves where the largest probability is above its threshold, so that 0
            always ends there and 1 never. The last one means nothing.

    Raises:
        UsageError: sub-models that do not rise, or thresholds that do not fit them.
    """

    submodels: tuple[int, ...]
    thresholds: tuple[float, ...]

    def __post_init__(self) -> None:
        n, t = self.submodels, self.thresholds
        if not n or n[0] < 1 or any(a >= b for a, b in pairwise(n)):
            raise UsageError(f"submodels={n} must be numbers of layers that rise from at least 1, such as (2, 4, 6)")
        if len(t) != len(n):
            raise UsageError(f"thresholds={t}: {len(t)} for the {len(n)} sub-models {n}; give one for each")
        if not all(0 <= x <= 1 for x in t):
            raise UsageError(f"thresholds={t} must be probabilities from 0 (always leave) to 1 (never)")

    @staticmethod
    def of(submodels: Sequence[int], thresholds: Sequence[float] | None = None) -> Nested:
        """With the thresholds of the published code, 0.5 and at last 0, where none are given."""
        usual = (*(0.5,) * (len(submodels) - 1), 0.0)
        return Nested(tuple(submodels), usual if thresholds is None else tuple(thresholds))

    def check(self, layers: int) -> None:
        """Raise UsageError unless the last sub-model is a whole model of ``layers`` layers."""
        if self.submodels[-1] != layers:
            raise UsageError(
                f"submodels={self.submodels}: the last one must be the whole model, which has {layers} layers"
            )

    @property
    def used(self) -> tuple[int, ...]:
        """The sub-models that a token can get to: none lies behind a threshold of 0."""
        return self.submodels[: (*self.thresholds[:-1], 0.0).index(0) + 1]

    def save(self, folder: Path) -> None:
        (folder / FILE).write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")

    @staticmethod
    def beside(checkpoint: str | Path) -> Nested | None:
        """What is written beside a checkpoint, a folder or hub id; None where nothing is.

        Raises:
            UsageError: a file that cannot be understood.
        """
        try:
            file = cached_file(str(checkpoint), FILE)
        except OSError:  # no such file there, or a model made in memory
            return None
        assert file is not None
        try:
            values = json.loads(Path(file).read_text(encoding="utf-8"))
            return Nested(tuple(map(int, values["submodels"])), tuple(map(float, values["thresholds"])))
        except (ValueError, TypeError, KeyError) as error:
            raise UsageError(
                f'{file}: not {{"submodels": [2, 4, 6], "thresholds": [0.5, 0.5, 0]}} ({type(error).__name__}: '
                f"{error}); mend it, or give submodels= and thresholds="
            ) from error
