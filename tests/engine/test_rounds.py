"""Rounds of cloud and devices as a job: the whole way, kills, wrong settings."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from iciia_exp import Run
from iciia_exp.config.experiment import Experiment
from iciia_exp.data.rounds import round_path, write_round
from iciia_exp.engine import rounds, wandb_media
from iciia_exp.engine.execute import execute
from iciia_exp.engine.graph import ensure
from iciia_exp.engine.ledger import _of_input
from iciia_exp.engine.stages import Stages
from iciia_exp.errors import UserError
from iciia_exp.results.plots import draw_accuracy_vs_overhead
from iciia_exp.results.tables import settings
from tests.making.imagenet import make_imagenet

pytestmark = pytest.mark.usefixtures("undrawn")

TRAINED = (
    *("method.rounds=3", "method.network.width=2", "method.network.dim=8"),
    *("method.lr=0.05", "method.local_epochs=3", "backbone.unseen_classes=[8,9]", "backbone.recipe.epochs=4"),
    "dataset.sizes={backbone: 200, train: 200, val: 60, test: 100}",
)
METHOD = ("method=dc_ccl", "method.control_epochs=2", *TRAINED)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def made(stages, cache, monkeypatch):
    """Return a function that makes the stages of an experiment; all share the backbone."""
    monkeypatch.setenv("ICIIA_EXP_CACHE", str(cache))
    return lambda *overrides, method=METHOD: stages(*method, *overrides)


@pytest.fixture
def prepared(made):
    """Return a function that does so, and makes the features, for the stage train."""

    def make(*overrides):
        run = made(*overrides, "stage=train")
        ensure(run.features, ("backbone", "features"))
        return run

    return make


def files(run):
    return {path.name: path.read_bytes() for path in sorted(run.rounds.folder.glob("*.safetensors"))}


def test_the_whole_way(made, monkeypatch):
    run = made()
    row = execute(run)
    assert len(files(run)) == 4
    curve = pd.read_parquet(run.evaluation.folder / "rounds.parquet")
    assert curve["answer"].unique().tolist() == ["backbone", "large + small", "control + small"]
    last = curve[(curve["round"] == 3) & (curve["answer"] == "large + small")].iloc[0]
    for key in ("accuracy", "seen_accuracy", "unseen_accuracy"):
        assert row[key] == pytest.approx(last[key])
    steps = list(wandb_media.rounds(run.evaluation.folder))
    assert [step["rounds/round"] for step in steps] == [0, 1, 2, 3]
    assert steps[-1]["rounds/accuracy"] == last["accuracy"]
    assert steps[-1]["rounds/backbone_accuracy"] == pytest.approx(row["backbone_accuracy"])
    alone = curve[curve["answer"] == "backbone"].drop_duplicates(["accuracy", "seen_accuracy", "unseen_accuracy"])
    assert len(alone) == 1
    assert row["backbone_unseen_accuracy"] == alone["unseen_accuracy"].iloc[0] == 0
    assert row["site"] == "cloud"
    assert row["leaves_device"] == "weights, images"  # those of requests
    ledger = pd.read_parquet(run.evaluation.folder / "ledger.parquet").set_index(["phase", "site", "what", "kind"])
    sent = ledger[ledger["measured_bytes"].notna()]
    assert len(sent) >= 5
    assert np.allclose(sent["bytes"], sent["measured_bytes"])
    assert row["rounds_down_bytes"] == 3 * ledger.loc[("round", "cloud", "training", "weights"), "bytes"]
    assert row["rounds_up_bytes"] == last["up_bytes"]
    assert row["rounds_down_bytes"] + row["client_down_bytes"] == pytest.approx(last["down_bytes"], abs=1)
    macs = ledger["macs"].groupby(["phase", "site"]).sum()
    assert row["rounds_device_macs"] == pytest.approx(3 * macs["round", "device"], abs=1)
    assert row["client_device_macs"] == pytest.approx(macs["client_once", "device"], abs=1)
    monkeypatch.setattr(rounds, "make_round", None)
    assert execute(made()) == row  # nothing is made again
    served = Run.load(run.run.folder)
    weights = load_file(round_path(run.rounds.folder, 3))
    assert all(torch.equal(served.method.small.state_dict()[name], t) for name, t in weights.items())
    numbers = served.partition.test.values[:4]
    images = torch.from_numpy(np.array(served.features.array("images")[numbers]))
    x = torch.from_numpy(np.array(served.features.array()[numbers])).float()
    assert served.predict(x, arrays={"images": images}).shape == (4, 10)


def test_unknown_costs_are_left_out(made, tmp_path, monkeypatch):
    """Features that were made before the MACs of an array were stored."""
    monkeypatch.setattr("iciia_exp.engine.ledger._of_input", lambda *_: {"input_macs": None})
    run = made(f"output_dir={tmp_path}", method=("method=fedavg", *TRAINED))
    row = execute(run)
    assert row["backbone_macs"]
    assert row["overhead_percent"] is row["sequence_macs"] is row["request_device_macs"] is None
    (axes,) = draw_accuracy_vs_overhead([row]).axes
    assert not axes.containers
    (point,) = settings([row]).to_dict("records")
    assert not point["front"]
    card = Run.load(run.run.folder).save_pretrained(tmp_path / "card") / "README.md"
    assert "images together" not in card.read_text()


@pytest.mark.parametrize("array", ["second", "own"])
def test_who_makes_what_a_network_reads(array):
    """Arrays with MACs of their own are made on the device, without the backbone."""
    inputs = SimpleNamespace(rounds=True, method_config={"array": array})
    manifest = {"macs": 100, "dim": 3, "num_classes": 4}
    assert _of_input(inputs, manifest | {f"{array}_macs": 7}) == {"input_macs": 7, "input_on_backbone": False}
    trunk = {"input_macs": 88, "input_on_backbone": True}
    assert _of_input(inputs, manifest) == (
        trunk if array == "own" else {"input_macs": None, "input_on_backbone": False}
    )


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        (("method=fedavg", *TRAINED), ()),
        (("method=fedavg", *TRAINED), ("payload=int8", "participation=0.7", "unavailable=0.5")),
        (METHOD, ("payload=int8", "retune=device", "retune_images=8", "unavailable=0.5")),
        (METHOD, ("payload=int8", "retune=mixed", "retune_images=8")),
        (METHOD, ("arm=centralised", "unavailable=0.5")),
    ],
)
def test_what_was_sent_is_what_the_ledger_states(made, tmp_path, method, settings):
    settings = [f"method.{setting}" for setting in settings]
    run = made(*settings, "method.devices=4", f"output_dir={tmp_path}", method=method)
    row = execute(run)
    ledger = pd.read_parquet(run.evaluation.folder / "ledger.parquet")
    sent = ledger[ledger["measured_bytes"].notna()]
    assert np.allclose(sent["bytes"], sent["measured_bytes"])
    missing = ledger[ledger["measured_bytes"].isna() & ledger["kind"].notna() & (ledger["phase"] != "request")]
    assert not missing[missing["what"] != "backbone"]["bytes"].any()
    last = pd.read_parquet(run.evaluation.folder / "rounds.parquet").iloc[-1]
    assert row["rounds_up_bytes"] + row["client_up_bytes"] == last["up_bytes"]
    weights = ledger[(ledger["phase"] == "client_once") & (ledger["kind"] == "weights")]["bytes"].sum()
    in_a_round = ledger.loc[(ledger["phase"] == "round") & (ledger["site"] == "device"), "macs"].sum()
    if "arm=centralised" in "".join(settings):
        assert row["rounds_device_macs"] == 0
    else:  # those who do not answer do not train
        share = row["rounds_device_macs"] / (3 * in_a_round)
        assert (0 < share < 0.9) if any("unavailable" in setting for setting in settings) else share == pytest.approx(1)
    after = 0 if method is METHOD else weights  # FedAvg's network goes down once more after the rounds
    assert row["rounds_down_bytes"] + row["client_down_bytes"] - after == pytest.approx(last["down_bytes"], abs=1)


@pytest.mark.slow
def test_a_kill_at_any_point_gives_the_same_bytes(prepared, tmp_path, monkeypatch):
    whole = prepared(f"output_dir={tmp_path}/whole")
    execute(whole)
    make_round, write = rounds.make_round, write_round
    for killed_in in ("make_round", "write_round"):
        for at in range(3):
            run = prepared(f"output_dir={tmp_path}/{killed_in}{at}")
            calls = []

            def killed(*given, at=at, calls=calls, name=killed_in):
                calls.append(1)
                if len(calls) == at + 1:
                    raise KeyboardInterrupt
                return {"make_round": make_round, "write_round": write}[name](*given)

            with monkeypatch.context() as patch:
                patch.setattr(rounds, killed_in, killed)
                with pytest.raises(KeyboardInterrupt):
                    execute(run)
            execute(run)
            assert files(run) == files(whole)
            manifests = [json.loads((r.rounds.folder / "manifest.json").read_text()) for r in (run, whole)]
            for manifest in manifests:
                del manifest["seconds"]
            assert manifests[0] == manifests[1]


def test_a_damaged_round_is_said(made, tmp_path):
    run = made(f"output_dir={tmp_path}/damaged")
    execute(run)
    path = round_path(run.rounds.folder, 3)
    path.write_bytes(path.read_bytes()[:-40])
    shutil.rmtree(run.evaluation.folder)
    with pytest.raises(UserError, match="0003.safetensors"):
        execute(run)


def test_devices_are_joined_clients(made):
    run = made()
    clients = run.clients
    alone = rounds.device_rows(clients, None)
    assert len(alone) == (clients.train.lengths > 0).sum()
    for count in (1, 2, len(alone)):
        joined = rounds.device_rows(clients, count)
        assert len(joined) == count
        assert sorted(np.concatenate(joined)) == sorted(clients.train.values)


def test_the_cloud_has_no_image_of_a_device(prepared):
    run = prepared()
    execute(run)
    devices = np.concatenate(rounds.device_rows(run.clients, None))
    assert set(run.labels[devices]) == {8, 9}
    cloud = run.cloud_rows
    assert set(run.labels[cloud]) == set(range(8))
    assert not set(cloud) & {*devices, *run.clients.test.values, *run.clients.val.values}


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (["method.devices=500"], "method.devices=500: there are . clients with train images"),
        (["method.rounds=0"], "method.rounds=0: must be"),
        (["method.network.size=12"], r"method.network=SmallCNN: does not take images \[1, 8, 8\]"),
        (["method.array=tokens"], "gives"),
        (["backbone.unseen_classes=[8,10]"], "backbone.unseen_classes=10: is no class: names, or numbers from 0 to 9"),
        (
            ["backbone.unseen_classes=0.1"],
            r"backbone.unseen_classes=0.1: must be a text or a list \[value, ...\] or null",
        ),
        (["backbone.unseen_classes=[0.5]"], "backbone.unseen_classes=0.5: is no class: names, or numbers from 0 to 9"),
        (["backbone.unseen_classes=[true]"], "backbone.unseen_classes=True: is no class"),
        (["backbone.unseen_classes=[[8]]"], r"backbone.unseen_classes=\[8\]: is no class"),
        (["backbone.unseen_classes=eight"], "backbone.unseen_classes=eight: must be a list of classes, or a slice"),
        (["backbone.unseen_classes='9:9'"], "leaves the clients without train images"),
        (["backbone.unseen_classes=':'"], "leaves the backbone without train images"),
        (["backbone.reserve=0.2"], "backbone.reserve=0.2: the backbone has all images but those of unseen_classes"),
    ],
)
def test_wrong_settings(made, settings, problem):
    with pytest.raises(UserError, match=problem):
        execute(made(*settings))


def test_the_cloud_needs_images_of_its_own(compose, tmp_path):
    make_imagenet(tmp_path / "images", train=3, val=2)
    own = ("dataset=imagenet", f"data_dir={tmp_path}/images", "method=fedavg", "backbone.model.channels=3")
    small = ("partition.images_per_client=2", "method.network.channels=3", "logger=csv")
    with pytest.raises(UserError, match="the cloud trains on the backbone's images, and it has none of its own"):
        execute(Stages(Experiment.from_config(compose(*own, *small))))


def test_a_device_that_diverges_is_left_out(prepared, tmp_path, caplog):
    run = prepared(f"output_dir={tmp_path}/diverges")
    rows = rounds.device_rows(run.clients, None)
    original = rounds.site_of

    def broken(inputs, method, number, own, device):
        site = original(inputs, method, number, own, device)
        if number == 0:
            site.own.x[:] = torch.nan
        return site

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounds, "site_of", broken)
        execute(run)
    assert "device 0 answers with numbers that are not finite; it is left out" in caplog.text
    assert len(rows) > 1
    assert all(t.isfinite().all() for t in load_file(round_path(run.rounds.folder, 3)).values())
