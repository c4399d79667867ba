"""Token mixers that replace attention: a perceptron, a convolution, and a context token.

Perceptron and convolution have as many parameters as attention, 4 D^2 / G. All have its signature: features [C, S, D]
and the attention mask of `iciia_exp.models.layers.visible`.

Source: the baselines of ICIIA (ACML 2024, PMLR 260:223-238), section 4, and ContextViT (see `TokenMixer`).
Legend: C clients, S images of a client, D features, G groups.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from iciia_exp.models.grouped import GroupedLinear

__all__ = ["ConvolutionMixer", "FeedForwardMixer", "TokenMixer"]


class FeedForwardMixer(nn.Module):
    """Linear, ReLU, linear on each image alone, D -> 2 D -> D: as large as attention, without other images."""

    def __init__(self, dim: int, groups: int = 1, shuffle: bool = True) -> None:
        super().__init__()
        self.inner = GroupedLinear(dim, 2 * dim, groups, shuffle)
        self.out = GroupedLinear(2 * dim, dim, groups, shuffle)

    def forward(self, x_CSD: Tensor, visible: Tensor | None = None) -> Tensor:
        """Return [C, S, D]; costs 4 D^2 / G per image."""
        return self.out(F.relu(self.inner(x_CSD)))


class ConvolutionMixer(nn.Module):
    """Convolution over three neighbouring images of a client, in their order; ReLU; linear."""

    WIDTH = 3

    def __init__(self, dim: int, groups: int = 1, shuffle: bool = True) -> None:
        super().__init__()
        self.inner = GroupedLinear(dim, self.WIDTH * dim, groups, shuffle)
        self.out = GroupedLinear(dim, dim, groups, shuffle)

    def forward(self, x_CSD: Tensor, visible: Tensor | None = None) -> Tensor:
        """Return [C, S, D]; costs 4 D^2 / G per image. The ends of a client are padded with zeros."""
        # one product gives the terms that every image adds to the image before, itself and the image after
        before, same, after = self.inner(x_CSD).chunk(self.WIDTH, dim=-1)
        if visible is not None:
            real_CS1 = visible[:, 0, 0, :, None].to(x_CSD.dtype)
            before, after = before * real_CS1, after * real_CS1
        return self.out(F.relu(same + F.pad(before, (0, 0, 0, 1))[:, 1:] + F.pad(after, (0, 0, 1, 0))[:, :-1]))


class TokenMixer(nn.Module):
    """Attention of each image to itself and to a context token, a linear map of the mean of the client's images.

    Source: Bao and Karaletsos 2023, "Contextual Vision Transformers for Robust Representation Learning", where a token
    inferred from the pooled images of a group joins the tokens of each image. Here an image is one token.
    """

    def __init__(self, dim: int, heads: int, groups: int = 1, dropout: float = 0.0, shuffle: bool = True) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.token = GroupedLinear(dim, dim, groups, shuffle)
        self.qkv = GroupedLinear(dim, 3 * dim, groups, shuffle)
        self.out = GroupedLinear(dim, dim, groups, shuffle)
        self.qkv.reset_attention_parameters()
        self.out.reset_attention_parameters()

    def forward(self, x_CSD: Tensor, visible: Tensor | None = None) -> Tensor:
        """Return [C, S, D]; costs (4 S + 4) D^2 / G + 4 S D for S images. ``visible`` marks the real images."""
        return self.attend(x_CSD, self.context(x_CSD, visible))

    def context(self, x_CSD: Tensor, visible: Tensor | None = None) -> Tensor:
        """Return the token of each client, [C, 1, D]; costs D^2 / G."""
        real_CS1 = x_CSD.new_ones(*x_CSD.shape[:2], 1) if visible is None else visible[:, 0, 0, :, None].to(x_CSD.dtype)
        return self.token((x_CSD * real_CS1).sum(1, keepdim=True) / real_CS1.sum(1, keepdim=True).clamp(min=1))

    def attend(self, x_CSD: Tensor, token_C1D: Tensor) -> Tensor:
        """Return the attention's output for some images of each client, [C, S, D]."""
        C, S, D = x_CSD.shape
        q_CSD, k_CSD, v_CSD = self.qkv(x_CSD).chunk(3, dim=-1)
        _, token_k, token_v = self.qkv(token_C1D).chunk(3, dim=-1)
        k_CS2D = torch.stack([k_CSD, token_k.expand_as(k_CSD)], 2)
        v_CS2D = torch.stack([v_CSD, token_v.expand_as(v_CSD)], 2)
        q_MH1d, k_MH2d, v_MH2d = (
            part.reshape(C * S, -1, self.heads, D // self.heads).transpose(1, 2) for part in (q_CSD, k_CS2D, v_CS2D)
        )
        drop = self.dropout if self.training else 0.0
        y_MH1d = F.scaled_dot_product_attention(q_MH1d, k_MH2d, v_MH2d, dropout_p=drop)
        return self.out(y_MH1d.transpose(1, 2).reshape(C, S, D))
