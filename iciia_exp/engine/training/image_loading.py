"""Image loading: batch sizes, data loaders, and threads for loading and computing.

Legend: B images of a batch.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from iciia_exp.data.images import ImageBatch, ImageBlocks, TransformedImages, collate
from iciia_exp.machine import side_by_side

__all__ = ["ThreadedOutputs", "image_loader", "images_per_step"]

# Numbers in the images of one step, and images of a step at most. On a CPU the intermediate results of two steps should
# stay in its cache (benchmarks/bench_extraction.py); a GPU needs many images at once.
_STEP = {"cpu": (3 << 18, 128), "other": (1 << 25, 256)}


def images_per_step(numbers: int, device: str) -> int:
    """Return the number of images of a step, from the numbers in an image and the kind of device (``cpu``)."""
    step, most = _STEP["cpu" if device == "cpu" else "other"]
    return max(8, min(most, step // max(1, numbers)))


def image_loader(
    images: TransformedImages | ImageBlocks, batch_size: int | None, workers: int, **order: Any
) -> DataLoader[Any]:
    """Return a loader of `ImageBatch` with ``workers`` persistent processes."""
    gather: Any = _as_it_is if batch_size is None else collate
    return DataLoader(
        dataset=images,  # keywords: Lightning rebuilds the loader of a prediction from its arguments
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=gather,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        **order,
    )


def _as_it_is(batch: ImageBatch) -> ImageBatch:
    return batch


class ThreadedOutputs:
    """Batches with their outputs, from threads that load and compute one batch each; iterable like a loader.

    Loading and computing share a processor's cores without waiting for each other, unlike loading processes or threads
    beside a network on all cores (benchmarks/bench_extraction.py).

    Args:
        dataset: the batches, all of the form `ImageBatch`.
        outputs: from a batch to its arrays, by name.
    """

    # More threads wait for the interpreter's lock between a network's operations.
    most = 8

    def __init__(self, dataset: ImageBlocks, outputs: Callable[[ImageBatch], dict[str, Tensor]]) -> None:
        self.dataset, self.outputs = dataset, outputs

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[tuple[ImageBatch, dict[str, Tensor]]]:
        """Yield (batch without its images, arrays) in order, at most two batches per thread ahead."""
        return side_by_side(self._compute, range(len(self)), min(self.most, max(1, len(self))), ahead=2)

    def _compute(self, index: int) -> tuple[ImageBatch, dict[str, Tensor]]:
        batch = self.dataset[index]
        return batch._replace(images=torch.empty(0)), self.outputs(batch)
