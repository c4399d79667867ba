"""Sequences for the history protocols: images of one client in an order, of which the last is the target.

- ``stream``: several seeded orders of a client's images (one, the order in time, where the data has it); the image at
  position n is a target with the n images before it.
- ``prefix`` (paper, Figure 6): every image is a target, its history the first n other images of the client.

Clients with too few images drop out of the longer histories.

Legend: C clients, B sequences of a batch, S images of a sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from iciia_exp.data.batches import ClientIndex
from iciia_exp.data.clients import Ragged
from iciia_exp.results.summary import ALL
from iciia_exp.seeding import generator

__all__ = ["ALL", "Sequences", "by_length", "prefix_sequences", "stream_orders"]


class Sequences(NamedTuple):
    """Image numbers of several sequences, and whose they are."""

    ragged: Ragged
    client_B: np.ndarray  # int64


def stream_orders(test: Ragged, orders: int, longest: int, seed: int, in_time: bool = False) -> Iterator[Sequences]:
    """Yield ``orders`` times an order of every client's images, cut off after ``longest`` + 1 of them.

    Args:
        test: the clients' images.
        orders: how many.
        longest: images of the longest history.
        seed: seed of the orders.
        in_time: the images are in the order of time already; that order comes once.
    """
    clients = np.flatnonzero(test.lengths)
    kept = np.minimum(test.lengths[clients], longest + 1)
    offsets = np.concatenate([[0], np.cumsum(kept)])
    # where in `test.values` each place of each sequence is, before shuffling
    places = np.repeat(test.offsets[clients] - offsets[:-1], kept) + np.arange(offsets[-1])
    for r in range(1 if in_time else orders):
        values = test.values
        if not in_time:
            values = values[test.shuffled(generator("stream", seed, r))]
        yield Sequences(Ragged(offsets, values[places]), clients)


def prefix_sequences(test: Ragged, length: int, longest: int) -> Sequences:
    """Return one sequence for every image with at least ``length`` others: the first of those, then the image.

    With `ALL` the history is all others of an image, at most ``longest``.
    """
    clients = np.flatnonzero(test.lengths > max(length, 0))
    sizes = test.lengths[clients]
    histories = np.minimum(sizes - 1, longest if length == ALL else length)
    target = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)  # position within the client
    owner, history = np.repeat(clients, sizes), np.repeat(histories, sizes)
    offsets = np.concatenate([[0], np.cumsum(history + 1)])
    sequence = np.repeat(np.arange(len(target)), history + 1)
    place = np.arange(offsets[-1]) - offsets[sequence]
    skipped = place + (place >= target[sequence])  # the target is not in its own history
    position = np.where(place == history[sequence], target[sequence], skipped)
    return Sequences(Ragged(offsets, test.values[test.offsets[owner[sequence]] + position]), owner)


def by_length(sequences: Sequences, length: int | None = None, tokens: int = 4096) -> Iterator[ClientIndex]:
    """Yield batches of sequences of about the same length, padded, each of about so many ``tokens``.

    With ``length`` only sequences of at least so many images come, each cut off there.
    """
    lengths = sequences.ragged.lengths
    order = np.argsort(lengths, kind="stable")
    if length is not None:
        order, lengths = order[lengths[order] >= length], np.minimum(lengths, length)
    start = 0
    while start < len(order):
        # the longest of a batch is its last: as many as fit
        fits = lengths[order[start : start + tokens]] * np.arange(1, len(order[start : start + tokens]) + 1) <= tokens
        stop = start + max(1, int(fits.argmin()) if not fits.all() else len(fits))
        rows = order[start:stop]
        width = int(lengths[rows[-1]])
        place_BS = sequences.ragged.offsets[rows, None] + np.arange(width)
        real_BS = np.arange(width) < lengths[rows, None]
        index_BS = np.full(real_BS.shape, -1, dtype=np.int64)
        index_BS[real_BS] = sequences.ragged.values[place_BS[real_BS]]
        yield ClientIndex(index_BS, sequences.client_B[rows])
        start = stop
