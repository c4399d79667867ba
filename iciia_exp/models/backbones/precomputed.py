"""Precomputed: the backbone of a dataset whose features are there already.

Legend: B images of a batch, D features, K classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from iciia_exp.errors import check_int
from iciia_exp.models.backbones.base import Backbone

__all__ = ["Precomputed"]


class Precomputed(Backbone):
    """Passes the dataset's vectors on; only its linear head has weights.

    Args:
        num_classes: K.
        dim: D of the vectors.
        macs: multiply-accumulates of the network that made the vectors, for one image and without a classifier; None
            where unknown.
    """

    def __init__(self, num_classes: int, dim: int, macs: int | None = None) -> None:
        super().__init__()
        self.dim = check_int("dim", dim, 1)
        self._macs = None if macs is None else check_int("macs", macs, 0)
        self.head = nn.Linear(dim, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """Return the vectors themselves, [B, D]."""
        return images

    def transform(self, image: Any) -> Tensor:
        """Turn a vector [D] into a float32 tensor."""
        return torch.as_tensor(image, dtype=torch.float32)

    def macs(self, example: Tensor) -> int | None:
        """Return what the configuration says, and the classifier's D K; None where it says nothing."""
        return None if self._macs is None else self._macs + self.head.weight.numel()

    def describe_transform(self) -> dict[str, Any]:
        """Return nothing: what made the vectors is not known here."""
        return {}
