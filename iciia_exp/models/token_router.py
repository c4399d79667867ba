"""Token router: a transformer over a prompt's tokens whose feed-forward is a mixture with one expert per metric.

Each expert takes the tokens with the largest affinity to it, and contrasts two gates of low rank. Source: "Edge-Cloud
Routing for Text-to-Image Model with Token-Level Multi-Metric Prediction" (arXiv 2411.13787, ICCV 2025). No code is
published: sizes, the softmax over experts, the weights of the sum and the heads are ours.

Legend: B prompts, n tokens, d width of a token, k experts, K tokens of an expert, l rank of a gate, h hidden numbers.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Routing", "TokenMixture", "TokenRouter", "real_tokens"]


def real_tokens(tokens_Bnd: Tensor) -> Tensor:
    """Return which tokens are real, bool [B, n]: padding is stored as 0. An empty prompt has its first one."""
    real_Bn = (tokens_Bnd != 0).any(-1)
    real_Bn[:, 0] = True
    return real_Bn


class Routing(NamedTuple):
    """What the mixture computes."""

    logits_Bk: Tensor  # of every metric's label
    affinity_Bnk: Tensor
    selected_Bkn: Tensor  # bool, tokens that each expert takes
    r_Bkh: Tensor


class TokenMixture(nn.Module):
    """Experts that take tokens, with a head each.

    Args:
        width: d.
        experts: k.
        rank: l.
        hidden: h.
        select: whether an expert takes its ceil(2 n / k) tokens; otherwise it takes all n.
        gates: 2, or 1: the positive gate alone.
    """

    def __init__(
        self, width: int, experts: int, rank: int = 16, hidden: int = 64, select: bool = True, gates: int = 2
    ) -> None:
        super().__init__()
        self.select, self.gates = select, gates
        self.experts = nn.Parameter(torch.randn(experts, width) / width**0.5)
        self.positive = nn.Parameter(torch.randn(experts, width, rank) / width**0.5)
        self.negative = nn.Parameter(torch.randn(experts, width, rank) / width**0.5) if gates == 2 else None
        self.up = nn.Parameter(torch.randn(experts, rank, hidden) / rank**0.5)
        self.head_weight = nn.Parameter(torch.randn(experts, hidden) / hidden**0.5)
        self.head_bias = nn.Parameter(torch.zeros(experts))

    def forward(self, tokens_Bnd: Tensor, real_Bn: Tensor) -> Routing:
        """Return the logits of every metric, and how they came about."""
        k, n = len(self.experts), tokens_Bnd.shape[1]
        affinity_Bnk = (tokens_Bnd @ self.experts.T).softmax(-1) * real_Bn.unsqueeze(-1)
        if self.select:
            count_B = (2 * real_Bn.sum(1) / k).ceil().clamp(min=1).long()
            most = self.most(n)
            ranked_Bkn = torch.where(real_Bn.unsqueeze(1), affinity_Bnk.transpose(1, 2), -math.inf)
            order_BkK = ranked_Bkn.topk(most, dim=-1).indices
            taken_BkK = (torch.arange(most, device=count_B.device) < count_B.view(-1, 1, 1)).expand_as(order_BkK)
            selected_Bkn = torch.zeros_like(ranked_Bkn, dtype=torch.bool).scatter(2, order_BkK, taken_BkK)
        else:
            order_BkK = torch.arange(n, device=tokens_Bnd.device).expand(len(tokens_Bnd), k, n)
            selected_Bkn = taken_BkK = real_Bn.unsqueeze(1).expand(-1, k, -1)
        some_BkKd = tokens_Bnd.unsqueeze(1).expand(-1, k, -1, -1)
        if self.select:
            some_BkKd = some_BkKd.gather(2, order_BkK.unsqueeze(-1).expand(-1, -1, -1, tokens_Bnd.shape[-1]))
        gate = torch.einsum("bkKd,kdl,klh->bkKh", some_BkKd, self.positive, self.up)
        if self.negative is not None:
            gate = gate - torch.einsum("bkKd,kdl,klh->bkKh", some_BkKd, self.negative, self.up)
        weight_BkK = affinity_Bnk.transpose(1, 2).gather(2, order_BkK) * taken_BkK
        summed_Bkh = (weight_BkK.unsqueeze(-1) * gate.sigmoid()).sum(2)
        r_Bkh = summed_Bkh / weight_BkK.sum(-1, keepdim=True).clamp(min=1e-12)
        logits_Bk = torch.einsum("bkh,kh->bk", r_Bkh, self.head_weight) + self.head_bias
        return Routing(logits_Bk, affinity_Bnk, selected_Bkn, r_Bkh)

    def most(self, tokens: int) -> int:
        """Return K of a prompt without padding."""
        return min(tokens, max(1, math.ceil(2 * tokens / len(self.experts)))) if self.select else tokens

    def macs(self, tokens: int) -> int:
        """Return the MACs of a prompt without padding: n d k + k K g (d l + l h) + k h, for g gates."""
        k, width, rank = self.positive.shape
        hidden = self.up.shape[-1]
        gates = k * self.most(tokens) * self.gates * (width * rank + rank * hidden)
        return tokens * width * k + gates + k * hidden


class TokenRouter(nn.Module):
    """Self-attention over the tokens, then the mixture.

    Args:
        width: d.
        experts: k.
        heads: of the attention.
        mixture: further arguments of `TokenMixture`.
    """

    def __init__(self, width: int, experts: int, heads: int = 4, **mixture: int | bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mixture = TokenMixture(width, experts, **mixture)  # type: ignore[arg-type]

    def explain(self, tokens_Bnd: Tensor) -> Routing:
        """Return the logits of every metric for prompts whose padding is 0, and how they came about."""
        real_Bn = real_tokens(tokens_Bnd)
        x_Bnd = self.norm(tokens_Bnd)
        mixed_Bnd = self.attention(x_Bnd, x_Bnd, x_Bnd, key_padding_mask=~real_Bn, need_weights=False)[0]
        return self.mixture(tokens_Bnd + mixed_Bnd, real_Bn)

    def forward(self, tokens_Bnd: Tensor) -> Tensor:
        """Return the logits of every metric, [B, k]."""
        return self.explain(tokens_Bnd).logits_Bk

    def macs(self, tokens: int) -> int:
        """Return the MACs of a prompt without padding: 4 n d^2 + 2 n^2 d for the attention, and the mixture's."""
        width = self.norm.normalized_shape[0]
        return 4 * tokens * width**2 + 2 * tokens**2 * width + self.mixture.macs(tokens)
