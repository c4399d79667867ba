"""Calibration: a classifier's temperature, bias and source prior, fitted on val clients.

Source: Alexandari, Kundaje and Shrikumar 2020, "Maximum Likelihood with Bias-Corrected Calibration is Hard-To-Beat at
Label Shift Adaptation". Logits are divided by a temperature; ``bcts`` (bias-corrected temperature scaling) adds a bias
per class. Both minimise the log-loss on val images. A posterior divided by the mean of the calibrated posteriors there
is a likelihood. Classes without an image in the cloud are not rare for that: calibration is among the others, and they
have the mean share.

Legend: C clients, S images of a client, K classes, T images in all.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from iciia_exp.data.batches import ClientBatch
from iciia_exp.data.views import CloudView
from iciia_exp.errors import check_choice
from iciia_exp.methods.base import Facts, Record
from iciia_exp.models.lbfgs import minimise
from iciia_exp.tasks import MULTI_LABEL, SINGLE_LABEL, Task

__all__ = [
    *("VAL_IMAGES", "Calibrator", "among_known", "choose", "first_images", "fit_calibrator", "mean_log_loss"),
    "of_images",
]

CALIBRATORS = ("none", "temperature", "bcts")

#: Val images that calibration looks at, at most.
VAL_IMAGES = 20_000


def first_images(batches: Iterable[ClientBatch], most: int) -> Iterator[ClientBatch]:
    """Yield the first batches, until they have ``most`` images."""
    for batch in batches:
        yield batch
        if (most := most - int(batch.mask_CS.sum())) <= 0:
            return


def of_images(batches: Sequence[ClientBatch], values: Callable[[ClientBatch], Tensor]) -> tuple[Tensor, Tensor]:
    """Return ``values`` [C, S, ...] and labels of the batches' images without padding, [T, ...] and [T]."""
    parts = [(values(batch)[batch.mask_CS], batch.y_CS[batch.mask_CS]) for batch in batches]
    values_T, y_T = (torch.cat(part) for part in zip(*parts, strict=True))
    return values_T, y_T


def among_known(known_K: Tensor, y_T: Tensor, *logits_TK: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return labels and logits among the classes that are known, numbered anew; all labels are of known classes."""
    if bool(known_K.all()):
        return y_T, list(logits_TK)
    return (known_K.cumsum(0) - 1)[y_T], [part_TK[:, known_K] for part_TK in logits_TK]


def fit_calibrator(task: Task, b_TK: Tensor, y_T: Tensor, calibrator: str) -> tuple[Tensor, Tensor]:
    """Return the log-temperature and the bias [K] that minimise the log-loss.

    A normal prior of variance 1 on the bias leaves classes without images where they are.
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


class Calibrator(nn.Module):
    """Maps logits [..., K] to calibrated logits [..., K].

    Args:
        facts: task and K.
        kind: ``none``, ``temperature`` or ``bcts``.
    """

    log_temperature: Tensor
    bias: Tensor
    log_source: Tensor
    known_K: Tensor

    def __init__(self, facts: Facts, kind: str) -> None:
        super().__init__()
        self.kind, self.task = check_choice("calibrator", kind, CALIBRATORS), facts.task
        self.register_buffer("log_temperature", torch.zeros(()))
        self.register_buffer("bias", torch.zeros(facts.num_classes))
        self.register_buffer("log_source", torch.full((facts.num_classes,), 1 / facts.num_classes).log())
        self.register_buffer("known_K", torch.ones(facts.num_classes, dtype=torch.bool), persistent=False)

    def read(self, cloud: CloudView) -> None:
        """Read which classes the cloud has images of."""
        if self.task == SINGLE_LABEL and (known_K := cloud.known_classes()).any():
            self.known_K.copy_(torch.from_numpy(known_K))

    def forward(self, b: Tensor) -> Tensor:
        """Return calibrated logits."""
        return b * (-self.log_temperature).exp() + self.bias

    def log_likelihood(self, calibrated: Tensor) -> Tensor:
        """Return the classes' log-likelihoods, up to a constant of each image, from calibrated logits [..., K]."""
        return calibrated.log_softmax(-1) - self.log_source

    def fit(self, classify: Callable[[Tensor], Tensor], batches: Sequence[ClientBatch]) -> Record:
        """Fit temperature, bias and source prior; return the number of images and the temperature.

        Args:
            classify: from features [..., D] to the logits that are calibrated, [..., K].
            batches: val clients.
        """
        b_TK, y_T = of_images(batches, lambda batch: classify(batch.x_CSD))
        y_T, (b_Tk,) = among_known(self.known_K, y_T, b_TK)
        log_temperature, bias_k = fit_calibrator(self.task, b_Tk, y_T, self.kind)
        self.log_temperature.copy_(log_temperature)
        self.bias[self.known_K] = bias_k
        logits_TK = self(b_TK)[:, self.known_K]
        if self.task == MULTI_LABEL:
            self.log_source.copy_(logits_TK.sigmoid().mean(0).clamp(1e-6, 1 - 1e-6).log())
        elif self.kind != "none":
            # one image more, shared out evenly among the classes
            mean_k = (logits_TK.softmax(-1).sum(0) + 1 / logits_TK.shape[1]) / (len(logits_TK) + 1)
            self.log_source[self.known_K] = (mean_k * (len(mean_k) / len(self.log_source))).log()
        record: Record = {"images": len(y_T)}
        return record if self.kind == "none" else record | {"temperature": round(float(self.log_temperature.exp()), 4)}


def mean_log_loss(task: Task, logits: Callable[[ClientBatch], Tensor], batches: Sequence[ClientBatch]) -> float:
    """Return the mean log-loss of ``logits`` [C, S, K] over the batches' images."""
    total, images = 0.0, 0
    for batch in batches:
        logits_TK, y_T = logits(batch)[batch.mask_CS], batch.y_CS[batch.mask_CS]
        total, images = total + float(task.log_loss(logits_TK, y_T).sum()), images + len(y_T)
    return total / images


def choose(module: nn.Module, grids: Mapping[str, Sequence[float]], loss: Callable[[], float]) -> Record:
    """Set each scalar buffer that ``grids`` names to its value of least loss, one after the other; return them."""
    chosen: Record = {}
    for name, values in grids.items():
        current, losses = getattr(module, name), []
        for value in values:
            current.fill_(value)
            losses.append(loss())
        best = min(range(len(values)), key=losses.__getitem__)
        current.fill_(values[best])
        chosen |= {name: values[best], f"{name}_log_loss": round(losses[best], 4)}
    return chosen
