"""Machine: threads, memory and processes."""

import contextlib
import ctypes
import os
import re
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from iciia_exp.errors import ConfigError, UserError, first_line

__all__ = [
    *("check_started", "end_with_parent", "keep_freed_memory", "plain_errors", "process_count", "process_rank"),
    *("side_by_side", "wait_for_others"),
]

_Item = TypeVar("_Item")
_Made = TypeVar("_Made")


_MIB = 1 << 20

#: glibc's names of its settings, its numbers for them (malloc.h), and their values in bytes
_SETTINGS = {
    "MALLOC_MMAP_THRESHOLD_": (-3, 256 * _MIB),
    "MALLOC_TRIM_THRESHOLD_": (-1, 512 * _MIB),
    "MALLOC_TOP_PAD_": (-2, 64 * _MIB),
}

# the name of the package's errors in a traceback
_ERROR = re.compile(r"iciia_exp\.errors\.(?:User|Config)Error: ")


def side_by_side(
    make: Callable[[_Item], _Made], items: Iterable[_Item], most: int = 4, ahead: int = 1
) -> Iterator[_Made]:
    """Yield ``make(item)`` of every item, in order; several run at a time, each with its share of the threads.

    This is faster than one item at a time with all threads: these wait for each other at the end of every operation,
    often where batches fit a processor's cache. ``make`` runs without gradients and must change nothing that it uses.

    Args:
        make: called in a pool of threads.
        items: read as they are needed.
        most: items at a time; more would wait for each other, since Python itself runs one thread at a time.
        ahead: results per thread that are made, or being made, before they are asked for.
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
    """Let the process, and those that it starts, keep up to half a gigabyte of freed memory.

    Otherwise glibc returns the megabytes of every intermediate result to the system and gets them back zeroed page by
    page, which takes about as long as computing the result (benchmarks/bench_iciia.py). A user's own settings of glibc
    are left as they are.
    """
    if "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ):
        return
    with contextlib.suppress(AttributeError, OSError, TypeError):  # not glibc
        mallopt = ctypes.CDLL(None).mallopt
        for name, (number, value) in _SETTINGS.items():
            mallopt(number, value)
            os.environ[name] = str(value)


def _rank_and_count() -> tuple[int, int]:
    found = [("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")]
    if os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive"):  # a shell of salloc or srun --pty, as for Lightning
        found.pop()
    for rank, count in found:
        if (number := _environment_number(count, 1)) > 1:
            return _environment_number(rank, 0), number
    return 0, 1


def _environment_number(name: str, otherwise: int) -> int:
    text = os.environ.get(name) or str(otherwise)
    if not text.isdecimal():
        raise UserError(f"{name}={text}: must be a whole number, as torchrun and srun set it; or unset it")
    return int(text)


def end_with_parent(every: float = 1.0) -> None:
    """End this process soon after its parent has ended, which a process of a killed sweep would survive.

    The parent is the process of the command line (``ICIIA_EXP_MAIN``), which may have ended before this is called.
    """
    parent = int(os.environ.get("ICIIA_EXP_MAIN") or os.getppid())

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(every)
        os.kill(os.getpid(), signal.SIGKILL)  # Lightning handles SIGTERM, and trains on

    threading.Thread(target=watch, daemon=True, name="end with parent").start()


def process_rank() -> int:
    """Return the rank of this process if torchrun or srun started several, else 0."""
    return _rank_and_count()[0]


def wait_for_others() -> None:
    """Wait until all processes that train together are here."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def process_count() -> int:
    """Return the number of processes that torchrun or srun started, else 1."""
    return _rank_and_count()[1]


def check_started(group: str, devices: Any, num_nodes: int, wanted: int, or_alone: bool = False) -> None:
    """Raise a `ConfigError` unless torchrun or srun started the processes that a configuration wants.

    Args:
        group: of the configuration, with the keys ``devices`` and ``num_nodes``.
        devices, num_nodes: their values.
        wanted: number of processes over all machines.
        or_alone: whether one process may do the work alone, whatever was started.
    """
    started = process_count()
    if started > 1 and started != wanted and not (or_alone and wanted == 1):
        number = "1 or as many" if or_alone else "as many"
        problem = f"torchrun or SLURM says {started} processes; devices times num_nodes must be {number}"
        raise ConfigError(f"{group}.devices", devices, problem)
    if num_nodes > 1 and started == 1:
        problem = f"start the same command on each machine with torchrun or srun, {wanted} processes in all"
        raise ConfigError(f"{group}.num_nodes", num_nodes, problem)


@contextlib.contextmanager
def plain_errors(what: str) -> Iterator[None]:
    """Raise a `UserError` of a child process as itself: torch wraps it in an error that quotes the traceback.

    ``what`` is the key that asked for the processes; it is named in the error of a process that was killed.
    """
    try:
        yield
    except Exception as error:
        *_, last = _ERROR.split(text := str(error))
        if last != text:
            raise UserError(last.strip()) from error
        if type(error).__name__ == "ProcessExitedException":  # killed, for example by the system for its memory
            raise UserError(f"{what}: {first_line(error)}; the same command goes on from here") from error
        raise
