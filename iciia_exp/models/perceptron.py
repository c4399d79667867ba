"""Perceptron: a regularised classifier of single images with one hidden layer.

Not published; made of known parts: layer normalisation of the features' signed square roots, dropout, a hidden layer
with normalisation, GELU and dropout. It is trained with strong regularisation: dropout of half of the inputs, mixed
pairs of images (mixup, Zhang et al. 2018) and label smoothing; or with light: dropout of a fifth alone. With some
hundred images per class, a perceptron with less than the strong one is no better than a regularised linear classifier,
and the ensemble of the two is better than each (docs/streams.md). With thousands, the light one is better.

Legend: M images, B of them in a batch, D features, K classes, W hidden units, J pasts of an image.
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

__all__ = ["Perceptron", "ensemble_weights", "normalised"]

_DROPOUT, _LIGHT_DROPOUT, _SMOOTHING = 0.5, 0.2, 0.1
_RATE, _DECAY, _BATCH = 1e-3, 0.05, 256
_STEPS, _FEWEST_PASSES, _MOST_PASSES = 3000, 8, 100


def normalised(x: Tensor) -> Tensor:
    """Return the signed square roots of features [..., D], with mean 0 and variance 1 over D."""
    return F.layer_norm(x.sign() * x.abs().sqrt(), x.shape[-1:])


class Perceptron(nn.Module):
    """D to W to K. Shapes: features [..., D], and client vectors [..., R], to logits [..., K].

    Args:
        dim: D.
        num_classes: K.
        width: W.
        client: R, size of the client vector, a second input of the hidden layer; 0: none.
        light: train with light regularisation.
    """

    def __init__(self, dim: int, num_classes: int, width: int, client: int = 0, light: bool = False) -> None:
        super().__init__()
        self.dim, self.num_classes, self.width = dim, num_classes, width
        self.hidden, self.norm, self.last = nn.Linear(dim, width), nn.LayerNorm(width), nn.Linear(width, num_classes)
        self.light, self.dropout = light, Dropout(_LIGHT_DROPOUT if light else _DROPOUT)
        self.of_client = nn.Linear(client, width, bias=False) if client else None
        self.reads = ("client",) if client else ()  # arrays of `loss`

    def forward(self, x: Tensor, client: Tensor | None = None) -> Tensor:
        """Return the logits of every image, [..., K]."""
        return self.classify(normalised(x), client)

    def classify(self, x: Tensor, client: Tensor | None) -> Tensor:
        """Return the logits of `normalised` features."""
        hidden = self.hidden(self.dropout(x))
        if client is not None and self.of_client is not None:
            hidden = hidden + self.of_client(client)
        return self.last(self.dropout(F.gelu(self.norm(hidden))))

    def loss(self, x_BD: Tensor, y: Tensor, client: Tensor | None = None) -> Tensor:
        """Return the mean loss, unless `light` on mixed pairs of images.

        Args:
            x_BD: features.
            y: labels, int64 [B], or 0/1 [B, K].
            client: client vectors after several pasts of each image, [B, J, R]; one of them is drawn.
        """
        x_BD = normalised(x_BD)
        if client is not None:
            client = client[torch.arange(len(x_BD)), torch.randint(client.shape[1], (len(x_BD),))]
        if self.light:
            logits_BK = self.classify(x_BD, client)
            if y.ndim == 2:
                return F.binary_cross_entropy_with_logits(logits_BK, y.to(x_BD.dtype))
            return F.cross_entropy(logits_BK, y)
        other_B, share = torch.randperm(len(x_BD)), torch.rand(())
        if client is not None:
            client = torch.lerp(client[other_B], client, share)
        logits_BK = self.classify(torch.lerp(x_BD[other_B], x_BD, share), client)
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
        """MACs of one image: W (D + R + K)."""
        client = 0 if self.of_client is None else self.of_client.in_features
        return self.width * (self.dim + client + self.num_classes)


def ensemble_weights(task: Task, y: Tensor, b_MK: Tensor, *others_MK: Tensor) -> Tensor:
    """Return weights (v, w, ...) that minimise the log-loss of v b + w o + ..., divided by the best weight of b alone.

    A calibration of b then also calibrates the sum.

    Args:
        task: of the labels.
        y: labels, int64 [M], or 0/1 [M, K].
        b_MK: logits of the backbone's classifier, on images that it was not fitted on.
        others_MK: those of perceptrons, likewise.
    """

    def best(*logits: Tensor) -> Tensor:
        def loss(weights: Tensor) -> Tensor:
            return task.loss(sum(w * part for w, part in zip(weights, logits, strict=True)), y)

        return minimise(loss, torch.full((len(logits),), 1.0 / len(logits)), most=50)[0]

    scale = best(b_MK)[0].clamp(min=1e-3)
    return best(b_MK, *others_MK) / scale
