"""ICIIA's size without its idea: attention replaced by linear, ReLU, linear on each image alone.

Source: a baseline of ICIIA (ACML 2024, PMLR 260:223-238). What it gains comes from more parameters, not from clients.
"""

from __future__ import annotations

from torch import nn

from iciia_exp.methods.adapt.base import PerImage
from iciia_exp.methods.adapt.encoder import EncoderMethod
from iciia_exp.models.mixers import FeedForwardMixer

__all__ = ["FeedForward"]


class FeedForward(PerImage, EncoderMethod):
    """N layers of as many parameters as ICIIA's that see one image each.

    Args:
        facts: task, D and K; the module trains a classifier of its own.
        num_layers, groups, dropout, shuffle: as of `iciia`.
    """

    name = "feedforward"

    def mixer(self) -> nn.Module:
        """Return D -> 2 D -> D."""
        return FeedForwardMixer(self.dim, self.groups, self.shuffle)
