"""Compiled steps, for those that follow a cached text: the model's own forward as CUDA graphs or through torch.compile.

Graphs are the matter of ``graphs``. Under torch.compile, widths and cache lengths are symbolic, so one graph serves all
steps of a single column and one all wider ones: trees need no padding, and nothing is compiled again while the text
grows. torch keeps compiled kernels on disk, so a second process waits less. Either way prompts and probes run as they
are, as their shapes come once.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch

from specdec.errors import CompatibilityError, first_line
from specdec.graphs import Graphs
from specdec.tree import DraftTree, Proposal, Topology

if TYPE_CHECKING:
    from specdec.target import Target

Mode = Literal["off", "auto", "inductor", "graphs"]
MODES = get_args(Mode)

# graphs per function before torch gives up on it and runs it uncompiled without a word; every batch size of one or
# more, and every set of active taps, has its own
_GRAPHS = 64
_PREFIX = list(range(3, 11))


@dataclass(frozen=True)
class Compilation:
    """Whether steps are compiled.

    Attributes:
        mode: "graphs", "inductor" or "off".
        reason: why.
        seconds: what compiling took so far; 0 if nothing was compiled.
    """

    mode: str
    reason: str
    seconds: float = 0.0

    def __str__(self) -> str:
        return f"{self.mode}, {self.seconds:.1f} s once" if self.mode != "off" else f"off: {self.reason}"


def compile_steps(target: Target, mode: Mode) -> tuple[Callable[..., Any] | None, Compilation]:
    """A compiled stand-in for ``target.model``, tried and compared with it, or None with the reason.

    Args:
        target: with its taps installed.
        mode: "graphs" and "inductor" compile or fail; "auto" compiles where it can, with graphs where steps run on the
            tree attention kernel of a GPU.

    Raises:
        CompatibilityError: "graphs" or "inductor", and this model cannot be compiled so here.
    """
    if mode == "off":
        return None, Compilation("off", "not asked for")
    fast = target.device.type == "cuda" and target.uses_kernel
    how = mode if mode != "auto" else "graphs" if fast else "inductor"
    problem = _obstacle(target, how)
    if problem is None:
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _GRAPHS)
        compiled = Graphs(target) if how == "graphs" else torch.compile(_forward(target), dynamic=True)
        start = perf_counter()
        problem = _try(target, compiled)
        if problem is None:
            return compiled, Compilation(how, "its logits equal the uncompiled model's", perf_counter() - start)
    if mode == "auto":
        return None, Compilation("off", problem)
    raise CompatibilityError(f"compile={mode!r}: {problem}; use compile='off'")


def _forward(target: Target) -> Callable[..., Any]:
    """The model's forward as a function of this target alone.

    torch keeps graphs by code object and does not look at hooks, so a graph of another Decoder on the same model, made
    without the taps of this one, would serve here too.
    """
    model = target.model

    def forward(**inputs: Any) -> Any:
        return model.forward(**inputs)

    forward.__code__ = forward.__code__.replace(co_name=f"forward_{id(target)}")
    return forward


def _obstacle(target: Target, how: str) -> str | None:
    """What stands in the way before anything is tried."""
    if how == "graphs":
        if target.device.type != "cuda":
            return f"CUDA graphs need an NVIDIA GPU, the model is on {target.device.type}"
        if not target.uses_kernel:
            return f"CUDA graphs need the tree attention kernel, which does not run here: {target.capability.stock}"
    elif target.device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++", "cl"))):
        return "there is no C++ compiler, which torch.compile needs on a CPU (install g++)"
    if target.capability.tier != "tree":
        return f"models that take chains only run row by row: {target.capability.reason}"
    if target.placement is not None:
        return f"the model is {target.placement}"
    return None


def _try(target: Target, compiled: Callable[..., Any]) -> str | None:
    """Compile what single rows need and compare; None when all is well."""
    chain, tree = Topology.chain(0), Topology([-1, 0, 0])
    try:
        for topology in (chain, tree):
            for length in (0, 1):  # a second length and cache size, so that both are symbolic from now on
                want, got = (_logits(target, run, topology, length) for run in (target.model, compiled))
                # as far apart as two kernels' roundings; a wrong mask or position is far outside
                scale = float(want.abs().max())
                off = float((got - want).abs().max()) / scale
                if not off < (0.05 if want.dtype != torch.float32 else 1e-3):
                    return f"compiled, its logits are off by {off:.2g} of their largest"
    except Exception as error:  # compilers and foreign modelling code raise whatever they like
        return f"compiling fails ({first_line(error)})"
    return None


def _logits(target: Target, run: Callable[..., Any], topology: Topology, longer: int) -> torch.Tensor:
    """Logits [N, V] of a small tree after a cached text."""
    text = np.array([t % target.vocab_size for t in (_PREFIX * 2)[: len(_PREFIX) + longer]])
    tree = DraftTree(topology, np.array([t % target.vocab_size for t in (11, 12, 13)])[: len(topology)])
    with target.session():
        target.run = run
        try:
            target.open([0], 64 * (1 + longer))
            first = target.step([text], [Proposal(DraftTree.root(int(text[-1])))])
            target.commit(first, [[]])
            return target.step([np.append(text, tree.tokens[0])], [Proposal(tree)]).logits[0].clone()
        finally:
            target.run = target.model
