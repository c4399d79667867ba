"""RouteT2I: a router of prompts that predicts by how much one model's picture is better, in each metric.

"Edge-Cloud Routing for Text-to-Image Model with Token-Level Multi-Metric Prediction" (arXiv 2411.13787, ICCV 2025): a
transformer over the prompt's tokens, whose feed-forward is a mixture with one expert per metric
(`iciia_exp.models.token_router`), learns the soft labels D of `iciia_exp.methods.route.labels`. A prompt goes to the
cloud if the mean of the predicted D is below a threshold. No code is published; what is ours is said where it is.

Legend: B prompts, n tokens, d width of a token, K metrics.
"""

from typing import Any

from torch import Tensor

from iciia_exp.data.batches import ClientBatch
from iciia_exp.data.views import CloudView
from iciia_exp.errors import ConfigError, check_bool, check_choice, check_int
from iciia_exp.methods.base import Facts, Fit, Record
from iciia_exp.methods.route.base import PromptRouter, Scorer
from iciia_exp.models.token_router import Routing, TokenRouter
from iciia_exp.tasks import QUALITY

__all__ = ["RouteT2I"]


class RouteT2I(PromptRouter):
    """The token router.

    Args:
        facts: as of `PromptRouter`.
        rank, hidden: l and h of the gates.
        heads: of the attention.
        select: whether an expert takes a part of the tokens (ablation: all).
        gates: 2, or 1 (ablation).
        loss: ``labels``: cross-entropy of D; ``squares``: mean squared error of D; ``superiority``: of PRS.
        routing: further arguments of `PromptRouter`.
    """

    name = "route_t2i"

    def __init__(
        self,
        facts: Facts,
        rank: int = 16,
        hidden: int = 64,
        heads: int = 4,
        select: bool = True,
        gates: int = 2,
        loss: str = "labels",
        **routing: Any,
    ) -> None:
        super().__init__(facts, **routing)
        self.loss = check_choice("loss", loss, ("labels", "squares", "superiority"))
        heads = check_int("heads", heads, 1)
        if self.width % heads:
            raise ConfigError("heads", heads, f"must divide the width of a token, {self.width}")
        self.router = TokenRouter(
            self.width,
            self.num_classes,
            heads,
            rank=check_int("rank", rank, 1),
            hidden=check_int("hidden", hidden, 1),
            select=check_bool("select", select),
            gates=check_int("gates", gates, 1, 2),
        )

    def train_router(self, cloud: CloudView, fit: Fit) -> Record:
        """Train on the train prompts."""
        return fit(Scorer(self.router, self._loss), rows=cloud.clients.train.values)

    def _loss(self, logits_BK: Tensor, quality: Tensor) -> Tensor:
        wanted_BK = self.true_labels(quality)
        if self.loss == "labels":
            losses_BK = QUALITY.loss(logits_BK, wanted_BK, reduction="none")
            return (losses_BK * self.weight_K).sum(1).mean()
        if self.loss == "squares":
            return ((logits_BK.sigmoid() - wanted_BK).square() * self.weight_K).sum(1).mean()
        return (((logits_BK.sigmoid() - wanted_BK) * self.weight_K).sum(1)).square().mean()

    def score_prompts(self, prompts_BL: Tensor, tokens_Bnd: Tensor) -> Tensor:
        """Return the predicted PRS, [B]."""
        return (self.router(tokens_Bnd).sigmoid() * self.weight_K).sum(1)

    def logits(self, batch: ClientBatch, causal: bool = False) -> Tensor:
        """Return the logits of D of every metric, [C, S, K]."""
        logits = batch.x_CSD.new_zeros(*batch.mask_CS.shape, self.num_classes)
        logits[batch.mask_CS] = self.router(batch.arrays["tokens"][batch.mask_CS])
        return logits

    def explain(self, tokens_Bnd: Tensor) -> Routing:
        """Return the predictions, and which tokens each expert took."""
        return self.router.explain(tokens_Bnd)

    def router_macs(self) -> int:
        """Return those of `TokenRouter`."""
        return self.router.macs(self.tokens)
