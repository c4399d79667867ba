"""A feature store of ImageNet's size: partitioning it, reading client batches from it, training on it.

The store is synthetic: 1,281,167 train and 50,000 validation images of 1,000 classes, 1,280 float16 features each
(3.4 GB, in a temporary folder), with the package's own parent categories. Measured:

1. The partition: ``ParentCategory.assign`` and ``Clients.statistics``, which every run prints; target 5 s.
2. Random client batches of 16 images per client, as the train stage reads them, from the memory-mapped store, against
   the same batches from an array in memory: with the pages in the page cache, and after dropping them
   (``posix_fadvise``; the whole epoch's time is then that of reading the disk). Interleaved, medians; target: at least
   half the speed.
3. Training ICIIA with 256 groups for some hundred steps through the engine's ``fit``: milliseconds per step, and the
   peak of anonymous memory (``RssAnon`` of /proc/self/status: what the process allocates, not the pages it maps);
   target 2 GiB.
4. The content of a dataset's files (`iciia_exp.data.content`): 200,000 files of 1 KiB in 1,000 folders, read once, then
   asked for size and times; target 10 s for the 1.3 million files of ImageNet.
5. The check of the array's content (`iciia_exp.checksums`) when a process opens the store, with the pages in the cache.

Measured with --steps 60 --repeats 3 on two cores that others used too:

    partition: 3,168 clients in 0.18 s, their statistics in 0.03 s
    anonymous memory: 467 MiB before, at most 670 MiB while training (250 ms per step)

    clients of a batch                              images/s  of memory  major faults
    8                   memory                       310,112       100%             0
    8                   mapped, in page cache        201,616        65%             0
    8                   mapped, pages dropped         55,612        18%             0
    1                   memory                       154,885       100%             0
    1                   mapped, in page cache        108,406        70%             0
    1                   mapped, pages dropped         24,802        15%             0

Without asking for a batch's pages at once (`iciia_exp.data.batches`) the mapped rows were 295,214 (100 %) and 2,868
(1 %), 158,392 (96 %) and 2,416 (1 %): it costs a third where all pages are in memory, and gains 10 to 20 times where
they are not. A training step of 128 images needs 0.6 ms of reading in the one case and 2.3 ms in the other.

    python benchmarks/bench_store.py
"""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as `python -m iciia_exp` does

import argparse
import gc
import resource
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.utils.data import DataLoader

from iciia_exp.checksums import checksums_of
from iciia_exp.data.batches import ClientBatchSampler, FeatureBatches
from iciia_exp.data.clients import Clients
from iciia_exp.data.content import Content
from iciia_exp.data.partitions.parent_category import ParentCategory
from iciia_exp.data.readers.parents import IMAGENET_PARENTS
from iciia_exp.data.store import FeatureStore, FeatureWriter
from iciia_exp.machine import keep_freed_memory
from iciia_exp.methods.base import Facts

IMAGES_OF_A_CLIENT = 16


def make_table(train: int, test: int) -> pd.DataFrame:
    """Return a table of so many images, classes of nearly equal size, in the order of ImageNet's folders."""
    parents = pd.read_csv(IMAGENET_PARENTS, dtype=str).sort_values("wnid")["group_name"].to_numpy()
    label = np.concatenate([np.sort(np.arange(n) % len(parents)) for n in (train, test)])
    split = np.repeat(["train", "test"], [train, test])
    return pd.DataFrame({"label": label, "split": split, "owner": None, "parent": parents[label]})


def make_store(folder: Path, table: pd.DataFrame, dim: int, chunk: int = 5_000) -> FeatureStore:
    """Write a store of random features in which classes differ, with `FeatureWriter`."""
    rng = np.random.default_rng(0)
    images, classes = len(table), int(table["label"].max()) + 1
    centres_KD = rng.standard_normal((classes, dim), dtype=np.float32)
    noise = rng.standard_normal((chunk, dim), dtype=np.float32)  # the same for every chunk: quick
    FeatureWriter.prepare(folder, images, {"features": ((dim,), "float16")})
    writer = FeatureWriter(folder)
    for start in range(0, images, chunk):
        label = table["label"].to_numpy()[start : start + chunk]
        features = centres_KD[label] * 0.1 + noise[: len(label)]
        writer.write(np.arange(start, start + len(label)), {"features": features})
    writer.flush()
    sizes = {"dim": dim, "num_classes": classes, "images": images, "macs": None}
    FeatureWriter.finish(folder, table, None, sizes)
    return FeatureStore.open(folder)


def drop_pages(path: Path) -> None:
    """Ask the kernel to forget what it has read of a file."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def loader(features: np.ndarray, labels: np.ndarray, clients: Clients, batch_size: int) -> DataLoader:
    """Return the train loader of `iciia_exp.engine.stages`."""
    sampler = ClientBatchSampler(clients.train, IMAGES_OF_A_CLIENT, batch_size, shuffle=True)
    return DataLoader(FeatureBatches(features, labels), batch_size=None, sampler=sampler)


def images_per_second(batches: DataLoader, images: int) -> float:
    """Read batches until so many images have been read."""
    iterator = iter(batches)
    next(iterator)  # the order of the epoch has been drawn by now
    seen, start = 0, time.perf_counter()
    for batch in iterator:
        seen += int(batch.mask_CS.sum())
        if seen >= images:
            break
    return seen / (time.perf_counter() - start)


def anonymous_mib() -> float:
    """Return the memory that this process has allocated."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("no RssAnon in /proc/self/status")


@contextmanager
def peak_of_memory() -> Iterator[list[float]]:
    """Watch `anonymous_mib`; the list has its largest value so far."""
    peak, stop = [anonymous_mib()], threading.Event()

    def watch() -> None:
        while not stop.wait(0.02):
            peak[0] = max(peak[0], anonymous_mib())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


def content(folder: Path, files: int) -> tuple[float, float]:
    """Return the seconds for the content of small files that are new, and for the same files a second time."""
    paths = [f"{number % 1000:04d}/{number}.jpg" for number in range(files)]
    for number in range(1000):
        (folder / "images" / f"{number:04d}").mkdir(parents=True)
    for path in paths:
        (folder / "images" / path).write_bytes(path.encode() * (1024 // len(path)))
    time.sleep(3)  # a file is kept once it is 2 s old
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        Content(folder / "kept").of(folder / "images", paths)
        seconds.append(time.perf_counter() - start)
    return seconds[0], seconds[1]


def train(store: FeatureStore, labels: np.ndarray, clients: Clients, steps: int, folder: Path) -> float:
    """Train ICIIA through the engine's `fit`; return milliseconds per step."""
    from iciia_exp.engine.training.fit import fit
    from iciia_exp.engine.training.modules import MethodModule
    from iciia_exp.methods.adapt.iciia import IciiaMethod
    from iciia_exp.recipe import Recipe

    head = nn.Linear(store.dim, store.num_classes)
    method = IciiaMethod(Facts.of(head), groups=256)
    record = fit(
        MethodModule(method, head, Recipe(epochs=1, batch_size=8), len(clients)),
        loader(store.array(), labels, clients, 8),
        seed=0,
        folder=folder,
        trainer_config={
            "_target_": "lightning.pytorch.Trainer",
            "accelerator": "cpu",
            "devices": 1,
            "limit_train_batches": steps,
        },
        loggers=[],
    )
    return 1000 * record["seconds"] / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train-images", type=int, default=1_281_167)
    parser.add_argument("--test-images", type=int, default=50_000)
    parser.add_argument("--dim", type=int, default=1280)
    parser.add_argument("--read", type=int, default=60_000, help="images read per measurement")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--files", type=int, default=200_000, help="whose content is digested")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="for the store; a temporary one without")
    args = parser.parse_args()
    keep_freed_memory()
    table = make_table(args.train_images, args.test_images)
    labels = table["label"].to_numpy()
    print(f"{len(table):,} images x {args.dim} float16; {os.cpu_count()} cores, {torch.get_num_threads()} threads")

    def partition(table: pd.DataFrame = table) -> tuple[float, float, Clients]:
        start = time.perf_counter()
        clients = ParentCategory().assign(table, 1000)
        middle = time.perf_counter()
        clients.statistics(labels)
        return middle - start, time.perf_counter() - middle, clients

    runs = [partition() for _ in range(args.repeats)]
    assign, count = (statistics.median(r[i] for r in runs) for i in (0, 1))
    clients = runs[0][2]
    print(f"partition: {len(clients):,} clients in {assign:.2f} s, their statistics in {count:.2f} s", flush=True)
    del runs

    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        first, again = content(Path(name), args.files)
        print(f"content of {args.files:,} files: read in {first:.1f} s, checked in {again:.1f} s", flush=True)

    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        start = time.perf_counter()
        store = make_store(folder, table, args.dim)
        print(f"(store written in {time.perf_counter() - start:.0f} s)", flush=True)
        del table

        # training first: the array in memory of the second part would count as this one's
        before = anonymous_mib()
        with peak_of_memory() as peak:
            step = train(store, labels, clients, args.steps, folder)
        print(f"training, 256 groups, 8 clients of {IMAGES_OF_A_CLIENT} images: {step:.1f} ms per step")
        print(f"anonymous memory: {before:,.0f} MiB before, at most {peak[0]:,.0f} MiB while training", flush=True)

        mapped = store.array()
        (folder / "checksums.json").write_text(checksums_of(folder))
        start = time.perf_counter()
        FeatureStore.open(folder).array()
        print(f"content of the array checked in {time.perf_counter() - start:.1f} s", flush=True)
        memory = np.array(mapped)
        print(f"\n{'clients of a batch':<20}{'':<24}{'images/s':>12}{'of memory':>11}{'major faults':>14}")
        for batch_size in (8, 1):
            rates: dict[str, list[float]] = {"memory": [], "mapped, in page cache": [], "mapped, pages dropped": []}
            reads: dict[str, int] = {}
            for _ in range(args.repeats):
                for way, seen in rates.items():
                    if way == "mapped, pages dropped":
                        array = mapped = None  # the kernel keeps pages that anybody still maps
                        gc.collect()
                        drop_pages(folder / "features.npy")
                        mapped = store.array()
                    array = memory if way == "memory" else mapped
                    some = args.read // 10 if way.endswith("dropped") else args.read
                    faults = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
                    seen.append(images_per_second(loader(array, labels, clients, batch_size), some))
                    reads[way] = resource.getrusage(resource.RUSAGE_SELF).ru_majflt - faults
                mapped.view(np.uint16).max()  # back into the cache
            for way, seen in rates.items():
                share = statistics.median(s / m for s, m in zip(seen, rates["memory"], strict=True))
                print(
                    f"{batch_size:<20}{way:<24}{statistics.median(seen):>12,.0f}{share:>11.0%}{reads[way]:>14,}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
