"""Stream methods: what `iciia_stream` and `iciia_prior` share, a causal encoder behind a bias on the backbone's logits.

`iciia_stream` has the equations. A, H, f and g are here; the prior is the subclass's.

Legend: C clients, S images of a client, P images of its past, E numbers kept of one, D features, K classes, N layers,
G groups, J knots, T images in all.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from iciia_exp.cost import attention_macs, streaming_attention_macs
from iciia_exp.data.batches import ClientBatch
from iciia_exp.data.views import CloudView
from iciia_exp.errors import check_float, check_int
from iciia_exp.methods.adapt.base import Adaptive
from iciia_exp.methods.adapt.iciia import IciiaMethod
from iciia_exp.methods.adapt.training_free import VAL_IMAGES, first_images, real_images
from iciia_exp.methods.base import Facts, Fit, Record, copy_of
from iciia_exp.models.fast_dropout import drop
from iciia_exp.models.iciia import ICIIA
from iciia_exp.models.lbfgs import minimise
from iciia_exp.models.perceptron import Perceptron, ensemble_weights, fit_perceptron
from iciia_exp.tasks import SINGLE_LABEL

__all__ = ["KNOTS", "StreamMethod"]

#: Lengths of the past at which A, H and a are parameters; between them they are linear in log(1 + n).
KNOTS = (0, 1, 2, 3, 5, 10, 15, 30, 60, 120)

# Of the small network that reads how alike the images of a past are.
_LIKENESS_MACS = 4 * 16 + 16 * 3

# Numbers in the logits that the last choice of A and H looks at.
_CALIBRATE = 1 << 24


def _between_knots() -> Tensor:
    """Return the weights of the knots for every length from 0 to the last knot, [n, J]."""
    at, knots = np.log1p(np.arange(KNOTS[-1] + 1)), np.log1p(KNOTS)
    return torch.from_numpy(np.stack([np.interp(at, knots, row) for row in np.eye(len(KNOTS))], axis=1)).float()


class StreamMethod(Adaptive):
    """The published encoder, causal, behind a bias on the backbone's logits; a subclass says what prior joins it.

    Args:
        facts: task, sizes, and the backbone's classifier; it stays as it is.
        num_layers: N.
        heads: H, a divisor of D.
        groups: G, a divisor of D, or ``max`` for D.
        dropout: inside the encoder, while training.
        feature_dropout: on the features of image and past, while training.
        shuffle: interleave the groups after every projection.
        perceptron: W, width of a second classifier of single images; 0 for none.
    """

    causal = True

    longest: Tensor
    ensemble_weight: Tensor
    known_classes: Tensor
    _knots: Tensor

    def __init__(
        self,
        facts: Facts,
        num_layers: int = 1,
        heads: int = 4,
        groups: int | str = 1,
        dropout: float = 0.0,
        feature_dropout: float = 0.2,
        shuffle: bool = True,
        perceptron: int = 512,
    ) -> None:
        super().__init__(facts)
        given = {"num_layers": num_layers, "heads": heads, "groups": groups, "dropout": dropout, "shuffle": shuffle}
        given |= {"feature_dropout": feature_dropout, "perceptron": perceptron}
        settings = self.canonical(given, self.dim)
        self.num_layers, self.groups, self.feature_dropout = num_layers, int(settings["groups"]), feature_dropout
        sizes = (self.dim, self.num_classes, num_layers, heads, self.groups)
        self.model = ICIIA(*sizes, dropout, settings["shuffle"], causal=True)
        nn.init.zeros_(self.model.classifier.weight)
        nn.init.zeros_(self.model.classifier.bias)
        self.head = copy_of(facts.head, trained=False)
        self.log_anchor, self.log_correction = (nn.Parameter(torch.zeros(len(KNOTS))) for _ in range(2))
        self.prior_weight = nn.Parameter(torch.full((len(KNOTS),), 0.5))
        #: of the backbone's logits before they are averaged; and how many even images are added (softplus)
        self.log_sharpness, self.even_images = nn.Parameter(torch.zeros(())), nn.Parameter(torch.ones(()))
        #: from m and the likeness of the past: f, g, and more or fewer even images
        self.gate, last = nn.Linear(self.dim, 3), nn.Linear(16, 3)
        self.likeness = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), last)
        for start in (self.gate, last):
            nn.init.zeros_(start.weight)
            nn.init.zeros_(start.bias)
        self.register_buffer("longest", torch.tensor(KNOTS[-1]))  # no longer past has been seen
        self.register_buffer("_knots", _between_knots(), persistent=False)
        self.perceptron = Perceptron(self.dim, self.num_classes, perceptron) if perceptron else None
        if perceptron:
            self.register_buffer("ensemble_weight", torch.tensor([1.0, 0.0]))  # of backbone and perceptron in b
            self.register_buffer("known_classes", torch.ones(self.num_classes, dtype=torch.bool))

    @classmethod
    def canonical(cls, config: dict[str, Any], dim: int) -> dict[str, Any]:
        """Check the values against D; ``max`` becomes D, and with one group shuffle changes nothing."""
        check_float("feature_dropout", config.get("feature_dropout", 0.2), 0.0, 0.9)
        check_int("perceptron", config.get("perceptron", 512), 0)
        return IciiaMethod.canonical(config, dim)

    # ---- one image by itself

    def classify(self, x: Tensor) -> Tensor:
        """Return b of images [..., D] by themselves, [..., K]; in training the backbone's logits alone."""
        b = self.head(x)
        if self.training or self.perceptron is None:
            return b
        both = self.ensemble_weight[0] * b + self.ensemble_weight[1] * self.perceptron(x)
        if self.task == SINGLE_LABEL:  # the perceptron knows nothing of classes without images: those keep their odds
            known_b, known_both = (part.masked_fill(~self.known_classes, -torch.inf) for part in (b, both))
            both = both + known_b.logsumexp(-1, keepdim=True) - known_both.logsumexp(-1, keepdim=True)
        return torch.where(self.known_classes, both, b)

    def learn(self, cloud: CloudView, fit: Fit) -> Record:
        """Fit the perceptron, train the module, then choose A(n) and H(n) on drawn val clients."""
        self.read(cloud)
        record = fit(self)
        chosen = self.calibrate(cloud.drawn_val())
        return record | ({"calibration": chosen} if chosen else {})

    def read(self, cloud: CloudView) -> None:
        """Fit the perceptron on train images of the clients, and weigh it on val images."""
        if self.perceptron is None:
            return
        fit_perceptron(self.perceptron, cloud.gather, np.unique(cloud.clients.train.values))
        self.known_classes.copy_(torch.from_numpy(cloud.class_counts("train").any(0)))
        if some := list(cloud.chunks("val", most_images=VAL_IMAGES)):
            x_MD = torch.cat([batch.x_CSD[batch.mask_CS] for batch in some])
            y = torch.cat([batch.y_CS[batch.mask_CS] for batch in some])
            with torch.no_grad():
                logits = self.head(x_MD), self.perceptron(x_MD)
            self.ensemble_weight.copy_(ensemble_weights(self.task, *logits, y))
        self.perceptron.train(self.training)

    # ---- the past

    def _classes(self, b: Tensor) -> Tensor:
        """Return the backbone's probabilities, sharpened or softened."""
        return self.task.probabilities(b * self.log_sharpness.exp())

    def _at(self, table_J: Tensor, n: Tensor) -> Tensor:
        """Return a table's values for the lengths ``n``."""
        return (self._knots @ table_J)[n.long().clamp(max=self.longest)]

    def _gates(
        self, encoded: Tensor, classes: Tensor, squares: Tensor, n: Tensor, known: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return m [..., D], and how much to trust each part and to even out, [...] each.

        ``known`` are more columns for the network that reads how alike the images are, [..., some].
        """
        images = n.clamp(min=1)
        mean = encoded / images.unsqueeze(-1)
        sure = squares / images  # chance that the backbone, asked twice about one image, says the same class
        same = (classes.square().sum(-1) - squares) / (n * (n - 1)).clamp(min=1)  # ... about two images
        same, sure = (same.clamp(min=0) + 1e-3).log(), (sure + 1e-3).log()
        likeness = torch.stack([same, sure, same - sure, n.log1p()], -1)
        if known is not None:
            likeness = torch.cat([likeness, known], -1)
        return mean, (self.gate(mean) + self.likeness(likeness)).unbind(-1)

    def _bias(self, mean: Tensor, trust: Tensor, weight: Tensor, prior: Tensor, n: Tensor) -> Tensor:
        """Return f (W m + c) + g a(n) log pi, [..., K]; nothing without a past."""
        g = self._at(self.prior_weight, n) * 2 * weight.sigmoid()
        learned = 2 * trust.sigmoid().unsqueeze(-1) * self.model.classifier(mean)
        return (learned + g.unsqueeze(-1) * prior) * (n > 0).unsqueeze(-1)

    def _combine(self, b: Tensor, correction: Tensor, n: Tensor) -> Tensor:
        anchor, share = (self._at(table, n).exp().unsqueeze(-1) for table in (self.log_anchor, self.log_correction))
        return anchor * b + share * correction

    def _read(self, x_CSD: Tensor, mask_CS: Tensor | None, b_CSK: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """Return the backbone's logits and what is summed over a past, 0 where padded; 1 for each image comes last.

        ``b_CSK`` are the logits where they are known already.
        """
        if self.training:
            x_CSD = drop(x_CSD, self.feature_dropout)
        if b_CSK is None:
            b_CSK = self.classify(x_CSD)
        real_CS = real_images(x_CSD, mask_CS)
        encoded_CSD = self.model.encode(x_CSD, mask_CS) * real_CS.unsqueeze(-1)
        classes_CSK = self._classes(b_CSK) * real_CS.unsqueeze(-1)
        return b_CSK, [encoded_CSD, classes_CSK, classes_CSK.square().sum(-1), real_CS]

    @abstractmethod
    def _corrected(self, b_CSK: Tensor, real_CS: Tensor, past: list[Tensor], causal: bool) -> Tensor:
        """Return every image's correction, [C, S, K].

        Args:
            b_CSK: the backbone's logits.
            real_CS: 1 for a real image, 0 for padding.
            past: sums over each image's past: encoder's outputs [C, S, D], probabilities [C, S, K], their squares over
                images and classes [C, S], and its length [C, S].
            causal: the past are the images before, else all others.
        """

    def _parts(
        self, x_CSD: Tensor, mask_CS: Tensor | None, b_CSK: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return backbone's logits and correction, [C, S, K], and length of the past, [C, S], of every image."""
        b_CSK, summed = self._read(x_CSD, mask_CS, b_CSK)
        before = [part.cumsum(1) - part for part in summed]
        return b_CSK, self._corrected(b_CSK, summed[-1], before, True), before[-1]

    def forward(self, x_CSD: Tensor, mask_CS: Tensor | None = None) -> Tensor:
        """Return every image's logits with all others of its chunk as its past, [C, S, K]."""
        b_CSK, summed = self._read(x_CSD, mask_CS)
        others = [part.sum(1, keepdim=True) - part for part in summed]
        return self._combine(b_CSK, self._corrected(b_CSK, summed[-1], others, False), others[-1])

    # ---- the method

    def stream(self, x_CSD: Tensor, mask_CS: Tensor | None = None) -> Tensor:
        """Return every image's logits after the images before it, [C, S, K]."""
        return self._combine(*self._parts(x_CSD, mask_CS))

    def training_loss(self, batch: ClientBatch) -> Tensor:
        """Return the loss of `stream`, with the batch's own logits of the backbone; every past counts."""
        logits_CSK = self._combine(*self._parts(batch.x_CSD, batch.mask_CS, batch.backbone_CSK))
        return self.task.loss(logits_CSK[batch.mask_CS], batch.y_CS[batch.mask_CS])

    @property
    def state_width(self) -> int:
        """Keys and values of every layer, the encoder's output, and the backbone's probabilities: 2 N D + D + K."""
        return self.model.state_width + self.dim + self.num_classes

    def _kept(self, past_CPE: Tensor) -> tuple[Tensor, ...]:
        """Return what was kept: keys and values, [C, P, e], the encoder's output, [C, P, D], and classes, [C, P, K]."""
        return past_CPE.split([self.model.state_width, self.dim, self.num_classes], dim=2)

    @property
    def calibration_images(self) -> int:
        """Val images that `calibrate` looks at, at most."""
        return max(1, _CALIBRATE // self.num_classes)

    @torch.no_grad()
    def calibrate(self, batches: Iterable[ClientBatch]) -> dict[str, Any]:
        """Choose A(n) and H(n) on val clients, by log-loss after every length of the past.

        The backbone is surer of the images its classifier was trained on than of new ones, and so is the module.
        """
        parts: list[list[Tensor]] = [[], [], [], []]
        for batch in first_images(batches, self.calibration_images):
            b_CSK, correction_CSK, n_CS = self._parts(batch.x_CSD, batch.mask_CS)
            for part, value in zip(parts, (b_CSK, correction_CSK, n_CS, batch.y_CS), strict=True):
                part.append(value[batch.mask_CS])
        if not parts[0]:
            return {}
        b_TK, correction_TK, n_T, y_T = (torch.cat(part) for part in parts)
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
        weights = {name: self._at(table, at).exp() for name, table in
                   (("anchor", self.log_anchor), ("correction", self.log_correction))}  # fmt: skip
        if self.perceptron is not None:
            weights["backbone_and_perceptron"] = self.ensemble_weight
        record = {name: [round(float(v), 3) for v in values] for name, values in weights.items()}
        return {"images": len(y_T), "log_loss_before": round(before, 4), "log_loss": round(after, 4),
                "history": at.tolist(), **record}  # fmt: skip

    # ---- its cost

    @property
    def _image_macs(self) -> int:
        """Of one image: the classifier of the past, D K, the gate, and the perceptron."""
        own = 0 if self.perceptron is None else self.perceptron.macs
        return self.dim * self.num_classes + 3 * self.dim + _LIKENESS_MACS + own

    def macs(self, images: int) -> int:
        """(6 S D^2 / G + 2 S^2 D) N + S (D K + 3 D + 112 + W (D + K)): a classifier of the past comes on top."""
        return attention_macs(images, self.dim, self.groups, self.num_layers) + images * self._image_macs

    def streaming_macs(self, images: int) -> int | None:
        """(6 D^2 / G + 2 S D) N + D K + 3 D + 112 + W (D + K)."""
        return streaming_attention_macs(images, self.dim, self.groups, self.num_layers) + self._image_macs

    def num_parameters(self) -> int:
        """All but the backbone's classifier."""
        return sum(p.numel() for p in self.parameters()) - sum(p.numel() for p in self.head.parameters())
