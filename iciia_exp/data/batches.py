"""Client batches: padded chunks of the images of several clients.

Legend: C chunks of a batch, each of one client, S images of a chunk, D features.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from iciia_exp.data.clients import Ragged, positions
from iciia_exp.seeding import generator

__all__ = ["ClientBatch", "ClientBatchSampler", "FeatureBatches", "cut_chunks", "pack"]

#: Number of batches within which chunks are sorted by length.
WINDOW = 32


class ClientBatch(NamedTuple):
    """Images of C clients, padded to S."""

    x_CSD: Tensor  # float32, zero where padded
    y_CS: Tensor  # int64 [C, S], of a multi-label task uint8 [C, S, K]; 0 where padded
    mask_CS: Tensor  # bool, False where padded
    client_C: Tensor  # int64, number of the client in its partition
    #: the backbone's logits [C, S, K] from a classifier that was not fitted on the image; None if it has no other
    backbone_CSK: Tensor | None = None
    image_CS: Tensor | None = None  # int64, number of the image in the dataset, -1 where padded
    #: what the method reads beside the features, by name, float32 [C, S, ...], zero where padded
    arrays: Mapping[str, Tensor] = {}

    def take(self, rows: slice | Tensor) -> ClientBatch:
        """Return some of the chunks."""
        return self._mapped(lambda tensor: tensor[rows])

    def cut(self) -> ClientBatch:
        """Return the chunks without the padding that all of them have."""
        longest = int(self.mask_CS.sum(1).max())
        return self._mapped(lambda tensor: tensor[:, :longest] if tensor.ndim > 1 else tensor)

    def moved(self, device: torch.device | str) -> ClientBatch:
        """Return the batch on a device."""
        return self._mapped(lambda tensor: tensor.to(device))

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> ClientBatch:
        changed = {name: change(value) for name, value in self._asdict().items() if isinstance(value, Tensor)}
        return self._replace(**changed, arrays={name: change(tensor) for name, tensor in self.arrays.items()})


class ClientIndex(NamedTuple):
    """Image numbers of a batch, padded with -1, and their clients."""

    index_CS: np.ndarray
    client_C: np.ndarray


def cut_chunks(ragged: Ragged, size: int, order: np.ndarray | None = None) -> ClientIndex:
    """Cut every client's images into chunks of ``size`` (S); the last chunk of a client may be short.

    ``order`` is a permutation of positions in ``ragged.values``, within each client. Returns image numbers [chunks, S],
    padded with -1, and the client of each chunk.
    """
    values = ragged.values if order is None else ragged.values[order]
    chunks = -(-ragged.lengths // size)
    client_C = np.repeat(np.arange(len(ragged)), chunks)
    index_CS = np.full((len(client_C), size), -1, dtype=np.int64)
    position = positions(ragged.lengths)
    first_chunk = np.cumsum(chunks) - chunks
    index_CS[np.repeat(first_chunk, ragged.lengths) + position // size, position % size] = values
    return ClientIndex(index_CS, client_C)


def pack(lengths_C: np.ndarray, order_C: np.ndarray, batch_size: int, rng: np.random.Generator) -> np.ndarray:
    """Return an order of chunks with similar lengths in each batch, which needs little padding.

    The chunks have ``lengths_C`` images and start in ``order_C``. They move by at most `WINDOW` batches, which are
    shuffled by ``rng``; chunks of equal length keep their order.
    """
    if batch_size == 1 or (lengths_C == lengths_C[:1]).all():
        return order_C
    parts = []
    for start in range(0, len(order_C), WINDOW * batch_size):
        window = order_C[start : start + WINDOW * batch_size]
        window = window[np.argsort(-lengths_C[window], kind="stable")]
        batches, last = np.split(window, [len(window) // batch_size * batch_size])
        parts += [rng.permutation(batches.reshape(-1, batch_size)).ravel(), last]
    return np.concatenate(parts)


class ClientBatchSampler(Sampler[ClientIndex]):
    """Yields batches of chunks in an order that depends on (seed, epoch) only, so that a resumed run continues it.

    Args:
        ragged: image numbers by client.
        images: S, images of a chunk.
        batch_size: C, chunks of a batch, over all processes together.
        shuffle: draw a new order of chunks each epoch.
        shuffle_images: also draw a new order of each client's images before cutting (published: false).
        seed: seed of the orders.
        draw: function from a generator to the sequences of an epoch, used in place of chunks of ``ragged``
            (`iciia_exp.data.client_mix`), and their number.
        rank, world_size: number of this process and number of processes; each gets its share of every batch. All have
            equally many steps: one without a chunk of the last batch gets a chunk without images.
    """

    def __init__(
        self,
        ragged: Ragged,
        images: int,
        batch_size: int,
        *,
        shuffle: bool = False,
        shuffle_images: bool = False,
        seed: int = 0,
        draw: tuple[Callable[[np.random.Generator], ClientIndex], int] | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.ragged, self.images, self.batch_size = ragged, images, batch_size
        self.shuffle, self.shuffle_images, self.seed = shuffle, shuffle_images, seed
        self.draw, self.rank, self.world_size = draw, rank, world_size
        self.epoch = 0
        self._chunks = int((-(-ragged.lengths // images)).sum()) if draw is None else draw[1]

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which decides the order; called by Lightning."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self._chunks // self.batch_size)

    def __iter__(self) -> Iterator[ClientIndex]:
        rng = generator("client_batches", self.seed, self.epoch)
        if self.draw is not None:
            index_CS, client_C = self.draw[0](rng)
        else:
            order = self.ragged.shuffled(rng) if self.shuffle_images else None
            index_CS, client_C = cut_chunks(self.ragged, self.images, order)
        chunk_order = rng.permutation(len(client_C)) if self.shuffle else np.arange(len(client_C))
        chunk_order = pack((index_CS >= 0).sum(1), chunk_order, self.batch_size, rng)
        for start in range(0, len(chunk_order), self.batch_size):
            chunks = chunk_order[start : start + self.batch_size][self.rank :: self.world_size]
            if len(chunks):
                yield ClientIndex(index_CS[chunks], client_C[chunks])
            else:
                yield ClientIndex(np.full((1, self.images), -1, dtype=np.int64), client_C[:1])


def _read_ahead(array: np.ndarray, rows: np.ndarray) -> None:
    """Request the memory pages of all ``rows`` of a memory-mapped array at once; changes no value.

    Otherwise missing rows are read one by one, with their neighbours, which is some tens of times slower
    (benchmarks/bench_store.py).
    """
    mapped = getattr(array, "_mmap", None)
    if mapped is None or not array.flags.c_contiguous or not hasattr(mmap, "MADV_WILLNEED"):
        return
    first = array.ctypes.data - np.frombuffer(mapped, dtype=np.uint8).ctypes.data
    starts = first + rows * array.strides[0]
    pages = starts // mmap.PAGESIZE * mmap.PAGESIZE
    for page, length in zip(pages.tolist(), (starts + array.strides[0] - pages).tolist(), strict=True):
        mapped.madvise(mmap.MADV_WILLNEED, page, length)


def _padded(array: np.ndarray, index_CS: np.ndarray, mask_CS: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return the ``rows`` of an array at their places in a batch, float32 [C, S, ...], zero elsewhere."""
    _read_ahead(array, rows)
    if len(rows) == index_CS.size:
        return array[index_CS].astype(np.float32, copy=False)
    values = np.zeros((*index_CS.shape, *array.shape[1:]), dtype=np.float32)
    values[mask_CS] = array[rows]
    return values


class FeatureBatches(Dataset[ClientBatch]):
    """Reads the `ClientBatch` of a `ClientIndex` from stored features; use with ``DataLoader(batch_size=None)``.

    Args:
        features: [M, D] array, memory-mapped or in memory, float16 or float32.
        labels: int64 [M], or uint8 [M, K] of a multi-label task.
        logits: logits [R, K] of some images, and their numbers, int64 [R], for `ClientBatch.backbone_CSK`.
        arrays: further stored arrays [M, ...], by name, for `ClientBatch.arrays`.
    """

    def __init__(
        self,
        features: np.ndarray,
        labels: np.ndarray,
        logits: tuple[np.ndarray, np.ndarray] | None = None,
        arrays: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        self.features, self.labels, self.arrays = features, labels, dict(arrays or {})
        self.logits_RK, self._row_M = None, np.full(0 if logits is None else len(features), -1, dtype=np.int64)
        if logits is not None:
            self.logits_RK, numbers_R = logits
            self._row_M[numbers_R] = np.arange(len(numbers_R))

    def __getitem__(self, index: ClientIndex) -> ClientBatch:
        index_CS, client_C = index
        mask_CS = index_CS >= 0
        used = int(np.flatnonzero(mask_CS.any(axis=0)).max(initial=-1)) + 1  # without columns of padding only
        index_CS, mask_CS = index_CS[:, :used], mask_CS[:, :used]
        rows = index_CS[mask_CS]
        x_CSD = _padded(self.features, index_CS, mask_CS, rows)
        labels = self.labels[index_CS]
        y_CS = np.where(mask_CS if labels.ndim == 2 else mask_CS[..., None], labels, labels.dtype.type(0))
        x, y, mask, client, image = _tensors(x_CSD, y_CS, mask_CS, client_C, index_CS)
        arrays = {n: torch.from_numpy(_padded(array, index_CS, mask_CS, rows)) for n, array in self.arrays.items()}
        batch = ClientBatch(x, y, mask, client, image_CS=image, arrays=arrays)
        if self.logits_RK is not None and len(rows) and (at := self._row_M[rows]).min() >= 0:
            backbone_CSK = np.zeros((*index_CS.shape, self.logits_RK.shape[1]), dtype=np.float32)
            backbone_CSK[mask_CS] = self.logits_RK[at]
            batch = batch._replace(backbone_CSK=torch.from_numpy(backbone_CSK))
        return batch


def _tensors(*arrays: np.ndarray) -> list[Tensor]:
    return [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
