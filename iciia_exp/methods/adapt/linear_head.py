"""Linear head: a trained linear classifier and no attention."""

from __future__ import annotations

from iciia_exp.methods.adapt.base import HeadMethod

__all__ = ["LinearHead"]


class LinearHead(HeadMethod):
    """The backbone's classifier, trained further on the method's own images."""

    name = "linear_head"
