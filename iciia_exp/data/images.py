"""Image batches: transformed images, labels and numbers for backbones, without those that cannot be read.

Legend: B images of a batch, K classes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from iciia_exp.data.dataset import ImageDataset
from iciia_exp.errors import UserError, first_line

__all__ = ["ImageBatch", "ImageBlocks", "TransformedImages", "collate", "readable"]


class ImageBatch(NamedTuple):
    """A batch of images that could be read, and what is known of those that could not."""

    images: Tensor  # [B, ...]
    labels: Tensor  # int64 [B], of a multi-label task uint8 [B, K]
    rows: Tensor  # int64 [B], image numbers
    bad: list[tuple[int, str]]  # (image number, problem)


class Sample(NamedTuple):
    """One image; None where it could not be read."""

    image: Tensor | None
    label: np.ndarray
    row: int
    problem: str | None


class TransformedImages(Dataset[Sample]):
    """The images ``rows`` of a dataset, through a backbone's transform; use with `collate`.

    Args:
        dataset: where the images come from.
        transform: from an image to a tensor.
        rows: numbers of the images.
        labels: of all images of the dataset, [M] or [M, K].
        on_bad_image: ``skip`` hands problems on to the batch, ``error`` raises them.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        transform: Callable[[Any], Tensor],
        rows: np.ndarray,
        labels: np.ndarray,
        on_bad_image: str = "skip",
    ) -> None:
        self.dataset, self.transform, self.rows, self.labels = dataset, transform, rows, labels
        self.on_bad_image = on_bad_image

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        row = int(self.rows[index])
        try:
            return Sample(self.transform(self.dataset[row]), self.labels[row], row, None)
        except UserError:
            raise
        except Exception as error:  # decoders raise many kinds
            problem = _problem(error, what := self.dataset.describe(row))
            if self.on_bad_image == "error":
                hint = "repair it, or leave such images out with features.on_bad_image=skip"
                raise UserError(f"{what}: cannot be read ({problem}); {hint}") from error
            return Sample(None, self.labels[row], row, problem)


class ImageBlocks(Dataset[ImageBatch]):
    """Batches with the same images whatever is left to do and whoever does it.

    The last digits of a feature depend on how many images go through the network at once. So a batch is always a
    whole block, the images ``block * size`` to ``(block + 1) * size - 1``. Use with ``DataLoader(batch_size=None)``.

    Args:
        images: all images of a dataset, by number.
        blocks: numbers of the blocks.
        size: images of a block; the dataset's last may have fewer.
    """

    def __init__(self, images: TransformedImages, blocks: np.ndarray, size: int) -> None:
        self.images, self.blocks, self.size = images, blocks, size

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> ImageBatch:
        first = int(self.blocks[index]) * self.size
        return collate([self.images[i] for i in range(first, min(first + self.size, len(self.images)))])

    @property
    def num_images(self) -> int:
        """Images of all blocks together."""
        return int(np.minimum(self.size, len(self.images) - self.blocks * self.size).sum())


def readable(dataset: ImageDataset, transform: Callable[[Any], Tensor], rows: Iterable[int]) -> tuple[int, Tensor]:
    """Return the number of the first image of ``rows`` that can be read, and the image, transformed."""
    tried, problem = 0, ""
    for row in rows:
        try:
            return int(row), transform(dataset[int(row)])
        except UserError:
            raise
        except Exception as error:
            tried += 1
            problem = problem or f"; the first: {(what := dataset.describe(int(row)))}: {_problem(error, what)}"
    raise UserError(f"none of the {tried} images tried could be read{problem}")


def _problem(error: Exception, what: str) -> str:
    """Return an error in words, without the folders above the image ``what``: they may move."""
    text = getattr(error, "strerror", None) or first_line(error)
    text = re.sub(rf"""(['"])[^'"]*{re.escape(what)}""", lambda found: found[1] + what, text)
    return f"{type(error).__name__}: {text}"


def _stack(images: Sequence[Tensor]) -> Tensor:
    """Stack images; photographs stay as decoders leave them, channels last in memory, which networks like best."""
    last = images[0].movedim(0, -1)
    if last.ndim == 3 and last.is_contiguous() and not images[0].is_contiguous():
        return torch.stack([image.movedim(0, -1) for image in images]).movedim(-1, 1)
    return torch.stack(list(images))


def collate(samples: Sequence[Sample]) -> ImageBatch:
    """Stack the images that could be read."""
    good = [s for s in samples if s.image is not None]
    bad = [(s.row, s.problem or "") for s in samples if s.image is None]
    images = _stack([s.image for s in good]) if good else torch.empty(0)  # type: ignore[misc]
    labels = torch.from_numpy(np.stack([s.label for s in good])) if good else torch.empty(0, dtype=torch.int64)
    return ImageBatch(images, labels, torch.tensor([s.row for s in good], dtype=torch.int64), bad)
