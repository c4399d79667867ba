"""Arrays beside the features: one pass, one store, for the methods that read them."""

import os

import numpy as np
import pytest
import torch

from iciia_exp import Run
from iciia_exp.artifacts import load_tensors, partial_folder, read_json, write_json
from iciia_exp.checksums import CHECKSUMS
from iciia_exp.config.experiment import Experiment
from iciia_exp.data.store import FeatureStore, FeatureWriter
from iciia_exp.engine.execute import execute
from iciia_exp.engine.stages import Stages
from iciia_exp.engine.terminal import setup_logging
from iciia_exp.engine.training.train_backbone import load_backbone
from iciia_exp.errors import ConfigError, UserError
from tests.making.arrays import TRAINED, VIT, StoredLogits, TokenMean, hooked_tokens
from tests.making.damage import unchecked
from tests.making.extraction import HEAD, artifacts_in, damage
from tests.making.kill import killed_while_writing

TOKENS = "method._target_=tests.making.arrays.TokenMean"
ALL = "method._target_=tests.making.arrays.StoredLogits"
NAMES = ("features", "logits", "tokens")

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture
def vit(compose, root):
    """Make the stages of an experiment with a small vision transformer on the folder of images."""
    setup_logging()

    def make(*overrides):
        return Stages(Experiment.from_config(compose(*VIT, f"data_dir='{root}'", *overrides)))

    return make


def made(stages):
    """Make features alone and return their store."""
    execute(stages("stage=backbone"))
    execute(stages("stage=features"))
    return FeatureStore.open(stages().features.folder)


def test_one_pass_gives_what_each_would_alone(vit, capsys):
    features = made(lambda *more: vit(*TRAINED, *more))
    assert "81 images x 48 float32, " in capsys.readouterr().out
    stages = vit(*TRAINED, ALL)
    store = made(lambda *more: vit(*TRAINED, ALL, *more))
    assert "81 images x 48 float32 and logits 3 float32 and tokens 17 x 48 float16, " in capsys.readouterr().out
    assert features.path != store.path
    assert list(features.manifest["arrays"]) == ["features"]
    assert store.manifest["arrays"] == {
        "features": {"shape": [81, 48], "dtype": "float32"},
        "logits": {"shape": [81, 3], "dtype": "float32"},
        "tokens": {"shape": [81, 17, 48], "dtype": "float16"},
    }
    assert np.array_equal(store.array(), features.array())  # bit for bit
    head = load_tensors(store.path / "head.safetensors")
    logits = torch.nn.functional.linear(torch.from_numpy(store.array().copy()), head["weight"], head["bias"])
    torch.testing.assert_close(torch.from_numpy(store.array("logits").copy()), logits)
    backbone = load_backbone(stages)[0].eval()
    dataset = stages.experiment.dataset
    images = torch.stack([backbone.transform(dataset[i]) for i in range(81)])
    tokens = torch.from_numpy(store.array("tokens").copy()).float()
    torch.testing.assert_close(tokens, hooked_tokens(backbone, images), rtol=1e-3, atol=1e-4)  # of float16
    with pytest.raises(UserError, match=r"has no array tokens, only features; a method with tokens in its `reads`"):
        features.array("tokens")


@pytest.mark.slow
@pytest.mark.parametrize("train", [TRAINED, HEAD], ids=["all", "head"])
def test_a_method_that_reads_tokens_runs_from_images_to_results(vit, root, train, tmp_path):
    stages = vit(*train, TOKENS, "training.recipe.epochs=20", "optimizer.lr=0.05")
    row = execute(stages)
    assert row["accuracy"] > 0.8
    assert (row["method"], row["test_clients"], row["test_images"]) == ("token_mean", 3, 27)
    run = Run.load(stages.run.folder, plugins=[TokenMean])
    assert run.method.tokens == 17
    assert run.info["arrays"] == {"tokens": [17, 48]}
    # the evaluation counted this method's decisions on these tokens
    tokens, right = torch.from_numpy(run.features.array("tokens").copy()).float(), 0
    for i in range(len(run.partition)):
        rows = run.partition.test[i].copy()
        logits = run.method.head(run.method.norm(tokens[rows].mean(1)))
        right += int((logits.argmax(-1).numpy() == stages.labels[rows]).sum())
    assert run.clients["method_correct"].sum() == right
    root.rename(tmp_path / "away")  # a stored array is enough
    again = vit(*train, TOKENS, "training.recipe.epochs=1")
    assert execute(again)["test_images"] == 27
    unchecked(stages.run.folder)
    for value in ({"tokens": [17, -1]}, {"tokens": 17}, ["tokens"]):
        write_json(stages.run.folder / "run.json", run.info | {"arrays": value})
        with pytest.raises(UserError, match=r"run\.json: arrays: expected lists of whole numbers"):
            Run.load(stages.run.folder, plugins=[TokenMean])


def test_stored_logits_are_the_backbones_own(vit):
    stages = vit(*TRAINED, ALL)
    row = execute(stages)
    assert row["gain"] == 0
    assert row["accuracy"] == row["backbone_accuracy"]
    assert type(Run.load(stages.run.folder, plugins=[StoredLogits]).method) is StoredLogits


def test_features_alone_are_written_as_before(vit):
    stages = vit(*HEAD)
    row = execute(stages)
    assert row["method"] == "backbone"
    assert "arrays" not in read_json(stages.run.folder / "run.json")
    assert sorted(os.listdir(stages.features.folder)) == [CHECKSUMS, "features.npy", "images.parquet", "manifest.json"]


def test_what_a_method_reads_makes_a_store_of_its_own(stages, monkeypatch):
    plain = stages(*HEAD)
    assert plain.features.digest == "cdbccaf74630"  # from before a store could have several arrays
    assert plain.head.digest == "325cc7ae6aab"

    def reading(*names):
        monkeypatch.setattr(plain.experiment.method_class, "reads", frozenset(names))
        return stages(*HEAD).features.digest

    assert reading("features") == reading() == plain.features.digest
    assert reading("tokens") == reading("features", "tokens") != plain.features.digest
    assert reading("tokens", "logits") not in (reading("tokens"), plain.features.digest)
    before = stages().backbone.digest
    reading("tokens")
    assert stages().backbone.digest == before


# ---- refused before any work


def test_a_backbone_without_the_array_is_refused_before_any_work(folder, tmp_path):
    with pytest.raises(ConfigError) as error:
        execute(folder("method=backbone", TOKENS))
    message = (
        "method=token_mean: cannot work with backbone small_cnn: SmallCNN gives features, images and logits, not tokens"
    )
    assert str(error.value) == f"{message}; choose a backbone that gives what it reads"
    assert not artifacts_in(tmp_path / "cache")


def test_logits_of_a_classifier_that_is_fitted_later_are_refused_before_any_work(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"^method=stored_logits: reads logits, but with backbone\.train=head the cl"):
        execute(folder("method=backbone", ALL, *HEAD))
    assert not artifacts_in(tmp_path / "cache")


# ---- interrupted, and several processes


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_extraction_ends_with_the_same_arrays(vit, root, monkeypatch, tmp_path, workers):
    damage(root)
    options = (*TRAINED, ALL, f"features.num_workers={workers}")
    want = made(lambda *more: vit(*options, f"cache_dir={tmp_path}/whole", *more))
    with killed_while_writing(monkeypatch):
        made(lambda *more: vit(*options, *more))
    assert 0 < len(FeatureWriter.remaining(partial_folder(vit(*options).features.folder))) < 81
    got = made(lambda *more: vit(*options, *more))
    assert all(np.array_equal(got.array(name), want.array(name)) for name in NAMES)
    assert np.flatnonzero(got.bad).size == 3
    assert not any(got.array(name)[got.bad].any() for name in NAMES)


@pytest.mark.slow
def test_two_devices_give_the_arrays_of_one(vit, root, tmp_path, monkeypatch, capfd):
    damage(root)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of the processes; sums over more threads have another order
    options, threads = (*HEAD, TOKENS, "stage=features"), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole = vit(*options, f"cache_dir={tmp_path}/whole")
        execute(whole)
        capfd.readouterr()
        execute(vit(*options, "features.devices=2"))
    finally:
        torch.set_num_threads(threads)
    out, err = capfd.readouterr()
    assert err == ""
    assert out.count("81 images x 48 float32 and tokens 17 x 48 float16") == 1
    assert out.count("3 of 81 images could not be read") == 1
    got, want = (FeatureStore.open(stages.features.folder) for stages in (vit(*options), whole))
    assert all(np.array_equal(got.array(name), want.array(name)) for name in ("features", "tokens"))
    assert np.array_equal(got.bad, want.bad)
    assert got.manifest["bad_images"] == want.manifest["bad_images"]
