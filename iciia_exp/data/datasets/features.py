"""Precomputed features: the user's own vectors (CLIP, DINO) with a CSV file that describes them.

Legend: M images, D features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from iciia_exp.data.dataset import ImageDataset, MissingFiles, existing_root, table_digest
from iciia_exp.data.readers.metadata import check_shares, image_table, read_metadata
from iciia_exp.errors import ConfigError, UserError, check_int, first_line

__all__ = ["Features"]

_WHAT = "your vectors"
_TREE = """\
<root>/features.npy (or .safetensors)   one vector per image, [images, features], float16, float32 or float64
<root>/images.csv                       one row per vector, in the same order, with a column label
                                        and any of split, owner, parent and time"""
_NPY = ("float16", "float32", "float64")
# Types in .safetensors files, by the names that NumPy or PyTorch have for them.
_SAFETENSORS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}

#: Vectors that the fingerprint reads.
SAMPLE = 4096


class Features(ImageDataset):
    """Vectors in place of images, for the backbone `iciia_exp.models.backbones.precomputed.Precomputed`.

    The CSV file has one row per vector, in the same order. Columns: ``label`` (names, or whole numbers), and any of
    ``split`` (train, val or val, test, backbone), ``owner``, ``parent`` and ``time`` (numbers, or ISO dates).

    Args:
        root: folder of both files; null where both are absolute paths.
        file: the vectors [M, D], ``.npy`` or ``.safetensors``; read piece by piece, never whole.
        csv: the CSV file.
        shares: of the splits where the file names none, adding up to 1. By owner where there are owners, elsewhere
            class by class (`iciia_exp.data.readers.metadata.deal_splits`).
        key: name of the tensor in a ``.safetensors`` file; null: the only one with two axes.
        seed: seed of those splits.
    """

    name = "features"
    cosmetic = frozenset({"root", "file", "csv", "key", "shares", "seed"})  # `fingerprint` has what they lead to

    def __init__(
        self,
        root: str | Path | None,
        shares: Mapping[str, float],
        file: str = "features.npy",
        csv: str = "images.csv",
        key: str | None = None,
        seed: int = 0,
    ) -> None:
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

    def __getstate__(self) -> dict[str, Any]:
        """Leave open files out: a memory map would be copied whole."""
        return {k: v for k, v in self.__dict__.items() if k != "_vectors"}

    # ---- vectors

    @cached_property
    def _vectors(self) -> _Vectors:
        kind = _Npy if self.file.suffix == ".npy" else _Safetensors
        try:
            return kind(self.file, self.key)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{self.file}: cannot be read ({first_line(error)})") from error

    def __getitem__(self, index: int) -> np.ndarray:
        """Return one vector as float32 [D]."""
        return self._vectors.row(index)

    def backbone_arguments(self) -> dict[str, Any]:
        """Return D."""
        return {"dim": self._vectors.shape[1]}

    # ---- the table

    @cached_property
    def _described(self) -> tuple[pd.DataFrame, tuple[str, ...]]:
        """The table and the names of the classes."""
        metadata, (images, _) = read_metadata(self.csv), self._vectors.shape
        if len(metadata) != images:
            raise UserError(
                f"{self.csv}: has {len(metadata):,} rows, and {self.file} has {images:,} vectors; "
                "there must be one row per vector, in the same order"
            )
        return image_table(metadata, self.shares, self.seed, self.csv)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Labels of the CSV file, sorted: by number where all are numbers, else by name."""
        return self._described[1]

    def load_table(self) -> pd.DataFrame:
        """Return label, split, owner, parent and, where the CSV file has it, time."""
        return self._described[0]

    def fingerprint(self) -> list[Any]:
        """Return shape and type of the vectors, a digest of at most 4,096 of them, and one of the table."""
        vectors = self._vectors
        rows = np.unique(np.linspace(0, vectors.shape[0] - 1, min(SAMPLE, vectors.shape[0])).astype(np.int64))
        content = hashlib.sha256()
        for row in rows:
            content.update(vectors.row(int(row)).astype("<f4").tobytes())
        table = table_digest(self._described[0])
        return [list(vectors.shape), vectors.dtype, content.hexdigest()[:12], table, list(self.class_names)]


class _Vectors:
    """A file of vectors, opened: ``shape``, ``dtype`` by name, and rows as float32."""

    shape: tuple[int, int]
    dtype: str

    def __init__(self, file: Path, key: str | None) -> None:
        raise NotImplementedError

    def row(self, index: int) -> np.ndarray:
        raise NotImplementedError


class _Npy(_Vectors):
    def __init__(self, file: Path, key: str | None) -> None:
        self._array = np.load(file, mmap_mode="r", allow_pickle=False)
        native = self._array.dtype.newbyteorder("=")
        self.shape = _two_axes(file, self._array.shape)
        self.dtype = _floats(file, str(native), _NPY)

    def row(self, index: int) -> np.ndarray:
        return np.array(self._array[index], dtype=np.float32)  # a copy, in memory


class _Safetensors(_Vectors):
    def __init__(self, file: Path, key: str | None) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            self._file = safe_open(file, framework="pt")  # NumPy has no bfloat16
        except SafetensorError as error:
            raise ValueError(first_line(error)) from error
        shapes = {name: tuple(self._file.get_slice(name).get_shape()) for name in self._file.keys()}  # noqa: SIM118
        if key is None:
            matrices = [name for name, shape in shapes.items() if len(shape) == 2]
            if len(matrices) != 1:
                found = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
                raise UserError(f"{file}: name the tensor to read by dataset.key; it has {found or 'none'}")
            key = matrices[0]
        if key not in shapes:
            raise UserError(f"{file}: has no tensor {key} (dataset.key), only {', '.join(shapes) or 'none'}")
        self._slice = self._file.get_slice(key)
        self.shape = _two_axes(file, shapes[key])
        kind = self._slice.get_dtype()
        self.dtype = _floats(file, _SAFETENSORS.get(kind, kind), tuple(_SAFETENSORS.values()))

    def row(self, index: int) -> np.ndarray:
        return self._slice[int(index)].float().numpy()


def _two_axes(file: Path, shape: tuple[int, ...]) -> tuple[int, int]:
    if len(shape) != 2 or 0 in shape:
        raise UserError(f"{file}: the vectors must be an array [images, features], not {list(shape)}")
    return shape[0], shape[1]


def _floats(file: Path, dtype: str, known: tuple[str, ...]) -> str:
    if dtype not in known:
        raise UserError(f"{file}: the vectors must be {', '.join(known[:-1])} or {known[-1]}, not {dtype}")
    return dtype
