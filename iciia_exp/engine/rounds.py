"""Rounds: devices and cloud train a network together, one round after the other (`iciia_exp.data.rounds`).

A killed run continues after the last round that is there. A round depends on the network before it and on its number
alone, so it gives the same bytes again.
"""

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from iciia_exp.artifacts import read_json, write_json
from iciia_exp.data.clients import Clients
from iciia_exp.data.rounds import read_round, round_path, write_round
from iciia_exp.engine.inputs import Inputs
from iciia_exp.engine.ledger import sizes_of
from iciia_exp.engine.terminal import progress_bar
from iciia_exp.errors import ConfigError, UserError
from iciia_exp.ledger import Link
from iciia_exp.methods.cotrain.base import CLOUD, CoTrained, Job, Samples, Site, Update, Weights, weights_of

__all__ = ["Exchange", "cloud_rows", "cotrain", "device_rows", "make_round", "report_rounds", "site_of"]

log = logging.getLogger(__name__)

#: Sends a job and the network to devices; returns their answers by number of the device.
Exchange = Callable[[Job, Weights], Mapping[int, Update]]


def device_rows(clients: Clients, devices: int | None) -> list[np.ndarray]:
    """Return the numbers of the train images of every device, int64.

    A device is a client with train images; with ``devices``, so many are made of clients that follow each other.
    """
    own = [rows for c in range(len(clients)) if len(rows := clients.train.values[_span(clients, c)])]
    if devices is None:
        return own
    if devices > len(own):
        problem = f"there are {len(own):,} clients with train images; use fewer, or smaller clients"
        raise ConfigError("method.devices", devices, problem)
    return [np.concatenate([own[c] for c in part]) for part in np.array_split(np.arange(len(own)), devices)]


def _span(clients: Clients, number: int) -> slice:
    return slice(*clients.train.offsets[number : number + 2])


def site_of(inputs: Inputs, method: CoTrained, number: int, rows: np.ndarray, device: torch.device) -> Site:
    """Return a device with its images, or the cloud; only the cloud has the logits of the backbone's classifier.

    Where an arm breaks the premise, devices have them too.
    """
    store = inputs.open_store()
    array = store.array(method.array)
    x = torch.from_numpy(np.array(array[rows])).to(device)
    if x.dtype == torch.float16:
        x = x.float()
    y = torch.from_numpy(inputs.labels[rows]).to(device)
    large = None
    if method.with_backbone and (number == CLOUD or method.large_on_devices):
        features = torch.from_numpy(np.array(store.array()[rows])).float()
        weight, bias = (t.cpu() for t in method.large.parameters())  # type: ignore[operator,union-attr]
        large = F.linear(features, weight, bias).to(device)
    return Site(number, Samples(x, y, large))


def make_round(
    method: CoTrained, weights: Weights, number: int, cloud: Site, exchange: Exchange
) -> tuple[Weights, dict[str, Any]]:
    """Return the network after a round, and facts about it.

    An answer with numbers that are not finite is left out. If nobody is left, the network stays as it is.

    Args:
        method: whose jobs are done.
        weights: the network before.
        number: of the round, from 0.
        cloud: which trains after the devices have answered, with as many steps as they took on average.
        exchange: sends a job to the devices.
    """
    facts: dict[str, Any] = {"jobs": []}
    for job in method.jobs(number):
        answers = dict(exchange(job, weights)) if job.devices else {}
        updates = {site: update for site, update in sorted(answers.items()) if update.finite}
        excluded = sorted(set(answers) - set(updates))
        for site in excluded:
            log.warning("round %d: device %d answers with numbers that are not finite; it is left out", number + 1, site)
        if job.cloud:
            equal = job.equal_steps and updates
            steps = round(np.mean([u.steps for u in updates.values()])) if equal else None
            updates[CLOUD] = method.train_on(cloud, weights, job, steps)
            if not updates[CLOUD].finite:
                raise UserError(f"round {number + 1}: the cloud's training diverges; use a smaller method.lr")
        weights = method.aggregate(job, weights, updates)
        losses = {str(site): round(update.loss, 6) for site, update in updates.items()}
        facts["jobs"].append({"job": job.name, "losses": losses, "excluded": excluded})
    return weights, facts


class _InProcess:
    """Devices of this process, one after the other; their images are loaded when they are first drawn."""

    def __init__(self, inputs: Inputs, method: CoTrained, cloud: Site, rows: list[np.ndarray], device: torch.device):
        self.inputs, self.method, self.cloud, self.rows, self.device = inputs, method, cloud, rows, device
        self.sites: dict[int, Site] = {}
        self.link = self._link()

    def _link(self) -> Link:
        sizes = sizes_of(self.inputs, train=1, received=1, cloud=len(self.cloud.own.y))
        return Link(self.method.name, self.method.budget(sizes))

    def join(self, number: int) -> Site:
        """Return a device, which joins if it has not yet."""
        if number not in self.sites:
            site = site_of(self.inputs, self.method, number, self.rows[number], self.device)
            self.method.join(site, self.cloud, self.link)
            self.sites[number] = site
        return self.sites[number]

    def __call__(self, job: Job, weights: Weights) -> dict[int, Update]:
        drawn, there = self.method.draw(job.round, len(self.rows))
        answers = {}
        for number in drawn.tolist():
            received = self.method.send(weights, self.link)
            if there[drawn == number][0]:
                update = self.method.train_on(self.join(number), received, job)
                answers[number] = self.method.answer(update, received, self.link)
        return answers


def cotrain(inputs: Inputs, folder: Path) -> None:
    """Make the rounds that are missing, ``manifest.json`` last."""
    start = time.monotonic()
    method = inputs.load_run(inputs.run.folder).method
    assert isinstance(method, CoTrained)
    from iciia_exp.engine.devices import first_device

    device = first_device(inputs)
    method.to(device)
    clients = inputs.experiment.client_mix.known(inputs.readable_clients(inputs.open_store()))
    rows = device_rows(clients, method.devices)
    cloud = site_of(inputs, method, CLOUD, cloud_rows(inputs), device)
    devices = _InProcess(inputs, method, cloud, rows, device)
    done = 0
    while round_path(folder, done + 1).is_file():
        done += 1
    weights = weights_of(method.small)
    if not round_path(folder, 0).is_file():
        write_round(folder, 0, weights, {"jobs": []})
    images = sum(map(len, rows))
    before = f", {done} rounds done before" * bool(done)
    log.info("rounds: %s devices with %s images, cloud with %s%s", f"{len(rows):,}", f"{images:,}", f"{len(cloud.own.y):,}", before)
    for number in range(len(rows)):  # in the order of their numbers: what goes up is the same after a kill
        devices.join(number)
    if done:
        weights, _ = read_round(folder, done)
        weights = {name: t.to(device) for name, t in weights.items()}
    with progress_bar() as bar:
        task = bar.add_task("rounds", total=method.rounds, completed=done, note="")
        for number in range(done, method.rounds):
            before_bytes = dict(devices.link.counted)
            weights, facts = make_round(method, weights, number, cloud, devices)
            payloads = [[*key, size - before_bytes.get(key, 0)] for key, size in devices.link.counted.items()]
            facts["payloads"] = [payload for payload in payloads if payload[-1] and payload[0] == "round"]
            write_round(folder, number + 1, weights, facts)
            bar.update(task, completed=number + 1)
    _finish(folder, method, devices, time.monotonic() - start)


def cloud_rows(inputs: Inputs) -> np.ndarray:
    """Return the numbers of the cloud's images: those that the backbone has learned from, and could be read."""
    split, bad = inputs.table["split"].to_numpy(), inputs.open_store().bad
    return np.flatnonzero((split == "backbone") & ~bad)


def _finish(folder: Path, method: CoTrained, devices: _InProcess, seconds: float) -> None:
    once = [[*key, size] for key, size in devices.link.counted.items() if key[0] != "round"]
    per_round: dict[tuple[str, ...], int] = {}
    part = 0
    for number in range(1, method.rounds + 1):
        _, facts = read_round(folder, number)
        part += len(method.draw(number - 1, len(devices.rows))[0])
        for *key, size in facts["payloads"]:
            per_round[tuple(key)] = per_round.get(tuple(key), 0) + size
    received = [0 if site.received is None else len(site.received.y) for _, site in sorted(devices.sites.items())]
    manifest = {
        "format": 1,
        "rounds": method.rounds,
        "devices": len(devices.rows),
        "taking_part": part,
        "train": [len(rows) for rows in devices.rows],
        "received": received,
        "cloud": len(devices.cloud.own.y),
        "payloads": once + [[*key, size] for key, size in per_round.items()],
        "seconds": round(seconds, 2),
    }
    write_json(folder / "manifest.json", manifest)


def report_rounds(folder: Path, made: bool) -> None:
    """Log how long the rounds took, or that they were made before."""
    manifest = read_json(folder / "manifest.json")
    if not made:
        log.info("rounds: %d made before", manifest["rounds"])
        return
    log.info("rounds: %d in %.1f s", manifest["rounds"], manifest["seconds"])
