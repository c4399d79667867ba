import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torchmetrics.functional.classification import binary_calibration_error

from iciia_exp.data.batches import ClientBatch
from iciia_exp.engine.training.modules import MethodModule
from iciia_exp.methods.adapt.heads import BackboneOnly
from iciia_exp.methods.base import Facts
from iciia_exp.results.calibration import BINS, calibration_table, pooled, reliability_diagram
from tests.results.test_plots import drawn, row


def decisions(seed, count=400):
    rng = np.random.default_rng(seed)
    confidence = rng.beta(5, 2, count).astype(np.float32)
    return confidence, (rng.random(count) < confidence**2).astype(np.float32)


def test_sure_decisions_are_in_the_last_bin_of_both():
    """Half of the decisions have a confidence of 1 and are right in 9 of 10 cases, half have 0.94 and are right."""
    head = nn.Linear(2, 2)
    with torch.no_grad():
        head.weight.copy_(torch.eye(2)), head.bias.zero_()
    sure = torch.arange(100) < 50
    x_CSD = torch.stack([torch.where(sure, 60.0, math.log(0.94 / 0.06)), torch.zeros(100)], -1)[None]
    y_CS = (sure & (torch.arange(100) % 10 == 0)).long()[None]
    module = MethodModule(BackboneOnly(Facts.of(head)), head, None, 1)
    batch = ClientBatch(x_CSD, y_CS, torch.ones(1, 100, dtype=torch.bool), torch.zeros(1, dtype=torch.int64))
    module.test_step(batch, 0)
    table = calibration_table(module.confidences()).set_index("who").loc["method"]
    assert table["decisions"] == 100
    assert module.calibration_errors()["ece"] == pytest.approx(abs(table["confidence"] - table["accuracy"]), abs=1e-6)


def test_the_mean_distance_is_the_expected_calibration_error():
    confidence, right = decisions(0)
    table = calibration_table({"method": (confidence, right), "backbone": (right, right)}).set_index("who")
    own = table.loc["method"]
    assert own["decisions"].sum() == 400
    distance = ((own["confidence"] - own["accuracy"]).abs() * own["decisions"]).sum() / 400
    want = binary_calibration_error(torch.from_numpy(confidence), torch.from_numpy(right).long(), BINS)
    assert distance == pytest.approx(float(want), abs=1e-6)
    alone = table.loc["backbone"]  # a confidence of 1 is in the last bin
    assert alone["bin"].tolist() == [0, BINS - 1]
    assert (alone["confidence"] == alone["accuracy"]).all()


def test_several_runs_together_are_one_run_of_all_decisions():
    runs = [decisions(seed, 100 * (seed + 1)) for seed in range(3)]
    tables = [calibration_table({"method": run, "backbone": run}) for run in runs]
    both = tuple(np.concatenate(parts) for parts in zip(*runs, strict=True))
    want = calibration_table({"method": both, "backbone": both})
    got = pooled(tables)[list(want.columns)]
    keys = ["who", "bin"]
    pd.testing.assert_frame_equal(
        got.sort_values(keys, ignore_index=True), want.sort_values(keys, ignore_index=True), check_dtype=False
    )


def test_the_diagram_is_drawn(tmp_path):
    table = calibration_table({"method": decisions(0), "backbone": decisions(1)})
    assert drawn(reliability_diagram(table, row(ece=0.1, backbone_ece=0.2), tmp_path / "a.png"))
