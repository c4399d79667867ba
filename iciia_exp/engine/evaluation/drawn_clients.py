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

import pandas as pd
import torch
from torch import nn

from iciia_exp.config.settings import Protocol
from iciia_exp.data.batches import FeatureBatches
from iciia_exp.data.clients import Clients
from iciia_exp.data.drawn_clients import drawn_clients
from iciia_exp.engine.evaluation.history import history_table
from iciia_exp.methods.base import Method
from iciia_exp.results.tables import DRAWN_KINDS

__all__ = ["DRAWN_KINDS", "kinds_table"]

# Images since the change for which a drifting client's accuracy is reported, beside the last before it.
_SINCE = (0, 1, 2, 3, 5, 7)


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
