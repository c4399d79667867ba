"""Accuracy by length of history: both protocols, for any trained method, without a loop over clients.

A causal method gives every length of ``stream`` in one pass; any other gets the sequences that end with a target.

Legend: C clients, B sequences of a batch, S images of a sequence, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from iciia_exp.counts import ClientCountsMetric
from iciia_exp.data.batches import ClientBatch, FeatureBatches, Selection
from iciia_exp.data.clients import Clients, Ragged
from iciia_exp.data.history import ALL, Sequences, by_length, prefix_sequences, stream_orders
from iciia_exp.engine.protocol import Protocol
from iciia_exp.methods.base import Method
from iciia_exp.seeding import generator

__all__ = ["PROTOCOLS", "history_table"]

PROTOCOLS = ("stream", "prefix")


def history_table(
    method: Method,
    head: nn.Linear,
    batches: FeatureBatches,
    clients: Clients,
    protocol: Protocol,
    answers: int,
    device: torch.device | str = "cpu",
    progress: Callable[[float], None] = lambda share: None,
    protocols: Sequence[str] = PROTOCOLS,
) -> pd.DataFrame:
    """Return one row per protocol, length of history and test client: targets, hits and sums of log-loss.

    Args:
        method, head: the trained method and the backbone's classifier, in evaluation mode.
        batches: gathers features and labels.
        clients: the partition; its test images are the targets.
        protocol: gives the lengths, the number of orders, and how many clients at most.
        answers: right-or-wrong answers of one image.
        device: where to compute.
        progress: is told the share that is done.
        protocols: which ones.
    """
    test, numbers = clients.test, np.flatnonzero(clients.test.lengths)
    if len(numbers) > protocol.history_clients:  # every client is many sequences
        drawn = generator("history_clients").permutation(len(numbers))[: protocol.history_clients]
        numbers = np.sort(numbers[drawn])
    chosen_C = np.zeros(len(test), dtype=bool)
    chosen_C[numbers] = True
    sizes = test.lengths[numbers]
    compact = Ragged(np.concatenate([[0], np.cumsum(sizes)]), test.values[chosen_C[test.row_numbers]])
    lengths = [n for n in protocol.history_lengths if (compact.lengths > n).any()]
    keys = [(name, n) for name in protocols for n in [*lengths, ALL]]
    counts = _Counts(keys, len(numbers), answers, head.to(device), torch.device(device))

    def orders() -> Iterable[Sequences]:
        return stream_orders(compact, protocol.history_orders, protocol.history_longest, 0, clients.in_time)

    steps: list[tuple[list[tuple[str, int]], Callable[[], Iterator[Selection]]]] = []
    tokens = 512 if counts.device.type == "cpu" else 1 << 15  # of a batch: a processor's cache is small
    alone = method.causal or method.by_client  # one pass gives every image's answer after those before it
    if "stream" in protocols and alone:
        steps.append(([key for key in keys if key[0] == "stream"], partial(_whole, orders, tokens)))
    elif "stream" in protocols:
        steps += [([("stream", n)], partial(_cut, orders, n, tokens)) for n in [*lengths, ALL]]
    if "prefix" in protocols:
        longest = protocol.history_longest
        steps += [([("prefix", n)], partial(_prefix, compact, n, longest, tokens)) for n in [*lengths, ALL]]
    method = method.to(device)
    numbers_C = torch.from_numpy(numbers).to(device)

    def answer(batch: ClientBatch) -> Tensor:
        if method.by_client:
            return method.answers(batch._replace(client_C=numbers_C[batch.client_C]))
        # of the last image, both are the answer after all others
        return (method.stream if method.causal else method)(batch.x_CSD, batch.mask_CS)

    with torch.inference_mode():
        for done, (some, selections) in enumerate(steps, 1):
            for selection in selections():
                batch = batches[selection].moved(device)
                counts.add(some, batch, answer(batch))
            progress(done / len(steps))
    return counts.table(clients.ids[numbers], clients.kinds[numbers])


class _Counts:
    """Hits and losses by (protocol, length) and client: one metric, in which every pair of the two is a client."""

    def __init__(
        self, keys: list[tuple[str, int]], clients: int, answers: int, head: nn.Linear, device: torch.device
    ) -> None:
        self.keys, self.clients, self.head, self.device = keys, clients, head, device
        self.metric = ClientCountsMetric(len(keys) * clients, answers).to(device)

    def add(self, keys: list[tuple[str, int]], batch: ClientBatch, logits_BSK: Tensor) -> None:
        """Count the targets of a batch: of one length the last images, else those at the lengths' positions."""
        size_B = batch.mask_CS.sum(1)
        sequences, positions, clients = [], [], []
        for key in keys:
            at_B = size_B - 1 if key[1] == ALL or len(keys) == 1 else torch.full_like(size_B, key[1])
            row = (at_B < size_B).nonzero()[:, 0]
            sequences.append(row)
            positions.append(at_B[row])
            clients.append(batch.client_C[row] + self.keys.index(key) * self.clients)
        row, at, client = (torch.cat(parts) for parts in (sequences, positions, clients))
        x_T, y_T, logits_TK = batch.x_CSD[row, at], batch.y_CS[row, at], logits_BSK[row, at]
        real_T = torch.ones(len(row), 1, dtype=torch.bool, device=self.device)
        self.metric.update(self.head(x_T)[:, None], logits_TK[:, None], y_T[:, None], real_T, client)

    def table(self, ids: np.ndarray, kinds: np.ndarray) -> pd.DataFrame:
        """Return one row per key and client that had targets."""
        numbers, c = self.metric.counts()
        key, client = np.divmod(numbers, self.clients)
        names = np.array([name for name, _ in self.keys], dtype=object)
        lengths = np.array([n for _, n in self.keys])
        columns = {"protocol": names[key], "history": lengths[key], "client": ids[client], "kind": kinds[client]}
        columns |= {"targets": c.images_C, "answers": c.answers_C}
        hits = {f: getattr(c, f"{f}_C") for f in ("backbone_hits", "method_hits", "both_hits")}
        losses = {f: getattr(c, f"{f}_C") for f in ("backbone_loss", "method_loss")}
        return pd.DataFrame({**columns, **hits, **losses})


def _whole(orders: Callable[[], Iterable[Sequences]], tokens: int) -> Iterator[Selection]:
    for sequences in orders():
        yield from by_length(sequences, tokens=tokens)


def _cut(orders: Callable[[], Iterable[Sequences]], length: int, tokens: int) -> Iterator[Selection]:
    for sequences in orders():
        yield from by_length(sequences, None if length == ALL else length + 1, tokens)


def _prefix(test: Ragged, length: int, longest: int, tokens: int) -> Iterator[Selection]:
    return by_length(prefix_sequences(test, length, longest), tokens=tokens)
