"""Rounds: devices and cloud train a network together, one round after the other (`iciia_exp.data.rounds`).

A killed run continues after the last round that is there. A round depends on the network before it and on its number
alone, so it gives the same bytes again.
"""

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from iciia_exp.artifacts import load_tensors, read_json, write_json
from iciia_exp.data.clients import Clients
from iciia_exp.data.rounds import read_round, round_path, write_round
from iciia_exp.engine.devices import first_device
from iciia_exp.engine.inputs import Inputs
from iciia_exp.engine.ledger import sizes_of
from iciia_exp.engine.terminal import progress_bar
from iciia_exp.errors import ConfigError, NotApplicable, UserError
from iciia_exp.ledger import Link, added_up
from iciia_exp.methods.cotrain.base import CoTrained
from iciia_exp.methods.cotrain.sites import CLOUD, Job, Samples, Site, Update, Weights, weights_of

__all__ = [
    *("Fleet", "LocalFleet", "check_sites", "cotrain", "device_rows", "link_of", "make_round"),
    *("report_rounds", "site_of"),
]

log = logging.getLogger(__name__)


def check_sites(inputs: Inputs, method: CoTrained) -> None:
    """Raise an error if the cloud or the devices have no images, or there are fewer clients than devices."""
    if not (inputs.table["split"] == "backbone").any():
        problem = "the cloud trains on the backbone's images, and it has none of its own"
        hint = "choose some classes with backbone.unseen_classes, or a share with backbone.reserve"
        raise NotApplicable("method", method.name, f"{problem}; {hint}")
    device_rows(inputs.experiment.client_mix.known(inputs.clients), method.devices)


def device_rows(clients: Clients, devices: int | None) -> list[np.ndarray]:
    """Return the numbers of the train images of every device, int64.

    A device is a client with train images; with ``devices``, so many are made of clients that follow each other.
    """
    own = [rows for c in range(len(clients)) if len(rows := clients.train.values[_span(clients, c)])]
    if not own:
        raise ConfigError("partition", "train", "no client has train images, and so there is no device")
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
    if number == CLOUD or method.large_on_devices:
        features = torch.from_numpy(np.array(store.array()[rows])).float()
        with torch.no_grad():
            large = method.large_logits(features.to(device))
    return Site(number, Samples(x, y, large))


def make_round(
    method: CoTrained, weights: Weights, number: int, cloud: Site, fleet: Callable[[Job, Weights], Mapping[int, Update]]
) -> tuple[Weights, dict[str, Any]]:
    """Return the network after a round, and facts about it.

    An answer with numbers that are not finite, or of another network, is left out. If no device is left, a job of the
    devices changes nothing: the cloud does not train alone.

    Args:
        method: whose jobs are done.
        weights: the network before.
        number: of the round, from 0.
        cloud: which trains after the devices have answered, with as many steps as they took on average.
        fleet: sends a job to the devices, and returns their answers by number.
    """
    facts: dict[str, Any] = {"jobs": []}
    for job in method.jobs(number):
        answers = dict(fleet(job, weights)) if job.devices else {}
        problems = {site: problem for site, update in answers.items() if (problem := _problem(update, weights, job))}
        updates = {site: update for site, update in sorted(answers.items()) if site not in problems}
        for site, problem in sorted(problems.items()):
            log.warning("round %d: device %d answers with %s; it is left out", number + 1, site, problem)
        if job.cloud and (updates or not job.devices):
            equal = job.equal_steps and updates
            steps = round(np.mean([u.steps for u in updates.values()])) if equal else None
            updates[CLOUD] = method.train_on(cloud, weights, job, steps)
            if not updates[CLOUD].finite:
                raise UserError(f"round {number + 1}: the cloud's training diverges; use a smaller method.lr")
        weights = method.aggregate(job, weights, updates)
        losses = {str(site): round(update.loss, 6) for site, update in updates.items()}
        facts["jobs"].append({"job": job.name, "losses": losses, "excluded": sorted(problems)})
    return weights, facts


def _problem(update: Update, weights: Weights, job: Job) -> str | None:
    """Return what is wrong with a device's answer, in words; None if nothing is."""
    sent = {name: t.shape for name, t in weights.items() if name.startswith(job.part)}
    if {name: t.shape for name, t in update.weights.items()} != sent:
        return "weights of another network"
    if update.samples < 1 or update.steps < 1:
        return f"{update.samples} images in {update.steps} steps"
    return None if update.finite else "numbers that are not finite"


class Fleet(Protocol):
    """The devices of a run, wherever they are."""

    #: Counts what is sent.
    link: Link
    #: Images of every device, and how many of the cloud's it has received.
    images: list[int]
    received: list[int]

    def __call__(self, job: Job, weights: Weights) -> Mapping[int, Update]:
        """Send a job and the network to the devices of its round; return the answers by number of the device."""


class LocalFleet:
    """Devices of this process, one after the other."""

    def __init__(self, inputs: Inputs, method: CoTrained, cloud: Site) -> None:
        rows = device_rows(inputs.known_clients, method.devices)
        self.method, self.link = method, link_of(inputs, method, cloud)
        self.sites = [site_of(inputs, method, number, own, cloud.own.x.device) for number, own in enumerate(rows)]
        for site in self.sites:
            method.join(site, cloud, self.link)
        self.images = [len(site.own.y) for site in self.sites]
        self.received = [len(site.samples.y) - len(site.own.y) for site in self.sites]

    def __call__(self, job: Job, weights: Weights) -> dict[int, Update]:
        """Do a job on every device of its round."""
        answers = {}
        for number, there in zip(*self.method.draw(job.round, len(self.sites)), strict=True):
            received = self.method.send(weights, self.link)
            if there:
                update = self.method.train_on(self.sites[number], received, job)
                answers[int(number)] = self.method.answer(update, received, self.link)
        return answers


def link_of(inputs: Inputs, method: CoTrained, cloud: Site) -> Link:
    """Return a link that refuses what is not in the method's budget."""
    sizes = sizes_of(inputs, train=1, received=1, cloud=len(cloud.own.y))
    return Link(method.name, method.budget(sizes))


def cotrain(inputs: Inputs, folder: Path, fleet_of: Callable[[Inputs, CoTrained, Site], Fleet] = LocalFleet) -> None:
    """Make the rounds that are missing, ``manifest.json`` last.

    Args:
        inputs: of the experiment.
        folder: of the rounds.
        fleet_of: returns the devices, which have joined.
    """
    start = time.monotonic()
    method = inputs.load_run(inputs.run.folder).method
    assert isinstance(method, CoTrained)
    device = first_device(inputs)
    method.to(device)
    cloud = site_of(inputs, method, CLOUD, inputs.cloud_rows, device)
    stored = load_tensors(inputs.run.folder / "weights.safetensors")  # of before the first round
    weights = {name: stored[f"method.small.{name}"].to(device) for name in weights_of(method.small)}
    done = 0
    while round_path(folder, done + 1).is_file():
        done += 1
    if not round_path(folder, 0).is_file():
        write_round(folder, 0, weights, {"jobs": [], "payloads": []})
    fleet = fleet_of(inputs, method, cloud)
    counts = f"{len(fleet.images):,} devices with {sum(fleet.images):,} images, the cloud with {len(cloud.own.y):,}"
    log.info("rounds: %s%s", counts, f"; {done} done before" * bool(done))
    if done:
        weights = {name: t.to(device) for name, t in read_round(folder, done)[0].items()}
    with progress_bar() as bar:
        task = bar.add_task("rounds", total=method.rounds, completed=done, note="")
        for number in range(done, method.rounds):
            before = dict(fleet.link.counted)
            weights, facts = make_round(method, weights, number, cloud, fleet)
            sent = [[*key, size - before.get(key, 0)] for key, size in fleet.link.counted.items() if key[0] == "round"]
            write_round(folder, number + 1, weights, facts | {"payloads": sent})
            bar.update(task, completed=number + 1)
    _finish(folder, method, fleet, len(cloud.own.y), time.monotonic() - start)


def _finish(folder: Path, method: CoTrained, fleet: Fleet, cloud: int, seconds: float) -> None:
    """Write the manifest."""
    once = [payload for payload in fleet.link.payloads() if payload[0] != "round"]
    rounds = [read_round(folder, number)[1]["payloads"] for number in range(1, method.rounds + 1)]
    manifest = {
        "format": 1,
        "rounds": method.rounds,
        "devices": len(fleet.images),
        # of all rounds together
        "taking_part": sum(len(method.draw(number, len(fleet.images))[0]) for number in range(method.rounds)),
        "train": fleet.images,
        "received": fleet.received,
        "cloud": cloud,
        "payloads": added_up([once, *rounds]),
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
