import numpy as np
import pandas as pd
import pytest
import torch
from torchmetrics.functional.classification import binary_calibration_error

from iciia_exp.results.calibration import BINS, calibration_table, pooled, reliability_diagram
from tests.results.test_plots import drawn, row


def decisions(seed, count=400):
    rng = np.random.default_rng(seed)
    confidence = rng.beta(5, 2, count).astype(np.float32)
    return confidence, (rng.random(count) < confidence**2).astype(np.float32)


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
