"""The judge: one linear map on the target's last hidden state, and its files."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from specdec.errors import CompatibilityError, UsageError, first_line
from specdec.heads.checkpoint import HeadConfig, read_config, read_tensors, write_folder
from specdec.structure import Needs, Tap
from specdec.target import Target

_METHOD = {"specdec_method": "judge"}


@dataclass
class JudgeConfig:
    """What ``config.json`` says.

    Attributes:
        hidden_size, vocab_size, num_hidden_layers, target_id: the target's; the last for people.
        layer: "last", the only one there is.
        pre_norm: hidden states are read before the target's final norm, not after it.
        positive_means: what a large f(e) says of a token: "acceptable", or "important" (AutoJudge's: reject it).
        delta: a token is accepted when its probability of being acceptable is above this, whatever f's polarity.
        after_error: how tokens behind a mistake were labelled in training, "ignore" or "bad".
    """

    hidden_size: int
    vocab_size: int
    num_hidden_layers: int
    target_id: str = ""
    layer: str = "last"
    pre_norm: bool = True
    positive_means: str = "acceptable"
    delta: float = 0.5
    after_error: str = "ignore"

    def __post_init__(self) -> None:
        for name, known in {
            "layer": ("last",),
            "positive_means": ("acceptable", "important"),
            "after_error": ("ignore", "bad"),
            "pre_norm": (True, False),
        }.items():
            if getattr(self, name) not in known:
                raise UsageError(f"{name}={getattr(self, name)!r} must be one of {', '.join(map(repr, known))}")
        if not isinstance(self.delta, (int, float)) or math.isnan(self.delta):
            raise UsageError(f"delta={self.delta!r} must be a number")


class JudgeHead(nn.Module):
    """f(e) = w . (e - mean) / scale + b, in float32.

    e is the target's last hidden state [d] at the drafted token's OWN position, where the token is the input: one
    position later than the logits that the standard rule tests it by. With the position before it, the judge could not
    see the token.

    Attributes:
        config: see ``JudgeConfig``.
        weight, bias: float32 [d] and [1].
        mean, scale: float32 [d], of the features in training.
    """

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, config: JudgeConfig):
        super().__init__()
        d = config.hidden_size
        self.config = config
        self.weight, self.bias = nn.Parameter(torch.zeros(d)), nn.Parameter(torch.zeros(1))
        self.register_buffer("mean", torch.zeros(d))
        self.register_buffer("scale", torch.ones(d))

    @classmethod
    def fresh(cls, target: Target, **settings: Any) -> JudgeHead:
        """An untrained judge for ``target``; ``settings`` are fields of ``JudgeConfig``."""
        return cls(JudgeConfig(**HeadConfig.facts(target), **settings))

    @property
    def needs(self) -> Needs:
        return Needs(pre_norm_hidden=self.config.pre_norm, final_hidden=not self.config.pre_norm)

    @property
    def tap(self) -> Tap:
        return "pre_norm_hidden" if self.config.pre_norm else "final_hidden"

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """f of hidden states [..., d]: float32 [...]."""
        e = hidden.to(self.weight.device, torch.float32)
        return ((e - self.mean) / self.scale) @ self.weight + self.bias

    def acceptable(self, hidden: torch.Tensor) -> torch.Tensor:
        """The probability that the tokens at hidden states [..., d] are acceptable: float32 [...]."""
        f = self(hidden)
        return torch.sigmoid(f if self.config.positive_means == "acceptable" else -f)

    def check(self, target: Target) -> None:
        """Raise CompatibilityError unless it was trained for a target of these sizes."""
        for name, value in HeadConfig.facts(target).items():
            mine = getattr(self.config, name)
            if name != "target_id" and mine != value:
                raise CompatibilityError(
                    f"checkpoint: the judge was trained for a target with {name}={mine}, this target has {value}; use "
                    "one for this model, or train one with `specdec train judge`"
                )

    def save_pretrained(self, folder: str | Path, card: str = "") -> Path:
        """Write ``config.json``, ``model.safetensors`` and ``README.md``; an earlier folder goes when all is there."""
        return write_folder(folder, {**_METHOD, **asdict(self.config)}, self.state_dict(), card)

    @classmethod
    def from_pretrained(cls, source: str | Path) -> JudgeHead:
        """Read a judge from a folder.

        Raises:
            UsageError: no such folder, a damaged file, or something else than a judge in it.
        """
        folder = Path(source).expanduser()
        where = f"checkpoint {str(source)!r}"
        if not folder.is_dir():
            raise UsageError(f"{where}: no such folder; give one that `specdec train judge` wrote")
        config, tensors = read_config(folder), read_tensors(folder)
        if config.get("specdec_method") != "judge":
            raise UsageError(
                f"{where}: its config.json is not a judge's; give a folder that `specdec train judge` wrote"
            )
        known = {f.name for f in fields(JudgeConfig)}
        try:
            head = cls(JudgeConfig(**{k: v for k, v in config.items() if k in known}))
        except (TypeError, RuntimeError, UsageError) as error:
            raise UsageError(f"{where}: its config.json is wrong ({first_line(error)}); save it again") from error
        mine = head.state_dict()
        shapes = {name: tuple(t.shape) for name, t in tensors.items()}
        expected = {name: tuple(t.shape) for name, t in mine.items()}
        if shapes != expected:
            raise UsageError(f"{where}: its weights are {shapes}, its config.json asks for {expected}; save it again")
        if not all(bool(torch.isfinite(t).all()) for t in tensors.values()) or not bool((tensors["scale"] > 0).all()):
            raise UsageError(f"{where}: its weights hold NaN, inf or a scale that is not above 0; train it again")
        head.load_state_dict(tensors)
        return head.requires_grad_(False).eval()
