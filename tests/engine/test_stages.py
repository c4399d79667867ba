"""The main job, in this process and on a small setting: every stage, alone and interrupted."""

import json
import os
import shutil
import time

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from iciia_exp import Run
from iciia_exp.data.store import FeatureStore, FeatureWriter
from iciia_exp.engine import stages
from iciia_exp.engine.evaluation import evaluate as evaluation
from iciia_exp.engine.stages import execute
from iciia_exp.engine.terminal import setup_logging
from iciia_exp.engine.training import train_backbone as backbones
from iciia_exp.engine.training import modules as training
from iciia_exp.errors import UserError


@pytest.fixture(autouse=True)
def logged():
    setup_logging()


def science(row):
    """Return a row without what differs between two runs of the same thing."""
    return {k: v for k, v in row.items() if not k.startswith("seconds") and k != "finished"}


def weights(plan):
    return load_file(plan.run_dir / "weights.safetensors")


def same_weights(one, other):
    assert set(one) == set(other)
    return all(torch.equal(one[name], other[name]) for name in one)


def test_the_main_job(plan, capsys):
    made = plan()
    row = execute(made)
    out = capsys.readouterr().out
    assert "classes per client" in out
    assert "small_cnn alone" in out
    assert row == json.loads((made.run_dir / "results.json").read_text())
    clients = pd.read_parquet(made.run_dir / "clients.parquet")
    columns = "client kind images answers classes backbone_hits method_hits both_hits backbone_loss method_loss"
    assert list(clients) == columns.split()
    assert len(clients) == row["test_clients"]
    assert clients["method_hits"].sum() / clients["images"].sum() == row["accuracy"]
    assert (clients["classes"] == 2).all()
    assert row["backbone_macs"] > 0
    assert row["overhead_percent"] == pytest.approx(16 * row["per_image_overhead_percent"])
    for name in ("gain_per_client", "accuracy_vs_overhead"):
        assert (made.run_dir / "plots" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    metrics = pd.read_csv(made.run_dir / "csv" / "version_0" / "metrics.csv")
    assert metrics["selection/accuracy"].notna().sum() == 3
    assert not (made.run_dir / "checkpoints").exists()
    # the flat row has no nested value, and every setting
    assert not any(isinstance(v, dict | list) for v in row.values())
    assert row["config.partition.classes_per_client"] == 2
    assert (row["seed"], row["partition_seed"], row["backbone_seed"]) == (0, 0, 0)


def test_repeating_computes_nothing(plan, monkeypatch, capsys):
    row = execute(plan())

    def compute(*_, **__):
        raise AssertionError("computed again")

    for name in ("train_backbone", "_features", "_train", "_run"):
        monkeypatch.setattr(stages, name, compute)
    monkeypatch.setattr(type(plan().dataset), "load_table", compute)
    capsys.readouterr()
    assert execute(plan()) == row
    assert "small_cnn alone" in capsys.readouterr().out


def test_the_same_numbers_every_time(plan, tmp_path):
    one, other = plan(), plan(f"cache_dir={tmp_path}/other", f"output_dir={tmp_path}/elsewhere")
    rows = [execute(one), execute(other)]
    assert science(rows[0]) == science(rows[1])
    assert same_weights(weights(one), weights(other))
    np.testing.assert_array_equal(
        FeatureStore.open(one.features_dir).array(), FeatureStore.open(other.features_dir).array()
    )


def test_seeds_are_their_own(plan):
    base, seed, partition = plan(), plan("seed=1"), plan("partition.seed=1")
    rows = [execute(p) for p in (base, seed, partition)]
    assert rows[0]["backbone_accuracy"] == rows[1]["backbone_accuracy"]
    assert not same_weights(weights(base), weights(seed))
    assert rows[0]["setting_digest"] == rows[1]["setting_digest"] == rows[2]["setting_digest"]
    assert rows[0]["partition_digest"] == rows[1]["partition_digest"] != rows[2]["partition_digest"]


class Killed(BaseException):
    """Not an Exception: nothing in between may handle it."""


def _raise(*_, **__):
    raise Killed


KILLS = {
    "backbone training": (training.BackboneModule, "training_step"),
    "before the backbone is whole": (backbones, "file_digest"),
    "feature extraction": (FeatureWriter, "write"),
    "before the features are whole": (FeatureWriter, "finish"),
    "method training": (training.MethodModule, "training_step"),
    "after training": (stages, "save_method"),
    "evaluation": (training.MethodModule, "test_step"),
    "before the results": (evaluation, "_siblings"),
}


@pytest.mark.parametrize("where", KILLS)
def test_killed_in_any_stage_and_repeated(plan, tmp_path, monkeypatch, where):
    whole = plan(f"cache_dir={tmp_path}/whole", f"output_dir={tmp_path}/whole")
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
        execute(plan())
    assert not (plan().run_dir / "results.json").exists()
    monkeypatch.setattr(owner, name, original)
    assert science(execute(plan())) == science(want)
    assert same_weights(weights(plan()), weights(whole))


@pytest.mark.parametrize(
    ("stage", "needs"), [("features", "backbone"), ("train", "features"), ("evaluate", "features")]
)
def test_a_stage_alone_names_what_it_needs(plan, stage, needs):
    with pytest.raises(UserError, match=f"stage={stage}: needs the {needs} stage first"):
        execute(plan(f"stage={stage}"))


def test_stages_one_by_one(plan):
    for stage in ("backbone", "features"):
        assert execute(plan(f"stage={stage}")) is None
        assert not plan().run_dir.exists()
    with pytest.raises(UserError, match="needs the train stage first"):
        execute(plan("stage=evaluate"))
    assert execute(plan("stage=train")) is None
    with pytest.raises(UserError, match="trained but not evaluated"):
        Run.load(plan().run_dir).results  # noqa: B018
    row = execute(plan("stage=evaluate"))
    assert science(row) == science(execute(plan()))


def test_nothing_is_written_for_a_bad_configuration(plan, tmp_path):
    for override in ("partition.images_per_client=600", "trainer.precision=7"):
        with pytest.raises(UserError):
            execute(plan(override))
    assert not os.listdir(tmp_path)


def test_baselines(plan):
    rows = {m: execute(plan(f"method={m}")) for m in ("backbone", "linear_head")}
    plain = rows["backbone"]
    assert plain["gain"] == plain["harmed_share"] == plain["overhead_percent"] == 0
    assert plain["accuracy"] == plain["backbone_accuracy"] == rows["linear_head"]["backbone_accuracy"]
    assert plain["seed"] is None
    assert rows["linear_head"]["overhead_percent"] == 0
    assert rows["linear_head"]["epochs"] == 3


def test_within_client_and_by_parent(plan):
    row = execute(plan("partition.split=within", "partition.by=parent", "partition.images_per_client=20"))
    clients = Run.load(plan("partition.split=within", "partition.by=parent", "partition.images_per_client=20").run_dir)
    assert set(clients.clients["kind"]) <= {"loops", "curves", "straight"}
    assert row["test_clients"] == len(clients.clients)


def test_the_manifest_says_what_the_features_are(plan):
    execute(plan())
    manifest = json.loads((plan().features_dir / "manifest.json").read_text())
    assert manifest["transform"] == {"size": 8, "channels": 1, "mean": 0.3, "std": 0.5}
    assert (manifest["dim"], manifest["num_classes"], manifest["images"]) == (32, 10, 360)
    assert set(manifest["accuracy"]) == {"backbone", "train", "selection", "test"}
    assert manifest["macs"] > 0
    assert len(manifest["weights_digest"]) == 12


def test_a_damaged_backbone_is_named(plan):
    execute(plan("stage=backbone"))
    path = plan().backbone_dir / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"weights\.safetensors: cannot be loaded"):
        execute(plan())


def test_the_published_protocol_runs(plan):
    row = execute(plan("protocol=published", "protocol.recipe.epochs=2"))
    assert row["config.protocol.recipe.optimizer"] == "sgd"


def test_a_long_extraction_says_how_long_before_it_starts(plan, monkeypatch, capsys):
    from iciia_exp.engine.training import extract as features

    monkeypatch.setattr(features, "_estimate", lambda *_: 7200.0)
    execute(plan("stage=backbone"))
    execute(plan("stage=features"))
    lines = capsys.readouterr().out.splitlines()
    (size,) = [i for i, line in enumerate(lines) if "360 images x 32 float32, 46 KB" in line]
    assert "about 2.0 h" in lines[size + 1]


def test_the_estimate_counts_loading(plan):
    from iciia_exp.engine.training.extract import _estimate

    made = plan()
    backbone = made.make_backbone().eval()

    class Slow(type(made.dataset)):
        def __getitem__(self, index):
            time.sleep(0.01)
            return super().__getitem__(index)

    made.dataset.__class__ = Slow
    assert _estimate(made.dataset, backbone, np.arange(100), 0) >= 1.0  # 10 ms an image; how much more is the machine's
    assert _estimate(made.dataset, backbone, np.arange(0), 0) == 0.0


def test_features_outlive_their_backbone(plan, monkeypatch):
    want = execute(plan())
    shutil.rmtree(plan().backbone_dir)
    shutil.rmtree(plan().run_dir)
    monkeypatch.setattr(stages, "train_backbone", _raise)
    assert science(execute(plan())) == science(want)
    assert execute(plan("stage=features")) is None


def test_the_published_partition_runs(compose, small):
    from iciia_exp.config.build import Plan

    overrides = [o for o in small if not o.startswith("partition.")]
    row = execute(Plan(compose(*overrides, "partition=parent_category")))
    assert row["test_images"] == 100  # every test image counts once


@pytest.mark.parametrize("key", ["protocol.recipe", "backbone.recipe"])
def test_a_training_that_diverges_is_an_error_that_names_the_rate(plan, key):
    made = plan(f"{key}.optimizer=sgd", f"{key}.lr=1e12", f"{key}.schedule=constant", "protocol.recipe.clip_norm=0")
    with pytest.raises(UserError, match=rf"^{key}\.lr=1000000000000\.0: training diverged"):
        execute(made)
    assert not (made.run_dir / "weights.safetensors").exists()


@pytest.mark.parametrize("clip", [0, 1])
def test_mixed_precision_with_and_without_clipping(plan, clip):
    row = execute(plan("trainer.precision=bf16-mixed", f"protocol.recipe.clip_norm={clip}"))
    assert row["test_clients"] > 0
