"""Drawn clients: accuracy on client types that the partition does not have.

- ``random_classes``: 2 to 20 classes at random, all equally frequent;
- ``homogeneous``: all classes, as frequent as they are;
- ``drifting``: random classes that become others after half of the images: a target with as many images before it as
  that half is the first after the change.

Each is a client of its own, with images in an order; its accuracy by images seen before is that of the ``stream``
protocol. Types of the partition that training did not see (`client_mix.unseen_types`) are in the other tables already,
by the column ``type``.

Legend: C clients, S images of each.
"""

from collections.abc import Callable
from copy import copy
from dataclasses import replace

import pandas as pd

from iciia_exp.config.settings import Evaluation
from iciia_exp.data.client_mix import drawn_clients
from iciia_exp.engine.evaluation.history import Setup, history_table
from iciia_exp.results.columns import DRAWN_TYPES

__all__ = ["DRAWN_TYPES", "drawn_clients_table"]

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
