"""Grouped projection with shuffle, and self-attention over the images of a client.

Source: ICIIA (ACML 2024, PMLR 260:223-238), section 3 and supplement. Two differences from the released code: the
grouped product is one batched matrix product instead of a broadcast and a sum, and attention runs through PyTorch's
fused kernel.

Legend: C clients, S images of a client, D features, H heads, G groups.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["EncoderLayer", "GroupedLinear", "ImageAttention"]


class GroupedLinear(nn.Module):
    """A linear map whose weight is block-diagonal, followed by a shuffle of the output across groups.

    Inputs are cut into ``groups`` neighbouring slices, each mapped by its own block. The result, [groups, out/groups],
    is transposed and flattened, so that neighbouring outputs come from different groups; the bias is added after the
    shuffle. With one group it is `torch.nn.Linear`, with the same parameter shapes.

    Shapes: input [..., in_features], output [..., out_features]; weight [out, in] for one group, else
    [G, out/G, in/G]; bias [out].
    """

    def __init__(self, in_features: int, out_features: int, groups: int = 1, shuffle: bool = True) -> None:
        super().__init__()
        if in_features % groups or out_features % groups:
            raise ValueError(f"groups={groups} does not divide {in_features} -> {out_features}")
        self.in_features, self.out_features, self.groups, self.shuffle = in_features, out_features, groups, shuffle
        shape = (out_features // groups, in_features // groups)
        self.weight = nn.Parameter(torch.empty(shape if groups == 1 else (groups, *shape)))
        self.bias = nn.Parameter(torch.empty(out_features))
        self.reset_parameters()

    def blocks(self) -> Tensor:
        """Return the weight as [G, out/G, in/G]."""
        return self.weight.view(self.groups, self.out_features // self.groups, self.in_features // self.groups)

    def reset_parameters(self) -> None:
        """Initialise as `torch.nn.Linear` does, per group: kaiming-uniform(sqrt 5), bias in +-1/sqrt(in/G)."""
        for block in self.blocks():
            nn.init.kaiming_uniform_(block, a=math.sqrt(5))
        bound = 1.0 / math.sqrt(self.in_features // self.groups)
        nn.init.uniform_(self.bias, -bound, bound)

    def reset_attention_parameters(self) -> None:
        """Initialise as an attention projection, per group: xavier-uniform, zero bias."""
        for block in self.blocks():
            nn.init.xavier_uniform_(block)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Project, shuffle, add the bias; costs in*out/G multiply-accumulates per vector."""
        if self.groups == 1:
            return F.linear(x, self.weight, self.bias)
        lead = x.shape[:-1]
        x_GMi = x.reshape(-1, self.groups, self.in_features // self.groups).transpose(0, 1)
        y_GMo = torch.bmm(x_GMi, self.weight.transpose(1, 2))
        # [G, M, o] -> [M, o, G]: the outputs of one group end up G apart
        y = y_GMo.permute(1, 2, 0) if self.shuffle else y_GMo.transpose(0, 1)
        return y.reshape(*lead, self.out_features) + self.bias

    def extra_repr(self) -> str:
        """Show the sizes in ``repr``."""
        return f"{self.in_features}, {self.out_features}, groups={self.groups}, shuffle={self.shuffle}"


class ImageAttention(nn.Module):
    """Multi-head self-attention in which every image of a client attends to all images of that client.

    Shapes: input and output [C, S, D]; ``mask_CS`` True where an image is real, None when all are.
    """

    def __init__(self, dim: int, heads: int, groups: int = 1, dropout: float = 0.0, shuffle: bool = True) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = GroupedLinear(dim, 3 * dim, groups, shuffle)
        self.out = GroupedLinear(dim, dim, groups, shuffle)
        self.qkv.reset_attention_parameters()
        self.out.reset_attention_parameters()

    def forward(self, x_CSD: Tensor, mask_CS: Tensor | None = None) -> Tensor:
        """Return what each image gathers from all images of its client, [C, S, D]."""
        C, S, D = x_CSD.shape
        qkv = self.qkv(x_CSD).view(C, S, 3, self.heads, D // self.heads)
        q_CHSd, k_CHSd, v_CHSd = qkv.permute(2, 0, 3, 1, 4)
        keys_C11S = None if mask_CS is None else mask_CS[:, None, None, :]
        drop = self.dropout if self.training else 0.0
        y_CHSd = F.scaled_dot_product_attention(q_CHSd, k_CHSd, v_CHSd, attn_mask=keys_C11S, dropout_p=drop)
        return self.out(y_CHSd.transpose(1, 2).reshape(C, S, D))


class EncoderLayer(nn.Module):
    """Post-norm transformer layer over images: attention, then a D -> D -> D perceptron, both with residuals.

    Shapes: input and output [C, S, D].
    """

    def __init__(self, dim: int, heads: int, groups: int = 1, dropout: float = 0.1, shuffle: bool = True) -> None:
        super().__init__()
        self.attention = ImageAttention(dim, heads, groups, dropout, shuffle)
        self.linear1 = GroupedLinear(dim, dim, groups, shuffle)
        self.linear2 = GroupedLinear(dim, dim, groups, shuffle)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_CSD: Tensor, mask_CS: Tensor | None = None) -> Tensor:
        """Return the layer's output, [C, S, D]."""
        x_CSD = self.norm1(x_CSD + self.dropout(self.attention(x_CSD, mask_CS)))
        hidden = self.dropout(F.relu(self.linear1(x_CSD)))
        return self.norm2(x_CSD + self.dropout(self.linear2(hidden)))
