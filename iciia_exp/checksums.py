"""Checksums: whether the files of a finished artifact are those that were written.

``checksums.json`` of a finished folder lists size and SHA-256 of its files, and is written after them. A folder of
which a file is missing or of another size is made again. A file with another content raises an error when it is opened.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import stat
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

from iciia_exp.errors import UserError

__all__ = ["CHECKSUMS", "changed", "checksums_of", "sha256", "verify", "verify_folder"]

log = logging.getLogger(__name__)

CHECKSUMS = "checksums.json"

_LIVE = {"run.log", CHECKSUMS}  # later jobs add to them
_BLOCK = 64 << 20  # bytes of a large file that a thread reads
_LARGE = 4 << 30  # bytes of a file whose check is said


def checksums_of(folder: Path) -> str:
    """Return the content of ``checksums.json`` for the files of a folder, without hidden ones and folders in it."""
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_file() and not entry.name.startswith("."))
    files = {name: [os.path.getsize(folder / name), sha256(folder / name)] for name in names if name not in _LIVE}
    return json.dumps({"format": 1, "files": files}, indent=2) + "\n"


def changed(folder: Path) -> list[str]:
    """Return the names of the listed files that are missing or of another size; empty without a list."""
    return [name for name, (size, _) in _listed(folder).items() if _size(folder / name) != size]


def verify_folder(folder: Path) -> None:
    """Raise a `UserError` if a listed file is missing, or not what was written."""
    if lost := changed(folder):
        raise UserError(f"{folder}: {', '.join(lost)} missing or cut off; repeat the command to make it again")
    for name in _listed(folder):
        verify(folder / name)


def verify(path: Path) -> None:
    """Raise a `UserError` if a file is not what the list of its folder says; a file is read once a process."""
    if (listed := _listed(path.parent).get(path.name)) is None:
        return
    try:
        status = path.stat()
    except OSError:
        return  # whoever opens it says so
    if not stat.S_ISREG(status.st_mode):
        return
    _compare(path, listed, status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns)


@lru_cache(100_000)
def _compare(path: Path, listed: tuple[int, str], size: int, *identity: int) -> None:
    if size >= _LARGE:
        log.info("checking %s (%.0f GB)", path, size / 1e9)
    if (size, sha256(path)) != listed:
        problem = "is not what was written: it has been damaged or edited"
        raise UserError(f"{path}: {problem}; delete {path.parent} and repeat the command")


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits; of a large one that of the SHA-256s of its blocks."""
    size = path.stat().st_size
    if size <= _BLOCK:
        return hashlib.sha256(path.read_bytes()).hexdigest()

    def block(start: int) -> bytes:
        with open(path, "rb") as file:
            file.seek(start)
            return hashlib.sha256(file.read(_BLOCK)).digest()

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return hashlib.sha256(b"".join(pool.map(block, range(0, size, _BLOCK)))).hexdigest()


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _listed(folder: Path) -> dict[str, tuple[int, str]]:
    """Return size and SHA-256 of the listed files of a folder; raises a `UserError` for a damaged list."""
    path = folder / CHECKSUMS
    try:
        status = path.stat()
    except OSError:
        return {}
    return _parsed(path, status.st_ino, status.st_size, status.st_mtime_ns)


@lru_cache(10_000)
def _parsed(path: Path, *identity: int) -> dict[str, tuple[int, str]]:
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
        found = {str(name): (int(size), str(value)) for name, (size, value) in files.items()}
        if not all(re.fullmatch(r"[^/\\]+", name) and len(value) == 64 for name, (_, value) in found.items()):
            raise ValueError("has other names or checksums")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise UserError(f"{path}: cannot be read ({error}); delete {path.parent} and repeat the command") from error
    return found
