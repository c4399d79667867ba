"""Encoder layers: self-attention over the images of a client, with grouped projections.

Source: ICIIA (ACML 2024, PMLR 260:223-238), section 3 and supplement. Three differences from the released code: the
grouped product is a batched matrix product (in inference on a CPU, a grouped 1 x 1 convolution and a channel shuffle)
instead of a broadcast and a sum, with small groups joined to blocks that a CPU or GPU multiplies fast; attention runs
through PyTorch's fused kernel; and it can be causal, so that the newest image of a client costs one step, with the keys
and values of the others kept.

Legend: C clients, S images of a client, P images of its past, n new images, D features, H heads, G groups, M vectors.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from iciia_exp.models.fast_dropout import Dropout
from iciia_exp.models.grouped import GroupedLinear

__all__ = ["EncoderLayer", "ImageAttention", "visible"]


def visible(images: int, mask_CS: Tensor | None, causal: bool) -> Tensor | None:
    """Return the attention mask, bool [C, 1, S, S] (or [C, 1, 1, S]); None where every image attends to all.

    True at [c, 0, s, t] where image s attends to image t: t is real and, if ``causal``, not after s. With ``causal`` an
    image always attends to itself, so that a padded image gives no NaN.
    """
    if not causal:
        return None if mask_CS is None else mask_CS[:, None, None, :]
    device = None if mask_CS is None else mask_CS.device
    past_SS = torch.ones(images, images, dtype=torch.bool, device=device).tril()
    if mask_CS is None:
        return past_SS
    return (past_SS & mask_CS[:, None, None, :]) | torch.eye(images, dtype=torch.bool, device=device)


class ImageAttention(nn.Module):
    """Multi-head self-attention among the images of a client.

    Shapes: input and output [C, S, D]; ``visible`` as `visible` returns it.
    """

    def __init__(self, dim: int, heads: int, groups: int = 1, dropout: float = 0.0, shuffle: bool = True) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = GroupedLinear(dim, 3 * dim, groups, shuffle)
        self.out = GroupedLinear(dim, dim, groups, shuffle)
        self.qkv.reset_attention_parameters()
        self.out.reset_attention_parameters()

    def forward(self, x_CSD: Tensor, visible: Tensor | None = None) -> Tensor:
        """Return the attention's output, [C, S, D]."""
        C, S, D = x_CSD.shape
        # unbound here, their gradients are written side by side in one pass
        parts = self.qkv(x_CSD).view(C, S, 3, self.heads, D // self.heads).unbind(2)
        q_CHSd, k_CHSd, v_CHSd = (part_CSHd.transpose(1, 2) for part_CSHd in parts)
        drop = self.dropout if self.training else 0.0
        y_CHSd = F.scaled_dot_product_attention(q_CHSd, k_CHSd, v_CHSd, attn_mask=visible, dropout_p=drop)
        return self.out(y_CHSd.transpose(1, 2).reshape(C, S, D))

    def weights(self, x_CSD: Tensor, visible: Tensor | None = None) -> Tensor:
        """Return the attention weights of every head, [C, H, S, S]; rows sum to one. `forward` never computes them."""
        C, S, D = x_CSD.shape
        q_CHSd, k_CHSd, _ = self.qkv(x_CSD).view(C, S, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        scores_CHSS = q_CHSd @ k_CHSd.transpose(2, 3) / math.sqrt(D // self.heads)
        if visible is not None:
            scores_CHSS = scores_CHSS.masked_fill(~visible, -torch.inf)
        return scores_CHSS.softmax(-1)

    def step(self, x_CD: Tensor, past_2CPD: Tensor, visible: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the attention's output for one more image, [C, D], and its key and value, [2, C, D].

        Args:
            x_CD: the image.
            past_2CPD: keys and values of the past images.
            visible: bool [C, 1, 1, P + 1], the image itself last; None where all are real.
        """
        C, D = x_CD.shape
        q_CD, k_CD, v_CD = self.qkv(x_CD).view(C, 3, D).unbind(1)
        state_2CD = torch.stack([k_CD, v_CD])
        all_2CHTd = torch.cat([past_2CPD, state_2CD[:, :, None]], 2).unflatten(3, (self.heads, -1)).transpose(2, 3)
        q_CH1d = q_CD.view(C, self.heads, 1, -1)
        y_CH1d = F.scaled_dot_product_attention(q_CH1d, all_2CHTd[0], all_2CHTd[1], attn_mask=visible)
        return self.out(y_CH1d.reshape(C, D)), state_2CD

    def steps(self, x_CnD: Tensor, memory_2CSD: Tensor, visible: Tensor | None) -> Tensor:
        """Return the attention's output for some more images, [C, n, D].

        Args:
            x_CnD: the images.
            memory_2CSD: keys and values of the past images; those of the new ones are written into the last n places.
            visible: bool [C, 1, n, S], the images themselves last; None where all are.
        """
        C, n, D = x_CnD.shape
        q_CnD, k_CnD, v_CnD = self.qkv(x_CnD).view(C, n, 3, D).unbind(2)
        memory_2CSD[0, :, -n:], memory_2CSD[1, :, -n:] = k_CnD, v_CnD
        all_2CHSd = memory_2CSD.unflatten(3, (self.heads, -1)).transpose(2, 3)
        q_CHnd = q_CnD.unflatten(2, (self.heads, -1)).transpose(1, 2)
        y_CHnd = F.scaled_dot_product_attention(q_CHnd, all_2CHSd[0], all_2CHSd[1], attn_mask=visible)
        return self.out(y_CHnd.transpose(1, 2).reshape(C, n, D))


class EncoderLayer(nn.Module):
    """Post-norm transformer layer over images: attention, then a D -> D -> D perceptron, both with residuals.

    ``mixer`` replaces attention, for the baselines: a module with the same signature (`iciia_exp.models.mixers`).

    Shapes: input and output [C, S, D].
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        groups: int = 1,
        dropout: float = 0.1,
        shuffle: bool = True,
        mixer: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.attention = mixer or ImageAttention(dim, heads, groups, dropout, shuffle)
        self.linear1 = GroupedLinear(dim, dim, groups, shuffle)
        self.linear2 = GroupedLinear(dim, dim, groups, shuffle)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.dropout = Dropout(dropout)

    def forward(self, x_CSD: Tensor, visible: Tensor | None = None) -> Tensor:
        """Return the layer's output, [C, S, D]."""
        return self.after(x_CSD, self.attention(x_CSD, visible))

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the layer's output for images [..., D] with attention's output for them, [..., D]."""
        return self._perceptron(self.norm1(x + self.dropout(y)))

    def step(self, x_CD: Tensor, past_2CPD: Tensor, visible: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the output for one more image, [C, D], and its key and value; see `ImageAttention.step`."""
        assert isinstance(self.attention, ImageAttention)
        y_CD, state_2CD = self.attention.step(x_CD, past_2CPD, visible)
        return self._perceptron(self.norm1(x_CD + y_CD)), state_2CD

    def steps(self, x_CnD: Tensor, memory_2CSD: Tensor, visible: Tensor | None) -> Tensor:
        """Return the output for some more images, [C, n, D]; see `ImageAttention.steps`."""
        assert isinstance(self.attention, ImageAttention)
        return self._perceptron(self.norm1(x_CnD + self.attention.steps(x_CnD, memory_2CSD, visible)))

    def _perceptron(self, x: Tensor) -> Tensor:
        hidden = self.dropout(F.relu_(self.linear1(x)))
        return self.norm2(x + self.dropout(self.linear2(hidden)))
