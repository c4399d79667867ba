"""Client types: a posterior over the training clients' class histograms gives the prior of the next image.

With class histograms h_t of T training clients (or of clusters of them, weighing w_t), smoothed, and the likelihoods
p_ik / s_k of the backbone's posteriors, the past says

    w_t  ~  w_t  prod over past images i of  sum over k of h_tk p_ik / s_k

and the next image's answer is proportional to p_k / s_k sum over t of w_t h_tk: Bayes' rule, where the client is one
of the types and draws its images independently. It memorises the training clients' types and knows no others.

Legend: C clients, S images of a client, K classes, T types.
"""

from __future__ import annotations

from torch import Tensor

from iciia_exp.methods.adapt.histograms import HistogramMethod

__all__ = ["ClientTypes"]


class ClientTypes(HistogramMethod):
    """The prior of the training clients that the past looks like.

    Args:
        facts, calibrator, most_types, smoothing: as of `HistogramMethod`.
    """

    name = "client_types"

    def _answer(self, log_likelihood: Tensor, past_T: Tensor) -> Tensor:
        """Return the answers [..., K] from the past's sum of the types' log-likelihoods [..., T]."""
        prior = self._histogram((self.log_weight + past_T).softmax(-1))
        return log_likelihood + prior.clamp(min=1e-30).log()

    def _sequence(self, b_CSK: Tensor, real_CS: Tensor, causal: bool) -> Tensor:
        log_likelihood_CSK, types_CST = self._read(b_CSK)
        types_CST = types_CST * real_CS.unsqueeze(2)
        whole_CST = types_CST.cumsum(1) if causal else types_CST.sum(1, keepdim=True)
        return self._answer(log_likelihood_CSK, whole_CST - types_CST)

    @property
    def state_width(self) -> int:
        """Log-likelihoods of the types: T."""
        return len(self.types)

    def step(self, x_CD: Tensor, past_CPE: Tensor, mask_CP: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the logits of one more image, [C, K], and the types' log-likelihoods of it, [C, T]."""
        log_likelihood_C1K, types_C1T = self._read(self.calibrated(x_CD.unsqueeze(1)))
        if mask_CP is not None:
            past_CPE = past_CPE * mask_CP.unsqueeze(2)
        return self._answer(log_likelihood_C1K[:, 0], past_CPE.sum(1)), types_C1T[:, 0]

    def macs(self, images: int) -> int:
        """2 S K T: likelihood of every type, and the mixed prior; without the S K of smoothing."""
        return 2 * images * self.num_classes * len(self.types)

    def streaming_macs(self, images: int) -> int | None:
        """2 K T."""
        return self.macs(1)
