"""Where a lossless method's greedy text leaves the baseline's: a near tie of two logits, or a bug?

At the first token that differs, the plain model reads the text up to there in one forward. The gap between the two
tokens' logits is what rounding would have to bridge; what the same model differs from itself between forwards of other
shapes is measured beside it, as for `specdec verify`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch

from specdec.bench.certificate import continuation_logits, measure_noise
from specdec.bench.report import replace_text
from specdec.bench.spec_bench.answers import RunFolder
from specdec.bench.spec_bench.metrics import Method, comparable, divergences
from specdec.bench.spec_bench.protocol import Asker
from specdec.bench.spec_bench.questions import Question
from specdec.decoder import Decoder

_PROMPTS, _TOKENS = 4, 128  # most that noise is measured on

FILE = "gaps.json"


@dataclass(frozen=True)
class Gap:
    """One divergence.

    Attributes:
        method, question, run, turn, index: as in ``metrics.Divergence``.
        gap: between the logits of the two tokens; None where one of the texts has ended.
        top: between the best and the second best there; None likewise.
    """

    method: str
    question: int
    run: int
    turn: int
    index: int
    gap: float | None
    top: float | None


@dataclass(frozen=True)
class Gaps:
    """All of a run.

    Attributes:
        dtype: of the model that read the texts.
        allowed: the largest gap that the model's own noise explains; None where there is no divergence.
    """

    dtype: str
    allowed: float | None
    found: list[Gap]


def read_gaps(folder: RunFolder) -> Gaps | None:
    """What ``explain`` has written; None if it has not."""
    file = folder.path / FILE
    if not file.exists():
        return None
    entry = json.loads(file.read_text(encoding="utf-8"))
    return Gaps(entry["dtype"], entry["allowed"], [Gap(**gap) for gap in entry["found"]])


@torch.no_grad()
def explain(
    folder: RunFolder,
    baseline: str,
    asker: Asker,
    questions: Sequence[Question],
    progress: Callable[[int, int, str], None],
) -> None:
    """Measure the gap at every divergence of a greedy run and write them into its folder.

    Args:
        folder: of the run.
        baseline: whose texts the others are compared with.
        asker: of the target.
        questions: of the run.
        progress: called with (done, total, text).
    """
    settings, _ = folder.record()
    if settings["temperature"] > 0:
        return
    numbers = range(1, settings["runs"] + 1)
    read = {(n, r): folder.read(folder.name(n, r)) for n in settings["methods"] for r in numbers}
    methods = [
        Method(n, [read[n, r][0] for r in numbers], [read[n, r][1] for r in numbers]) for n in settings["methods"]
    ]
    (base,) = (m for m in methods if m.name == baseline)
    asked = {q.id: q for q in questions}
    lossless = [m for m in methods if all(d.lossless for run in m.details for d in run.values())]
    parted = [d for d in divergences(lossless, base, comparable(methods)) if d.index is not None]
    found, prompts = [], []
    for done, d in enumerate(parted):
        progress(done, len(parted), "gaps of logits where texts part")
        answer, detail = base.answers[d.run - 1][d.question], base.details[d.run - 1][d.question]
        (mine,) = (m.details[d.run - 1][d.question].ids[d.turn - 1] for m in lossless if m.name == d.method)
        plain, at = detail.ids[d.turn - 1], d.index or 0
        prompt, _ = asker.prompt(asked[d.question].turns[: d.turn], answer.turns[: d.turn - 1])
        prompts.append(prompt)
        gap = top = None
        if at < min(len(plain), len(mine)):
            logits = continuation_logits(asker.model, prompt, plain[: at + 1])[-1]  # [V]
            first, second = logits.topk(2).values.tolist()
            gap, top = float((logits[plain[at]] - logits[mine[at]]).abs()), first - second
        found.append(Gap(d.method, d.question, d.run, d.turn, at, gap, top))
    allowed = None
    if prompts:
        tokens = min(settings["max_new_tokens"], _TOKENS)
        allowed = measure_noise(Decoder(asker.model, "none"), prompts[:_PROMPTS], tokens, progress).gap
    gaps = Gaps(str(asker.model.dtype).removeprefix("torch."), allowed, found)
    replace_text(folder.path / FILE, json.dumps(asdict(gaps), indent=1, allow_nan=False) + "\n")
