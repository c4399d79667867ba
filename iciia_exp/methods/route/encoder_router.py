"""Encoder routers: a transformer over the prompt's tokens with one head, on the mean of its tokens.

RouteLLM's BERT classifier, Hybrid LLM and ZOOTER differ in what it learns (`routellm`, `hybrid_llm`, `zooter`).

Legend: B prompts, P pictures, n tokens, d width of a token.
"""

from abc import abstractmethod
from typing import Any

from torch import Tensor, nn

from iciia_exp.data.views import CloudView
from iciia_exp.errors import ConfigError, check_int
from iciia_exp.methods.base import Facts, Fit, Record
from iciia_exp.methods.route.base import PromptRouter, Scorer
from iciia_exp.models.token_router import real_tokens

__all__ = ["EncoderRouter"]


class _Encoder(nn.Module):
    """One transformer layer, and a linear head on the mean of the tokens."""

    def __init__(self, width: int, heads: int, outputs: int) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.head = nn.Linear(width, outputs)

    def forward(self, tokens_Bnd: Tensor) -> Tensor:
        real_Bn = real_tokens(tokens_Bnd)
        x_Bnd = self.layer(tokens_Bnd, src_key_padding_mask=~real_Bn)
        mean_Bd = (x_Bnd * real_Bn.unsqueeze(-1)).sum(1) / real_Bn.sum(1, keepdim=True)
        return self.head(mean_Bd)


class EncoderRouter(PromptRouter):
    """A transformer layer and a head, whose sigmoid is the score.

    Args:
        facts: as of `PromptRouter`.
        heads: of the attention.
        routing: further arguments of `PromptRouter`.
    """

    #: Numbers that the head gives.
    outputs = 1

    def __init__(self, facts: Facts, heads: int = 4, **routing: Any) -> None:
        super().__init__(facts, **routing)
        if self.width % check_int("heads", heads, 1):
            raise ConfigError("heads", heads, f"must divide the width of a token, {self.width}")
        self.encoder = _Encoder(self.width, heads, self.outputs)

    def train_router(self, cloud: CloudView, fit: Fit) -> Record:
        """Train on the train prompts."""
        return fit(Scorer(self.encoder, self.router_loss), rows=cloud.clients.train.values)

    @abstractmethod
    def router_loss(self, logits: Tensor, quality: Tensor) -> Tensor:
        """Return the loss of the head's numbers [B, outputs] for the quality [B, 2, P, K]."""

    def score_prompts(self, prompts_BL: Tensor, tokens_Bnd: Tensor) -> Tensor:
        """Return the probability that the device's answer is the better one, [B]."""
        return self.encoder(tokens_Bnd)[:, 0].sigmoid()

    def router_macs(self) -> int:
        """Return 12 n d^2 + 2 n^2 d, and the head's."""
        n, d = self.tokens, self.width
        return 12 * n * d**2 + 2 * n**2 * d + d * self.outputs

    def mean_quality(self, quality: Tensor) -> Tensor:
        """Return the mean of the used metrics, [B, 2, P]."""
        return (quality * self.weight_K).sum(-1)
