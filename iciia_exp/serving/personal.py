"""Personal serving: the state of one client of a method whose devices learn.

Legend: C clients, n images, D features, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iciia_exp.data.batches import ClientBatch
from iciia_exp.errors import UserError
from iciia_exp.ledger import Link, Sizes
from iciia_exp.methods.tune.base import Personal
from iciia_exp.serving.features import as_arrays, as_features
from iciia_exp.serving.run import Run
from iciia_exp.tasks import SINGLE_LABEL

__all__ = ["State", "classify", "learn", "stored"]

_OF_IMAGES = ("x_CSD", "y_CS", "mask_CS")

#: State of one client by name, [...] each.
State = dict[str, Tensor]


def stored(run: Run, client: str) -> State | None:
    """Return the state that a client of the partition has learned; None if it has none."""
    assert isinstance(run.method, Personal)
    if run.method.states is None:  # also of a repository, which has no partition
        return None
    numbers = (run.partition.ids == client).nonzero()[0]
    if not len(numbers) or not run.method.states.has(int(numbers[0])):
        return None
    return {name: state[0] for name, state in run.method.states_of(torch.from_numpy(numbers[:1])).items()}


def learn(
    run: Run,
    features: Any,
    labels: Any,
    val: Sequence[Any] | None,
    arrays: Mapping[str, Any] | None = None,
) -> State:
    """Return the state that a new client's labelled images give.

    Args:
        run: of a personal method.
        features: numbers [n, D], as a tensor, array or list.
        labels: of the images: whole numbers [n], or 0/1 [n, K] of a multi-label task.
        val: further features, labels and, where the method reads them, arrays, which choose the epoch; None: the last
            quarter of the images.
        arrays: what the method reads beside the features, [n, ...] by name.
    """
    method = run.method
    assert isinstance(method, Personal)
    if not method.learns_alone:
        problem = "learns with samples of other clients, which the cloud holds"
        raise UserError(f"{method.name}: {problem}; only clients of the run's partition can be served")
    train = _as_batch(run, features, labels, arrays)
    images = train.x_CSD.shape[1]
    if val is not None:
        if not isinstance(val, Sequence) or len(val) not in (2, 3):
            raise UserError("learn: val is a tuple (features, labels) or (features, labels, arrays)")
        own = {"train": train, "val": _as_batch(run, *val)}
    elif images < 2:
        raise UserError("learn: needs two labelled images at least, one to learn from and one to choose the epoch")
    else:
        cut = images - max(1, images // 4)
        parts = (("train", slice(0, cut)), ("val", slice(cut, None)))
        own = {
            role: train._replace(
                **{f: getattr(train, f)[:, part] for f in _OF_IMAGES},
                arrays={name: array[:, part] for name, array in train.arrays.items()},
            )
            for role, part in parts
        }
    sizes = Sizes(train=own["train"].x_CSD.shape[1], val=own["val"].x_CSD.shape[1])
    states = method.personalise(own, Link(method.name, method.budget(sizes)), None).states
    if wrong := [name for name, state in states.items() if not state.isfinite().all()]:
        raise UserError(f"learn: {wrong[0]} has numbers that are not finite; are the features those of the run?")
    return {name: state[0].detach() for name, state in states.items()}


def classify(
    method: Personal, x_CD: Tensor, arrays: Mapping[str, Tensor], states: Sequence[Mapping[str, Tensor]]
) -> Tensor:
    """Return the logits of one image of each client with its state, [C, K]; arrays are [C, ...]."""
    stacked = {name: torch.stack([state[name] for state in states]) for name in method.state_shapes}
    shape = (len(x_CD), 1)
    batch = ClientBatch(
        x_CD[:, None],
        torch.zeros(shape, dtype=torch.int64),
        torch.ones(shape, dtype=torch.bool),
        torch.full(shape[:1], -1),
        arrays={name: array[:, None] for name, array in arrays.items()},
    )
    return method.classify(batch, stacked)[:, 0]


def _as_batch(run: Run, features: Any, labels: Any, arrays: Mapping[str, Any] | None = None) -> ClientBatch:
    """Return the labelled images of one client; raises a `UserError` if they do not fit the method."""
    method = run.method
    features, classes = as_features(features, "learn", f"[n, {method.dim}]"), method.num_classes
    labels = labels if isinstance(labels, Tensor) else np.asarray(labels)
    if isinstance(labels, np.ndarray) and labels.dtype.kind in "iub":  # also big-endian, which torch refuses
        labels = torch.from_numpy(labels.astype(np.int64))
    if features.ndim != 2 or features.shape[1] != method.dim or not len(features):
        raise UserError(f"learn: expected features [n, {method.dim}] of at least one image, got {list(features.shape)}")
    if not features.isfinite().all():
        raise UserError("learn: features are not finite numbers")
    single = method.task == SINGLE_LABEL
    want = [len(features)] if single else [len(features), classes]
    if list(labels.shape) != want or not isinstance(labels, Tensor) or labels.is_floating_point():
        raise UserError(f"learn: expected labels {want} of whole numbers, got {labels.dtype} {list(labels.shape)}")
    labels, largest = labels.cpu().long(), classes if single else 2
    if labels.min() < 0 or labels.max() >= largest:
        raise UserError(f"learn: labels are 0 to {largest - 1}, got {labels.min()} to {labels.max()}")
    mask = torch.ones(1, len(features), dtype=torch.bool)
    more = as_arrays(arrays or {}, method, run.info.get("arrays", {}), features[None], "learn")
    return ClientBatch(features[None], labels[None], mask, torch.tensor([-1]), arrays=more)
