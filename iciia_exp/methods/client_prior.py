"""What kind of client is it? Bayes over training clients, new clients with some classes, and clients with all of them.

Ours. `client_types` believes that every client is like a training client, and is wrong about all others. Here that is
one hypothesis among several about where a client's classes come from:

- a training client's class histogram, as in `client_types`, with the weight 1 - ``new`` together;
- a new client, whose classes nobody knows beforehand: a Dirichlet prior around the histogram s of all images, of
  strength a, for some a from few classes to nearly all. After n images with expected class counts c the next one has
  the classes (c_k + a s_k) / (n + a); the counts follow the images one by one (quasi-Bayes, Smith and Makov 1978);
- a client with all classes: s itself. Its probability beforehand is raised for each length of the past, so far that
  such clients are no worse off than with the backbone (`caution`, chosen on selection images).

Each says how likely the past was, image by image; that weighs what each says of the next image. After an image or two
nobody can tell one kind from another, later the evidence decides.

Legend: C clients, S images of a client, K classes, T types, J strengths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from iciia_exp.data.batches import ClientBatch
from iciia_exp.errors import ConfigError, check_float
from iciia_exp.methods.caution import LENGTHS, caution_after, choose_caution
from iciia_exp.methods.client_types import ClientTypes
from iciia_exp.methods.training_free import SELECTION_IMAGES, first_images, real_images

__all__ = ["ClientPrior"]


class ClientPrior(ClientTypes):
    """The prior of the next image's class, by Bayes over kinds of clients.

    Args:
        head: the backbone's classifier.
        calibrator: ``none``, ``temperature`` or ``bcts``.
        most_types: more training clients than this are clustered.
        smoothing: share of the pooled histogram in every type's; null is chosen on selection clients.
        new: probability beforehand that a client is not like a training client.
        all_classes: share of it that is for clients with all classes; the rest is for new clients with some.
        strengths: a of the new clients with some classes, in images, equally probable.
        forget: share of what the past says that each image of a stream takes away from it: for clients that drift.
        caution: nats that a client with all classes is more probable beforehand; null is chosen on selection clients
            for every length of the past, so that such clients are no worse off (`iciia_exp.methods.caution`).
    """

    name = "client_prior"
    caution: Tensor
    log_hypotheses: Tensor
    strengths_J: Tensor
    grids: ClassVar[dict[str, Sequence[float]]] = ClientTypes.grids

    def __init__(
        self,
        head: nn.Linear,
        calibrator: str = "bcts",
        most_types: int = 1024,
        smoothing: float | None = None,
        new: float = 0.6,
        all_classes: float = 0.6,
        strengths: Sequence[float] = (1.0, 4.0, 16.0),
        forget: float = 0.0,
        caution: float | None = 0.0,
    ) -> None:
        super().__init__(head, calibrator, most_types, smoothing)
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
        self.cautious = caution is None
        given = 0.0 if caution is None else check_float("caution", caution, 0.0)
        self.register_buffer("caution", torch.full((len(LENGTHS),), given), persistent=self.cautious)

    def calibrate(self, batches: Iterable[ClientBatch]) -> dict[str, Any]:
        """Fit the calibrator, choose `grids`, then the caution, all on selection clients."""
        some = list(first_images(batches, SELECTION_IMAGES))
        record = super().calibrate(some)
        return record | self.choose_caution(self.stream, some) if record else record

    def choose_caution(self, stream: Callable[[Tensor], Tensor], batches: Sequence[ClientBatch]) -> dict[str, Any]:
        """Choose the caution, where it is not given, for a method's answers to streams of images."""
        return choose_caution(self.caution, stream, self.head, batches) if self.cautious else {}

    def _sequence(self, b_CSK: Tensor, real_CS: Tensor, causal: bool) -> Tensor:
        log_prior_CSK, _ = self.log_prior(b_CSK, real_CS, causal)
        return b_CSK.log_softmax(-1) - self.log_source + log_prior_CSK

    def log_prior(self, b_CSK: Tensor, real_CS: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        """Return the log-prior of every image, [C, S, K], and how probable a training client is there, [C, S].

        Args:
            b_CSK: calibrated logits.
            real_CS: 1 for a real image, 0 for padding.
            causal: the past is the images before; else all others, each one's own share taken out of the whole.
        """
        types_TK = self._types()
        log_likelihood_CSK, types_CST = self._read(b_CSK, types_TK)
        types_CST = types_CST * real_CS.unsqueeze(2)
        top_CS1 = log_likelihood_CSK.amax(-1, keepdim=True)
        likelihood_CSK = (log_likelihood_CSK - top_CS1).exp()
        source_K = self.log_source.exp()
        shape = len(b_CSK), len(self.strengths_J), self.num_classes
        counts_CJK, evidence_CJ = b_CSK.new_zeros(shape), b_CSK.new_zeros(shape[:2])
        n_C11 = b_CSK.new_zeros(len(b_CSK), 1, 1)
        answers, steps = [], []
        past_CT = types_CST.new_zeros(types_CST.shape[0], types_CST.shape[2])
        keep = 1 - self.forget if causal else 1.0  # without an order nothing is older
        for i in range(b_CSK.shape[1]):
            prior_CJK = self._new_prior(counts_CJK, n_C11, source_K)
            if causal:
                answers.append(self._mix(past_CT, evidence_CJ, n_C11.flatten(), prior_CJK, types_TK))
            likely_CJ = torch.bmm(prior_CJK, likelihood_CSK[:, i].unsqueeze(2)).squeeze(2).clamp(min=1e-30)
            real_C1 = real_CS[:, i : i + 1]
            share_CJK = prior_CJK * likelihood_CSK[:, i].unsqueeze(1) * (real_C1 / likely_CJ).unsqueeze(2)
            added_CJ = (likely_CJ.log() + top_CS1[:, i]) * real_C1
            kept_C1 = 1 - (1 - keep) * real_C1  # padding makes nothing older
            counts_CJK, n_C11 = kept_C1.unsqueeze(2) * counts_CJK + share_CJK, kept_C1.unsqueeze(2) * n_C11
            evidence_CJ, past_CT = kept_C1 * evidence_CJ + added_CJ, kept_C1 * past_CT + types_CST[:, i]
            n_C11 = n_C11 + real_C1.unsqueeze(2)
            steps.append((share_CJK, added_CJ))
        if not causal:
            all_CT = past_CT
            for i, (share_CJK, added_CJ) in enumerate(steps):
                others_C11 = n_C11 - real_CS[:, i].view(-1, 1, 1)
                prior_CJK = self._new_prior(counts_CJK - share_CJK, others_C11, source_K)
                past_CT, past_CJ = all_CT - types_CST[:, i], evidence_CJ - added_CJ
                answers.append(self._mix(past_CT, past_CJ, others_C11.flatten(), prior_CJK, types_TK))
        priors, known = zip(*answers, strict=True)
        return torch.stack(priors, 1), torch.stack(known, 1)

    def _new_prior(self, counts_CJK: Tensor, n_C11: Tensor, source_K: Tensor) -> Tensor:
        """Return what each hypothesis about new clients says of the next image, [C, J, K]."""
        strengths_J1 = self.strengths_J.unsqueeze(1)
        return (counts_CJK.clamp(min=0) + strengths_J1 * source_K) / (n_C11.clamp(min=0) + strengths_J1)

    def _mix(
        self, past_CT: Tensor, evidence_CJ: Tensor, n_C: Tensor, prior_CJK: Tensor, types_TK: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the next image's log-prior [C, K] and how probable a training client is [C].

        From the log-likelihood of the past, of ``n_C`` images, under each hypothesis.
        """
        known_CT = past_CT + self.log_weight + torch.log1p(-self.log_hypotheses.exp().sum())
        every_C1 = (evidence_CJ[:, -1] + caution_after(self.caution, n_C)).unsqueeze(1)
        new_CJ = torch.cat([evidence_CJ[:, :-1], every_C1], 1) + self.log_hypotheses
        weight_CH = torch.cat([known_CT, new_CJ], 1).softmax(1)
        known_CK = weight_CH[:, : known_CT.shape[1]] @ types_TK
        new_CK = torch.bmm(weight_CH[:, None, known_CT.shape[1] :], prior_CJK).squeeze(1)
        return (known_CK + new_CK).clamp(min=1e-30).log(), weight_CH[:, : known_CT.shape[1]].sum(1)

    @property
    def state_width(self) -> int:
        """The calibrated logits: K."""
        return self.num_classes

    def step(self, x_CD: Tensor, past_CPE: Tensor, mask_CP: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the logits of one more image, [C, K], and its calibrated logits, [C, K]."""
        b_CK = self.calibrated(x_CD)
        b_CSK = torch.cat([past_CPE, b_CK.unsqueeze(1)], 1)
        mask_CS = None if mask_CP is None else nn.functional.pad(mask_CP, (0, 1), value=True)
        return self._sequence(b_CSK, real_images(b_CSK, mask_CS), True)[:, -1], b_CK

    def macs(self, images: int) -> int:
        """2 S K (T + J + 1): likelihood of every hypothesis, and the mixed prior."""
        return 2 * images * self.num_classes * (len(self.types) + len(self.strengths_J))

    def streaming_macs(self, images: int) -> int | None:
        """The same: `step` goes through the kept images again."""
        return self.macs(images)
