"""Context token: one token for all images of a client, inferred from their mean.

Source: Bao and Karaletsos 2023, "Contextual Vision Transformers for Robust Representation Learning" (ContextViT), with
features of images in place of patches: each image attends to itself and to the token.

Legend: S images of a client, D features, N layers, G groups.
"""

from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F

from iciia_exp.methods.adapt.encoder import EncoderMethod
from iciia_exp.methods.base import Facts
from iciia_exp.models.layers import EncoderLayer, visible
from iciia_exp.models.mixers import TokenMixer

__all__ = ["ContextToken"]


class ContextToken(EncoderMethod):
    """N layers, each with a token inferred from the mean of its inputs.

    Args:
        facts: task, D and K; the module trains a classifier of its own.
        num_layers, heads, groups, dropout, shuffle: as of `iciia`.
    """

    name = "context_token"

    def __init__(
        self,
        facts: Facts,
        num_layers: int = 1,
        heads: int = 4,
        groups: int | str = 1,
        dropout: float = 0.1,
        shuffle: bool = True,
    ) -> None:
        self.heads = self.canonical({"heads": heads, "groups": groups}, facts.dim)["heads"]  # for `mixer`
        super().__init__(facts, num_layers, groups, dropout, shuffle)

    def mixer(self) -> nn.Module:
        """Return attention to the image itself and to the token."""
        return TokenMixer(self.dim, self.heads, self.groups, self.dropout, self.shuffle)

    def newest(self, x_CSD: Tensor, mask_CS: Tensor | None) -> Tensor:
        """Return the logits of the last image of each client; with one layer, the others only give the token."""
        if self.num_layers > 1:
            return super().newest(x_CSD, mask_CS)
        layer = cast(EncoderLayer, self.layers[0])
        mixer, x_C1D = cast(TokenMixer, layer.attention), x_CSD[:, -1:]
        token_C1D = mixer.context(x_CSD, visible(x_CSD.shape[1], mask_CS, causal=False))
        return self.classifier(F.relu(layer.after(x_C1D, mixer.attend(x_C1D, token_C1D))))[:, 0]

    def macs(self, images: int) -> int:
        """((6 S + 4) D^2 / G + 4 S D) N."""
        return ((6 * images + 4) * self.dim**2 // self.groups + 4 * images * self.dim) * self.num_layers

    def streaming_macs(self, images: int) -> int | None:
        """((6 + 4) D^2 / G + 4 D) with one layer, of which only the token depends on the past; None with more."""
        return self.macs(1) if self.num_layers == 1 else None
