"""Quantisation: exported programs with weights of 8 bits, and what they cost in accuracy.

Legend: C clients, S images of a client, D features, K classes.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from iciia_exp.data.batches import ClientBatch, ClientIndex, FeatureBatches, cut_chunks
from iciia_exp.data.dataset import dense_labels
from iciia_exp.errors import UserError
from iciia_exp.methods.tune.base import Personal
from iciia_exp.serving.programs import Program, onnx_session
from iciia_exp.serving.run import Run

__all__ = ["quantize"]

_CHUNKS = 64  # of a batch


def quantize(run: Run, folder: Path, programs: Sequence[Program]) -> dict[str, Any]:
    """Write every program of a folder once more, as NAME.int8.onnx, by onnxruntime's dynamic quantisation.

    Returns ``bytes`` by program, and ``accuracy`` and ``accuracy_int8`` over the images of the run's test clients; None
    if the features are not in the cache.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    sizes = {}
    with _quiet():
        for program in programs:
            path = folder / f"{program.name}.int8.onnx"
            quantize_dynamic(folder / f"{program.name}.onnx", path, weight_type=QuantType.QInt8)
            sizes[program.name] = path.stat().st_size
    name = next(p.name for p in programs if p.name in ("together", "classify"))
    found: dict[str, Any] = {"bytes": sizes, "accuracy": None, "accuracy_int8": None}
    try:
        batches = test_batches(run)
    except UserError:
        return found
    for key, ending in (("accuracy", ".onnx"), ("accuracy_int8", ".int8.onnx")):
        session = onnx_session(folder / f"{name}{ending}")
        right, total = 0.0, 0
        for batch in batches:
            logits = _logits(run, session, batch)
            labels = batch.y_CS[batch.mask_CS]
            right += float(run.method.task.correct(logits, labels).sum())
            total += labels.numel()
        found[key] = right / total
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what onnxruntime logs: advice to take steps that need other packages."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)


def test_batches(run: Run) -> list[ClientBatch]:
    """Return the test images of the run's clients, in chunks as in its evaluation."""
    store = run.features
    labels = dense_labels(store.table["label"], run.method.task, len(run.class_names))
    extra = sorted(run.method.reads - {"features"})
    batches = FeatureBatches(store.array(), labels, arrays={name: store.array(name) for name in extra})
    size = 1 if isinstance(run.method, Personal) else run.images
    index_CS, client_C = cut_chunks(run.partition.test, size)
    parts = [slice(at, at + _CHUNKS) for at in range(0, len(client_C), _CHUNKS)]
    return [batches[ClientIndex(index_CS[part], client_C[part])] for part in parts]


def _logits(run: Run, session: Any, batch: ClientBatch) -> torch.Tensor:
    """Return the logits of the real images of a batch."""

    def call(given: dict[str, np.ndarray]) -> np.ndarray:
        return session.run(None, given)[0]

    x, mask = batch.x_CSD.float(), batch.mask_CS
    method = run.method
    if isinstance(method, Personal):
        given = {name: array[:, 0].float().numpy() for name, array in batch.arrays.items()}
        given |= {name: state.numpy() for name, state in method.states_of(batch.client_C).items()}
        return torch.from_numpy(call({"features": x[:, 0].numpy(), **given}))
    if method.state_width == 0:  # every image by itself
        return torch.from_numpy(call({"features": x[mask].numpy()}))
    return torch.from_numpy(call({"features": x.numpy(), "mask": mask.numpy()}))[mask]
