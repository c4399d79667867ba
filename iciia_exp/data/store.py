"""Feature store: one folder per (dataset, backbone) with memory-mapped arrays and a manifest.

    manifest.json      format version, arrays (shape, dtype), backbone, weights digest, transform, D, K, MACs
    features.npy       [M, D] float16 or float32
    images.parquet     one row per image: the dataset's table, and `bad`: could not be read, its features are zeros
    head.safetensors   the backbone's classifier: weight [K, D], bias [K]; absent if one is fitted on these features

``manifest.json`` is written last: a folder without it is not a store. More arrays per image (tokens, logits) are more
entries of ``arrays``.

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
        if not isinstance(manifest.get("arrays"), dict):
            raise UserError(f"{path}/manifest.json: arrays: expected an object; delete its folder and repeat")
        for key in ("dim", "num_classes"):
            if not isinstance(manifest.get(key), int):
                raise UserError(f"{path}/manifest.json: {key}: expected a number; delete its folder and repeat")
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
        """Multiply-accumulates of the backbone and its classifier for one image; None where they are unknown."""
        return self.manifest["macs"]

    def array(self, name: str = "features") -> np.ndarray:
        """Memory-map one array; pages are read as they are used."""
        path = self.path / f"{name}.npy"  # never a path that the manifest gives
        try:
            array = np.load(path, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{path}: cannot be read ({first_line(error)}); delete its folder") from error
        described = self.manifest.get("arrays", {}).get(name)
        if described != {"shape": list(array.shape), "dtype": str(array.dtype)}:
            raise UserError(f"{path}: not the array that manifest.json describes; delete its folder")
        return array

    @cached_property
    def table(self) -> pd.DataFrame:
        """The dataset's table, one row per image, as its dataset gave it."""
        table = pd.read_parquet(self.path / "images.parquet").drop(columns="bad")
        text = [name for name in ("split", "owner", "parent", "path") if name in table]
        for name in text:
            column = table[name].astype(object)
            table[name] = column.where(column.notna(), None)
        return table

    @cached_property
    def bad(self) -> np.ndarray:
        """Whether an image could not be read, bool [M]."""
        return pd.read_parquet(self.path / "images.parquet", columns=["bad"])["bad"].to_numpy()


class FeatureWriter:
    """Writes features row by row into a folder under construction; a killed extraction continues where it was.

    Rows count as done only after their features are on disk, so at most the last ``flush_seconds`` of work is repeated.
    Several processes may write at once, each with its own ``rank`` and rows; `prepare` comes before all of them.

    Args:
        folder: where the store is being made.
        rank: number of this process.
        flush_seconds: time between flushes.
    """

    def __init__(self, folder: Path, rank: int = 0, flush_seconds: float = 10.0) -> None:
        self.folder, self.flush_seconds = folder, flush_seconds
        self._features = np.lib.format.open_memmap(folder / _FEATURES, mode="r+")
        own = folder / f"done.{rank}.npy"
        if not own.is_file():
            np.save(own, np.zeros(len(self._features), dtype=bool))
        self._done = np.lib.format.open_memmap(own, mode="r+")
        self._bad_path = folder / f"bad.{rank}.jsonl"
        self._pending: list[np.ndarray] = []
        self._bad: list[tuple[int, str]] = []
        self._flushed = time.monotonic()

    @staticmethod
    def prepare(folder: Path, images: int, dim: int, dtype: str) -> None:
        """Make room for the features, unless what a killed extraction left there fits.

        Images that it could not read count as not done: they may have been repaired since.
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
                for noted in folder.glob("bad.*.jsonl"):
                    noted.unlink()
                return
        except (OSError, ValueError, EOFError):  # absent, or cut off by a kill
            pass
        need, free = images * dim * np.dtype(dtype).itemsize, shutil.disk_usage(folder).free
        if need > free:
            raise UserError(f"{folder}: the features need {need / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free")
        for stale in (*folder.glob("done.*.npy"), *folder.glob("bad.*.jsonl")):
            stale.unlink()
        np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=(images, dim)).flush()

    @staticmethod
    def remaining(folder: Path) -> np.ndarray:
        """Return the numbers of the images still to do, by no process done yet."""
        left = np.ones(len(np.load(folder / _FEATURES, mmap_mode="r")), dtype=bool)
        for path in folder.glob("done.*.npy"):
            left &= ~np.load(path)
        return np.flatnonzero(left)

    @staticmethod
    def bad_images(folder: Path) -> dict[int, str]:
        """Return the problems of the images that could not be read, by image number."""
        problems = {}
        for path in folder.glob("bad.*.jsonl"):
            for line in path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(json.JSONDecodeError):  # cut off by a kill: not marked as done either
                    row, problem = json.loads(line)
                    problems[int(row)] = problem
        return dict(sorted(problems.items()))

    def write(self, rows: np.ndarray, features: np.ndarray) -> None:
        """Store the features [len(rows), D] of the images ``rows``."""
        if not np.isfinite(features).all():
            bad = rows[~np.isfinite(features).all(axis=1)]
            first = bad[:3].tolist()
            raise UserError(f"the backbone gave features that are not finite for {len(bad)} images, first {first}")
        if self._features.dtype == np.float16 and (largest := np.abs(features).max(initial=0)) > np.finfo("f2").max:
            raise UserError(f"a feature of {largest:.3g} does not fit float16; use features.dtype=float32")
        self._features[rows] = features
        self._pending.append(np.asarray(rows))
        if time.monotonic() - self._flushed > self.flush_seconds:
            self.flush()

    def write_bad(self, bad: Sequence[tuple[int, str]]) -> None:
        """Note images that could not be read; their features are zero."""
        rows = np.array([row for row, _ in bad], dtype=np.int64)
        self._features[rows] = 0
        self._bad.extend(bad)
        self._pending.append(rows)

    def flush(self) -> None:
        """Bring what was written to disk, then mark it as done."""
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
        """Write the table, the classifier and, last, the manifest."""
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
        for path in (*folder.glob("done.*.npy"), *folder.glob("bad.*.jsonl")):
            path.unlink()
        write_json(folder / "manifest.json", {"format": FORMAT, "arrays": {"features": entry}, **manifest})
