"""Several batches at a time on a processor: what small batches want."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

__all__ = ["side_by_side"]

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
