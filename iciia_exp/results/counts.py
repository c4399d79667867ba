"""Client counts as a torchmetrics metric, over batches, devices and processes.

Legend: C clients of a batch, S images of each, M images, K classes, A decisions of an image.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from iciia_exp.results.summary import ClientCounts
from iciia_exp.tasks import Task

__all__ = ["ClientCountsMetric", "Outcomes", "batch_outcomes", "outcomes"]

_FIELDS = ("images", "backbone_correct", "method_correct", "both_correct", "backbone_loss", "method_loss")


class Outcomes(NamedTuple):
    """How right logits are about M images, with A decisions each."""

    correct_MA: Tensor  # bool
    loss_M: Tensor  # float64, log-loss in nats

    def at(self, rows: Tensor) -> Outcomes:
        """Return those of some images."""
        return Outcomes(self.correct_MA[rows], self.loss_M[rows])


def outcomes(task: Task, logits_MK: Tensor, y: Tensor) -> Outcomes:
    """Return how right logits are, by the task that the labels are of."""
    return Outcomes(task.correct(logits_MK, y), task.log_loss(logits_MK, y))


def batch_outcomes(
    task: Task, backbone_CSK: Tensor, method_CSK: Tensor, y_CS: Tensor, mask_CS: Tensor, client_C: Tensor
) -> tuple[Tensor, Outcomes, Outcomes]:
    """Return what `ClientCountsMetric.update` takes from a padded batch, as in `ClientBatch`; masked images are out."""
    client_M = client_C[:, None].expand_as(mask_CS)[mask_CS]
    y_M = y_CS[mask_CS]
    return client_M, outcomes(task, backbone_CSK[mask_CS], y_M), outcomes(task, method_CSK[mask_CS], y_M)


class ClientCountsMetric(Metric):
    """Accumulates `ClientCounts` for ``clients`` numbered clients.

    Args:
        clients: how many clients there are.
        decisions: of one image: 1, or the attributes of a multi-label task (`iciia_exp.tasks.Task.decisions`).
    """

    full_state_update = False
    higher_is_better = True

    def __init__(self, clients: int, decisions: int = 1) -> None:
        super().__init__()
        self.clients, self.decisions = clients, decisions
        for name in _FIELDS:
            dtype = torch.float64 if name.endswith("loss") else torch.int64
            self.add_state(name, torch.zeros(clients, dtype=dtype), dist_reduce_fx="sum")

    def update(self, client_M: Tensor, backbone: Outcomes, method: Outcomes) -> None:
        """Add images, each of the client with the number ``client_M``, int64."""
        added = {
            "images": torch.ones_like(client_M),
            "backbone_correct": backbone.correct_MA.sum(-1),
            "method_correct": method.correct_MA.sum(-1),
            "both_correct": (backbone.correct_MA & method.correct_MA).sum(-1),
            "backbone_loss": backbone.loss_M,
            "method_loss": method.loss_M,
        }
        for name, value_M in added.items():
            state = getattr(self, name)
            if state.is_inference() and not torch.is_inference_mode_enabled():  # reset there, not to be changed here
                state = state.clone()
            # touches the batch's clients alone: with 100,000 of them adding whole arrays is most of an evaluation
            setattr(self, name, state.index_add_(0, client_M, value_M))

    def compute(self) -> dict[str, Tensor]:
        """Return the counts of all clients, each of shape [clients], summed over processes."""
        return {name: getattr(self, name) for name in _FIELDS}

    def counts(self) -> tuple[np.ndarray, ClientCounts]:
        """Return the numbers of the clients that had images, and their counts."""
        values = {name: value.reshape(-1).cpu().numpy() for name, value in self.compute().items()}
        numbers = np.flatnonzero(values["images"])
        arrays: dict[str, Any] = {f"{name}_C": values[name][numbers] for name in _FIELDS}
        return numbers, ClientCounts(**arrays, decisions=self.decisions)
