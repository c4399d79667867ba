"""The torchmetrics metric that collects `ClientCounts` over batches, devices and processes.

Legend: C clients of a batch, S images of each, K classes.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric

from iciia_exp.metrics import ClientCounts

__all__ = ["ClientCountsMetric", "count_update"]

_FIELDS = ("images", "backbone_hits", "method_hits", "both_hits", "backbone_loss", "method_loss")


def count_update(
    backbone_CSK: Tensor, method_CSK: Tensor, y_CS: Tensor, mask_CS: Tensor, client_C: Tensor, clients: int
) -> dict[str, Tensor]:
    """Return what one batch adds to the counts, each of shape [clients]; masked images add nothing."""
    client_M = client_C[:, None].expand_as(y_CS)[mask_CS]
    y_M, backbone_MK, method_MK = y_CS[mask_CS], backbone_CSK[mask_CS].double(), method_CSK[mask_CS].double()
    backbone_M, method_M = backbone_MK.argmax(-1) == y_M, method_MK.argmax(-1) == y_M
    per_image = {
        "images": torch.ones_like(y_M),
        "backbone_hits": backbone_M.long(),
        "method_hits": method_M.long(),
        "both_hits": (backbone_M & method_M).long(),
        "backbone_loss": F.cross_entropy(backbone_MK, y_M, reduction="none"),
        "method_loss": F.cross_entropy(method_MK, y_M, reduction="none"),
    }
    return {
        name: torch.zeros(clients, dtype=value_M.dtype, device=value_M.device).index_add_(0, client_M, value_M)
        for name, value_M in per_image.items()
    }


class ClientCountsMetric(Metric):
    """Accumulates `ClientCounts` for ``clients`` numbered clients.

    Single-label: top-1 hits and log-loss in nats.
    """

    full_state_update = False
    higher_is_better = True

    def __init__(self, clients: int) -> None:
        super().__init__()
        self.clients = clients
        for name in _FIELDS:
            dtype = torch.float64 if name.endswith("loss") else torch.int64
            self.add_state(name, torch.zeros(clients, dtype=dtype), dist_reduce_fx="sum")

    def update(self, backbone_CSK: Tensor, method_CSK: Tensor, y_CS: Tensor, mask_CS: Tensor, client_C: Tensor) -> None:
        """Add one padded batch: logits [C, S, K], labels and mask [C, S] (True = a real image), client numbers [C]."""
        added = count_update(backbone_CSK, method_CSK, y_CS, mask_CS, client_C, self.clients)
        for name, value in added.items():
            setattr(self, name, getattr(self, name) + value)

    def compute(self) -> dict[str, Tensor]:
        """Return the counts of all clients, each of shape [clients], summed over processes."""
        return {name: getattr(self, name) for name in _FIELDS}

    def counts(self) -> tuple[np.ndarray, ClientCounts]:
        """Return the numbers of the clients that had images, and their counts."""
        values = {name: value.reshape(-1).cpu().numpy() for name, value in self.compute().items()}
        numbers = np.flatnonzero(values["images"])
        return numbers, ClientCounts(*(values[name][numbers] for name in _FIELDS))
