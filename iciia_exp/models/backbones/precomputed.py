"""Precomputed features: the backbone of a dataset of feature vectors.

Legend: B images of a batch, D features, K classes.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from iciia_exp.errors import ConfigError, check_int
from iciia_exp.models.backbones.base import Backbone, other_form

__all__ = ["Precomputed"]


class Precomputed(Backbone):
    """Returns the dataset's vectors as features; only the linear head has weights.

    Args:
        num_classes: K.
        dim: D of the vectors; the dataset tells it.
        macs: MACs for one image of the network that made the vectors, without a classifier; None if unknown.
    """

    transform_settings = ()  # the transform of the images is unknown

    def __init__(self, num_classes: int, dim: int | None = None, macs: int | None = None) -> None:
        super().__init__()
        if dim is None:
            problem = "takes feature vectors, whose dataset tells their size; use dataset=features or another backbone"
            raise ConfigError("", "precomputed", problem)
        self.dim = check_int("dim", dim, 1, 1_000_000)
        self._macs = None if macs is None else check_int("macs", macs, 0)
        self.head = nn.Linear(dim, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """Return the vectors, [B, D]."""
        return images

    def transform(self, image: Any) -> Tensor:
        """Turn a vector [D] into a float32 tensor."""
        if np.ndim(image) != 1:
            raise other_form("precomputed", "vectors", image)
        return torch.as_tensor(image, dtype=torch.float32)

    def macs(self, example: Tensor) -> int | None:
        """Return the configured MACs plus the classifier's D K; None if they are unknown."""
        return None if self._macs is None else self._macs + self.head.weight.numel()
