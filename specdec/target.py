"""The model being accelerated: one forward over prefix, pending tokens, draft trees and probes of a ragged batch.

Columns of a step, for every row alike: ``[left pad | pending without root | nodes, pad | probes, pad]``. Padding sees
itself only. In the cache, rows have their own lengths (see ``cache``).

Shapes: B rows, C step columns, N nodes, Q probes, V vocabulary, d hidden size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from specdec.cache import TreeCache
from specdec.capability import Capability, detect
from specdec.compiling import Compilation, Mode, compile_steps
from specdec.errors import CompatibilityError, UsageError
from specdec.graphs import Graphs
from specdec.sharding import Ranks, input_device, mirrored, placement, ranks_of
from specdec.structure import NOTHING, Head, Needs, ProbeColumns, Tap, Taps, text_config
from specdec.tree import Probes, Proposal
from specdec.tree_attention.config import MAX_COLUMNS
from specdec.tree_attention.masks import additive, step_mask
from specdec.tree_attention.registration import NAMES
from specdec.tree_attention.step import Step, StepMask


@dataclass
class StepOutput:
    """What one target forward produced.

    Attributes:
        logits: [B, N, V] raw logits of the nodes; rows with fewer nodes are padded.
        taps: tap -> hidden states [B, C, d] of all columns.
        root: column of each row's root in ``taps``.
        pending: pending columns before the root, per row.
        nodes: nodes per row; 0 for a row that skipped the forward.
        probes: column of each row's first probe.
        kept: columns that entered the cache, per row, in order; set by ``Target.commit``.
    """

    logits: torch.Tensor
    taps: dict[Tap, torch.Tensor]
    root: list[int]
    pending: list[int]
    nodes: list[int]
    probes: list[int]
    bases: list[int]
    kept: list[list[int]] | None = None
    _top: np.ndarray | None = field(default=None, init=False, repr=False)

    def top(self, k: int) -> np.ndarray:
        """int64 [B, N, k], the k likeliest tokens after each node, likeliest first, on the host (read once)."""
        k = min(k, self.logits.shape[-1])
        if self._top is None or self._top.shape[-1] < k:
            self._top = self.logits.topk(k, dim=-1).indices.cpu().numpy()
        return self._top[..., :k]

    def node_hidden(self, tap: Tap, row: int, node: int) -> torch.Tensor:
        """Hidden state [d] of one node."""
        return self.taps[tap][row, self.root[row] + node]

    def probe_hidden(self, tap: Tap, row: int) -> torch.Tensor:
        """Hidden states [Q, d] of a row's probes, trailing padding included."""
        return self.taps[tap][row, self.probes[row] :]

    def kept_hidden(self, tap: Tap, row: int) -> torch.Tensor:
        """Hidden states [K, d] of the columns that entered the cache, in order."""
        assert self.kept is not None, "kept is known after commit"
        return self.taps[tap][row, self.kept[row]]


@dataclass
class _Columns:
    """One forward's inputs on the host."""

    ids: np.ndarray  # int64 [B, C]
    positions: np.ndarray  # int64 [B, C]
    block: np.ndarray | None  # bool [B, C, C]; None: the lone tree's own mask
    pending: int  # width P of the pending part
    nodes: int  # width N of the node part


class Target:
    """Wraps any Hugging Face causal LM without changing it.

    Args:
        model: in eval mode.
        needs: hidden states to tap and layers to hook.
        tokenizer: the model's, for drafters that keep files of token ids.
        compile_mode: see ``compiling.compile_steps``.

    Attributes:
        capability: tier ("tree", "chain", "none") and the reason, and whether steps run on the kernel.
        attention: what runs them otherwise, "sdpa" or "eager"; it takes the prompt's long steps in any case.
        lengths: committed columns per row.
        row_ids: the caller's names of the rows in the cache, in order.
        forwards: target forwards run by ``step``, and ``scratch_forwards`` by ``forward``.
        compilation: whether steps are compiled, and why.
        ranks: the processes that hold the model together (tensor parallelism, see ``sharding``); None: this one alone.
        placement: where its weights are, in words; None when they are all on one device.

    Raises:
        CompatibilityError: tier "none", needs that the model cannot meet, or FSDP, ZeRO-3 or pipeline stages.
        UsageError: the model is in training mode.
    """

    def __init__(
        self, model: PreTrainedModel, needs: Needs = NOTHING, tokenizer: Any = None, compile_mode: Mode = "off"
    ):
        if model.training:
            raise UsageError("model is in training mode, dropout would change its text; call model.eval() first")
        self.model, self.tokenizer, self.compile_mode = model, tokenizer, compile_mode
        self.config = text_config(model)
        self.vocab_size: int = self.config.vocab_size
        self.ranks: Ranks | None = ranks_of(model)
        self.number = self.ranks.add(self) if self.ranks is not None else 0
        self.placement = placement(model, self.ranks)
        self.device: torch.device = input_device(model)
        self.context: int | None = getattr(self.config, "max_position_embeddings", None)
        self.inputs = inspect.signature(model.forward).parameters  # names the model's forward takes
        self.run: Callable[..., Any] = model  # what usual steps call; see ``compile``
        self.compilation = Compilation("off", "not asked for")
        self._heads: Head | None = None
        self._taps: Taps | None = None
        self.forwards = self.scratch_forwards = 0
        self.caches: list[TreeCache] = []
        self.row_ids: list[int] = []
        self._set_masks()
        self.capability = Capability("tree", "not yet tested")
        self.capability = detect(self)
        if self.capability.tier == "none":
            raise CompatibilityError(f"{type(model).__name__} cannot be decoded by specdec: {self.capability.reason}")
        self.forwards = self.scratch_forwards = 0
        self.bind(needs)

    # ---- what the model wants -------------------------------------------------------------------------------

    def _set_masks(self) -> None:
        """How this model reads masks: kinds of layers, boolean or additive."""
        config = self.config
        kinds = set(getattr(config, "layer_types", None) or [])
        if not kinds:
            windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
            kinds = {"sliding_attention" if windowed else "full_attention"}
        self.layer_kinds = sorted(kinds)
        implementation = self.model.config._attn_implementation
        # flash takes no tree mask and flex aborts on one: those steps run on sdpa, or eager where sdpa is missing, or
        # silently leaves out a softcap that flash and flex apply (transformers before 5.18)
        sound = getattr(self.model, "_supports_sdpa", False) and not getattr(config, "attn_logit_softcapping", None)
        fallback = "sdpa" if sound else "eager"
        self.attention = implementation if implementation in ("sdpa", "eager") else fallback
        self._own_attention = implementation

    @property
    def uses_kernel(self) -> bool:
        """Steps of up to ``MAX_COLUMNS`` columns run on the tree attention kernel."""
        return self.capability.tier == "tree" and self.capability.stock is None

    @contextmanager
    def session(self) -> Iterator[None]:
        """Decode inside this: attention that takes tree masks, restored afterwards."""
        if self.config.vocab_size != self.vocab_size:
            raise UsageError(
                f"model: its vocabulary changed from {self.vocab_size} to {self.config.vocab_size} tokens after it was "
                "wrapped; make a new Decoder"
            )
        self._attend(NAMES[self.attention] if self.uses_kernel else self.attention)
        try:
            with torch.inference_mode():
                yield
        finally:
            self._attend(self._own_attention)

    @mirrored
    def _attend(self, implementation: str) -> None:
        """Switch the model's attention, with no cache open."""
        self.caches = []
        if implementation != self.model.config._attn_implementation:
            self.model.set_attn_implementation(implementation)

    def bind(self, needs: Needs, wishes: Needs = NOTHING) -> None:
        """Install the hooks for ``needs``, replacing earlier ones, and for ``wishes`` if the model can meet them."""
        if self._taps is not None:
            self._taps.remove()
            self._taps = None
        if wishes:
            try:
                return self.bind(needs | wishes)
            except CompatibilityError:
                pass  # a wish: the drafter sees that the tap is missing
        if needs:
            if needs.hooks and self.capability.tier != "tree":
                raise CompatibilityError(f"layer hooks need a tree-capable model: {self.capability.reason}")
            final = self.head.final if needs.final_hidden or self.config.num_hidden_layers in needs.layers else None
            self._taps = Taps(self.model, needs, final)

    @property
    def head(self) -> Head:
        """The output head, checked against the model at first use."""
        if self._heads is None:
            with torch.inference_mode():
                self._heads = Head(self.model, torch.arange(3, 11, device=self.device)[None] % self.vocab_size)
        return self._heads

    @mirrored
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits float32 [..., V] of final hidden states [..., d], softcap and scale included."""
        return self.head(hidden)

    def compile(self) -> None:
        """Compile the model's forward for the usual steps, as ``compile_mode`` says. Call it when the taps are bound.

        Raises:
            CompatibilityError: see ``compiling.compile_steps``.
        """
        compiled, self.compilation = compile_steps(self, self.compile_mode)
        self.run = compiled or self.model
        self.forwards = 0

    # ---- cache ----------------------------------------------------------------------------------------------

    @mirrored
    def open(self, row_ids: Sequence[int], capacity: int) -> None:
        """Empty caches for these rows, ``capacity`` columns each at first.

        A chain-tier model takes no mask for ragged rows, so each of its rows has a cache of its own.
        """
        layers = self.config.num_hidden_layers
        sizes = [len(row_ids)] if self.capability.tier == "tree" else [1] * len(row_ids)
        if isinstance(self.run, Graphs):
            self.caches = [self.run.cache(sizes[0], capacity)]
        else:
            self.caches = [TreeCache(layers, size, capacity) for size in sizes]
        self.row_ids = list(row_ids)

    @property
    def lengths(self) -> list[int]:
        return [length for cache in self.caches for length in cache.lengths]

    @mirrored
    def align(self, row_ids: Sequence[int]) -> None:
        """Drop the rows not in ``row_ids`` (which are in cache order)."""
        if list(row_ids) == self.row_ids:
            return
        keep = [self.row_ids.index(r) for r in row_ids]
        if len(self.caches) == 1:
            self.caches[0].select(keep)
        else:
            self.caches = [self.caches[i] for i in keep]
        self.row_ids = list(row_ids)

    @mirrored
    def truncate(self, lengths: Sequence[int]) -> None:
        """Forget committed columns beyond ``lengths`` per row."""
        for cache, rows in self._groups():
            cache.lengths = [min(cache.lengths[i], lengths[b]) for i, b in enumerate(rows)]
            cache.crop_to(max(cache.lengths))

    def adopt(
        self, layers: Sequence[tuple[torch.Tensor | None, torch.Tensor | None]], length: int, pads: Sequence[int]
    ) -> None:
        """Fill the empty caches from another cache of the same model.

        Args:
            layers: keys and values [B, H, T, D] per layer; sliding layers may hold only their last T tokens.
            length: tokens cached per row, padding included.
            pads: leading padding per row, which is left behind.
        """
        for cache, rows in self._groups():
            for layer, (keys, values) in zip(cache.layers, layers, strict=False):
                if keys is None or values is None or keys.shape[2] == 0:
                    continue
                keys, values = keys[:, :, :length], values[:, :, :length]  # static caches have room behind
                missing = length - keys.shape[2]
                layer.width = 0
                filled = [torch.nn.functional.pad(t[rows], (0, 0, missing, 0)) for t in (keys, values)]
                shifted = [torch.stack([t[i].roll(-pads[b], dims=1) for i, b in enumerate(rows)]) for t in filled]
                layer.update(*shifted)
            cache.lengths = [length - pads[b] for b in rows]
            cache.crop_to(max(cache.lengths))

    def export(self, pads: Sequence[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values per layer as transformers keeps them: [B, H, pad + length, D], padding zero.

        All rows must have the same padded length.
        """
        layers = []
        for parts in zip(*(cache.layers for cache in self.caches), strict=True):
            if not parts[0].is_initialized:
                continue
            rows: list[list[torch.Tensor]] = [[], []]
            for (_, members), part, cache in zip(self._groups(), parts, self.caches, strict=True):
                for i, b in enumerate(members):
                    for out, t in zip(rows, (part.keys, part.values), strict=True):
                        out.append(torch.nn.functional.pad(t[i, :, : cache.lengths[i]], (0, 0, pads[b], 0)))
            layers.append((torch.stack(rows[0]), torch.stack(rows[1])))
        return layers

    def _groups(self) -> Iterator[tuple[TreeCache, list[int]]]:
        """Caches with the rows they hold."""
        start = 0
        for cache in self.caches:
            yield cache, list(range(start, start + len(cache.lengths)))
            start += len(cache.lengths)

    # ---- one step -------------------------------------------------------------------------------------------

    @property
    def _inputs_on(self) -> torch.device:
        """Where a step's inputs are made: graphs take them from the host, all in one piece."""
        return torch.device("cpu") if isinstance(self.run, Graphs) else self.device

    def tapped(self, inputs: dict[str, Any], on: bool) -> tuple[torch.Tensor, dict[Tap, torch.Tensor]]:
        """The model's forward without probes: logits, and what was tapped if taps are ``on``."""
        taps = self._taps if on else None
        if taps is not None:
            taps.start([])
        logits = self.model(**inputs).logits
        return logits, taps.stop() if taps is not None else {}

    def step(self, tokens: Sequence[np.ndarray], proposals: Sequence[Proposal | None]) -> StepOutput:
        """One forward over every row's pending tokens, tree and probes.

        Args:
            tokens: per row the committed tokens, int64 [n]; those beyond the cache are pending, root last.
            proposals: per row; None or a tree of None skips the row.
        """
        parts = [self._step_group(g, rows, tokens, proposals) for g, (_, rows) in enumerate(self._groups())]
        self.forwards += 1
        return parts[0] if len(parts) == 1 else _merge(parts)

    def _step_group(
        self, g: int, rows: list[int], tokens: Sequence[np.ndarray], proposals: Sequence[Proposal | None]
    ) -> StepOutput:
        cache = self.caches[g]
        asked = [p if p is not None and p.tree is not None else None for p in (proposals[b] for b in rows)]
        mine = [tokens[b] for b in rows]
        pending = [len(t) - n - 1 if p else 0 for t, n, p in zip(mine, cache.lengths, asked, strict=True)]
        nodes = [len(p.tree) if p and p.tree else 0 for p in asked]
        if not any(nodes):  # a chain-tier row that skips
            return StepOutput(torch.empty(len(rows), 0, self.vocab_size), {}, [0], pending, nodes, [0], [cache.width])
        columns = self._columns(cache, mine, asked, pending)
        first = columns.pending
        keep = slice(first, first + columns.nodes)
        base = cache.width
        if columns.block is None:
            lone = asked[0]
            assert lone is not None
            assert lone.tree is not None
            block = lone.tree.topology.mask(self._inputs_on)[None]
        else:
            block = torch.from_numpy(columns.block)
        ids, positions = torch.from_numpy(columns.ids), torch.from_numpy(columns.positions)
        logits, taps = self._run(g, ids, positions, block, keep, [p.probes if p else None for p in asked])
        count = len(rows)
        return StepOutput(logits, taps, [first] * count, pending, nodes, [keep.stop] * count, [base])

    def _columns(
        self, cache: TreeCache, tokens: list[np.ndarray], asked: list[Proposal | None], pending: list[int]
    ) -> _Columns:
        rows, lone = len(tokens), asked[0]
        if rows == 1 and lone and lone.tree and not pending[0] and not lone.probes:  # the usual step, made quick
            positions = cache.lengths[0] + lone.tree.topology.depth
            # reshape and not [None], whose stride of 0 a compiled forward would take for another kind of input
            return _Columns(lone.tree.tokens.reshape(1, -1), positions.reshape(1, -1), None, 0, len(lone.tree))
        width_p = max(pending)
        width_n = max(len(p.tree) if p and p.tree else 0 for p in asked)
        width_q = max(len(p.probes) if p and p.probes else 0 for p in asked)
        c = width_p + width_n + width_q
        ids = np.zeros((rows, c), dtype=np.int64)
        positions = np.zeros((rows, c), dtype=np.int64)
        block = np.zeros((rows, c, c), dtype=bool)
        block[:, range(c), range(c)] = True
        for b, (proposal, p) in enumerate(zip(asked, pending, strict=True)):
            if proposal is None or proposal.tree is None:
                continue
            tree, length = proposal.tree, cache.lengths[b]
            before, first = width_p - p, width_p
            end = first + len(tree)
            ids[b, before:first] = tokens[b][length : length + p]
            positions[b, before:first] = np.arange(length, length + p)
            if p:
                block[b, before:first, before:first] = np.tri(p, dtype=bool)
                block[b, first:end, before:first] = True
            ids[b, first:end] = tree.tokens
            positions[b, first:end] = length + p + tree.topology.depth
            block[b, first:end, first:end] = tree.topology.ancestors
            if proposal.probes:
                layout = proposal.probes.layout
                start = first + width_n
                stop = start + len(layout)
                ids[b, start:stop] = proposal.probes.tokens
                at = positions[b, first + layout.anchor] + layout.offset
                # a learned position table ends; a probe beyond it is only a worse guess
                positions[b, start:stop] = at if self.context is None else np.minimum(at, self.context - 1)
                block[b, start:stop, before:first] = True
                block[b, start:stop, first:end] = tree.topology.ancestors[layout.anchor]
                block[b, start:stop, start:stop] = layout.see
        return _Columns(ids, positions, block, width_p, width_n)

    @mirrored
    def _run(
        self,
        g: int,
        ids: torch.Tensor,
        positions: torch.Tensor,
        block: torch.Tensor,
        keep: slice,
        probes: Sequence[Probes | None] | None,
        earlier: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[Tap, torch.Tensor]]:
        """Append columns to cache ``g``; logits [B, keep, V] of columns ``keep``, and what was tapped.

        Args:
            probes: of each row, behind the columns ``keep``; None leaves the taps off.
        """
        cache, columns = self.caches[g], ids.shape[1]
        # a text's start and steps with pending tokens or probes have shapes that come once
        usual = cache.width > 0 and keep == slice(0, columns)
        if usual and isinstance(self.run, Graphs) and self.run.takes(cache, columns):
            on = probes is not None and self._taps is not None
            return self.run(cache, ids.cpu(), positions.cpu(), block.cpu(), earlier, on)
        ids, positions, block = (t.to(self.device) for t in (ids, positions, block))
        earlier = earlier if earlier is None else earlier.to(self.device)
        taps = self._taps if probes is not None else None
        if taps is not None:
            taps.start(
                [
                    ProbeColumns(
                        i,
                        torch.from_numpy(p.layout.anchor + keep.start).to(self.device),
                        torch.arange(keep.stop, keep.stop + len(p), device=self.device),
                        p,
                    )
                    for i, p in enumerate(probes or ())
                    if p is not None
                ]
            )
        inputs: dict[str, Any] = {"input_ids": ids, "past_key_values": cache, "use_cache": True}
        if "position_ids" in self.inputs:
            inputs["position_ids"] = positions
        if self.capability.tier == "tree":
            if (self.uses_kernel and columns <= MAX_COLUMNS) or not self._is_causal(cache, block):
                inputs["attention_mask"] = self._mask(cache, block, positions, earlier)
        else:
            inputs["attention_mask"] = torch.ones(1, cache.width + columns, dtype=torch.long, device=self.device)
        run = self.run if usual and not isinstance(self.run, Graphs) else self.model
        if "logits_to_keep" in self.inputs:
            last = columns - keep.start if keep.stop == columns else None
            inputs["logits_to_keep"] = last or torch.arange(keep.start, keep.stop, device=self.device)
            logits = run(**inputs).logits
        else:
            logits = run(**inputs).logits[:, keep]
        cache.advance(columns)
        return logits, taps.stop() if taps is not None else {}

    def _is_causal(self, cache: TreeCache, block: torch.Tensor) -> bool:
        """One row with one column, or a text's start as a chain: the model's own mask is right, and cheaper."""
        rows, columns, seen = block.shape
        if rows > 1 or seen > columns:
            return False
        return columns == 1 or (cache.width == 0 and bool(block.equal(block.new_ones(block.shape).tril_())))

    def _mask(
        self, cache: TreeCache, block: torch.Tensor, positions: torch.Tensor, earlier: torch.Tensor | None
    ) -> Any:
        base = cache.width - (block.shape[2] - block.shape[1])

        def of_kind(kind: str) -> torch.Tensor:
            window, chunk = self.reach(kind)
            if self.uses_kernel and block.shape[1] <= MAX_COLUMNS:
                return StepMask.of(Step.build(cache.lengths, base, block, positions, window, chunk, earlier))
            mask = step_mask(cache.lengths, base, block, positions, window, chunk, earlier)
            return mask if self.attention == "sdpa" else additive(mask, self.model.dtype)

        if len(self.layer_kinds) > 1:
            return {kind: of_kind(kind) for kind in self.layer_kinds}
        return of_kind(self.layer_kinds[0])

    def reach(self, kind: str) -> tuple[int | None, int | None]:
        """Sliding window and chunk, in positions, of layers of a kind."""
        window = self.config.sliding_window if kind == "sliding_attention" else None
        return window, self.config.attention_chunk_size if kind == "chunked_attention" else None

    def commit(self, output: StepOutput, paths: Sequence[Sequence[int]]) -> list[list[int]]:
        """Keep pending, root and the nodes of ``paths`` (root left out) of every row that took part.

        Returns:
            ``output.kept``: the columns kept, per row.
        """
        kept = [
            [*range(root - pending, root + 1), *(root + v for v in path)] if nodes else []
            for root, pending, nodes, path in zip(output.root, output.pending, output.nodes, paths, strict=True)
        ]
        self._keep(output.bases, kept)
        output.kept = kept
        return kept

    @mirrored
    def _keep(self, bases: Sequence[int], kept: Sequence[list[int]]) -> None:
        for (cache, rows), base in zip(self._groups(), bases, strict=True):
            cache.keep(base, [kept[b] for b in rows])

    # ---- whole texts, for training ------------------------------------------------------------------------------

    def read(self, ids: torch.Tensor, needs: Needs) -> dict[Tap, torch.Tensor]:
        """Hidden states of whole texts in one forward without a cache, and without gradients.

        Args:
            ids: int64 [B, S]; padding, if any, on the right, where a causal model's real tokens do not see it.
            needs: what to tap; hooks are not run.

        Returns:
            tap -> [B, S, d].
        """
        needs = Needs(needs.final_hidden, needs.pre_norm_hidden, needs.layers)
        taps = Taps(self.model, needs, self.head.final)
        inputs: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in self.inputs else {}
        try:
            taps.start([])
            with torch.no_grad():
                self.model(input_ids=ids.to(self.device), use_cache=False, **inputs)
            return taps.stop()
        finally:
            taps.remove()

    # ---- scratch forwards, for drafters that are models themselves --------------------------------------------

    @contextmanager
    def scratch(self) -> Iterator[None]:
        """Columns that ``forward`` writes inside are forgotten at the end."""
        widths = [cache.width for cache in self.caches]
        self._scratch: list[torch.Tensor | None] = [None] * len(self.caches)  # positions [B, E] of what was written
        try:
            yield
        finally:
            self._crop(widths)

    @mirrored
    def _crop(self, widths: Sequence[int]) -> None:
        for cache, width in zip(self.caches, widths, strict=True):
            cache.crop_to(width)

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """A low-level forward in scratch columns, counted apart from target forwards.

        Args:
            tokens: int64 [B, W].
            positions: int64 [B, W].
            visible: bool [B, W, S], S = scratch columns so far, these W included. The prefix is always visible.

        Returns:
            logits [B, W, V].
        """
        self.scratch_forwards += 1
        parts = []
        everything = slice(0, tokens.shape[1])
        for g, (_, rows) in enumerate(self._groups()):
            earlier = self._scratch[g]
            at = positions[rows].to(self._inputs_on)
            logits, _ = self._run(g, tokens[rows], at, visible[rows], everything, None, earlier)
            parts.append(logits)
            self._scratch[g] = at if earlier is None else torch.cat([earlier, at], dim=1)
        return torch.cat(parts)


def _merge(parts: list[StepOutput]) -> StepOutput:
    """One output for rows that were forwarded one by one (chain tier)."""

    def stack(tensors: list[torch.Tensor]) -> torch.Tensor:  # [1, n, x] each -> [B, max n, x]
        widest = max(t.shape[1] for t in tensors)
        return torch.cat([torch.nn.functional.pad(t, (0, 0, 0, widest - t.shape[1])) for t in tensors])

    ran = [p for p in parts if any(p.nodes)]
    taps = {}
    for tap, like in ran[0].taps.items() if ran else ():
        taps[tap] = stack([p.taps.get(tap, like[:, :0]) for p in parts])
    return StepOutput(
        stack([p.logits.to(ran[0].logits) if ran else p.logits for p in parts]),
        taps,
        *([x for p in parts for x in getattr(p, name)] for name in ("root", "pending", "nodes", "probes", "bases")),
    )
