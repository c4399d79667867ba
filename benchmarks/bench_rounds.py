"""Rounds of cloud and devices in one process, against the arithmetic of their steps alone.

    python benchmarks/bench_rounds.py [--devices 100] [--images 16] [--rounds 10] [--threads 1]

DC-CCL with the network of `dc_ccl_digits`. The arithmetic is as many forward and backward passes, and steps of
SGD, on batches of the same sizes, of one network that nobody copies, sends or averages.
"""

import argparse
import time
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from iciia_exp.engine.rounds import make_round
from iciia_exp.ledger import Link, Sizes
from iciia_exp.methods.base import Facts
from iciia_exp.methods.cotrain.dc_ccl import DCCCL
from iciia_exp.methods.cotrain.sites import CLOUD, Samples, Site, weights_of
from iciia_exp.models.backbones.small_cnn import SmallCNN

D, K = 512, 10


def site(number: int, images: int) -> Site:
    """Return a site with random images and logits of the backbone."""
    x, y = torch.randn(images, 1, 8, 8), torch.randint(0, K, (images,))
    return Site(number, Samples(x, y, torch.randn(images, K) if number == CLOUD else None))


def main() -> None:
    """Measure and print both times and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=100)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    facts = Facts.of(nn.Linear(D, K), arrays={"images": (1, 8, 8)})
    network = partial(SmallCNN, width=8, dim=64, dropout=0.0)
    method = DCCCL(facts, network=network, rounds=options.rounds, local_epochs=5, retune="none")
    cloud, devices = site(CLOUD, 800), [site(number, options.images) for number in range(options.devices)]
    link = Link("dc_ccl", method.budget(Sizes(train=options.images, received=1, cloud=800, sample_bytes=256)))
    for device in devices:
        method.join(device, cloud, link)
    steps: list[int] = []

    def fleet(job, weights):  # type: ignore[no-untyped-def]
        answers = {}
        for device in devices:
            received = method.send(weights, link)
            update = method.train_on(device, received, job)
            answers[device.number] = method.answer(update, received, link)
            steps.append(update.steps)
        return answers

    weights = {name: t.clone() for name, t in weights_of(method.small).items()}
    start = time.perf_counter()
    for number in range(options.rounds):
        weights, _ = make_round(method, weights, number, cloud, fleet)
    rounds = time.perf_counter() - start

    alone = network(num_classes=K).train()
    optimizer = torch.optim.SGD(alone.parameters(), 0.01, 0.9, weight_decay=5e-4)
    own = len(devices[0].samples.y)
    size = -(-own // -(-own // method.batch_size))
    in_cloud = options.rounds * round(sum(steps) / len(steps))
    batches = [(size, sum(steps)), (method.cloud_batch_size, in_cloud)]
    start = time.perf_counter()
    for images, count in batches:
        x, y = torch.randn(images, 1, 8, 8), torch.randint(0, K, (images,))
        for _ in range(count):
            optimizer.zero_grad()
            F.cross_entropy(alone(x), y).backward()
            optimizer.step()
    arithmetic = time.perf_counter() - start
    print(f"{options.devices} devices of {options.images} images, {options.rounds} rounds, {sum(steps):,} steps")
    print(f"rounds {rounds:.1f} s, arithmetic {arithmetic:.1f} s: {rounds / arithmetic:.2f} times")


if __name__ == "__main__":
    main()
