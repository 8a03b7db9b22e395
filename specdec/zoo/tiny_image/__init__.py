"""The visual toy `tiny-image`: handwritten digits of 7 x 7 codes, written one after the other by a small Llama.

A text is bos, a class token, the 49 codes row by row, eos. The vocabulary is mixed: ids below ``OFFSET`` are no
codes. Made by `specdec train images`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from specdec.contracts import Drafter, Verifier
from specdec.decoder import Decoder
from specdec.errors import UsageError, first_line
from specdec.stats import GenerationStats

from .networks import GRID, SIDE, Autoencoder, Classifier

HERE = Path(__file__).resolve().parent
PAD, BOS, EOS, FIRST_CLASS, OFFSET = 0, 1, 2, 3, 13  # ten classes stand before the codes
LENGTH = GRID * GRID  # codes of a picture

__all__ = [
    "BOS", "EOS", "FIRST_CLASS", "GRID", "HERE", "LENGTH", "OFFSET", "PAD", "SIDE", "Autoencoder", "Classifier", "Toy",
    "check_out", "draw", "load", "save_picture",
]  # fmt: skip


@dataclass
class Toy:
    """Everything that is trained, in eval mode and float32 on the CPU.

    Attributes:
        target, draft: Llamas of one vocabulary; ``generate`` gives 49 codes after [bos, class].
        autoencoder: codes to pictures and back.
        classifier: recognises pictures.
        mean: features of real digits held out from all training, [F].
        covariance: theirs, [F, F].
    """

    target: PreTrainedModel
    draft: PreTrainedModel
    autoencoder: Autoencoder
    classifier: Classifier
    mean: torch.Tensor
    covariance: torch.Tensor

    def prompts(self, labels: Sequence[int]) -> torch.Tensor:
        """int64 [n, 2]: the prompts of pictures of these classes; raises UsageError for one that is no digit."""
        for label in labels:
            if label not in range(10):
                raise UsageError(f"class {label}: the toy knows the digits 0 to 9")
        return torch.tensor([[BOS, FIRST_CLASS + label] for label in labels])

    def pictures(self, ids: torch.Tensor) -> torch.Tensor:
        """Pictures float32 [n, 28, 28] in [0, 1] of generated ids int64 [n, 2 + 49]."""
        return self.autoencoder.decode((ids[:, -LENGTH:] - OFFSET).cpu())


def load(folder: Path = HERE) -> Toy:
    """The toy that ships, or one made by `specdec train images`; raises UsageError for a folder that lacks a part."""
    try:
        target, draft = (
            AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32, local_files_only=True).eval()
            for name in ("target", "draft")
        )
        weights = load_file(folder / "autoencoder.safetensors")
        width, channels = weights["decoder.0.weight"].shape[1], weights["decoder.0.weight"].shape[0]
        autoencoder = Autoencoder(len(weights["codebook"]), width, channels)
        autoencoder.load_state_dict(weights)
        classifier = Classifier()
        classifier.load_state_dict(load_file(folder / "classifier.safetensors"))
        digits = load_file(folder / "digits.safetensors")
    except Exception as error:  # the readers of weights and JSON raise their own kinds
        raise UsageError(
            f"tiny-image could not be read from {folder} ({first_line(error)}): reinstall specdec, or make it with "
            "`specdec train images`"
        ) from error
    return Toy(target, draft, autoencoder.eval(), classifier.eval(), digits["mean"], digits["covariance"])


def draw(
    target: PreTrainedModel,
    drafter: str | Drafter,
    verifier: str | Verifier,
    class_: int,
    out: Path,
    seed: int = 0,
    temperature: float = 1.0,
    top_k: int = 0,
) -> GenerationStats:
    """Draw one digit and write it as a PNG.

    Args:
        target: the toy's, wherever it is.
        drafter, verifier: as for ``Decoder``.
        class_: which digit, 0 to 9.
        out: the file.
        seed: makes it repeatable.
        temperature, top_k: of the target's law; temperature=0 is greedy, top_k=0 cuts nothing.

    Returns:
        What it cost.

    Raises:
        UsageError: no such class, another model, or a file that cannot be written.
    """
    check_out(out)
    toy = load()
    prompt = toy.prompts([class_]).to(target.device)
    if target.config.vocab_size != toy.target.config.vocab_size:
        raise UsageError(f"target: its vocabulary has {target.config.vocab_size} tokens; give the one of tiny-image")
    decoder = Decoder(target, drafter, verifier)
    torch.manual_seed(seed)
    how = {"do_sample": True, "temperature": temperature, "top_k": top_k} if temperature else {"do_sample": False}
    ids = decoder.generate(prompt, **how)
    save_picture(toy.pictures(ids)[0], out)
    assert decoder.stats is not None
    return decoder.stats


def check_out(out: Path) -> None:
    """Raise UsageError unless ``out`` can be a PNG file."""
    if out.suffix != ".png" or not out.parent.is_dir():
        raise UsageError(f"out {str(out)!r}: give a file ending in .png in a folder that exists")
    if find_spec("matplotlib") is None:
        raise UsageError("pictures are written by matplotlib: pip install 'specdec[bench]'")


def save_picture(picture: torch.Tensor, out: Path, scale: int = 8) -> None:
    """Write ``picture`` [H, W] in [0, 1], white on black, ``scale`` screen pixels a pixel, whole or not at all.

    Raises:
        UsageError: not a .png in a folder that can be written, or matplotlib is missing.
    """
    check_out(out)
    from matplotlib.image import imsave

    large = picture.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    try:
        handle, part = tempfile.mkstemp(suffix=".png", prefix=f".{out.name}.", dir=out.parent)
        os.close(handle)
        try:
            imsave(part, large.numpy(), cmap="gray", vmin=0, vmax=1)
            os.chmod(part, 0o644)  # made for the owner alone
            os.replace(part, out)
        finally:
            Path(part).unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(f"out {str(out)!r}: cannot be written ({error.strerror}); give another") from error
