"""Several batches at a time on a processor: what small batches want."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

__all__ = ["side_by_side"]

# Python itself runs one thread at a time: of a batch it takes about a tenth.
_WORKERS = 4

_Item = TypeVar("_Item")
_Made = TypeVar("_Made")


def side_by_side(make: Callable[[_Item], _Made], items: Iterable[_Item]) -> Iterator[_Made]:
    """Yield what ``make`` makes of every item, in their order, several at a time, each with its share of the threads.

    Threads that share an operation wait for each other at its end, and it ends often where batches are small enough for
    a processor's cache. ``make`` runs without gradients and must leave what it uses as it is. Until the iterator ends,
    PyTorch's operations have that share of its threads in the whole process.
    """
    threads = torch.get_num_threads()
    workers = min(threads, _WORKERS)

    def work(item: _Item) -> _Made:
        with torch.inference_mode():  # every thread has its own
            return make(item)

    if workers == 1:
        yield from map(work, items)
        return
    torch.set_num_threads(threads // workers)
    try:
        with ThreadPoolExecutor(workers) as pool:
            waiting: deque[Future[_Made]] = deque()
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    finally:
        torch.set_num_threads(threads)
