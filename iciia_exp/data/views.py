"""Views: access of the cloud and of the devices to images and labels.

The cloud reads the labelled train and val images of its clients, and never a test image. A device reads its own train
and val images with their labels. An oracle's device also reads its test images with their labels.

Legend: C clients, S images of a client, D features, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import copy
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from iciia_exp.data.batches import ClientBatch, ClientIndex, FeatureBatches, cut_chunks
from iciia_exp.data.clients import Clients, Ragged
from iciia_exp.errors import NotApplicable
from iciia_exp.seeding import generator

__all__ = ["CloudView", "Devices", "require_own_labels"]

# Names of roles in seeds, from the first release: they decide the order of the chunks.
_SEEDS = {"val": "selection"}


class CloudView(Dataset[ClientBatch]):
    """Access of the cloud: features and labels of the clients' train and val images.

    Args:
        clients: the partition.
        batches: features and labels of all images.
        num_classes: K.
        images: S, images of a chunk.
        draw_val: yields batches of val clients drawn like the training clients; None: the val clients' chunks.
        backbone: loads the frozen backbone (`iciia_exp.models.backbones.base.Backbone`).
    """

    def __init__(
        self,
        clients: Clients,
        batches: FeatureBatches,
        num_classes: int,
        images: int,
        draw_val: Callable[[], Iterator[ClientBatch]] | None = None,
        backbone: Callable[[], Any] | None = None,
    ) -> None:
        #: The partition without its test images.
        self.clients = replace(clients, test=Ragged.empty(len(clients)))
        self.num_classes, self.images = num_classes, images
        self._batches, self._draw_val, self._backbone = batches, draw_val, backbone
        self._readable = np.zeros(len(batches.labels), dtype=bool)
        for role in ("train", "val"):
            self._readable[clients[role].values] = True

    def backbone(self) -> Any:
        """Return the frozen backbone (`iciia_exp.models.backbones.base.Backbone`)."""
        if self._backbone is None:
            raise LookupError("the cloud was given no backbone")
        return self._backbone()

    def __getitem__(self, index: ClientIndex) -> ClientBatch:
        """Return features and labels of train and val images; other images raise `PermissionError`."""
        if not self._readable[index.index_CS[index.index_CS >= 0]].all():
            raise PermissionError("the cloud reads only train and val images")
        return self._batches[index]

    def beside(self, rows: np.ndarray, arrays: Mapping[str, np.ndarray]) -> CloudView:
        """Return the view with further arrays [len(rows), ...] of some images, by name, in `ClientBatch.arrays`."""
        wholes = {n: np.zeros((len(self._readable), *a.shape[1:]), dtype=a.dtype) for n, a in arrays.items()}
        for name, values in arrays.items():
            wholes[name][rows] = values
        view = copy(self)
        view._batches = FeatureBatches(self._batches.features, self._batches.labels, arrays=wholes)
        return view

    def class_counts(self, role: str) -> np.ndarray:
        """Return how many images of each class (or with each attribute) every client has, float32 [C, K]."""
        ragged, labels = self.clients[role], self._batches.labels
        counts_CK = np.zeros((len(ragged), self.num_classes), dtype=np.float32)
        if labels.ndim == 2:
            np.add.at(counts_CK, ragged.row_numbers, labels[ragged.values].astype(np.float32))
            return counts_CK
        pairs = ragged.row_numbers * self.num_classes + labels[ragged.values]
        return np.bincount(pairs, minlength=counts_CK.size).reshape(counts_CK.shape).astype(np.float32)

    def known_classes(self) -> np.ndarray:
        """Return of which classes there are train or val images, bool [K]; of a task with one label per image."""
        known_K = np.zeros(self.num_classes, dtype=bool)
        for role in ("train", "val"):
            known_K[self._batches.labels[self.clients[role].values]] = True
        return known_K

    def chunks(self, role: str, batch_size: int = 64, most_images: int | None = None) -> Iterator[ClientBatch]:
        """Yield batches of chunks in a fixed random order, until ``most_images`` images are reached."""
        index_CS, client_C = cut_chunks(self.clients[role], self.images)
        order, images = generator("cloud", _SEEDS.get(role, role)).permutation(len(client_C)), 0
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            yield self[ClientIndex(index_CS[rows], client_C[rows])]
            images += int((index_CS[rows] >= 0).sum())
            if most_images is not None and images >= most_images:
                return

    def distinct(self, role: str) -> Iterator[ClientBatch]:
        """Yield the batches of `chunks`, without images that came before: a partition may deal an image several times.

        Repeated images are masked. For what counts images: an interval, a test of a difference, held-out images.
        """
        seen = np.zeros(len(self._readable), dtype=bool)
        for batch in self.chunks(role):
            assert batch.image_CS is not None
            image_N = batch.image_CS[batch.mask_CS].numpy()
            new_N = np.zeros(len(image_N), dtype=bool)
            new_N[np.unique(image_N, return_index=True)[1]] = True
            new_N &= ~seen[image_N]
            seen[image_N] = True
            mask_CS = batch.mask_CS.clone()
            mask_CS[batch.mask_CS] = torch.from_numpy(new_N)
            yield batch._replace(mask_CS=mask_CS)

    def drawn_val(self) -> Iterator[ClientBatch]:
        """Yield batches of val clients that are drawn like the training clients."""
        return self.chunks("val") if self._draw_val is None else self._draw_val()


class Devices:
    """Access of each device to its own images.

    Args:
        clients: the partition.
        batches: features and labels of all images.
        test_labels: whether a device may read the labels of its test images (an oracle).
    """

    def __init__(self, clients: Clients, batches: FeatureBatches, test_labels: bool = False) -> None:
        self._clients, self._batches = clients, batches
        self._roles = ("train", "val", "test") if test_labels else ("train", "val")

    def __len__(self) -> int:
        return len(self._clients)

    @property
    def tested(self) -> np.ndarray:
        """Numbers of the devices with test images, int64."""
        return np.flatnonzero(self._clients.test.lengths)

    def lengths(self, role: str) -> np.ndarray:
        """Return how many images of a role every device has, int64 [C]."""
        return self._clients[role].lengths

    def own(self, numbers: np.ndarray) -> dict[str, ClientBatch]:
        """Return all images of some devices by role, with their labels, a device a row."""
        return {role: self._images(self._clients[role], numbers) for role in self._roles}

    def _images(self, ragged: Ragged, numbers: np.ndarray) -> ClientBatch:
        index_CS = ragged.padded(numbers, int(ragged.lengths[numbers].max(initial=0)))
        return self._batches[ClientIndex(index_CS, numbers)]


def require_own_labels(clients: Clients, method: str) -> None:
    """Raise a `NotApplicable` if a client with test images has no train images."""
    without = (clients.test.lengths > 0) & (clients.train.lengths == 0)
    if without.any():
        problem = f"{without.sum():,} of them ({clients.ids[without][0]}, say) have none in train"
        hint = "choose a partition that splits within clients"
        raise NotApplicable("method", method, f"learns from labelled images of the test clients; {problem}: {hint}")
