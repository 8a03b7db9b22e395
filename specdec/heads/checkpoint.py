"""Trained heads as files: a folder of ``config.json``, ``model.safetensors`` and a model card, local or on the hub."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from specdec.errors import CompatibilityError, UsageError, first_line
from specdec.heads.shared import Batch, Drafts, Shared
from specdec.structure import Needs
from specdec.target import Target

_METHOD = "specdec_method"  # the key of config.json by which our own checkpoints are known
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt")

Tensors = dict[str, torch.Tensor]
AnyHead = TypeVar("AnyHead", bound="Head")


@dataclass(kw_only=True)
class HeadConfig:
    """What every head's ``config.json`` says. Subclasses add a method's own.

    Attributes:
        hidden_size, vocab_size, num_hidden_layers: the target's; 0 where another tool's file did not say.
        target_id: the target's name or path, for people.
        acceptance: [K][R], the measured share of positions at which the candidate of rank r for depth k (0-based) is
            the target's own token; None before it is measured.
    """

    hidden_size: int
    vocab_size: int
    num_hidden_layers: int = 0
    target_id: str = ""
    acceptance: list[list[float]] | None = None

    @classmethod
    def facts(cls, target: Target) -> dict[str, Any]:
        """The target's part of a configuration."""
        config = target.config
        name = str(getattr(target.model.config, "_name_or_path", ""))
        return {
            "hidden_size": config.hidden_size,
            "vocab_size": target.vocab_size,
            "num_hidden_layers": config.num_hidden_layers,
            "target_id": Path(name).name if Path(name).is_absolute() else name,  # nobody else has this folder
        }


class Head(nn.Module, ABC):
    """A trained module that reads the target's hidden states and predicts the tokens after the next one.

    Class attributes:
        method: the drafter's name.
        config_class: its ``HeadConfig``.
        objective: what depths imitate by default, "teacher" (the target's distribution) or "labels" (the text).
        decay: weight of depth k + 1 over that of depth k in the loss.

    Attributes:
        config: see ``config_class``.
        shared: the target's embedding and output, once attached.
    """

    method: ClassVar[str]
    config_class: ClassVar[type[HeadConfig]]
    objective: ClassVar[str] = "teacher"
    decay: ClassVar[float] = 0.8
    config: Any

    def __init__(self, config: HeadConfig):
        super().__init__()
        self.config = config
        self._shared: list[Shared] = []  # in a list, so that nothing of the target is saved or trained with the head

    # ---- what a method implements -----------------------------------------------------------------------------

    @property
    @abstractmethod
    def needs(self) -> Needs:
        """Hidden states it reads, in training as in use."""

    @property
    @abstractmethod
    def depths(self) -> int:
        """K, how many tokens beyond the next one it is trained to predict."""

    @classmethod
    @abstractmethod
    def fresh(cls: type[AnyHead], target: Target, **options: Any) -> AnyHead:
        """An untrained head for ``target``; ``options`` are the method's own.

        Raises:
            UsageError: an option out of range.
        """

    def drafts(self, batch: Batch) -> Drafts:
        """What it says along a text, teacher-forced and differentiable; ``shared`` must be attached.

        A method whose pseudo tokens run through the target itself overrides ``along`` instead.
        """
        raise TypeError(f"{type(self).__name__} says nothing along hidden states alone; use along()")

    def along(self, target: Target, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, Drafts]:
        """The target's final hidden states [B, S, d] of a text, and what this head says along it.

        Args:
            target: the one attached.
            ids, mask: int64 and bool [B, S], see ``Batch``.
        """
        taps = target.read(ids, self.needs | Needs(final_hidden=True))
        return taps["final_hidden"], self.drafts(Batch(ids, mask, taps))

    @classmethod
    def foreign(cls, config: dict[str, Any], tensors: Tensors) -> tuple[dict[str, Any], Tensors] | None:
        """Another tool's checkpoint as ours: (keywords of ``config_class``, tensors); None if it is not one known."""
        return None

    def fits(self, target: Target) -> str | None:
        """Why this head cannot serve ``target``, besides sizes; None if it can."""
        return None

    # ---- the target -------------------------------------------------------------------------------------------

    @property
    def shared(self) -> Shared:
        assert self._shared, "attach(target) comes first"
        return self._shared[0]

    def attach(self, target: Target) -> None:
        """Check that this head belongs to such a target, and borrow its embedding and output.

        Raises:
            CompatibilityError: sizes differ, or the method says why not.
        """
        for name, value in self.config_class.facts(target).items():
            mine = getattr(self.config, name)
            if name != "target_id" and mine not in (0, value):
                raise CompatibilityError(
                    f"checkpoint: it was trained for a target with {name}={mine}, this target has {value}; use a "
                    f"checkpoint for this model, or train one with `specdec train {self.method}`"
                )
        problem = self.fits(target)
        if problem is not None:
            raise CompatibilityError(f"checkpoint: {problem}")
        self._shared[:] = [Shared.of(target.model, target.head)]

    # ---- files ------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path, card: str = "", dtype: torch.dtype | None = None) -> Path:
        """Write ``config.json``, ``model.safetensors`` and ``README.md``; an earlier folder is replaced when all is
        written.

        Args:
            folder: where to.
            card: text of the model card below its heading.
            dtype: store floating-point weights so; None keeps them.
        """
        tensors = {name: t.to(dtype) if dtype and t.is_floating_point() else t for name, t in self.state_dict().items()}
        return write_folder(folder, {_METHOD: self.method, **asdict(self.config)}, tensors, self._card(card))

    def _card(self, text: str) -> str:
        size = sum(p.numel() for p in self.parameters()) / 1e6
        target = self.config.target_id
        return (
            "---\nlibrary_name: specdec\ntags: [speculative-decoding, "
            f"{self.method}]\n---\n# {self.method} for {target or 'a target of the sizes in config.json'}\n\n"
            f"{size:.2f} M parameters. Use: `Decoder(model, {self.method!r}, checkpoint=FOLDER)`.\n\n{text}"
        )

    def push_to_hub(self, repo_id: str, private: bool | None = None, card: str = "") -> str:
        """Upload to the Hugging Face hub; returns the commit's address."""
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            folder = self.save_pretrained(Path(scratch) / "head", card)
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder).commit_url)

    @classmethod
    def from_pretrained(cls: type[AnyHead], source: str | Path, revision: str | None = None) -> AnyHead:
        """Read a head from a folder or the hub: ours, or another tool's that the method knows.

        Raises:
            UsageError: no such folder, a damaged file, another method's checkpoint, missing or unknown tensors.
        """
        folder = _folder(source, revision)
        config, tensors = read_config(folder), read_tensors(folder)
        method = config.pop(_METHOD, None)
        where = f"checkpoint {str(source)!r}"
        if method not in (None, cls.method):
            raise UsageError(f"{where}: it holds {method} heads, not {cls.method}; use drafter {method!r}")
        if method is None:
            converted = cls.foreign(config, tensors)
            if converted is None:
                raise UsageError(
                    f"{where}: its config.json fits no {cls.method} format (keys {', '.join(sorted(config)[:6])})"
                )
            config, tensors = converted
        known = {f.name for f in fields(cls.config_class)}
        try:
            head = cls(cls.config_class(**{k: v for k, v in config.items() if k in known}))
        except TypeError as error:
            raise UsageError(f"{where}: its config.json lacks or mistypes a setting ({first_line(error)})") from error
        problem = head._fill(tensors)
        if problem:
            raise UsageError(f"{where}: {problem}; download or save it again")
        return head.eval()

    def _fill(self, tensors: Tensors) -> str | None:
        """Take the weights over; what is wrong with them, if anything."""
        mine = self.state_dict()
        missing, unknown = sorted(mine.keys() - tensors.keys()), sorted(tensors.keys() - mine.keys())
        if missing or unknown:
            return f"its weights lack {missing[:3] or 'nothing'} and hold unknown {unknown[:3] or 'nothing'}"
        for name, tensor in tensors.items():
            if tensor.shape != mine[name].shape:
                return f"{name} has shape {tuple(tensor.shape)}, its config.json says {tuple(mine[name].shape)}"
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                return f"{name} holds NaN or inf"
        self.load_state_dict(tensors)
        return None


def write_folder(folder: str | Path, config: dict[str, Any], tensors: Tensors, card: str) -> Path:
    """Write ``config.json``, ``model.safetensors`` and ``README.md``; an earlier folder goes when all is there.

    Raises:
        UsageError: the disk is full or the folder cannot be written; nothing half-written is left.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=folder.name + ".part-", dir=folder.parent))
    try:
        stored = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        save_file(stored, part / "model.safetensors", metadata={"format": "pt"})
        (part / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        (part / "README.md").write_text(card, encoding="utf-8")
        part.chmod(0o755)  # made for the owner alone, but it ships to others
        (part / "model.safetensors").chmod(0o644)
        return replace_folder(part, folder)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{folder}: could not be written ({first_line(error)}); free space or give another") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a folder; raises UsageError."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"checkpoint {str(folder)!r}: config.json cannot be read ({first_line(error)})") from error
    if not isinstance(config, dict):
        raise UsageError(f"checkpoint {str(folder)!r}: config.json is no JSON object")
    return config


def read_tensors(folder: Path) -> Tensors:
    """Every tensor of a folder: safetensors if there are any, else pickled files, of which only weights are read."""
    for pattern in _WEIGHTS:
        files = sorted(folder.glob(pattern))
        tensors: Tensors = {}
        for file in files:
            try:
                loaded = load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
                tensors.update(loaded)
            except Exception as error:  # the readers raise their own kinds
                raise UsageError(
                    f"checkpoint: {file} cannot be read ({first_line(error)}); download it again"
                ) from error
        if files:
            return tensors
    raise UsageError(f"checkpoint {str(folder)!r}: no weights ({', '.join(_WEIGHTS)}) in this folder")


def _folder(source: str | Path, revision: str | None) -> Path:
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists() or str(source).startswith(("/", ".", "~")) or str(source).count("/") != 1:
        raise UsageError(f"checkpoint {str(source)!r}: no such folder; give one that holds config.json and weights")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=["config.json", *_WEIGHTS]))
    except Exception as error:
        raise UsageError(
            f"checkpoint {str(source)!r}: no folder of that name, and the Hugging Face hub did not give it "
            f"({first_line(error)})"
        ) from error


def replace_folder(part: Path, final: Path) -> Path:
    """Give ``part`` the name ``final``; an earlier ``final`` steps aside first, so neither is ever half written."""
    old = final.with_name(final.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.replace(final, old)
    os.replace(part, final)
    shutil.rmtree(old, ignore_errors=True)
    return final
