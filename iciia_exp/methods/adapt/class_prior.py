"""Class prior: the probabilities of the classes of a client's next image, inferred from its past images.

A `ClassPrior` is a part of `client_types` and `client_prior`, which correct the backbone's posteriors by it, and of
`iciia_prior`. All of them start from the class histograms of the training clients, the client types.

Legend: C clients, S images of a client, P images of its past, E numbers kept of one, D features, K classes, T types.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from iciia_exp.data.batches import ClientBatch
from iciia_exp.data.views import CloudView
from iciia_exp.errors import UserError, check_float, check_int
from iciia_exp.methods.adapt.base import Adaptive, in_parts, real_images
from iciia_exp.methods.adapt.calibration import VAL_IMAGES, Calibrator, choose, mean_log_loss
from iciia_exp.methods.base import Facts, Fit, Part, Record, copy_of, make_part, resize_on_load
from iciia_exp.tasks import SINGLE_LABEL

__all__ = ["ClassPrior", "PriorMethod", "cluster_histograms"]

#: Shares of the pooled histogram to choose from.
_SMOOTHING = (0.001, 0.01, 0.03, 0.1, 0.2, 0.4, 0.7)


def cluster_histograms(histogram_CK: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Return at most ``most`` class histograms, rows of sum 1, that stand for all, and each one's share of the clients.

    Equal ones are joined first, then clusters are found by k-means.
    """
    types_TK, counts_T = np.unique(histogram_CK, axis=0, return_counts=True)
    if len(types_TK) > most:
        from sklearn.cluster import MiniBatchKMeans

        fit = MiniBatchKMeans(most, random_state=0, n_init=1, batch_size=4096).fit(types_TK, sample_weight=counts_T)
        weight_T = np.bincount(fit.labels_, counts_T, minlength=most)
        types_TK, counts_T = fit.cluster_centers_[weight_T > 0].clip(min=0), weight_T[weight_T > 0]
    return types_TK / types_TK.sum(1, keepdims=True), counts_T / counts_T.sum()


class ClassPrior(nn.Module, ABC):
    """A prior over the next image's class that knows the training clients' histograms.

    Args:
        facts: task and K.
        calibrator: ``none``, ``temperature`` or ``bcts``.
        most_types: more training clients than this are clustered.
        smoothing: share of the pooled histogram in every type's; null is chosen on val clients.
    """

    #: Stable name, as a method's.
    name: ClassVar[str]
    #: Whether `next_log_prior` reads the logits of the past, beside the types' log-likelihoods.
    reads_logits: ClassVar[bool]

    types: Tensor
    log_weight: Tensor
    pooled: Tensor
    smoothing: Tensor

    def __init__(self, facts: Facts, calibrator: str, most_types: int, smoothing: float | None) -> None:
        super().__init__()
        self.task, self.num_classes = facts.task, facts.num_classes
        self.calibrator = Calibrator(facts, calibrator)
        self.most_types = check_int("most_types", most_types, 1)
        given = check_float("smoothing", 0.1 if smoothing is None else smoothing, 0.0, 1.0)
        self.register_buffer("smoothing", torch.tensor(given))
        self.grids: dict[str, Sequence[float]] = {"smoothing": _SMOOTHING} if smoothing is None else {}
        self.register_buffer("types", torch.full((1, self.num_classes), 1 / self.num_classes))
        self.register_buffer("log_weight", torch.zeros(1))
        self.register_buffer("pooled", self.types[0].clone())
        resize_on_load(self, "types", "log_weight")

    # ---- what it learns on the cloud

    def read(self, cloud: CloudView) -> None:
        """Read the class histograms of the training clients."""
        self.calibrator.read(cloud)
        counts_CK = cloud.class_counts("train")
        counts_CK = counts_CK[counts_CK.sum(1) > 0]
        if not len(counts_CK):
            raise UserError(f"{self.name}: no training client has an image; choose a partition with training clients")
        types_TK, share_T = cluster_histograms(counts_CK / counts_CK.sum(1, keepdims=True), self.most_types)
        self.types = torch.from_numpy(types_TK).float()
        self.log_weight = torch.from_numpy(share_T).float().log()
        self.pooled.copy_(torch.from_numpy(share_T @ types_TK))

    @torch.inference_mode()
    def calibrate(self, classify: Callable[[Tensor], Tensor], batches: Sequence[ClientBatch]) -> Record:
        """Fit the calibrator, then choose the smoothing by log-loss, both on val clients.

        Args:
            classify: from features [..., D] to the classifier's logits [..., K].
            batches: val clients.
        """
        if not batches:
            return {}

        def posterior(batch: ClientBatch) -> Tensor:
            return self.posterior(classify(batch.x_CSD), batch.mask_CS, causal=False)

        record = self.calibrator.fit(classify, batches)
        return record | choose(self, self.grids, lambda: mean_log_loss(self.task, posterior, batches))

    def choose_iid_bonus(
        self, stream: Callable[[Tensor], Tensor], head: Callable[[Tensor], Tensor], batches: Sequence[ClientBatch]
    ) -> Record:
        """Choose how careful to be for a method's ``stream`` on val clients, if the prior can be."""
        return {}

    # ---- the prior

    @abstractmethod
    def log_prior(self, b_CSK: Tensor, real_CS: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        """Return the log-prior of every image, [C, S, K], and the probability of a training client there, [C, S].

        Args:
            b_CSK: calibrated logits.
            real_CS: 1 for a real image, 0 for padding.
            causal: the past of an image are the images before it, else all others.
        """

    @abstractmethod
    def next_log_prior(self, b_CPK: Tensor, types_CPT: Tensor, real_CP: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log-prior of the image after a past, [C, K], and the probability of a training client, [C].

        Args:
            b_CPK: calibrated logits of the past's images; anything unless `reads_logits`.
            types_CPT: their log-likelihoods of the types, from `likelihoods`.
            real_CP: 1 for a real image, 0 for padding.
        """

    @abstractmethod
    def macs(self, images: int) -> int:
        """Return the MACs of the priors of ``images`` images together."""

    @abstractmethod
    def streaming_macs(self, images: int) -> int:
        """Return the MACs of the last one's prior, when the others' likelihoods are kept."""

    def posterior(self, b_CSK: Tensor, mask_CS: Tensor | None, causal: bool) -> Tensor:
        """Return log-posteriors under the prior, [C, S, K], from the classifier's logits; see `log_prior`."""

        def correct(b_CSK: Tensor, real_CS: Tensor) -> Tensor:
            return self.calibrator.log_likelihood(b_CSK) + self.log_prior(b_CSK, real_CS, causal)[0]

        return in_parts(correct, self.calibrator(b_CSK), real_images(b_CSK, mask_CS))

    def likelihoods(self, b: Tensor) -> tuple[Tensor, Tensor]:
        """Return log-likelihoods of the classes, [..., K], and of the types, [..., T], from calibrated logits."""
        log_likelihood = self.calibrator.log_likelihood(b)
        top = log_likelihood.amax(-1, keepdim=True)
        likelihood = (log_likelihood - top).exp()
        pooled = (likelihood @ self.pooled).unsqueeze(-1)
        mixed = torch.lerp(likelihood @ self.types.T, pooled, self.smoothing)
        return log_likelihood, mixed.clamp(min=1e-30).log() + top

    def histogram(self, weight: Tensor) -> Tensor:
        """Return the sum [..., K] of the types' smoothed histograms, weighted by [..., T]."""
        return torch.lerp(weight @ self.types, weight.sum(-1, keepdim=True) * self.pooled, self.smoothing)


class PriorMethod(Adaptive):
    """The backbone's posteriors under a class prior; nothing is trained.

    Args:
        facts: task, sizes, and the backbone's classifier.
        prior: the class prior.
    """

    trainable = False
    causal = True
    tasks = (SINGLE_LABEL,)
    parts: ClassVar[dict[str, type]] = {"prior": ClassPrior}

    def __init__(self, facts: Facts, prior: Part[ClassPrior]) -> None:
        super().__init__(facts)
        self.head = copy_of(facts.head, trained=False)
        self.prior = make_part("prior", prior, facts)

    def learn(self, cloud: CloudView, fit: Fit) -> Record:
        """Read the training clients' class histograms, then calibrate on val clients."""
        self.prior.read(cloud)
        self.eval()
        chosen = self.calibrate(list(cloud.chunks("val", most_images=VAL_IMAGES)))
        return {"calibration": chosen} if chosen else {}

    def calibrate(self, batches: Sequence[ClientBatch]) -> Record:
        """Choose what is chosen on val clients."""
        record = self.prior.calibrate(self.head, batches)
        return record | self.prior.choose_iid_bonus(self.stream, self.head, batches) if record else record

    def forward(self, x_CSD: Tensor, mask_CS: Tensor | None = None) -> Tensor:
        """Return every image's log-posteriors with all others of its chunk as its past, [C, S, K]."""
        return self.prior.posterior(self.head(x_CSD), mask_CS, causal=False)

    def stream(self, x_CSD: Tensor, mask_CS: Tensor | None = None) -> Tensor:
        """Return every image's log-posteriors after the images before it, [C, S, K]."""
        return self.prior.posterior(self.head(x_CSD), mask_CS, causal=True)

    @property
    def state_width(self) -> int:
        """Log-likelihoods of the types, T, and calibrated logits, K, where the prior reads them."""
        return len(self.prior.types) + self.prior.reads_logits * self.num_classes

    def step(self, x_CD: Tensor, past_CPE: Tensor, mask_CP: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the log-posteriors of one more image, [C, K], and what to keep of it, [C, E]."""
        kept = self.prior.reads_logits * self.num_classes
        b_CPK, types_CPT = past_CPE[..., :kept], past_CPE[..., kept:]
        log_prior_CK, _ = self.prior.next_log_prior(b_CPK, types_CPT, real_images(past_CPE, mask_CP))
        b_CK = self.prior.calibrator(self.head(x_CD))
        log_likelihood_CK, types_CT = self.prior.likelihoods(b_CK)
        return log_likelihood_CK + log_prior_CK, torch.cat([b_CK[:, :kept], types_CT], 1)

    def macs(self, images: int) -> int:
        """Those of the prior."""
        return self.prior.macs(images)

    def streaming_macs(self, images: int) -> int | None:
        """Those of the prior."""
        return self.prior.streaming_macs(images)

    def num_parameters(self) -> int:
        """What was read from val and training clients; the classifier is the backbone's."""
        return sum(b.numel() for b in self.buffers())
