"""Smoothed prior: posteriors times their smoothed mean over the client's images.

Source: the prior correction of ROID (Marsden, Döbler and Yang 2024, "Universal Test-time Adaptation through Weight
Ensembling, Diversity Weighting, and Prior Correction"). With the mean q of the posteriors over the batch, here over a
client's images, and gamma = max(1 / S, 1 / K) / max_k q_k, the corrected posterior is proportional to

    p_k (q_k + gamma) / (1 + gamma K)

Legend: C clients, S images of a client, K classes.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from iciia_exp.methods.adapt.base import real_images
from iciia_exp.methods.adapt.training_free import TrainingFree
from iciia_exp.tasks import SINGLE_LABEL

__all__ = ["SmoothedPrior"]


class SmoothedPrior(TrainingFree):
    """The prior correction of ROID, without its training.

    Args:
        facts: task, sizes, and the backbone's classifier.
        calibrator: ``none`` (published), ``temperature`` or ``bcts``.
    """

    name = "smoothed_prior"
    tasks = (SINGLE_LABEL,)

    def forward(self, x_CSD: Tensor, mask_CS: Tensor | None = None) -> Tensor:
        """Return log-posteriors corrected by each client's mean, [C, S, K]."""
        return self._corrected(self.calibrated(x_CSD).log_softmax(-1), real_images(x_CSD, mask_CS))

    def _corrected(self, log_p_CSK: Tensor, real_CS: Tensor) -> Tensor:
        images_C1 = real_CS.sum(1, keepdim=True)
        mean_CK = (log_p_CSK.exp() * real_CS.unsqueeze(2)).sum(1) / images_C1.clamp(min=1)
        least_C1 = (1 / images_C1.clamp(min=1)).clamp(min=1 / self.num_classes)
        gamma_C1 = least_C1 / mean_CK.amax(1, keepdim=True).clamp(min=1e-30)
        prior_CK = (mean_CK + gamma_C1) / (1 + gamma_C1 * self.num_classes)
        return log_p_CSK + prior_CK.log().unsqueeze(1)

    @property
    def state_width(self) -> int:
        """The calibrated logits: K."""
        return self.num_classes

    def step(self, x_CD: Tensor, past_CPE: Tensor, mask_CP: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the logits of one more image, [C, K], and its log-posteriors."""
        log_p_CSK = self.calibrated(x_CD.unsqueeze(1)).log_softmax(-1)
        all_CSK = torch.cat([past_CPE, log_p_CSK], 1)
        real_CS = real_images(all_CSK, None if mask_CP is None else F.pad(mask_CP, (0, 1), value=True))
        return self._corrected(all_CSK, real_CS)[:, -1], log_p_CSK[:, 0]

    def macs(self, images: int) -> int:
        """0: elementwise sums and products of posteriors are not counted."""
        return 0

    def streaming_macs(self, images: int) -> int | None:
        """0, as `macs`."""
        return 0
