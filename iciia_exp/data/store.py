"""The feature store: one folder per (dataset, backbone), memory-mapped arrays and a manifest.

    manifest.json      format version, arrays (file, shape, dtype), backbone, weights digest, transform, D, K, MACs
    features.npy       [M, D] float16 or float32
    images.parquet     one row per image: label, split, owner, parent
    head.safetensors   the backbone's classifier: weight [K, D], bias [K]

``manifest.json`` is written last: a folder without it is not a store. More arrays per image (tokens, logits) are more
entries of ``arrays``.

Legend: M images, D features, K classes.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from iciia_exp.artifacts import atomic_write, finished_folder, read_json, write_json
from iciia_exp.errors import UserError

__all__ = ["FORMAT", "FeatureStore", "FeatureWriter"]

FORMAT = 1


@dataclass(frozen=True)
class FeatureStore:
    """A finished store, opened for reading. Nothing is read before it is asked for."""

    path: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, path: Path) -> FeatureStore:
        """Open the store at ``path``; a missing, foreign or damaged one is a `UserError` that says so."""
        if not finished_folder(path):
            raise UserError(f"{path}: no feature store there (manifest.json is missing)")
        manifest = read_json(path / "manifest.json")
        if manifest.get("format") != FORMAT:
            found = manifest.get("format")
            raise UserError(f"{path}: a store of format {found}, this version reads {FORMAT}; delete it and repeat")
        return cls(path, manifest)

    @property
    def dim(self) -> int:
        """D, the width of a feature."""
        return self.manifest["dim"]

    @property
    def num_classes(self) -> int:
        """K, the number of classes."""
        return self.manifest["num_classes"]

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the backbone and its classifier for one image."""
        return self.manifest["macs"]

    def array(self, name: str = "features") -> np.ndarray:
        """Memory-map one array; pages are read as they are used."""
        entry = self.manifest["arrays"][name]
        array = np.load(self.path / entry["file"], mmap_mode="r")
        if list(array.shape) != entry["shape"] or str(array.dtype) != entry["dtype"]:
            raise UserError(
                f"{self.path / entry['file']}: not the array that manifest.json describes; delete its folder"
            )
        return array

    @cached_property
    def table(self) -> pd.DataFrame:
        """One row per image: label, split, owner, parent."""
        return pd.read_parquet(self.path / "images.parquet")

    def head(self) -> dict[str, Any]:
        """Return the backbone's classifier as tensors: ``weight`` [K, D] and ``bias`` [K]."""
        from safetensors.torch import load_file

        return load_file(self.path / "head.safetensors")


class FeatureWriter:
    """Writes features row by row into a folder under construction; a killed extraction continues where it was.

    Rows count as done only after their features are on disk, so at most the last ``flush_seconds`` of work is repeated.
    """

    def __init__(self, folder: Path, images: int, dim: int, dtype: str, flush_seconds: float = 10.0) -> None:
        self.folder, self.flush_seconds = folder, flush_seconds
        need, free = images * dim * np.dtype(dtype).itemsize, shutil.disk_usage(folder).free
        self._path, self._done_path = folder / "features.npy", folder / "done.npy"
        resumed = self._matches(images, dim, dtype)
        if not resumed and need > free:
            raise UserError(f"{folder}: the features need {need / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free")
        if not resumed:
            np.lib.format.open_memmap(self._path, mode="w+", dtype=dtype, shape=(images, dim)).flush()
            np.save(self._done_path, np.zeros(images, dtype=bool))  # after the features: it says they have their shape
        self._features = np.lib.format.open_memmap(self._path, mode="r+")
        self._done = np.lib.format.open_memmap(self._done_path, mode="r+")
        self._pending: list[np.ndarray] = []
        self._flushed = time.monotonic()

    def _matches(self, images: int, dim: int, dtype: str) -> bool:
        try:
            features = np.load(self._path, mmap_mode="r")
            done = np.load(self._done_path, mmap_mode="r")
        except (OSError, ValueError, EOFError):  # absent, or cut off by a kill
            return False
        return features.shape == (images, dim) and features.dtype == dtype and done.shape == (images,)

    def remaining(self) -> np.ndarray:
        """Return the numbers of the images still to do."""
        return np.flatnonzero(~self._done)

    def write(self, rows: np.ndarray, features: np.ndarray) -> None:
        """Store the features [len(rows), D] of the images ``rows``."""
        if not np.isfinite(features).all():
            bad = rows[~np.isfinite(features).all(axis=1)]
            first = bad[:3].tolist()
            raise UserError(f"the backbone gave features that are not finite for {len(bad)} images, first {first}")
        self._features[rows] = features
        self._pending.append(np.asarray(rows))
        if time.monotonic() - self._flushed > self.flush_seconds:
            self.flush()

    def flush(self) -> None:
        """Bring what was written to disk, then mark it as done."""
        self._features.flush()
        for rows in self._pending:
            self._done[rows] = True
        self._done.flush()
        self._pending.clear()
        self._flushed = time.monotonic()

    def finish(self, table: pd.DataFrame, head: dict[str, Any], manifest: dict[str, Any]) -> None:
        """Write the table, the classifier and, last, the manifest."""
        from safetensors.torch import save

        self.flush()
        if len(left := self.remaining()):
            raise RuntimeError(f"{len(left)} of {len(self._done)} images have no features yet")
        with atomic_write(self.folder / "images.parquet", "wb") as file:
            table.to_parquet(file, index=False)
        with atomic_write(self.folder / "head.safetensors", "wb") as file:
            file.write(save({"weight": head["weight"].contiguous(), "bias": head["bias"].contiguous()}))
        shape, dtype = list(self._features.shape), str(self._features.dtype)
        arrays = {"features": {"file": self._path.name, "shape": shape, "dtype": dtype}}
        self._done_path.unlink()
        write_json(self.folder / "manifest.json", {"format": FORMAT, "arrays": arrays, **manifest})
