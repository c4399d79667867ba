"""Histogram methods: what `client_types` and `client_prior` share, the class histograms of the training clients.

Legend: C clients, S images of a client, K classes, T types.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from iciia_exp.data.views import CloudView
from iciia_exp.errors import UserError, check_float, check_int
from iciia_exp.methods.adapt.training_free import TrainingFree, in_parts, real_images
from iciia_exp.methods.base import Facts, resize_on_load
from iciia_exp.tasks import SINGLE_LABEL

__all__ = ["HistogramMethod", "cluster_histograms"]


def cluster_histograms(histogram_CK: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Return at most so many class histograms, rows of sum 1, that stand for all, and the share of clients of each.

    Equal ones are joined first, then clusters are found by k-means.
    """
    types_TK, counts_T = np.unique(histogram_CK, axis=0, return_counts=True)
    if len(types_TK) > most:
        from sklearn.cluster import MiniBatchKMeans

        fit = MiniBatchKMeans(most, random_state=0, n_init=1, batch_size=4096).fit(types_TK, sample_weight=counts_T)
        weight_T = np.bincount(fit.labels_, counts_T, minlength=most)
        types_TK, counts_T = fit.cluster_centers_[weight_T > 0].clip(min=0), weight_T[weight_T > 0]
    return types_TK / types_TK.sum(1, keepdims=True), counts_T / counts_T.sum()


class HistogramMethod(TrainingFree):
    """A prior of the next image's class that knows the training clients; a subclass says how the past weighs them.

    Args:
        facts: task, sizes, and the backbone's classifier.
        calibrator: ``none``, ``temperature`` or ``bcts``.
        most_types: more training clients than this are clustered.
        smoothing: share of the pooled histogram in every type's; null is chosen on val clients.
    """

    causal = True
    tasks = (SINGLE_LABEL,)
    grids: ClassVar[dict[str, Sequence[float]]] = {"smoothing": (0.001, 0.01, 0.03, 0.1, 0.2, 0.4, 0.7)}

    types: Tensor
    log_weight: Tensor
    pooled: Tensor
    smoothing: Tensor

    def __init__(
        self,
        facts: Facts,
        calibrator: str = "bcts",
        most_types: int = 1024,
        smoothing: float | None = None,
    ) -> None:
        super().__init__(facts, calibrator)
        self.most_types = check_int("most_types", most_types, 1)
        given = check_float("smoothing", 0.1 if smoothing is None else smoothing, 0.0, 1.0)
        self.register_buffer("smoothing", torch.tensor(given))
        if smoothing is not None:
            self.grids = {}  # type: ignore[misc]
        self.register_buffer("types", torch.full((1, self.num_classes), 1 / self.num_classes))
        self.register_buffer("log_weight", torch.zeros(1))
        self.register_buffer("pooled", self.types[0].clone())
        resize_on_load(self, "types", "log_weight")

    def read(self, cloud: CloudView) -> None:
        """Read the class histograms of the training clients."""
        counts_CK = cloud.class_counts("train")
        counts_CK = counts_CK[counts_CK.sum(1) > 0]
        if not len(counts_CK):
            raise UserError("client_types: no training client has an image; choose a partition with training clients")
        types_TK, share_T = cluster_histograms(counts_CK / counts_CK.sum(1, keepdims=True), self.most_types)
        self.types = torch.from_numpy(types_TK).float()
        self.log_weight = torch.from_numpy(share_T).float().log()
        self.pooled.copy_(torch.from_numpy(share_T @ types_TK))

    def _read(self, b_CSK: Tensor) -> tuple[Tensor, Tensor]:
        """Return log-likelihoods of the classes, [C, S, K], and of the types, [C, S, T]."""
        log_likelihood_CSK = self._log_likelihood(b_CSK)
        top_CS1 = log_likelihood_CSK.amax(-1, keepdim=True)
        likelihood_CSK = (log_likelihood_CSK - top_CS1).exp()
        pooled_CS1 = (likelihood_CSK @ self.pooled).unsqueeze(-1)
        mixed_CST = torch.lerp(likelihood_CSK @ self.types.T, pooled_CS1, self.smoothing)
        return log_likelihood_CSK, mixed_CST.clamp(min=1e-30).log() + top_CS1

    def _histogram(self, weight: Tensor) -> Tensor:
        """Return the sum [..., K] of the types' smoothed histograms, weighted by [..., T]."""
        return torch.lerp(weight @ self.types, weight.sum(-1, keepdim=True) * self.pooled, self.smoothing)

    @abstractmethod
    def _sequence(self, b_CSK: Tensor, real_CS: Tensor, causal: bool) -> Tensor:
        """Return the logits, [C, S, K], from calibrated logits and 1 where an image is real.

        ``causal``: the past of an image are those before it, else all others.
        """

    def forward(self, x_CSD: Tensor, mask_CS: Tensor | None = None) -> Tensor:
        """Return every image's logits with all others of its chunk as its past, [C, S, K]."""
        parts = self.calibrated(x_CSD), real_images(x_CSD, mask_CS)
        return in_parts(lambda b, real: self._sequence(b, real, False), 16, *parts)

    def stream(self, x_CSD: Tensor, mask_CS: Tensor | None = None) -> Tensor:
        """Return every image's logits after the images before it, [C, S, K]."""
        parts = self.calibrated(x_CSD), real_images(x_CSD, mask_CS)
        return in_parts(lambda b, real: self._sequence(b, real, True), 16, *parts)
