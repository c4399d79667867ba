"""Backbone alone: the baseline that every method is compared with."""

from __future__ import annotations

from iciia_exp.data.views import CloudView
from iciia_exp.methods.adapt.base import HeadMethod
from iciia_exp.methods.base import Facts, Fit, Record

__all__ = ["BackboneOnly"]


class BackboneOnly(HeadMethod):
    """The backbone's own classifier on each image alone."""

    name = "backbone"
    trainable = False

    def __init__(self, facts: Facts) -> None:
        super().__init__(facts)
        self.requires_grad_(False)

    def learn(self, cloud: CloudView, fit: Fit) -> Record:
        """Learn nothing."""
        self.eval()
        return {}
