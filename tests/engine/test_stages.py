"""The main job, in this process and on a small setting: every stage, alone and interrupted."""

import json
import os
import re
import shutil
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from iciia_exp import Run
from iciia_exp.data.clients import Ragged
from iciia_exp.data.store import FeatureStore, FeatureWriter
from iciia_exp.engine import graph
from iciia_exp.engine.evaluation import evaluate as evaluation
from iciia_exp.engine.execute import execute
from iciia_exp.engine.terminal import setup_logging
from iciia_exp.engine.training import modules as training
from iciia_exp.engine.training import train_backbone as backbones
from iciia_exp.engine.training import train_method
from iciia_exp.errors import ConfigError, UserError
from tests.making.kill import Killed

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture(autouse=True)
def logged():
    setup_logging()


def science(row):
    """Return a row without what differs between two runs of the same thing."""
    return {k: v for k, v in row.items() if not k.startswith("seconds") and k != "finished"}


def weights(stages):
    return load_file(stages.run.folder / "weights.safetensors")


def same_weights(one, other):
    assert set(one) == set(other)
    return all(torch.equal(one[name], other[name]) for name in one)


def test_the_main_job(stages, capsys):
    made = stages()
    row = execute(made)
    out = capsys.readouterr().out
    assert "classes per client" in out
    assert "small_cnn alone" in out
    assert row == json.loads((made.evaluation.folder / "results.json").read_text())
    clients = pd.read_parquet(made.evaluation.folder / "clients.parquet")
    columns = "client client_type images decisions classes backbone_correct method_correct both_correct"
    columns += " backbone_loss method_loss"
    assert list(clients) == columns.split()
    assert len(clients) == row["test_clients"]
    assert clients["method_correct"].sum() / clients["images"].sum() == row["accuracy"]
    assert (clients["classes"] == 2).all()
    assert row["backbone_macs"] > 0
    assert row["overhead_percent"] == pytest.approx(16 * row["per_image_overhead_percent"])
    for name in ("gain_per_client", "accuracy_vs_overhead"):
        assert (made.evaluation.folder / "plots" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    metrics = pd.read_csv(made.run.folder / "csv" / "version_0" / "metrics.csv")
    assert metrics["val/accuracy"].notna().sum() == 3
    assert not (made.run.folder / "checkpoints").exists()
    # the flat row has no nested value, and every setting
    assert not any(isinstance(v, dict | list) for v in row.values())
    assert row["config.partition.classes_per_client"] == 2
    assert (row["seed"], row["partition_seed"], row["backbone_seed"]) == (0, 0, 0)


def test_repeating_computes_nothing(stages, monkeypatch, capsys):
    row = execute(stages())

    def compute(*_, **__):
        raise AssertionError("computed again")

    monkeypatch.setattr(graph, "make_folder", compute)
    monkeypatch.setattr(type(stages().experiment.dataset), "load_table", compute)
    capsys.readouterr()
    assert execute(stages()) == row
    assert "small_cnn alone" in capsys.readouterr().out


def test_the_same_numbers_every_time(stages, tmp_path):
    one, other = stages(), stages(f"cache_dir={tmp_path}/other", f"output_dir={tmp_path}/elsewhere")
    rows = [execute(one), execute(other)]
    assert science(rows[0]) == science(rows[1])
    assert same_weights(weights(one), weights(other))
    np.testing.assert_array_equal(
        FeatureStore.open(one.features.folder).array(), FeatureStore.open(other.features.folder).array()
    )


def test_seeds_are_their_own(stages):
    base, seed, partition = stages(), stages("seed=1"), stages("partition.seed=1")
    rows = [execute(p) for p in (base, seed, partition)]
    assert rows[0]["backbone_accuracy"] == rows[1]["backbone_accuracy"]
    assert not same_weights(weights(base), weights(seed))
    assert rows[0]["setting_digest"] == rows[1]["setting_digest"] == rows[2]["setting_digest"]
    assert rows[0]["partition_digest"] == rows[1]["partition_digest"] != rows[2]["partition_digest"]


def _raise(*_, **__):
    raise Killed


KILLS = {
    "backbone training": (training.BackboneModule, "training_step"),
    "before the backbone is whole": (backbones, "file_digest"),
    "feature extraction": (FeatureWriter, "write"),
    "before the features are whole": (FeatureWriter, "finish"),
    "method training": (training.MethodModule, "training_step"),
    "after training": (train_method, "save_method"),
    "evaluation": (training.MethodModule, "test_step"),
    "before the results": (evaluation, "accuracy_vs_overhead"),
}


@pytest.mark.slow
@pytest.mark.parametrize("where", KILLS)
def test_killed_in_any_stage_and_repeated(stages, tmp_path, monkeypatch, where):
    whole = stages(f"cache_dir={tmp_path}/whole", f"output_dir={tmp_path}/whole")
    want = execute(whole)
    owner, name = KILLS[where]
    original = getattr(owner, name)
    calls = []

    def die_later(*args, **kwargs):
        calls.append(1)
        if len(calls) > (2 if name == "training_step" else 0):
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, die_later)
    with pytest.raises(Killed):
        execute(stages())
    assert not (stages().evaluation.folder / "results.json").exists()
    monkeypatch.setattr(owner, name, original)
    assert science(execute(stages())) == science(want)
    assert same_weights(weights(stages()), weights(whole))


def test_killed_while_a_per_image_classifier_is_trained(stages, tmp_path, monkeypatch):
    options = ("method=iciia_stream", "method.image.perceptron=8", "training.recipe.epochs=1")
    whole = stages(*options, f"output_dir={tmp_path}/whole")
    execute(whole)
    original, calls = training.ClassifierModule.training_step, []

    def die(self, *args):
        calls.append(self.trainer.current_epoch)
        if calls[-1] == 3 and calls.count(3) == 1:
            raise Killed
        return original(self, *args)

    monkeypatch.setattr(training.ClassifierModule, "training_step", die)
    with pytest.raises(Killed):
        execute(stages(*options))
    killed = len(calls)
    execute(stages(*options))
    assert calls[killed] == 3  # it went on from the last whole epoch
    assert same_weights(weights(stages(*options)), weights(whole))


@pytest.mark.slow
@pytest.mark.parametrize("network", [1, 2])
def test_killed_while_one_of_two_networks_is_trained(stages, tmp_path, monkeypatch, network):
    """Each has checkpoints of its own: the second does not go on from the first."""
    options = ("method=client_profile", "method.hidden=8", "method.vector=2")
    whole = stages(*options, f"output_dir={tmp_path}/whole")
    execute(whole)
    want = weights(whole)
    strong, light = (want[f"method.perceptrons.{i}.hidden.weight"] for i in (0, 1))
    assert (strong != light).all()
    original, starts = training.ClassifierModule.training_step, []

    def die(self, *args):
        if not self.trainer.global_step:
            starts.append(self.trainer)
        if self.trainer.current_epoch == 3 and len(starts) == network:
            raise Killed
        return original(self, *args)

    monkeypatch.setattr(training.ClassifierModule, "training_step", die)
    with pytest.raises(Killed):
        execute(stages(*options))
    monkeypatch.setattr(training.ClassifierModule, "training_step", original)
    execute(stages(*options))
    assert same_weights(weights(stages(*options)), want)


@pytest.mark.parametrize(
    ("stage", "made", "needs"),
    [("features", None, "backbone"), ("evaluate", None, "backbone"), ("train", "backbone", "features")],
)
def test_a_stage_alone_names_what_it_needs(stages, stage, made, needs):
    if made:
        execute(stages(f"stage={made}"))
    with pytest.raises(UserError, match=f"stage={stage}: needs the {needs} stage first"):
        execute(stages(f"stage={stage}"))


def test_stages_one_by_one(stages):
    for stage in ("backbone", "features"):
        assert execute(stages(f"stage={stage}")) is None
        assert not stages().run.folder.exists()
    with pytest.raises(UserError, match="needs the train stage first"):
        execute(stages("stage=evaluate"))
    assert execute(stages("stage=train")) is None
    with pytest.raises(UserError, match="trained but not evaluated"):
        Run.load(stages().run.folder).results  # noqa: B018
    row = execute(stages("stage=evaluate"))
    assert science(row) == science(execute(stages()))


def test_nothing_is_written_for_a_bad_configuration(stages, tmp_path):
    for overrides, key in (
        (["partition.images_per_client=600"], "partition.images_per_client=600"),
        (["trainer.precision=7"], "trainer.precision=7"),
        (["method=lame", "method.neighbours=-1"], "method.neighbours=-1"),
        (["method=iciia_prior", "method.prior.new=2"], "method.prior.new=2"),
        (["method=iciia_prior", "method.prior=null"], "method.prior=None"),
        (["method=iciia_prior", "method.encoder=x"], "method.encoder=x"),
        (["method=iciia_stream", "method.encoder.groups=7"], "method.encoder.groups=7"),
    ):
        with pytest.raises(UserError, match=f"^{re.escape(key)}: "):
            execute(stages(*overrides))
    assert not os.listdir(tmp_path)


def test_baselines(stages):
    rows = {m: execute(stages(f"method={m}")) for m in ("backbone", "linear_head")}
    plain = rows["backbone"]
    assert plain["gain"] == plain["harmed_share"] == plain["overhead_percent"] == 0
    assert plain["accuracy"] == plain["backbone_accuracy"] == rows["linear_head"]["backbone_accuracy"]
    assert plain["seed"] is None
    assert rows["linear_head"]["overhead_percent"] == 0
    assert rows["linear_head"]["epochs"] == 3


def test_within_client_and_by_parent(stages):
    row = execute(stages("partition.split=within", "partition.by=parent", "partition.images_per_client=20"))
    clients = Run.load(
        stages("partition.split=within", "partition.by=parent", "partition.images_per_client=20").run.folder
    )
    assert set(clients.clients["client_type"]) <= {"loops", "curves", "straight"}
    assert row["test_clients"] == len(clients.clients)


def test_the_manifest_says_what_the_features_are(stages):
    execute(stages())
    manifest = json.loads((stages().features.folder / "manifest.json").read_text())
    assert manifest["transform"] == {"size": 8, "channels": 1, "mean": 0.3, "std": 0.5}
    assert (manifest["dim"], manifest["num_classes"], manifest["images"]) == (32, 10, 360)
    assert set(manifest["accuracy"]) == {"backbone", "train", "val", "test"}
    assert manifest["macs"] > 0
    assert len(manifest["weights_digest"]) == 12


def test_the_published_protocol_runs(stages):
    row = execute(stages("training=published", "training.recipe.epochs=2"))
    assert row["config.optimizer"] == "SGD"
    assert row["config.scheduler"] == "ConstantLR"


def test_a_long_extraction_says_how_long_before_it_starts(stages, monkeypatch, capsys):
    from iciia_exp.engine.training import extract as features

    monkeypatch.setattr(features, "_estimate", lambda *_: 7200.0)
    execute(stages("stage=backbone"))
    execute(stages("stage=features"))
    lines = capsys.readouterr().out.splitlines()
    (size,) = [i for i, line in enumerate(lines) if "360 images x 32 float32, 46.1 kB" in line]
    assert "about 2.0 h" in lines[size + 1]


def test_the_estimate_counts_loading(stages):
    from iciia_exp.engine.training.extract import _estimate

    made = stages()
    backbone = made.new_backbone().eval()

    class Slow(type(made.experiment.dataset)):
        def __getitem__(self, index):
            time.sleep(0.01)
            return super().__getitem__(index)

    made.experiment.dataset.__class__ = Slow
    assert (
        _estimate(made.experiment.dataset, backbone, np.arange(100), 0) >= 1.0
    )  # 10 ms an image; how much more is the machine's
    assert _estimate(made.experiment.dataset, backbone, np.arange(0), 0) == 0.0


def test_features_outlive_their_backbone(stages, monkeypatch):
    want = execute(stages())
    shutil.rmtree(stages().backbone.folder)
    shutil.rmtree(stages().run.folder)
    monkeypatch.setattr(backbones, "train_backbone", _raise)
    assert science(execute(stages())) == science(want)
    assert execute(stages("stage=features")) is None


def test_the_published_partition_runs(compose, small):
    from iciia_exp.config.experiment import Experiment
    from iciia_exp.engine.stages import Stages

    overrides = [o for o in small if not o.startswith("partition.")]
    row = execute(Stages(Experiment.from_config(compose(*overrides, "partition=parent_category"))))
    assert row["test_images"] == 100  # every test image counts once


OPTIONS = [("optimizer", "sgd"), ("scheduler", "constant")]


@pytest.mark.parametrize("where", ["", "@backbone.recipe."])
def test_a_training_that_diverges_is_an_error_that_names_the_rate(stages, where):
    key = f"{where.removeprefix('@')}optimizer"
    groups = [f"{group}{where}{group if where else ''}={option}" for group, option in OPTIONS]
    made = stages(*groups, f"{key}.lr=1e12", "training.recipe.clip_norm=0")
    for _ in range(2):  # also when repeated
        with pytest.raises(UserError, match=rf"^{key}\.lr=1000000000000\.0: training diverged"):
            execute(made)
        assert not (made.run.folder / "weights.safetensors").exists()


@pytest.mark.parametrize("clip", [0, 1])
def test_mixed_precision_with_and_without_clipping(stages, clip):
    row = execute(stages("trainer.precision=bf16-mixed", f"training.recipe.clip_norm={clip}"))
    assert row["test_clients"] > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda clients: None, "assign must return Clients, got NoneType"),
        (lambda clients: replace(clients, test=Ragged.empty(len(clients))), "no client has test images"),
        (lambda clients: replace(clients, ids=np.full(len(clients), "a")), "two clients have the same id"),
        (
            lambda clients: replace(clients, train=replace(clients.train, values=clients.train.values + 9999)),
            "images are numbered 0 to 359, and a client has another number",
        ),
    ],
)
def test_what_a_partition_assigns_is_checked(stages, monkeypatch, change, message):
    good, made = stages().clients, stages()
    monkeypatch.setattr(type(made.experiment.partition), "assign", lambda *_: change(good))
    with pytest.raises(ConfigError, match=f"partition._target_=ClassesPerClient: {message}"):
        execute(made)


def test_a_partition_cannot_change_the_table(stages, monkeypatch):
    made = stages()
    assign = type(made.experiment.partition).assign

    def changing(self, table, num_classes):
        found = assign(self, table, num_classes)
        table["label"] = 0
        return found

    monkeypatch.setattr(type(made.experiment.partition), "assign", changing)
    made.clients  # noqa: B018
    assert made.table["label"].nunique() == 10


def test_class_names_are_texts(stages, monkeypatch):
    made = stages()
    monkeypatch.setattr(made.experiment.dataset_class, "class_names", tuple(range(10)))
    with pytest.raises(ConfigError, match="_target_=Digits: class_names must be texts, got int 0"):
        stages().facts.class_names  # noqa: B018
