"""How good the visual toy's pictures are, and what a verifier saves on them.

accuracy   share of pictures that the toy's classifier takes for their class
Fréchet    squared distance of two Gaussians, those of the classifier's features of the pictures and of 1,000
           held-out real digits: |m - m'|^2 + tr(C + C' - 2 (C C')^1/2)  (Heusel et al., arXiv 1706.08500). It falls
           with the number of pictures, so compare equal numbers only.
interval   95 %; bootstrap over pictures: percentiles (accuracy), 1.96 standard errors (Fréchet, whose resamples
           are biased upwards)

python -m specdec.bench.images OUT [PER_CLASS] writes the table and the grid of the toy's card: table.md and grid.png.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.linalg import eigvals

from specdec.bench.quality import Statistic
from specdec.contracts import Drafter, Verifier
from specdec.decoder import Decoder
from specdec.drafters.draft_model import DraftModel
from specdec.verifiers.lantern import Lantern
from specdec.verifiers.standard import Standard
from specdec.zoo import tiny_image


@dataclass(frozen=True)
class Quality:
    """The fields are defined at the top of this file."""

    pictures: int
    accuracy: float
    accuracy_ci: tuple[float, float]
    frechet: float
    frechet_ci: tuple[float, float]


@dataclass(frozen=True)
class Sampled:
    """Pictures of one verifier.

    Attributes:
        pictures: float32 [n, 28, 28].
        labels: int64 [n], the class that was asked for.
        mat: codes per target forward.
        quality: of the pictures.
    """

    pictures: torch.Tensor
    labels: torch.Tensor
    mat: float
    quality: Quality


def frechet(mean: np.ndarray, covariance: np.ndarray, other_mean: np.ndarray, other_covariance: np.ndarray) -> float:
    """Squared Fréchet distance of two Gaussians of dimension F."""
    # C C' is similar to a positive semi-definite matrix; what rounding makes negative or complex is cut
    roots = np.sqrt(np.maximum(eigvals(covariance @ other_covariance).real, 0)).sum()
    apart = ((mean - other_mean) ** 2).sum()
    return float(max(apart + np.trace(covariance) + np.trace(other_covariance) - 2 * roots, 0))


@torch.no_grad()
def quality(
    images: torch.Tensor, labels: torch.Tensor, toy: tiny_image.Toy | None = None, resamples: int = 200
) -> Quality:
    """How good pictures are.

    Args:
        images: float32 [n, 28, 28] in [0, 1], two at least.
        labels: int64 [n], what each should show.
        toy: holds the classifier and the real digits' features; None loads the one that ships.
        resamples: of the bootstrap.
    """
    toy = tiny_image.load() if toy is None else toy
    features, logits = (torch.cat(part).double().numpy() for part in zip(*map(toy.classifier, images.split(500))))
    right = logits.argmax(-1) == labels.numpy()
    mean, covariance = toy.mean.double().numpy(), toy.covariance.double().numpy()

    def distance(x: np.ndarray) -> float:
        return frechet(x.mean(0), np.cov(x.T), mean, covariance)

    pick = np.random.default_rng(0).integers(0, len(images), (resamples, len(images)))
    low, high = np.quantile(right[pick].mean(axis=1), [0.025, 0.975])
    middle, error = distance(features), 1.96 * float(np.std([distance(features[rows]) for rows in pick]))
    return Quality(
        len(images),
        float(right.mean()),
        (float(low), float(high)),
        middle,
        (max(middle - error, 0.0), middle + error),
    )


def sample(
    drafter: Drafter | str,
    verifier: Verifier | str,
    per_class: int,
    seed: int = 0,
    batch: int = 50,
    toy: tiny_image.Toy | None = None,
    progress: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> Sampled:
    """Draw pictures of every class and measure them.

    Args:
        drafter, verifier: as for ``Decoder``; the draft model is ``toy.draft``.
        per_class: pictures of each of the ten classes.
        seed: makes them repeatable.
        batch: pictures decoded together.
        toy: None loads the one that ships.
        progress: called with pictures drawn and all pictures.
        settings: for ``generate``, over temperature 1 without top-k.
    """
    toy = tiny_image.load() if toy is None else toy
    decoder = Decoder(toy.target, drafter, verifier)
    labels = torch.arange(10).repeat(per_class)
    torch.manual_seed(seed)
    pictures, tokens, forwards = [], 0, 0
    for part in labels.split(batch):
        ids = decoder.generate(toy.prompts(part.tolist()), **{"do_sample": True, "top_k": 0, **settings})
        assert decoder.stats is not None
        pictures.append(toy.pictures(ids))
        tokens += decoder.stats.new_tokens
        forwards += decoder.stats.row_forwards
        if progress is not None:
            progress(sum(map(len, pictures)), len(labels))
    images = torch.cat(pictures)
    return Sampled(images, labels, tokens / forwards, quality(images, labels, toy))


def save_grid(rows: Mapping[str, Sampled], out: Path) -> None:
    """Write a picture of pictures: a row for each label, a column for each class, the first drawn of each."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 1.2 * len(rows)))
    cells = figure.subplots(len(rows), 10, squeeze=False)
    for line, (label, sampled) in zip(cells, rows.items(), strict=True):
        for class_, axes in enumerate(line):
            axes.imshow(sampled.pictures[sampled.labels == class_][0], cmap="gray", vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[])
        line[0].set_ylabel(f"{label}\nMAT {sampled.mat:.2f}", rotation=0, ha="right", va="center")
    part = out.with_name(f".{out.name}.part")
    figure.savefig(part, dpi=90, bbox_inches="tight", format="png")
    part.replace(out)


class PictureQuality:
    """Scores of the toy's pictures for ``specdec pareto``, see ``bench.quality``.

    Args:
        toy: holds classifier, autoencoder and the real digits' features.
        labels: what each picture should show.
    """

    resamples = 200

    def __init__(self, toy: tiny_image.Toy, labels: Sequence[int]):
        self.toy, self.labels = toy, np.array(labels)
        self.meanings = {
            "accuracy": "share of pictures that the classifier takes for their class; higher is better",
            "Fréchet": "distance to real digits in the classifier's features; lower is better, more pictures lower it",
        }

    @torch.no_grad()
    def statistics(self, ids: Sequence[Sequence[int]], plain: Sequence[Sequence[int]]) -> dict[str, Statistic]:
        """The scores of pictures by their codes."""
        pictures = self.toy.pictures(torch.tensor([list(codes) for codes in ids]))
        features, logits = (x.double().numpy() for x in self.toy.classifier(pictures))
        right = logits.argmax(-1) == self.labels
        mean, covariance = self.toy.mean.double().numpy(), self.toy.covariance.double().numpy()

        def distance(pick: np.ndarray) -> float:
            x = features[pick]
            return frechet(x.mean(0), np.cov(x.T), mean, covariance)

        return {"accuracy": lambda pick: float(right[pick].mean()), "Fréchet": distance}


ARMS: tuple[dict[str, Any], ...] = (  # of the card; {} is the verifier standard
    {},
    *({"k": 11, "factor": f} for f in (2, 3, 5, 10)),
    *({"k": 11, "delta": d} for d in (0.05, 0.1, 0.2, 0.4)),
    *({"k": 4, "factor": f} for f in (2, 5, 20)),
    {"k": 4, "delta": 0.1},
)


def main(out: Path, per_class: int = 100) -> None:
    """Draw with every arm and write the card's table and grid into ``out``."""
    toy = tiny_image.load()
    out.mkdir(parents=True, exist_ok=True)
    rows, grid = ["| verifier | MAT | accuracy | Fréchet |", "|---|---:|---:|---:|"], {}
    for arm in ARMS:
        verifier = Lantern(**arm) if arm else Standard()
        s = sample(DraftModel(toy.draft, branching=(3, 2, 1, 1)), verifier, per_class, toy=toy)
        name = ", ".join(["`lantern`", *(f"{k}={v}" for k, v in arm.items())]) if arm else "standard"
        (low, high), (near, far) = s.quality.accuracy_ci, s.quality.frechet_ci
        right = f"{s.quality.accuracy:.1%} [{100 * low:.1f}, {100 * high:.1f}]"
        rows.append(f"| {name} | {s.mat:.2f} | {right} | {s.quality.frechet:.0f} [{near:.0f}, {far:.0f}] |")
        print(rows[-1], flush=True)
        if arm.get("k") != 4:
            grid[", ".join(f"{k}={v}" for k, v in arm.items() if k != "k") or "standard"] = s
    (out / "table.md").write_text("\n".join(rows) + "\n", encoding="utf-8")
    save_grid(grid, out / "grid.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
