"""Devices: the clients' devices learn their states, in shards that are finished one by one.

A killed run continues with the shards that are missing. Several processes that run the same command, on one machine or
as jobs of a cluster, share the shards by a lock for each.
"""

import logging
import math
import time
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from rich.filesize import decimal

from iciia_exp.artifacts import locked, read_json, write_json
from iciia_exp.data.states import read_facts, shard_clients, shard_path, write_shard
from iciia_exp.data.views import CloudView, Devices
from iciia_exp.engine.inputs import Inputs
from iciia_exp.engine.ledger import sizes_of
from iciia_exp.engine.terminal import progress_bar
from iciia_exp.errors import UserError
from iciia_exp.ledger import Link, added_up
from iciia_exp.methods.base import Ask
from iciia_exp.methods.tune.base import Personal

__all__ = ["first_device", "personalise", "report_devices"]

log = logging.getLogger(__name__)

#: Devices of a shard. Small enough that the states of a linear classifier (D = 1280, K = 200) stay in memory that is
#: used again, 128 MiB.
SHARD = 128

#: Numbers that the images of a shard have together, at most, if it has several devices: 1 GiB.
_NUMBERS = 1 << 28


def personalise(inputs: Inputs, folder: Path) -> None:
    """Learn the states of all devices with test images, ``manifest.json`` last; shared with other processes."""
    method = inputs.load_run(inputs.run.folder).method
    assert isinstance(method, Personal)
    store = inputs.open_store()
    clients, batches = inputs.known_clients, inputs.batches(store)
    devices = Devices(clients, batches, test_labels=Ask.TEST_LABELS in method.asks)
    cloud = CloudView(clients, batches, inputs.num_classes, inputs.experiment.training.images)
    shard = _shard_size(inputs, devices)
    shards = [devices.tested[at : at + shard] for at in range(0, len(devices.tested), shard)]
    missing = [number for number in range(len(shards)) if not _is_made(folder, number, shards[number])]
    size, count = method.state_bytes(), len(devices.tested)
    done = f", {len(shards) - len(missing):,} of {len(shards):,} shards done before" * (len(missing) < len(shards))
    most = " at most" if method.tables else ""
    log.info("devices: %s x %s%s%s", f"{count:,}", decimal(size), most, done)
    device = first_device(inputs)
    method.to(device)
    with progress_bar() as bar:
        task = bar.add_task("devices", total=len(shards), completed=len(shards) - len(missing), note="shards")
        for wait in (False, True):  # first those that nobody works at, then those of others, which may have died
            for number in missing:
                lock = FileLock(folder / f".{number:05d}.lock")
                try:
                    with lock.acquire(timeout=-1 if wait else 0):
                        if not _is_made(folder, number, shards[number]):
                            _make_shard(inputs, method, devices, cloud, shards[number], folder, number, device)
                except Timeout:
                    continue
                bar.update(task, completed=sum(shard_path(folder, n).is_file() for n in range(len(shards))))
    with locked(folder / "manifest.json", "the states of the devices"):
        if not (folder / "manifest.json").is_file():
            _finish(folder, shards)


def _is_made(folder: Path, number: int, clients: np.ndarray) -> bool:
    """Return whether a shard is there, and has these clients: their number may have been another before a kill."""
    return shard_path(folder, number).is_file() and np.array_equal(shard_clients(folder, number), clients)


def _shard_size(inputs: Inputs, devices: Devices) -> int:
    """Return the number of devices of a shard."""
    longest = sum(int(devices.lengths(role)[devices.tested].max(initial=0)) for role in ("train", "val"))
    numbers = longest * sum(math.prod(shape) for shape in inputs.array_shapes.values())
    return max(1, min(SHARD, _NUMBERS // max(1, numbers)))


def first_device(inputs: Inputs) -> torch.device:
    """Return the first device of the `trainer` group."""
    from iciia_exp.engine.training.trainer import make_trainer, on_one_device, quiet_lightning  # late: Lightning

    with quiet_lightning():
        return make_trainer(on_one_device(inputs.experiment.config["trainer"])).strategy.root_device


def _make_shard(
    inputs: Inputs,
    method: Personal,
    devices: Devices,
    cloud: CloudView,
    numbers: np.ndarray,
    folder: Path,
    number: int,
    device: torch.device,
) -> None:
    """Learn the states of some devices and write them."""
    start = time.monotonic()
    link = Link(method.name, method.budget(sizes_of(inputs)))
    own = {role: batch.moved(device) for role, batch in devices.own(numbers).items()}
    learned = method.personalise(own, link, cloud)
    for name, state in learned.states.items():
        if tuple(state.shape[1:]) != method.state_shapes[name]:
            raise ValueError(f"{method.name}: state {name} is {list(state.shape)}, not as its state_shapes")
        finite_C = state.flatten(1).isfinite().all(1)
        if not finite_C.all():
            client = inputs.clients.ids[numbers[int(finite_C.int().argmin())]]
            problem = f"the state that it learned ({name}) has numbers that are not finite"
            raise UserError(f"client {client}: {problem}; a smaller learning rate may help")
    facts = {
        "epochs": learned.epochs_C.tolist(),
        "counts": {name: count_C.tolist() for name, count_C in learned.counts.items()},
        "seconds": round(time.monotonic() - start, 3),
        "payloads": link.payloads(),
    }
    write_shard(folder, number, numbers, learned.states, facts, method.tables)


def _finish(folder: Path, shards: list[np.ndarray]) -> None:
    """Write the manifest."""
    facts = [read_facts(folder, number) for number in range(len(shards))]
    devices = sum(map(len, shards))
    epochs = [count for shard in facts for count in shard["epochs"]]
    counts: dict[str, list[int]] = {}
    for name, own in (pair for shard in facts for pair in shard.get("counts", {}).items()):
        counts.setdefault(name, []).extend(own)
    manifest = {
        "format": 1,
        "shards": len(shards),
        "devices": devices,
        "epochs": epochs,
        "counts": counts,
        "seconds": round(sum(shard["seconds"] for shard in facts), 2),
        "payloads": added_up(shard["payloads"] for shard in facts),
    }
    write_json(folder / "manifest.json", manifest)
    for number in range(len(shards)):
        (folder / f".{number:05d}.lock").unlink(missing_ok=True)


def report_devices(folder: Path, made: bool) -> None:
    """Log how long the devices learned, or that they did before."""
    manifest = read_json(folder / "manifest.json")
    count, epochs = manifest["devices"], manifest["epochs"]
    if not made:
        log.info("devices: %s learned before", f"{count:,}")
        return
    found = {"epochs": epochs, **manifest.get("counts", {})}
    if means := [f"{np.mean(values):,.1f} {name}" for name, values in found.items() if any(values)]:
        log.info("devices: %s on average, in %.1f s", ", ".join(means), manifest["seconds"])
