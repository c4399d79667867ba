"""Image loading: batch sizes, data loaders, and threads that load and compute.

Legend: B images of a batch, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from iciia_exp.data.images import ImageBatch, ImageBlocks, TransformedImages, collate
from iciia_exp.machine import side_by_side

__all__ = ["ThreadedFeatures", "image_loader", "images_per_step"]

# Numbers in the images of one step: on a processor the intermediate results of two steps should stay in its cache
# (benchmarks/bench_extraction.py), a GPU wants many images at once.
# Beside it, the most images of a step.
_STEP = {"cpu": (3 << 18, 128), "other": (1 << 25, 256)}


def images_per_step(numbers: int, device: str) -> int:
    """Return how many images of so many numbers go through a network at once on a kind of device (``cpu``)."""
    step, most = _STEP["cpu" if device == "cpu" else "other"]
    return max(8, min(most, step // max(1, numbers)))


def image_loader(
    images: TransformedImages | ImageBlocks, batch_size: int | None, workers: int, **order: Any
) -> DataLoader[Any]:
    """Return a loader of `ImageBatch` with ``workers`` processes that stay, two batches ahead each."""
    gather: Any = _as_it_is if batch_size is None else collate
    return DataLoader(
        dataset=images,  # keywords only: Lightning builds the loader of a prediction again from what it was given
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=gather,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        **order,
    )


def _as_it_is(batch: ImageBatch) -> ImageBatch:
    return batch


class ThreadedFeatures:
    """Batches with their features, computed by threads that load and compute one batch each.

    Loading and computing then share a processor's cores without waiting for each other, which neither loading
    processes nor loading threads beside a network on all cores do (benchmarks/bench_extraction.py). Iterable like a
    loader.

    Args:
        dataset: the batches, all of the form `ImageBatch`.
        features: from a batch to its features.
    """

    # More threads than this wait for each other: the interpreter runs one at a time between a network's operations.
    most = 8

    def __init__(self, dataset: ImageBlocks, features: Callable[[ImageBatch], Tensor]) -> None:
        self.dataset, self.features = dataset, features

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[tuple[ImageBatch, Tensor]]:
        """Return (batch without its images, features) in order, at most two batches per thread ahead."""
        return side_by_side(self._compute, range(len(self)), min(self.most, max(1, len(self))), ahead=2)

    def _compute(self, index: int) -> tuple[ImageBatch, Tensor]:
        batch = self.dataset[index]
        return batch._replace(images=torch.empty(0)), self.features(batch)
