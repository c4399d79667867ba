"""Flower: the cloud's side of training together with devices that run elsewhere.

The rounds are those of `iciia_exp.engine.rounds`; only the fleet is another. A device runs `iciia_exp.serving.flower`.

    python -m iciia_exp.engine.flower devices FOLDER +experiment=dc_ccl_digits method.devices=2
    python -m iciia_exp.engine.flower app FOLDER +experiment=dc_ccl_digits method.devices=2
    flwr run FOLDER

The first writes a file of its own images for every device of an experiment, for a trial; real devices have their own.
The second writes an app for Flower. Afterwards ``python -m iciia_exp`` with the same overrides evaluates the run.
"""

import argparse
import json
import logging
import shlex
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from iciia_exp.artifacts import atomic_write, save_tensors
from iciia_exp.config.experiment import Experiment
from iciia_exp.config.stored import store
from iciia_exp.engine.execute import KINDS
from iciia_exp.engine.graph import ensure
from iciia_exp.engine.inputs import Inputs
from iciia_exp.engine.jobs import composed
from iciia_exp.engine.rounds import cotrain, device_rows, link_of, site_of
from iciia_exp.engine.stages import Stages
from iciia_exp.errors import ConfigError, UserError
from iciia_exp.methods.cotrain.base import CoTrained
from iciia_exp.methods.cotrain.sites import Job, Site, Update, Weights
from iciia_exp.models.payloads import pack_weights, unpack_weights

if TYPE_CHECKING:
    from flwr.app import Context, Message
    from flwr.serverapp import Grid, ServerApp

__all__ = ["NodeFleet", "main", "run", "server_app", "write_app", "write_devices"]

log = logging.getLogger(__name__)

_POLL = 1.0  # seconds

_APP = """# Flower's app of a run of iciia_exp; written by python -m iciia_exp.engine.flower app.
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "iciia-exp-rounds"
version = "1.0.0"
license = "Apache-2.0"
description = "Rounds of cloud and devices"
requires-python = ">=3.11"
dependencies = []  # iciia_exp[flower] is installed beside each SuperLink and SuperNode

[tool.hatch.build.targets.wheel]
packages = ["."]

[tool.flwr.app]
publisher = "iciia-exp"

[tool.flwr.app.components]
serverapp = "app:server"
clientapp = "app:client"

[tool.flwr.app.config]
overrides = {overrides}  # of python -m iciia_exp
devices = {devices}  # SuperNodes, with the numbers from 0 in their node config
timeout = 600.0  # seconds for an answer
wait = false  # for a device that is missing or does not answer in time; false: the round goes on with the others
"""

_COMPONENTS = '''"""Components of the app."""

from iciia_exp.engine.flower import server_app
from iciia_exp.serving.flower import client_app

server = server_app()
client = client_app()
'''


class NodeFleet:
    """Devices behind SuperNodes; a device is known by the number in its node config, and may come back as another node.

    Args:
        inputs, method, cloud: as of `iciia_exp.engine.rounds.cotrain`.
        grid: Flower's connection to the SuperNodes.
        devices: their number. The first round starts when all have joined.
        timeout: seconds for an answer.
        wait: wait for a device that is missing or does not answer; else its round goes on without it.
    """

    def __init__(
        self, inputs: Inputs, method: CoTrained, cloud: Site, grid: Any, devices: int, timeout: float, wait: bool
    ) -> None:
        if method.against_premise:
            problem = "sends what may not be sent between cloud and devices; it runs in one process only"
            raise UserError(f"{method.name}: {method.against_premise} {problem}")
        self.method, self.cloud, self.grid = method, cloud, grid
        self.timeout, self.wait, self.count = timeout, wait, devices
        self.link = link_of(inputs, method, cloud)
        self.nodes: dict[int, int] = {}  # node of every device
        self.images, self.received = [0] * devices, [0] * devices
        self._known: set[int] = set()
        self._stored = json.dumps(
            {
                "method": store(inputs.method_config),
                "dim": method.dim,
                "num_classes": method.num_classes,
                "task": str(inputs.experiment.dataset_class.task),
                "arrays": {method.array: list(method.shape)},
            }
        )
        while len(self.nodes) < devices:
            self._greet(first=True)
            if len(self.nodes) < devices:
                time.sleep(_POLL)

    def __call__(self, job: Job, weights: Weights) -> dict[int, Update]:
        """Send a job to the devices of its round; return the answers.

        A device that ``method.unavailable`` leaves out is not asked; as in one process, what goes down to it counts.
        """
        drawn, there = self.method.draw(job.round, self.count)
        for _ in drawn[~there]:
            self.method.send(weights, self.link)
        left: list[int] = drawn[there].tolist()
        answers: dict[int, Update] = {}
        while left:
            self._greet()
            answers |= self._answers(job, weights, [number for number in left if number in self.nodes])
            left = [number for number in left if number not in answers]
            if left and not self.wait:
                listed = ", ".join(map(str, left))
                log.warning("round %d: goes on without device %s, which did not answer", job.round + 1, listed)
                break
            if left:
                time.sleep(_POLL)
        return answers

    def _answers(self, job: Job, weights: Weights, numbers: Sequence[int]) -> dict[int, Update]:
        from flwr.app import ConfigRecord, RecordDict

        from iciia_exp.serving.flower import ARRAYS, CONFIG, METRICS, NOT_SENT, from_packed, to_packed

        packed = pack_weights(weights, self.method.form)
        received, messages = unpack_weights(packed), []
        for number in numbers:
            arrays = from_packed(self.link.down("weights", packed, "round", "training"))
            content = RecordDict({ARRAYS: arrays, CONFIG: ConfigRecord({"job": json.dumps(job._asdict())})})
            messages.append(self._to_node(content, self.nodes[number], "train"))
        answers, devices = {}, {self.nodes[number]: number for number in numbers}
        for node, reply in self._replies(messages):
            number = devices[node]
            if reply.has_error():
                log.warning("device %d: %s", number, reply.error.reason)
                if NOT_SENT in (reply.error.reason or ""):  # it has started again, under its number
                    self._known.discard(node)
                    del self.nodes[number]
                continue
            content = reply.content
            copy = self.link.up("weights", to_packed(content[ARRAYS]), "round", "training")
            samples, steps, loss = (content[METRICS][name] for name in ("samples", "steps", "loss"))
            answers[number] = Update(self.method.unpacked(copy, received), int(samples), int(steps), float(loss))
        return answers

    def _greet(self, first: bool = False) -> None:
        """Let new nodes join: ask for their numbers, and send them what they need.

        A node that does not answer, or not with what is needed, is asked again the next time.

        Args:
            first: before the first round, where a device that cannot take part ends the training.
        """
        from flwr.app import ConfigRecord, RecordDict

        from iciia_exp.serving.flower import CONFIG

        nodes = set(self.grid.get_node_ids())
        self.nodes = {number: node for number, node in self.nodes.items() if node in nodes}
        self._known &= nodes  # one that was away may not have any more what it was sent
        new = sorted(nodes - self._known)
        if not new:
            return
        messages = [self._to_node(RecordDict({CONFIG: ConfigRecord({"ask": "device"})}), node, "query") for node in new]
        for node, reply in self._replies(messages):
            if reply.has_error():
                log.warning("node %d: %s", node, reply.error.reason)
                continue
            told = reply.content[CONFIG]
            number, images = int(told["device"]), int(told["images"])
            if not 0 <= number < self.count:
                log.warning("node %d: is device %d, and there are devices 0 to %d", node, number, self.count - 1)
                self._known.add(node)
            elif (received := self._send_once(number, node, images, first)) is not None:
                self.nodes[number], self.images[number], self.received[number] = node, images, received
                self._known.add(node)
                log.info("device %d: has joined with %d images", number, images)

    def _send_once(self, number: int, node: int, images: int, first: bool) -> int | None:
        """Send a device what it needs; return how many images of the cloud these are, None if it has not accepted."""
        from flwr.app import ArrayRecord, ConfigRecord, RecordDict

        from iciia_exp.serving.flower import ARRAYS, CONFIG

        sent = self.method.sent(number, images, self.cloud, self.link)
        arrays = ArrayRecord({name: t.cpu().contiguous() for name, t in sent.items()})
        content = RecordDict({ARRAYS: arrays, CONFIG: ConfigRecord({"method": self._stored})})
        for _, answer in self._replies([self._to_node(content, node, "train.accept")]):
            if not answer.has_error():
                return len(sent.get("train.y", ()))
            # an error in the device's own program has its node; the SuperLink tells that it could not be reached
            if first and answer.metadata.src_node_id == node:
                raise UserError(f"device {number}: {answer.error.reason}")
            log.warning("device %d: has not joined: %s", number, answer.error.reason)
            return None
        log.warning("device %d: has not joined: no answer within %g s", number, self.timeout)
        return None

    def _replies(self, messages: "Sequence[Message]") -> list[tuple[int, Any]]:
        """Send messages; return the nodes that were asked, each with its answer, or the SuperLink's error in place."""
        replies = self.grid.send_and_receive(messages, timeout=self.timeout)
        nodes = {message.metadata.message_id: message.metadata.dst_node_id for message in messages}
        return [(nodes[reply.metadata.reply_to_message_id], reply) for reply in replies]

    def _to_node(self, content: Any, node: int, kind: str) -> "Message":
        from flwr.app import Message

        return Message(content=content, dst_node_id=node, message_type=kind)


def run(grid: "Grid", context: "Context") -> None:
    """Make the run up to its rounds, and the rounds with the SuperNodes."""
    settings = context.run_config
    stages = _stages(shlex.split(str(settings["overrides"])))
    devices, timeout = int(settings["devices"]), float(settings["timeout"])
    fleet = partial(NodeFleet, grid=grid, devices=devices, timeout=timeout, wait=bool(settings["wait"]))
    ensure(stages.run, KINDS["all"])
    assert stages.rounds is not None
    ensure(replace(stages.rounds, make=partial(cotrain, stages, fleet_of=fleet)), ("rounds",))
    log.info("rounds: in %s", stages.rounds.folder)


def server_app() -> "ServerApp":
    """Return the ServerApp."""
    from flwr.serverapp import ServerApp

    app = ServerApp()
    app.main()(run)
    return app


def _stages(overrides: Sequence[str]) -> Stages:
    """Return the stages of an experiment whose cloud and devices train together."""
    stages = Stages(Experiment.from_config(composed(overrides), overrides))
    if stages.rounds is None:
        name = stages.experiment.method_class.name
        raise ConfigError("method", name, "trains nothing in rounds; use dc_ccl or fedavg")
    return stages


def _with_devices(overrides: Sequence[str]) -> tuple[Stages, CoTrained, list[np.ndarray]]:
    """Return the stages of an experiment, its method, and the train images of its devices, which need its features."""
    stages = _stages(overrides)
    ensure(stages.features, KINDS["all"])
    method = stages.untrained_method()
    assert isinstance(method, CoTrained)
    return stages, method, device_rows(stages.known_clients, method.devices)


def write_app(folder: Path, overrides: Sequence[str]) -> None:
    """Write an app for ``flwr run`` into a folder."""
    devices = len(_with_devices(overrides)[2])
    folder.mkdir(parents=True, exist_ok=True)
    text = _APP.format(overrides=json.dumps(shlex.join(overrides)), devices=devices)
    for name, content in (("pyproject.toml", text), ("app.py", _COMPONENTS)):
        with atomic_write(folder / name) as file:
            file.write(content)


def write_devices(folder: Path, overrides: Sequence[str]) -> list[Path]:
    """Write the images of every device of an experiment into a file of its own; return the files."""
    stages, method, devices = _with_devices(overrides)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, rows in enumerate(devices):
        own = site_of(stages, method, number, rows, torch.device("cpu")).own
        paths.append(folder / f"device-{number:04d}.safetensors")
        save_tensors(paths[-1], {"x": own.x, "y": own.y})
    return paths


def main(arguments: Sequence[str] | None = None) -> None:
    """Write an app, or the files of devices."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("app", "devices"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("overrides", nargs="*", help="of python -m iciia_exp")
    options = parser.parse_args(arguments)
    try:
        write = {"app": write_app, "devices": write_devices}[options.what]
        write(options.folder, options.overrides)
    except UserError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
