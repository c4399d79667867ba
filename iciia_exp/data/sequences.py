"""Sequences for the history protocols: ordered images of one client; the last image is the target.

- ``stream``: several seeded orders of a client's images (or the order of time, if the data has it); the image at
  position n is a target with the n images before it. Clients with too few images are not in the longer histories.
- ``prefix`` (as the paper's Figure 6): every image is a target; its history is the first n other images of the client,
  or all others if they are fewer.

Legend: C clients, B sequences of a batch, S images of a sequence.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from iciia_exp.data.batches import ClientIndex
from iciia_exp.data.clients import Ragged, positions
from iciia_exp.results.summary import ALL
from iciia_exp.seeding import generator

__all__ = ["ALL", "Sequences", "by_length", "prefix_sequences", "stream_orders"]


class Sequences(NamedTuple):
    """Image numbers of sequences, and their clients."""

    ragged: Ragged
    client_B: np.ndarray  # int64


def stream_orders(test: Ragged, orders: int, longest: int, seed: int, in_time: bool = False) -> Iterator[Sequences]:
    """Yield ``orders`` random orders of every client's images, each cut off after ``longest`` + 1 images.

    With ``in_time``, the images are in the order of time, and only that order is yielded.
    """
    clients = np.flatnonzero(test.lengths)
    kept = np.minimum(test.lengths[clients], longest + 1)
    places = np.repeat(test.offsets[clients], kept) + positions(kept)  # positions in the shuffled `test.values`
    for r in range(1 if in_time else orders):
        values = test.values if in_time else test.values[test.shuffled(generator("stream", seed, r))]
        yield Sequences(Ragged.from_lengths(kept, values[places]), clients)


def prefix_sequences(test: Ragged, length: int, longest: int) -> Sequences:
    """Return one sequence for every image: the first ``length`` others of its client, or all, then the image.

    With `ALL` the history has all other images, at most ``longest``.
    """
    clients = np.flatnonzero(test.lengths)
    sizes = test.lengths[clients]
    owner, target = np.repeat(clients, sizes), positions(sizes)  # of every sequence
    history = np.repeat(np.minimum(sizes - 1, longest if length == ALL else length), sizes)
    place, sequence = positions(history + 1), np.repeat(np.arange(len(target)), history + 1)  # of every image
    skipped = place + (place >= target[sequence])  # the target is not in its own history
    position = np.where(place == history[sequence], target[sequence], skipped)
    return Sequences(Ragged.from_lengths(history + 1, test.values[test.offsets[owner[sequence]] + position]), owner)


def by_length(sequences: Sequences, length: int | None = None, tokens: int = 4096) -> Iterator[ClientIndex]:
    """Yield batches of sequences of similar lengths, padded, with at most ``tokens`` images if possible.

    With ``length``, shorter sequences are left out and longer sequences are cut off.
    """
    lengths = sequences.ragged.lengths
    order = np.argsort(lengths, kind="stable")
    if length is not None:
        order, lengths = order[lengths[order] >= length], np.minimum(lengths, length)
    start = 0
    while start < len(order):
        widths = lengths[order[start : start + tokens]]  # ascending: the last of a batch is the longest
        stop = start + max(1, int((widths * np.arange(1, len(widths) + 1) <= tokens).sum()))
        rows = order[start:stop]
        yield ClientIndex(sequences.ragged.padded(rows, int(lengths[rows[-1]])), sequences.client_B[rows])
        start = stop
