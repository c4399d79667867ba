"""Accuracy by length of history: both protocols, for any trained method, without a loop over clients.

A causal method gives every length of ``stream`` in one pass; any other gets the sequences that end with a target.

Legend: C clients, B sequences of a batch, S images of a sequence, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

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
from iciia_exp.metrics import ClientCounts, summarise

__all__ = ["PROTOCOLS", "history_summary", "history_table"]

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
        protocol: gives the lengths and the number of orders.
        answers: right-or-wrong answers of one image.
        device: where to compute.
        progress: is told the share that is done.
        protocols: which ones.
    """
    test, numbers = clients.test, np.flatnonzero(clients.test.lengths)
    compact = Ragged(np.concatenate([[0], np.cumsum(test.lengths[numbers])]), test.values)
    lengths = [n for n in protocol.history_lengths if (compact.lengths > n).any()]
    counts = {(p, n): ClientCountsMetric(len(numbers), answers).to(device) for p in protocols for n in [*lengths, ALL]}
    total, done = len(counts), 0

    def orders() -> Iterable[Sequences]:
        return stream_orders(compact, protocol.history_orders, protocol.history_longest, 0, clients.in_time)

    steps: list[tuple[tuple[str, int], Callable[[], Iterator[Selection]]]] = []
    for n in [*lengths, ALL]:
        if "stream" in protocols and not method.causal:
            steps.append((("stream", n), partial(_cut, orders, n)))
        if "prefix" in protocols:
            steps.append((("prefix", n), partial(_prefix, compact, n, protocol.history_longest)))
    method, head = method.to(device), head.to(device)
    last = method.stream if method.causal else method  # the target is the last of its sequence
    with torch.inference_mode():
        if "stream" in protocols and method.causal:
            for sequences in orders():
                for selection in by_length(sequences):
                    batch = _move(batches[selection], device)
                    logits_BSK = method.stream(batch.x_CSD, batch.mask_CS)
                    last_B = batch.mask_CS.sum(1) - 1
                    for n in [*lengths, ALL]:
                        at_B = last_B if n == ALL else torch.full_like(last_B, n)
                        _count(counts["stream", n], head, batch, logits_BSK, at_B)
            done = len(lengths) + 1
        for key, selections in steps:
            for selection in selections():
                batch = _move(batches[selection], device)
                logits_BSK = last(batch.x_CSD, batch.mask_CS)
                _count(counts[key], head, batch, logits_BSK, batch.mask_CS.sum(1) - 1)
            done += 1
            progress(done / total)
    tables = []
    for (name, n), metric in counts.items():
        rows, c = metric.counts()
        ids = numbers[rows]
        columns = {"protocol": name, "history": n, "client": clients.ids[ids], "kind": clients.kinds[ids]}
        columns |= {"targets": c.images_C, "answers": c.answers_C}
        hits = {f: getattr(c, f"{f}_C") for f in ("backbone_hits", "method_hits", "both_hits")}
        losses = {f: getattr(c, f"{f}_C") for f in ("backbone_loss", "method_loss")}
        tables.append(pd.DataFrame({**columns, **hits, **losses}))
    return pd.concat(tables, ignore_index=True)


def _cut(orders: Callable[[], Iterable[Sequences]], length: int) -> Iterator[Selection]:
    for sequences in orders():
        yield from by_length(sequences, None if length == ALL else length + 1)


def _prefix(test: Ragged, length: int, longest: int) -> Iterator[Selection]:
    return by_length(prefix_sequences(test, length, longest))


def _move(batch: ClientBatch, device: torch.device | str) -> ClientBatch:
    return ClientBatch(*(None if tensor is None else tensor.to(device) for tensor in batch))  # type: ignore[arg-type]


def _count(metric: ClientCountsMetric, head: nn.Linear, batch: ClientBatch, logits_BSK: Tensor, at_B: Tensor) -> None:
    """Count the targets at the positions ``at_B``, where the sequences have them."""
    some = (at_B < batch.mask_CS.sum(1)).nonzero()[:, 0]
    at = at_B[some]
    if len(some):
        x_T, y_T, logits_TK = batch.x_CSD[some, at], batch.y_CS[some, at], logits_BSK[some, at]
        real_T = torch.ones(len(some), 1, dtype=torch.bool, device=x_T.device)
        metric.update(head(x_T)[:, None], logits_TK[:, None], y_T[:, None], real_T, batch.client_C[some])


def history_summary(table: pd.DataFrame) -> pd.DataFrame:
    """Return one row per protocol and length: clients, targets, averages of backbone and method, and paired gains.

    The averages are those of ``results.json`` (`iciia_exp.metrics.summarise`); ``log_loss_gain`` is the backbone's
    log-loss less the method's, with its own interval.
    """
    rows = []
    for (name, n), part in table.groupby(["protocol", "history"], sort=False):
        fields = ("backbone_hits", "method_hits", "both_hits", "backbone_loss", "method_loss")
        columns: dict[str, Any] = {f"{f}_C": part[f].to_numpy() for f in fields}
        answers = int(part["answers"].iloc[0] // part["targets"].iloc[0])
        found = summarise(ClientCounts(part["targets"].to_numpy(), **columns, answers=answers))
        clients, targets = found.pop("test_clients"), found.pop("test_images")
        rows.append({"protocol": name, "history": n, "clients": clients, "targets": targets, **found})
    return pd.DataFrame(rows)
