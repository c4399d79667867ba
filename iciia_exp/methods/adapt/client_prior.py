"""Client prior: Bayes over training clients, new clients with some classes, and clients with all of them.

Ours. `client_types` believes that every client is like a training client, and is wrong about all others. Here that is
one hypothesis among several about where a client's classes come from:

- a training client's class histogram, as in `client_types`, with the weight 1 - ``new`` together;
- a new client, whose classes nobody knows beforehand: a Dirichlet prior around the histogram s of all images, of
  strength a, for some a from few classes to nearly all. After n images with expected class counts c the next one has
  the classes (c_k + a s_k) / (n + a); the counts follow the images one by one (quasi-Bayes, Smith and Makov 1978);
- a client with all classes: s itself. Its probability beforehand is raised for each length of the past, so far that
  such clients are no worse off than with the backbone (`iid_bonus`, chosen on val images).

Each says how likely the past was, image by image; that weighs what each says of the next image. After an image or two
nobody can tell one kind from another, later the evidence decides.

Legend: C clients, S images of a client, P images of its past, E numbers kept of one, K classes, T types, J types of new
clients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from iciia_exp.data.batches import ClientBatch
from iciia_exp.errors import ConfigError, check_float
from iciia_exp.methods.adapt.histograms import HistogramMethod
from iciia_exp.methods.adapt.iid_bonus import LENGTHS, choose_iid_bonus, iid_bonus_after
from iciia_exp.methods.adapt.training_free import VAL_IMAGES, first_images, real_images
from iciia_exp.methods.base import Facts

__all__ = ["ClientPrior"]


class _Past(NamedTuple):
    """What a past says, in sums over its images."""

    counts_CJK: Tensor  # expected class counts, under each kind of new clients
    evidence_CJ: Tensor  # log-likelihood of those types
    types_CT: Tensor  # log-likelihood of the types
    images_C1: Tensor  # their number


class ClientPrior(HistogramMethod):
    """The prior of the next image's class, by Bayes over client types.

    Args:
        facts, calibrator, most_types, smoothing: as of `HistogramMethod`.
        new: probability beforehand that a client is not like a training client.
        all_classes: share of it that is for clients with all classes; the rest is for new clients with some.
        strengths: a of the new clients with some classes, in images, equally probable.
        forget: share of what the past says that each image of a stream takes away from it: for clients that drift.
        iid_bonus: nats that a client with all classes is more probable beforehand; null is chosen on val clients
            for every length of the past, so that such clients are no worse off (`iciia_exp.methods.adapt.iid_bonus`).
    """

    name = "client_prior"
    iid_bonus: Tensor
    log_hypotheses: Tensor
    strengths_J: Tensor

    def __init__(
        self,
        facts: Facts,
        calibrator: str = "bcts",
        most_types: int = 1024,
        smoothing: float | None = None,
        new: float = 0.6,
        all_classes: float = 0.6,
        strengths: Sequence[float] = (1.0, 4.0, 16.0),
        forget: float = 0.0,
        iid_bonus: float | None = None,
    ) -> None:
        super().__init__(facts, calibrator, most_types, smoothing)
        self.new, self.forget = check_float("new", new, 0.0, 1.0), check_float("forget", forget, 0.0, 0.9)
        if not 0 < new < 1:
            raise ConfigError("new", new, "must be above 0 and below 1; 0 is method=client_types, 1 method=prior_map")
        if not strengths:
            raise ConfigError("strengths", list(strengths), "needs at least one")
        strengths = [check_float("strengths", a, 0.0, open_low=True) for a in strengths]
        every = check_float("all_classes", all_classes, 0.0, 1.0, open_low=True)
        # shares of the hypotheses about new clients: the last is the client with all classes
        shares = torch.tensor([new * (1 - every) / len(strengths)] * len(strengths) + [new * every])
        self.register_buffer("log_hypotheses", shares.log(), persistent=False)
        self.register_buffer("strengths_J", torch.tensor([*strengths, 1e9]), persistent=False)
        self.chooses_iid_bonus = iid_bonus is None
        given = 0.0 if iid_bonus is None else check_float("iid_bonus", iid_bonus, 0.0)
        self.register_buffer("iid_bonus", torch.full((len(LENGTHS),), given), persistent=self.chooses_iid_bonus)

    def calibrate(self, batches: Iterable[ClientBatch]) -> dict[str, Any]:
        """Fit the calibrator, choose `grids`, then the iid_bonus, all on val clients."""
        some = list(first_images(batches, VAL_IMAGES))
        record = super().calibrate(some)
        return record | self.choose_iid_bonus(self.stream, some) if record else record

    def choose_iid_bonus(self, stream: Callable[[Tensor], Tensor], batches: Sequence[ClientBatch]) -> dict[str, Any]:
        """Choose the iid_bonus, where it is not given, for a method's answers to streams of images."""
        return choose_iid_bonus(self.iid_bonus, stream, self.head, batches) if self.chooses_iid_bonus else {}

    def _sequence(self, b_CSK: Tensor, real_CS: Tensor, causal: bool) -> Tensor:
        log_prior_CSK, _ = self.log_prior(b_CSK, real_CS, causal)
        return self._log_likelihood(b_CSK) + log_prior_CSK

    def log_prior(self, b_CSK: Tensor, real_CS: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        """Return the log-prior of every image, [C, S, K], and how probable a training client is there, [C, S].

        Args:
            b_CSK: calibrated logits.
            real_CS: 1 for a real image, 0 for padding.
            causal: the past is the images before; else all others, each one's own share taken out of the whole.
        """
        keep = 1 - self.forget if causal else 1.0  # without an order nothing is older
        answers, added = [], []
        for past, prior_CJK, own in self._follow(*self._read(b_CSK), real_CS, keep):
            if own is None:
                break
            if causal:
                answers.append(self._mix(past, prior_CJK))
            else:
                added.append(own)
        for own in added:
            others = _Past(*(whole - part for whole, part in zip(past, own, strict=True)))
            answers.append(self._mix(others, self._new_prior(others)))
        priors, known = zip(*answers, strict=True)
        return torch.stack(priors, 1), torch.stack(known, 1)

    def next_log_prior(self, b_CPK: Tensor, types_CPT: Tensor, real_CP: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log-prior of the image after a past, [C, K], and how probable a training client is, [C].

        Args:
            b_CPK: calibrated logits of the past's images.
            types_CPT: their log-likelihoods of the types, from `types_of`.
            real_CP: 1 for a real image, 0 for padding.
        """
        log_likelihood_CPK, keep = self._log_likelihood(b_CPK), 1 - self.forget
        for past, prior_CJK, _ in self._follow(log_likelihood_CPK, types_CPT, real_CP, keep):  # noqa: B007
            pass
        return self._mix(past, prior_CJK)

    def types_of(self, b_CK: Tensor) -> Tensor:
        """Return the types' log-likelihoods of an image of each client, [C, T], from its calibrated logits."""
        return self._read(b_CK)[1]

    def _follow(
        self, log_likelihood_CSK: Tensor, types_CST: Tensor, real_CS: Tensor, keep: float
    ) -> Iterator[tuple[_Past, Tensor, _Past | None]]:
        """Yield for every image what its past says, its prior for new clients [C, J, K], and what it adds to the past.

        And after the last image what all of them say, the prior for the next one, and None.
        """
        top_CS1 = log_likelihood_CSK.amax(-1, keepdim=True)
        likelihood_CSK, types_CST = (log_likelihood_CSK - top_CS1).exp(), types_CST * real_CS.unsqueeze(2)
        clients, new_types = len(real_CS), len(self.strengths_J)
        zeros = log_likelihood_CSK.new_zeros
        past = _Past(
            zeros(clients, new_types, self.num_classes),
            zeros(clients, new_types),
            zeros(clients, types_CST.shape[2]),
            zeros(clients, 1),
        )
        for i in range(real_CS.shape[1]):
            prior_CJK, real_C1 = self._new_prior(past), real_CS[:, i : i + 1]
            likely_CJ = torch.bmm(prior_CJK, likelihood_CSK[:, i].unsqueeze(2)).squeeze(2).clamp(min=1e-30)
            share_CJK = prior_CJK * likelihood_CSK[:, i].unsqueeze(1) * (real_C1 / likely_CJ).unsqueeze(2)
            own = _Past(share_CJK, (likely_CJ.log() + top_CS1[:, i]) * real_C1, types_CST[:, i], real_C1)
            yield past, prior_CJK, own
            if keep < 1:  # padding makes nothing older
                kept_C1 = 1 - (1 - keep) * real_C1
                past = _Past(kept_C1.unsqueeze(2) * past[0], *(kept_C1 * part for part in past[1:]))
            past = _Past(*(part + added for part, added in zip(past, own, strict=True)))
        yield past, self._new_prior(past), None

    def _new_prior(self, past: _Past) -> Tensor:
        """Return what each hypothesis about new clients says of the next image, [C, J, K]."""
        strengths_J1, source_K = self.strengths_J.unsqueeze(1), self.log_source.exp()
        images_C11 = past.images_C1.clamp(min=0).unsqueeze(2)
        return (past.counts_CJK.clamp(min=0) + strengths_J1 * source_K) / (images_C11 + strengths_J1)

    def _mix(self, past: _Past, prior_CJK: Tensor) -> tuple[Tensor, Tensor]:
        """Return the next image's log-prior [C, K] and how probable a training client is [C]."""
        known_CT = past.types_CT + self.log_weight + torch.log1p(-self.log_hypotheses.exp().sum())
        every_C1 = past.evidence_CJ[:, -1:] + iid_bonus_after(self.iid_bonus, past.images_C1)
        new_CJ = torch.cat([past.evidence_CJ[:, :-1], every_C1], 1) + self.log_hypotheses
        weight_CH = torch.cat([known_CT, new_CJ], 1).softmax(1)
        known_CK = self._histogram(weight_CH[:, : known_CT.shape[1]])
        new_CK = torch.bmm(weight_CH[:, None, known_CT.shape[1] :], prior_CJK).squeeze(1)
        return (known_CK + new_CK).clamp(min=1e-30).log(), weight_CH[:, : known_CT.shape[1]].sum(1)

    @property
    def state_width(self) -> int:
        """The calibrated logits, and the types' log-likelihoods: K + T."""
        return self.num_classes + len(self.types)

    def step(self, x_CD: Tensor, past_CPE: Tensor, mask_CP: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the logits of one more image, [C, K], and its calibrated logits and types' log-likelihoods, [C, E]."""
        b_CPK, types_CPT = past_CPE.split([self.num_classes, len(self.types)], dim=2)
        log_prior_CK, _ = self.next_log_prior(b_CPK, types_CPT, real_images(b_CPK, mask_CP))
        b_CK = self.calibrated(x_CD)
        return self._log_likelihood(b_CK) + log_prior_CK, torch.cat([b_CK, self.types_of(b_CK)], 1)

    def macs(self, images: int) -> int:
        """2 S K (T + J): likelihood of every hypothesis, and the mixed prior."""
        return 2 * images * self.num_classes * (len(self.types) + len(self.strengths_J))

    def streaming_macs(self, images: int) -> int | None:
        """2 K T + S K J: what new clients are like is found from the kept images again."""
        return self.num_classes * (2 * len(self.types) + images * len(self.strengths_J))
