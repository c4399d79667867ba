"""Encoder baselines: ICIIA's layers with another token mixer in place of attention.

Source: the baselines of ICIIA (ACML 2024, PMLR 260:223-238). `FeedForward` shows what the parameters alone gain,
without the client. The order of a client's images carries no information, so attention, which ignores it, should do
better than `ConvAcrossImages`.

Legend: C clients, S images of a client, D features, K classes, N layers, G groups.
"""

from abc import abstractmethod
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from iciia_exp.methods.adapt.base import Adaptive, PerImage
from iciia_exp.methods.adapt.iciia import IciiaMethod
from iciia_exp.methods.base import Facts
from iciia_exp.models.layers import EncoderLayer, visible
from iciia_exp.models.mixers import ConvolutionMixer, FeedForwardMixer

__all__ = ["ConvAcrossImages", "EncoderMethod", "FeedForward"]


class EncoderMethod(Adaptive):
    """N post-norm layers, ReLU and a linear classifier of its own, as in ICIIA; a subclass defines the mixer.

    Args:
        facts: task, D and K; the module trains a classifier of its own.
        num_layers: N.
        groups: G, a divisor of D, or ``max`` for D.
        dropout: on hidden units and both branches, while training.
        shuffle: interleave the groups after every projection.
    """

    def __init__(
        self,
        facts: Facts,
        num_layers: int = 1,
        groups: int | str = 1,
        dropout: float = 0.1,
        shuffle: bool = True,
    ) -> None:
        super().__init__(facts)
        given = {"num_layers": num_layers, "groups": groups, "dropout": dropout, "shuffle": shuffle}
        settings = self.canonical(given, self.dim)
        self.num_layers, self.groups = num_layers, int(settings["groups"])
        self.dropout, self.shuffle = dropout, settings["shuffle"]
        self.layers = nn.ModuleList(
            EncoderLayer(self.dim, 1, self.groups, dropout, self.shuffle, self.mixer()) for _ in range(num_layers)
        )
        self.classifier = nn.Linear(self.dim, self.num_classes)

    @classmethod
    def canonical(cls, config: dict[str, Any], dim: int) -> dict[str, Any]:
        """Check the values against D; ``max`` becomes D, and with one group shuffle changes nothing."""
        return IciiaMethod.canonical(config, dim)

    @abstractmethod
    def mixer(self) -> nn.Module:
        """Return a layer's replacement for attention."""

    def forward(self, x_CSD: Tensor, mask_CS: Tensor | None = None) -> Tensor:
        """Return the logits, [C, S, K]."""
        seen = visible(x_CSD.shape[1], mask_CS, causal=False)
        for layer in self.layers:
            x_CSD = layer(x_CSD, seen)
        return self.classifier(F.relu(x_CSD))

    def macs(self, images: int) -> int:
        """6 S D^2 / G N: as ICIIA's, without the products of attention."""
        return 6 * images * self.dim**2 // self.groups * self.num_layers

    def num_parameters(self) -> int:
        """The encoder's; the classifier replaces the backbone's."""
        return sum(p.numel() for p in self.layers.parameters())


class FeedForward(PerImage, EncoderMethod):
    """N layers with as many parameters as ICIIA's; each image is classified alone.

    Args:
        facts, num_layers, groups, dropout, shuffle: as of `EncoderMethod`.
    """

    name = "feedforward"

    def mixer(self) -> nn.Module:
        """Return D -> 2 D -> D."""
        return FeedForwardMixer(self.dim, self.groups, self.shuffle)


class ConvAcrossImages(EncoderMethod):
    """N layers with a convolution over neighbouring images.

    Args:
        facts, num_layers, groups, dropout, shuffle: as of `EncoderMethod`.
    """

    name = "conv_across_images"

    def mixer(self) -> nn.Module:
        """Return a convolution of width 3, ReLU and a linear map."""
        return ConvolutionMixer(self.dim, self.groups, self.shuffle)

    def streaming_macs(self, images: int) -> int | None:
        """None: an image changes the logits of its neighbours, and only the state of the last ones is kept."""
        return None
