"""Dataset interface: images by number, and one table row per image.

Legend: M images, K classes.
"""

import textwrap
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from iciia_exp.data.content import Content, bytes_digest
from iciia_exp.data.readers.images import decode, open_image
from iciia_exp.digest import digest
from iciia_exp.errors import ConfigError, UserError
from iciia_exp.named import Named
from iciia_exp.tasks import MULTI_LABEL, SINGLE_LABEL, Task

__all__ = ["SPLITS", "TABLE_COLUMNS", "ImageDataset", "ImageFiles", "MissingFiles", "dense_labels", "table_digest"]

# The use of an image. `backbone`: training the backbone only; `train`: training methods; `val`: choosing epochs, gates
# and hyper-parameters; `test`: reported numbers.
SPLITS = ("backbone", "train", "val", "test")

TABLE_COLUMNS = ("label", "split", "owner", "parent")


class MissingFiles(ConfigError):
    """The files of a dataset are missing. Stages that only read stored features do not need them."""


class ImageDataset(Named, ABC):
    """Images (or clips, or vectors) by number, with labels, splits, owners and parent categories in ``table``.

    It is a map-style dataset for `torch.utils.data.DataLoader` and can be pickled. The constructor of a subclass checks
    its arguments and is cheap; `load_table`, `class_names` and `__getitem__` read files.
    """

    #: Short name for folders and tables.
    name: ClassVar[str]
    #: One of `iciia_exp.tasks.TASKS`.
    task: Task = SINGLE_LABEL
    #: Whether the items are feature vectors of a network that is not here: it can neither be sent nor trained.
    vectors: ClassVar[bool] = False
    #: Constructor arguments that change no number (paths, download flags) and are left out of digests. The content of
    #: the files is in `fingerprint`.
    cosmetic: ClassVar[frozenset[str]] = frozenset()
    #: Attributes with open files, which are not pickled: every process opens its own.
    open_files: ClassVar[frozenset[str]] = frozenset()

    @property
    @abstractmethod
    def class_names(self) -> Sequence[str]:
        """Names of the K classes (of a multi-label task: attributes), in the order of the labels."""

    @abstractmethod
    def load_table(self) -> pd.DataFrame:
        """Return one row per image.

        Columns: ``label`` (int; of a multi-label task a list of the classes that apply), ``split`` (one of `SPLITS`),
        ``owner`` and ``parent`` (text, or None where unknown). Optional: ``path`` (text, relative to the dataset's
        folder), ``time`` (float64, seconds; NaN where unknown), ``group`` (text, of the image's task, or None).
        """

    @abstractmethod
    def __getitem__(self, index: int) -> Any:
        """Return one image for the backbone's transform; called by several threads at once.

        A PIL image, a uint8 array [frames, height, width, 3] for a clip, or a float32 array. A file that is missing or
        cannot be decoded raises the exception of its reader, which extraction handles.
        """

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in self.open_files}

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.class_names)

    def shown_names(self) -> Sequence[str]:
        """Return readable names of the classes, for figures."""
        return self.class_names

    @property
    def has_backbone_images(self) -> bool:
        """Whether the dataset itself reserves images for the training of the backbone."""
        return bool((self.table["split"] == "backbone").any())

    @cached_property
    def _paths(self) -> np.ndarray:
        return self.table["path"].to_numpy(dtype=object)  # a look-up in the table takes 40 us, a third of decoding

    def path(self, index: int) -> str:
        """Return the path of an image's file, relative to the dataset's folder."""
        return self._paths[index]

    def describe(self, index: int) -> str:
        """Return a readable name of an image: its path, or its number."""
        return self.path(index) if "path" in self.table else f"image {index}"

    def fingerprint(self) -> Any:
        """Return plain values for digests; they change with the table, and with whatever `content` does not cover."""
        return None

    def content(self, kept: Content) -> Any:
        """Return plain values for digests; they change with the bytes of the files, not with their place.

        Args:
            kept: computes digests of files, and keeps them.
        """
        return None

    def image_digests(self) -> np.ndarray | None:
        """Return a digest of every image, int64 [M], 0 for an unreadable one; None where images are not compared."""
        return None

    def probe(self, index: int) -> None:  # of most datasets there is nothing to see
        """Raise what reading an image would raise, as far as that is seen without decoding it."""

    def backbone_arguments(self) -> dict[str, Any]:
        """Return constructor arguments of the backbone that depend on the dataset."""
        return {}

    @cached_property
    def table(self) -> pd.DataFrame:
        """The checked table; row numbers are image numbers."""
        table = self.load_table()
        if missing := [c for c in TABLE_COLUMNS if c not in table.columns]:
            raise ValueError(f"{type(self).__name__}.load_table lacks the columns {missing}")
        if unknown := set(table["split"].unique()) - set(SPLITS):
            raise ValueError(f"{type(self).__name__}.load_table has splits {sorted(unknown)}, not among {SPLITS}")
        labels = table["label"] if self.task == SINGLE_LABEL else table["label"].explode().dropna()
        if len(labels) and not labels.between(0, self.num_classes - 1).all():
            raise ValueError(f"{type(self).__name__}.load_table has labels outside 0..{self.num_classes - 1}")
        index = table.index  # of rows that were selected; parts put together have numbers twice
        numbered = index.is_unique and pd.api.types.is_integer_dtype(index)
        if "path" not in table and numbered and not np.array_equal(index.to_numpy(), np.arange(len(table))):
            problem = "has an index other than 0, 1, 2, ...; row numbers are the image numbers of __getitem__"
            raise ValueError(f"{type(self).__name__}.load_table {problem}: end it with reset_index(drop=True)")
        return table.reset_index(drop=True)

    def __len__(self) -> int:
        return len(self.table)


class ImageFiles(ImageDataset):
    """A dataset of image files; the column ``path`` of its table is relative to ``root``."""

    root: Path
    _digests: np.ndarray | None = None

    def __getitem__(self, index: int) -> Any:
        """Return one image as RGB, in its own size."""
        return decode(self.root / self.path(index))

    def fingerprint(self) -> Any:
        """Return a digest of the table (paths, labels, splits, owners, parents), and the classes."""
        return [table_digest(self.table), *self.class_names]

    def content(self, kept: Content) -> str:
        """Return a digest of the bytes of all images."""
        paths = self.table["path"].tolist()
        self._digests = kept.each(self.root, paths, bytes_digest, "bytes")
        return kept.joined(paths, self._digests)

    def probe(self, index: int) -> None:
        """Open an image's file, and read its size."""
        with open_image(self.root / self.path(index)):
            pass

    def image_digests(self) -> np.ndarray | None:
        """Return digests of the images' bytes; None before `content`."""
        return self._digests


def dense_labels(label: pd.Series, task: str, num_classes: int) -> np.ndarray:
    """Return the labels of a table as an array: int64 [M], or uint8 [M, K] of a multi-label task."""
    if task != MULTI_LABEL:
        return label.to_numpy(dtype=np.int64)
    dense_MK = np.zeros((len(label), num_classes), dtype=np.uint8)
    classes = label.reset_index(drop=True).explode().dropna()
    dense_MK[classes.index, classes.to_numpy(dtype=np.int64)] = 1
    return dense_MK


def table_digest(table: pd.DataFrame) -> str:
    """Return a digest of a table's content, for `ImageDataset.fingerprint`."""
    text = table.astype({c: str for c in table if table[c].dtype == object})
    hashes = pd.util.hash_pandas_object(text, index=False).to_numpy()
    weights = np.arange(1, len(hashes) + 1, dtype=np.uint64)  # order counts
    return digest([len(table), list(map(str, table.columns)), str((hashes * weights).sum(dtype=np.uint64))])


def existing_root(root: str | Path | None, what: str, tree: str) -> Path:
    """Return the folder of a dataset, or raise an error with the dataset in words and the expected layout."""
    hint = f"give the folder of {what}, laid out as\n{textwrap.indent(tree, '  ')}"
    if root is None:
        raise MissingFiles("root", "null", hint)
    path = Path(root).expanduser()
    if not path.is_dir():
        problem = "is not a folder" if path.exists() else "there is no such folder"
        raise MissingFiles("root", path, f"{problem}; {hint}")
    return path


def wrong_folder(path: Path, problem: str, tree: str) -> UserError:
    """Return the error for a folder with another layout than ``tree``."""
    return UserError(f"{path}: {problem}; expected\n{textwrap.indent(tree, '  ')}")


def check_layout(folder: Path, tree: str, *names: str) -> None:
    """Raise `UserError` if a file, or a folder (a name with a final slash), is missing."""
    for name in names:
        if not ((folder / name).is_dir() if name.endswith("/") else (folder / name).is_file()):
            kind = "folder" if name.endswith("/") else "file"
            raise wrong_folder(folder, f"has no {kind} {name.rstrip('/')}", tree)
