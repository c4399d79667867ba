"""Image batches: transformed images, labels and numbers for backbones, without unreadable images.

Legend: B images of a batch, K classes.
"""

import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from iciia_exp.data.dataset import ImageDataset
from iciia_exp.data.readers.files import few
from iciia_exp.errors import ConfigError, UserError, first_line

__all__ = ["ImageBatch", "ImageBlocks", "Jpeg", "TransformedImages", "collate", "problems_of", "readable", "tell_bad"]


_Made = TypeVar("_Made")


class ImageBatch(NamedTuple):
    """The readable images of a batch, and the problems of the others."""

    images: Tensor  # [B, ...]
    labels: Tensor  # int64 [B], of a multi-label task uint8 [B, K]
    rows: Tensor  # int64 [B], image numbers
    bad: list[tuple[int, str]]  # (image number, problem)


class Sample(NamedTuple):
    """One image; None if it cannot be read."""

    image: Tensor | None
    label: np.ndarray
    row: int
    problem: str | None


class TransformedImages(Dataset[Sample]):
    """The images ``rows`` of a dataset after a backbone's transform; use with `collate`.

    Args:
        dataset, rows: the dataset, and numbers of its images.
        transform: function from an image to a tensor.
        labels: labels of all images of the dataset, [M] or [M, K].
        on_bad_image: ``skip`` reports problems in the batch, ``error`` raises them.
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
        image, problem = _read(self.dataset, self.transform, row)
        if problem is not None and self.on_bad_image == "error":
            hint = "repair it, or leave such images out with features.on_bad_image=skip"
            raise UserError(f"{self.dataset.describe(row)}: cannot be read ({problem}); {hint}")
        return Sample(image, self.labels[row], row, problem)


class Jpeg:
    """A backbone's transform whose result went through a JPEG, as when an image is sent to the cloud.

    Args:
        transform: function from an image to uint8 [3, H, W].
        quality: of Pillow, 1 to 95.
    """

    def __init__(self, transform: Callable[[Any], Tensor], quality: int) -> None:
        self.transform, self.quality = transform, quality

    def encode(self, image: Any) -> bytes:
        """Return the JPEG of an image."""
        pixels, buffer = self.transform(image), io.BytesIO()
        if pixels.dtype != torch.uint8 or pixels.ndim != 3 or len(pixels) != 3:
            got = f"{str(pixels.dtype).removeprefix('torch.')} {list(pixels.shape)}"
            problem = f"needs a backbone whose input are pictures, uint8 [3, H, W]; this one's is {got}"
            raise ConfigError("features.jpeg", self.quality, problem)
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=self.quality)
        return buffer.getvalue()

    def __call__(self, image: Any) -> Tensor:
        """Return the decoded JPEG, uint8 [3, H, W]."""
        with Image.open(io.BytesIO(self.encode(image))) as picture:
            return torch.from_numpy(np.array(picture)).permute(2, 0, 1)

    def mean_bytes(self, dataset: ImageDataset, rows: Iterable[int]) -> int:
        """Return the mean size of the JPEGs of the readable images ``rows``."""
        found = (_read(dataset, self.encode, int(row))[0] for row in rows)
        return round(float(np.mean([len(jpeg) for jpeg in found if jpeg is not None])))


class ImageBlocks(Dataset[ImageBatch]):
    """Fixed blocks of images, for features that are equal to the last digit after a resumed or distributed extraction.

    The last digits of a feature depend on the size of the batch, so a batch is always a whole block: the images
    ``block * size`` to ``(block + 1) * size - 1``. Use with ``DataLoader(batch_size=None)``.

    Args:
        images: all images of a dataset, by number.
        blocks: numbers of the blocks.
        size: images of a block; the last block of the dataset may have fewer.
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
        """Number of images of all blocks."""
        return int(np.minimum(self.size, len(self.images) - self.blocks * self.size).sum())


def readable(dataset: ImageDataset, transform: Callable[[Any], Tensor], rows: Iterable[int]) -> tuple[int, Tensor]:
    """Return the number of the first readable image of ``rows``, and the transformed image."""
    problems: list[str] = []
    for row in map(int, rows):
        image, problem = _read(dataset, transform, row)
        if image is not None:
            return row, image
        problems.append(f"; the first: {dataset.describe(row)}: {problem}")
    raise UserError(f"none of the {len(problems)} images tried could be read{''.join(problems[:1])}")


def _read(dataset: ImageDataset, transform: Callable[[Any], _Made], row: int) -> tuple[_Made | None, str | None]:
    """Return a transformed image, or the problem in words."""
    return _attempt(dataset, row, lambda: transform(dataset[row]))


def problems_of(dataset: ImageDataset, rows: Iterable[int], read: Callable[[int], Any]) -> dict[int, str]:
    """Return the problems of the images that ``read`` cannot read, by number; several threads read."""
    waiting, found = iter(rows), dict[int, str]()
    with ThreadPoolExecutor() as pool:
        while some := list(islice(waiting, 4096)):  # a task for each of a million images would take a gigabyte
            texts = pool.map(lambda row: (row, _attempt(dataset, row, lambda: read(row))[1]), some)
            found |= {row: text for row, text in texts if text is not None}
    return found


def tell_bad(dataset: ImageDataset, bad: Mapping[int, str]) -> str:
    """Return the first images that cannot be read, with their problems, in words."""
    return few(f"{dataset.describe(row)}: {problem}" for row, problem in sorted(bad.items()))


def _attempt(dataset: ImageDataset, row: int, read: Callable[[], _Made]) -> tuple[_Made | None, str | None]:
    """Return what ``read`` makes of an image, or the problem in words, without the folders above it, which may move."""
    try:
        return read(), None
    except UserError:
        raise
    except Exception as error:  # decoders raise many kinds
        name, text = dataset.describe(row), getattr(error, "strerror", None) or first_line(error)
        text = re.sub(rf"""(['"])[^'"]*{re.escape(name)}""", lambda found: found[1] + name, text)
        return None, f"{type(error).__name__}: {text}"


def _stack(images: Sequence[Tensor]) -> Tensor:
    """Stack images; photographs stay channels last in memory, as decoders give them, which is fastest."""
    last = images[0].movedim(0, -1)
    if last.ndim == 3 and last.is_contiguous() and not images[0].is_contiguous():
        return torch.stack([image.movedim(0, -1) for image in images]).movedim(-1, 1)
    return torch.stack(list(images))


def collate(samples: Sequence[Sample]) -> ImageBatch:
    """Stack the readable images."""
    good = [s for s in samples if s.image is not None]
    bad = [(s.row, s.problem or "") for s in samples if s.image is None]
    images = _stack([s.image for s in good]) if good else torch.empty(0)  # type: ignore[misc]
    labels = torch.from_numpy(np.stack([s.label for s in good])) if good else torch.empty(0, dtype=torch.int64)
    return ImageBatch(images, labels, torch.tensor([s.row for s in good], dtype=torch.int64), bad)
