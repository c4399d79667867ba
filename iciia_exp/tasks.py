"""Tasks: single-label and multi-label classification, clicks, and quality of answers, each with its loss.

A task is its own name, a string, so that files hold it as text.

Legend: M images, K classes. Labels are int64 [M] (``single-label``, ``click``) or 0/1 [M, K] (``multi-label``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    *("CLICK", "MULTI_LABEL", "QUALITY", "SINGLE_LABEL", "TASKS"),
    *("Click", "MultiLabel", "Quality", "SingleLabel", "Task"),
]


class SingleLabel(str):
    """One class per image."""

    #: What accuracy is, on the axes of figures.
    measure = "top-1 accuracy"

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

    measure = "accuracy over attributes"

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


class Click(SingleLabel):
    """No or yes for an item, K = 2. A client's items are ranked: its AUC stands in the place of its accuracy.

    Source: the released code of MPDA (KDD 2022, 2180-2190).
    """

    measure = "GAUC"

    def loss(self, logits_MK: Tensor, y: Tensor, **options: Any) -> Tensor:
        """Return the mean of -log(p + 1e-7); ``options`` are those of PyTorch's ``nll_loss``."""
        from torch.nn import functional as F

        return F.nll_loss((logits_MK.softmax(-1) + 1e-7).log(), y, **options)

    def score(self, logits_MK: Tensor) -> Tensor:
        """Return the score that items are ranked by, [M]: the logit of yes less that of no."""
        return logits_MK[:, 1] - logits_MK[:, 0]

    def pairs(self, score_M: Tensor, y_M: Tensor, client_M: Tensor, clients: int) -> tuple[Tensor, Tensor]:
        """Return the correctly ranked pairs of a yes and a no of each client, twice, and all pairs, int64 [clients].

        A pair of equal scores counts half. The AUC is the first divided by twice the second.
        """
        import torch

        order = score_M.argsort(stable=True)
        order = order[client_M[order].argsort(stable=True)]
        client, score, yes = client_M[order], score_M[order], y_M[order] > 0
        other = torch.ones_like(yes)
        other[1:] = client[1:] != client[:-1]
        new = other.clone()
        new[1:] |= score[1:] != score[:-1]
        tie = new.cumsum(0) - 1  # number of the group of equal scores
        no_before = (~yes).cumsum(0) - (~yes).int()
        first = torch.zeros(clients, dtype=torch.int64, device=score.device)
        first[client[other]] = no_before[other]
        before_T = no_before[new] - first[client[new]]
        yes_T, no_T = (torch.zeros_like(before_T).index_add_(0, tie, part.long()) for part in (yes, ~yes))
        twice = torch.zeros_like(first).index_add_(0, client[new], yes_T * (2 * before_T + no_T))
        yes_C, no_C = (torch.zeros_like(first).index_add_(0, client, part.long()) for part in (yes, ~yes))
        return twice, yes_C * no_C


class Quality(SingleLabel):
    """Which of two models answers a request better, by K metrics. Requests have no labels: their column is 0.

    The share of requests that are answered by the better model stands in the place of accuracy.
    """

    measure = "win rate"

    def loss(self, logits_MK: Tensor, y: Tensor, **options: Any) -> Tensor:
        """Return the mean binary cross-entropy with soft labels ``y``, [M, K], from 0 to 1."""
        from torch.nn import functional as F

        return F.binary_cross_entropy_with_logits(logits_MK, y.to(logits_MK.dtype), **options)


Task = SingleLabel | MultiLabel

SINGLE_LABEL, MULTI_LABEL, CLICK = SingleLabel("single-label"), MultiLabel("multi-label"), Click("click")
QUALITY = Quality("quality")

#: The tasks by name.
TASKS: dict[str, Task] = {task: task for task in (SINGLE_LABEL, MULTI_LABEL, CLICK, QUALITY)}
