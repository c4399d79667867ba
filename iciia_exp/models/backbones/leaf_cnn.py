"""LEAF CNN: LEAF's network for FEMNIST, two 5x5 convolutions and one hidden layer of 2048 units.

Source: Caldas et al., "LEAF: A Benchmark for Federated Settings" (arXiv:1812.01097); ICIIA (ACML 2024), supplement.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from iciia_exp.models.backbones.base import Backbone, other_form

__all__ = ["LeafCNN"]


class LeafCNN(Backbone):
    """conv5x5-32, pool, conv5x5-64, pool, 3136 -> 2048, ReLU (the feature), -> K; the input is image - 0.5.

    Args:
        num_classes: K.
        mean: subtracted from a pixel (0 to 1).
    """

    transform_settings = ("mean",)

    def __init__(self, num_classes: int, mean: float = 0.5) -> None:
        super().__init__()
        self.dim, self.mean = 2048, float(mean)
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 32, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * 7 * 7, self.dim),
            nn.ReLU(),
        )
        self.head = nn.Linear(self.dim, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """Return the hidden layer after its ReLU, [B, 2048]."""
        return self.trunk(images)

    def transform(self, image: Any) -> Tensor:
        """Turn a float32 array [1, 28, 28] of 0 to 1 into the input."""
        if np.shape(image) != (1, 28, 28):
            raise other_form("leaf_cnn", "arrays [1, 28, 28]", image)
        return self.from_pixels(torch.as_tensor(image, dtype=torch.float32))

    def from_pixels(self, pixels: Tensor) -> Tensor:
        """Return pixels - mean."""
        return pixels - self.mean
