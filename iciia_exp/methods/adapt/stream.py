"""Stream methods: a bias on the backbone's logits, read from the past of a client's stream.

With n images in a client's past and b the per-image classifier's logits of the newest image,

    logits = A(n) b + H(n) (f (W m + c) + g a(n) log pi)

- m: mean over the past of the encoder's outputs; W m + c is what the module has learned about the classes of clients
  with such a past. W starts at zero.
- pi: prior of the next image's class (`iciia_stream` and `iciia_prior` differ in it).
- f, g: gates of the two parts, read from m and from how alike the images of the past are: the chance that two of them
  have the same class, as the backbone sees it, how sure it is of each, and n. For a client with all classes they can
  turn the bias down.
- A(n), H(n): weights of logits and bias after n images, chosen on val clients after training.

The newest image enters through b alone, the past through the bias alone. So without a past the answer is that of b. A
module of the published form, whose classifier sees image and past together, memorises the training images instead
(docs/streams.md). It also means that an answer does not wait for the module's layers: they read the image afterwards.

Legend: C clients, S images of a client, P images of its past, E numbers kept of one, D features, K classes, N layers,
G groups, J knots, T images in all.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from iciia_exp.data.batches import ClientBatch
from iciia_exp.data.views import CloudView
from iciia_exp.errors import within
from iciia_exp.methods.adapt.base import Adaptive, full_precision, real_images
from iciia_exp.methods.adapt.calibration import VAL_IMAGES, first_images
from iciia_exp.methods.adapt.class_prior import ClassPrior
from iciia_exp.methods.adapt.iciia import IciiaMethod
from iciia_exp.methods.adapt.image_classifier import ImageClassifier
from iciia_exp.methods.adapt.stream_encoder import StreamEncoder
from iciia_exp.methods.base import Facts, Fit, Part, Record, make_part
from iciia_exp.models.lbfgs import minimise
from iciia_exp.tasks import MULTI_LABEL

__all__ = ["KNOTS", "StreamMethod"]

#: Lengths of the past at which A, H and a are parameters; between them they are linear in log(1 + n).
KNOTS = (0, 1, 2, 3, 5, 10, 15, 30, 60, 120)

# Numbers in the logits that the last choice of A and H looks at.
_CALIBRATE = 1 << 24


def _between_knots() -> Tensor:
    """Return the weights of the knots for every length from 0 to the last knot, [n, J]."""
    at, knots = np.log1p(np.arange(KNOTS[-1] + 1)), np.log1p(KNOTS)
    return torch.from_numpy(np.stack([np.interp(at, knots, row) for row in np.eye(len(KNOTS))], axis=1)).float()


class StreamMethod(Adaptive):
    """An encoder, a per-image classifier and a class prior, behind a bias on the classifier's logits.

    Args:
        facts: task, sizes, and the backbone's classifier.
        encoder: encodes the past.
        image: classifies each image by itself.
        prior: infers pi from the past; None for the mean of its posteriors, smoothed.
    """

    causal = True

    longest: Tensor
    _knots: Tensor

    def __init__(
        self,
        facts: Facts,
        encoder: Part[StreamEncoder],
        image: Part[ImageClassifier],
        prior: Part[ClassPrior] | None,
    ) -> None:
        super().__init__(facts)
        self.encoder = make_part("encoder", encoder, facts)
        self.image = make_part("image", image, facts)
        self.prior = None if prior is None else make_part("prior", prior, facts)
        self.log_anchor, self.log_correction = (nn.Parameter(torch.zeros(len(KNOTS))) for _ in range(2))
        self.prior_weight = nn.Parameter(torch.full((len(KNOTS),), 0.5 if self.prior is None else 1.0))
        #: scale of the logits before their probabilities are averaged, and images of even classes added (softplus)
        self.log_sharpness, self.even_images = nn.Parameter(torch.zeros(())), nn.Parameter(torch.ones(()))
        self.even_images.requires_grad_(self.prior is None)
        #: from m, and from what is known of the past: f, g, and how many images of even classes are added
        columns = 4 if self.prior is None else 6
        self.gate, last = nn.Linear(self.dim, 3), nn.Linear(16, 3)
        self.likeness = nn.Sequential(nn.Linear(columns, 16), nn.ReLU(), last)
        for start in (self.gate, last):
            nn.init.zeros_(start.weight)
            nn.init.zeros_(start.bias)
        self.register_buffer("longest", torch.tensor(KNOTS[-1]))  # longest past of the val clients
        self.register_buffer("_knots", _between_knots(), persistent=False)

    @classmethod
    def canonical(cls, config: dict[str, Any], dim: int) -> dict[str, Any]:
        """Check the encoder against D; its groups ``max`` become D."""
        if not isinstance(encoder := config.get("encoder"), dict):
            return config
        return config | {"encoder": within("encoder", lambda: IciiaMethod.canonical(encoder, dim))}

    # ---- learning

    def learn(self, cloud: CloudView, fit: Fit) -> Record:
        """Fit classifier and prior, train the module behind them, then choose A(n) and H(n) on drawn val clients."""
        self.prepare(cloud, fit)
        record = fit(self)
        chosen = self.calibrate(cloud.drawn_val())
        return record | ({"calibration": chosen} if chosen else {})

    def prepare(self, cloud: CloudView, fit: Fit) -> None:
        """Train the per-image classifier, and fit the prior for its logits."""
        self.image.learn(cloud, fit)
        if self.prior is not None:
            self.prior.read(cloud)
            self.prior.calibrate(self.image.eval(), list(cloud.chunks("val", most_images=VAL_IMAGES)))
        self.train()

    def training_loss(self, batch: ClientBatch) -> Tensor:
        """Return the loss of `stream`, with the batch's own logits of the backbone; every past counts."""
        logits_CSK = self._combine(*self._parts(batch.x_CSD, batch.mask_CS, batch.backbone_CSK))
        return self.task.loss(logits_CSK[batch.mask_CS], batch.y_CS[batch.mask_CS])

    @torch.no_grad()
    def calibrate(self, batches: Iterable[ClientBatch]) -> Record:
        """Choose A(n) and H(n) on val clients, by log-loss after every length of the past, then the prior's iid_bonus.

        The backbone is surer of the images its classifier was trained on than of new ones, and so is the module.
        """
        val = list(first_images(batches, max(1, _CALIBRATE // self.num_classes)))
        if not val:
            return {}
        parts = [(*self._parts(batch.x_CSD, batch.mask_CS), batch.y_CS) for batch in val]
        b_TK, correction_TK, n_T, y_T = (
            torch.cat([part[i][batch.mask_CS] for part, batch in zip(parts, val, strict=True)]) for i in range(4)
        )
        self.longest.fill_(min(int(n_T.max()), KNOTS[-1]))
        before = float(self.task.loss(self._combine(b_TK, correction_TK, n_T), y_T))
        weights_TJ = self._knots[n_T.long().clamp(max=self.longest)]
        start = [self.log_anchor.detach(), self.log_correction.detach()]

        def loss(*tables: Tensor) -> Tensor:
            anchor_T1, share_T1 = ((weights_TJ @ table).exp()[:, None] for table in tables)
            # knots that no val client reaches stay where training left them
            pull = sum((table - old).square().sum() for table, old in zip(tables, start, strict=True))
            return self.task.loss(anchor_T1 * b_TK + share_T1 * correction_TK, y_T) + 1e-4 * pull

        for table, found in zip(start, minimise(loss, *start, most=60), strict=True):
            table.copy_(found)
        after = float(self.task.loss(self._combine(b_TK, correction_TK, n_T), y_T))
        at = torch.tensor([n for n in KNOTS if n <= int(self.longest)], device=n_T.device)
        weights = {"anchor": self._at(self.log_anchor, at).exp(), "correction": self._at(self.log_correction, at).exp()}
        if self.image.perceptron is not None:
            weights["backbone_and_perceptron"] = self.image.ensemble_weight
        record: Record = {"images": len(y_T), "log_loss_before": round(before, 4), "log_loss": round(after, 4)}
        record |= {"history": at.tolist()}
        record |= {name: [round(float(v), 3) for v in values] for name, values in weights.items()}
        if self.prior is not None:
            record |= self.prior.choose_iid_bonus(self.stream, self.image.head, val)
        return record

    # ---- the bias

    def _at(self, table_J: Tensor, n: Tensor) -> Tensor:
        """Return a table's values for the lengths ``n``."""
        return (self._knots @ table_J)[n.long().clamp(max=self.longest)]

    def _sums(self, encoded: Tensor, b: Tensor, real: Tensor) -> list[Tensor]:
        """Return what is summed over a past: encodings, probabilities, their squares, and 1; 0 where padded."""
        classes = self.task.probabilities(b * self.log_sharpness.exp()) * real.unsqueeze(-1)
        return [encoded * real.unsqueeze(-1), classes, classes.square().sum(-1), real]

    def _bias(self, past: list[Tensor], inferred: tuple[Tensor, Tensor] | None) -> Tensor:
        """Return f (W m + c) + g a(n) log pi, [..., K]; nothing without a past.

        Args:
            past: sums over each image's past: encodings [..., D], probabilities [..., K], their squares over images and
                classes [...], and its length [...].
            inferred: the prior's log-prior [..., K], and the probability of a training client [...].
        """
        encoded, classes, squares, n = past
        images = n.clamp(min=1)
        mean = encoded / images.unsqueeze(-1)
        sure = squares / images  # chance that the backbone, asked twice about one image, says the same class
        same = (classes.square().sum(-1) - squares) / (n * (n - 1)).clamp(min=1)  # ... about two images
        same, sure = (same.clamp(min=0) + 1e-3).log(), (sure + 1e-3).log()
        columns = [same, sure, same - sure, n.log1p()]
        if inferred is not None:
            columns += [inferred[1], inferred[1].logit(1e-3)]
        trust, weight, more = (self.gate(mean) + self.likeness(torch.stack(columns, -1))).unbind(-1)
        if inferred is not None:
            assert self.prior is not None
            prior = inferred[0] - self.prior.calibrator.log_source
        else:
            even = F.softplus(self.even_images + more).unsqueeze(-1) + 1e-3
            if self.task == MULTI_LABEL:
                prior = ((classes + 0.5 * even) / (n.unsqueeze(-1) + even)).logit(1e-6)
            else:
                prior = ((classes + even / self.num_classes) / (n.unsqueeze(-1) + even)).log()
        learned = 2 * trust.sigmoid().unsqueeze(-1) * self.encoder.classify(mean)
        of_prior = (self._at(self.prior_weight, n) * 2 * weight.sigmoid()).unsqueeze(-1) * prior
        return (learned + of_prior) * (n > 0).unsqueeze(-1)

    def _combine(self, b: Tensor, bias: Tensor, n: Tensor) -> Tensor:
        anchor, share = (self._at(table, n).exp().unsqueeze(-1) for table in (self.log_anchor, self.log_correction))
        return anchor * b + share * bias

    @torch.no_grad()
    def _inferred(self, b_CSK: Tensor, real_CS: Tensor, causal: bool) -> tuple[Tensor, Tensor] | None:
        if self.prior is None:
            return None
        with full_precision(b_CSK):
            return self.prior.log_prior(self.prior.calibrator(b_CSK.float()), real_CS.float(), causal)

    def _parts(
        self, x_CSD: Tensor, mask_CS: Tensor | None, b_CSK: Tensor | None = None, causal: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the classifier's logits and the bias, [C, S, K], and length of the past, [C, S], of every image.

        ``b_CSK`` are the logits where they are known already.
        """
        x_CSD = self.encoder.dropped(x_CSD)
        if b_CSK is None:
            b_CSK = self.image(x_CSD)
        real_CS = real_images(x_CSD, mask_CS)
        own = self._sums(self.encoder(x_CSD, mask_CS), b_CSK, real_CS)
        past = [(part.cumsum(1) if causal else part.sum(1, keepdim=True)) - part for part in own]
        return b_CSK, self._bias(past, self._inferred(b_CSK, real_CS, causal)), past[-1]

    def forward(self, x_CSD: Tensor, mask_CS: Tensor | None = None) -> Tensor:
        """Return every image's logits with all others of its chunk as its past, [C, S, K]."""
        return self._combine(*self._parts(x_CSD, mask_CS, causal=False))

    def stream(self, x_CSD: Tensor, mask_CS: Tensor | None = None) -> Tensor:
        """Return every image's logits after the images before it, [C, S, K]."""
        return self._combine(*self._parts(x_CSD, mask_CS))

    def _widths(self) -> list[int]:
        types = 0 if self.prior is None else len(self.prior.types)
        return [self.encoder.state_width, self.dim, self.num_classes, types]

    @property
    def state_width(self) -> int:
        """The encoder's keys and values, its output, the logits, and the prior's types: 2 N D + D + K + types."""
        return sum(self._widths())

    def step(self, x_CD: Tensor, past_CPE: Tensor, mask_CP: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the logits of one more image of each client, [C, K], and what to keep of it, [C, E]."""
        keys_CPe, encoded_CPD, b_CPK, types_CPT = past_CPE.split(self._widths(), dim=2)
        real_CP = real_images(b_CPK, mask_CP)
        past = [part.sum(1) for part in self._sums(encoded_CPD, b_CPK, real_CP)]
        b_CK, inferred = self.image(x_CD), None
        encoded_CD, own_Ce = self.encoder.step(x_CD, keys_CPe, mask_CP)
        kept = [own_Ce, encoded_CD, b_CK]
        if self.prior is not None:
            inferred = self.prior.next_log_prior(self.prior.calibrator(b_CPK), types_CPT, real_CP)
            kept.append(self.prior.likelihoods(self.prior.calibrator(b_CK))[1])
        return self._combine(b_CK, self._bias(past, inferred), past[-1]), torch.cat(kept, 1)

    # ---- its cost

    @property
    def _image_macs(self) -> int:
        """Of one image: the classifier of the past, D K, the gates, and the perceptron."""
        gates = 3 * self.dim + sum(p.numel() for p in self.likeness.parameters() if p.ndim == 2)
        return self.dim * self.num_classes + gates + self.image.macs

    def macs(self, images: int) -> int:
        """(6 S D^2 / G + 2 S^2 D) N + S (D K + 3 D + 112 + W (D + K)); with a prior its own, and 32 S."""
        prior = 0 if self.prior is None else self.prior.macs(images)
        return self.encoder.macs(images) + images * self._image_macs + prior

    def streaming_macs(self, images: int) -> int | None:
        """(6 D^2 / G + 2 S D) N + D K + 3 D + 112 + W (D + K); with a prior its own, and 32."""
        prior = 0 if self.prior is None else self.prior.streaming_macs(images)
        return self.encoder.streaming_macs(images) + self._image_macs + prior

    def num_parameters(self) -> int:
        """All but the backbone's classifier, and what the prior has read."""
        own = sum(p.numel() for p in self.parameters()) - sum(p.numel() for p in self.image.head.parameters())
        return own + (0 if self.prior is None else sum(b.numel() for b in self.prior.buffers()))
