"""How good the visual toy's pictures are, and what a verifier saves on them.

accuracy   share of pictures that the toy's classifier takes for their class
Fréchet    squared distance of two Gaussians, those of the classifier's features of the pictures and of 1,000
           held-out real digits: |m - m'|^2 + tr(C + C' - 2 (C C')^1/2)  (Heusel et al., arXiv 1706.08500). It falls
           with the number of pictures, so compare equal numbers only.
interval   95 %; bootstrap over pictures: percentiles (accuracy), 1.96 standard errors (Fréchet, whose resamples
           are biased upwards)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.linalg import eigvals

from specdec.bench.quality import Statistic
from specdec.contracts import Drafter, Verifier
from specdec.decoder import Decoder
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

    def to_json(self) -> dict[str, Any]:
        return {"mat": self.mat, **asdict(self.quality)}


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
