"""What the cloud has: the labelled images of its clients, and what methods without a training loop read from them.

Legend: C clients, S images of a client, D features, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from iciia_exp.data.batches import ClientBatch, FeatureBatches, Selection, cut_chunks
from iciia_exp.data.clients import Clients
from iciia_exp.errors import UserError
from iciia_exp.seeding import generator

__all__ = ["CloudData"]


@dataclass(frozen=True)
class CloudData:
    """Features and labels of the clients' images, by role (``train``, ``selection``, ``test``)."""

    task: str
    num_classes: int
    clients: Clients
    batches: FeatureBatches
    images: int  # S of a chunk

    def class_counts(self, role: str) -> np.ndarray:
        """Return how many images of each class (or with each attribute) every client has, float32 [C, K]."""
        ragged, labels = self.clients[role], self.batches.labels
        counts_CK = np.zeros((len(ragged), self.num_classes), dtype=np.float32)
        if labels.ndim == 2:
            np.add.at(counts_CK, ragged.row_numbers, labels[ragged.values].astype(np.float32))
            return counts_CK
        pairs = ragged.row_numbers * self.num_classes + labels[ragged.values]
        return np.bincount(pairs, minlength=counts_CK.size).reshape(counts_CK.shape).astype(np.float32)

    def require_own_labels(self, method: str) -> None:
        """Raise a `UserError` where a test client has no labelled train images of its own."""
        without = (self.clients.test.lengths > 0) & (self.clients.train.lengths == 0)
        if without.any():
            first, count = self.clients.ids[without][0], int(without.sum())
            raise UserError(
                f"method={method}: learns from labelled images of the test clients themselves; {count:,} of them "
                f"({first}, say) have none in train: choose a partition that splits within clients"
            )

    def chunks(self, role: str, batch_size: int = 64, most_images: int | None = None) -> Iterator[ClientBatch]:
        """Yield batches of chunks in a random order, always the same, until there were ``most_images`` images."""
        index_CS, client_C = cut_chunks(self.clients[role], self.images)
        order, images = generator("cloud", role).permutation(len(client_C)), 0
        for start in range(0, len(order), batch_size):
            some = order[start : start + batch_size]
            yield self.batches[Selection(index_CS[some], client_C[some])]
            images += int((index_CS[some] >= 0).sum())
            if most_images is not None and images >= most_images:
                return
