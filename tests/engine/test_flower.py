"""Rounds with Flower: the same network as in one process, devices that go and come back, and Flower itself."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("flwr", reason="Flower is an extra: pip install 'iciia_exp[flower]'")

from flwr.app import Context, Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from iciia_exp.engine import flower
from iciia_exp.engine.flower import NodeFleet, write_app, write_devices
from iciia_exp.engine.graph import ensure
from iciia_exp.engine.rounds import cotrain
from iciia_exp.errors import UserError
from iciia_exp.serving import flower as device_side

pytestmark = [pytest.mark.usefixtures("undrawn"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]

TRAINED = ("method.devices=2", "method.rounds=2", "method.network.width=2", "method.network.dim=8")
SUPERLINK = 1  # the node of its own errors
METHOD = ("method=dc_ccl", "method.control_epochs=1", *TRAINED)


@pytest.fixture
def made(stages):
    """Return the stages of a small run that is made but for its rounds, with an output folder of its own."""

    def make(*overrides, method=METHOD):
        found = stages(*method, *overrides)
        ensure(found.run, ("backbone", "features", "head", "run"))
        return found

    return make


@pytest.fixture
def identity(monkeypatch):
    """Messages belong to a run, as inside of Flower's processes."""
    for name in ("run_id", "task_id", "node_id"):
        monkeypatch.setattr(TaskIdentity, f"_{name}", 1)


class Grid:
    """SuperNodes of this process; every message is handled as in a process of its own."""

    def __init__(self, files):
        self.nodes = {}
        for number, path in enumerate(files):
            self.start(100 + number, {"device": number, "data": str(path)})
        self.handled, self.app = [], device_side.client_app()
        self.silent, self.broken = set(), set()
        self.deaf, self.unreached = {}, set()  # how often a node does not answer what it is sent once

    def start(self, node, config):
        self.nodes[node] = Context(1, node, config, RecordDict(), {})

    def get_node_ids(self):
        return list(self.nodes)

    def send_and_receive(self, messages, *, timeout=None):
        replies = []
        for message in messages:
            node, kind = message.metadata.dst_node_id, message.metadata.message_type
            message.metadata._message_id = f"message {len(self.handled)}"
            self.handled.append((node, kind))
            if node in self.silent and kind == "train":
                continue
            if kind == "train.accept" and self.deaf.get(node, 0):
                self.deaf[node] -= 1
                continue
            source = node
            if node in self.unreached and kind != "query":
                reply, source = Message(Error(5, "Node Unavailable"), reply_to=message), SUPERLINK
            elif node in self.broken and kind == "train":
                reply = Message(Error(0, "out of memory"), reply_to=message)
            else:
                reply = self.answer(message, node)
            reply.metadata._src_node_id = source
            replies.append(reply)
        return replies

    def answer(self, message, node):
        device_side.read_device.cache_clear(), device_side._method.cache_clear()
        try:
            return self.app(message, self.nodes[node])
        except UserError as error:
            if message.metadata.message_type == "query":
                raise
            return Message(Error(2, str(error)), reply_to=message)


def rounds_with(made, grid, folder, wait=False, devices=2):
    """Make the rounds of a run with SuperNodes, in a folder of its own; return the network after every round."""
    fleet = partial(NodeFleet, grid=grid, devices=devices, timeout=1.0, wait=wait)
    folder.mkdir(exist_ok=True)
    cotrain(made, folder, fleet_of=fleet)
    return networks(folder)


def networks(folder):
    return [load_file(path) for path in sorted(folder.glob("0*.safetensors"))]


def same(one, other, within=1e-6):
    return len(one) == len(other) and all(
        (a[n] - b[n]).abs().max() <= within for a, b in zip(one, other, strict=True) for n in a
    )


def files_of(made, folder):
    clients = made.experiment.client_mix.known(made.readable_clients(made.open_store()))
    paths = []
    for number, rows in enumerate(flower.device_rows(clients, 2)):
        x, y = torch.from_numpy(made.open_store().array("images")[rows].copy()), torch.from_numpy(made.labels[rows])
        paths.append(folder / f"device-{number}.safetensors")
        save_file({"x": x, "y": y}, paths[-1])
    return paths


@pytest.mark.parametrize(
    "method",
    [
        METHOD,
        (*METHOD, "method.retune=device", "method.payload=int8"),
        ("method=fedavg", *TRAINED),
        (*METHOD, "method.unavailable=0.5", "method.rounds=4"),
        ("method=fedavg", *TRAINED, "method.unavailable=1.0"),
    ],
)
def test_the_network_is_that_of_one_process(made, tmp_path, identity, method):
    run = made(method=method)
    ensure(run.rounds, ("rounds",))
    far = rounds_with(run, Grid(files_of(run, tmp_path)), tmp_path / "far")
    assert same(networks(run.rounds.folder), far)
    here, there = (json.loads((f / "manifest.json").read_text()) for f in (run.rounds.folder, tmp_path / "far"))
    for key in ("payloads", "train", "received", "devices", "taking_part"):
        assert here[key] == there[key], key


@pytest.fixture
def undisturbed(made, tmp_path, identity):
    """Return a run, the files of its devices, and the rounds with all of them."""
    run = made()
    files = files_of(run, tmp_path)
    return run, files, rounds_with(run, Grid(files), tmp_path / "whole")


def test_a_device_that_does_not_answer_is_left_out(made, tmp_path, identity, caplog):
    run = made("method.retune=none")
    grid = Grid(files_of(run, tmp_path))
    grid.silent.add(101)
    alone = rounds_with(run, grid, tmp_path / "silent")
    assert "round 1: goes on without device 1, which did not answer" in caplog.text
    grid = Grid(files_of(run, tmp_path))
    grid.broken.add(101)
    assert same(alone, rounds_with(run, grid, tmp_path / "broken"))
    assert "device 1: out of memory" in caplog.text


def test_a_device_that_is_waited_for_comes_back_as_another_node(undisturbed, tmp_path, monkeypatch):
    run, files, whole = undisturbed
    grid = Grid(files)
    grid.silent.add(101)

    def sleep(seconds):  # meanwhile somebody restarts it
        del grid.nodes[101]
        grid.start(202, {"device": 1, "data": str(files[1])})
        monkeypatch.setattr(flower.time, "sleep", lambda seconds: None)

    monkeypatch.setattr(flower.time, "sleep", sleep)
    assert same(whole, rounds_with(run, grid, tmp_path / "restarted", wait=True))
    assert (202, "train.accept") in grid.handled


def no_more_than(monkeypatch, times):
    """Let a fleet wait so often at most, in place of for ever; return what is done while it waits."""
    meanwhile = []

    def sleep(seconds):
        assert len(waits) < times, "waits for ever"
        waits.append(seconds)
        for do in meanwhile:
            do()

    waits = []
    monkeypatch.setattr(flower.time, "sleep", sleep)
    return meanwhile


@pytest.mark.parametrize("how", ["silent", "unreached"])
def test_a_device_that_does_not_take_what_it_is_sent_is_sent_it_again(undisturbed, tmp_path, monkeypatch, caplog, how):
    run, files, whole = undisturbed
    grid = Grid(files)
    meanwhile = no_more_than(monkeypatch, 2)
    if how == "silent":
        grid.deaf[101] = 2
    else:
        grid.unreached.add(101)
        meanwhile.append(grid.unreached.clear)
    assert same(whole, rounds_with(run, grid, tmp_path / "again"))
    assert (
        f"device 1: has not joined: {'no answer within 1 s' if how == 'silent' else 'Node Unavailable'}" in caplog.text
    )


def test_a_device_that_comes_back_and_misses_the_answer_joins_later(undisturbed, tmp_path, monkeypatch):
    run, files, whole = undisturbed
    grid = Grid(files)
    grid.silent.add(101)

    def restart():
        if grid.nodes.pop(101, None):
            grid.start(202, {"device": 1, "data": str(files[1])})
            grid.deaf[202] = 1

    no_more_than(monkeypatch, 3).append(restart)
    assert same(whole, rounds_with(run, grid, tmp_path / "restarted", wait=True))


def test_a_node_that_was_away_joins_again(undisturbed, tmp_path, monkeypatch):
    run, files, whole = undisturbed
    grid = Grid(files)
    grid.silent.add(101)

    def go_or_come():
        if not grid.nodes.pop(101, None):
            grid.start(101, {"device": 1, "data": str(files[1])})
            grid.silent.clear()

    no_more_than(monkeypatch, 2).append(go_or_come)
    assert same(whole, rounds_with(run, grid, tmp_path / "away", wait=True))
    assert grid.handled.count((101, "train.accept")) == 2


def test_a_node_that_starts_again_between_greetings_is_sent_its_method_again(undisturbed, tmp_path):
    run, files, whole = undisturbed

    class Restarting(Grid):
        def answer(self, message, node):
            if self.handled.count((node, "train")) == 1 and node == 101:
                self.start(101, {"device": 1, "data": str(files[1])})
            return super().answer(message, node)

    grid = Restarting(files)
    assert same(whole, rounds_with(run, grid, tmp_path / "restarted", wait=True))
    assert grid.handled.count((101, "train.accept")) == 2


@pytest.mark.parametrize("wrong", ["a wrong file", "gone"])
def test_a_device_that_comes_back_wrong_is_left_out(made, tmp_path, identity, caplog, wrong):
    """It has a file of other images, or is lost in the middle of a round, of which the SuperLink tells."""
    run = made("method.retune=none")
    files = files_of(run, tmp_path)
    silent = Grid(files)
    silent.silent.add(101)
    alone = rounds_with(run, silent, tmp_path / "alone")
    content = load_file(files[1])
    save_file({"x": content["x"][:, :, :4].contiguous(), "y": content["y"]}, tmp_path / "wrong.safetensors")

    class Changing(Grid):
        def get_node_ids(self):
            if 101 in self.nodes and (100, "train.accept") in self.handled:
                if wrong == "gone":
                    self.unreached.add(101)
                else:
                    del self.nodes[101]
                    self.start(202, {"device": 1, "data": str(tmp_path / "wrong.safetensors")})
            return super().get_node_ids()

    assert same(alone, rounds_with(run, Changing(files), tmp_path / "far"))
    told = "Node Unavailable" if wrong == "gone" else "its images are [1, 4, 8], the network takes [1, 8, 8]"
    assert told in caplog.text
    assert "round 2: goes on without device 1, which did not answer" in caplog.text


def test_a_server_that_is_killed_goes_on_after_the_last_round(undisturbed, tmp_path):
    run, files, whole = undisturbed
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    for name in ("manifest.json", "0002.safetensors"):
        (tmp_path / "killed" / name).unlink()
    grid = Grid(files)
    again = rounds_with(run, grid, tmp_path / "killed")
    one, other = (tmp_path / folder / "0002.safetensors" for folder in ("whole", "killed"))
    assert one.read_bytes() == other.read_bytes()
    assert same(whole, again)
    assert len([kind for _, kind in grid.handled if kind == "train"]) == 4  # two jobs of one round, two devices


@pytest.mark.parametrize("setting", ["method.arm=centralised", "method.arm=large_on_device", "method.retune=mixed"])
def test_what_breaks_the_premise_stays_in_one_process(made, tmp_path, identity, setting):
    run = made(setting)
    with pytest.raises(UserError, match="may not be sent between cloud and devices"):
        rounds_with(run, Grid([]), tmp_path / "far")


def test_wrong_devices(made, tmp_path, identity, caplog):
    run = made()
    files = files_of(run, tmp_path)
    content = load_file(files[1])
    for tensors, problem in (
        ({"x": content["x"]}, r"must have images x .n, .... and labels y .n., and has x"),
        ({"x": content["x"][:0], "y": content["y"][:0]}, "must have images x"),
        (
            {"x": content["x"][:, :, :4].contiguous(), "y": content["y"]},
            "its images are .1, 4, 8., the network takes .1, 8, 8.",
        ),
        ({"x": content["x"], "y": content["y"] + 8}, "device 1: has a label 1., and the classes are 0 to 9"),
    ):
        save_file(tensors, files[1])
        with pytest.raises(Exception, match=problem):
            rounds_with(run, Grid(files), tmp_path / "far")
    grid = Grid(files)
    grid.nodes[101].node_config["device"] = "one"
    with pytest.raises(Exception, match="node config: device: is 'one'; give the SuperNode"):
        rounds_with(run, grid, tmp_path / "far")


def test_app_and_devices_are_of_the_same_clients(small, tmp_path):
    """Clients of types that are unseen in training are no devices."""
    setting = ["+experiment=digits_parents", "method=fedavg", *small, "client_mix.unseen_types=0.34"]
    write_app(tmp_path / "app", setting)
    paths = write_devices(tmp_path / "devices", setting)
    config = tomllib.loads((tmp_path / "app" / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    assert config["devices"] == len(paths) < len(write_devices(tmp_path / "all", setting[:-1]))


def test_only_methods_with_rounds_have_an_app(small, tmp_path, capsys):
    with pytest.raises(SystemExit, match="method=linear_head: trains nothing in rounds; use dc_ccl or fedavg"):
        flower.main(["app", str(tmp_path / "app"), "method=linear_head", *small])


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="stops groups of processes")
def test_a_superlink_and_two_supernodes(small, stages, tmp_path, monkeypatch):
    """The whole way on loopback, without TLS: an app from the command line, two devices, one round."""
    overrides = [*small, *METHOD, "method.rounds=1", "method.retune=none", f"output_dir={tmp_path}/far"]
    write_app(tmp_path / "app", overrides)
    files = write_devices(tmp_path / "devices", overrides)
    near = stages(*METHOD, "method.rounds=1", "method.retune=none")
    ensure(near.rounds, ("backbone", "features", "head", "run", "rounds"))
    home, port = tmp_path / "home", free_port()
    (home / ".flwr").mkdir(parents=True)
    address = f'[superlink]\ndefault = "local"\n[superlink.local]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    (home / ".flwr" / "config.toml").write_text(address)
    environment = os.environ | {"HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    run = partial(subprocess.Popen, env=environment, cwd=tmp_path, start_new_session=True)
    log = (tmp_path / "flower.log").open("w")
    started = []
    try:
        link = ["flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(port)]
        started.append(run(link, stdout=log, stderr=log))
        wait_for_port(port)
        for number, path in enumerate(files):
            node = ["flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{port}", "--port", str(free_port())]
            node += ["--node-config", f'device={number} data="{path}"']
            started.append(run(node, stdout=log, stderr=log))
        command = ["flwr", "run", str(tmp_path / "app"), "local", "--stream"]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=400)
        made = sorted((tmp_path / "far").rglob("rounds-*/manifest.json"))
        assert made, done.stdout + done.stderr + (tmp_path / "flower.log").read_text()
        assert same(networks(near.rounds.folder), networks(made[0].parent))
    finally:
        for process in started:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.close()


def wait_for_port(port):
    for _ in range(300):
        with socket.socket() as tried:
            if tried.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise TimeoutError(f"nothing listens at port {port}")
