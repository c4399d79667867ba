"""Latency: the time of one request in onnxruntime, of the backbone and of what the method adds."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from iciia_exp.errors import UserError
from iciia_exp.serving.programs import Program, onnx_session
from iciia_exp.serving.run import Run

__all__ = ["measure", "processor"]

_THREADS = (1, 2)
_CALLS = (30, 1000)  # fewest and most of a measurement
_SECONDS = 1.0


def measure(run: Run, folder: Path, programs: Sequence[Program]) -> dict[str, Any]:
    """Return the milliseconds of a request of one client, by program and number of threads.

    ``step`` has the longest past that training has seen, ``together`` a chunk of training. ``added_percent`` is the
    step's time as a share of the backbone's, and ``added_macs_percent`` its share of the backbone's MACs.
    """
    threads = [number for number in _THREADS if number <= (os.cpu_count() or 1)]
    images = {"together": run.images}
    times: dict[str, dict[str, dict[str, float]]] = {}
    for program in programs:
        given = program.example(1, images.get(program.name, max(1, run.images - 1)))
        feed = dict(zip(program.inputs, (t.numpy() for t in given), strict=True))
        for ending in (".onnx", ".int8.onnx"):
            path = folder / f"{program.name}{ending}"
            if path.is_file():
                name = path.name.removesuffix(".onnx")
                times[name] = {str(number): _milliseconds(path, feed, number) for number in threads}
    found = {"processor": processor(), "past": max(1, run.images - 1), "milliseconds": times}
    adds = next(name for name in ("step", "classify") if name in times)
    if "backbone" in times:
        found["added_percent"] = {
            number: 100 * times[adds][number]["median"] / times["backbone"][number]["median"] for number in times[adds]
        }
        found["added_macs_percent"] = _added_macs(run)
    return found


def _added_macs(run: Run) -> float | None:
    """Return the MACs of one more image as a share of the backbone's, in percent; None if they are not known."""
    try:
        row = run.results
    except UserError:
        return None
    one_more, backbone = row["streaming_macs"], row["backbone_macs"]
    one_more = row["sequence_macs"] if one_more is None else one_more
    return 100 * one_more / backbone if backbone and one_more is not None else None


def _milliseconds(path: Path, feed: dict[str, np.ndarray], threads: int) -> dict[str, float]:
    """Return the median and the 90th percentile of calls, after some that are not counted."""
    session = onnx_session(path, threads)
    seconds: list[float] = []
    for _ in range(10):
        session.run(None, feed)
    start = time.perf_counter()
    while len(seconds) < _CALLS[0] or (len(seconds) < _CALLS[1] and time.perf_counter() - start < _SECONDS):
        before = time.perf_counter()
        session.run(None, feed)
        seconds.append(time.perf_counter() - before)
    middle, high = np.percentile(1000 * np.array(seconds), [50, 90])
    return {"median": round(float(middle), 4), "p90": round(float(high), 4)}


def processor() -> str:
    """Return the name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
