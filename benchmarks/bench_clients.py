"""Evaluation of very many clients: does its time grow like the number of images, from the first batch to the plot?

Synthetic test clients of 16 images (D = 64, K = 100, ICIIA) at several numbers of clients. Processor
seconds (all threads; other work on the machine disturbs them less than the clock) of each part of the evaluate stage,
median over repeats: Lightning's test loop with the counts per client, the summary with its bootstrap
over clients, what chance alone would harm, the table of clients and its parquet file, the plot, wandb's table, and the
result table. Linear is 4.0 in the last column, or less.

Measured with --repeats 2 on two cores that others used too:

    clients                       25,000    50,000   100,000     4.0 x
    test loop                       2.59      4.72      9.69     3.7 x
    table of clients                0.02      0.05      0.10     4.6 x
    summary                         1.20      1.20      1.30     1.1 x
    parquet                         0.01      0.02      0.03     2.7 x
    plot                            0.15      0.15      0.15     1.0 x
    wandb's table                   1.12      0.96      0.96     0.9 x
    all                             5.12      7.16     12.36     2.4 x

    python benchmarks/bench_clients.py
"""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as `python -m iciia_exp` does

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from torch.utils.data import DataLoader

from iciia_exp.data.batches import ClientBatchSampler, FeatureBatches
from iciia_exp.data.clients import Clients
from iciia_exp.engine.evaluation.row import client_table
from iciia_exp.engine.terminal import console, partition_table, result_table
from iciia_exp.engine.tracking import Tracker
from iciia_exp.engine.training.modules import MethodModule
from iciia_exp.engine.training.trainer import make_trainer, quiet_lightning
from iciia_exp.machine import keep_freed_memory
from iciia_exp.methods.adapt.iciia import IciiaMethod
from iciia_exp.methods.base import Facts
from iciia_exp.recipe import Recipe
from iciia_exp.results.plots import gain_per_client
from iciia_exp.results.summary import harmed_by_chance, summarise
from iciia_exp.tasks import SINGLE_LABEL

TRAINER = {"_target_": "lightning.pytorch.Trainer", "accelerator": "cpu", "devices": 1}


def measure(clients: int, images: int, dim: int, classes: int, uneven: bool) -> dict[str, float]:
    """Return the seconds of every part for so many clients."""
    rng = np.random.default_rng(0)
    owners_M = np.arange(clients * images) // images
    if uneven:  # some clients of one image, some of thrice the mean
        owners_M = np.minimum(np.cumsum(rng.random(clients * images) < 1 / images), clients - 1)
    labels_M = rng.integers(0, classes, len(owners_M))
    head = nn.Linear(dim, classes)
    features_MD = rng.standard_normal((len(owners_M), dim), dtype=np.float32)
    features_MD += 2 * head.weight.detach().numpy()[labels_M]
    seconds: dict[str, float] = {}

    def timed(what: str, action: Callable[[], Any]) -> Any:
        start = time.process_time()
        result = action()
        seconds[what] = time.process_time() - start
        return result

    ids = np.array([f"client-{i:06d}" for i in range(clients)], dtype=object)
    types = np.full(clients, "test", dtype=object)
    roles_M = np.full(len(owners_M), 2)
    people = timed("clients from owners", lambda: Clients.from_assignment(ids, types, owners_M, roles_M))
    timed("partition table", lambda: partition_table(people.statistics(labels_M)))
    module = MethodModule(IciiaMethod(Facts.of(head), groups=4), head, Recipe(), clients)
    sampler = ClientBatchSampler(people.test, images, 64)
    loader = DataLoader(FeatureBatches(features_MD, labels_M), batch_size=None, sampler=sampler)
    with quiet_lightning():
        trainer = make_trainer(TRAINER)
        timed("test loop", lambda: trainer.test(module, loader, verbose=False))
    numbers, counts = timed("counts", module.test_counts.counts)
    table = timed("table of clients", lambda: client_table(people, numbers, counts, labels_M))
    summary = timed("summary", lambda: summarise(counts))
    timed("(of it, harm by chance)", lambda: harmed_by_chance(counts))
    row = {"dataset": "synthetic", "backbone": "none", "method": "iciia", "name": "bench", "digest": "d"}
    row |= {"setting_digest": "s", "partition_digest": "p", "overhead_percent": 1.0, "per_image_overhead_percent": 1.0}
    row |= {"sequence_macs": 1, "task": SINGLE_LABEL, **summary}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        timed("parquet", lambda: table.to_parquet(folder / "clients.parquet", index=False))
        timed("plot", lambda: gain_per_client(table, row, folder / "plots" / "gain_per_client.png"))
        nodes = {"wandb": {"_target_": "lightning.pytorch.loggers.WandbLogger", "mode": "offline"}}
        tracker = Tracker(nodes, folder, run_id="x", name="x", group="x", tags=[], config={})
        timed("(wandb starts)", tracker._start)
        timed("wandb's table", lambda: tracker.results(row, folder))
        tracker.close()
    with console().capture():
        timed("result table", lambda: result_table([row]))
    seconds["all"] = sum(s for what, s in seconds.items() if not what.startswith("("))
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[25_000, 50_000, 100_000])
    parser.add_argument("--images", type=int, default=16, help="of a client")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--uneven", action="store_true", help="clients of many sizes")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    keep_freed_memory()
    os.environ["WANDB_SILENT"] = "true"
    print(f"{args.images} images of a client; {os.cpu_count()} cores; processor seconds")
    measure(1000, args.images, args.dim, args.classes, args.uneven)  # imports and caches
    runs: dict[int, list[dict[str, float]]] = {n: [] for n in args.clients}
    for _ in range(args.repeats):
        for n, seen in runs.items():
            seen.append(measure(n, args.images, args.dim, args.classes, args.uneven))
    medians = {n: {what: statistics.median(s[what] for s in seen) for what in seen[0]} for n, seen in runs.items()}
    first, last = args.clients[0], args.clients[-1]
    print(f"{'clients':<26}" + "".join(f"{n:>10,}" for n in args.clients) + f"{last / first:>8.1f} x")
    for what in medians[first]:
        cells = "".join(f"{medians[n][what]:>10.2f}" for n in args.clients)
        print(f"{what:<26}{cells}{medians[last][what] / medians[first][what]:>8.1f} x", flush=True)


if __name__ == "__main__":
    main()
