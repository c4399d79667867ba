"""A classifier fitted on the features: which images it sees, what is shared, what methods see of it."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest

from iciia_exp.data.store import FeatureStore
from iciia_exp.engine.execute import execute
from iciia_exp.engine.training import extract as features
from iciia_exp.engine.training import fit
from iciia_exp.engine.training.train_backbone import out_of_fold
from iciia_exp.errors import UserError
from iciia_exp.models import linear_probe
from tests.making.extraction import HEAD, ROLES
from tests.making.folder import write_table

pytestmark = pytest.mark.usefixtures("undrawn")


def test_the_classifier_never_sees_val_or_test_images(folder, monkeypatch):
    seen = []
    original = linear_probe.fit_linear_head

    def look(x_MD, labels, *rest):
        seen.append(x_MD.copy())
        return original(x_MD, labels, *rest)

    monkeypatch.setattr(linear_probe, "fit_linear_head", look)
    stages = folder(*HEAD)
    execute(stages)
    (x_MD,) = seen
    train = (stages.table["split"] == "train").to_numpy()
    assert np.array_equal(stages.backbone_rows, np.flatnonzero(train))
    assert np.array_equal(x_MD, FeatureStore.open(stages.features.folder).array()[train])
    manifest = json.loads((stages.head.folder / "manifest.json").read_text())
    assert manifest["images"] == 27
    assert set(manifest["accuracy"]) == {"fitted", *ROLES}


WITHIN = ("partition.split=within", "partition.seed=${seed}")


def test_partitions_share_features_and_not_classifiers(folder, monkeypatch):
    one, other = folder(*HEAD, *WITHIN), folder(*HEAD, *WITHIN, "seed=1")
    assert one.features.folder == other.features.folder
    assert one.head.folder != other.head.folder
    execute(one)
    monkeypatch.setattr(features, "extract", lambda *_, **__: 1 / 0)
    execute(other)
    assert set(one.backbone_rows) != set(other.backbone_rows)
    for stages in (one, other):
        assert not set(stages.backbone_rows) & {*stages.clients.test.values, *stages.clients.val.values}


@pytest.mark.slow
def test_the_stages_of_a_fitted_classifier(folder, monkeypatch):
    with pytest.raises(UserError, match="stage=evaluate: needs the features stage first"):
        execute(folder(*HEAD, "stage=evaluate"))
    assert execute(folder(*HEAD, "stage=features")) is None
    assert not folder(*HEAD).head.folder.exists()
    for stage in ("train", "evaluate"):
        with pytest.raises(UserError, match=f"stage={stage}: needs the backbone stage first .*backbones/"):
            execute(folder(*HEAD, f"stage={stage}"))
    shutil.rmtree(folder(*HEAD).features.folder)
    assert execute(folder(*HEAD, "stage=backbone")) is None  # extracts, and fits
    assert folder(*HEAD).features.folder.exists()
    with pytest.raises(UserError, match="stage=evaluate: needs the train stage first"):
        execute(folder(*HEAD, "stage=evaluate"))
    row = execute(folder(*HEAD))
    # without the classifier's folder, it alone is made again
    shutil.rmtree(folder(*HEAD).head.folder)
    shutil.rmtree(folder(*HEAD).run.folder)
    monkeypatch.setattr(features, "extract", lambda *_, **__: 1 / 0)
    again = execute(folder(*HEAD))
    assert {k: v for k, v in again.items() if not k.startswith("seconds") and k != "finished"} == {
        k: v for k, v in row.items() if not k.startswith("seconds") and k != "finished"
    }


@pytest.mark.parametrize("train", ["all", "head"])
def test_reserved_images_are_the_backbones_alone(root, folder, train):
    paths = pd.read_csv(root / "images.csv")["path"]
    write_table(root / "images.csv", path=paths)  # without owners
    options = ("backbone.reserve=0.3", "partition=classes_per_client", "partition.images_per_client=4")
    stages = folder(*(HEAD if train == "head" else ()), *options)
    own = set(stages.backbone_rows)
    assert len(own) == 9  # a third of 9 of each class, rounded
    assert not own & {i for role in ROLES for i in stages.clients[role].values}
    row = execute(stages)
    trained = stages.head or stages.backbone
    assert json.loads((trained.folder / "manifest.json").read_text())["images"] == 9
    assert row["test_images"] > 0


@pytest.mark.slow
def test_methods_are_trained_on_logits_as_of_new_images(folder, monkeypatch):
    made, original = [], fit.fit
    monkeypatch.setattr(
        fit, "fit", lambda module, data, **options: made.append(data) or original(module, data, **options)
    )
    stages = folder(*HEAD, "method=iciia_stream", "client_mix=all_types")
    execute(stages)
    logits, numbers = out_of_fold(stages)
    assert set(numbers) == set(stages.clients.train.values)
    assert logits.shape == (len(numbers), stages.num_classes)
    *_, data = made  # after the perceptron's
    (batch, *_) = data.train_dataloader()
    assert batch.backbone_CSK.shape == (*batch.mask_CS.shape, stages.num_classes)
    (batch, *_) = data.val_dataloader()
    assert batch.backbone_CSK is None
