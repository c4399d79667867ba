"""Dataset interface: images by number, and one table row per image.

Legend: M images, K classes.
"""

from __future__ import annotations

import textwrap
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from iciia_exp.digest import digest
from iciia_exp.errors import ConfigError, UserError
from iciia_exp.tasks import MULTI_LABEL, SINGLE_LABEL, Task

__all__ = [
    "SPLITS",
    "TABLE_COLUMNS",
    "ImageDataset",
    "MissingFiles",
    "dense_labels",
    "existing_root",
    "table_digest",
    "wrong_folder",
]

# What an image may be used for. `backbone`: training the backbone only; `train`: training methods; `val`:
# choosing epochs, gates and hyper-parameters; `test`: reported numbers.
SPLITS = ("backbone", "train", "val", "test")

TABLE_COLUMNS = ("label", "split", "owner", "parent")


class MissingFiles(ConfigError):
    """A dataset's files are not where the configuration says. Stages that only read stored features go on without."""


class ImageDataset(ABC):
    """Images (or clips, or vectors) by number, with labels, splits, owners and parent categories in ``table``.

    A subclass must be cheap to construct: arguments are checked there, files are read in `load_table`, `class_names`
    and `__getitem__`. It works as a map-style dataset for `torch.utils.data.DataLoader` and can be pickled.
    """

    #: Short name for folders and tables.
    name: ClassVar[str]
    #: One of `iciia_exp.tasks.TASKS`.
    task: Task = SINGLE_LABEL
    #: Constructor arguments that change no number (paths, download flags): left out of digests. What the files
    #: themselves say goes into `fingerprint`.
    cosmetic: ClassVar[frozenset[str]] = frozenset()

    @property
    @abstractmethod
    def class_names(self) -> Sequence[str]:
        """Names of the K classes (of a multi-label task: attributes), in the order of the labels."""

    @abstractmethod
    def load_table(self) -> pd.DataFrame:
        """Return one row per image.

        Columns: ``label`` (int; of a multi-label task a list of the classes that apply), ``split`` (one of `SPLITS`),
        ``owner`` and ``parent`` (text, or None where unknown). Optional: ``path`` (text, relative to the dataset's
        folder), ``time`` (float64, seconds; NaN where unknown).
        """

    @abstractmethod
    def __getitem__(self, index: int) -> Any:
        """Return one image in the form that the backbone's transform takes.

        A PIL image, a uint8 array [frames, height, width, 3] for a clip, or a float32 array. A file that is missing or
        cannot be decoded raises whatever its reader raises; extraction decides what becomes of it. Several threads call
        this at once.
        """

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.class_names)

    def shown_names(self) -> Sequence[str]:
        """Return what a person would call the classes, where their names are numbers of a catalogue; for pictures."""
        return self.class_names

    @property
    def has_backbone_images(self) -> bool:
        """Whether the dataset itself sets images aside for the backbone's training."""
        return bool((self.table["split"] == "backbone").any())

    @cached_property
    def _paths(self) -> np.ndarray:
        return self.table["path"].to_numpy(dtype=object)  # a look-up in a table takes 40 us, a third of decoding

    def path(self, index: int) -> str:
        """Return the path of an image's file, relative to the dataset's folder."""
        return self._paths[index]

    def describe(self, index: int) -> str:
        """Return what a person would call an image: its path, or its number."""
        return self.path(index) if "path" in self.table else f"image {index}"

    def fingerprint(self) -> Any:
        """Return plain values that change when the files do, and not when they are moved; goes into digests."""
        return None

    def backbone_arguments(self) -> dict[str, Any]:
        """Return arguments that only the dataset knows and that a network of its own kind needs."""
        return {}

    @cached_property
    def table(self) -> pd.DataFrame:
        """The checked table; row numbers are image numbers."""
        table = self.load_table()
        missing = [c for c in TABLE_COLUMNS if c not in table.columns]
        if missing:
            raise ValueError(f"{type(self).__name__}.load_table lacks the columns {missing}")
        if unknown := set(table["split"].unique()) - set(SPLITS):
            raise ValueError(f"{type(self).__name__}.load_table has splits {sorted(unknown)}, not among {SPLITS}")
        labels = table["label"] if self.task == SINGLE_LABEL else table["label"].explode().dropna()
        if len(labels) and not labels.between(0, self.num_classes - 1).all():
            raise ValueError(f"{type(self).__name__}.load_table has labels outside 0..{self.num_classes - 1}")
        return table.reset_index(drop=True)

    def __len__(self) -> int:
        return len(self.table)


def dense_labels(label: pd.Series, task: str, num_classes: int) -> np.ndarray:
    """Return the labels of a table as an array: int64 [M], or uint8 [M, K] of a multi-label task."""
    if task != MULTI_LABEL:
        return label.to_numpy(dtype=np.int64)
    dense_MK = np.zeros((len(label), num_classes), dtype=np.uint8)
    lengths = label.map(len).to_numpy()
    if lengths.sum():
        columns = np.concatenate([np.asarray(row, dtype=np.int64) for row in label if len(row)])
        dense_MK[np.repeat(np.arange(len(label)), lengths), columns] = 1
    return dense_MK


def table_digest(table: pd.DataFrame) -> str:
    """Return a digest of a table's content, for `ImageDataset.fingerprint`."""
    text = table.astype({c: str for c in table if table[c].dtype == object})
    hashes = pd.util.hash_pandas_object(text, index=False).to_numpy()
    weights = np.arange(1, len(hashes) + 1, dtype=np.uint64)  # order counts
    return digest([len(table), list(map(str, table.columns)), str((hashes * weights).sum(dtype=np.uint64))])


def existing_root(root: str | Path | None, what: str, tree: str, key: str = "root") -> Path:
    """Return the folder of a dataset, or raise an error that says what it is and how it must look.

    Args:
        root: what the user gave; None where it is missing.
        what: the dataset in words, with where to get it.
        tree: the expected layout, one path per line.
        key: name of the constructor's argument.
    """
    if root is None:
        raise MissingFiles(key, "null", f"give the folder of {what}, laid out as\n{textwrap.indent(tree, '  ')}")
    path = Path(root).expanduser()
    if not path.is_dir():
        problem = "is not a folder" if path.exists() else "there is no such folder"
        raise MissingFiles(
            key, path, f"{problem}; give the folder of {what}, laid out as\n{textwrap.indent(tree, '  ')}"
        )
    return path


def wrong_folder(path: Path, problem: str, tree: str) -> UserError:
    """Return the error for a folder that is not what it should be: what is wrong, and the expected layout."""
    return UserError(f"{path}: {problem}; expected\n{textwrap.indent(tree, '  ')}")
