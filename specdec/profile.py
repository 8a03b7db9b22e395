"""What `specdec tune` found out about a model on a machine, as a file."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specdec.errors import UsageError, first_line

if TYPE_CHECKING:
    from specdec.target import Target


@dataclass(frozen=True)
class Profile:
    """A drafter with its options, chosen for one model, device and dtype.

    Attributes:
        drafter: registry name.
        options: for its constructor; JSON values.
        compile: the ``Decoder``'s.
        made_for: what ``fingerprint`` was.
        evidence: what was measured, for readers.
    """

    drafter: str
    options: dict[str, Any]
    compile: str
    made_for: dict[str, Any]
    evidence: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, file: str | Path) -> Profile:
        """Raises UsageError for a file that is missing or is no profile."""
        try:
            return cls(**json.loads(Path(file).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise UsageError(
                f"profile {str(file)!r}: cannot be read ({first_line(error)}); make one with `specdec tune`"
            ) from error

    @classmethod
    def find(cls, target: Target) -> Profile | None:
        """The profile kept for this model here, or None."""
        file = kept(fingerprint(target))
        return cls.read(file) if file.is_file() else None

    def write(self, file: Path) -> None:
        """Whole or not at all."""
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f".{file.name}.part")
        part.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        os.replace(part, file)


def fingerprint(target: Target) -> dict[str, Any]:
    """What a profile depends on: the model's shape, the device and the dtype."""
    import torch

    config = {k: v for k, v in target.config.to_dict().items() if not k.startswith("_") and k != "transformers_version"}
    shape = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()[:16]
    device = torch.cuda.get_device_name(target.device) if target.device.type == "cuda" else target.device.type
    return {
        "model": target.model.name_or_path,
        "config": shape,
        "device": device,
        "dtype": str(target.model.dtype).removeprefix("torch."),
    }


def kept(made_for: dict[str, Any]) -> Path:
    """Where the profile of a fingerprint is kept: below $SPECDEC_HOME, or the user's cache folder."""
    home = os.environ.get("SPECDEC_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "specdec"
    name = f"{made_for['config']}-{made_for['device']}-{made_for['dtype']}".replace(" ", "-").replace("/", "-")
    return Path(home).expanduser() / "profiles" / f"{name}.json"
