"""Draft trees, probes and proposals: what a drafter hands to one step.

Shapes: N nodes, Q probes, V vocabulary, R rows of draft probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cache, cached_property

import numpy as np
import torch

from specdec.errors import UsageError
from specdec.jit import njit


class Law(IntEnum):
    """The distribution a drafted token was really drawn from, given everything decided before it.

    POINT: chosen by a rule without randomness (argmax, top-k, look-up).
    IID: drawn from the parent's row of q, independently of its siblings (SpecInfer, arXiv 2305.09781).
    WOR: drawn from the parent's row of q without replacement: every earlier sibling's token, whatever
    its own law, is zeroed and the row renormalised (RSD, arXiv 2402.14160).
    """

    POINT = 0
    IID = 1
    WOR = 2


@njit
def _shape(parents: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Depths [N], ancestors [N, N], and the first node whose parent does not precede it (0: there is none)."""
    n = len(parents)
    depth = np.zeros(n, dtype=np.int64)
    ancestors = np.zeros((n, n), dtype=np.bool_)
    ancestors[0, 0] = True
    for i in range(1, n):
        parent = parents[i]
        if not 0 <= parent < i:
            return depth, ancestors, i
        depth[i] = depth[parent] + 1
        ancestors[i, : parent + 1] = ancestors[parent, : parent + 1]
        ancestors[i, i] = True
    return depth, ancestors, 0


class Topology:
    """The immutable shape of a draft tree.

    Node 0 is the root; every parent precedes its children; children are tried in index order.

    Attributes:
        parents: N ints, ``parents[0] == -1``; ``above`` is the same as int64 [N].
        depth: int64 [N], ``depth[0] == 0``.
        ancestors: bool [N, N], ``ancestors[i, j]`` when j is i or an ancestor of i.
    """

    def __init__(self, parents: Sequence[int] | np.ndarray):
        self.above = above = np.array(parents, dtype=np.int64)
        self.parents: tuple[int, ...] = tuple(above.tolist())
        if not self.parents or self.parents[0] != -1:
            raise UsageError(f"parents must start with -1 (the root), got {self.parents[:3]}")
        self.depth, self.ancestors, wrong = _shape(above)
        if wrong:
            raise UsageError(f"parents[{wrong}] = {above[wrong]} must name an earlier node (0..{wrong - 1})")
        self.max_depth = int(self.depth.max())
        self._on_device: dict[torch.device, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self.parents)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Topology) and self.parents == other.parents

    def __hash__(self) -> int:
        return hash(self.parents)

    def __repr__(self) -> str:
        return f"Topology({len(self)} nodes, depth {self.max_depth})"

    def mask(self, device: torch.device) -> torch.Tensor:
        """``ancestors`` as a bool tensor [N, N], moved to the device once."""
        if device not in self._on_device:
            self._on_device[device] = torch.from_numpy(self.ancestors).to(device)
        return self._on_device[device]

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """Per node its children in trial order."""
        children: list[list[int]] = [[] for _ in self.parents]
        for i, parent in enumerate(self.parents[1:], start=1):
            children[parent].append(i)
        return tuple(map(tuple, children))

    @cached_property
    def levels(self) -> tuple[tuple[int, ...], ...]:
        """Nodes by depth; ``levels[0] == (0,)``."""
        return tuple(tuple(np.flatnonzero(self.depth == d).tolist()) for d in range(self.max_depth + 1))

    def path(self, node: int) -> list[int]:
        """Nodes from the root's child down to ``node``, the root left out."""
        nodes: list[int] = []
        while node > 0:
            nodes.append(node)
            node = self.parents[node]
        return nodes[::-1]

    @staticmethod
    @cache
    def chain(length: int) -> Topology:
        """The root followed by ``length`` nodes, one child each."""
        return Topology(range(-1, length))

    @staticmethod
    @cache
    def branching(factors: tuple[int, ...]) -> Topology:
        """Every node of depth d has ``factors[d]`` children (RSD-C's b; MCSD's ``k_config``)."""
        parents, level = [-1], [0]
        for factor in factors:
            if factor < 1:
                raise UsageError(f"branching factors must be at least 1, got {factors}")
            start = len(parents)
            parents += [node for node in level for _ in range(factor)]
            level = list(range(start, len(parents)))
        return Topology(parents)


_ROOT = Topology.chain(0)


@dataclass(frozen=True)
class DraftTree:
    """Candidate tokens on a topology, and the law each was drawn from.

    A sampled tree must never be pruned by token or score after drawing: that changes the law
    (standard_verification, PO3). Cutting by depth or keeping only first children is safe.

    Attributes:
        topology: shape.
        tokens: int64 [N]; ``tokens[0]`` is the root, the last committed token.
        law: ``Law`` per node, int8 [N]; None when every node is POINT.
        q_row: int64 [N], the row of ``q`` a sampled node was drawn from (ignored for POINT).
        q: float32 [R, V], probabilities ACTUALLY sampled from, after the drafter's own processing.
        prior: float32 [N], the drafter's guess of the chance that a node is accepted once its parent is; None if it
            has none. It steers budgets and never the law.

    Raises:
        UsageError: sampled nodes without q, or arrays that do not fit the topology.
    """

    topology: Topology
    tokens: np.ndarray
    law: np.ndarray | None = None
    q_row: np.ndarray | None = None
    q: torch.Tensor | None = None
    prior: np.ndarray | None = None

    def __post_init__(self) -> None:
        n = len(self.topology)
        if len(self.tokens) != n:
            raise UsageError(f"tokens has {len(self.tokens)} entries for a tree of {n} nodes")
        if self.law is not None and self.law[1:].any():
            if self.q is None or self.q_row is None:
                raise UsageError("law: IID and WOR nodes need q and q_row, the probabilities they were drawn from")
            if len(self.law) != n or len(self.q_row) != n:
                raise UsageError(f"law and q_row need {n} entries, got {len(self.law)} and {len(self.q_row)}")

    def __len__(self) -> int:
        return len(self.topology)

    @staticmethod
    def root(token: int) -> DraftTree:
        """A tree that drafts nothing: plain decoding."""
        return DraftTree(_ROOT, np.array([token], dtype=np.int64))

    @staticmethod
    def chain(root: int, drafted: Sequence[int]) -> DraftTree:
        """A POINT chain below the root."""
        return DraftTree(Topology.chain(len(drafted)), np.array([root, *drafted], dtype=np.int64))

    def _take(self, nodes: list[int]) -> DraftTree:
        """The sub-tree of ``nodes`` (ascending, closed under parents); laws and q rows go with them."""
        new = {old: i for i, old in enumerate(nodes)}
        parents = [-1] + [new[self.topology.parents[v]] for v in nodes[1:]]
        pick = np.array(nodes)
        law = None if self.law is None else self.law[pick]
        q_row = None if self.q_row is None else self.q_row[pick]
        prior = None if self.prior is None else self.prior[pick]
        return DraftTree(Topology(parents), self.tokens[pick], law, q_row, self.q, prior)

    def drawn(self) -> DraftTree:
        """Without nodes of probability 0 under their q: a support smaller than the number of children asked for.

        Whether such a node exists depends on q alone and not on which tokens were drawn, so the law stays exact.
        """
        if self.q is None or self.q_row is None:
            return self
        nodes = torch.arange(1, len(self))
        q_rows, tokens = torch.from_numpy(self.q_row)[nodes], torch.from_numpy(self.tokens)[nodes]
        real = (self.q[q_rows.to(self.q.device), tokens.to(self.q.device)] > 0).tolist()
        if all(real):
            return self
        keep = [0]
        for v, exists in zip(nodes.tolist(), real, strict=True):
            if exists and self.topology.parents[v] in keep:
                keep.append(v)
        return self._take(keep)

    def cut(self, depth: int) -> DraftTree:
        """Without the nodes deeper than ``depth``: safe for every law."""
        if self.topology.max_depth <= depth:
            return self
        return self._take(np.flatnonzero(self.topology.depth <= depth).tolist())

    def principal_chain(self) -> DraftTree:
        """The chain of first children. Safe for every law, since it looks at order and not at tokens."""
        nodes, topology = [0], self.topology
        while topology.children[nodes[-1]]:
            nodes.append(topology.children[nodes[-1]][0])
        return self if len(nodes) == len(self) else self._take(nodes)


@dataclass(frozen=True, eq=False)
class ProbeLayout:
    """Where probes stand and what they see besides prefix, pending, anchor and the anchor's ancestors.

    Attributes:
        anchor: int64 [Q], the node a probe hangs under.
        offset: int64 [Q], position = the anchor's position + offset.
        see: bool [Q, Q], ``see[i, j]`` when probe i may attend to probe j (itself included).
        kind: int64 [Q], free for the drafter (mask number, window row ...).
    """

    anchor: np.ndarray
    offset: np.ndarray
    see: np.ndarray
    kind: np.ndarray

    def __post_init__(self) -> None:
        q = len(self.anchor)
        if len(self.offset) != q or len(self.kind) != q or self.see.shape != (q, q):
            raise UsageError(f"probe layout: anchor has {q} probes, see is {self.see.shape}, they must agree")
        if not self.see.diagonal().all():
            raise UsageError("see: every probe must see itself")

    def __len__(self) -> int:
        return len(self.anchor)


@dataclass(frozen=True)
class Probes:
    """Extra columns of the forward that are read and never emitted; ``tokens`` int64 [Q]."""

    layout: ProbeLayout
    tokens: np.ndarray

    def __len__(self) -> int:
        return len(self.layout)


@dataclass
class Proposal:
    """What one row wants from this step.

    Attributes:
        tree: None lets the row skip this forward.
        probes: extra columns hung under the tree's nodes.
        trusted: tokens committed unverified before the forward; the tree's root is then the last of them.
    """

    tree: DraftTree | None = None
    probes: Probes | None = None
    trusted: Sequence[int] = field(default_factory=tuple)

    def __post_init__(self) -> None:
        if self.probes is not None and (
            self.tree is None or self.probes.layout.anchor.max(initial=0) >= len(self.tree)
        ):
            raise UsageError("probes: every anchor must be a node of the proposal's tree")
