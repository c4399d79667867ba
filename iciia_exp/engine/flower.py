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
            self._greet()
            if len(self.nodes) < devices:
                time.sleep(_POLL)

    def __call__(self, job: Job, weights: Weights) -> dict[int, Update]:
        """Send a job to the devices of its round; return the answers."""
        left = self.method.draw(job.round, self.count)[0].tolist()
        answers: dict[int, Update] = {}
        while left:
            self._greet()
            there = [number for number in left if number in self.nodes]
            answers |= self._answers(job, weights, there)
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

        from iciia_exp.serving.flower import ARRAYS, CONFIG, METRICS, from_packed, to_packed

        packed = pack_weights(weights, self.method.form)
        received, messages = unpack_weights(packed), []
        for number in numbers:
            arrays = from_packed(self.link.down("weights", packed, "round", "training"))
            content = RecordDict({ARRAYS: arrays, CONFIG: ConfigRecord({"job": json.dumps(job._asdict())})})
            messages.append(self._to_node(content, self.nodes[number], "train"))
        answers = {}
        for number, content in self._replies(messages, numbers).items():
            copy = self.link.up("weights", to_packed(content[ARRAYS]), "round", "training")
            samples, steps, loss = (content[METRICS][name] for name in ("samples", "steps", "loss"))
            answers[number] = Update(self.method.unpacked(copy, received), int(samples), int(steps), float(loss))
        return answers

    def _greet(self) -> None:
        """Let new nodes join: ask for their numbers, and send them what they need."""
        from flwr.app import ArrayRecord, ConfigRecord, RecordDict

        from iciia_exp.serving.flower import ARRAYS, CONFIG

        nodes = set(self.grid.get_node_ids())
        self.nodes = {number: node for number, node in self.nodes.items() if node in nodes}
        new = sorted(nodes - self._known)
        if not new:
            return
        messages = [self._to_node(RecordDict({CONFIG: ConfigRecord({"ask": "device"})}), node, "query") for node in new]
        for reply in self.grid.send_and_receive(messages, timeout=self.timeout):
            if reply.has_error():
                log.warning("node %d: %s", reply.metadata.src_node_id, reply.error.reason)
                continue
            told, node = reply.content[CONFIG], reply.metadata.src_node_id
            number, images = int(told["device"]), int(told["images"])
            self._known.add(node)
            if not 0 <= number < self.count:
                log.warning("node %d: is device %d, and there are devices 0 to %d", node, number, self.count - 1)
                continue
            sent = self.method.sent(number, images, self.cloud, self.link)
            arrays = ArrayRecord({name: t.cpu().contiguous() for name, t in sent.items()})
            content = RecordDict({ARRAYS: arrays, CONFIG: ConfigRecord({"method": self._stored})})
            for answer in self.grid.send_and_receive(
                [self._to_node(content, node, "train.accept")], timeout=self.timeout
            ):
                if answer.has_error():
                    raise UserError(f"device {number}: {answer.error.reason}")
                self.nodes[number], self.images[number] = node, images
                self.received[number] = len(sent.get("train.y", ()))
                log.info("device %d: has joined with %d images", number, images)

    def _replies(self, messages: "Sequence[Message]", numbers: Sequence[int]) -> dict[int, Any]:
        devices = {self.nodes[number]: number for number in numbers}
        found = {}
        for reply in self.grid.send_and_receive(messages, timeout=self.timeout):
            number = devices[reply.metadata.src_node_id]
            if reply.has_error():
                log.warning("device %d: %s", number, reply.error.reason)
            else:
                found[number] = reply.content
        return found

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


def write_app(folder: Path, overrides: Sequence[str]) -> None:
    """Write an app for ``flwr run`` into a folder."""
    stages = _stages(overrides)
    devices = len(device_rows(stages.clients, stages.method_config["devices"]))
    folder.mkdir(parents=True, exist_ok=True)
    text = _APP.format(overrides=json.dumps(shlex.join(overrides)), devices=devices)
    for name, content in (("pyproject.toml", text), ("app.py", _COMPONENTS)):
        with atomic_write(folder / name) as file:
            file.write(content)


def write_devices(folder: Path, overrides: Sequence[str]) -> list[Path]:
    """Write the images of every device of an experiment into a file of its own; return the files."""
    stages = _stages(overrides)
    ensure(stages.features, KINDS["all"])
    method = stages.untrained_method()
    assert isinstance(method, CoTrained)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, rows in enumerate(device_rows(stages.known_clients, method.devices)):
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
