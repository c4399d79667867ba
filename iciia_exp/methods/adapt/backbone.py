"""The frozen backbone by itself: what every method is compared with."""

from __future__ import annotations

from torch import nn

from iciia_exp.methods.adapt.base import HeadMethod

__all__ = ["BackboneOnly"]


class BackboneOnly(HeadMethod):
    """The backbone's own classifier on each image alone."""

    name = "backbone"
    trainable = False

    def __init__(self, head: nn.Linear) -> None:
        super().__init__(head)
        self.requires_grad_(False)
