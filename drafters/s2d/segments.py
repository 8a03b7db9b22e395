"""A model run in segments, so that a token can leave at the end of any of them.

Shapes: n positions, d hidden size, V vocabulary; one row at a time.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from specdec.cache import TreeCache
from specdec.drafters.s2d.nested import Nested
from specdec.errors import CompatibilityError, first_line
from specdec.structure import Needs, decoder_layers
from specdec.target import Target

_CHUNK = 512  # tokens of a text read per forward


class SegmentCache(TreeCache):
    """Keys and values of the layers ``first``, ``first + 1``, ..., which keep their numbers in the model."""

    def __init__(self, first: int, layers: int):
        super().__init__(layers, rows=1, capacity=256)
        self.first = first

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        return super().update(key_states, value_states, layer_idx - self.first, *args, **kwargs)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.width


class Segments:
    """The segments between the sub-models of one model, which is not changed and may be shared.

    Args:
        draft: the model.
        nested: its sub-models.

    Attributes:
        norm: the final norm, which every sub-model has before the head.

    Raises:
        CompatibilityError: its layers, run in segments, are not the model.
    """

    def __init__(self, draft: Target, nested: Nested):
        nested.check(draft.config.num_hidden_layers)
        self.draft, self.nested = draft, nested
        self.ends = nested.used
        self.starts = (0, *self.ends[:-1])
        try:
            self.norm, self.parts = self._cut()
            with torch.inference_mode():
                problem = self._problem()
        except CompatibilityError as error:
            problem = str(error)
        except Exception as error:  # foreign modelling code: whatever it raises is the answer
            problem = f"a segment's forward fails ({first_line(error, 120)})"
        if problem is not None:
            raise CompatibilityError(
                f"draft: {type(draft.model).__name__} cannot be run in nested sub-models: {problem}; use a Llama, "
                "Qwen or Mistral model, or another drafter such as draft-model"
            )

    def logits(self, h: Tensor) -> Tensor:
        """Logits float32 [..., V] of a sub-model from what leaves its last layer, [..., d]."""
        return self.draft.head(self.norm(h))

    def run(self, s: int, x: Tensor, cache: SegmentCache) -> Tensor:
        """Segment s over the n positions after its cache; [1, n, d] before the final norm.

        Args:
            s: number of the segment.
            x: token ids int64 [1, n] for the first one, what left the segment before, [1, n, d], for the others.
            cache: of this segment; appended to.
        """
        n = x.shape[1]
        positions = torch.arange(cache.width, cache.width + n, device=x.device)[None]
        inputs = {"input_ids": x} if s == 0 else {"inputs_embeds": x}
        h: Tensor = self.parts[s](**inputs, position_ids=positions, past_key_values=cache, use_cache=True)[0]
        cache.advance(n)
        return h

    def caches(self) -> list[SegmentCache]:
        """Empty ones."""
        return [SegmentCache(a, b - a) for a, b in zip(self.starts, self.ends, strict=True)]

    def _cut(self) -> tuple[nn.Module, list[nn.Module]]:
        """The final norm, and per segment a shallow copy of the module that runs the layers, with its own ones only."""
        layers, norm = decoder_layers(self.draft.model), self.draft.head.final
        for module in self.draft.model.modules():
            names = {id(child): name for name, child in module.named_children()}
            if norm is not None and id(layers) in names and id(norm) in names:
                break
        else:
            raise CompatibilityError("no module of it holds both its layers and the norm that its head reads")
        parts = []
        for a, b in zip(self.starts, self.ends, strict=True):
            part = copy.copy(module)
            own = {names[id(layers)]: nn.ModuleList(layers[a:b]), names[id(norm)]: nn.Identity()}
            part._modules = {**module._modules, **own}
            part.config = copy.copy(module.config)
            if getattr(part.config, "layer_types", None):
                part.config.layer_types = part.config.layer_types[a:b]
            part.config.num_hidden_layers = b - a
            parts.append(part)
        return norm, parts

    def _problem(self) -> str | None:
        """None when 12 tokens, read in pieces of which deeper segments see the second late, give the model's logits."""
        ids = torch.arange(3, 15, device=self.draft.device)[None] % self.draft.vocab_size
        taps = self.draft.read(ids, Needs(layers=self.ends))
        x, cuts = ids, [5, 9]
        for s, (n, cache) in enumerate(zip(self.ends, self.caches(), strict=True)):
            x = torch.cat([self.run(s, piece, cache) for piece in x.tensor_split(cuts, dim=1)], dim=1)
            cuts = [5]
            got = self.logits(x)[0]  # [n, V]
            # what comes after the model's last layer is tapped behind the norm
            want = self.draft.head(taps[n] if n == self.nested.submodels[-1] else self.norm(taps[n]))[0]
            off, effect = float((got - want).abs().max()), float((want[1:] - want[:-1]).abs().max())
            half = self.draft.model.dtype in (torch.float16, torch.bfloat16)
            if not off < (0.2 if half else 0.01) * effect:  # NaN included
                return f"after {n} layers its logits are off by {off:.2g}"
        return None


class Text:
    """What the segments have read of one row.

    A token that leaves early leaves the deeper segments behind: they get what they have missed, in one forward, when a
    later token needs them.

    Attributes:
        tokens: int64 [n], read by the first segment.
        layers: how many were run so far; one that reads several tokens at once counts once.
    """

    def __init__(self, segments: Segments):
        self.segments = segments
        self.tokens, self.layers = np.zeros(0, dtype=np.int64), 0
        self.caches = segments.caches()
        hidden = segments.draft.config.hidden_size
        like = {"device": segments.draft.device, "dtype": segments.draft.model.dtype}
        # before each segment but the first, [1, n, d]: outputs of the one above that it has not read
        self.pending = [torch.empty(1, 0, hidden, **like) for _ in segments.ends[1:]]

    def _check(self) -> None:
        lengths = [cache.width for cache in self.caches]
        assert lengths[0] == len(self.tokens)
        for s, waiting in enumerate(self.pending):
            assert lengths[s + 1] + waiting.shape[1] == lengths[s], (lengths, s, waiting.shape)

    def roll_back(self, tokens: np.ndarray) -> np.ndarray:
        """Forget what ``tokens`` int64 [n], the row's text, does not begin with; returns what is to be read.

        That is at least one: a text that has not grown has its last token read again, for the logits after it.
        """
        n = min(len(self.tokens), len(tokens) - 1)
        wrong = np.flatnonzero(self.tokens[:n] != tokens[:n])
        keep = int(wrong[0]) if len(wrong) else n
        self.tokens = self.tokens[:keep]
        for cache in self.caches:
            cache.crop_to(min(cache.width, keep))
        for s, waiting in enumerate(self.pending):
            self.pending[s] = waiting[:, : self.caches[s].width - self.caches[s + 1].width]
        self._check()
        return tokens[keep:]

    def read(self, tokens: np.ndarray, full: bool = False) -> tuple[Tensor, int]:
        """Read ``tokens`` int64 [n]; logits float32 [V] after the last one, and the segment at whose end it left.

        Args:
            tokens: what follows ``self.tokens``.
            full: no early exit.
        """
        segments, last = self.segments, len(self.segments.ends) - 1
        for chunk in np.array_split(tokens, range(_CHUNK, len(tokens), _CHUNK)):
            h = torch.from_numpy(chunk.astype(np.int64)).to(segments.draft.device)[None]  # ids [1, n], then [1, n, d]
            for s, cache in enumerate(self.caches):
                if s:
                    h = torch.cat([self.pending[s - 1], h], dim=1)
                    self.pending[s - 1] = h[:, :0]
                h = segments.run(s, h, cache)
                self.layers += segments.ends[s] - segments.starts[s]
                threshold = segments.nested.thresholds[s]
                # an exit that nobody can take costs no head
                if s == last or (not full and threshold < 1):
                    logits = segments.logits(h[0, -1])
                    if s == last or float(logits.softmax(-1).max()) > threshold:
                        break
            if s < last:
                self.pending[s] = torch.cat([self.pending[s], h], dim=1)
            self.tokens = np.append(self.tokens, chunk)
            self._check()
        return logits, s
