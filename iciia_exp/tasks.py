"""Tasks: one label per image, or any number of them. Loss, correct decisions and log-loss follow the task.

Legend: M images, K classes. Labels are int64 [M] (``single-label``) or 0/1 [M, K] (``multi-label``).
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["MULTI_LABEL", "SINGLE_LABEL", "TASKS", "MultiLabel", "SingleLabel", "Task"]


class Task(str):
    """What the labels of an image say. It is its own name, so that it goes into files as text."""

    @abstractmethod
    def decisions(self, num_classes: int) -> int:
        """Return how many decisions a prediction is: one class, or yes or no for every attribute."""

    @abstractmethod
    def loss(self, logits_MK: Tensor, y: Tensor) -> Tensor:
        """Return the mean loss: cross-entropy, or binary cross-entropy over images and classes (paper, section 4)."""

    @abstractmethod
    def correct(self, logits_MK: Tensor, y: Tensor) -> Tensor:
        """Return which decisions are correct, bool [M, decisions]: the top class, or every attribute's sign."""

    @abstractmethod
    def confidence(self, logits_MK: Tensor) -> Tensor:
        """Return the predicted probability of every decision, float [M, decisions]; with `correct` it gives the ECE."""

    @abstractmethod
    def log_loss(self, logits_MK: Tensor, y: Tensor) -> Tensor:
        """Return the log-loss of every image in nats, float64 [M], summed over its decisions."""

    @abstractmethod
    def probabilities(self, logits: Tensor) -> Tensor:
        """Return probabilities from logits [..., K]: over the classes, or of each attribute by itself."""


class SingleLabel(Task):
    """One class per image."""

    def decisions(self, num_classes: int) -> int:
        """One."""
        return 1

    def loss(self, logits_MK: Tensor, y: Tensor) -> Tensor:
        """Return the mean cross-entropy."""
        from torch.nn import functional as F

        return F.cross_entropy(logits_MK, y)

    def correct(self, logits_MK: Tensor, y: Tensor) -> Tensor:
        """Return whether the top class is the label, bool [M, 1]."""
        return (logits_MK.argmax(-1) == y)[:, None]

    def confidence(self, logits_MK: Tensor) -> Tensor:
        """Return the top class's probability, float [M, 1]."""
        return logits_MK.softmax(-1).amax(-1, keepdim=True)

    def log_loss(self, logits_MK: Tensor, y: Tensor) -> Tensor:
        """Return the cross-entropy of every image, float64 [M]."""
        from torch.nn import functional as F

        return F.cross_entropy(logits_MK.double(), y, reduction="none")

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the softmax of logits [..., K]."""
        return logits.softmax(-1)


class MultiLabel(Task):
    """Any number of attributes per image."""

    def decisions(self, num_classes: int) -> int:
        """One for each of the K attributes."""
        return num_classes

    def loss(self, logits_MK: Tensor, y: Tensor) -> Tensor:
        """Return the mean binary cross-entropy over images and attributes."""
        from torch.nn import functional as F

        return F.binary_cross_entropy_with_logits(logits_MK, y.to(logits_MK.dtype))

    def correct(self, logits_MK: Tensor, y: Tensor) -> Tensor:
        """Return whether the sign of each logit is right, bool [M, K]."""
        return (logits_MK > 0) == (y > 0)

    def confidence(self, logits_MK: Tensor) -> Tensor:
        """Return the probability of each yes or no that is predicted, float [M, K]."""
        return logits_MK.abs().sigmoid()

    def log_loss(self, logits_MK: Tensor, y: Tensor) -> Tensor:
        """Return the binary cross-entropy of every image, summed over attributes, float64 [M]."""
        from torch.nn import functional as F

        loss_MK = F.binary_cross_entropy_with_logits(logits_MK.double(), y.double(), reduction="none")
        return loss_MK.sum(-1)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the sigmoid of logits [..., K]."""
        return logits.sigmoid()


SINGLE_LABEL, MULTI_LABEL = SingleLabel("single-label"), MultiLabel("multi-label")

#: The tasks by name.
TASKS: dict[str, Task] = {task: task for task in (SINGLE_LABEL, MULTI_LABEL)}
