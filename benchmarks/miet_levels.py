"""MIET's ablations from one store of levels: k, grid, payload, blocks, what a block is, and shots; mean of three seeds.

    python benchmarks/results.py miet_bytes --data FOLDER --weights FOLDER
    python benchmarks/miet_levels.py --part bytes|sums|blocks|shots [overrides of the experiment ...]

The figures are stored in `docs/results/miet_PART.csv`, a line for each run; what is there is not repeated. Every level
of the backbone is stored once (`method=last`); sums and grids are taken from the stored levels, rounded to float16 as a
store of tokens is. Devices learn with `iciia_exp.methods.tune.miet.Miet`, on the clients of the experiment's partition
with `partition.seed` and `method.seed` 0, 1 and 2, and classify all test images of their classes.
"""

from __future__ import annotations

import argparse
import time
from functools import cache, partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from hydra import compose, initialize_config_dir
from settings import SEEDS
from stored import store, stored, stored_of

from iciia_exp.config.experiment import Experiment
from iciia_exp.config.paths import CONF_DIR
from iciia_exp.data.batches import FeatureBatches
from iciia_exp.data.clients import Clients
from iciia_exp.data.views import CloudView, Devices
from iciia_exp.engine.execute import execute
from iciia_exp.engine.stages import Stages
from iciia_exp.ledger import Link, Sizes
from iciia_exp.methods.base import Facts
from iciia_exp.methods.tune.base import Personal
from iciia_exp.methods.tune.linear_probe import LinearProbe
from iciia_exp.methods.tune.miet import Miet
from iciia_exp.models.gather import Gather
from iciia_exp.models.lae import prefix_tokens
from iciia_exp.models.payloads import packed_bytes

RECIPE: dict[str, Any] = {"epochs": 40, "linear_epochs": 50, "patience": 10}
ATTENTION = {"blocks": 1}

#: (label, levels, grid, arguments of the method), by part. Levels: k for the sum to level k, "last" for the last alone,
#: "normalised" for the sum of all levels of length 1, or "features".
SUMS = [
    ("linear, last feature", "features", None, {}),
    ("linear, last level", "last", None, {"blocks": 0}),
    *((f"linear, k = {k}", k, None, {"blocks": 0}) for k in (3, 6, 9, 12)),
    ("linear, normalised levels", "normalised", None, {"blocks": 0}),
    ("attention, last level", "last", None, ATTENTION),
    *((f"attention, k = {k}", k, None, ATTENTION) for k in (6, 12)),
]
BYTES = [
    ("linear, last feature", "features", None, {}),
    ("linear", 12, None, {"blocks": 0}),
    ("linear, int8", 12, None, {"blocks": 0, "payload": "int8"}),
    ("attention", 12, None, ATTENTION),
    ("attention, int8", 12, None, ATTENTION | {"payload": "int8"}),
    ("attention, 4 x 4", 12, 4, ATTENTION),
    ("attention, 4 x 4, int8", 12, 4, ATTENTION | {"payload": "int8"}),
    ("attention, 2 x 2, int8", 12, 2, ATTENTION | {"payload": "int8"}),
]
BLOCKS = [
    ("linear", 12, 4, {"blocks": 0}),
    *((f"attention, m = {m}", 12, 4, {"blocks": m}) for m in (1, 2, 4)),
    *((f"attention, r = {r}", 12, 4, {"blocks": 1, "rank": r}) for r in (4, 64)),
    ("perceptron", 12, 4, {"blocks": 1, "mixer": "perceptron"}),
    ("linear, mean", 12, 4, {"blocks": 0, "pool": "mean"}),
    ("attention, mean", 12, 4, {"blocks": 1, "pool": "mean"}),
    ("convolution, mean", 12, 4, {"blocks": 1, "pool": "mean", "mixer": "convolution"}),
    ("attention, subtracted", 12, 4, {"blocks": 1, "subtract": True}),
    ("attention, not standardised", 12, 4, {"blocks": 1, "standardise": False}),
]
#: The linear classifier is trained as long, at as many rates, as it is before the attention.
LONG = {"lr": [0.001, 0.003, 0.01], "linear_epochs": 100}
SHOTS = [
    ("linear, last feature", "features", None, LONG | {"epochs": 100, "patience": 100}),
    ("linear", 12, 4, LONG | {"epochs": 100, "patience": 100, "blocks": 0}),
    ("attention", 12, 4, LONG | ATTENTION),
]
PARTS = {
    "sums": (SUMS, (10,)),
    "bytes": (BYTES, (10,)),
    "blocks": (BLOCKS, (10,)),
    "shots": (SHOTS, (2, 10, 20)),
}


def stages_of(*overrides: str) -> Stages:
    """Compose an experiment."""
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return Stages(Experiment.from_config(compose("config", overrides=list(overrides))))


def tokens_of(levels: np.ndarray, which: Any, grid: int | None) -> np.ndarray:
    """Return a sum of stored levels, float16 [M, n, d]."""
    depth, tokens = levels.shape[1] - 1, levels.shape[2]
    prefix = prefix_tokens(tokens)
    gather = Gather(0, None, grid, depth, tokens - prefix)
    parts = []
    for at in range(0, len(levels), 256):
        z = torch.from_numpy(np.asarray(levels[at : at + 256], dtype=np.float32))
        if which == "normalised":
            z = z / z.norm(dim=-1, keepdim=True).clamp(min=1e-6)
        part = z[:, -1] if which == "last" else z.sum(1) if which == "normalised" else z[:, : which + 1].sum(1)
        parts.append(gather.pooled(part, prefix).half().numpy())
    return np.concatenate(parts)


def accuracy(method: Personal, clients: Clients, batches: FeatureBatches) -> float:
    """Let devices learn one after another; return the mean over clients of their accuracy on test images."""
    found, devices, link = [], Devices(clients, batches, test_labels=True), Link(method.name, method.budget(Sizes()))
    for client in devices.tested:
        own = devices.own(np.array([client]))
        test = own.pop("test")  # not for the method
        states = method.personalise(own, link, None).states
        with torch.inference_mode():
            right = (method.classify(test, states).argmax(-1) == test.y_CS)[test.mask_CS]
        found.append(float(right.float().mean()))
    return float(np.mean(found))


def main() -> None:
    """Run one part and store its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, required=True)
    parser.add_argument("overrides", nargs="+")
    given = parser.parse_args()
    made = stages_of(*given.overrides, "method=last")
    if not made.features.finished:
        execute(stages_of(*given.overrides, "method=last", "stage=features", "logger=none"))
    levels = made.open_store()
    sums, labels = cache(partial(tokens_of, levels.array("levels"))), made.labels
    settings, all_shots = PARTS[given.part]
    table = f"miet_{given.part}"
    done = stored(table).to_dict("records") if stored_of([table]) else []
    known = {(row["label"], row["seed"]) for row in done}

    def name(label: str, shots: int) -> str:
        return f"{label} {shots}" if len(all_shots) > 1 else label

    order = [name(label, shots) for label, *_ in settings for shots in all_shots]
    for shots in all_shots:
        for seed in SEEDS:
            more = (f"partition.shots={shots}", f"partition.seed={seed}")
            clients = stages_of(*given.overrides, "method=last", *more).readable_clients(levels)
            for label, which, grid, arguments in settings:
                key = name(label, shots)
                if (key, seed) in known:
                    continue
                head = torch.nn.Linear(levels.dim, made.num_classes)
                if which == "features":
                    batches = FeatureBatches(levels.array(), labels)
                    method: Personal = LinearProbe(Facts.of(head), seed=seed, **RECIPE | arguments)
                else:
                    tokens = sums(which, grid)
                    batches = FeatureBatches(levels.array(), labels, arrays={"tokens": tokens})
                    facts = Facts.of(head, arrays={"tokens": tokens.shape[1:]})
                    method = Miet(facts, seed=seed, **RECIPE | arguments)
                start = time.monotonic()
                method.learn(CloudView(clients, batches, made.num_classes, 16), lambda *_: {})
                found = accuracy(method, clients, batches)
                done.append(
                    {
                        "label": key,
                        "seed": seed,
                        "oracle": False,
                        "accuracy": round(found, 6),
                        "request_down_bytes": packed_bytes(method.shape, method.sent),
                        "seconds": round(time.monotonic() - start, 1),
                    }
                )
                store(table, pd.DataFrame(done), order)
                print(f"{key}, seed {seed}: {100 * found:.1f} % in {done[-1]['seconds']} s", flush=True)


if __name__ == "__main__":
    main()
