"""Feed-forward: ICIIA's layers with linear, ReLU, linear on each image alone in place of attention.

Source: a baseline of ICIIA (ACML 2024, PMLR 260:223-238). It shows what the parameters alone gain, without the client.
"""

from __future__ import annotations

from torch import nn

from iciia_exp.methods.adapt.base import PerImage
from iciia_exp.methods.adapt.encoder import EncoderMethod
from iciia_exp.models.mixers import FeedForwardMixer

__all__ = ["FeedForward"]


class FeedForward(PerImage, EncoderMethod):
    """N layers with as many parameters as ICIIA's; each image is classified alone.

    Args:
        facts: task, D and K; the module trains a classifier of its own.
        num_layers, groups, dropout, shuffle: as of `iciia`.
    """

    name = "feedforward"

    def mixer(self) -> nn.Module:
        """Return D -> 2 D -> D."""
        return FeedForwardMixer(self.dim, self.groups, self.shuffle)
