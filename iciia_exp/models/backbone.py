"""The interface of a backbone: a trunk that gives features, and the linear classifier that reads them.

Legend: B images of a batch, D features, K classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from iciia_exp.errors import ConfigError, check_choice, check_int
from iciia_exp.recipe import Recipe

__all__ = ["Backbone", "BackboneSpec"]


class Backbone(nn.Module, ABC):
    """A network with ``head(features(images))`` equal to its logits.

    A subclass sets ``dim`` (D), ``num_classes`` (K) and ``head``.
    """

    dim: int
    num_classes: int
    head: nn.Linear

    @abstractmethod
    def features(self, images: Tensor) -> Tensor:
        """Return what the classifier sees, [B, D]."""

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits [B, K]."""
        return self.head(self.features(images))

    @abstractmethod
    def transform(self, image: Any) -> Tensor:
        """Turn one image of the dataset into the network's input, without a batch axis."""

    @abstractmethod
    def describe_transform(self) -> dict[str, Any]:
        """Return `transform` as plain values, for the feature manifest."""


class BackboneSpec:
    """A backbone by configuration: the network, where its weights come from, and its seed.

    Args:
        name: short name for folders and tables.
        model: builds the network from ``num_classes``; in a configuration, a ``_partial_`` target.
        recipe: how it is trained here.
        train: ``all``: train trunk and head on the dataset's backbone images.
        seed: seed of its initialisation and training.
    """

    def __init__(
        self, name: str, model: Callable[..., Backbone], recipe: Recipe, train: str = "all", seed: int = 0
    ) -> None:
        self.name = name
        self.model = model
        self.recipe = recipe
        self.train = check_choice("train", train, ("all",))
        self.seed = check_int("seed", seed, 0)
        if recipe.patience:
            raise ConfigError(
                "recipe.patience", recipe.patience, "must be 0: a backbone has no selection images of its own"
            )
