"""Clients unlike those of the partition, drawn from its test images: what a method makes of kinds that it never saw.

- ``random_classes``: 2 to 20 classes at random, all equally frequent;
- ``homogeneous``: all classes, as frequent as they are;
- ``drifting``: random classes that become others after half of the images: a target with as many images before it as
  that half is the first after the change.

Each is a client of its own, with images in an order; its accuracy by images seen before is that of the ``stream``
protocol. Kinds of the partition that training did not see (`client_mix.unseen_kinds`) are in the other tables already,
by the column ``kind``.

Legend: C clients, S images of each.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy

import numpy as np
import pandas as pd
import torch
from torch import nn

from iciia_exp.data.batches import FeatureBatches
from iciia_exp.data.client_mix import ClientMix
from iciia_exp.data.clients import Clients, Ragged
from iciia_exp.engine.history import history_table
from iciia_exp.engine.protocol import Protocol
from iciia_exp.methods.base import Method
from iciia_exp.report.collect import DRAWN_KINDS
from iciia_exp.seeding import generator

__all__ = ["DRAWN_KINDS", "clients_in_order", "drawn_clients", "kinds_table"]

# Images since the change for which a drifting client's accuracy is reported, beside the last before it.
_SINCE = (0, 1, 2, 3, 5, 7)


def drawn_clients(clients: Clients, labels: np.ndarray, number: int, images: int, kind: str) -> Clients:
    """Return so many test clients of a kind, with so many images each in an order."""
    size = number / int((-(-clients.test.lengths // images)).sum())
    if kind == "homogeneous":
        mix = ClientMix(0.0, homogeneous=1.0, size=size)
    else:
        mix = ClientMix(0.0, random_classes=1.0, fewest_classes=2, most_classes=20, size=size)

    def draw(part: str) -> np.ndarray:
        rng = generator("kinds", kind, part)
        return mix.draw(clients.test, clients.kinds, labels, images, rng).index_CS[:number]

    index_CS = draw("first")
    if kind == "drifting":
        index_CS[:, images // 2 :] = draw("second")[:, images // 2 :]
    return clients_in_order(index_CS, kind)


def clients_in_order(index_CS: np.ndarray, kind: str) -> Clients:
    """Return a client of each row of image numbers, with these test images in this order and no others."""
    number, images = index_CS.shape
    test = Ragged(np.arange(number + 1) * images, index_CS.reshape(-1))
    nobody = Ragged(np.zeros(number + 1, np.int64), np.empty(0, np.int64))
    names = np.array([f"{kind}-{i}" for i in range(number)], dtype=object)
    return Clients(names, np.full(number, kind, dtype=object), nobody, nobody, test, in_time=True)


def kinds_table(
    method: Method,
    head: nn.Linear,
    batches: FeatureBatches,
    clients: Clients,
    protocol: Protocol,
    answers: int,
    device: torch.device | str = "cpu",
    progress: Callable[[float], None] = lambda share: None,
) -> pd.DataFrame:
    """Return one row per kind, length of history and drawn client, as `history_table` does for the partition's own.

    A multi-label task, which has no sets of classes, has homogeneous clients alone.
    """
    kinds = DRAWN_KINDS if batches.labels.ndim == 1 else ("homogeneous",)
    tables = []
    for done, kind in enumerate(kinds):
        lengths = copy(protocol)
        if kind == "drifting":
            half = protocol.images // 2
            lengths.history_lengths = sorted({max(0, half - 1), *(half + n for n in _SINCE)})
        drawn = drawn_clients(clients, batches.labels, protocol.kinds_clients, protocol.images, kind)
        parts = (method, head, batches, drawn, lengths, answers, device)
        tables.append(history_table(*parts, protocols=("stream",)))
        progress((done + 1) / len(kinds))
    return pd.concat(tables, ignore_index=True)
