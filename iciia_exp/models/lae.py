"""LAE: low-rank attention blocks on the tokens of a backbone, and a classifier.

Source: "Minimal Interaction Separated Tuning" (CVPR 2025, arXiv 2406.17559) for the network and its input, one sum of
token levels; "Low-rank Attention Side-Tuning" (arXiv 2402.04009) for the block and the subtraction. No code of either
is public; number of blocks, rank, heads and pooling are ours.

    block:  h = LN(u);  Q, K, V = h A_q, h A_k, h A_v;  u <- u + softmax(Q K^T / sqrt(r/H)) V A_up
    logits: W pool(LN(u_m)) + b

MACs of an image: m (4 n d r + 2 n^2 r) + d K. Parameters: m (4 d r + 2 d) + 2 d + d K + K.

Legend: B images, n tokens, d features of a token, r rank, H heads, e = r/H, m blocks, K classes.
"""

import torch
from torch import Tensor, nn

from iciia_exp.errors import ConfigError, check_bool, check_choice, check_int

__all__ = ["LAE", "POOLS", "LowRankAttention", "prefix_tokens"]

POOLS = ("class", "mean")


def prefix_tokens(tokens: int) -> int:
    """Return how many of n tokens come before a square grid of patches: class and register tokens.

    >>> prefix_tokens(197), prefix_tokens(16), prefix_tokens(201)
    (1, 0, 5)
    """
    return tokens - int(tokens**0.5) ** 2


class LowRankAttention(nn.Module):
    """Attention among the tokens of an image, with projections of rank r; without biases and feed-forward.

    Args:
        dim: d.
        rank: r; divisible by the heads.
        heads: H.
    """

    def __init__(self, dim: int, rank: int, heads: int = 1) -> None:
        super().__init__()
        self.heads = check_int("heads", heads, 1)
        if rank % heads:
            raise ConfigError("heads", heads, f"must divide the rank {rank}")
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        for name in ("query", "key", "value"):
            matrix = nn.Parameter(torch.empty(dim, rank))
            nn.init.xavier_uniform_(matrix)
            setattr(self, name, matrix)
        self.up = nn.Parameter(torch.zeros(rank, dim))  # a block starts as the identity

    def forward(self, u_Bnd: Tensor) -> Tensor:
        """Return the tokens with the attention's result added, [B, n, d]."""
        h_Bnd = self.norm(u_Bnd)
        q, k, v = (self._split(h_Bnd @ matrix) for matrix in (self.query, self.key, self.value))
        weights_BHnn = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        return u_Bnd + (weights_BHnn @ v).transpose(1, 2).flatten(2) @ self.up

    def _split(self, x_Bnr: Tensor) -> Tensor:
        return x_Bnr.unflatten(2, (self.heads, -1)).transpose(1, 2)  # [B, H, n, e]


class LAE(nn.Module):
    """The device's network: blocks of low-rank attention, and a classifier on the pooled tokens.

    Without blocks it is a linear classifier on the normalised token.

    Args:
        dim: d.
        num_classes: K.
        blocks: m.
        rank: r.
        heads: H.
        pool: ``class``: the first token; ``mean``: the mean over the patches.
        prefix: tokens before the patches.
        subtract: classify what the blocks added to their input, and not the sum (LAST).
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        blocks: int = 2,
        rank: int = 16,
        heads: int = 1,
        pool: str = "class",
        prefix: int = 1,
        subtract: bool = False,
    ) -> None:
        super().__init__()
        check_int("blocks", blocks, 0, 100), check_int("rank", rank, 1, 4096)
        self.pool, self.prefix = check_choice("pool", pool, POOLS), prefix
        if pool == "class" and not prefix:
            raise ConfigError("pool", pool, "the backbone has no class token; use mean")
        self.subtract = check_bool("subtract", subtract)
        if subtract and not blocks:
            raise ConfigError("subtract", subtract, "needs blocks")
        self.blocks = nn.ModuleList(LowRankAttention(dim, rank, heads) for _ in range(blocks))
        self.rank, self.norm, self.head = rank, nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, num_classes)
        nn.init.zeros_(self.head.weight), nn.init.zeros_(self.head.bias)

    def stream(self, x_Bnd: Tensor) -> Tensor:
        """Return the tokens after the last block, [B, n, d]."""
        for block in self.blocks:
            x_Bnd = block(x_Bnd)
        return x_Bnd

    def forward(self, x_Bnd: Tensor) -> Tensor:
        """Return the logits, [B, K]."""
        u_Bnd = self.stream(x_Bnd)
        if self.subtract:
            u_Bnd = u_Bnd - x_Bnd
        if self.pool == "class":  # the norm of one token alone
            return self.head(self.norm(u_Bnd[:, 0]))
        return self.head(self.norm(u_Bnd)[:, self.prefix :].mean(1))

    def macs(self, tokens: int) -> int:
        """Return the MACs of an image with n tokens."""
        dim, classes = self.head.in_features, self.head.out_features
        return len(self.blocks) * (4 * tokens * dim * self.rank + 2 * tokens**2 * self.rank) + dim * classes
