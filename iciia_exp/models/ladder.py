"""Ladder: a narrow transformer that reads the levels of a backbone through linear layers and gates.

Source: "LST: Ladder Side-Tuning for Parameter and Memory Efficient Transfer Learning" (NeurIPS 2022, arXiv 2206.06522):
level i comes down to the width w and is mixed with the side stream by a gate before block i. Ours: random initial
values, not those of a pruned backbone; the stream's class token comes up to the width d and is added to that of the
last level.

    s_0 = D_0 z_0;  s_i = block_i(g_i D_i z_i + (1 - g_i) s_{i-1}), g_i = sigmoid(a_i);  logits: W LN(z_N + U s_m) + b

Legend: B images, L levels (m + 1), n tokens, d features of a token, w width.
"""

from typing import Any

import torch
from torch import Tensor, nn

from iciia_exp.errors import ConfigError, check_int

__all__ = ["Ladder", "plain_block"]


def plain_block(dim: int, heads: int, mlp_ratio: float = 4.0, qkv_bias: bool = True, scaled: bool = False) -> Any:
    """Return timm's transformer block with attention that can be trained for many clients at once."""
    from timm.models.vision_transformer import Block  # late: importing timm takes seconds

    block: Any = Block(dim, heads, mlp_ratio, qkv_bias=qkv_bias, init_values=1.0 if scaled else None)
    block.attn.fused_attn = False  # its backward pass has no batched form
    return block


class Ladder(nn.Module):
    """A side network and a classifier on the class token.

    Args:
        dim: d.
        num_classes: k.
        blocks: m.
        width: w.
        heads: of each block; divides w.
    """

    def __init__(self, dim: int, num_classes: int, blocks: int, width: int = 48, heads: int = 4) -> None:
        super().__init__()
        if check_int("width", width, 1, 4096) % check_int("heads", heads, 1):
            raise ConfigError("heads", heads, f"must divide the width {width}")
        self.down = nn.ModuleList(nn.Linear(dim, width) for _ in range(blocks + 1))
        self.gates = nn.Parameter(torch.zeros(blocks))
        self.blocks = nn.ModuleList(plain_block(width, heads) for _ in range(blocks))
        self.up, self.norm, self.head = nn.Linear(width, dim), nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, num_classes)
        for layer in (self.up, self.head):
            nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)

    def forward(self, x_BLnd: Tensor) -> Tensor:
        """Return the logits, [B, k]."""
        s_Bnw = self.down[0](x_BLnd[:, 0])
        for i, (down, block) in enumerate(zip(self.down[1:], self.blocks, strict=True)):
            gate = self.gates[i].sigmoid()
            s_Bnw = block(gate * down(x_BLnd[:, i + 1]) + (1 - gate) * s_Bnw)
        return self.head(self.norm(x_BLnd[:, -1, 0] + self.up(s_Bnw[:, 0])))
