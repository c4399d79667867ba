"""Who owns which images: clients with train, selection and test images, as ragged index arrays.

Legend: C clients, M images of the dataset.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from iciia_exp.artifacts import atomic_write

__all__ = ["ROLES", "Clients", "Ragged"]

# What a client's images are for. Every client may have images of one role (split by client) or of several (within).
ROLES = ("train", "selection", "test")


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


@dataclass(frozen=True)
class Clients:
    """A partition: one entry per client and, for each role, the numbers of its images."""

    ids: np.ndarray  # text [C]
    kinds: np.ndarray  # text [C], what sort of client it is (its parent category, say)
    train: Ragged
    selection: Ragged
    test: Ragged

    def __post_init__(self) -> None:
        sizes = {"ids": len(self.ids), "kinds": len(self.kinds)} | {r: len(self[r]) for r in ROLES}
        if len(set(sizes.values())) != 1:
            raise ValueError(f"every array needs one entry per client, got {sizes}")

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, role: str) -> Ragged:
        if role not in ROLES:
            raise KeyError(role)
        return getattr(self, role)

    def statistics(self, labels_M: np.ndarray) -> pd.DataFrame:
        """Return one row per role: clients, images, distinct images, and images and classes per client (mean, sd)."""
        rows = []
        for role in ROLES:
            ragged = self[role]
            has = ragged.lengths > 0
            if not has.any():
                continue
            classes = self.classes_per_client(labels_M, role)[has]
            images = ragged.lengths[has]
            rows.append(
                {
                    "role": role,
                    "clients": int(has.sum()),
                    "images": int(images.sum()),
                    "distinct_images": len(np.unique(ragged.values)),
                    "images_mean": float(images.mean()),
                    "images_sd": float(images.std()),
                    "classes_mean": float(classes.mean()),
                    "classes_sd": float(classes.std()),
                }
            )
        return pd.DataFrame(rows)

    def classes_per_client(self, labels_M: np.ndarray, role: str) -> np.ndarray:
        """Return the number of distinct classes among each client's images of ``role``, int64 [C]."""
        ragged = self[role]
        pairs = np.unique(np.stack([ragged.row_numbers, labels_M[ragged.values]], axis=1), axis=0)
        return np.bincount(pairs[:, 0], minlength=len(self))

    def save(self, path: Path) -> None:
        """Write one row per client: client, kind and a list column of image numbers for each role."""
        text = {"client": self.ids, "kind": self.kinds}
        columns = {name: pa.array(values.tolist(), pa.string()) for name, values in text.items()}
        for role in ROLES:
            ragged = self[role]
            columns[role] = pa.LargeListArray.from_arrays(ragged.offsets, ragged.values)
        with atomic_write(path, "wb") as file:
            pq.write_table(pa.table(columns), file)

    @classmethod
    def load(cls, path: Path) -> Clients:
        """Read what `save` wrote."""
        table = pq.read_table(path).combine_chunks()
        ids, kinds = (np.array(table[name].to_pylist(), dtype=object) for name in ("client", "kind"))
        columns = [table[role].combine_chunks() for role in ROLES]
        return cls(ids, kinds, *(Ragged(c.offsets.to_numpy(), c.values.to_numpy()) for c in columns))
