"""Perceptron: a strongly regularised classifier of single images with one hidden layer.

Not published; made of known parts: layer normalisation of the features' signed square roots, dropout of half of them, a
hidden layer with normalisation, GELU and dropout, and training on mixed pairs of images (mixup, Zhang et al. 2018) with
label smoothing. With some hundred images per class, a perceptron without this regularisation is no better than a
regularised linear classifier; with it, the ensemble of the two is better (docs/streams.md).

Legend: M images, B of them in a batch, D features, K classes, W hidden units.
"""

from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from iciia_exp.models.fast_dropout import Dropout
from iciia_exp.models.lbfgs import minimise
from iciia_exp.recipe import Recipe
from iciia_exp.tasks import Task

__all__ = ["Perceptron", "ensemble_weights"]

_DROPOUT, _SMOOTHING = 0.5, 0.1
_RATE, _DECAY, _BATCH = 1e-3, 0.05, 256
_STEPS, _FEWEST_PASSES, _MOST_PASSES = 3000, 8, 100


class Perceptron(nn.Module):
    """D to W to K. Shapes: features [..., D] to logits [..., K]."""

    def __init__(self, dim: int, num_classes: int, width: int) -> None:
        super().__init__()
        self.dim, self.num_classes, self.width = dim, num_classes, width
        self.hidden, self.norm, self.last = nn.Linear(dim, width), nn.LayerNorm(width), nn.Linear(width, num_classes)
        self.dropout = Dropout(_DROPOUT)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of every image, [..., K]."""
        return self._classify(self._normalised(x))

    def _normalised(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.sign() * x.abs().sqrt(), (self.dim,))

    def _classify(self, x: Tensor) -> Tensor:
        return self.last(self.dropout(F.gelu(self.norm(self.hidden(self.dropout(x))))))

    def loss(self, x_BD: Tensor, y: Tensor) -> Tensor:
        """Return the mean loss on mixed pairs of images (mixup); labels int64 [B], or 0/1 [B, K]."""
        x_BD = self._normalised(x_BD)
        other_B, share = torch.randperm(len(x_BD)), torch.rand(())
        logits_BK = self._classify(torch.lerp(x_BD[other_B], x_BD, share))
        if y.ndim == 2:
            y = y.to(x_BD.dtype)
            return F.binary_cross_entropy_with_logits(logits_BK, torch.lerp(y[other_B], y, share))
        first, second = (F.cross_entropy(logits_BK, label, label_smoothing=_SMOOTHING) for label in (y, y[other_B]))
        return torch.lerp(second, first, share)

    @staticmethod
    def recipe(images: int) -> Recipe:
        """Return the recipe for a number of images: AdamW, 3,000 steps of 256 images, in 8 to 100 epochs."""
        size = min(_BATCH, images)
        passes = int(np.clip(_STEPS * size // images, _FEWEST_PASSES, _MOST_PASSES))
        adamw = partial(torch.optim.AdamW, lr=_RATE, weight_decay=_DECAY, fused=True)
        return Recipe(adamw, torch.optim.lr_scheduler.OneCycleLR, passes, size)

    @property
    def macs(self) -> int:
        """MACs of one image: W (D + K)."""
        return self.width * (self.dim + self.num_classes)


def ensemble_weights(task: Task, b_MK: Tensor, o_MK: Tensor, y: Tensor) -> Tensor:
    """Return weights (v, w) that minimise the log-loss of v b + w o, divided by the best weight of b alone.

    A calibration of b then also calibrates the sum.

    Args:
        task: of the labels.
        b_MK, o_MK: logits of the backbone's classifier and of the perceptron, on images that neither was fitted on.
        y: labels, int64 [M], or 0/1 [M, K].
    """

    def best(*logits: Tensor) -> Tensor:
        def loss(weights: Tensor) -> Tensor:
            return task.loss(sum(w * part for w, part in zip(weights, logits, strict=True)), y)

        return minimise(loss, torch.full((len(logits),), 1.0 / len(logits)), most=50)[0]

    scale = best(b_MK)[0].clamp(min=1e-3)
    return best(b_MK, o_MK) / scale
