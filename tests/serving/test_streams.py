"""ICIIA for streams as a job: training clients of all types, calibration, histories, and a session on the run."""

import json
from functools import partial

import numpy as np
import pandas as pd
import pytest
from torch import nn

from iciia_exp import ClientSession, Run
from iciia_exp.engine.evaluation import evaluate as evaluation
from iciia_exp.engine.execute import execute
from iciia_exp.errors import ConfigError, UserError
from iciia_exp.methods.adapt.image_classifier import ImageClassifier
from iciia_exp.methods.adapt.stream_encoder import StreamEncoder
from iciia_exp.methods.base import Facts
from iciia_exp.results.summary import ClientCounts

pytestmark = pytest.mark.usefixtures("undrawn")

STREAM = ("method=iciia_stream", "training=streaming", "training.recipe.epochs=3", "num_layers=2", "groups=4")


def test_the_job_and_a_session_on_it(stages):
    made = stages(*STREAM, "client_mix=all_types", "evaluation.history_orders=2", "method.image.perceptron=0")
    row = execute(made)
    record = json.loads((made.run.folder / "training.json").read_text())
    assert record["calibration"]["log_loss"] <= record["calibration"]["log_loss_before"]
    assert len(record["calibration"]["anchor"]) == len(record["calibration"]["history"]) > 4
    assert row["config.client_mix.homogeneous"] == 0.2
    assert row["streaming_macs"] < row["sequence_macs"] / 15

    table = pd.read_parquet(made.evaluation.folder / "history.parquet")
    first = table[(table["protocol"] == "prefix") & (table["history"] == 0)]
    clients = pd.read_parquet(made.evaluation.folder / "clients.parquet")
    # without a past: the backbone's answers, on every test image
    assert (first["method_correct"] == first["backbone_correct"]).all()
    assert first["targets"].sum() == clients["images"].sum()
    assert (first["backbone_correct"].to_numpy() == clients["backbone_correct"].to_numpy()).all()
    assert (made.evaluation.folder / "plots" / "accuracy_vs_history.png").read_bytes()[:4] == b"\x89PNG"

    run = Run.load(made.run.folder)
    session = ClientSession(run, "someone", backbone=run.load_backbone())
    images = [made.experiment.dataset[i] for i in made.clients.test[0][:5]]
    served = [session.predict(image) for image in images]
    features = np.array(run.features.array()[made.clients.test[0][:5]])
    by_feature = ClientSession(run)
    for got, row_D in zip(served, features, strict=True):
        np.testing.assert_allclose(got, by_feature.predict(row_D), atol=1e-4)


def test_a_second_classifier_of_single_images(stages):
    made = stages(*STREAM, "method.image.perceptron=16")
    row = execute(made)
    record = json.loads((made.run.folder / "training.json").read_text())
    assert len(record["calibration"]["backbone_and_perceptron"]) == 2
    assert record["calibration"]["backbone_and_perceptron"] != [1.0, 0.0]
    plain = stages(*STREAM, "method.image.perceptron=0").experiment.method_class(
        Facts.of(nn.Linear(32, 10)),
        partial(StreamEncoder, num_layers=2, heads=4, groups=4),
        image=partial(ImageClassifier, perceptron=0),
    )
    assert row["sequence_macs"] - plain.macs(16) == 16 * 16 * (32 + 10)


def test_the_training_clients_are_part_of_the_run(stages):
    natural, mixed = stages(*STREAM), stages(*STREAM, "client_mix=all_types")
    assert natural.run.digest != mixed.run.digest
    assert natural.run.digest == stages(*STREAM, "client_mix.most_classes=7").run.digest  # it draws no such clients
    assert stages("method=backbone").run.digest == stages("method=backbone", "client_mix=all_types").run.digest


def test_no_history_on_request(stages):
    made = stages("method=linear_head", "evaluation.history_lengths=[]")
    execute(made)
    assert not (made.evaluation.folder / "history.parquet").exists()


def test_a_multi_label_task_has_no_random_classes(stages, monkeypatch):
    made = stages(*STREAM, "client_mix=all_types")
    made.__dict__["labels"] = np.zeros((10, 3), dtype=np.uint8)
    with pytest.raises(ConfigError, match=r"client_mix.random_classes=0.2: needs one label per image"):
        execute(made)
    assert not made.experiment.cache_dir.exists()


def test_results_that_are_no_numbers_name_the_client(stages):
    clients = stages().clients
    numbers = np.flatnonzero(clients.test.lengths)[:3]
    loss = np.array([1.0, np.nan, 2.0])
    ones = np.ones(3, dtype=np.int64)
    for backbone, method, who in ((loss, ones, "features"), (ones, loss, "the method's logits")):
        counts = ClientCounts(ones, ones, ones, ones, backbone.astype(float), method.astype(float))
        with pytest.raises(UserError, match=rf"client {clients.ids[numbers[1]]}: {who} are not finite"):
            evaluation._require_finite(clients, numbers, counts)


@pytest.mark.parametrize(
    "key",
    [
        *("evaluation.history_lengths=[-1]", "evaluation.history_longest=10", "evaluation.history_orders=0"),
        *("training.train_images=0", "training.images=0", "evaluation.examples=-1"),
    ],
)
def test_settings_are_checked(stages, key):
    with pytest.raises(ConfigError, match=rf"^{key.split('=')[0]}"):
        stages(key)
