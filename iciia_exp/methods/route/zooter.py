"""ZOOTER: learns the distribution of quality over the models.

Source: Lu et al., "Routing to the Expert: Efficient Reward-guided Ensemble of Large Language Models" (NAACL 2024): the
divergence of softmax(Q / T) over the models from what the router predicts. Its tag-based smoothing needs tags of
prompts, which are not there.

Legend: B prompts, P pictures.
"""

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from iciia_exp.errors import check_float
from iciia_exp.methods.base import Facts
from iciia_exp.methods.route.encoder_router import EncoderRouter

__all__ = ["Zooter"]


class Zooter(EncoderRouter):
    """Divergence from the softmax of the mean quality.

    Args:
        facts: as of `EncoderRouter`.
        temperature: T.
        routing: further arguments of `EncoderRouter`.
    """

    name = "zooter"
    outputs = 2

    def __init__(self, facts: Facts, temperature: float = 0.1, **routing: Any) -> None:
        super().__init__(facts, **routing)
        self.temperature = check_float("temperature", temperature, 0.0, open_low=True)

    def router_loss(self, logits: Tensor, quality: Tensor) -> Tensor:
        """Return the loss of logits [B, 2], of device and cloud."""
        wanted_B2 = (self.mean_quality(quality).mean(2) / self.temperature).softmax(1)
        return F.kl_div(logits.log_softmax(1), wanted_B2, reduction="batchmean")

    def score_prompts(self, prompts_BL: Tensor, tokens_Bnd: Tensor) -> Tensor:
        """Return the predicted probability of the device, [B]."""
        return self.encoder(tokens_Bnd).softmax(1)[:, 0]
