"""Client types: a posterior over the training clients' class histograms gives the prior of the next image.

With class histograms h_t of T training clients (or of clusters of them) of weight w_t, smoothed, and the likelihoods
p_ik / s_k of the backbone's posteriors, the past gives the posterior weights

    w_t  ~  w_t  prod over past images i of  sum over k of h_tk p_ik / s_k

and the logits of the next image are log(p_k / s_k sum over t of w_t h_tk): Bayes' rule for a client that is one of the
types and draws its images independently. Types beyond the training clients' are not considered.

Legend: C clients, S images of a client, P images of its past, K classes, T types.
"""

import torch
from torch import Tensor

from iciia_exp.methods.adapt.class_prior import ClassPrior, PriorMethod
from iciia_exp.methods.base import Facts, Part

__all__ = ["ClientTypes", "ClientTypesMethod"]


class ClientTypes(ClassPrior):
    """The mixture of the training clients' histograms, weighted by how likely each makes the past.

    Args:
        facts, calibrator, most_types, smoothing: as of `ClassPrior`.
    """

    name = "client_types"
    reads_logits = False

    def __init__(
        self, facts: Facts, calibrator: str = "bcts", most_types: int = 1024, smoothing: float | None = None
    ) -> None:
        super().__init__(facts, calibrator, most_types, smoothing)

    def _mix(self, past: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log-prior [..., K] from the past's sum of the types' log-likelihoods [..., T], and 1."""
        prior = self.histogram((self.log_weight + past).softmax(-1))
        return prior.clamp(min=1e-30).log(), torch.ones_like(past[..., 0])

    def log_prior(self, b_CSK: Tensor, real_CS: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        """Return the log-prior of every image, [C, S, K], and 1: every client is like a training client."""
        types_CST = self.likelihoods(b_CSK)[1] * real_CS.unsqueeze(2)
        whole_CST = types_CST.cumsum(1) if causal else types_CST.sum(1, keepdim=True)
        return self._mix(whole_CST - types_CST)

    def next_log_prior(self, b_CPK: Tensor, types_CPT: Tensor, real_CP: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log-prior of the image after a past, [C, K], and 1."""
        return self._mix((types_CPT * real_CP.unsqueeze(2)).sum(1))

    def macs(self, images: int) -> int:
        """2 S K T: likelihood of every type, and the mixed prior; without the S K of smoothing."""
        return 2 * images * self.num_classes * len(self.types)

    def streaming_macs(self, images: int) -> int:
        """2 K T."""
        return self.macs(1)


class ClientTypesMethod(PriorMethod):
    """The backbone's posteriors under the prior of client types.

    Args:
        facts, prior: as of `PriorMethod`.
    """

    name = "client_types"

    def __init__(self, facts: Facts, prior: Part[ClassPrior] = ClientTypes) -> None:
        super().__init__(facts, prior)
