"""ICIIA and Bayes together: `iciia_stream`, whose class prior is the one that `client_prior` infers.

Ours. With b the backbone's logits of the newest image and n images in its client's past,

    logits = A(n) b + H(n) (f (W m + c) + g a(n) log pi / s)

as in `iciia_stream`, but pi is the prior of the next image's class by Bayes over client types, from the posteriors
of the past (`client_prior`), s that of all images; f and g, how much to trust the module and the prior, see how
probable it is that the client is like a training client. A prior of classes is all that posteriors can tell; what the
module reads from features comes on top, where there is something.

Legend: C clients, S images of a client, P images of its past, E numbers kept of one, D features, K classes, N layers,
T types of clients.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from iciia_exp.data.batches import ClientBatch
from iciia_exp.data.views import CloudView
from iciia_exp.methods.adapt.client_prior import ClientPrior
from iciia_exp.methods.adapt.stream_base import StreamMethod
from iciia_exp.methods.adapt.training_free import TrainingFree, first_images, real_images
from iciia_exp.methods.base import Facts
from iciia_exp.tasks import SINGLE_LABEL

__all__ = ["IciiaPrior"]


class IciiaPrior(StreamMethod):
    """The published encoder, causal, and an inferred class prior behind a bias on the backbone's logits.

    Args:
        facts: task, sizes, and the backbone's classifier; it stays as it is.
        num_layers, heads, groups, dropout, feature_dropout, shuffle, perceptron: as of `iciia_stream`.
        calibrator, most_types, smoothing, new, all_classes, strengths, forget, iid_bonus: as of `client_prior`; the
            module is trained without iid_bonus, which is chosen afterwards, for what it answers then.
    """

    name = "iciia_prior"
    tasks = (SINGLE_LABEL,)

    def __init__(
        self,
        facts: Facts,
        num_layers: int = 1,
        heads: int = 4,
        groups: int | str = 1,
        dropout: float = 0.0,
        feature_dropout: float = 0.2,
        shuffle: bool = True,
        calibrator: str = "bcts",
        most_types: int = 1024,
        smoothing: float | None = None,
        new: float = 0.6,
        all_classes: float = 0.6,
        strengths: Sequence[float] = (1.0, 4.0, 16.0),
        forget: float = 0.0,
        perceptron: int = 512,
        iid_bonus: float | None = None,
    ) -> None:
        super().__init__(facts, num_layers, heads, groups, dropout, feature_dropout, shuffle, perceptron)
        told = (calibrator, most_types, smoothing, new, all_classes, strengths, forget, iid_bonus)
        self.inferred = ClientPrior(facts, *told)
        self.inferred.classify = self.classify  # type: ignore[method-assign]
        nn.init.ones_(self.prior_weight)
        last = nn.Linear(16, 3)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.likeness = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), last)

    def read(self, cloud: CloudView) -> None:
        """Fit the perceptron, read the training clients' class histograms, and calibrate on val clients."""
        super().read(cloud)
        self.inferred.read(cloud)
        training = self.training
        self.eval()  # `classify` as it will be
        TrainingFree.calibrate(self.inferred, cloud.chunks("val"))
        self.train(training)

    def calibrate(self, batches: Iterable[ClientBatch]) -> dict[str, Any]:
        """Choose A(n) and H(n), then the iid_bonus, on val clients; the last word is that nobody is worse off."""
        some = list(first_images(batches, self.calibration_images))
        record = super().calibrate(some)
        return record | self.inferred.choose_iid_bonus(self.stream, some) if record else record

    def _infer(self, b_CSK: Tensor, real_CS: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        """Return log pi / s, [C, S, K], and what the gates see of the client type, [C, S, 2]."""
        with torch.no_grad():
            return self._seen(*self.inferred.log_prior(self.inferred.rescaled(b_CSK), real_CS, causal))

    def _seen(self, log_prior: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        """Return log pi / s, [..., K], and what the gates see of how probable a training client is, [..., 2]."""
        return log_prior - self.inferred.log_source, torch.stack([known, known.logit(1e-3)], -1)

    def _corrected(self, b_CSK: Tensor, real_CS: Tensor, past: list[Tensor], causal: bool) -> Tensor:
        prior_CSK, known_CS2 = self._infer(b_CSK, real_CS, causal)
        encoded_CSD, classes_CSK, squares_CS, n_CS = past
        mean_CSD, (trust, weight, _) = self._gates(encoded_CSD, classes_CSK, squares_CS, n_CS, known_CS2)
        return self._bias(mean_CSD, trust, weight, prior_CSK, past[-1])

    def step(self, x_CD: Tensor, past_CPE: Tensor, mask_CP: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the logits of one more image of each client, [C, K], and what to keep of it, [C, E].

        The backbone's logits are kept in the place of its probabilities.
        """
        keys_CPe, encoded_CPD, b_CPK, types_CPT = self._kept(past_CPE)
        real_CP = real_images(b_CPK, mask_CP)
        classes_CPK = self._classes(b_CPK) * real_CP.unsqueeze(2)
        sums = (encoded_CPD * real_CP.unsqueeze(2)).sum(1), classes_CPK.sum(1), classes_CPK.square().sum((1, 2))
        n_C = real_CP.sum(1)
        prior_CK, known_C2 = self._seen(
            *self.inferred.next_log_prior(self.inferred.rescaled(b_CPK), types_CPT, real_CP)
        )
        mean_CD, (trust, weight, _) = self._gates(*sums, n_C, known_C2)
        b_CK = self.classify(x_CD)
        logits_CK = self._combine(b_CK, self._bias(mean_CD, trust, weight, prior_CK, n_C), n_C)
        encoded_CD, own_Ce = self.model.encode_step(x_CD, keys_CPe, mask_CP)
        own_CT = self.inferred.types_of(self.inferred.rescaled(b_CK))
        return logits_CK, torch.cat([own_Ce, encoded_CD, b_CK, own_CT], 1)

    @property
    def state_width(self) -> int:
        """That of `iciia_stream`, and the types' log-likelihoods: 2 N D + D + K + T."""
        return super().state_width + len(self.inferred.types)

    def _kept(self, past_CPE: Tensor) -> tuple[Tensor, ...]:
        """Return what `iciia_stream` keeps, and the types' log-likelihoods, [C, P, T]."""
        types = len(self.inferred.types)
        own_CPE, types_CPT = past_CPE.split([past_CPE.shape[2] - types, types], dim=2)
        return *super()._kept(own_CPE), types_CPT

    def macs(self, images: int) -> int:
        """That of `iciia_stream` and of `client_prior`, and 2 * 16 more for what the gates see."""
        return super().macs(images) + self.inferred.macs(images) + 2 * 16 * images

    def streaming_macs(self, images: int) -> int | None:
        """One more image of `iciia_stream` and of `client_prior`, and 2 * 16 more for what the gates see."""
        own, inferred = super().streaming_macs(images), self.inferred.streaming_macs(images)
        return None if own is None or inferred is None else own + inferred + 2 * 16

    def num_parameters(self) -> int:
        """All but the backbone's classifier."""
        kept = sum(p.numel() for part in (self.head, self.inferred) for p in part.parameters())
        return sum(p.numel() for p in self.parameters()) - kept + self.inferred.num_parameters()
