"""Prior EM and prior MAP: the client's class prior by expectation-maximisation, from the backbone's posteriors alone.

Source: Saerens, Latinne and Decaestecker 2002, "Adjusting the outputs of a classifier to new a priori probabilities: a
simple procedure" (Neural Computation 14). With posteriors p_i under a source prior s, a client's prior pi is where

    pi_k = mean over images i of  pi_k p_ik / s_k  /  sum over j of pi_j p_ij / s_j

and the posterior of an image is proportional to pi_k p_ik / s_k. All images of a client decide its prior, the target
included. In a multi-label task every attribute has a prior of its own.

Maximum likelihood excludes every class that the few images of a client do not show. `PriorMAP` smooths the M-step by a
Dirichlet prior whose mean is the prior of all clients; its strength is chosen on val clients.

Legend: C clients, S images of a client, K classes, I iterations.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from iciia_exp.errors import check_float, check_int
from iciia_exp.methods.adapt.base import in_parts, real_images
from iciia_exp.methods.adapt.training_free import TrainingFree
from iciia_exp.methods.base import Facts
from iciia_exp.tasks import MULTI_LABEL

__all__ = ["PriorEM", "PriorMAP", "estimate_prior"]

# Least prior of a class, so that the log-loss stays finite.
_LEAST = 1e-8


def estimate_prior(
    log_likelihood_CSK: Tensor, real_CS: Tensor, start_K: Tensor, strength: Tensor, iterations: int
) -> Tensor:
    """Return every client's prior, [C, K], by EM; an iteration is two matrix products, 2 S K MACs together.

    Args:
        log_likelihood_CSK: log p_ik / s_k, up to a constant of each image.
        real_CS: 1 for a real image, 0 for padding.
        start_K: the prior to start from, and the mean of the Dirichlet prior.
        strength: of the Dirichlet prior, in images; 0 is maximum likelihood.
        iterations: I.
    """
    likelihood_CSK = (log_likelihood_CSK - log_likelihood_CSK.amax(-1, keepdim=True)).exp()
    images_C1 = real_CS.sum(1, keepdim=True)
    prior_CK = start_K.expand(real_CS.shape[0], -1)
    for _ in range(iterations):
        evidence_CS1 = torch.bmm(likelihood_CSK, prior_CK.unsqueeze(2))
        share_CS1 = real_CS.unsqueeze(2) / evidence_CS1.clamp(min=1e-30)
        count_CK = prior_CK * torch.bmm(likelihood_CSK.transpose(1, 2), share_CS1).squeeze(2)
        prior_CK = (count_CK + strength * start_K) / (images_C1 + strength).clamp(min=1e-30)
    return prior_CK


class EMMethod(TrainingFree):
    """Posteriors under each client's class prior, estimated by EM. The strength 0 is maximum likelihood.

    Args:
        facts: task, sizes, and the backbone's classifier.
        calibrator: ``none``, ``temperature`` or ``bcts``; EM needs calibrated likelihoods.
        iterations: I.
    """

    strength: Tensor

    def __init__(self, facts: Facts, calibrator: str = "bcts", iterations: int = 50) -> None:
        super().__init__(facts, calibrator)
        self.iterations = check_int("iterations", iterations, 1, 10_000)
        self.register_buffer("strength", torch.zeros(()))

    def forward(self, x_CSD: Tensor, mask_CS: Tensor | None = None) -> Tensor:
        """Return calibrated log-posteriors under each client's prior, [C, S, K]."""
        b_CSK, real_CS = self.calibrated(x_CSD), real_images(x_CSD, mask_CS)
        if self.task == MULTI_LABEL:
            return self._attributes(b_CSK, real_CS)
        return in_parts(self._classes, b_CSK, real_CS)

    def _classes(self, b_CSK: Tensor, real_CS: Tensor) -> Tensor:
        log_likelihood_CSK = self.calibrator.log_likelihood(b_CSK)
        prior_CK = self._prior(log_likelihood_CSK, real_CS, self.calibrator.log_source.exp())
        return log_likelihood_CSK + prior_CK.clamp(min=_LEAST).log().unsqueeze(1)

    def _attributes(self, b_CSK: Tensor, real_CS: Tensor) -> Tensor:
        """EM of every attribute as a task with two classes."""
        source_K = self.calibrator.log_source.exp()
        log_odds_CSK = b_CSK - source_K.logit()  # of the likelihoods of presence and absence
        two_CKS2 = torch.stack([F.logsigmoid(-log_odds_CSK), F.logsigmoid(log_odds_CSK)], -1).transpose(1, 2)
        priors = []
        for k in range(self.num_classes):
            start_2 = torch.stack([1 - source_K[k], source_K[k]])
            priors.append(self._prior(two_CKS2[:, k], real_CS, start_2)[:, 1])
        return log_odds_CSK + torch.stack(priors, 1).clamp(_LEAST, 1 - _LEAST).logit().unsqueeze(1)

    def _prior(self, log_likelihood_CSK: Tensor, real_CS: Tensor, start_K: Tensor) -> Tensor:
        return estimate_prior(log_likelihood_CSK, real_CS, start_K, self.strength, self.iterations)

    @property
    def state_width(self) -> int:
        """The calibrated logits: K."""
        return self.num_classes

    def step(self, x_CD: Tensor, past_CPE: Tensor, mask_CP: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the logits of one more image, EM over it and the past, [C, K], and its calibrated logits."""
        b_CK = self.calibrated(x_CD.unsqueeze(1)).squeeze(1)
        b_CSK = torch.cat([past_CPE, b_CK.unsqueeze(1)], 1)
        real_CS = real_images(b_CSK, None if mask_CP is None else F.pad(mask_CP, (0, 1), value=True))
        whole = self._attributes if self.task == MULTI_LABEL else self._classes
        return whole(b_CSK, real_CS)[:, -1], b_CK

    def macs(self, images: int) -> int:
        """2 S K I; twice that for a multi-label task, whose attributes have two classes."""
        return (4 if self.task == MULTI_LABEL else 2) * images * self.num_classes * self.iterations

    def streaming_macs(self, images: int) -> int | None:
        """The same: EM starts again with every image, on the kept posteriors."""
        return self.macs(images)


class PriorEM(EMMethod):
    """Posteriors under the prior of maximum likelihood.

    Args:
        facts, calibrator, iterations: as of `EMMethod`.
    """

    name = "prior_em"


class PriorMAP(EMMethod):
    """Posteriors under the most probable prior of each client.

    Args:
        facts, calibrator, iterations: as of `EMMethod`.
        strength: of the Dirichlet prior, in images; null is chosen on val clients.
    """

    name = "prior_map"

    def __init__(
        self, facts: Facts, calibrator: str = "bcts", iterations: int = 50, strength: float | None = None
    ) -> None:
        super().__init__(facts, calibrator, iterations)
        self.strength.fill_(1.0 if strength is None else check_float("strength", strength, 0.0))
        if strength is None:
            self.grids = {"strength": (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)}
