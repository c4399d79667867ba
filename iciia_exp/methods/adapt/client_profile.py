"""Client profile: a client's class prior and client vector, inferred from its past images, behind a better classifier.

Ours. Clients differ in their classes and in their style. After n images of a client, an image x has the logits

    log p(y | x, c) + log pi

- pi: the prior of the next image's class, by Bayes over client types (`client_prior`);
- c: the client vector (`client_vector`), what the images have in common beyond their classes;
- p(y | x, c): a calibrated weighted sum of the logits of the backbone and of two perceptrons, one with strong and one
  with light regularisation, whose hidden layers have c as a second input. The weights are chosen on val clients.

The client vector is blind to the classes: so prior and classifier do not count the same evidence twice. Without a past
c is 0 and pi the classes' share of all images.

Legend: C clients, S images of a client, P images of its past, E numbers kept of one, D features, K classes, R size of
the client vector, T types, W hidden units.
"""

from collections.abc import Sequence
from functools import partial
from typing import ClassVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from iciia_exp.data.batches import ClientBatch, ClientIndex
from iciia_exp.data.clients import Ragged
from iciia_exp.data.views import CloudView
from iciia_exp.errors import check_int
from iciia_exp.methods.adapt.base import Adaptive, full_precision, real_images
from iciia_exp.methods.adapt.calibration import VAL_IMAGES, among_known
from iciia_exp.methods.adapt.client_prior import ClientPrior
from iciia_exp.methods.adapt.client_vector import ClientVector
from iciia_exp.methods.adapt.image_classifier import keep_unknown
from iciia_exp.methods.base import Facts, Fit, Record, copy_of
from iciia_exp.models.perceptron import Perceptron, ensemble_weights, normalised
from iciia_exp.tasks import SINGLE_LABEL

__all__ = ["ClientProfile"]

_TRAIN_IMAGES = 100_000  # on which the directions are found
_SUMS = ("epochs", "seconds")  # in the record of training
_PASTS = 4  # of each image in training
_AT_ONCE = 4096  # images


class ClientProfile(Adaptive):
    """The class prior and the client vector of a client's past, behind a better classifier.

    Args:
        facts: task, sizes, and the backbone's classifier.
        hidden: W, width of each perceptron.
        vector: R, size of the client vector, at most D; 0: none.
        change: as of `ClientPrior`.
    """

    name = "client_profile"
    trained_with: ClassVar[frozenset[str]] = frozenset()  # perceptrons have a recipe of their own
    causal = True
    tasks = (SINGLE_LABEL,)

    ensemble_weight: Tensor
    known_classes: Tensor

    def __init__(self, facts: Facts, hidden: int = 512, vector: int = 16, change: float = 0.01) -> None:
        super().__init__(facts)
        self.head = copy_of(facts.head, trained=False)
        check_int("hidden", hidden, 1, 65_536)
        self.vector = ClientVector(facts, vector) if check_int("vector", vector, 0, 65_536) else None
        sizes = (facts.dim, facts.num_classes, hidden, 0 if self.vector is None else self.vector.size)
        self.perceptrons = nn.ModuleList(Perceptron(*sizes, light=light) for light in (False, True))
        self.prior = ClientPrior(facts, change=change)
        self.register_buffer("ensemble_weight", torch.ones(1 + len(self.perceptrons)))  # of the backbone and them
        self.register_buffer("known_classes", torch.ones(facts.num_classes, dtype=torch.bool))

    @property
    def _networks(self) -> list[Perceptron]:
        return cast(list[Perceptron], [*self.perceptrons])

    # ---- learning

    def learn(self, cloud: CloudView, fit: Fit) -> Record:
        """Find the directions of clients, train the perceptrons, then weigh and calibrate on val clients."""
        self.prior.read(cloud)
        self.known_classes.copy_(torch.from_numpy(cloud.class_counts("train").any(0)))
        val, record = list(cloud.chunks("val", most_images=VAL_IMAGES)), Record()
        if self.vector is not None:
            self.vector.find_directions(partial(cloud.chunks, "train", most_images=_TRAIN_IMAGES))
            if val:
                record |= self.vector.find_correlation(val, lambda x_CSD: self.head(x_CSD).softmax(-1))
        record = self._train(cloud, fit) | record
        return record | self.calibrate(val) if val else record

    def _train(self, cloud: CloudView, fit: Fit) -> Record:
        """Train the perceptrons on single train images, each with client vectors after random pasts of it."""
        rows, place = np.unique(cloud.clients.train.values, return_inverse=True)
        if not len(rows):
            return {}
        arrays = {}
        if self.vector is not None:
            train = Ragged(cloud.clients.train.offsets, place)
            parts = np.split(rows, range(_AT_ONCE, len(rows), _AT_ONCE))
            e_MR = torch.cat([self._residuals(cloud, part) for part in parts])
            arrays["client"] = self.vector.of_pasts(e_MR, train, _PASTS).numpy()
        records = [fit(perceptron, rows, Perceptron.recipe(len(rows)), arrays) for perceptron in self.perceptrons]
        return records[-1] | {key: sum(record[key] for record in records) for key in _SUMS if key in records[-1]}

    @torch.no_grad()
    def _residuals(self, cloud: CloudView, rows: np.ndarray) -> Tensor:
        assert self.vector is not None
        x_MD = cloud[ClientIndex(rows[:, None], np.zeros(len(rows), np.int64))].x_CSD[:, 0]
        return self.vector(normalised(x_MD), self.head(x_MD).softmax(-1))

    @torch.no_grad()
    def calibrate(self, val: Sequence[ClientBatch]) -> Record:
        """Weigh backbone and perceptrons, calibrate their sum, and choose what the prior chooses, on val clients."""
        parts = [self._logits(batch.x_CSD, batch.mask_CS, causal=True) for batch in val]
        logits = [
            torch.cat([part[i][batch.mask_CS] for part, batch in zip(parts, val, strict=True)])
            for i in range(len(self.ensemble_weight))
        ]
        y_T = torch.cat([batch.y_CS[batch.mask_CS] for batch in val])
        y_T, logits = among_known(self.prior.calibrator.known_K, y_T, *logits)
        self.ensemble_weight.copy_(ensemble_weights(self.task, y_T, *logits))
        record: Record = {"backbone_and_perceptrons": [round(float(w), 3) for w in self.ensemble_weight]}
        # from here on an image is its logits, those of the backbone and the sum: they are computed once
        known = [
            batch._replace(x_CSD=torch.cat([part[0], self._joined(part)], -1))
            for part, batch in zip(parts, val, strict=True)
        ]

        def backbone(x: Tensor) -> Tensor:
            return x[..., : self.num_classes]

        def joined(x: Tensor) -> Tensor:
            return x[..., self.num_classes :]

        record |= self.prior.calibrate(joined, known)
        return record | self.prior.choose_iid_bonus(
            lambda x_CSK: self.prior.posterior(joined(x_CSK), None, causal=True), backbone, known
        )

    # ---- answers

    def _logits(self, x_CSD: Tensor, mask_CS: Tensor | None, causal: bool) -> list[Tensor]:
        """Return every image's logits of the backbone and each perceptron, [C, S, K].

        The past of an image are, if ``causal``, the images before it, else all others.
        """
        z_CSD, b_CSK, c_CSR = normalised(x_CSD), self.head(x_CSD), None
        if self.vector is not None:
            real_CS = real_images(x_CSD, mask_CS)
            e_CSR = self.vector(z_CSD, b_CSK.softmax(-1)) * real_CS.unsqueeze(2)
            total, n = (t.cumsum(1) if causal else t.sum(1, keepdim=True) for t in (e_CSR, real_CS))
            c_CSR = self.vector.shrunk(total - e_CSR, (n - real_CS).clamp(min=0))
        return [b_CSK, *(perceptron.classify(z_CSD, c_CSR) for perceptron in self._networks)]

    def _joined(self, logits: Sequence[Tensor]) -> Tensor:
        """Return the weighted sum of the logits of backbone and perceptrons, [..., K]."""
        first, *others = (w * part for w, part in zip(self.ensemble_weight, logits, strict=True))
        return keep_unknown(logits[0], sum(others, first), self.known_classes)

    def forward(self, x_CSD: Tensor, mask_CS: Tensor | None = None) -> Tensor:
        """Return every image's log-posteriors with all others of its chunk as its past, [C, S, K]."""
        return self._posterior(x_CSD, mask_CS, causal=False)

    def stream(self, x_CSD: Tensor, mask_CS: Tensor | None = None) -> Tensor:
        """Return every image's log-posteriors after the images before it, [C, S, K]."""
        return self._posterior(x_CSD, mask_CS, causal=True)

    def _posterior(self, x_CSD: Tensor, mask_CS: Tensor | None, causal: bool) -> Tensor:
        b_CSK = self._joined(self._logits(x_CSD, mask_CS, causal))
        with full_precision(b_CSK):
            return self.prior.posterior(b_CSK.float(), mask_CS, causal)

    def _widths(self) -> list[int]:
        return [0 if self.vector is None else self.vector.size, self.num_classes, len(self.prior.types)]

    @property
    def state_width(self) -> int:
        """Residual, calibrated logits and log-likelihoods of the types: R + K + T."""
        return sum(self._widths())

    def step(self, x_CD: Tensor, past_CPE: Tensor, mask_CP: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the log-posteriors of one more image, [C, K], and what to keep of it, [C, E]."""
        e_CPR, b_CPK, types_CPT = past_CPE.split(self._widths(), dim=2)
        real_CP = real_images(past_CPE, mask_CP)
        log_prior_CK, _ = self.prior.next_log_prior(b_CPK, types_CPT, real_CP)
        z_CD, b_CK, c_CR, e_CR = normalised(x_CD), self.head(x_CD), None, x_CD[:, :0]
        if self.vector is not None:
            c_CR = self.vector.shrunk((e_CPR * real_CP.unsqueeze(2)).sum(1), real_CP.sum(1))
            e_CR = self.vector(z_CD, b_CK.softmax(-1))
        logits = [b_CK, *(perceptron.classify(z_CD, c_CR) for perceptron in self._networks)]
        calibrated_CK = self.prior.calibrator(self._joined(logits))
        log_likelihood_CK, types_CT = self.prior.likelihoods(calibrated_CK)
        return log_likelihood_CK + log_prior_CK, torch.cat([e_CR, calibrated_CK, types_CT], 1)

    # ---- its cost

    @property
    def _image_macs(self) -> int:
        return sum(perceptron.macs for perceptron in self._networks) + (0 if self.vector is None else self.vector.macs)

    def macs(self, images: int) -> int:
        """S (2 W (D + R + K) + R (D + K)), and the prior's."""
        return images * self._image_macs + self.prior.macs(images)

    def streaming_macs(self, images: int) -> int | None:
        """2 W (D + R + K) + R (D + K), and the prior's."""
        return self._image_macs + self.prior.streaming_macs(images)

    def num_parameters(self) -> int:
        """Those of the perceptron, and what was read from training and val clients."""
        return sum(p.numel() for p in self.perceptrons.parameters()) + sum(b.numel() for b in self.buffers())
