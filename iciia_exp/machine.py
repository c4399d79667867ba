"""Machine: threads, memory and processes."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

from iciia_exp.errors import UserError, first_line

__all__ = ["keep_freed_memory", "plain_errors", "process_count", "process_rank", "side_by_side"]

_Item = TypeVar("_Item")
_Made = TypeVar("_Made")


def side_by_side(
    make: Callable[[_Item], _Made], items: Iterable[_Item], most: int = 4, ahead: int = 1
) -> Iterator[_Made]:
    """Yield what ``make`` makes of every item, in their order, several at a time, each with its share of the threads.

    Threads that share an operation wait for each other at its end, and it ends often where batches are small enough for
    a processor's cache. ``make`` runs without gradients and must leave what it uses as it is.

    Args:
        make: called in threads of its own.
        items: asked for as they are needed.
        most: items at a time; more wait for each other, since Python itself runs one thread at a time.
        ahead: items for each of them that are made, or being made, before they are asked for.
    """
    threads = torch.get_num_threads()
    workers = min(threads, most)

    def work(item: _Item) -> _Made:
        with torch.inference_mode():  # every thread has its own
            return make(item)

    waiting: deque[Future[_Made]] = deque()
    pool = ThreadPoolExecutor(workers, "side_by_side", torch.set_num_threads, (threads // workers,))
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > ahead * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def keep_freed_memory() -> None:
    """Let up to half a gigabyte of freed memory stay with the process, and those it starts; a user's settings stay.

    Else glibc gives the megabytes of an intermediate result back to the system and gets them again for the next one,
    zeroed page by page, which takes about as long as computing what is in them (benchmarks/bench_iciia.py).
    """
    if "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ):
        return
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library has its own ways
        mallopt = ctypes.CDLL(None).mallopt
        for name, (number, value) in _SETTINGS.items():
            mallopt(number, value)
            os.environ[name] = str(value)


_MIB = 1 << 20


#: glibc's names of what is set, its numbers for them (malloc.h), and the values in bytes
_SETTINGS = {
    "MALLOC_MMAP_THRESHOLD_": (-3, 256 * _MIB),
    "MALLOC_TRIM_THRESHOLD_": (-1, 512 * _MIB),
    "MALLOC_TOP_PAD_": (-2, 64 * _MIB),
}


# what a traceback says of an error of ours
_OURS = re.compile(r"iciia_exp\.errors\.(?:User|Config)Error: ")


def _started() -> tuple[int, int]:
    for rank, count in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
        if (number := int(os.environ.get(count) or 1)) > 1:
            return int(os.environ.get(rank) or 0), number
    return 0, 1


def process_rank() -> int:
    """Return the number of this process where torchrun or srun started several, else 0."""
    return _started()[0]


def process_count() -> int:
    """Return how many processes torchrun or srun started, else 1."""
    return _started()[1]


@contextmanager
def plain_errors(what: str) -> Iterator[None]:
    """Raise an error of ours from a process below as itself: torch hands it up inside its own, as tracebacks.

    ``what`` names, for other errors, the key that asked for the processes.
    """
    try:
        yield
    except Exception as error:
        text = str(error)
        if found := list(_OURS.finditer(text)):
            raise UserError(text[found[-1].end() :].strip()) from error
        if type(error).__name__ == "ProcessExitedException":  # killed, by the system for its memory say
            raise UserError(f"{what}: {first_line(error)}; the same command goes on from here") from error
        raise
