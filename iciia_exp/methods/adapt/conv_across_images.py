"""Convolution across images: in place of attention, each image sees its two neighbours in the sequence.

Source: a baseline of ICIIA (ACML 2024, PMLR 260:223-238). The order of a client's images means nothing, which is why
attention, that knows no order, should be better.
"""

from __future__ import annotations

from torch import nn

from iciia_exp.methods.adapt.encoder import EncoderMethod
from iciia_exp.models.mixers import ConvolutionMixer

__all__ = ["ConvAcrossImages"]


class ConvAcrossImages(EncoderMethod):
    """N layers whose images see their neighbours.

    Args:
        facts: task, D and K; the module trains a classifier of its own.
        num_layers, groups, dropout, shuffle: as of `iciia`.
    """

    name = "conv_across_images"

    def mixer(self) -> nn.Module:
        """Return a convolution of width 3, ReLU and a linear map."""
        return ConvolutionMixer(self.dim, self.groups, self.shuffle)

    def streaming_macs(self, images: int) -> int | None:
        """No closed form here: an image changes its neighbours' answers, and keeps state of the last ones only."""
        return None
