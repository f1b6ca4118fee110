"""The identity judge: features that tell *which* sprite it is, class and art style, whatever the background,
size and turn. On the miniature it plays the part that DINO plays in the published tables.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_model
from torch import nn

WEIGHTS = Path(__file__).parent / "identity" / "model.safetensors"


class IdentityNet(nn.Module):
    """Convolutional network: (N, 3, 64, 64) in [-1, 1] -> (N, 128) unit vectors."""

    def __init__(self, width: int = 32, dim: int = 128) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for level, out in enumerate((width, width * 2, width * 4, width * 8)):
            for stride in (2, 1) if level else (2,):
                layers += [nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
                channels = out
        self.trunk = nn.Sequential(*layers)
        self.head = nn.Linear(channels, dim)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.trunk(images)
        # the mean sees the whole scene, the maximum the object
        pooled = features.mean((2, 3)) + features.amax((2, 3))
        return nn.functional.normalize(self.head(pooled), dim=1)


def load_identity(path: Path = WEIGHTS) -> IdentityNet:
    """The shipped judge, in evaluation mode."""
    net = IdentityNet()
    load_model(net, path)
    return net.eval()
