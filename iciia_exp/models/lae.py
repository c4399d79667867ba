"""LAE: low-rank attention blocks on the tokens of a backbone, and a classifier.

Source: "Minimal Interaction Separated Tuning" (CVPR 2025, arXiv 2406.17559) for the network and its input, one sum of
token levels; "Low-rank Attention Side-Tuning" (arXiv 2402.04009) for the block and the subtraction. No code of either
is public; number of blocks, rank, heads and pooling are ours.

    block:  h = LN(u);  Q, K, V = h A_q, h A_k, h A_v;  u <- u + softmax(Q K^T / sqrt(r/H)) V A_up
    logits: W pool(LN(u_m)) + b

MACs of an image: m (4 n d r + 2 n^2 r) + d K. Parameters: m (4 d r + 2 d) + 2 d + d K + K. With ``pool="both"`` the
classifier has 2 d inputs.

Legend: B images, n tokens, d features of a token, r rank, H heads, e = r/H, m blocks, K classes.
"""

import torch
from torch import Tensor, nn

from iciia_exp.errors import ConfigError, check_bool, check_choice, check_int

__all__ = ["LAE", "LAST", "MIXERS", "POOLS", "LowRankAttention", "prefix_tokens"]

POOLS = ("class", "mean", "both")
MIXERS = ("attention", "perceptron", "convolution")


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
        self.query, self.key, self.value = (nn.Parameter(torch.empty(dim, rank)) for _ in range(3))
        for matrix in (self.query, self.key, self.value):
            nn.init.xavier_uniform_(matrix)
        self.up = nn.Parameter(torch.zeros(rank, dim))  # a block starts as the identity

    def forward(self, u_Bnd: Tensor) -> Tensor:
        """Return the tokens with the attention's result added, [B, n, d]."""
        h_Bnd = self.norm(u_Bnd)
        q, k, v = (self._split(h_Bnd @ matrix) for matrix in (self.query, self.key, self.value))
        weights_BHnn = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        return u_Bnd + (weights_BHnn @ v).transpose(1, 2).flatten(2) @ self.up

    def _split(self, x_Bnr: Tensor) -> Tensor:
        return x_Bnr.unflatten(2, (self.heads, -1)).transpose(1, 2)  # [B, H, n, e]

    def macs(self, tokens: int) -> int:
        """Return the MACs of an image with n tokens."""
        dim, rank = self.query.shape
        return 4 * tokens * dim * rank + 2 * tokens**2 * rank


class Bottleneck(nn.Module):
    """A perceptron of each token, or a convolution over the patches, with as many weights as `LowRankAttention`.

    It is up(gelu(mix(down(LN(u))))), where ``mix`` is the identity or a depthwise convolution of 3 x 3 patches.

    Args:
        dim: d.
        width: of the bottleneck; 2 r for a rank r.
        prefix: tokens before the patches, which are not convolved.
        convolve: whether patches are convolved.
    """

    def __init__(self, dim: int, width: int, prefix: int, convolve: bool) -> None:
        super().__init__()
        self.prefix, self.norm = prefix, nn.LayerNorm(dim, eps=1e-6)
        self.down = nn.Parameter(torch.empty(dim, width))
        nn.init.xavier_uniform_(self.down)
        self.mix = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False) if convolve else None
        self.up = nn.Parameter(torch.zeros(width, dim))  # a block starts as the identity

    def forward(self, u_Bnd: Tensor) -> Tensor:
        """Return the tokens with the bottleneck's result added, [B, n, d]."""
        h_Bnw = self.norm(u_Bnd) @ self.down
        if self.mix is not None:
            first_Bpw, patches_Bnw = h_Bnw[:, : self.prefix], h_Bnw[:, self.prefix :]
            side = int(patches_Bnw.shape[1] ** 0.5)
            mixed_Bwss = self.mix(patches_Bnw.transpose(1, 2).unflatten(2, (side, side)))
            h_Bnw = torch.cat([first_Bpw, mixed_Bwss.flatten(2).transpose(1, 2)], 1)
        return u_Bnd + nn.functional.gelu(h_Bnw) @ self.up

    def macs(self, tokens: int) -> int:
        """Return the MACs of an image with n tokens."""
        dim, width = self.down.shape
        return 2 * tokens * dim * width + (0 if self.mix is None else 9 * (tokens - self.prefix) * width)


class LAE(nn.Module):
    """The device's network: blocks of low-rank attention, and a classifier on the pooled tokens.

    Without blocks it is a linear classifier on the normalised token.

    Args:
        dim: d.
        num_classes: K.
        blocks: m.
        rank: r.
        heads: H.
        pool: ``class``: the first token; ``mean``: the mean over the patches; ``both``: one after the other.
        prefix: tokens before the patches.
        subtract: classify what the blocks added to their input, and not the sum (LAST).
        mixer: what a block is: ``attention``, or in its place, of the same size, a ``perceptron`` of each token or a
            ``convolution`` over the patches.
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
        mixer: str = "attention",
    ) -> None:
        super().__init__()
        check_int("blocks", blocks, 0, 100), check_int("rank", rank, 1, 4096)
        self.pool, self.prefix = check_choice("pool", pool, POOLS), prefix
        if pool != "mean" and not prefix:
            raise ConfigError("pool", pool, "the backbone has no class token; use mean")
        self.subtract = check_bool("subtract", subtract)
        if subtract and not blocks:
            raise ConfigError("subtract", subtract, "needs blocks")
        if check_choice("mixer", mixer, MIXERS) == "convolution" and pool == "class":
            raise ConfigError("mixer", mixer, "does not change the class token; use pool=mean")
        self.blocks = nn.ModuleList(
            LowRankAttention(dim, rank, heads)
            if mixer == "attention"
            else Bottleneck(dim, 2 * rank, prefix, mixer == "convolution")
            for _ in range(blocks)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(2 * dim if pool == "both" else dim, num_classes)
        nn.init.zeros_(self.head.weight), nn.init.zeros_(self.head.bias)

    def stream(self, x_Bnd: Tensor) -> Tensor:
        """Return the tokens after the last block, [B, n, d]."""
        for block in self.blocks:
            x_Bnd = block(x_Bnd)
        return x_Bnd

    def injected(self, x_Bnd: Tensor) -> Tensor:
        """Return what the stream was given, without what the blocks added, [B, n, d]."""
        return x_Bnd

    def forward(self, x_Bnd: Tensor) -> Tensor:
        """Return the logits, [B, K]."""
        u_Bnd = self.stream(x_Bnd)
        if self.subtract:
            u_Bnd = u_Bnd - self.injected(x_Bnd)
        if self.pool == "class":  # the norm of one token alone
            return self.head(self.norm(u_Bnd[:, 0]))
        h_Bnd = self.norm(u_Bnd)
        mean_Bd = h_Bnd[:, self.prefix :].mean(1)
        return self.head(mean_Bd if self.pool == "mean" else torch.cat([h_Bnd[:, 0], mean_Bd], 1))

    def macs(self, tokens: int) -> int:
        """Return the MACs of an image with n tokens."""
        own = sum(block.macs(tokens) for block in self.blocks)  # type: ignore[operator]
        return own + self.head.in_features * self.head.out_features


class LAST(LAE):
    """The network of LAST: levels [B, m + 1, n, d] come in one by one.

    The stream starts at level 0, and level i is added before block i (i = 1 ... m). Arguments are those of `LAE`.
    """

    def stream(self, x_Blnd: Tensor) -> Tensor:
        """Return the tokens after the last block, [B, n, d]."""
        u_Bnd = x_Blnd[:, 0]
        for i, block in enumerate(self.blocks):
            u_Bnd = block(u_Bnd + x_Blnd[:, i + 1])
        return u_Bnd

    def injected(self, x_Blnd: Tensor) -> Tensor:
        """Return the sum of the levels, [B, n, d]."""
        return x_Blnd.sum(1)
