"""Content of a dataset's files: digests of their bytes, computed once and checked by size and times.

The digests of a folder's files are kept in ``<folder>/content-<digest of its path>.parquet``. A file is read again if
its size, its time of modification or its time of change (of the inode, which no program can set) is another. So a
million files cost a request each, some seconds on a local disk, and are not read again.
"""

import contextlib
import hashlib
import logging
import os
import stat
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from iciia_exp.artifacts import atomic_write
from iciia_exp.digest import digest

__all__ = ["Content", "bytes_digest", "row_digests"]

log = logging.getLogger(__name__)

#: A file that was changed so shortly before it was read, in seconds, is read again the next time: file systems give
#: changes within some milliseconds the same time.
_FRESH = 2.0
_MANY = 10_000  # files whose reading is said
_BLOCK = 64  # files that a thread reads at a time
_COLUMNS = ("size", "modified", "changed")


def bytes_digest(path: Path) -> bytes:
    """Return the SHA-256 of a file, 32 bytes; empty if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError:
        return b""


def row_digests(rows: np.ndarray) -> np.ndarray:
    """Return the first 64 bits of a digest of every row of an array [n, ...], int64 [n]."""
    found = b"".join(hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in rows)
    return np.frombuffer(found, dtype="<i8").astype(np.int64)


class Content:
    """Digests of the content of files, kept in a folder.

    Args:
        folder: where they are kept; None computes all of them each time.
        progress: called with an iterable and its length, returns the iterable: a progress bar.
    """

    def __init__(
        self, folder: Path | None, progress: Callable[[Iterable[Any], int], Iterable[Any]] = lambda items, _: items
    ) -> None:
        self.folder, self._progress = folder, progress

    def of(
        self, root: Path, paths: Sequence[str], read: Callable[[Path], bytes] = bytes_digest, what: str = "bytes"
    ) -> str:
        """Return a digest of the names and the content of some files, which does not depend on ``root``.

        Args:
            root: their folder.
            paths: relative to it, in a fixed order. A file that is missing counts as an empty one.
            read: returns a digest of a file's content, 8 bytes or more.
            what: that ``read`` reads, in words; digests are kept apart by it.
        """
        names = np.asarray(paths, dtype=object)
        return self.joined(names, self.each(root, names, read, what))

    @staticmethod
    def joined(names: Sequence[str] | np.ndarray, values: np.ndarray) -> str:
        """Return a digest of names and of what `each` returns for them."""
        whole = hashlib.sha256(b"\0".join(map(os.fsencode, names)))
        whole.update(values.astype("<i8").tobytes())
        return whole.hexdigest()[:16]

    def of_one(self, path: Path, read: Callable[[Path], bytes] = bytes_digest, what: str = "bytes") -> str:
        """Return a digest of the content of one file, which does not depend on its name."""
        (value,) = self.each(path.parent, [path.name], read, what)
        return f"{int(value) & (1 << 64) - 1:016x}"

    def each(
        self, root: Path, paths: Sequence[str] | np.ndarray, read: Callable[[Path], bytes], what: str
    ) -> np.ndarray:
        """Return the first 64 bits of the digest of every file, int64 [M]; 0 where it is missing."""
        names = np.asarray(paths, dtype=object)
        place = digest([os.fsencode(root.absolute()).hex(), what])
        now = np.array([_status(root, name) for name in names], dtype=np.int64).reshape(-1, 3)
        file = None if self.folder is None else self.folder / f"content-{place}.parquet"
        values, known = _known(file, names, now)
        if not len(missing := np.flatnonzero(~known)):
            return values
        if len(missing) >= _MANY:
            log.info("reading %s files of %s once, for a digest of their content", f"{len(missing):,}", root)
        start, blocks = time.time_ns(), np.array_split(missing, -(-len(missing) // _BLOCK))

        def work(block: np.ndarray) -> list[int]:
            return [int.from_bytes(read(root / names[i])[:8], "little", signed=True) for i in block]

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for block, found in zip(blocks, self._progress(pool.map(work, blocks), len(blocks)), strict=True):
                values[block] = found
        if file is not None:
            settled = now[:, 1:].max(1) < start - int(_FRESH * 1e9)
            _keep(file, names[settled], now[settled], values[settled])
        return values


def _status(root: Path, name: str) -> tuple[int, int, int]:
    try:
        status = os.stat(f"{root}/{name}")
    except OSError:
        return -1, 0, 0
    if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for ever
        return -1, 0, 0
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _known(file: Path | None, names: np.ndarray, now: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the kept digests, int64 [M], and which of them still hold, bool [M]."""
    values, known = np.zeros(len(names), dtype=np.int64), now[:, 0] < 0  # a missing file has no content
    kept = _read(file)
    if kept is None:
        return values, known
    rows = pd.Index(kept["path"]).get_indexer(pd.Index(_encoded(names)))
    then, content = kept[list(_COLUMNS)].to_numpy(), kept["content"].to_numpy()
    same = rows >= 0
    same[same] = (then[rows[same]] == now[same]).all(1)
    values[same] = content[rows[same]]
    return values, known | same


def _keep(file: Path, names: np.ndarray, now: np.ndarray, values: np.ndarray) -> None:
    """Write digests, beside those of other files of the folder; without a place to write, they are computed again."""
    there = now[:, 0] >= 0
    columns = {"path": _encoded(names), **dict(zip(_COLUMNS, now.T, strict=True)), "content": values}
    table, before = pd.DataFrame(columns)[there], _read(file)
    if before is not None:
        table = pd.concat([before[~before["path"].isin(table["path"])], table])
    with contextlib.suppress(OSError), atomic_write(file, "wb") as out:
        table.to_parquet(out, index=False)


def _encoded(names: np.ndarray) -> list[bytes]:
    return [os.fsencode(name) for name in names]  # a name may not be UTF-8


def _read(file: Path | None) -> pd.DataFrame | None:
    """Return the kept table; None if there is none, or none of the right form."""
    if file is None or not file.is_file():
        return None
    try:
        table = pd.read_parquet(file, columns=["path", *_COLUMNS, "content"])
        return table.astype(dict.fromkeys((*_COLUMNS, "content"), np.int64)).drop_duplicates("path")
    except Exception as error:  # damaged: pyarrow raises several kinds
        log.warning("%s: cannot be read (%s); reading the dataset's files again", file, type(error).__name__)
        return None
