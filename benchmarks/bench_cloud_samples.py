"""MPDA and CoDA: many devices at once against a loop over devices, memory by the number of clients, and the search.

    python benchmarks/bench_cloud_samples.py methods [--clients 10000] [--looped 10] [--threads 2]
    python benchmarks/bench_cloud_samples.py clicks [--clients 610] [--looped 10] [--models wide_deep din]
    python benchmarks/bench_cloud_samples.py search [--samples 10000 100000] [--library faiss] [--threads 2]

`methods`: simulated clients with 2 of 10 classes and 20 train images each. The loop trains one `torch.nn.Linear` after
the other, on the same samples with the same recipe; both run in turn, in shards of 128 clients as in
`iciia_exp.engine.devices`. Printed: median time of a client, the ratio, the time of all clients and the memory that is
held at the end and at a tenth of the clients. `clicks`: the same with whole click models, of simulated users of 9,742
items, whose numbers of ratings are distributed as in ml-latest-small (median 56 train ratings, 2,158 at most).
`search`: samples nearest to 20 own images of a client.
"""

import argparse
import copy
import resource
import statistics
import time
from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from iciia_exp.data.batches import ClientIndex, FeatureBatches
from iciia_exp.data.clients import Clients, Ragged
from iciia_exp.data.views import CloudView, Devices
from iciia_exp.ledger import Link, Sizes
from iciia_exp.machine import keep_freed_memory
from iciia_exp.methods.base import Facts
from iciia_exp.methods.tune.cloud_samples import CloudSamples
from iciia_exp.methods.tune.coda import CoDA
from iciia_exp.methods.tune.mpda import MPDA
from iciia_exp.models.backbones.recommender import ClickModel
from iciia_exp.models.on_catalog import OnCatalog
from iciia_exp.models.recommenders import RECOMMENDERS
from iciia_exp.models.retrieval import SEARCH, Pool
from iciia_exp.tasks import CLICK

CLASSES, IMAGES, SHARD = 10, 20, 128
ITEMS, SLOTS = 9742, 30


def simulated(clients: int, dim: int) -> tuple[Clients, FeatureBatches]:
    """Return clients with 20 train images of 2 classes each, and their features."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((CLASSES, dim))
    own = rng.permuted(np.tile(np.arange(CLASSES), (clients, 1)), axis=1)[:, :2]
    labels = own[np.arange(clients)[:, None], rng.integers(0, 2, (clients, IMAGES))].ravel()
    features = np.empty((len(labels), dim), dtype=np.float32)
    for part in np.array_split(np.arange(len(labels)), max(1, len(labels) // 10_000)):
        features[part] = centres[labels[part]] + 2 * rng.standard_normal((len(part), dim))
    ids, empty = np.array([f"c{i}" for i in range(clients)], dtype=object), Ragged.empty(clients)
    train = Ragged.from_lengths(np.full(clients, IMAGES), np.arange(len(labels)))
    return Clients(ids, ids, train, empty, empty), FeatureBatches(features, labels)


def passes(
    net: nn.Module, x: torch.Tensor, y: torch.Tensor, epochs: int, lr: float, size: int, loss: Callable
) -> nn.Module:
    """Train a copy of a network."""
    net = copy.deepcopy(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    for _ in range(epochs):
        for at in range(0, len(x), size):
            optimizer.zero_grad()
            loss(net(x[at : at + size]), y[at : at + size]).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 5.0)
            optimizer.step()
    return net


#: Training of a classifier, and of a click model.
CLASSIFIER = partial(passes, lr=0.05, size=16, loss=F.cross_entropy)
CLICK_MODEL = partial(passes, epochs=1, lr=0.01, size=32, loss=CLICK.loss)


def selected(net: nn.Module, x: torch.Tensor, y: torch.Tensor, others: Iterable[tuple], train: partial) -> nn.Module:
    """Train a network on the samples of others that lower the loss on the own ones, one after the other."""
    loss = train.keywords["loss"]
    with torch.no_grad():
        best = loss(net(x), y)
    for other in others:
        tried = train(net, *other)
        with torch.no_grad():
            found = loss(tried(x), y)
        if found < best - 1e-7:
            net, best = tried, found
    return net


def loop(head: nn.Linear, cloud: CloudView, numbers: np.ndarray, kind: str) -> None:
    """Train one client after the other; matching is left out."""
    for number in numbers:
        others = np.arange(number + 1, number + 21) % len(cloud.clients)
        index = cloud.clients.train.padded(np.append(others, number), IMAGES)
        batch = cloud[ClientIndex(index, np.append(others, number))]
        x, y, net = batch.x_CSD[-1], batch.y_CS[-1], head
        if kind == "coda":
            net = CLASSIFIER(net, batch.x_CSD[:10].flatten(0, 1), batch.y_CS[:10].flatten(), epochs=5)
        else:
            others = zip(batch.x_CSD[:-1], batch.y_CS[:-1], strict=True)
            net = selected(net, x, y, others, partial(CLASSIFIER, epochs=5))
        CLASSIFIER(net, x, y, epochs=20)


def timed(work: Callable[[], object]) -> float:
    """Return the seconds that some work takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def methods(options: argparse.Namespace) -> None:
    """Print a line for each method and size."""
    for dim in (64, 512):
        clients, batches = simulated(options.clients, dim)
        cloud, devices = CloudView(clients, batches, CLASSES, IMAGES), Devices(clients, batches)
        torch.manual_seed(0)
        head = nn.Linear(dim, CLASSES)
        kinds: dict[str, CloudSamples] = {"mpda": MPDA(Facts.of(head)), "coda": CoDA(Facts.of(head))}
        for kind, method in kinds.items():
            method.learn(cloud, lambda *_: {})
            link = Link(kind, method.budget(Sizes()))
            shards = np.split(np.arange(len(clients)), range(SHARD, len(clients), SHARD))
            every = max(1, len(shards) // 5)
            looped, together, held = [], [], 0
            for at, numbers in enumerate(shards):
                own = devices.own(numbers)
                with torch.no_grad():
                    together.append(timed(partial(method.personalise, own, link, cloud)) / len(numbers))
                if at % every == 0:
                    looped.append(timed(partial(loop, head, cloud, numbers[: options.looped], kind)) / options.looped)
                    held = held or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            pairs = zip(looped, together[::every], strict=False)
            ratio = statistics.median(a / b for a, b in pairs)
            one, many = (1e3 * statistics.median(times) for times in (looped, together))
            whole = sum(t * len(n) for t, n in zip(together, shards, strict=True))
            growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held
            print(
                f"{kind}, D = {dim}: loop {one:.1f} ms a client, together {many:.2f} ms, {ratio:.0f} times; "
                f"{len(clients):,} clients {whole:.0f} s, {growth / 1024:.0f} MiB more than after the first shard",
                flush=True,
            )


def users(count: int) -> tuple[Clients, FeatureBatches]:
    """Return users with random ratings, and their earlier items as histories."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(56), 1.1, count), 8, 2158).astype(int)
    total = int(lengths.sum())
    rows = rng.integers(0, ITEMS, (total, 2 + 2 * SLOTS), dtype=np.int32)
    rows[:, 0] = np.repeat(np.arange(count), lengths)
    seen = np.concatenate([np.arange(length) for length in lengths])
    rows[:, 2:][np.tile(np.arange(SLOTS), 2) >= seen[:, None] // 2] = -1
    ids, empty = np.array([f"u{i}" for i in range(count)], dtype=object), Ragged.empty(count)
    train = Ragged.from_lengths(lengths, np.arange(total))
    batches = FeatureBatches(np.zeros((total, 1), np.float32), rng.integers(0, 2, total), arrays={"images": rows})
    return Clients(ids, ids, train, empty, empty), batches


def click_loop(net: OnCatalog, clients: Clients, batches: FeatureBatches, numbers: np.ndarray, others: int) -> None:
    """Train one user's model after the other, on random users that are accepted or not, and on the own ratings."""

    def items(user: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = clients.train[user]
        return torch.from_numpy(batches.arrays["images"][rows]), torch.from_numpy(batches.labels[rows])

    for number in numbers.tolist():
        own, more = items(number), (items((number + 1 + other) % len(clients)) for other in range(others))
        CLICK_MODEL(selected(net, *own, more, CLICK_MODEL), *own)


def clicks(options: argparse.Namespace) -> None:
    """Print a line for each model and arm."""
    clients, batches = users(options.clients)
    devices = Devices(clients, batches)
    categories = [[i % 18, i % 7] for i in range(ITEMS)]
    for model in options.models:
        torch.manual_seed(0)
        backbone = ClickModel(2, model, users=options.clients, items=ITEMS, item_categories=categories).eval()
        cloud = CloudView(clients, batches, 2, 16, backbone=lambda backbone=backbone: backbone)
        arrays = {"images": batches.arrays["images"].shape[1:]}
        facts = Facts(CLICK, backbone.head, arrays=arrays, network=lambda backbone=backbone: copy.deepcopy(backbone))
        for arm, others in (("local", 0), ("mpda", 5)):
            recipe = {"lr": 0.01, "batch_size": 32, "epochs": 1, "own_epochs": 1}
            method = MPDA(facts, arm, "backbone", "random", max(1, others), **recipe)
            method.learn(cloud, lambda *_: {})
            link = Link("mpda", method.budget(Sizes()))
            looped, together, held = [], [], 0
            for numbers in np.array_split(
                np.random.default_rng(1).permutation(len(clients)), -(-len(clients) // SHARD)
            ):
                with torch.no_grad():
                    together.append(timed(partial(method.personalise, devices.own(numbers), link, cloud)))
                if len(looped) < 5:
                    some = numbers[: options.looped]
                    looped.append(timed(partial(click_loop, backbone.net, clients, batches, some, others)) / len(some))
                held = held or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            one, many = 1e3 * statistics.mean(looped), 1e3 * sum(together) / len(clients)
            growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held
            print(
                f"{model}, {arm}, {others} candidates: loop {one:.1f} ms a user, together {many:.2f} ms, "
                f"{one / many:.1f} times; {growth / 1024:.0f} MiB more than after the first shard",
                flush=True,
            )


def search(options: argparse.Namespace) -> None:
    """Print the time of a client's search by the size of the pool."""
    rng, width = np.random.default_rng(0), 2 * 512
    for samples in options.samples:
        unit = rng.standard_normal((samples, width), dtype=np.float32)
        unit /= np.linalg.norm(unit, axis=1, keepdims=True)
        pool = Pool(unit, np.arange(samples) // IMAGES, options.library)
        clients = np.arange(SHARD)
        queries = [unit[IMAGES * c : IMAGES * (c + 1)] for c in clients]
        counts = np.full(SHARD, 10 * IMAGES)
        seconds = statistics.median(timed(partial(pool.nearest, queries, clients, counts)) for _ in range(3))
        each = 1e3 * seconds / SHARD
        print(f"{samples:,} samples of {width} numbers: {each:.2f} ms a client, {1e3 * each / samples:.4f} µs a sample")


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("methods", "clicks", "search"))
    parser.add_argument("--clients", type=int, help="default: 10,000, of clicks 610")
    parser.add_argument("--models", nargs="+", default=["wide_deep", "din"], choices=RECOMMENDERS)
    parser.add_argument("--looped", type=int, default=10, help="clients of the loop per shard")
    parser.add_argument("--samples", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--library", default="scikit-learn", choices=SEARCH, help="of the search")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    options.clients = options.clients or (610 if options.part == "clicks" else 10_000)
    {"methods": methods, "clicks": clicks, "search": search}[options.part](options)


if __name__ == "__main__":
    main()
