"""ICIIA for streams as a job: training clients of all kinds, calibration, histories, and a session on the run."""

import json

import numpy as np
import pandas as pd
import pytest
from torch import nn

from iciia_exp import ClientSession, Run
from iciia_exp.engine.evaluation import evaluate as evaluation
from iciia_exp.engine.stages import execute
from iciia_exp.errors import ConfigError, UserError
from iciia_exp.results.summary import ClientCounts

STREAM = ("method=iciia_stream", "protocol=streaming", "protocol.recipe.epochs=3", "num_layers=2", "groups=4")


def test_the_job_and_a_session_on_it(plan):
    made = plan(*STREAM, "client_mix=all_kinds", "protocol.history_orders=2", "method.perceptron=0")
    row = execute(made)
    record = json.loads((made.run_dir / "training.json").read_text())
    assert record["calibration"]["log_loss"] <= record["calibration"]["log_loss_before"]
    assert len(record["calibration"]["anchor"]) == len(record["calibration"]["history"]) > 4
    assert row["config.client_mix.homogeneous"] == 0.2
    assert row["streaming_macs"] < row["sequence_macs"] / 15

    table = pd.read_parquet(made.run_dir / "history.parquet")
    first = table[(table["protocol"] == "prefix") & (table["history"] == 0)]
    clients = pd.read_parquet(made.run_dir / "clients.parquet")
    # without a past: the backbone's answers, on every test image
    assert (first["method_hits"] == first["backbone_hits"]).all()
    assert first["targets"].sum() == clients["images"].sum()
    assert (first["backbone_hits"].to_numpy() == clients["backbone_hits"].to_numpy()).all()
    assert (made.run_dir / "plots" / "accuracy_vs_history.png").read_bytes()[:4] == b"\x89PNG"

    run = Run.load(made.run_dir)
    session = ClientSession(run, "someone", backbone=run.load_backbone())
    images = [made.dataset[i] for i in made.clients.test[0][:5]]
    served = [session.predict(image) for image in images]
    features = np.array(run.features.array()[made.clients.test[0][:5]])
    by_feature = ClientSession(run)
    for got, row_D in zip(served, features, strict=True):
        np.testing.assert_allclose(got, by_feature.predict(row_D), atol=1e-4)


def test_a_second_classifier_of_single_images(plan):
    made = plan(*STREAM, "method.perceptron=16")
    row = execute(made)
    record = json.loads((made.run_dir / "training.json").read_text())
    assert len(record["calibration"]["backbone_and_perceptron"]) == 2
    assert record["calibration"]["backbone_and_perceptron"] != [1.0, 0.0]
    plain = plan(*STREAM, "method.perceptron=0").method_class(nn.Linear(32, 10), 2, 4, 4)
    assert row["sequence_macs"] - plain.macs(16) == 16 * 16 * (32 + 10)


def test_the_training_clients_are_part_of_the_run(plan):
    natural, mixed = plan(*STREAM), plan(*STREAM, "client_mix=all_kinds")
    assert natural.run_digest != mixed.run_digest
    assert natural.run_digest == plan(*STREAM, "client_mix.most_classes=7").run_digest  # it draws no such clients
    assert plan("method=backbone").run_digest == plan("method=backbone", "client_mix=all_kinds").run_digest


def test_no_history_on_request(plan):
    made = plan("method=linear_head", "protocol.history_lengths=[]")
    execute(made)
    assert not (made.run_dir / "history.parquet").exists()


def test_a_multi_label_task_has_no_random_classes(plan, monkeypatch):
    made = plan(*STREAM, "client_mix=all_kinds")
    made.__dict__["labels"] = np.zeros((10, 3), dtype=np.uint8)
    with pytest.raises(ConfigError, match=r"client_mix.random_classes=0.2: needs one label per image"):
        execute(made)
    assert not made.cache_dir.exists()


def test_results_that_are_no_numbers_name_the_client(plan):
    clients = plan().clients
    numbers = np.flatnonzero(clients.test.lengths)[:3]
    loss = np.array([1.0, np.nan, 2.0])
    ones = np.ones(3, dtype=np.int64)
    for backbone, method, who in ((loss, ones, "features"), (ones, loss, "the method's answers")):
        counts = ClientCounts(ones, ones, ones, ones, backbone.astype(float), method.astype(float))
        with pytest.raises(UserError, match=rf"client {clients.ids[numbers[1]]}: {who} are not finite"):
            evaluation._require_numbers(clients, numbers, counts)


@pytest.mark.parametrize("key", ["history_lengths=[-1]", "history_longest=10", "history_orders=0", "train_images=0"])
def test_protocol_values_are_checked(plan, key):
    with pytest.raises(ConfigError, match=rf"protocol.{key.split('=')[0]}"):
        plan(f"protocol.{key}")
