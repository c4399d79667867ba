"""Feature store: one folder per (dataset, backbone) with memory-mapped arrays and a manifest.

    manifest.json      format version, arrays (shape, dtype), backbone, weights digest, transform, D, K, MACs
    features.npy       [M, D] float16 or float32
    <name>.npy         [M, ...], an array that a method reads beside the features: tokens, logits
    images.parquet     one row per image: the dataset's table, and `bad`: the image is unreadable, its features are 0
    head.safetensors   the backbone's classifier: weight [K, D], bias [K]; absent if it is fitted on these features

``manifest.json`` is written last: a folder without it is not a store.

Legend: M images, D features, K classes.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from rich.filesize import decimal

from iciia_exp.artifacts import (
    allocate,
    atomic_write,
    finished_folder,
    read_array,
    read_json,
    read_parquet,
    save_tensors,
    write_json,
)
from iciia_exp.errors import UserError

__all__ = ["FORMAT", "FeatureStore", "FeatureWriter"]

FORMAT = 3

_CHECKED = 4096  # rows whose checksums are compared at a time


@dataclass(frozen=True)
class FeatureStore:
    """A finished store, opened for reading; arrays and tables are read when they are used."""

    path: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, path: Path) -> FeatureStore:
        """Open the store at ``path``; a missing, unknown or damaged store raises `UserError`."""
        if not finished_folder(path):
            raise UserError(f"{path}: no feature store there (manifest.json is missing); repeat the run's command")
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
        """Return an array [M, ...], memory-mapped; raises a `UserError` if the store does not have it."""
        if name not in self.manifest["arrays"]:
            hint = f"a method with {name} in its `reads` makes a store of its own that has it"
            raise UserError(f"{self.path}: has no array {name}, only {', '.join(self.manifest['arrays'])}; {hint}")
        path = self.path / f"{name}.npy"  # not a path from the manifest, which could be anywhere
        array = read_array(path)
        if self.manifest["arrays"].get(name) != {"shape": list(array.shape), "dtype": str(array.dtype)}:
            raise UserError(f"{path}: not the array that manifest.json describes; delete its folder")
        return array

    @cached_property
    def table(self) -> pd.DataFrame:
        """The table of the dataset, one row per image."""
        table = read_parquet(self.path / "images.parquet").drop(columns="bad")
        text = [name for name in ("split", "owner", "parent", "path") if name in table]
        columns = table[text].astype(object)
        return table.assign(**columns.where(columns.notna(), None))

    @cached_property
    def bad(self) -> np.ndarray:
        """Whether an image is unreadable, bool [M]."""
        return read_parquet(self.path / "images.parquet", columns=["bad"])["bad"].to_numpy()


class FeatureWriter:
    """Writes arrays row by row into the folder of a new store; a killed extraction can be resumed.

    Rows are marked as done, with a checksum of their values, after all arrays are on disk, so at most the last
    ``flush_seconds`` of work is repeated, and what is damaged in between.
    Several processes can write at once, each with its own number ``rank`` and rows, after one call of `prepare`.
    """

    def __init__(self, folder: Path, rank: int = 0, flush_seconds: float = 10.0) -> None:
        self.folder, self.flush_seconds = folder, flush_seconds
        self._arrays = _open(folder, "r+")
        done = folder / f"done.{rank}.npy"
        if not done.is_file():
            with atomic_write(done, "wb") as file:
                np.save(file, np.zeros(_rows(self._arrays), dtype=np.uint32))
        self._done = np.lib.format.open_memmap(done, mode="r+")
        self._bad_path = folder / f"bad.{rank}.jsonl"
        self._pending: list[tuple[np.ndarray, np.ndarray]] = []
        self._bad: list[tuple[int, str]] = []
        self._flushed = time.monotonic()

    @staticmethod
    def prepare(folder: Path, images: int, arrays: Mapping[str, tuple[tuple[int, ...], str]]) -> None:
        """Create the arrays, or keep those of a killed extraction if they have the same names, shapes and types.

        Unreadable images are marked as not done, because they may have been repaired.

        Args:
            folder: of the new store.
            images: M.
            arrays: shape of one row and type of each array, by name: ``{"features": ((D,), "float32")}``.
        """
        wanted = {name: ((images, *shape), np.dtype(dtype)) for name, (shape, dtype) in arrays.items()}
        try:
            done = [np.lib.format.open_memmap(p, mode="r+") for p in folder.glob("done.*.npy")]
            left = {name: (array.shape, array.dtype) for name, array in _open(folder).items()}
            if left == wanted and all((d.shape, d.dtype) == ((images,), np.uint32) for d in done):
                again = list(FeatureWriter.bad_images(folder))
                for checks in done:
                    checks[again] = 0
                    checks.flush()
                for file in folder.glob("bad.*.jsonl"):
                    file.unlink()
                for path in _array_files(folder).values():
                    allocate(path)
                return
        except (OSError, ValueError, EOFError):  # absent, or cut off by a kill
            pass
        _delete_marks(folder)
        for path in _array_files(folder).values():
            path.unlink()  # first: their room is needed
        need = sum(math.prod(shape) * dtype.itemsize for shape, dtype in wanted.values())
        if need > (free := shutil.disk_usage(folder).free):
            names = " and ".join(wanted)
            raise UserError(f"{folder}: {names} need {decimal(need)}, the disk has {decimal(free)} free")
        for name, (shape, dtype) in wanted.items():
            path = folder / f"{name}.npy"
            np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape).flush()
            try:
                allocate(path)
            except UserError:
                path.unlink()
                raise

    @staticmethod
    def remaining(folder: Path) -> np.ndarray:
        """Return the numbers of the images that no process has done, or whose values are not those it wrote."""
        arrays = _open(folder)
        left = np.ones(_rows(arrays), dtype=bool)
        for path in folder.glob("done.*.npy"):
            done = np.load(path)
            for rows in np.array_split(np.flatnonzero(done), 1 + int(np.count_nonzero(done)) // _CHECKED):
                values = {name: array[rows] for name, array in arrays.items()}
                left[rows[_check_sums(arrays, values) == done[rows]]] = False
        return np.flatnonzero(left)

    @staticmethod
    def bad_images(folder: Path) -> dict[int, str]:
        """Return the problems of the unreadable images, by image number."""
        problems = {}
        for path in folder.glob("bad.*.jsonl"):
            for line in path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError, TypeError, RecursionError):  # cut off by a kill; not done either
                    row, problem = json.loads(line)
                    problems[int(row)] = problem
        return dict(sorted(problems.items()))

    def write(self, rows: np.ndarray, values: Mapping[str, np.ndarray]) -> None:
        """Store the values [len(rows), ...] of every array for the images ``rows``.

        Raises a `UserError` if they have another shape than the array, are not finite, or do not fit its type.
        """
        for name, array in self._arrays.items():
            _check_values(name, array, rows, values[name])
            array[rows] = values[name]
        self._pending.append((np.asarray(rows), _check_sums(self._arrays, values)))
        if time.monotonic() - self._flushed > self.flush_seconds:
            self.flush()

    def write_bad(self, bad: Sequence[tuple[int, str]]) -> None:
        """Record unreadable images; their values are zero."""
        rows = np.array([row for row, _ in bad], dtype=np.int64)
        for array in self._arrays.values():
            array[rows] = 0
        self._bad.extend(bad)
        zeros = {name: np.zeros((len(rows), *array.shape[1:]), array.dtype) for name, array in self._arrays.items()}
        self._pending.append((rows, _check_sums(self._arrays, zeros)))

    def flush(self) -> None:
        """Write the arrays to disk, then mark their images as done."""
        for array in self._arrays.values():
            array.flush()
        if self._bad:
            with open(self._bad_path, "a", encoding="utf-8") as file:
                file.writelines(json.dumps([int(row), problem]) + "\n" for row, problem in self._bad)
                file.flush()
                os.fsync(file.fileno())
            self._bad.clear()
        for rows, sums in self._pending:
            self._done[rows] = sums
        self._done.flush()
        self._pending.clear()
        self._flushed = time.monotonic()

    @staticmethod
    def finish(folder: Path, table: pd.DataFrame, head: dict[str, Any] | None, manifest: dict[str, Any]) -> None:
        """Write the table, the classifier and finally the manifest."""
        arrays = _open(folder)
        if len(left := FeatureWriter.remaining(folder)):
            raise RuntimeError(f"{len(left)} of {_rows(arrays)} images have no features yet")
        bad = np.zeros(_rows(arrays), dtype=bool)
        bad[list(FeatureWriter.bad_images(folder))] = True
        with atomic_write(folder / "images.parquet", "wb") as file:
            table.assign(bad=bad).to_parquet(file, index=False)
        if head is not None:
            save_tensors(folder / "head.safetensors", {name: head[name] for name in ("weight", "bias")})
        entries = {name: {"shape": list(array.shape), "dtype": str(array.dtype)} for name, array in arrays.items()}
        _delete_marks(folder)
        write_json(folder / "manifest.json", {"format": FORMAT, "arrays": entries, **manifest})


def _array_files(folder: Path) -> dict[str, Path]:
    """Return the files of the arrays of a store that is being made, by name."""
    return {path.stem: path for path in sorted(folder.glob("*.npy")) if not path.name.startswith("done.")}


def _open(folder: Path, mode: Literal["r", "r+"] = "r") -> dict[str, np.memmap]:
    return {name: np.lib.format.open_memmap(path, mode=mode) for name, path in _array_files(folder).items()}


def _rows(arrays: Mapping[str, np.ndarray]) -> int:
    return len(next(iter(arrays.values())))


def _check_sums(arrays: Mapping[str, np.ndarray], values: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the CRC-32 of every row of values as the arrays store them, uint32; never 0, which marks a row to do."""
    sums: list[int] = [0] * len(next(iter(values.values())))
    for name, array in arrays.items():
        rows = np.ascontiguousarray(values[name], dtype=array.dtype)
        sums = [zlib.crc32(row.data, before) for row, before in zip(rows, sums, strict=True)]
    return np.maximum(np.array(sums, dtype=np.uint32), 1)


def _check_values(name: str, array: np.ndarray, rows: np.ndarray, values: np.ndarray) -> None:
    """Raise a `UserError` for values that do not fit an array of the store."""
    if values.shape != (len(rows), *array.shape[1:]):
        want, got = list(array.shape[1:]), list(values.shape[1:])
        raise UserError(f"{name}: the backbone gave {got} for an image, the first image had {want}")
    if array.dtype.kind in "iu":  # images, as they are
        return
    if (largest := np.abs(values).max(initial=0)) <= np.finfo(array.dtype).max:  # false for NaN
        return
    if len(bad := rows[~np.isfinite(values).reshape(len(rows), -1).all(axis=1)]):
        first = bad[:3].tolist()
        raise UserError(f"{name}: the backbone gave values that are not finite for {len(bad)} images, first {first}")
    hint = "; use features.dtype=float32" if name == "features" else ""
    raise UserError(f"{name}: a value of {largest:.3g} does not fit {array.dtype}{hint}")


def _delete_marks(folder: Path) -> None:
    for path in (*folder.glob("done.*.npy"), *folder.glob("bad.*.jsonl")):
        path.unlink()
