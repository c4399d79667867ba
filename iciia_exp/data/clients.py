"""Clients: the numbers of every client's train, val and test images, as ragged arrays.

Legend: C clients, M images of the dataset, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from iciia_exp.artifacts import atomic_write
from iciia_exp.checksums import verify
from iciia_exp.errors import UserError, first_line

__all__ = ["ROLES", "Clients", "Ragged", "positions", "rank_within"]

# A client has images of one role (split by client) or of several (split within client).
ROLES = ("train", "val", "test")

_IN_TIME = "in_time"  # key in the metadata of the parquet file


def positions(lengths: np.ndarray) -> np.ndarray:
    """Return 0, 1, ... for each of consecutive rows of the given lengths, int64 [sum of lengths].

    >>> positions(np.array([2, 0, 3]))
    array([0, 1, 0, 1, 2])
    """
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def rank_within(groups_N: np.ndarray, order_N: np.ndarray | None = None) -> np.ndarray:
    """Return the rank of each element in its group (0, 1, ...), by ``order_N`` or by position, int64 [N]."""
    sorted_N = np.argsort(groups_N, kind="stable") if order_N is None else np.lexsort((order_N, groups_N))
    rank_N = np.empty(len(groups_N), dtype=np.int64)
    rank_N[sorted_N] = positions(np.bincount(groups_N))
    return rank_N


@dataclass(frozen=True)
class Ragged:
    """C rows of different lengths: row i is ``values[offsets[i]:offsets[i + 1]]``."""

    offsets: np.ndarray  # int64 [C + 1]
    values: np.ndarray  # int64 [total]

    @classmethod
    def from_lengths(cls, lengths: Sequence[int] | np.ndarray, values: np.ndarray) -> Ragged:
        """Cut an array into consecutive rows of the given lengths."""
        return cls(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), np.asarray(values, dtype=np.int64))

    @classmethod
    def from_rows(cls, rows: Sequence[np.ndarray]) -> Ragged:
        """Join a list of index arrays."""
        return cls.from_lengths([len(row) for row in rows], np.concatenate([np.empty(0, dtype=np.int64), *rows]))

    @classmethod
    def from_pairs(cls, row_numbers: np.ndarray, values: np.ndarray, rows: int) -> Ragged:
        """Group values by row number (0..rows - 1), without a loop; values of a row keep their order."""
        order = np.argsort(row_numbers, kind="stable")
        return cls.from_lengths(np.bincount(row_numbers, minlength=rows), np.asarray(values)[order])

    @classmethod
    def empty(cls, rows: int) -> Ragged:
        """Return rows without values."""
        return cls.from_lengths(np.zeros(rows), np.empty(0))

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

    def where(self, keep: np.ndarray) -> Ragged:
        """Return the same rows with only the values marked in ``keep``, bool [total]."""
        return Ragged.from_lengths(np.bincount(self.row_numbers[keep], minlength=len(self)), self.values[keep])

    def padded(self, rows: np.ndarray, width: int) -> np.ndarray:
        """Return the first ``width`` values of some rows, int64 [len(rows), width], padded with -1."""
        place = self.offsets[rows, None] + np.arange(width)
        real = place < self.offsets[rows + 1, None]
        padded = np.full(real.shape, -1, dtype=np.int64)
        padded[real] = self.values[place[real]]
        return padded


@dataclass(frozen=True)
class Clients:
    """A partition: one entry per client and, for each role, the numbers of its images."""

    ids: np.ndarray  # text [C]
    types: np.ndarray  # text [C], for example the parent category
    train: Ragged
    val: Ragged
    test: Ragged
    in_time: bool = False  # whether the images of a client are in the order of time

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
        """Group images by client and role; takes the time of sorting the images, for any number of clients.

        Args:
            ids, types: of every client, text [C].
            client_M: number of every image's client, -1 for none.
            role_M: number of every image's role in `ROLES`, -1 for none.
            order_M: sort key of a client's images, ascending. None, and ties: by image number.
            in_time: whether ``order_M`` is the order of time.
        """
        position_M = np.arange(len(client_M)) if order_M is None else np.argsort(order_M, kind="stable")
        client_M, role_M = client_M[position_M], role_M[position_M]
        used = {role: (role_M == r) & (client_M >= 0) for r, role in enumerate(ROLES)}
        rows = {r: Ragged.from_pairs(client_M[u], position_M[u], len(ids)) for r, u in used.items()}
        return cls(ids, types, **rows, in_time=in_time)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, role: str) -> Ragged:
        return {"train": self.train, "val": self.val, "test": self.test}[role]

    def statistics(self, labels: np.ndarray) -> pd.DataFrame:
        """Return one row per role: clients, images, distinct images, images and classes per client (mean, sd).

        ``labels`` is int64 [M], or 0/1 [M, K] of a multi-label task.
        """
        rows = []
        for role in ROLES:
            has = self[role].lengths > 0
            if not has.any():
                continue
            counts = {"images": self[role].lengths[has], "classes": self.classes_per_client(labels, role)[has]}
            row = {"role": role, "clients": int(has.sum()), "images": int(counts["images"].sum())}
            row["distinct_images"] = len(pd.unique(self[role].values))
            for name, count in counts.items():
                row |= {f"{name}_mean": float(count.mean()), f"{name}_sd": float(count.std())}
            rows.append(row)
        return pd.DataFrame(rows)

    def classes_per_client(self, labels: np.ndarray, role: str) -> np.ndarray:
        """Return the number of distinct classes among each client's images of ``role``, int64 [C].

        ``labels`` is int64 [M], or 0/1 [M, K] of a multi-label task, where all attributes of an image count.
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
        train, val, test = (self[role].where(~bad_M[self[role].values]) for role in ROLES)
        return replace(self, train=train, val=val, test=test)

    def save(self, path: Path) -> None:
        """Write one row per client: client, type and a list column of image numbers for each role."""
        columns = {"client": pa.array(self.ids.tolist(), pa.string())}
        columns["client_type"] = pa.array(self.types.tolist(), pa.string())
        columns |= {role: pa.LargeListArray.from_arrays(self[role].offsets, self[role].values) for role in ROLES}
        with atomic_write(path, "wb") as file:
            pq.write_table(pa.table(columns, metadata={_IN_TIME: str(int(self.in_time))}), file)

    @classmethod
    def load(cls, path: Path) -> Clients:
        """Read what `save` wrote. Raises a `UserError` that names a file that is missing or damaged."""
        verify(path)
        try:
            return cls._read(path)
        except Exception as error:  # Arrow raises several kinds, and another table has other columns
            raise UserError(f"{path}: cannot be read ({first_line(error)}); repeat the command") from error

    @classmethod
    def _read(cls, path: Path) -> Clients:
        table = pq.read_table(path).combine_chunks()
        ids, types = (np.array(table[name].to_pylist(), dtype=object) for name in ("client", "client_type"))
        lists = {role: table[role].combine_chunks() for role in ROLES}
        roles = {role: Ragged(c.offsets.to_numpy(), c.values.to_numpy()) for role, c in lists.items()}
        in_time = (table.schema.metadata or {}).get(_IN_TIME.encode()) == b"1"
        return cls(ids, types, **roles, in_time=in_time)
