"""Feature perceptron: a network with one hidden layer on stored features, for methods that train small networks.

Legend: B images of a batch, D features, W hidden units, K classes.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from iciia_exp.errors import check_float, check_int
from iciia_exp.models.backbones.base import Backbone, other_form

__all__ = ["FeaturePerceptron"]


class FeaturePerceptron(Backbone):
    """Batch norm, then D to W with batch norm, ReLU and dropout, and W to K.

    Args:
        num_classes: K.
        inputs: D.
        width: W.
        dropout: of the hidden units.
    """

    transform_settings = ("inputs",)

    def __init__(self, num_classes: int, inputs: int = 1280, width: int = 128, dropout: float = 0.2) -> None:
        super().__init__()
        self.inputs, self.dim = check_int("inputs", inputs, 1), check_int("width", width, 1, 65_536)
        norm = nn.BatchNorm1d(inputs, affine=False)
        share = check_float("dropout", dropout, 0.0, 1.0)
        layers = nn.Linear(inputs, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(share)
        self.trunk = nn.Sequential(norm, *layers)
        self.head = nn.Linear(width, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """Return the hidden units, [B, W]."""
        return self.trunk(images)

    def transform(self, image: Any) -> Tensor:
        """Return a feature vector as a tensor."""
        if np.shape(image) != (self.inputs,):
            raise other_form("feature_perceptron", f"vectors of {self.inputs} numbers", image)
        return torch.as_tensor(np.asarray(image, dtype=np.float32))
