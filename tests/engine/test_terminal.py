"""The printed table says the numbers of the rows, once per setting."""

from io import StringIO

import pytest
from rich.console import Console

from iciia_exp.engine.terminal import result_table
from iciia_exp.results.labels import base_of

ROW = {
    "name": "x", "task": "single-label", "dataset": "digits", "num_classes": 10, "backbone": "small_cnn", "method": "iciia",
    "epochs": 3, "groups": 4, "heads": 2, "num_layers": 1, "digest": "d0",
    "setting_digest": "s", "partition_digest": "p", "accuracy": 0.9, "gain": 0.1, "gain_low": 0.05, "gain_high": 0.15,
    "client_accuracy": 0.91, "worst_decile": 0.5, "harmed_share": 0.02, "harmed_share_by_chance": 0.03,
    "overhead_percent": 160.0, "sequence_macs": 1600, "per_image_overhead_percent": 10.0, "backbone_accuracy": 0.8,
    "backbone_client_accuracy": 0.81, "backbone_worst_decile": 0.4,
    "backbone_accuracy_low": 0.7, "backbone_accuracy_high": 0.85, "accuracy_low": 0.85, "accuracy_high": 0.95,
}  # fmt: skip


def lines(rows, width=120):
    out = StringIO()
    Console(file=out, width=width).print(result_table(rows))
    return [line.split() for line in out.getvalue().splitlines()]


def test_one_run():
    *_, base, line = lines([ROW])
    assert base == "small_cnn alone 80.0 81.0 40.0 0 0".split()  # noqa: SIM905
    assert line == "iciia N=1 H=2 G=4 90.0 +10.0 [+5.0, +15.0] 91.0 50.0 2.0 (3.0) 160 % 10 %".split()  # noqa: SIM905


def test_accuracy_of_clicks_is_auc():
    titles = " ".join(" ".join(line) for line in lines([ROW | {"task": "click"}]))
    assert "GAUC" in titles
    assert "mean" in titles
    assert "accuracy" not in titles


def test_seeds_are_averaged_and_a_run_counts_once():
    rows = [ROW | {"digest": f"d{i}", "partition_digest": f"p{i}", "accuracy": 0.9 + i / 100} for i in range(3)]
    *_, base, line = lines([*rows, rows[0]])
    assert base[2] == "3"
    assert line[4:8] == ["3", "91.0", "±", "0.6"]


def test_settings_are_sorted_by_cost():
    rows = [
        ROW | {"digest": str(c), "setting_digest": str(c), "overhead_percent": c, "sequence_macs": c}
        for c in (50.0, 2.0)
    ]
    *_, first, second = lines(rows)
    assert "2" in first
    assert "50" in second


@pytest.mark.parametrize("width", [80, 100])
def test_nothing_is_cut_off_in_a_narrow_terminal(width):
    text = " ".join(" ".join(line) for line in lines([ROW], width))
    assert "…" not in text
    for part in ("90.0", "+10.0", "(3.0)", "160"):
        assert part in text


def test_settings_that_differ_are_told_apart():
    rows = [
        ROW | {"digest": str(lr), "setting_digest": str(lr), "config.optimizer.lr": lr, "config.backbone.seed": lr}
        for lr in (0.1, 0.01)
    ]
    *_, first, second = lines(rows, 140)
    assert first[:5] == ["iciia", "N=1", "H=2", "G=4", "lr=0.1"]
    assert second[4] == "lr=0.01"


def test_other_clients_are_another_base_and_other_seeds_are_not():
    row = ROW | {"config.partition.classes_per_client": 2, "config.partition.seed": 0}
    assert base_of(row) == base_of(row | {"config.partition.seed": 1, "config.method.dropout": 0.3})
    assert base_of(row) != base_of(row | {"config.partition.classes_per_client": 3})
