"""Image batches for backbones: transformed images, labels and numbers, without those that cannot be read.

Legend: B images of a batch, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from iciia_exp.data.dataset import ImageDataset
from iciia_exp.errors import UserError, first_line

__all__ = ["ImageBatch", "TransformedImages", "collate"]


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
            if self.on_bad_image == "error":
                what = f"{self.dataset.describe(row)}: cannot be read ({type(error).__name__}: {first_line(error)})"
                raise UserError(
                    f"{what}; repair it, or leave such images out with features.on_bad_image=skip"
                ) from error
            return Sample(None, self.labels[row], row, f"{type(error).__name__}: {first_line(error)}")


def collate(samples: Sequence[Sample]) -> ImageBatch:
    """Stack the images that could be read."""
    good = [s for s in samples if s.image is not None]
    bad = [(s.row, s.problem or "") for s in samples if s.image is None]
    images = torch.stack([s.image for s in good]) if good else torch.empty(0)  # type: ignore[misc]
    labels = torch.from_numpy(np.stack([s.label for s in good])) if good else torch.empty(0, dtype=torch.int64)
    return ImageBatch(images, labels, torch.tensor([s.row for s in good], dtype=torch.int64), bad)
