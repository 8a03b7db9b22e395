"""What a step of N columns costs a model on this machine."""

from __future__ import annotations

import statistics
from time import perf_counter
from typing import Any

import numpy as np
import torch

from specdec.target import Target
from specdec.tree import DraftTree, Proposal

COLUMNS = (1, 2, 4, 8, 16, 32, 64)


def measure(target: Target, prefix: int, seconds: float) -> dict[str, Any]:
    """c(N) = t(N) / t(1): a step of N columns after ``prefix`` cached tokens, against a step of one.

    Args:
        target: the model.
        prefix: cached tokens; fewer where the context is short.
        seconds: stop starting rounds after this time; at least 3 are made, at most 41.

    Returns:
        "prefix", "rounds" and "curve": one object per N with "columns", "seconds" (median) and "ratio" c(N).
    """
    if target.context is not None:
        prefix = max(min(prefix, target.context - COLUMNS[-1] - 1), 1)
    tokens = np.arange(3, prefix + 4) % target.vocab_size  # the last one is the root
    proposals = {n: Proposal(DraftTree.chain(int(tokens[-1]), [5] * (n - 1))) for n in COLUMNS}
    times: dict[int, list[float]] = {n: [] for n in COLUMNS}
    with target.session():
        target.open([0], prefix + COLUMNS[-1] + 1)
        first = target.step([tokens[:-1]], [Proposal(DraftTree.root(int(tokens[-2])))])
        target.commit(first, [[]])
        start = perf_counter()
        for n in COLUMNS:
            _step(target, tokens, proposals[n])  # warm-up
        while len(times[1]) < 3 or (perf_counter() - start < seconds and len(times[1]) < 41):
            for n in COLUMNS:  # interleaved, so that a slow moment hits every N
                times[n].append(_step(target, tokens, proposals[n]))
    median = {n: statistics.median(t) for n, t in times.items()}
    curve = [{"columns": n, "seconds": s, "ratio": s / median[1]} for n, s in median.items()]
    return {"prefix": prefix, "rounds": len(times[1]), "curve": curve}


def _step(target: Target, tokens: Any, proposal: Any) -> float:
    """Seconds of one step, which is undone afterwards."""
    before = target.lengths
    start = perf_counter()
    output = target.step([tokens], [proposal])
    if target.device.type == "cuda":
        torch.cuda.synchronize(target.device)
    elapsed = perf_counter() - start
    target.commit(output, [[]])
    target.truncate(before)
    return elapsed
