"""Clients: who owns which train, val and test images, as ragged index arrays.

Legend: C clients, M images of the dataset, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from iciia_exp.artifacts import atomic_write

__all__ = ["ROLES", "Clients", "Ragged"]

# What a client's images are for. Every client may have images of one role (split by client) or of several (within).
ROLES = ("train", "val", "test")

_IN_TIME = "in_time"  # a fact in the file's metadata


@dataclass(frozen=True)
class Ragged:
    """C rows of different lengths: row i is ``values[offsets[i]:offsets[i + 1]]``."""

    offsets: np.ndarray  # int64 [C + 1]
    values: np.ndarray  # int64 [total]

    @classmethod
    def from_rows(cls, rows: Sequence[np.ndarray]) -> Ragged:
        """Join a list of index arrays."""
        offsets = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum([len(row) for row in rows], out=offsets[1:])
        values = np.concatenate(rows).astype(np.int64) if rows else np.empty(0, dtype=np.int64)
        return cls(offsets, values)

    @classmethod
    def from_pairs(cls, row_numbers: np.ndarray, values: np.ndarray, rows: int) -> Ragged:
        """Group values by row number (0..rows - 1), without a loop; values of a row keep their order."""
        offsets = np.zeros(rows + 1, dtype=np.int64)
        np.cumsum(np.bincount(row_numbers, minlength=rows), out=offsets[1:])
        return cls(offsets, np.asarray(values, dtype=np.int64)[np.argsort(row_numbers, kind="stable")])

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """Length of every row, int64 [C]."""
        return np.diff(self.offsets)

    @property
    def row_numbers(self) -> np.ndarray:
        """The row of every value, int64 [total]."""
        return np.repeat(np.arange(len(self)), self.lengths)

    def shuffled(self, rng: np.random.Generator) -> np.ndarray:
        """Return positions in ``values`` in a random order within every row, int64 [total]."""
        return np.lexsort((rng.random(len(self.values)), self.row_numbers))


@dataclass(frozen=True)
class Clients:
    """A partition: one entry per client and, for each role, the numbers of its images."""

    ids: np.ndarray  # text [C]
    types: np.ndarray  # text [C], what sort of client it is (its parent category, say)
    train: Ragged
    val: Ragged
    test: Ragged
    in_time: bool = False  # the images of a client are in the order of time, not in an order of no meaning

    def __post_init__(self) -> None:
        sizes = {"ids": len(self.ids), "types": len(self.types)} | {r: len(self[r]) for r in ROLES}
        if len(set(sizes.values())) != 1:
            raise ValueError(f"every array needs one entry per client, got {sizes}")

    @classmethod
    def from_assignment(
        cls,
        ids: np.ndarray,
        types: np.ndarray,
        client_M: np.ndarray,
        role_M: np.ndarray,
        order_M: np.ndarray | None = None,
        in_time: bool = False,
    ) -> Clients:
        """Group images by client and role, in time linear in images (and their sorting), however many clients.

        Args:
            ids, types: of every client, text [C].
            client_M: number of every image's client, -1 for an image of nobody.
            role_M: number of every image's role in `ROLES`, -1 for an image without one.
            order_M: sorts the images of a client, smallest first; without it, and in a tie, by image number.
            in_time: that order is the order of time.
        """
        position_M = np.arange(len(client_M)) if order_M is None else np.argsort(order_M, kind="stable")
        client_M, role_M = client_M[position_M], role_M[position_M]
        used = {role: (role_M == r) & (client_M >= 0) for r, role in enumerate(ROLES)}
        rows = {r: Ragged.from_pairs(client_M[u], position_M[u], len(ids)) for r, u in used.items()}
        return cls(ids, types, **rows, in_time=in_time)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, role: str) -> Ragged:
        if role not in ROLES:
            raise KeyError(role)
        return getattr(self, role)

    def statistics(self, labels: np.ndarray) -> pd.DataFrame:
        """Return one row per role: clients, images, distinct images, and images and classes per client (mean, sd).

        Args:
            labels: classes of the dataset's images, int64 [M], or 0/1 [M, K] of a multi-label task.
        """
        rows = []
        for role in ROLES:
            ragged = self[role]
            has = ragged.lengths > 0
            if not has.any():
                continue
            classes = self.classes_per_client(labels, role)[has]
            images = ragged.lengths[has]
            seen_M = np.zeros(len(labels), dtype=bool)
            seen_M[ragged.values] = True
            rows.append(
                {
                    "role": role,
                    "clients": int(has.sum()),
                    "images": int(images.sum()),
                    "distinct_images": int(seen_M.sum()),
                    "images_mean": float(images.mean()),
                    "images_sd": float(images.std()),
                    "classes_mean": float(classes.mean()),
                    "classes_sd": float(classes.std()),
                }
            )
        return pd.DataFrame(rows)

    def classes_per_client(self, labels: np.ndarray, role: str) -> np.ndarray:
        """Return the number of distinct classes among each client's images of ``role``, int64 [C].

        ``labels`` is int64 [M], or 0/1 [M, K] of a multi-label task: attributes that apply to some image then count.
        """
        ragged = self[role]
        rows, classes = ragged.row_numbers, labels[ragged.values]
        if labels.ndim == 2:
            images, classes = np.nonzero(classes)
            rows = rows[images]
        number = int(classes.max()) + 1 if len(classes) else 1
        pairs = pd.unique(rows * number + classes)  # by hash: linear in images
        return np.bincount(pairs // number, minlength=len(self))

    def without(self, bad_M: np.ndarray) -> Clients:
        """Return the same clients without the images marked in ``bad_M`` (bool [M])."""
        roles: dict[str, Any] = {}
        for role in ROLES:
            ragged = self[role]
            keep = ~bad_M[ragged.values]
            kept = np.bincount(ragged.row_numbers[keep], minlength=len(self))
            roles[role] = Ragged(np.concatenate([[0], np.cumsum(kept)]).astype(np.int64), ragged.values[keep])
        return replace(self, **roles)

    def save(self, path: Path) -> None:
        """Write one row per client: client, type and a list column of image numbers for each role."""
        text = {"client": self.ids, "client_type": self.types}
        columns = {name: pa.array(values.tolist(), pa.string()) for name, values in text.items()}
        for role in ROLES:
            ragged = self[role]
            columns[role] = pa.LargeListArray.from_arrays(ragged.offsets, ragged.values)
        with atomic_write(path, "wb") as file:
            pq.write_table(pa.table(columns, metadata={_IN_TIME: str(int(self.in_time))}), file)

    @classmethod
    def load(cls, path: Path) -> Clients:
        """Read what `save` wrote."""
        table = pq.read_table(path).combine_chunks()
        ids, types = (np.array(table[name].to_pylist(), dtype=object) for name in ("client", "client_type"))
        columns = [table[role].combine_chunks() for role in ROLES]
        in_time = (table.schema.metadata or {}).get(_IN_TIME.encode()) == b"1"
        train, val, test = (Ragged(c.offsets.to_numpy(), c.values.to_numpy()) for c in columns)
        return cls(ids, types, train, val, test, in_time)
