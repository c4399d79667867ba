"""History evaluation: accuracy by the number of images seen before, without a loop over clients.

A causal method gives every length of ``stream`` in one pass; any other gets the sequences that end with a target. A
personal method classifies every image of a client once: its answer depends on no other image.

Legend: C clients, B sequences of a batch, S images of a sequence, L lengths, M images, T targets, K classes.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from iciia_exp.config.settings import Evaluation
from iciia_exp.data.batches import ClientIndex, FeatureBatches, cut_chunks
from iciia_exp.data.clients import Clients, Ragged
from iciia_exp.data.sequences import Sequences, by_length, prefix_sequences, stream_orders
from iciia_exp.machine import side_by_side
from iciia_exp.methods.base import Method
from iciia_exp.methods.tune.base import Personal
from iciia_exp.results.counts import ClientCountsMetric, Outcomes, outcomes
from iciia_exp.results.summary import ALL, COUNTS
from iciia_exp.seeding import generator
from iciia_exp.tasks import Task

__all__ = ["PROTOCOLS", "Setup", "history_table"]

PROTOCOLS = ("stream", "prefix")


@dataclass(frozen=True)
class Setup:
    """A trained method beside the backbone, and the clients whose test images they classify."""

    #: The method and the backbone's classifier, in evaluation mode.
    method: Method
    head: nn.Linear
    #: Gathers features and labels.
    batches: FeatureBatches
    clients: Clients
    device: torch.device | str = "cpu"


def history_table(
    setup: Setup,
    options: Evaluation,
    progress: Callable[[float], None] = lambda share: None,
    protocols: Sequence[str] = PROTOCOLS,
) -> pd.DataFrame:
    """Return one row per protocol, length of history and client: targets, correct decisions, sums of log-loss.

    Args:
        setup: the method; the targets are the clients' test images.
        options: the lengths, the number of orders, and how many clients at most.
        progress: called with the share that is done.
        protocols: which ones.
    """
    method, head, batches, clients, device = setup.method, setup.head, setup.batches, setup.clients, setup.device
    test, numbers = clients.test, np.flatnonzero(clients.test.lengths)
    if len(numbers) > options.history_clients:  # every client is many sequences
        drawn = generator("history_clients").permutation(len(numbers))[: options.history_clients]
        numbers = np.sort(numbers[drawn])
    chosen_C = np.zeros(len(test), dtype=bool)
    chosen_C[numbers] = True
    sizes = test.lengths[numbers]
    compact = Ragged(np.concatenate([[0], np.cumsum(sizes)]), test.values[chosen_C[test.row_numbers]])
    lengths = [n for n in options.history_lengths if (compact.lengths > n).any()]
    keys = [(name, n) for name in protocols for n in [*lengths, ALL]]
    counts = _Counts(keys, len(numbers), setup.method.task, head.out_features, torch.device(device))

    def orders() -> Iterable[Sequences]:
        return stream_orders(compact, options.history_orders, options.history_longest, 0, clients.in_time)

    steps: list[tuple[list[tuple[str, int]], Callable[[], Iterator[ClientIndex]]]] = []
    tokens = 1024 if counts.device.type == "cpu" else 1 << 15  # of a batch: a CPU's cache is small
    if "stream" in protocols and method.causal:  # one pass gives every image's logits after those before it
        steps.append(([key for key in keys if key[0] == "stream"], partial(_cut, orders, ALL, tokens)))
    elif "stream" in protocols:
        steps += [([("stream", n)], partial(_cut, orders, n, tokens)) for n in [*lengths, ALL]]
    if "prefix" in protocols:
        longest = options.history_longest
        steps += [([("prefix", n)], partial(_prefix, compact, n, longest, tokens)) for n in [*lengths, ALL]]
    method = method.to(device)
    numbers_C = torch.from_numpy(numbers).to(device)

    known = _Known(setup, compact, numbers_C, tokens) if isinstance(method, Personal) else None

    def read(wanted: _Wanted, index: ClientIndex) -> tuple[Tensor, Outcomes, Outcomes]:
        if known is not None:
            client_B, image_BS = (torch.from_numpy(values).to(device) for values in (index.client_C, index.index_CS))
            return counts.read(
                wanted, client_B, image_BS, lambda rows, at: known.at(client_B[rows], image_BS[rows, at])
            )
        batch = batches[index].moved(device)
        # causal methods read every sequence as a stream, that of `prefix` too
        logits_BSK = method.logits(batch._replace(client_C=numbers_C[batch.client_C]), causal=method.causal)
        assert batch.image_CS is not None  # `FeatureBatches` gives it

        def outcomes_at(row_T: Tensor, at_T: Tensor) -> Outcomes:
            return outcomes(method.task, logits_BSK[row_T, at_T], batch.y_CS[row_T, at_T])

        return counts.read(wanted, batch.client_C, batch.image_CS, outcomes_at)

    several = side_by_side if counts.device.type == "cpu" else map
    with torch.inference_mode():
        counts.read_backbone(head.to(device), batches, compact.values)
        for done, (some, indices) in enumerate(steps, 1):
            for answers_M in several(partial(read, counts.wanted(some)), indices()):
                counts.metric.update(*answers_M)
            progress(done / len(steps))
    return counts.table(clients.ids[numbers], clients.types[numbers])


class _Wanted(NamedTuple):
    """Which images of a sequence are targets, by length of history."""

    length_L: Tensor  # int64, position
    end_L: Tensor  # bool: the last image instead
    key_L: Tensor  # int64, number of (protocol, length)


class _Counts:
    """Hits and losses by (protocol, length) and client: one metric, in which every pair of the two is a client."""

    def __init__(
        self, keys: list[tuple[str, int]], clients: int, task: Task, num_classes: int, device: torch.device
    ) -> None:
        self.keys, self.clients, self.task, self.device = keys, clients, task, device
        self.metric = ClientCountsMetric(len(keys) * clients, task.decisions(num_classes)).to(device)

    def read_backbone(self, head: nn.Linear, batches: FeatureBatches, images: np.ndarray) -> None:
        """Ask the backbone about every image once, however often it is a target."""
        images = np.unique(images)
        if not len(images):
            return
        parts = []
        for start in range(0, len(images), 4096):
            index = ClientIndex(images[None, start : start + 4096], np.zeros(1, dtype=np.int64))
            batch = batches[index].moved(self.device)
            parts.append(outcomes(self.task, head(batch.x_CSD[0]), batch.y_CS[0]))
        self.backbone = Outcomes(*(torch.cat(values) for values in zip(*parts, strict=True)))
        row_M = torch.full((int(images[-1]) + 1,), -1)
        row_M[torch.from_numpy(images)] = torch.arange(len(images))
        self.row_M = row_M.to(self.device)

    def wanted(self, keys: list[tuple[str, int]]) -> _Wanted:
        """Return the targets of sequences: of one length the last images, else those at the lengths' positions."""
        ends = [n == ALL or len(keys) == 1 for _, n in keys]
        values = [n for _, n in keys], ends, [self.keys.index(key) for key in keys]
        return _Wanted(*(torch.tensor(value, device=self.device) for value in values))

    def read(
        self, wanted: _Wanted, client_B: Tensor, image_BS: Tensor, method: Callable[[Tensor, Tensor], Outcomes]
    ) -> tuple[Tensor, Outcomes, Outcomes]:
        """Return what the metric counts of a batch's targets.

        Args:
            wanted: which images are targets.
            client_B, image_BS: numbers of clients and images, -1 where padded.
            method: returns the method's outcomes for rows and places of T targets.
        """
        size_B1 = (image_BS >= 0).sum(1, keepdim=True)
        at_BL = torch.where(wanted.end_L, size_B1 - 1, wanted.length_L)
        row_T, column_T = (at_BL < size_B1).nonzero().unbind(1)
        at_T = at_BL[row_T, column_T]
        client_T = client_B[row_T] + wanted.key_L[column_T] * self.clients
        return client_T, self.backbone.at(self.row_M[image_BS[row_T, at_T]]), method(row_T, at_T)

    def table(self, ids: np.ndarray, types: np.ndarray) -> pd.DataFrame:
        """Return one row per key and client that had targets."""
        numbers, c = self.metric.counts()
        key, client = np.divmod(numbers, self.clients)
        names = np.array([name for name, _ in self.keys], dtype=object)
        lengths = np.array([n for _, n in self.keys])
        columns = {"protocol": names[key], "history": lengths[key], "client": ids[client], "client_type": types[client]}
        columns |= {"targets": c.images_C, "decisions": c.decisions_C}
        return pd.DataFrame(columns | {name: getattr(c, f"{name}_C") for name in COUNTS if name != "images"})


class _Known:
    """Outcomes of a personal method, for every image of every client.

    Args:
        setup: the method.
        images: of each client.
        numbers_C: numbers of the clients.
        at_once: images of a batch, at most; 32 or more.
    """

    @torch.inference_mode()
    def __init__(self, setup: Setup, images: Ragged, numbers_C: Tensor, at_once: int) -> None:
        self.most, method, chunk = int(images.values.max(initial=0)) + 1, setup.method, 32
        index_CS, client_C = cut_chunks(images, chunk)
        keys, parts = [], []
        for start in range(0, len(client_C), at_once // chunk):
            rows = slice(start, start + at_once // chunk)
            batch = setup.batches[ClientIndex(index_CS[rows], client_C[rows])].moved(setup.device)
            logits_CSK = method.logits(batch._replace(client_C=numbers_C[batch.client_C]))
            parts.append(outcomes(method.task, logits_CSK[batch.mask_CS], batch.y_CS[batch.mask_CS]))
            assert batch.image_CS is not None  # `FeatureBatches` gives it
            keys.append(self._key(batch.client_C[:, None], batch.image_CS)[batch.mask_CS])
        self.keys_M, order = torch.cat(keys).sort()
        self.outcomes = Outcomes(*(torch.cat(values) for values in zip(*parts, strict=True))).at(order)

    def at(self, client_T: Tensor, image_T: Tensor) -> Outcomes:
        """Return the outcomes of images of clients."""
        return self.outcomes.at(torch.searchsorted(self.keys_M, self._key(client_T, image_T)))

    def _key(self, client: Tensor, image: Tensor) -> Tensor:
        return client * self.most + image


def _cut(orders: Callable[[], Iterable[Sequences]], length: int, tokens: int) -> Iterator[ClientIndex]:
    for sequences in orders():
        yield from by_length(sequences, None if length == ALL else length + 1, tokens)


def _prefix(test: Ragged, length: int, longest: int, tokens: int) -> Iterator[ClientIndex]:
    return by_length(prefix_sequences(test, length, longest), tokens=tokens)
