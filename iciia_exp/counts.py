"""The torchmetrics metric that collects `ClientCounts` over batches, devices and processes.

Legend: C clients of a batch, S images of each, K classes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from iciia_exp import tasks
from iciia_exp.metrics import ClientCounts

__all__ = ["ClientCountsMetric", "count_update"]

_FIELDS = ("images", "backbone_hits", "method_hits", "both_hits", "backbone_loss", "method_loss")


def count_update(
    backbone_CSK: Tensor, method_CSK: Tensor, y_CS: Tensor, mask_CS: Tensor, client_C: Tensor, clients: int
) -> dict[str, Tensor]:
    """Return what one batch adds to the counts, each of shape [clients]; masked images add nothing."""
    client_M = client_C[:, None].expand_as(mask_CS)[mask_CS]
    y_M, backbone_MK, method_MK = y_CS[mask_CS], backbone_CSK[mask_CS], method_CSK[mask_CS]
    backbone_MA, method_MA = tasks.hits(backbone_MK, y_M), tasks.hits(method_MK, y_M)
    per_image = {
        "images": torch.ones_like(client_M),
        "backbone_hits": backbone_MA.sum(-1),
        "method_hits": method_MA.sum(-1),
        "both_hits": (backbone_MA & method_MA).sum(-1),
        "backbone_loss": tasks.log_loss(backbone_MK, y_M),
        "method_loss": tasks.log_loss(method_MK, y_M),
    }
    return {
        name: torch.zeros(clients, dtype=value_M.dtype, device=value_M.device).index_add_(0, client_M, value_M)
        for name, value_M in per_image.items()
    }


class ClientCountsMetric(Metric):
    """Accumulates `ClientCounts` for ``clients`` numbered clients.

    Args:
        clients: how many clients there are.
        answers: of one image: 1, or the attributes of a multi-label task (`iciia_exp.tasks.answers_per_image`).
    """

    full_state_update = False
    higher_is_better = True

    def __init__(self, clients: int, answers: int = 1) -> None:
        super().__init__()
        self.clients, self.answers = clients, answers
        for name in _FIELDS:
            dtype = torch.float64 if name.endswith("loss") else torch.int64
            self.add_state(name, torch.zeros(clients, dtype=dtype), dist_reduce_fx="sum")

    def update(self, backbone_CSK: Tensor, method_CSK: Tensor, y_CS: Tensor, mask_CS: Tensor, client_C: Tensor) -> None:
        """Add one padded batch: logits [C, S, K], labels and mask (True = a real image) as in `ClientBatch`."""
        # only the batch's clients are touched: with 100,000 of them adding whole arrays is most of an evaluation
        numbers, rows_C = client_C.unique(return_inverse=True)
        added = count_update(backbone_CSK, method_CSK, y_CS, mask_CS, rows_C, len(numbers))
        for name, value in added.items():
            state = getattr(self, name)
            if state.is_inference() and not torch.is_inference_mode_enabled():  # reset there, not to be changed here
                state = state.clone()
            setattr(self, name, state.index_add_(0, numbers, value))

    def compute(self) -> dict[str, Tensor]:
        """Return the counts of all clients, each of shape [clients], summed over processes."""
        return {name: getattr(self, name) for name in _FIELDS}

    def counts(self) -> tuple[np.ndarray, ClientCounts]:
        """Return the numbers of the clients that had images, and their counts."""
        values = {name: value.reshape(-1).cpu().numpy() for name, value in self.compute().items()}
        numbers = np.flatnonzero(values["images"])
        arrays: dict[str, Any] = {f"{name}_C": values[name][numbers] for name in _FIELDS}
        return numbers, ClientCounts(**arrays, answers=self.answers)
