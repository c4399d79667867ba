"""Token mixers in place of attention: none, a convolution, and one token of context.

Each has the parameters of attention, 4 D^2 / G, and its call: features [C, S, D] and which images see which.

Source: the baselines of ICIIA (ACML 2024, PMLR 260:223-238), section 4, and ContextViT (see `TokenMixer`).
Legend: C clients, S images of a client, D features, G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from iciia_exp.models.grouped import GroupedLinear

__all__ = ["ConvolutionMixer", "FeedForwardMixer", "TokenMixer"]


class FeedForwardMixer(nn.Module):
    """Linear, ReLU, linear on each image alone, D -> 2 D -> D: as large as attention, and blind to other images."""

    def __init__(self, dim: int, groups: int = 1, shuffle: bool = True) -> None:
        super().__init__()
        self.inner = GroupedLinear(dim, 2 * dim, groups, shuffle)
        self.out = GroupedLinear(2 * dim, dim, groups, shuffle)

    def forward(self, x_CSD: Tensor, visible: Tensor | None = None) -> Tensor:
        """Return [C, S, D]; costs 4 D^2 / G an image."""
        return self.out(F.relu(self.inner(x_CSD)))


class ConvolutionMixer(nn.Module):
    """A convolution over a client's images in their order, ReLU, linear: three neighbouring images see each other."""

    WIDTH = 3

    def __init__(self, dim: int, groups: int = 1, shuffle: bool = True) -> None:
        super().__init__()
        self.inner = GroupedLinear(dim, self.WIDTH * dim, groups, shuffle)
        self.out = GroupedLinear(dim, dim, groups, shuffle)

    def forward(self, x_CSD: Tensor, visible: Tensor | None = None) -> Tensor:
        """Return [C, S, D]; costs 4 D^2 / G an image. Past the ends of a client are zeros."""
        # one product gives what every image sends to the one before, itself and the one after
        before, own, after = self.inner(x_CSD).chunk(self.WIDTH, dim=-1)
        if visible is not None:
            real_CS1 = visible[:, 0, 0, :, None].to(x_CSD.dtype)
            before, after = before * real_CS1, after * real_CS1
        sent = own + F.pad(before, (0, 0, 0, 1))[:, 1:] + F.pad(after, (0, 0, 1, 0))[:, :-1]
        return self.out(F.relu(sent))


class TokenMixer(nn.Module):
    """Attention of each image to itself and to one token, a linear map of the mean of the client's images.

    Source: Bao and Karaletsos 2023, "Contextual Vision Transformers for Robust Representation Learning": a token that
    is inferred from the pooled images of a group joins the tokens of each. Here an image is one token.
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
        """Return [C, S, D]; costs (4 S + 4) D^2 / G + 4 S D for S images. ``visible`` is which of them are real."""
        C, S, D = x_CSD.shape
        real_CS1 = x_CSD.new_ones(C, S, 1) if visible is None else visible[:, 0, 0, :, None].to(x_CSD.dtype)
        token_C1D = self.token((x_CSD * real_CS1).sum(1, keepdim=True) / real_CS1.sum(1, keepdim=True).clamp(min=1))
        q_CSD, own_k, own_v = self.qkv(x_CSD).chunk(3, dim=-1)
        _, token_k, token_v = self.qkv(token_C1D).chunk(3, dim=-1)
        k_CS2D = torch.stack([own_k, token_k.expand_as(own_k)], 2)
        v_CS2D = torch.stack([own_v, token_v.expand_as(own_v)], 2)
        q_MH1d, k_MH2d, v_MH2d = (
            part.reshape(C * S, -1, self.heads, D // self.heads).transpose(1, 2) for part in (q_CSD, k_CS2D, v_CS2D)
        )
        drop = self.dropout if self.training else 0.0
        y_MH1d = F.scaled_dot_product_attention(q_MH1d, k_MH2d, v_MH2d, dropout_p=drop)
        return self.out(y_MH1d.transpose(1, 2).reshape(C, S, D))
