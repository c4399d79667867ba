"""RouteLLM's BERT classifier: learns whether the cloud's answer is better.

Source: Ong et al., "RouteLLM: Learning to Route LLMs with Preference Data" (ICLR 2025). Here a preference is that of
the true PRS, and the encoder is as large as that of the other routers.
"""

from torch import Tensor
from torch.nn import functional as F

from iciia_exp.methods.route.encoder_router import EncoderRouter

__all__ = ["RouteLLM"]


class RouteLLM(EncoderRouter):
    """Cross-entropy of the hard label PRS >= 1/2."""

    name = "routellm"

    def router_loss(self, logits: Tensor, quality: Tensor) -> Tensor:
        """Return the loss of logits [B, 1]."""
        wanted_B = (self.true_superiority(quality) >= 0.5).to(logits.dtype)
        return F.binary_cross_entropy_with_logits(logits[:, 0], wanted_B)
