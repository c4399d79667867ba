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
hypotheses are hard to tell apart; later the evidence decides.

Legend: C clients, S images of a client, P images of its past, E numbers kept of one, K classes, T types, J types of new
clients.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

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


class ClientPrior(ClassPrior):
    """The prior of the next image's class, by Bayes over client types.

    Args:
        facts, calibrator, most_types, smoothing: as of `ClassPrior`.
        new: probability beforehand that a client is not like a training client.
        all_classes: share of it that is for clients with all classes; the rest is for new clients with some.
        strengths: a of the new clients with some classes, in images, equally probable.
        forget: share of what the past says that each image of a stream takes away from it: for clients that drift.
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

    def choose_iid_bonus(
        self, stream: Callable[[Tensor], Tensor], head: Callable[[Tensor], Tensor], batches: Sequence[ClientBatch]
    ) -> Record:
        """Choose the iid_bonus for a method's ``stream`` on val clients, where it is not given."""
        return choose_iid_bonus(self.iid_bonus, stream, head, batches) if self.chooses_iid_bonus else {}

    def log_prior(self, b_CSK: Tensor, real_CS: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        """Return the log-prior of every image, [C, S, K], and the probability of a training client, [C, S].

        With all other images as the past, each one's own part is taken out of the sums over all.
        """
        keep = 1 - self.forget if causal else 1.0  # without an order nothing is older
        answers, added = [], []
        for past, prior_CJK, own in self._follow(*self.likelihoods(b_CSK), real_CS, keep):
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
        """Return the log-prior of the image after a past, [C, K], and the probability of a training client, [C]."""
        log_likelihood_CPK, keep = self.calibrator.log_likelihood(b_CPK), 1 - self.forget
        for past, prior_CJK, _ in self._follow(log_likelihood_CPK, types_CPT, real_CP, keep):  # noqa: B007
            pass
        return self._mix(past, prior_CJK)

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
        strengths_J1, source_K = self.strengths_J.unsqueeze(1), self.calibrator.log_source.exp()
        images_C11 = past.images_C1.clamp(min=0).unsqueeze(2)
        return (past.counts_CJK.clamp(min=0) + strengths_J1 * source_K) / (images_C11 + strengths_J1)

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
