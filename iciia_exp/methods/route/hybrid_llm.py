"""Hybrid LLM: learns the probability that the device's answer is as good as the cloud's, over samples of both.

Source: Ding et al., "Hybrid LLM: Cost-Efficient and Quality-Aware Query Routing" (ICLR 2024). The label of a prompt is
Pr[Q_device >= Q_cloud - t] over pairs of its pictures, with the mean quality Q. ``relax=0`` is their r_prob; r_trans
chooses the t >= 0 that spreads the labels of the train prompts most.

Legend: B prompts, P pictures.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from iciia_exp.data.views import CloudView
from iciia_exp.errors import check_choice
from iciia_exp.methods.base import Facts, Fit, Record
from iciia_exp.methods.route.encoder_router import EncoderRouter

__all__ = ["HybridLLM"]


class HybridLLM(EncoderRouter):
    """Cross-entropy of the soft label.

    Args:
        facts: as of `EncoderRouter`.
        kind: ``prob`` (t = 0) or ``trans``.
        routing: further arguments of `EncoderRouter`.
    """

    name = "hybrid_llm"

    def __init__(self, facts: Facts, kind: str = "trans", **routing: Any) -> None:
        super().__init__(facts, **routing)
        self.kind = check_choice("kind", kind, ("prob", "trans"))
        #: t.
        self.relax: Tensor
        self.register_buffer("relax", torch.tensor(0.0))

    def train_router(self, cloud: CloudView, fit: Fit) -> Record:
        """Choose t, and train on the train prompts."""
        if self.kind == "trans":
            (quality,) = self.read_train(cloud, "quality")
            gaps = self._gaps(quality).flatten()
            # t from 0 to the largest gap that still changes a label
            tried = np.quantile(gaps.clamp(min=0).numpy(), np.linspace(0, 1, 101))
            spread = [float(self._spread(quality, t)) for t in tried]
            self.relax.fill_(float(tried[int(np.argmax(spread))]))
        return super().train_router(cloud, fit) | {"relax": float(self.relax)}

    def _gaps(self, quality: Tensor) -> Tensor:
        """Return Q_cloud - Q_device of all pairs of pictures, [B, P, P]."""
        mean_B2P = self.mean_quality(quality)
        return mean_B2P[:, 1].unsqueeze(1) - mean_B2P[:, 0].unsqueeze(2)

    def _label(self, quality: Tensor, relax: float) -> Tensor:
        return (self._gaps(quality) <= relax).float().mean((1, 2))

    def _spread(self, quality: Tensor, relax: float) -> Tensor:
        """Return the mean difference of the labels of two prompts."""
        label_B = self._label(quality, relax).sort().values
        count = len(label_B)
        weight_B = 2 * torch.arange(count) - count + 1
        return 2 * (weight_B * label_B).sum() / count**2

    def router_loss(self, logits: Tensor, quality: Tensor) -> Tensor:
        """Return the loss of logits [B, 1]."""
        return F.binary_cross_entropy_with_logits(logits[:, 0], self._label(quality, float(self.relax)))
