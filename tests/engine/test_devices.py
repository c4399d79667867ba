"""The devices learn in shards: a kill, several processes, what is kept and served."""

import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
import torch
from filelock import FileLock

from iciia_exp import Run
from iciia_exp.artifacts import read_json
from iciia_exp.data.batches import cut_chunks
from iciia_exp.data.states import shard_path
from iciia_exp.engine import devices
from iciia_exp.engine.execute import execute
from iciia_exp.errors import ConfigError, UserError
from iciia_exp.methods.tune.finetune import FineTune
from iciia_exp.models.payloads import packed_bytes
from iciia_exp.serving.session import ClientSession
from iciia_exp.serving.together import predict_together
from tests.making.kill import Killed

pytestmark = pytest.mark.usefixtures("undrawn")

OPTIONS = ("method=finetune", "partition.split=within", "evaluation.history_lengths=[]", "method.lr=0.3")


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    monkeypatch.setattr(devices, "SHARD", 3)


@pytest.fixture
def trained(stages):
    """Return the stages of a run whose devices have not learned."""
    made = stages(*OPTIONS)
    execute(made)
    whole = {p.name: p.read_bytes() for p in made.states.folder.glob("*.safetensors")}
    manifest = read_json(made.states.folder / "manifest.json")
    for folder in (made.states.folder, made.evaluation.folder):
        shutil.rmtree(folder)
    return stages(*OPTIONS), whole, manifest


def numbers(tensors):
    """Return what a shard holds, without the seconds that it took."""
    from safetensors.torch import load

    return {name: tensor.numpy().tobytes() for name, tensor in load(tensors).items()}


def same(folder, whole):
    found = {p.name: numbers(p.read_bytes()) for p in folder.glob("*.safetensors")}
    return found == {name: numbers(content) for name, content in whole.items()}


def test_a_killed_phase_goes_on_with_the_missing_shards(trained, monkeypatch):
    made, whole, manifest = trained
    learned, original = [], FineTune.personalise

    def die_later(self, own, link, cloud):
        learned.append(own["train"].client_C.tolist())
        if len(learned) == 3:
            raise Killed
        return original(self, own, link, cloud)

    monkeypatch.setattr(FineTune, "personalise", die_later)
    with pytest.raises(Killed):
        execute(made)
    assert not made.states.finished
    assert len(list(made.states.folder.glob("*.safetensors"))) == 2
    execute(made)
    assert len(learned) == 1 + len(whole)  # the killed one twice, the first two once
    assert same(made.states.folder, whole)
    again = read_json(made.states.folder / "manifest.json")
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in manifest.items() if k != "seconds"}
    assert not list(made.states.folder.glob(".0*"))  # no locks of shards are left


def test_processes_share_the_shards(trained, monkeypatch):
    made, whole, _ = trained
    learned, original = [], FineTune.personalise

    def count(self, own, link, cloud):
        learned.extend(own["train"].client_C.tolist())
        return original(self, own, link, cloud)

    monkeypatch.setattr(FineTune, "personalise", count)
    made.states.folder.mkdir()
    with ThreadPoolExecutor(3) as pool:  # locks are held by open files, so threads are as good as processes
        list(pool.map(lambda _: made.states.make(made.states.folder), range(3)))
    assert sorted(learned) == sorted(np.flatnonzero(made.clients.test.lengths).tolist())
    assert same(made.states.folder, whole)


def test_a_shard_of_another_process_is_waited_for(trained):
    made, whole, _ = trained
    folder = made.states.folder
    folder.mkdir()
    with ThreadPoolExecutor(1) as pool:
        with FileLock(folder / ".00001.lock"):  # another process works at it, and dies
            waiting = pool.submit(made.states.make, folder)
            while len(list(folder.glob("*.safetensors"))) < len(whole) - 1:
                assert not waiting.done()
        waiting.result()
    assert same(folder, whole)


def test_the_states_do_not_depend_on_the_shards(trained, monkeypatch):
    made, _, _ = trained
    found = []
    for size, numbers, count in ((3, 1 << 28, 4), (100, 1 << 28, 1), (100, 1, 11)):
        monkeypatch.setattr(devices, "SHARD", size)
        monkeypatch.setattr(devices, "_NUMBERS", numbers)  # few images at once, large ones
        shutil.rmtree(made.states.folder, ignore_errors=True)
        made.states.folder.mkdir()
        made.states.make(made.states.folder)
        assert read_json(made.states.folder / "manifest.json")["shards"] == count
        states = made.load_run(made.run.folder).method.states
        tested = torch.from_numpy(np.flatnonzero(made.clients.test.lengths))
        found.append(states.of(tested))
        assert len(states) == len(tested)
    for other in found[1:]:
        for name, state in found[0].items():
            torch.testing.assert_close(state, other[name], atol=1e-5, rtol=1e-5)


def test_shards_of_another_size_are_made_again_after_a_kill(trained, monkeypatch):
    made, whole, _ = trained
    folder = made.states.folder
    monkeypatch.setattr(devices, "SHARD", 5)
    folder.mkdir()
    made.states.make(folder)
    (folder / "manifest.json").unlink()  # killed just before the end
    monkeypatch.setattr(devices, "SHARD", 3)
    made.states.make(folder)
    assert same(folder, whole)


def test_what_is_not_finite_names_the_client(trained, monkeypatch):
    made, _, _ = trained
    original = FineTune.personalise

    def diverge(self, own, link, cloud):
        learned = original(self, own, link, cloud)
        learned.states["bias"][1] = torch.nan
        return learned

    monkeypatch.setattr(FineTune, "personalise", diverge)
    with pytest.raises(
        UserError, match=r"client .*: the state that it learned \(\w+\) has numbers that are not finite"
    ):
        execute(made)
    assert not list(made.states.folder.glob("*.safetensors"))


@pytest.mark.parametrize(("method", "up"), [("finetune", 0), ("prompt_tuning", 1)])
def test_ledger_of_a_run(stages, method, up):
    made = stages(f"method={method}", *OPTIONS[1:3], "training.recipe.epochs=1")
    row = execute(made)
    ledger = pd.read_parquet(made.evaluation.folder / "ledger.parquet")
    measured = ledger[ledger["measured_bytes"].notna()]
    assert (measured["bytes"] - measured["measured_bytes"]).abs().max() < 1e-6
    backbone = made.open_store().manifest["weights_bytes"]
    assert ledger.set_index(["what", "kind"]).loc[("backbone", "weights"), "bytes"] == backbone
    tested = np.flatnonzero(made.clients.test.lengths)
    images = sum(made.clients[role].lengths[tested] for role in ("train", "val")).mean()
    assert row["client_up_bytes"] == round(up * images * (4 * row["dim"] + 8))
    assert row["leaves_device"] == ("features, labels" if up else "nothing")
    assert row["client_down_bytes"] >= backbone + up * row["state_bytes"]
    assert (row["client_device_macs"] > images * row["backbone_macs"]) == (not up)
    assert row["request_device_macs"] == row["backbone_macs"]


def test_ledger_of_a_method_in_the_cloud(stages):
    made = stages("method=iciia", "evaluation.history_lengths=[]", "training.recipe.epochs=1", "evaluation.site=cloud")
    row = execute(made)
    assert row["client_down_bytes"] == row["client_up_bytes"] == row["request_device_macs"] == 0
    assert row["request_up_bytes"] == int(np.prod(made.open_store().manifest["input_shape"]))
    assert row["request_down_bytes"] == 4 * row["num_classes"]
    assert row["request_cloud_macs"] == row["backbone_macs"] + row["streaming_macs"]
    assert row["leaves_device"] == "images"
    on_device = execute(stages("method=iciia", "evaluation.history_lengths=[]", "training.recipe.epochs=1"))
    assert on_device["digest"] == row["digest"]  # not trained again
    assert on_device["client_down_bytes"] > 0
    assert on_device["leaves_device"] == "nothing"
    for method, where in (
        ("finetune", "on the devices"),
        ("dc_ccl", "in the cloud"),
        ("linear_probe", "by device and"),
    ):
        with pytest.raises(
            ConfigError, match=rf"^evaluation\.site=cloud: has no effect with method={method}, .* {where}"
        ):
            execute(stages(f"method={method}", *OPTIONS[1:3], "evaluation.site=cloud"))


def test_sessions_serve_new_images(stages):
    made = stages(*OPTIONS)
    execute(made)
    run = made.load_run(made.run.folder)
    number = int(np.flatnonzero(made.clients.test.lengths)[1])
    name, rows = made.clients.ids[number], made.clients.test[number]
    x = torch.from_numpy(made.open_store().array()[rows].astype(np.float32))
    session = ClientSession(run, client=name)
    got = torch.stack([session.predict(row) for row in x])
    torch.testing.assert_close(got, run.predict(x, clients=name))
    assert session.state_bytes == run.method.state_bytes()
    other = ClientSession(run, client=made.clients.ids[int(np.flatnonzero(made.clients.test.lengths)[0])])
    torch.testing.assert_close(predict_together([session, other], x[:2])[0], got[0])
    session.save("kept.session")
    torch.testing.assert_close(ClientSession.load("kept.session", run).predict(x[0]), got[0])

    new = ClientSession(run, client="new")
    with pytest.raises(UserError, match=r"new: finetune has no state of this client.*session.learn"):
        new.predict(x[0])
    train, val = (torch.from_numpy(made.clients[role][number]) for role in ("train", "val"))
    labelled = [
        (torch.from_numpy(made.open_store().array()[r]).float(), torch.from_numpy(made.labels[r])) for r in (train, val)
    ]
    new.learn(*labelled[0], val=labelled[1])
    torch.testing.assert_close(torch.stack([new.predict(row) for row in x]), got, atol=1e-5, rtol=1e-5)
    lists = ClientSession(run, client="lists")
    lists.learn([list(row) for row in labelled[0][0]], labelled[0][1].numpy().astype(">i2"), val=labelled[1])
    torch.testing.assert_close(lists.predict(x[0]), new.predict(x[0]))
    new.save("new.session")
    torch.testing.assert_close(ClientSession.load("new.session", run).predict(x[0]), got[0], atol=1e-5, rtol=1e-5)


def test_learning_refuses_what_does_not_fit(stages):
    made = stages(*OPTIONS)
    execute(made)
    run = made.load_run(made.run.folder)
    session, x, y = ClientSession(run, client="new"), torch.zeros(4, run.method.dim), torch.tensor([0, 1, 0, 1])
    for features, labels, problem in (
        (x[:, :3], y, "expected features"),
        (x, y[:3], r"expected labels \[4\]"),
        (x, y.float(), "whole numbers"),
        (x, y + 100, "labels are 0 to 9"),
        (x * torch.nan, y, "not finite"),
        (x[:1], y[:1], "two labelled images"),
        ([["a"]], y, "expected features, numbers"),
        (x, ["0", "1", "0", "1"], "whole numbers"),
    ):
        with pytest.raises(UserError, match=problem):
            session.learn(features, labels)
    with pytest.raises(UserError, match=r"val is a tuple \(features, labels\)"):
        session.learn(x, y, val=x)
    with pytest.raises(UserError, match="history and compile do not apply"):
        ClientSession(run, client="new", history=4)
    with pytest.raises(UserError, match="has no client nobody"):
        run.predict(x, clients="nobody")
    iciia = stages("method=iciia", "evaluation.history_lengths=[]", "training.recipe.epochs=1")
    execute(iciia)
    with pytest.raises(UserError, match="it needs no labels"):
        ClientSession(iciia.load_run(iciia.run.folder)).learn(x, y)


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["cut", "shapes", "missing", "manifest"])
def test_damaged_states_are_named(stages, damage):
    from safetensors.torch import save_file

    made = stages(*OPTIONS)
    execute(made)
    path = shard_path(made.states.folder, 0)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-10])
    elif damage == "shapes":
        clients = torch.from_numpy(np.flatnonzero(made.clients.test.lengths)[:3])
        save_file({"client": clients, "weight": torch.zeros(3, 2, 2), "bias": torch.zeros(3, 10)}, path)
    elif damage == "missing":
        path.unlink()
    else:
        path = made.states.folder / "manifest.json"
        path.write_text('{"shards": "many"}')
    first = torch.from_numpy(np.flatnonzero(made.clients.test.lengths)[:1])
    with pytest.raises(UserError, match=path.name):
        made.load_run(made.run.folder).method.states_of(first)


@pytest.mark.usefixtures("undrawn")
def assert_served_on_tokens(made, run, batch, one, told):
    """A session classifies as the evaluation did, from tokens or from images, and learns a new client."""
    backbone, row = run.load_backbone(), int(batch.image_CS[0][0])
    session = ClientSession(run, one, backbone=backbone)
    features, tokens = batch.x_CSD[0], batch.arrays["tokens"][0]
    got = session.predict(features[0], {"tokens": tokens[0].numpy()})
    torch.testing.assert_close(got, told[0])
    torch.testing.assert_close(session.predict(made.experiment.dataset[row]), told[0], atol=0.01, rtol=0.01)
    with pytest.raises(UserError, match="miet: reads tokens; give arrays="):
        session.predict(features[0])
    few, labels = batch.mask_CS[0], batch.y_CS[0]
    new = ClientSession(run, "new", backbone=backbone)
    with pytest.raises(UserError, match="miet: reads tokens; give arrays="):
        new.learn(features[few], labels[few])
    with pytest.raises(UserError, match=r"learn: tokens must be finite numbers"):
        new.learn(features[few], labels[few], arrays={"tokens": tokens[few] * float("inf")})
    own = features[few], labels[few], {"tokens": tokens[few]}
    new.learn(*own[:2], own, own[2])
    assert new.predict(features[0], {"tokens": tokens[0]}).sum() == pytest.approx(1, abs=1e-5)
    arrays = {"tokens": torch.stack([tokens[0]] * 2)}
    together = predict_together([session, new], torch.stack([features[0]] * 2), arrays)
    torch.testing.assert_close(together[0], got)
    session.save(made.run.folder / "session")
    again = ClientSession.load(made.run.folder / "session", run)
    torch.testing.assert_close(again.predict(features[0], {"tokens": tokens[0]}), got)


def test_devices_learn_on_tokens_from_images_to_results(with_tokens):
    within = ("partition=classes_per_client", "partition.split=within", "partition.images_per_client=20")
    made = with_tokens("method=miet", *within, "method.epochs=2", "method.linear_epochs=2", "method.payload=int8")
    row = execute(made)
    size = packed_bytes((17, 16), "int8")
    assert (row["request_up_bytes"], row["request_down_bytes"]) == (64, size)
    assert row["leaves_device"] == "images"
    ledger = pd.read_parquet(made.evaluation.folder / "ledger.parquet")
    sent = ledger[(ledger["phase"] == "client_once") & (ledger["kind"] == "tokens")]
    assert sent["bytes"].tolist() == pytest.approx(sent["measured_bytes"].tolist())
    run = Run.load(made.run.folder, cache_dir=made.experiment.cache_dir)
    batch = made.batches(run.features)[cut_chunks(run.partition.test, 8)]
    right = run.method.logits(batch).argmax(-1) == batch.y_CS
    one, few = run.partition.ids[int(batch.client_C[0])], batch.mask_CS[0]
    told = run.predict(batch.x_CSD[0][few], clients=one, arrays={"tokens": batch.arrays["tokens"][0][few]})
    torch.testing.assert_close(told, run.method.logits(batch)[0][few].softmax(-1))
    for arrays, message in (
        (None, r"miet: reads tokens; give arrays={'tokens': ...}, \[1, 3, 17, 16\]"),
        ({"tokens": torch.zeros(3, 5)}, r"tokens must be finite numbers \[1, 3, 17, 16\], got \[3, 5\]"),
    ):
        with pytest.raises(UserError, match=message):
            run.predict(torch.zeros(3, 16), clients=one, arrays=arrays)
    assert_served_on_tokens(made, run, batch, one, told)
    assert int(right[batch.mask_CS].sum()) == run.clients["method_correct"].sum()
