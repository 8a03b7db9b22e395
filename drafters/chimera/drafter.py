"""Chimera: state estimates from trigrams and the whole context, one head per depth (Zeng et al., arXiv 2402.15758)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from specdec.cache import TreeCache
from specdec.contracts import Verdict
from specdec.drafters.chimera.module import Chimera as ChimeraHead
from specdec.errors import UsageError
from specdec.heads import Head, HeadDrafter
from specdec.heads.growth import Growth
from specdec.heads.layer import attend
from specdec.state import DecodeState
from specdec.target import StepOutput, Target
from specdec.tree import DraftTree, Proposal


class Chimera(HeadDrafter[ChimeraHead]):
    """Drafts a tree level by level; every node's guess is conditioned on the tokens above it.

    Per level one call of the layer over the ``width`` likeliest nodes. The layer's keys and values of the text are kept
    as long as the request; a draft node's are there for its descendants and forgotten after the step.

    Args:
        checkpoint, size: see ``HeadDrafter``.
        depth: levels of the tree, at most as many as there are heads; None: chosen by the kind of device.
        width: nodes expanded per level, and children asked of each; None: chosen by the kind of device.
        chain: the likeliest node of each level alone, as batched engines run it.

    Raises:
        UsageError: depth outside 1..K, or width below 1.
    """

    name = "chimera"
    summary = "state estimates from trigrams and the whole context, a head per depth, a dynamic tree"
    head_class = ChimeraHead
    cpu_size, gpu_size = 8, 40

    def __init__(
        self,
        checkpoint: Head | str | Path,
        size: int | None = None,
        depth: int | None = None,
        width: int | None = None,
        chain: bool = False,
    ):
        super().__init__(checkpoint, size)
        K = self.head.depths
        if depth is not None and not 1 <= depth <= K:
            raise UsageError(f"depth={depth} must be from 1 to {K}, the heads of this checkpoint")
        if width is not None and width < 1:
            raise UsageError(f"width={width} must be at least 1 (a chain)")
        self._depth = depth
        self._width = 1 if chain else width

    def bind(self, target: Target) -> None:
        super().bind(target)
        cpu, K = target.device.type == "cpu", self.head.depths
        # on a CPU: the fastest of what was tried with the embedded model on training prompts
        self.depth = self._depth or (min(3, K) if cpu else K)
        self.width = self._width or (2 if cpu else 8)
        if target.capability.tier != "tree":  # only a chain can be verified
            self.width = 1

    def begin(self, state: DecodeState) -> None:
        super().begin(state)
        self._rows = [row.index for row in state.rows]
        # layer 0: keys and values of H; layer 1: of the committed trigrams, where estimates see them
        longest = max(len(row.tokens) for row in state.rows)
        self._cache = TreeCache(1 + self.head.all_trigrams, len(self._rows), longest + 256)

    def end(self, state: DecodeState) -> None:
        super().end(state)
        del self._cache

    def _forget_finished(self, state: DecodeState) -> None:
        active = [row.index for row in state.rows]
        if active != self._rows:
            self._cache.select([self._rows.index(i) for i in active])
            self._rows = active

    # ---- the text -------------------------------------------------------------------------------------------------

    def observe(
        self,
        state: DecodeState,
        proposals: Sequence[Proposal | None],
        output: StepOutput,
        verdicts: Sequence[Verdict | None],
    ) -> None:
        """Keep keys and values of what entered the target's cache, and the last hidden state of every row."""
        self._forget_finished(state)
        assert output.kept is not None, "kept is known after commit"
        counts = [len(kept) for kept in output.kept]
        n = max(counts)
        starts = [length - count for length, count in zip(self.target.lengths, counts, strict=True)]
        taps = output.taps["final_hidden"]
        columns = torch.tensor([kept + [0] * (n - len(kept)) for kept in output.kept], device=taps.device)
        H = taps.gather(1, columns[..., None].expand(-1, -1, taps.shape[-1]))  # [B, n, d]
        for row, count, states in zip(state.rows, counts, H, strict=True):
            if count:
                self._hidden[row.index] = states[count - 1]
        positions = torch.tensor(starts, device=H.device)[:, None] + torch.arange(n, device=H.device)
        base = self._cache.width
        self._cache.layers[0].update(*self.head.key_value(H, positions))
        if self.head.all_trigrams:
            ends = [np.arange(start, start + n) for start in starts]
            grams = np.stack([_grams(row.tokens, end) for row, end in zip(state.rows, ends, strict=True)])
            G = self.head.encode(torch.from_numpy(grams).to(H.device), positions)
            self._cache.layers[1].update(*self.head.key_value(G, positions))
        self._cache.advance(n)
        self._cache.keep(base, [list(range(count)) for count in counts])

    # ---- the draft ------------------------------------------------------------------------------------------------

    def propose(self, state: DecodeState) -> list[Proposal | None]:
        roots = [int(row.tokens[-1]) for row in state.rows]
        h = self.hidden(state)
        depth = min(self.depth, self.size - 1, max(state.depth_left(b) for b in range(len(roots))))
        if h is None or depth < 1:
            return [Proposal(DraftTree.root(root)) for root in roots]
        self._forget_finished(state)
        h, device, width = h[:, None], h.device, self._cache.width
        ends = [len(row.tokens) - 1 for row in state.rows]
        last = np.stack([_grams(row.tokens, np.array([end])) for row, end in zip(state.rows, ends, strict=True)])
        grams = torch.from_numpy(last).to(device)  # [B, n, 3], n = 1 and then the frontier's width
        positions = torch.tensor(ends, device=device)[:, None]  # [B, n]
        lengths = torch.tensor(self._cache.lengths, device=device)
        text = (torch.arange(width, device=device) < lengths[:, None])[:, None]  # [B, 1, width]
        sees = torch.ones(len(roots), 1, 1, dtype=torch.bool, device=device)  # [B, n, columns], the root's first
        F = self._estimate(grams, positions, text, sees)
        growth = Growth(self.head.logits(0, h, F)[:, 0], self.width)
        for k in range(1, depth):
            self._leave(F, positions)
            above = grams.gather(1, growth.parent[..., None].expand(-1, -1, 3))
            grams = torch.cat([above[..., 1:], growth.tokens[..., None]], dim=-1)
            positions = (positions[:, :1] + 1).expand_as(growth.tokens)
            sees = torch.cat([sees[:, :1, :1].expand(-1, grams.shape[1], -1), growth.visible], dim=-1)
            F = self._estimate(grams, positions, text, sees)
            growth.extend(self.head.logits(k, h, F))
        self._cache.crop_to(width)
        return [Proposal(tree) for tree in growth.trees(roots, self.size)]

    def _estimate(self, grams: Tensor, positions: Tensor, text: Tensor, sees: Tensor) -> Tensor:
        """F [B, n, d] of draft nodes.

        Args:
            grams: int64 [B, n, 3], each node's last three tokens.
            positions: int64 [B, n].
            text: bool [B, 1, width], the rows' own columns of the cache.
            sees: bool [B, n, columns], draft columns visible so far, these n included.
        """
        G = self.head.encode(grams, positions)
        q, k, v = self.head.query(G, positions)
        text = text.expand(-1, grams.shape[1], -1)
        of_text, of_draft = self._cache.layers[0], self._cache.layers[-1]
        k, v = of_draft.update(k, v)
        self._cache.advance(grams.shape[1])
        visible = torch.cat([text, sees], dim=-1)
        if self.head.all_trigrams:
            k, v = torch.cat([of_text.keys, k], dim=2), torch.cat([of_text.values, v], dim=2)
            visible = torch.cat([text, visible], dim=-1)
        return self.head.fce.finish(G, attend(q, k, v, visible))

    def _leave(self, F: Tensor, positions: Tensor) -> None:
        """A node saw its own trigram; under "own", its descendants see its estimate F [B, n, d] in that place."""
        if not self.head.all_trigrams:
            layer, n = self._cache.layers[-1], F.shape[1]
            layer.keys[:, :, -n:], layer.values[:, :, -n:] = self.head.key_value(F, positions)


def _grams(tokens: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """int64 [n, 3], the trigrams of a text that end at ``ends`` [n], padded on the left with its first token."""
    places = ends[:, None] + np.arange(-2, 1)
    return tokens[places.clip(0, len(tokens) - 1)]
