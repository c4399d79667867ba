"""Client batches: chunks of a client's images, padded, many clients to a batch.

Legend: C chunks of a batch (each of one client), S images of a chunk, D features.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from iciia_exp.data.clients import Ragged
from iciia_exp.seeding import generator

__all__ = ["ClientBatch", "ClientBatchSampler", "FeatureBatches", "cut_chunks", "pack"]

#: Batches within which chunks are sorted by length.
WINDOW = 32


class ClientBatch(NamedTuple):
    """Images of C clients, padded to S."""

    x_CSD: Tensor  # float32, zero where padded
    y_CS: Tensor  # int64 [C, S], of a multi-label task uint8 [C, S, K]; 0 where padded
    mask_CS: Tensor  # bool, True = a real image
    client_C: Tensor  # int64, number of the client in its partition
    #: the backbone's logits by a classifier that was not fitted on the image, [C, S, K]; None where it has no other
    backbone_CSK: Tensor | None = None
    image_CS: Tensor | None = None  # int64, number of the image in the dataset, -1 where padded

    def moved(self, device: torch.device | str) -> ClientBatch:
        """Return the batch on a device."""
        return ClientBatch(*(None if tensor is None else tensor.to(device) for tensor in self))  # type: ignore[arg-type]


class ClientIndex(NamedTuple):
    """What the sampler asks for: image numbers (-1 = padding) and whose they are."""

    index_CS: np.ndarray
    client_C: np.ndarray


def cut_chunks(ragged: Ragged, size: int, order: np.ndarray | None = None) -> ClientIndex:
    """Cut every client's images into chunks of ``size``; the last of a client may be short.

    Args:
        ragged: image numbers by client.
        size: S, images of a chunk.
        order: optional permutation of positions in ``ragged.values`` that keeps every client's images together.

    Returns:
        Image numbers [chunks, S] padded with -1, and the client of each chunk.
    """
    values = ragged.values if order is None else ragged.values[order]
    chunks = -(-ragged.lengths // size)
    client_C = np.repeat(np.arange(len(ragged)), chunks)
    index_CS = np.full((len(client_C), size), -1, dtype=np.int64)
    position = np.arange(len(values)) - np.repeat(ragged.offsets[:-1], ragged.lengths)  # within the client
    first_chunk = np.cumsum(chunks) - chunks
    index_CS[np.repeat(first_chunk, ragged.lengths) + position // size, position % size] = values
    return ClientIndex(index_CS, client_C)


def pack(lengths_C: np.ndarray, order_C: np.ndarray, batch_size: int, rng: np.random.Generator) -> np.ndarray:
    """Return an order of chunks in which those of a batch are about equally long, so that little is padded.

    Chunks move by at most `WINDOW` batches; chunks that are all of one length keep their order.

    Args:
        lengths_C: images of every chunk.
        order_C: the order to start from.
        batch_size: chunks of a batch.
        rng: shuffles the batches of a window.
    """
    if batch_size == 1 or (lengths_C == lengths_C[:1]).all():
        return order_C
    parts = []
    for start in range(0, len(order_C), WINDOW * batch_size):
        window = order_C[start : start + WINDOW * batch_size]
        window = window[np.argsort(-lengths_C[window], kind="stable")]
        whole = len(window) // batch_size * batch_size
        parts += [window[:whole].reshape(-1, batch_size)[rng.permutation(whole // batch_size)].ravel(), window[whole:]]
    return np.concatenate(parts)


class ClientBatchSampler(Sampler[ClientIndex]):
    """Yields batches of chunks; the order depends on (seed, epoch) alone, so a resumed run continues it.

    Args:
        ragged: image numbers by client.
        images: S, images of a chunk.
        batch_size: C, chunks of a batch, over all processes together.
        shuffle: draw a new order of chunks each epoch.
        shuffle_images: also draw a new order of each client's images before cutting (published: false).
        seed: seed of the orders.
        draw: gives an epoch's sequences from a generator, in the place of chunks of ``ragged``
            (`iciia_exp.data.client_mix`), and how many they are.
        rank, world_size: this process and the number of processes; each gets its share of every batch. When
            shuffling, the last batch is filled up from the first so that all processes take equally many steps.
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
        """Choose the epoch's order; Lightning calls it before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self._chunks // self.batch_size)

    def __iter__(self) -> Iterator[ClientIndex]:
        rng = generator("client_batches", self.seed, self.epoch)
        index_CS, client_C = self._chunks_of_an_epoch(rng)
        chunk_order = rng.permutation(len(client_C)) if self.shuffle else np.arange(len(client_C))
        chunk_order = pack((index_CS >= 0).sum(1), chunk_order, self.batch_size, rng)
        if self.shuffle and self.world_size > 1:
            short = -len(chunk_order) % self.world_size
            chunk_order = np.concatenate([chunk_order, chunk_order[:short]])
        for start in range(0, len(chunk_order), self.batch_size):
            mine = chunk_order[start : start + self.batch_size][self.rank :: self.world_size]
            if len(mine):
                yield ClientIndex(index_CS[mine], client_C[mine])

    def _chunks_of_an_epoch(self, rng: np.random.Generator) -> ClientIndex:
        if self.draw is not None:
            return self.draw[0](rng)
        order = None
        if self.shuffle_images:
            order = self.ragged.shuffled(rng)
        return cut_chunks(self.ragged, self.images, order)


def _read_ahead(features: np.ndarray, rows: np.ndarray) -> None:
    """Ask the system for the pages of all ``rows`` at once; changes no value.

    Rows of a memory-mapped array that are not in memory yet would be read one after the other, each with its
    neighbours that nobody wants: some tens of times slower (benchmarks/bench_store.py).
    """
    mapped = getattr(features, "_mmap", None)
    if mapped is None or not features.flags.c_contiguous or not hasattr(mmap, "MADV_WILLNEED"):
        return
    first = features.ctypes.data - np.frombuffer(mapped, dtype=np.uint8).ctypes.data
    starts = first + rows * features.strides[0]
    pages = starts // mmap.PAGESIZE * mmap.PAGESIZE
    for page, length in zip(pages.tolist(), (starts + features.strides[0] - pages).tolist(), strict=True):
        mapped.madvise(mmap.MADV_WILLNEED, page, length)


class FeatureBatches(Dataset[ClientBatch]):
    """Gathers a `ClientBatch` from stored features for each `ClientIndex`; use with ``DataLoader(batch_size=None)``.

    Args:
        features: [M, D] array, memory-mapped or in memory, float16 or float32.
        labels: int64 [M], or uint8 [M, K] of a multi-label task.
        logits: of some images, [R, K], and their numbers, int64 [R]; for `ClientBatch.backbone_CSK`.
    """

    def __init__(
        self, features: np.ndarray, labels: np.ndarray, logits: tuple[np.ndarray, np.ndarray] | None = None
    ) -> None:
        self.features, self.labels = features, labels
        self.logits_RK, self._row_M = None, np.full(0 if logits is None else len(features), -1, dtype=np.int64)
        if logits is not None:
            self.logits_RK, numbers_R = logits
            self._row_M[numbers_R] = np.arange(len(numbers_R))

    def __getitem__(self, index: ClientIndex) -> ClientBatch:
        index_CS, client_C = index
        mask_CS = index_CS >= 0
        used = (
            int(np.flatnonzero(mask_CS.any(axis=0)).max(initial=-1)) + 1
        )  # do not carry columns that are padding for all
        index_CS, mask_CS = index_CS[:, :used], mask_CS[:, :used]
        rows = index_CS[mask_CS]
        _read_ahead(self.features, rows)
        if len(rows) == index_CS.size:
            x_CSD = self.features[index_CS].astype(np.float32, copy=False)
        else:
            x_CSD = np.zeros((*index_CS.shape, self.features.shape[1]), dtype=np.float32)
            x_CSD[mask_CS] = self.features[rows]
        labels = self.labels[index_CS]
        y_CS = np.where(mask_CS if labels.ndim == 2 else mask_CS[..., None], labels, labels.dtype.type(0))
        batch = ClientBatch(*_tensors(x_CSD, y_CS, mask_CS, client_C))._replace(image_CS=_tensors(index_CS)[0])
        if self.logits_RK is not None and len(rows) and (at := self._row_M[rows]).min() >= 0:
            backbone_CSK = np.zeros((*index_CS.shape, self.logits_RK.shape[1]), dtype=np.float32)
            backbone_CSK[mask_CS] = self.logits_RK[at]
            batch = batch._replace(backbone_CSK=torch.from_numpy(backbone_CSK))
        return batch


def _tensors(*arrays: np.ndarray) -> list[Tensor]:
    return [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
