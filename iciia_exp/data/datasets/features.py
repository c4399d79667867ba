"""Precomputed features: the user's own vectors (CLIP, DINO), described by a CSV file.

Legend: M images, D features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from iciia_exp.data.content import Content, row_digests
from iciia_exp.data.dataset import ImageDataset, MissingFiles, existing_root, table_digest
from iciia_exp.data.readers.metadata import COLUMNS, check_columns, check_shares, image_table, read_metadata
from iciia_exp.errors import ConfigError, UserError, check_int, first_line

__all__ = ["Features"]

_WHAT = "your vectors"
_TREE = """\
<root>/features.npy (or .safetensors)   one vector per image, [images, features], float16, float32 or float64
<root>/images.csv                       one row per vector, in the same order, with a column label
                                        and any of split, owner, parent and time"""
_NPY = ("float16", "float32", "float64")
# Names in NumPy or PyTorch of the types in .safetensors files.
_SAFETENSORS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}

_NOT_FINITE = "has numbers that are not finite"

#: Vectors that are read at a time.
BLOCK = 4096


class Features(ImageDataset):
    """Vectors in place of images, for the backbone `iciia_exp.models.backbones.precomputed.Precomputed`.

    The CSV file has one row per vector, in the same order. Columns: ``label`` (names, or whole numbers), and any of
    ``split`` (train, val, test, backbone), ``owner``, ``parent`` and ``time`` (numbers, or ISO dates).

    Args:
        root: folder of both files; null if both are absolute paths.
        file: the vectors [M, D], ``.npy`` or ``.safetensors``; never read as a whole.
        csv: the CSV file.
        shares: shares of the splits, with sum 1, for a file without splits. By owner if there are owners, otherwise
            class by class (`iciia_exp.data.readers.metadata.deal_splits`).
        key: name of the tensor in a ``.safetensors`` file; null: the only tensor with two axes.
        seed: seed of these splits.
    """

    name = "features"
    vectors = True
    # their effect is in `fingerprint`
    cosmetic = frozenset({"root", "file", "csv", "key", "shares", "seed", "columns"})
    open_files = frozenset({"_vectors"})

    def __init__(
        self,
        root: str | Path | None,
        shares: Mapping[str, float],
        file: str = "features.npy",
        csv: str = "images.csv",
        key: str | None = None,
        seed: int = 0,
        columns: Mapping[str, str] | None = None,
    ) -> None:
        self.columns = check_columns(columns, COLUMNS)
        self.shares = check_shares(shares)
        self.seed = check_int("seed", seed, 0)
        paths = {"file": Path(file).expanduser(), "csv": Path(csv).expanduser()}
        if paths["file"].suffix not in (".npy", ".safetensors"):
            raise ConfigError("file", file, "must be a .npy or a .safetensors file; numpy.save writes the first")
        if key is not None and paths["file"].suffix != ".safetensors":
            raise ConfigError("key", key, "is for .safetensors files only; a .npy file has one array")
        if not all(path.is_absolute() for path in paths.values()):
            folder = existing_root(root, _WHAT, _TREE)
            paths = {name: folder / path for name, path in paths.items()}
        for name, path in paths.items():
            if not path.is_file():
                raise MissingFiles(name, path, "there is no such file")
        self.file, self.csv, self.key = paths["file"], paths["csv"], key

    @cached_property
    def _vectors(self) -> _Vectors:
        try:
            return _open_npy(self.file) if self.file.suffix == ".npy" else _open_safetensors(self.file, self.key)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{self.file}: cannot be read ({first_line(error)})") from error

    def __getitem__(self, index: int) -> np.ndarray:
        """Return one vector as float32 [D]; raises a `ValueError` if it is not finite."""
        vector = self._vectors.rows(index, index + 1)[0]
        if not np.isfinite(vector).all():
            raise ValueError(_NOT_FINITE)
        return vector

    def describe(self, index: int) -> str:
        """Return file and row of a vector."""
        return f"{self.file.name}, row {index}"

    def probe(self, index: int) -> None:
        """Raise a `ValueError` for a vector that is not finite; the first call reads all."""
        if not self._finite[index]:
            raise ValueError(_NOT_FINITE)

    @cached_property
    def _finite(self) -> np.ndarray:
        """Whether each vector is finite, bool [M]."""
        return np.concatenate([np.isfinite(block).all(axis=1) for block in self._blocks()])

    def backbone_arguments(self) -> dict[str, Any]:
        """Return D."""
        return {"dim": self._vectors.shape[1]}

    @cached_property
    def _described(self) -> tuple[pd.DataFrame, tuple[str, ...]]:
        metadata, (images, _) = read_metadata(self.csv, columns=self.columns), self._vectors.shape
        if len(metadata) != images:
            problem = f"has {len(metadata):,} rows, and {self.file} has {images:,} vectors"
            raise UserError(f"{self.csv}: {problem}; there must be one row per vector, in the same order")
        return image_table(metadata, self.shares, self.seed, self.csv)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Labels of the CSV file, sorted by value if all are whole numbers, otherwise by name."""
        return self._described[1]

    def load_table(self) -> pd.DataFrame:
        """Return label, split, owner, parent and, if the CSV file has it, time."""
        return self._described[0]

    def fingerprint(self) -> list[Any]:
        """Return shape and type of the vectors, a digest of the table, and the classes."""
        vectors, table = self._vectors, table_digest(self._described[0])
        return [list(vectors.shape), vectors.dtype, table, list(self.class_names)]

    def content(self, kept: Content) -> str:
        """Return a digest of all vectors, the same for both kinds of files."""
        return kept.of_one(self.file, lambda _: self._digest(), f"vectors of {self.key}")

    def image_digests(self) -> np.ndarray:
        """Return a digest of every vector, 0 of one that is not finite; all are read."""
        return np.concatenate([row_digests(block) * np.isfinite(block).all(axis=1) for block in self._blocks()])

    def _digest(self) -> bytes:
        content = hashlib.sha256()
        for block in self._blocks():
            content.update(block.tobytes())
        return content.digest()

    def _blocks(self) -> Iterator[np.ndarray]:
        """Yield all vectors, little-endian float32, some at a time."""
        images = self._vectors.shape[0]
        for first in range(0, images, BLOCK):
            yield self._vectors.rows(first, min(first + BLOCK, images)).astype("<f4")


class _Vectors:
    """An open file of vectors."""

    def __init__(
        self,
        file: Path,
        shape: Sequence[int],
        dtype: str,
        dtypes: Sequence[str],
        rows: Callable[[int, int], np.ndarray],
    ) -> None:
        if len(shape) != 2 or 0 in shape:
            raise UserError(f"{file}: the vectors must be an array [images, features], not {list(shape)}")
        if dtype not in dtypes:
            raise UserError(f"{file}: the vectors must be {', '.join(dtypes[:-1])} or {dtypes[-1]}, not {dtype}")
        self.shape, self.dtype, self.rows = shape, dtype, rows


def _open_npy(file: Path) -> _Vectors:
    array = np.load(file, mmap_mode="r", allow_pickle=False)
    dtype = str(array.dtype.newbyteorder("="))

    def read(first: int, last: int) -> np.ndarray:
        return np.array(array[first:last], dtype=np.float32)

    return _Vectors(file, array.shape, dtype, _NPY, read)


def _open_safetensors(file: Path, key: str | None) -> _Vectors:
    from safetensors import SafetensorError, safe_open

    try:
        tensors = safe_open(file, framework="pt")  # NumPy has no bfloat16
    except SafetensorError as error:
        raise ValueError(first_line(error)) from error
    shapes = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    if key is None:
        matrices = [name for name, shape in shapes.items() if len(shape) == 2]
        if len(matrices) != 1:
            found = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
            raise UserError(f"{file}: name the tensor to read by dataset.key; it has {found or 'none'}")
        key = matrices[0]
    if key not in shapes:
        raise UserError(f"{file}: has no tensor {key} (dataset.key), only {', '.join(shapes) or 'none'}")
    rows = tensors.get_slice(key)
    dtype = _SAFETENSORS.get(rows.get_dtype(), rows.get_dtype())
    dtypes = tuple(_SAFETENSORS.values())

    def read(first: int, last: int) -> np.ndarray:
        return rows[first:last].float().numpy()

    return _Vectors(file, shapes[key], dtype, dtypes, read)
