"""Tasks: single-label and multi-label classification, each with its loss, correct decisions and log-loss.

A task is its own name, a string, so that files hold it as text.

Legend: M images, K classes. Labels are int64 [M] (``single-label``) or 0/1 [M, K] (``multi-label``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["MULTI_LABEL", "SINGLE_LABEL", "TASKS", "MultiLabel", "SingleLabel", "Task"]


class SingleLabel(str):
    """One class per image."""

    def decisions(self, num_classes: int) -> int:
        """Return the number of decisions of a prediction: one class."""
        return 1

    def loss(self, logits_MK: Tensor, y: Tensor, **options: Any) -> Tensor:
        """Return the mean cross-entropy (paper, section 4); ``options`` are those of PyTorch's function."""
        from torch.nn import functional as F

        return F.cross_entropy(logits_MK, y, **options)

    def correct(self, logits_MK: Tensor, y: Tensor) -> Tensor:
        """Return whether the top class is the label, bool [M, 1]."""
        return (logits_MK.argmax(-1) == y)[:, None]

    def confidence(self, logits_MK: Tensor) -> Tensor:
        """Return the top class's probability, float [M, 1]; with `correct` it gives the ECE."""
        return logits_MK.softmax(-1).amax(-1, keepdim=True)

    def log_loss(self, logits_MK: Tensor, y: Tensor) -> Tensor:
        """Return the cross-entropy of every image in nats, float64 [M]."""
        return self.loss(logits_MK.double(), y, reduction="none")

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the softmax of logits [..., K]."""
        return logits.softmax(-1)


class MultiLabel(str):
    """Any number of attributes per image."""

    def decisions(self, num_classes: int) -> int:
        """Return the number of decisions of a prediction: yes or no for each of the K attributes."""
        return num_classes

    def loss(self, logits_MK: Tensor, y: Tensor, **options: Any) -> Tensor:
        """Return the mean binary cross-entropy over images and attributes; ``options`` as for `SingleLabel.loss`."""
        from torch.nn import functional as F

        return F.binary_cross_entropy_with_logits(logits_MK, y.to(logits_MK.dtype), **options)

    def correct(self, logits_MK: Tensor, y: Tensor) -> Tensor:
        """Return whether the sign of each logit is right, bool [M, K]."""
        return (logits_MK > 0) == (y > 0)

    def confidence(self, logits_MK: Tensor) -> Tensor:
        """Return the probability of each predicted yes or no, float [M, K]; with `correct` it gives the ECE."""
        return logits_MK.abs().sigmoid()

    def log_loss(self, logits_MK: Tensor, y: Tensor) -> Tensor:
        """Return the binary cross-entropy of every image in nats, summed over attributes, float64 [M]."""
        return self.loss(logits_MK.double(), y, reduction="none").sum(-1)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the sigmoid of logits [..., K]."""
        return logits.sigmoid()


Task = SingleLabel | MultiLabel

SINGLE_LABEL, MULTI_LABEL = SingleLabel("single-label"), MultiLabel("multi-label")

#: The tasks by name.
TASKS: dict[str, Task] = {task: task for task in (SINGLE_LABEL, MULTI_LABEL)}
