"""Client prior: Bayes over training clients, new clients with some classes, and clients with all of them.

Ours. `client_types` assumes that every client is like a training client. Here that is one hypothesis among several
about a client's classes:

- a training client's class histogram, as in `client_types`, of prior probability 1 - ``new`` together;
- a new client of unknown classes: a Dirichlet prior around the histogram s of all images, of strength a, for several a
  from few classes to nearly all. After n images with expected class counts c the next one has the classes
  (c_k + a s_k) / (n + a); the counts follow the images one by one (quasi-Bayes, Smith and Makov 1978);
- a client with all classes: s itself. Its prior probability is raised for each length of the past, so far that such
  clients are no worse off than with the backbone (`iid_bonus`, chosen on val images).

The likelihood of the past under each hypothesis weighs what it predicts for the next image. After one or two images the
hypotheses are hard to tell apart; later the evidence decides. Where clients may change, with a probability h at each
image of a stream, a share h of the hypotheses' weight returns to what it was at first (fixed share, Herbster and
Warmuth 1998); new clients' counts fall by the share that a hypothesis got in this way.

Legend: C clients, S images of a client, P images of its past, E numbers kept of one, K classes, T types, J types of new
clients.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch._higher_order_ops.scan import scan

from iciia_exp.data.batches import ClientBatch
from iciia_exp.errors import ConfigError, check_float
from iciia_exp.methods.adapt.class_prior import ClassPrior, PriorMethod
from iciia_exp.methods.adapt.iid_bonus import LENGTHS, choose_iid_bonus, iid_bonus_after
from iciia_exp.methods.base import Facts, Part, Record

__all__ = ["ClientPrior", "ClientPriorMethod"]


class _Past(NamedTuple):
    """Statistics of a past, sums over its images."""

    counts_CJK: Tensor  # expected class counts, under each hypothesis about new clients
    evidence_CJ: Tensor  # log-likelihood of those hypotheses
    types_CT: Tensor  # log-likelihood of the types
    images_C1: Tensor  # their number


class _Image(NamedTuple):
    """What is read of an image."""

    likelihood_CK: Tensor  # of the classes, over the largest
    top_C1: Tensor  # logarithm of the largest
    types_CT: Tensor  # log-likelihood of the types; 0 of padding
    real_C1: Tensor  # 1, or 0 of padding


class ClientPrior(ClassPrior):
    """The prior of the next image's class, by Bayes over client types.

    Args:
        facts, calibrator, most_types, smoothing: as of `ClassPrior`.
        new: probability beforehand that a client is not like a training client.
        all_classes: share of it that is for clients with all classes; the rest is for new clients with some.
        strengths: a of the new clients with some classes, in images, equally probable.
        change: h, probability that a client changes before the next image of a stream: for clients that drift.
        iid_bonus: nats that a client with all classes is more probable beforehand; null is chosen on val clients
            for every length of the past, so that such clients are no worse off (`iciia_exp.methods.adapt.iid_bonus`).
    """

    name = "client_prior"
    reads_logits = True

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
        change: float = 0.0,
        iid_bonus: float | None = None,
    ) -> None:
        super().__init__(facts, calibrator, most_types, smoothing)
        self.new, self.change = check_float("new", new, 0.0, 1.0), check_float("change", change, 0.0, 0.5)
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

    def choose_iid_bonus(
        self, stream: Callable[[Tensor], Tensor], head: Callable[[Tensor], Tensor], batches: Sequence[ClientBatch]
    ) -> Record:
        """Choose the iid_bonus for a method's ``stream`` on val clients, where it is not given."""
        return choose_iid_bonus(self.iid_bonus, stream, head, batches) if self.chooses_iid_bonus else {}

    def log_prior(self, b_CSK: Tensor, real_CS: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        """Return the log-prior of every image, [C, S, K], and the probability of a training client, [C, S].

        With all other images as the past, each one's own part is taken out of the sums over all: an approximation, as
        the parts of later images were found with it in their past.
        """
        images = self._images(*self.likelihoods(b_CSK), real_CS)
        if causal:
            past, answers = self._nothing(real_CS), []
            for image in zip(*images, strict=True):
                prior_CJK = self._new_prior(past)
                answers.append(self._mix(past, prior_CJK))
                past, _ = self._add(past, prior_CJK, _Image(*image), self.change)
            priors, known = zip(*answers, strict=True)
            return torch.stack(priors, 1), torch.stack(known, 1)
        whole, own = self._together(images, change=0.0)  # without an order nothing changes
        others = _Past(*((total - part).flatten(0, 1) for total, part in zip(whole, own, strict=True)))
        prior_MK, known_M = self._mix(others, self._new_prior(others))
        shape = (real_CS.shape[1], real_CS.shape[0])
        return prior_MK.unflatten(0, shape).transpose(0, 1), known_M.unflatten(0, shape).transpose(0, 1)

    def next_log_prior(self, b_CPK: Tensor, types_CPT: Tensor, real_CP: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log-prior of the image after a past, [C, K], and the probability of a training client, [C]."""
        images = self._images(self.calibrator.log_likelihood(b_CPK), types_CPT, real_CP)
        past, _ = self._together(images, self.change)
        return self._mix(past, self._new_prior(past))

    @staticmethod
    def _images(log_likelihood_CSK: Tensor, types_CST: Tensor, real_CS: Tensor) -> _Image:
        """Return what is read of every image, [S, C, ...]."""
        top_CS1, real_CS1 = log_likelihood_CSK.amax(-1, keepdim=True), real_CS.unsqueeze(2)
        parts = (log_likelihood_CSK - top_CS1).exp(), top_CS1, types_CST * real_CS1, real_CS1
        return _Image(*(part.transpose(0, 1) for part in parts))

    def _nothing(self, real_CS: Tensor) -> _Past:
        """Return the past of clients without images."""
        clients, new_types, zeros = real_CS.shape[0], len(self.strengths_J), real_CS.new_zeros
        sizes = (new_types, self.num_classes), (new_types,), (len(self.types),), (1,)
        return _Past(*(zeros(clients, *size) for size in sizes))

    def _together(self, images: _Image, change: float) -> tuple[_Past, _Past]:
        """Return what all images say, and what each of them adds, [S, C, ...]; `_add` says what the numbers are."""
        past = self._nothing(images.real_C1.squeeze(2).T)

        def add(past: Sequence[Tensor], image: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
            so_far = _Past(*past)
            later, own = self._add(so_far, self._new_prior(so_far), _Image(*image), change)
            return [*later], [own.counts_CJK, own.evidence_CJ]

        if torch.compiler.is_exporting():  # for any number of images
            whole, own = scan(add, [*past], [*images])
        else:
            whole, steps = [*past], []
            for image in zip(*images, strict=True):
                whole, step = add(whole, image)
                steps.append(step)
            own = [torch.stack(parts) for parts in zip(*steps, strict=True)] or [part[None][:0] for part in past[:2]]
        counts_SCJK, evidence_SCJ = own
        return _Past(*whole), _Past(counts_SCJK, evidence_SCJ, images.types_CT, images.real_C1)

    def _add(self, past: _Past, prior_CJK: Tensor, image: _Image, change: float) -> tuple[_Past, _Past]:
        """Return what the past says after one more image, and what the image adds.

        Args:
            past: before the image.
            prior_CJK: what the hypotheses about new clients say of the image.
            image: the image.
            change: probability that the client changes afterwards.
        """
        likely_CJ = torch.bmm(prior_CJK, image.likelihood_CK.unsqueeze(2)).squeeze(2).clamp(min=1e-30)
        share_CJK = prior_CJK * image.likelihood_CK.unsqueeze(1) * (image.real_C1 / likely_CJ).unsqueeze(2)
        own = _Past(share_CJK, (likely_CJ.log() + image.top_C1) * image.real_C1, image.types_CT, image.real_C1)
        later = _Past(*(part + added for part, added in zip(past, own, strict=True)))
        return (self._changed(later, image.real_C1, change) if change else later), own

    def _changed(self, past: _Past, real_C1: Tensor, change: float) -> _Past:
        """Return the past before the next image of clients that may change; padding is no image."""
        stays, start = math.log1p(-change), self._log_start()
        evidence_CH = torch.cat([past.types_CT, past.evidence_CJ], 1)
        returns_C1 = (evidence_CH + start).logsumexp(1, keepdim=True) + math.log(change)

        def later(evidence: Tensor) -> Tensor:
            return torch.where(real_C1 > 0, torch.logaddexp(evidence + stays, returns_C1), evidence)

        types_CT, later_CJ = later(past.types_CT), later(past.evidence_CJ)  # no views: a program has none in a loop
        same_CJ = torch.where(real_C1 > 0, past.evidence_CJ + stays - later_CJ, 0.0).exp()
        # the images that count are those since a change, as expected
        return _Past(past.counts_CJK * same_CJ.unsqueeze(2), later_CJ, types_CT, past.images_C1)

    def _log_start(self) -> Tensor:
        """Return the logarithm of every hypothesis' probability beforehand, types first, [T + J]."""
        known_T = self.log_weight + torch.log1p(-self.log_hypotheses.exp().sum())
        return torch.cat([known_T, self.log_hypotheses])

    def _new_prior(self, past: _Past) -> Tensor:
        """Return what each hypothesis about new clients says of the next image, [C, J, K]."""
        strengths_J1, source_K = self.strengths_J.unsqueeze(1), self.calibrator.log_source.exp()
        counts_CJK, images_C11 = past.counts_CJK.clamp(min=0), past.images_C1.clamp(min=0).unsqueeze(2)
        images = counts_CJK.sum(2, keepdim=True) if self.change else images_C11  # those that count differ with changes
        return (counts_CJK + strengths_J1 * source_K) / (images + strengths_J1)

    def _mix(self, past: _Past, prior_CJK: Tensor) -> tuple[Tensor, Tensor]:
        """Return the next image's log-prior [C, K] and how probable a training client is [C]."""
        known_CT = past.types_CT + self.log_weight + torch.log1p(-self.log_hypotheses.exp().sum())
        every_C1 = past.evidence_CJ[:, -1:] + iid_bonus_after(self.iid_bonus, past.images_C1)
        new_CJ = torch.cat([past.evidence_CJ[:, :-1], every_C1], 1) + self.log_hypotheses
        weight_CH = torch.cat([known_CT, new_CJ], 1).softmax(1)
        known_CK = self.histogram(weight_CH[:, : known_CT.shape[1]])
        new_CK = torch.bmm(weight_CH[:, None, known_CT.shape[1] :], prior_CJK).squeeze(1)
        return (known_CK + new_CK).clamp(min=1e-30).log(), weight_CH[:, : known_CT.shape[1]].sum(1)

    def macs(self, images: int) -> int:
        """2 S K (T + J): likelihood of every hypothesis, and the mixed prior."""
        return 2 * images * self.num_classes * (len(self.types) + len(self.strengths_J))

    def streaming_macs(self, images: int) -> int:
        """2 K T + S K J: what new clients are like is found from the kept images again."""
        return self.num_classes * (2 * len(self.types) + images * len(self.strengths_J))


class ClientPriorMethod(PriorMethod):
    """The backbone's posteriors under the client prior.

    Args:
        facts, prior: as of `PriorMethod`.
    """

    name = "client_prior"

    def __init__(self, facts: Facts, prior: Part[ClassPrior] = ClientPrior) -> None:
        super().__init__(facts, prior)
