"""Time and memory of the methods without training: 10,000 clients of 16 images, 1,000 classes, 1,280 features.

    python benchmarks/bench_rivals.py [--clients 10000] [METHOD ...]

Features are random, in batches of 64 clients as an evaluation has them; the backbone's classifier is part of the time.
One method after the other; the peak of resident memory is that of the process so far.
"""

from __future__ import annotations

import argparse
import resource
import time

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn

from iciia_exp.config.paths import CONF_DIR
from iciia_exp.data.batches import FeatureBatches
from iciia_exp.data.clients import Clients, Ragged
from iciia_exp.data.views import CloudView
from iciia_exp.methods.base import Facts

D, K, S = 1280, 1000, 16
METHODS = ("prior_em", "prior_map", "smoothed_prior", "client_types", "client_prior", "lame", "t3a", "stata")


def cloud(clients: int = 3161, classes: int = 15) -> CloudView:
    """Return training and val clients with some classes each, for what methods read beforehand."""
    rng = np.random.default_rng(0)
    own = np.stack([rng.permutation(K)[:classes] for _ in range(clients)])
    labels = own[np.repeat(np.arange(clients), 2 * S), rng.integers(0, classes, 2 * S * clients)]
    features = rng.standard_normal((len(labels), D), dtype=np.float32)
    rows = np.arange(len(labels)).reshape(clients, 2, S)
    offsets = np.arange(clients + 1) * S
    parts = [Ragged(offsets, rows[:, role].reshape(-1)) for role in range(2)]
    names = np.array([str(i) for i in range(clients)], dtype=object)
    nobody = Ragged(np.zeros(clients + 1, np.int64), np.empty(0, np.int64))
    people = Clients(names, names, parts[0], parts[1], nobody)
    return CloudView(people, FeatureBatches(features, labels), K, S)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", default=METHODS, metavar="METHOD", help=", ".join(METHODS))
    parser.add_argument("--clients", type=int, default=10_000)
    options = parser.parse_args()
    torch.manual_seed(0)
    head = nn.Linear(D, K)
    data = cloud()
    batches = [torch.randn(64, S, D) for _ in range(4)]
    print(f"{options.clients:,} clients x {S} images, K={K}, D={D}, {torch.get_num_threads()} threads")
    print(f"{'method':<16}{'seconds':>9}{'images/s':>10}{'before, s':>11}{'peak, GiB':>11}")
    for name in options.methods:
        node = OmegaConf.load(CONF_DIR / "method" / f"{name}.yaml")
        method = instantiate(node, facts=Facts.of(head), _convert_="all").eval()
        start = time.perf_counter()
        part = getattr(method, "prior", method)
        part.read(data)
        part.grids = {}  # hyper-parameters as they are: what is timed does not depend on them
        method.calibrate(list(data.chunks("val", most_images=2000)))
        ready = time.perf_counter()
        with torch.inference_mode():
            for i in range(-(-options.clients // 64)):
                method(batches[i % 4])
        took = time.perf_counter() - ready
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        rate = options.clients * S / took
        print(f"{name:<16}{took:>9.1f}{rate:>10,.0f}{ready - start:>11.1f}{peak:>11.2f}", flush=True)


if __name__ == "__main__":
    main()
