"""Two small networks around the image tokens: a VQ autoencoder (pictures to codes and back) and a classifier.

van den Oord et al., "Neural Discrete Representation Learning" (arXiv 1711.00937).
"""

from __future__ import annotations

import torch
from torch import nn

SIDE = 28  # pixels
GRID = 7  # codes


class Autoencoder(nn.Module):
    """Pictures [B, 28, 28] to codes [B, 49] and back.

    Attributes:
        codebook: float32 [K, D], E; a code is the number of the row nearest to the encoder's output.
    """

    codebook: torch.Tensor

    def __init__(self, codes: int = 256, width: int = 8, channels: int = 64):
        super().__init__()
        c = channels
        self.encoder = nn.Sequential(
            nn.Conv2d(1, c // 2, 4, stride=2, padding=1),  # [B, c/2, 14, 14]
            nn.ReLU(),
            nn.Conv2d(c // 2, c, 4, stride=2, padding=1),  # [B, c, 7, 7]
            nn.ReLU(),
            nn.Conv2d(c, width, 3, padding=1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(width, c, 3, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(c, c // 2, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(c // 2, 1, 4, stride=2, padding=1),
        )
        self.register_buffer("codebook", torch.randn(codes, width))

    def vectors(self, images: torch.Tensor) -> torch.Tensor:
        """The encoder's output [B * 49, D] for ``images`` float32 [B, 28, 28] in [0, 1]; row by row of the grid."""
        return self.encoder(images[:, None]).permute(0, 2, 3, 1).flatten(0, 2)

    def nearest(self, z: torch.Tensor) -> torch.Tensor:
        """Codes int64 [n] of vectors [n, D]."""
        return torch.cdist(z, self.codebook).argmin(dim=-1)

    def pixel_logits(self, e: torch.Tensor) -> torch.Tensor:
        """Pixels before the sigmoid [B, 28, 28] of quantised vectors [B * 49, D]."""
        return self.decoder(e.unflatten(0, (-1, GRID, GRID)).permute(0, 3, 1, 2))[:, 0]

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Codes int64 [B, 49] of ``images`` float32 [B, 28, 28] in [0, 1]."""
        return self.nearest(self.vectors(images)).view(len(images), GRID * GRID)

    @torch.no_grad()
    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Pictures float32 [B, 28, 28] in [0, 1] of codes int64 [B, 49]."""
        return torch.sigmoid(self.pixel_logits(self.codebook[codes.flatten()]))


class Classifier(nn.Module):
    """Which digit a picture shows; its features are what the Fréchet distance is measured in."""

    def __init__(self, features: int = 64):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),  # [B, 16, 14, 14]
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),  # [B, 32, 7, 7]
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),  # [B, 64, 3, 3]
            nn.Flatten(),
            nn.Linear(576, features),
        )
        self.head = nn.Linear(features, 10)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features [B, F] and logits [B, 10] of ``images`` float32 [B, 28, 28] in [0, 1]."""
        features = self.body(images[:, None])
        return features, self.head(torch.relu(features))
