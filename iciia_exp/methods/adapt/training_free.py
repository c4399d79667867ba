"""Training-free methods: the backbone's own classifier, calibrated on val clients.

Calibration (Alexandari, Kundaje and Shrikumar 2020, "Maximum Likelihood with Bias-Corrected Calibration is Hard-To-Beat
at Label Shift Adaptation"): logits are divided by a temperature, ``bcts`` (bias-corrected temperature scaling) adds a
bias per class; both by log-loss on val images. What a posterior is divided by to become a likelihood is then the
mean of the calibrated posteriors there.

Legend: C clients, S images of a client, D features, K classes, T images in all.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from iciia_exp.data.batches import ClientBatch
from iciia_exp.data.views import CloudView
from iciia_exp.errors import check_choice
from iciia_exp.methods.adapt.base import Adaptive
from iciia_exp.methods.base import Facts, Fit, Record, copy_of
from iciia_exp.models.lbfgs import minimise
from iciia_exp.tasks import MULTI_LABEL, Task

__all__ = [
    "CALIBRATORS",
    "VAL_IMAGES",
    "TrainingFree",
    "WholeChunks",
    "first_images",
    "fit_calibrator",
    "in_parts",
    "normalised",
    "real_images",
]

CALIBRATORS = ("none", "temperature", "bcts")

#: Val images that calibration looks at, at most.
VAL_IMAGES = 20_000


def first_images(batches: Iterable[ClientBatch], most: int) -> Iterator[ClientBatch]:
    """Yield the first batches, until they have so many images."""
    for batch in batches:
        yield batch
        if (most := most - int(batch.mask_CS.sum())) <= 0:
            return


def real_images(x_CSD: Tensor, mask_CS: Tensor | None) -> Tensor:
    """Return 1 where an image is real and 0 where it is padding, float [C, S]."""
    return x_CSD.new_ones(x_CSD.shape[:2]) if mask_CS is None else mask_CS.to(x_CSD.dtype)


def fit_calibrator(task: Task, b_TK: Tensor, y_T: Tensor, calibrator: str) -> tuple[Tensor, Tensor]:
    """Return the log of a temperature, and a bias [K], that make the logits' log-loss least.

    The bias is drawn to 0 as by a normal prior of variance 1, so that classes without images stay where they are.
    """
    log_temperature, bias_K = b_TK.new_zeros(()), b_TK.new_zeros(b_TK.shape[1])
    if calibrator == "none" or not len(b_TK):
        return log_temperature, bias_K
    with torch.inference_mode(False):
        b_TK, y_T = b_TK.clone(), y_T.clone()  # out of inference mode

    def loss(log_temperature: Tensor, *bias: Tensor) -> Tensor:
        logits_TK = b_TK * (-log_temperature).exp()
        if not bias:
            return task.loss(logits_TK, y_T)
        return task.loss(logits_TK + bias[0], y_T) + bias[0].square().sum() / (2 * len(b_TK))

    found = minimise(loss, log_temperature, *([bias_K] if calibrator == "bcts" else []))
    return found[0], found[1] if len(found) > 1 else bias_K


class TrainingFree(Adaptive):
    """The backbone's classifier, frozen and calibrated; a subclass says what the images of a client do to its answers.

    Args:
        facts: task, sizes, and the backbone's classifier.
        calibrator: ``none``, ``temperature`` or ``bcts``.
    """

    trainable = False
    #: of hyper-parameters that are chosen on val clients: what to try
    grids: ClassVar[dict[str, Sequence[float]]] = {}

    log_temperature: Tensor
    bias: Tensor
    log_source: Tensor

    def __init__(self, facts: Facts, calibrator: str = "none") -> None:
        super().__init__(facts)
        self.calibrator = check_choice("calibrator", calibrator, CALIBRATORS)
        self.head = copy_of(facts.head, trained=False)
        self.register_buffer("log_temperature", torch.zeros(()))
        self.register_buffer("bias", torch.zeros(self.num_classes))
        self.register_buffer("log_source", torch.full((self.num_classes,), 1 / self.num_classes).log())

    def learn(self, cloud: CloudView, fit: Fit) -> Record:
        """Read the cloud's statistics, then calibrate on val clients."""
        self.read(cloud)
        self.eval()
        chosen = self.calibrate(cloud.chunks("val"))
        return {"calibration": chosen} if chosen else {}

    def read(self, cloud: CloudView) -> None:
        """Read what is wanted of the cloud's images beside calibration."""

    def classify(self, x: Tensor) -> Tensor:
        """Return the classifier's logits of images [..., D] by themselves, [..., K]."""
        return self.head(x)

    def calibrated(self, x_CSD: Tensor) -> Tensor:
        """Return the classifier's calibrated logits of every image by itself, [C, S, K]."""
        return self.rescaled(self.classify(x_CSD))

    def rescaled(self, b: Tensor) -> Tensor:
        """Return the classifier's logits [..., K] as calibrated."""
        return b * (-self.log_temperature).exp() + self.bias

    def _log_likelihood(self, b: Tensor) -> Tensor:
        """Return log-likelihoods of the classes, up to what no class changes, from calibrated logits [..., K]."""
        return b.log_softmax(-1) - self.log_source

    @torch.inference_mode()
    def calibrate(self, batches: Iterable[ClientBatch]) -> dict[str, Any]:
        """Fit the calibrator, then choose what `grids` names by log-loss, both on val clients."""
        some = list(first_images(batches, VAL_IMAGES))
        if not (images := sum(int(batch.mask_CS.sum()) for batch in some)):
            return {}
        b_TK = torch.cat([self.classify(batch.x_CSD)[batch.mask_CS] for batch in some])
        y_T = torch.cat([batch.y_CS[batch.mask_CS] for batch in some])
        log_temperature, bias = fit_calibrator(self.task, b_TK, y_T, self.calibrator)
        self.log_temperature.copy_(log_temperature)
        self.bias.copy_(bias)
        logits_TK = self.rescaled(b_TK)
        if self.task == MULTI_LABEL:
            self.log_source.copy_(logits_TK.sigmoid().mean(0).clamp(1e-6, 1 - 1e-6).log())
        elif self.calibrator != "none":
            # as if every class had been the answer for one image more, a share of an image each
            mean_K = (logits_TK.softmax(-1).sum(0) + 1 / self.num_classes) / (len(logits_TK) + 1)
            self.log_source.copy_(mean_K.log())
        record: dict[str, Any] = {"images": images}
        if self.calibrator != "none":
            record["temperature"] = round(float(self.log_temperature.exp()), 4)
        return record | self._choose(some)

    def _choose(self, batches: Sequence[ClientBatch]) -> dict[str, Any]:
        """Set every hyper-parameter of `grids` to its best value by log-loss on the batches, one after the other."""
        chosen: dict[str, Any] = {}
        for name, values in self.grids.items():
            current = getattr(self, name)
            losses = []
            for value in values:
                current.fill_(value)
                losses.append(self._loss(batches))
            best = min(range(len(values)), key=losses.__getitem__)
            current.fill_(values[best])
            chosen |= {name: values[best], f"{name}_log_loss": round(losses[best], 4)}
        return chosen

    def _loss(self, batches: Sequence[ClientBatch]) -> float:
        """Return the mean log-loss over the batches' images."""
        total, images = 0.0, 0
        for batch in batches:
            logits_TK, y_T = self.logits(batch)[batch.mask_CS], batch.y_CS[batch.mask_CS]
            total, images = total + float(self.task.log_loss(logits_TK, y_T).sum()), images + len(y_T)
        return total / images

    def num_parameters(self) -> int:
        """What was read from val and training clients; the classifier is the backbone's."""
        return sum(b.numel() for b in self.buffers())


class WholeChunks(TrainingFree):
    """A `TrainingFree` in whose answer all images of a client have a part, so that one more changes all.

    What is kept of an image are its features and calibrated logits; the rest is computed again.
    """

    clients_at_once: ClassVar[int] = 16  # what is read many times stays in the cache

    @abstractmethod
    def together(self, x_CSD: Tensor, real_CS: Tensor, b_CSK: Tensor) -> Tensor:
        """Return the logits [C, S, K] from features, 1 where an image is real, and calibrated logits."""

    def forward(self, x_CSD: Tensor, mask_CS: Tensor | None = None) -> Tensor:
        """Return the logits of `together`, [C, S, K]."""
        parts = x_CSD, real_images(x_CSD, mask_CS), self.calibrated(x_CSD)
        return in_parts(self.together, self.clients_at_once, *parts)

    @property
    def state_width(self) -> int:
        """Features and calibrated logits: D + K."""
        return self.dim + self.num_classes

    def step(self, x_CD: Tensor, past_CPE: Tensor, mask_CP: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the logits of one more image, [C, K], and its features and calibrated logits, [C, E]."""
        own_CE = torch.cat([x_CD, self.calibrated(x_CD)], 1)
        x_CSD, b_CSK = torch.cat([past_CPE, own_CE.unsqueeze(1)], 1).split([self.dim, self.num_classes], dim=2)
        mask_CS = None if mask_CP is None else F.pad(mask_CP, (0, 1), value=True)
        return self.together(x_CSD, real_images(x_CSD, mask_CS), b_CSK)[:, -1], own_CE

    def streaming_macs(self, images: int) -> int | None:
        """The same as of the whole sequence."""
        return self.macs(images)


def in_parts(function: Callable[..., Tensor], clients: int, *tensors: Tensor) -> Tensor:
    """Return ``function`` of ``clients`` at a time, put together again: what is read many times stays in the cache."""
    if len(tensors[0]) <= clients:
        return function(*tensors)
    return torch.cat([function(*part) for part in zip(*(t.split(clients) for t in tensors), strict=True)])


def normalised(x_CSD: Tensor) -> Tensor:
    """Return features of length 1."""
    return F.normalize(x_CSD, dim=-1)
