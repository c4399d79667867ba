"""Artifacts: files and folders on disk that are complete or absent, made by one process at a time.

An unfinished folder is ``<name>.partial`` beside its final place. It survives a kill, so that the next process can
continue; nothing reads it. The operating system releases the lock ``.<name>.lock`` when the process that holds it dies.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import platformdirs
from filelock import FileLock, Timeout
from rich.filesize import decimal

from iciia_exp.checksums import CHECKSUMS, changed, checksums_of, verify
from iciia_exp.errors import UserError, first_line

if sys.platform != "win32":
    import fcntl

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from torch import Tensor

__all__ = [
    *("allocate", "atomic_write", "finished_folder", "folder_name", "in_use", "is_temporary", "load_tensors"),
    *("locked", "make_folder", "partial_folder", "read_array", "read_json", "read_parquet", "replacing_folder"),
    *("resolve_cache_dir", "save_tensors", "unused", "write_json"),
]

log = logging.getLogger(__name__)

#: Errors of a file system that cannot allocate blocks ahead.
_NO_ALLOCATION = {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.ENODEV, errno.EPERM}


@contextlib.contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold the lock beside ``path``. If another process holds it, log that ``what`` is being made, and wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(_makers_lock(path))
    try:
        held = lock.acquire(timeout=0)
    except Timeout:
        log.info("waiting for another process that is making %s", what)
        held = lock.acquire()
    with held:
        yield


@contextlib.contextmanager
def in_use(path: Path) -> Iterator[None]:
    """Keep ``python -m iciia_exp.cache clean`` from deleting a finished folder while it is read in the block.

    The lock is not the one of those that make the folder: they would wait until all readers have ended.
    """
    with contextlib.ExitStack() as held:
        if sys.platform != "win32":  # whose locks cannot be shared
            with contextlib.suppress(OSError):  # read-only, or being deleted
                lock = os.open(_readers_lock(path), os.O_RDONLY | os.O_CREAT, 0o666)
                held.callback(os.close, lock)
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield


@contextlib.contextmanager
def unused(path: Path) -> Iterator[None]:
    """Hold a folder that no process makes or reads. Raises `filelock.Timeout` if one does."""
    with FileLock(_makers_lock(path), timeout=0), FileLock(_readers_lock(path), timeout=0):
        yield


def _makers_lock(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


def _readers_lock(path: Path) -> Path:
    return path.with_name(f".{path.name}.use.lock")


@contextlib.contextmanager
def atomic_write(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary file that replaces ``path`` when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    name, prefix = None, f".{path.name}."
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=prefix)
        with os.fdopen(handle, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # mkstemp makes files that only their owner can read
        os.replace(name, path)
    except BaseException as error:
        if name is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
        if not isinstance(error, OSError) or error.errno is None:
            raise
        if error.filename is None or Path(error.filename).name.startswith(prefix):  # a full disk; a folder is there
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def allocate(path: Path) -> None:
    """Give a file all of its blocks on the disk. Raises a `UserError` if the disk is too full.

    A write into a memory-mapped file without blocks ends the process ("Bus error") on a full disk.
    """
    if not hasattr(os, "posix_fallocate"):  # not on macOS and Windows
        return
    size = path.stat().st_size
    with open(path, "r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno in _NO_ALLOCATION:
                return
            free = shutil.disk_usage(path.parent).free
            why = f"the disk is full ({decimal(free)} free)" if error.errno == errno.ENOSPC else error.strerror
            raise UserError(f"{path}: needs {decimal(size)}, {why}; free some space and repeat the command") from error


def is_temporary(name: str, folder: Path, older: float = 3600.0) -> bool:
    """Return whether a file was left by a kill within `atomic_write`, ``older`` seconds ago or more."""
    if not re.fullmatch(r"\..+\.[a-z0-9_]{8}", name):
        return False
    try:
        return time.time() - (folder / name).lstat().st_mtime >= older
    except OSError:
        return False


def _plain(value: Any) -> Any:
    """Return a value with None for NaN and infinity, which strict JSON does not have."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented strict JSON, atomically; NaN and infinity become null."""
    with atomic_write(path) as file:
        json.dump(_plain(value), file, indent=2, ensure_ascii=False, allow_nan=False)
        file.write("\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises a `UserError` that names a file that is missing or damaged."""
    verify(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); repeat the command") from error
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or nested too deep
        raise UserError(f"{path}: not valid JSON ({error}); delete it and repeat the command") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, not {type(value).__name__}; delete it and repeat the command")
    return value


def read_parquet(path: Path, columns: list[str] | None = None) -> pd.DataFrame:
    """Read a table. Raises a `UserError` that names a file that is missing or damaged."""
    import pandas as pd

    verify(path)
    try:
        return pd.read_parquet(path, columns=columns)
    except Exception as error:  # Arrow raises several kinds
        hint = "delete its folder and repeat the command"
        raise UserError(f"{path}: cannot be read ({first_line(error)}); {hint}") from error


def read_array(path: Path, mmap: bool = True) -> np.ndarray:
    """Read an array, or map it into memory. Raises a `UserError` that names a file that is missing or damaged."""
    import numpy as np

    verify(path)
    try:
        return np.load(path, mmap_mode="r" if mmap else None, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        hint = "delete its folder and repeat the command"
        raise UserError(f"{path}: cannot be read ({first_line(error)}); {hint}") from error


def finished_folder(path: Path, last: str = "manifest.json", in_place: bool = False) -> bool:
    """Return whether the artifact at ``path`` is complete: ``last`` and all files that its checksums list.

    Of one that was built ``in_place`` the checksums must be there: a kill may have come before them.
    """
    return (path / last).is_file() and (not in_place or (path / CHECKSUMS).is_file()) and not changed(path)


def folder_name(text: str) -> str:
    """Return a text as a part of a folder's name: without separators, no hidden name, at most 100 characters.

    >>> folder_name("../hf-hub:timm/vit")
    'hf-hub_timm_vit'
    """
    return re.sub(r"[^\w.\-]+", "_", text).strip("._")[:100]


def partial_folder(path: Path) -> Path:
    """Return the folder ``<path>.partial``, as an earlier process left it, or new."""
    partial = path.with_name(path.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    return partial


def make_folder(
    path: Path,
    what: str,
    build: Callable[[Path], None],
    last: str = "manifest.json",
    in_place: bool = False,
    together: bool = False,
) -> bool:
    """Make the folder ``path`` by ``build(folder)`` unless it exists; return whether this call made it.

    Args:
        path: the finished folder.
        what: the folder in words, for the log line of a process that waits.
        build: fills ``<path>.partial`` (or ``path`` itself with ``in_place``), where an earlier, killed build may have
            left files, and must write ``last`` as its last file; checksums follow it.
        last: name of the file without which the folder is unfinished.
        in_place: build in ``path`` itself: its parts are complete one by one, or loggers keep files open there.
        together: several processes may build it at a time; ``build`` has locks of its own.
    """
    if finished_folder(path, last, in_place):
        return False
    with contextlib.nullcontext() if together else locked(path, what):
        if finished_folder(path, last, in_place):  # another process made it while this one waited
            return False
        if (path / last).is_file() and (lost := changed(path)):
            log.warning("%s: %s missing or cut off; making it again", path, ", ".join(lost))
            (path / last).unlink()
            (path / CHECKSUMS).unlink(missing_ok=True)
        folder = path if in_place else partial_folder(path)
        folder.mkdir(parents=True, exist_ok=True)
        if not in_place:  # in a cache of which others may only read
            _readers_lock(path).touch()
        if not together:  # nobody else writes into it
            for name in os.listdir(folder):
                if is_temporary(name, folder, older=0.0):
                    (folder / name).unlink()
        if not (folder / last).is_file():  # else checksums alone are missing, and nothing to continue from is left
            build(folder)
        if not (folder / last).is_file():
            raise RuntimeError(f"{what}: the build wrote no {last} into {folder}")
        with atomic_write(folder / CHECKSUMS) as file:
            file.write(checksums_of(folder))
        if not in_place:
            if path.exists():  # a folder without its last file
                shutil.rmtree(path)
            os.replace(folder, path)
    return True


@contextlib.contextmanager
def replacing_folder(path: Path, sign: str, names: Iterable[str], what: str) -> Iterator[Path]:
    """Yield an empty folder that takes the place of ``path`` at the end of the block; after an error nothing is left.

    A folder that holds anything else is not replaced: a `UserError`.

    Args:
        path: of the folder, which may be new, empty, or one that was made before; or a link to one.
        sign: a file that such a folder always has.
        names: patterns of all names in such a folder.
        what: the folder in words, for the error.
    """
    given, path = path, path.resolve()
    if path == Path.cwd():
        raise UserError(f"{given}: is the working directory; choose a folder in it")
    if path.exists():
        there = sorted(os.listdir(path)) if path.is_dir() else [""]
        if there and sign not in there:
            raise UserError(f"{given}: is there, and is no {what}; choose another folder")
        if others := [name for name in there if not any(fnmatchcase(name, pattern) for pattern in names)]:
            raise UserError(f"{given}: has {others[0]}, which is no part of the {what}; choose another folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise UserError(f"{given}: cannot be written ({error.strerror}); choose another folder") from error
    with folder as scratch:
        made = Path(scratch) / "new"
        made.mkdir()
        yield made
        if path.exists():
            path.replace(Path(scratch) / "old")
        made.replace(path)


def resolve_cache_dir(cache_dir: str | None) -> Path:
    """Return the cache folder as an absolute path; None is the user's cache directory for this package."""
    if cache_dir is None:
        return Path(platformdirs.user_cache_dir("iciia_exp", appauthor=False))
    return Path(cache_dir).expanduser().resolve()


def save_tensors(path: Path, tensors: Mapping[str, Tensor], facts: dict[str, Any] | None = None) -> None:
    """Write tensors as safetensors, atomically, and with them plain ``facts`` as JSON under that name."""
    from safetensors.torch import save

    metadata = None if facts is None else {"facts": json.dumps(facts)}
    with atomic_write(path, "wb") as file:
        file.write(save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, metadata))


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file. Raises a `UserError` that names a file that cannot be read."""
    from safetensors.torch import load_file

    verify(path)
    try:
        return load_file(path)
    except Exception as error:  # safetensors raises several kinds
        raise UserError(f"{path}: cannot be read ({first_line(error)})") from error
