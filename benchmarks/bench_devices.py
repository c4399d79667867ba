"""Devices that learn: `fit_many` against a loop over clients, on the sizes of digits and of Tiny-ImageNet.

    python benchmarks/bench_devices.py [--devices 2000] [--looped 20] [--threads 2] [--device cuda]

Every client trains a linear classifier as `method=finetune` does, for 20 epochs: SGD, batches of 16, clipped gradients,
accuracy on val images after each epoch. The loop trains one `torch.nn.Linear` after the other; both run in turn, in
shards of 128 clients as in `iciia_exp.engine.devices`. Printed: the median time of a client and the ratio.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from iciia_exp.machine import keep_freed_memory
from iciia_exp.models.fit_many import fit_many
from iciia_exp.models.stacked import Examples
from iciia_exp.recipe import Recipe
from iciia_exp.tasks import SINGLE_LABEL

#: name: classes, features, train and val images of a client
SIZES = {
    "digits": (10, 512, 20, 8),
    "digits, 64 features": (10, 64, 20, 8),
    "Tiny-ImageNet, 20 images": (200, 1280, 20, 10),
    "Tiny-ImageNet, 100 images": (200, 1280, 100, 25),
}
EPOCHS, SHARD = 20, 128
RECIPE = Recipe(partial(torch.optim.SGD, lr=0.01), None, EPOCHS, batch_size=16, clip_norm=5.0)


def examples(clients: int, images: int, dim: int, classes: int) -> Examples:
    """Return random images of some clients, on the default device."""
    mask = torch.ones(clients, images, dtype=torch.bool)
    return Examples(torch.randn(clients, images, dim), torch.randint(0, classes, (clients, images)), mask)


def timed(work: Callable[[], object], device: str) -> float:
    """Return the seconds that some work takes."""
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def loop(head: nn.Linear, train: Examples, val: Examples) -> None:
    """Train one client after the other."""
    for x, y, held, held_y in zip(train.x, train.y, val.x, val.y, strict=True):
        net = nn.Linear(head.in_features, head.out_features)
        net.load_state_dict(head.state_dict())
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        best = (net(held).argmax(-1) == held_y).float().mean()
        for _ in range(EPOCHS):
            for at in range(0, len(x), 16):
                optimizer.zero_grad()
                nn.functional.cross_entropy(net(x[at : at + 16]), y[at : at + 16]).backward()
                nn.utils.clip_grad_norm_(net.parameters(), 5.0)
                optimizer.step()
            with torch.no_grad():
                best = torch.maximum(best, (net(held).argmax(-1) == held_y).float().mean())


def main() -> None:
    """Print a line for each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=2000)
    parser.add_argument("--looped", type=int, default=20, help="clients of the loop per shard")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options = parser.parse_args()
    torch.set_default_device(options.device)
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    shard = min(SHARD, options.devices)
    for name, (classes, dim, images, held) in SIZES.items():
        torch.manual_seed(0)
        head = nn.Linear(dim, classes)
        looped, together = [], []
        for _ in range(max(3, options.devices // shard)):
            train, val = (examples(shard, n, dim, classes) for n in (images, held))
            few = slice(0, options.looped)
            slow, fast = partial(loop, head, train.take(few), val.take(few)), partial(fit_many, head, train, val)
            looped.append(timed(slow, options.device) / options.looped)
            fast = partial(fast, SINGLE_LABEL, RECIPE, patience=EPOCHS)
            together.append(timed(fast, options.device) / shard)
        ratio = statistics.median(a / b for a, b in zip(looped, together, strict=True))
        one, many = (1e3 * statistics.median(times) for times in (looped, together))
        print(f"{name:<26} loop {one:7.2f} ms a client, fit_many {many:6.3f} ms, {ratio:5.0f} times", flush=True)


if __name__ == "__main__":
    main()
