"""Drawn clients: accuracy on client types that the partition does not have.

- ``random_classes``: 2 to 20 classes at random, all equally frequent, or more where these have too few images;
- ``homogeneous``: all classes, as frequent as they are;
- ``drifting``: random classes that become others after half of the images: a target with as many images before it as
  that half is the first after the change.

Each is a client of its own, with test images in an order, none of them twice; a class without images left is drawn no
more. The accuracy by images seen before is that of the ``stream`` protocol. Types of the partition that training did
not see (`client_mix.unseen_types`) are in the other tables already, by the column ``type``.

Legend: C clients, S images of each, K classes.
"""

from collections.abc import Callable
from copy import copy
from dataclasses import replace

import numpy as np
import pandas as pd

from iciia_exp.config.settings import Evaluation
from iciia_exp.data.client_mix import number_of_classes
from iciia_exp.data.clients import Clients, Ragged
from iciia_exp.engine.evaluation.history import Setup, history_table
from iciia_exp.results.columns import DRAWN_TYPES
from iciia_exp.seeding import generator

__all__ = ["DRAWN_TYPES", "drawn_clients", "drawn_clients_table"]

_FEWEST_CLASSES, _MOST_CLASSES = 2, 20

# Images since the change for which a drifting client's accuracy is reported, beside the last before it.
_SINCE = (0, 1, 2, 3, 5, 7)


def drawn_clients_table(
    setup: Setup, options: Evaluation, images: int, progress: Callable[[float], None] = lambda share: None
) -> pd.DataFrame:
    """Return one row per type, length of history and drawn client, as `history_table` does for the partition's own.

    A multi-label task has no sets of classes, so homogeneous clients alone. ``images`` is S, images of a client.
    """
    types = DRAWN_TYPES if setup.batches.labels.ndim == 1 else ("homogeneous",)
    tables = []
    for done, client_type in enumerate(types):
        lengths = copy(options)
        if client_type == "drifting":
            half = images // 2
            lengths.history_lengths = sorted({max(0, half - 1), *(half + n for n in _SINCE)})
        drawn = drawn_clients(setup.clients, setup.batches.labels, options.drawn_clients, images, client_type)
        tables.append(history_table(replace(setup, clients=drawn), lengths, protocols=("stream",)))
        progress((done + 1) / len(types))
    return pd.concat(tables, ignore_index=True)


def drawn_clients(clients: Clients, labels: np.ndarray, number: int, images: int, client_type: str) -> Clients:
    """Return ``number`` clients of a type with ``images`` ordered test images each, or as many as there are."""
    rng, pool = generator("kinds", client_type, "distinct"), np.unique(clients.test.values)
    if client_type == "homogeneous":
        count = min(images, len(pool))
        return _clients([rng.choice(pool, count, replace=False) for _ in range(number)], client_type)
    classes, codes = np.unique(labels[pool], return_inverse=True)
    of_class = Ragged.from_pairs(codes, pool, len(classes))
    parts = (images // 2, images - images // 2) if client_type == "drifting" else (images,)
    rows = []
    for _ in range(number):
        row = np.empty(0, dtype=np.int64)
        for part in parts:
            row = np.concatenate([row, _of_random_classes(of_class, part, row, rng)])
        rows.append(row)
    return _clients(rows, client_type)


def _of_random_classes(of_class: Ragged, images: int, taken: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return images of a random set of classes, without those that are taken, in a random order."""
    order_K = rng.permutation(len(of_class))
    of_class = of_class.where(~np.isin(of_class.values, taken))
    low, high = (min(n, len(of_class)) for n in (_FEWEST_CLASSES, _MOST_CLASSES))
    enough = int(np.searchsorted(np.cumsum(of_class.lengths[order_K]), images)) + 1
    size = max(int(number_of_classes(low, high, 1, rng)[0]), enough)
    left = [rng.permutation(of_class[k]).tolist() for k in order_K[:size]]
    chosen: list[int] = []
    while len(chosen) < images and (left := [rest for rest in left if rest]):
        chosen.append(left[rng.integers(len(left))].pop())
    return np.array(chosen, dtype=np.int64)


def _clients(rows: list[np.ndarray], client_type: str) -> Clients:
    names = np.array([f"{client_type}-{i}" for i in range(len(rows))], dtype=object)
    types, empty = np.full(len(rows), client_type, dtype=object), Ragged.empty(len(rows))
    return Clients(names, types, empty, empty, Ragged.from_rows(rows), in_time=True)
