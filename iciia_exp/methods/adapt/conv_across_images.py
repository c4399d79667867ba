"""Convolution across images: each image sees its two neighbours in the sequence, in place of attention.

Source: a baseline of ICIIA (ACML 2024, PMLR 260:223-238). The order of a client's images carries no information, so
attention, which ignores it, should do better.
"""

from __future__ import annotations

from torch import nn

from iciia_exp.methods.adapt.encoder import EncoderMethod
from iciia_exp.models.mixers import ConvolutionMixer

__all__ = ["ConvAcrossImages"]


class ConvAcrossImages(EncoderMethod):
    """N layers with a convolution over neighbouring images.

    Args:
        facts: task, D and K; the module trains a classifier of its own.
        num_layers, groups, dropout, shuffle: as of `iciia`.
    """

    name = "conv_across_images"

    def mixer(self) -> nn.Module:
        """Return a convolution of width 3, ReLU and a linear map."""
        return ConvolutionMixer(self.dim, self.groups, self.shuffle)

    def streaming_macs(self, images: int) -> int | None:
        """None: an image changes the logits of its neighbours, and only the state of the last ones is kept."""
        return None
