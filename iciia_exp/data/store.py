"""Feature store: one folder per (dataset, backbone) with memory-mapped arrays and a manifest.

    manifest.json      format version, arrays (shape, dtype), backbone, weights digest, transform, D, K, MACs
    features.npy       [M, D] float16 or float32
    images.parquet     one row per image: the dataset's table, and `bad`: the image is unreadable, its features are 0
    head.safetensors   the backbone's classifier: weight [K, D], bias [K]; absent if it is fitted on these features

``manifest.json`` is written last: a folder without it is not a store.

Legend: M images, D features, K classes.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from iciia_exp.artifacts import atomic_write, finished_folder, read_json, save_tensors, write_json
from iciia_exp.errors import UserError, first_line

__all__ = ["FORMAT", "FeatureStore", "FeatureWriter"]

FORMAT = 3

_FEATURES = "features.npy"


@dataclass(frozen=True)
class FeatureStore:
    """A finished store, opened for reading; arrays and tables are read when they are used."""

    path: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, path: Path) -> FeatureStore:
        """Open the store at ``path``; a missing, unknown or damaged store raises `UserError`."""
        if not finished_folder(path):
            raise UserError(f"{path}: no feature store there (manifest.json is missing)")
        manifest = read_json(path / "manifest.json")
        if (found := manifest.get("format")) != FORMAT:
            raise UserError(f"{path}: a store of format {found}, this version reads {FORMAT}; delete it and repeat")
        for key, kind, expected in (
            ("arrays", dict, "an object"),
            ("dim", int, "a number"),
            ("num_classes", int, "a number"),
        ):
            if not isinstance(manifest.get(key), kind):
                raise UserError(f"{path}/manifest.json: {key}: expected {expected}; delete its folder and repeat")
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
    def macs(self) -> int | None:
        """Multiply-accumulates of the backbone and its classifier for one image; None if unknown."""
        return self.manifest["macs"]

    def array(self, name: str = "features") -> np.ndarray:
        """Return an array, memory-mapped."""
        path = self.path / f"{name}.npy"  # not a path from the manifest, which could be anywhere
        try:
            array = np.load(path, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{path}: cannot be read ({first_line(error)}); delete its folder") from error
        if self.manifest["arrays"].get(name) != {"shape": list(array.shape), "dtype": str(array.dtype)}:
            raise UserError(f"{path}: not the array that manifest.json describes; delete its folder")
        return array

    @cached_property
    def table(self) -> pd.DataFrame:
        """The table of the dataset, one row per image."""
        table = pd.read_parquet(self.path / "images.parquet").drop(columns="bad")
        text = [name for name in ("split", "owner", "parent", "path") if name in table]
        columns = table[text].astype(object)
        return table.assign(**columns.where(columns.notna(), None))

    @cached_property
    def bad(self) -> np.ndarray:
        """Whether an image is unreadable, bool [M]."""
        return pd.read_parquet(self.path / "images.parquet", columns=["bad"])["bad"].to_numpy()


class FeatureWriter:
    """Writes features row by row into the folder of a new store; a killed extraction can be resumed.

    Rows are marked as done after their features are on disk, so at most the last ``flush_seconds`` of work is repeated.
    Several processes can write at once, each with its own number ``rank`` and rows, after one call of `prepare`.
    """

    def __init__(self, folder: Path, rank: int = 0, flush_seconds: float = 10.0) -> None:
        self.folder, self.flush_seconds = folder, flush_seconds
        self._features = np.lib.format.open_memmap(folder / _FEATURES, mode="r+")
        done = folder / f"done.{rank}.npy"
        if not done.is_file():
            np.save(done, np.zeros(len(self._features), dtype=bool))
        self._done = np.lib.format.open_memmap(done, mode="r+")
        self._bad_path = folder / f"bad.{rank}.jsonl"
        self._pending: list[np.ndarray] = []
        self._bad: list[tuple[int, str]] = []
        self._flushed = time.monotonic()

    @staticmethod
    def prepare(folder: Path, images: int, dim: int, dtype: str) -> None:
        """Create the array of features, or keep that of a killed extraction if it has the same shape and type.

        Unreadable images are marked as not done, because they may have been repaired.
        """
        path = folder / _FEATURES
        try:
            left = np.load(path, mmap_mode="r")
            done = [np.lib.format.open_memmap(p, mode="r+") for p in folder.glob("done.*.npy")]
            if left.shape == (images, dim) and left.dtype == dtype and all(d.shape == (images,) for d in done):
                again = list(FeatureWriter.bad_images(folder))
                for flags in done:
                    flags[again] = False
                    flags.flush()
                for file in folder.glob("bad.*.jsonl"):
                    file.unlink()
                return
        except (OSError, ValueError, EOFError):  # absent, or cut off by a kill
            pass
        need, free = images * dim * np.dtype(dtype).itemsize, shutil.disk_usage(folder).free
        if need > free:
            raise UserError(f"{folder}: the features need {need / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free")
        _delete_marks(folder)
        np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=(images, dim)).flush()

    @staticmethod
    def remaining(folder: Path) -> np.ndarray:
        """Return the numbers of the images that no process has done."""
        left = np.ones(len(np.load(folder / _FEATURES, mmap_mode="r")), dtype=bool)
        for path in folder.glob("done.*.npy"):
            left &= ~np.load(path)
        return np.flatnonzero(left)

    @staticmethod
    def bad_images(folder: Path) -> dict[int, str]:
        """Return the problems of the unreadable images, by image number."""
        problems = {}
        for path in folder.glob("bad.*.jsonl"):
            for line in path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(json.JSONDecodeError):  # cut off by a kill; not marked as done either
                    row, problem = json.loads(line)
                    problems[int(row)] = problem
        return dict(sorted(problems.items()))

    def write(self, rows: np.ndarray, features: np.ndarray) -> None:
        """Store the features [len(rows), D] of the images ``rows``."""
        if len(bad := rows[~np.isfinite(features).all(axis=1)]):
            first = bad[:3].tolist()
            raise UserError(f"the backbone gave features that are not finite for {len(bad)} images, first {first}")
        if self._features.dtype == np.float16 and (largest := np.abs(features).max(initial=0)) > np.finfo("f2").max:
            raise UserError(f"a feature of {largest:.3g} does not fit float16; use features.dtype=float32")
        self._features[rows] = features
        self._pending.append(np.asarray(rows))
        if time.monotonic() - self._flushed > self.flush_seconds:
            self.flush()

    def write_bad(self, bad: Sequence[tuple[int, str]]) -> None:
        """Record unreadable images; their features are zero."""
        rows = np.array([row for row, _ in bad], dtype=np.int64)
        self._features[rows] = 0
        self._bad.extend(bad)
        self._pending.append(rows)

    def flush(self) -> None:
        """Write the features to disk, then mark their images as done."""
        self._features.flush()
        if self._bad:
            with open(self._bad_path, "a", encoding="utf-8") as file:
                file.writelines(json.dumps([int(row), problem]) + "\n" for row, problem in self._bad)
                file.flush()
                os.fsync(file.fileno())
            self._bad.clear()
        for rows in self._pending:
            self._done[rows] = True
        self._done.flush()
        self._pending.clear()
        self._flushed = time.monotonic()

    @staticmethod
    def finish(folder: Path, table: pd.DataFrame, head: dict[str, Any] | None, manifest: dict[str, Any]) -> None:
        """Write the table, the classifier and finally the manifest."""
        features = np.load(folder / _FEATURES, mmap_mode="r")
        if len(left := FeatureWriter.remaining(folder)):
            raise RuntimeError(f"{len(left)} of {len(features)} images have no features yet")
        bad = np.zeros(len(features), dtype=bool)
        bad[list(FeatureWriter.bad_images(folder))] = True
        with atomic_write(folder / "images.parquet", "wb") as file:
            table.assign(bad=bad).to_parquet(file, index=False)
        if head is not None:
            save_tensors(folder / "head.safetensors", {name: head[name] for name in ("weight", "bias")})
        entry = {"shape": list(features.shape), "dtype": str(features.dtype)}
        _delete_marks(folder)
        write_json(folder / "manifest.json", {"format": FORMAT, "arrays": {"features": entry}, **manifest})


def _delete_marks(folder: Path) -> None:
    for path in (*folder.glob("done.*.npy"), *folder.glob("bad.*.jsonl")):
        path.unlink()
