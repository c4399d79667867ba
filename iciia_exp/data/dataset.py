"""The interface of a dataset: images by number, and one table row per image."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any, ClassVar

import pandas as pd

__all__ = ["SPLITS", "TABLE_COLUMNS", "ImageDataset"]

# What an image may be used for. `backbone`: training the backbone only; `train`: training methods; `selection`:
# choosing epochs, gates and hyper-parameters; `test`: reported numbers.
SPLITS = ("backbone", "train", "selection", "test")

TABLE_COLUMNS = ("label", "split", "owner", "parent")


class ImageDataset(ABC):
    """Images by number, with labels, splits, owners and parent categories in ``table``.

    A subclass must be cheap to construct (arguments are checked there) and read its files in `load_table` and
    `__getitem__`. It works as a map-style dataset for `torch.utils.data.DataLoader`.
    """

    name: ClassVar[str]
    num_classes: int
    #: Constructor arguments that change no number (paths, worker counts): left out of digests.
    cosmetic: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def load_table(self) -> pd.DataFrame:
        """Return one row per image: label (int), split (one of `SPLITS`), owner and parent (text, or None)."""

    @abstractmethod
    def __getitem__(self, index: int) -> Any:
        """Return one image in the form that the backbone's transform takes."""

    @cached_property
    def table(self) -> pd.DataFrame:
        """The checked table; row numbers are image numbers."""
        table = self.load_table()
        missing = [c for c in TABLE_COLUMNS if c not in table.columns]
        if missing:
            raise ValueError(f"{type(self).__name__}.load_table lacks the columns {missing}")
        if unknown := set(table["split"].unique()) - set(SPLITS):
            raise ValueError(f"{type(self).__name__}.load_table has splits {sorted(unknown)}, not among {SPLITS}")
        if len(table) and not table["label"].between(0, self.num_classes - 1).all():
            raise ValueError(f"{type(self).__name__}.load_table has labels outside 0..{self.num_classes - 1}")
        return table.reset_index(drop=True)

    def __len__(self) -> int:
        return len(self.table)
