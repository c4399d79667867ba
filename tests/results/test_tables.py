"""Tables of settings: the backbone's line."""

import pandas as pd
import pytest

from iciia_exp.engine.terminal import result_table
from iciia_exp.report import figures, text
from iciia_exp.results.plots import draw_accuracy_vs_overhead
from iciia_exp.results.tables import settings
from tests.engine.test_terminal import ROW, lines


def test_the_backbone_is_the_mean_over_backbones_whatever_their_number_of_runs(tmp_path):
    # three settings with backbone p, one of them also with backbone q
    rows, lengths = [], {"protocol": "stream", "history": 0, "decisions": 1.0, "client": "a"}
    runs = (("a", "p", 0.6), ("b", "p", 0.6), ("c", "p", 0.6), ("a", "q", 0.5))
    for i, (setting, backbone, accuracy) in enumerate(runs):
        (folder := tmp_path / str(i)).mkdir()
        row = ROW | {"digest": str(i), "setting_digest": setting, "partition_digest": backbone, "run_dir": folder}
        row |= {"backbone_accuracy": accuracy, "groups": "abc".index(setting) + 1, "task": "single-label"}
        rows.append(row | {"cost_images": 16, "backbone_macs": 9, "test_clients": 1, "test_images": 1})
        correct = {"backbone_correct": accuracy, "method_correct": accuracy, "backbone_loss": 1.0, "method_loss": 1.0}
        pd.DataFrame([lengths | correct]).to_parquet(folder / "history.parquet")
    table = settings(rows)
    # every table and figure shows the mean of p and q, 55 %; the mean over settings would be 58.3 %, that over runs 57.5 %
    assert text.summary(table)["accuracy"].iloc[0] == "55.0 ± 5.0"
    assert text.summary(table)["runs"].iloc[0] == "2"
    assert text.by_history(table).iloc[0, 1] == "55.0 ± 5.0"
    for draw in (figures.by_groups(table, "t"), draw_accuracy_vs_overhead(rows)):
        shown = [label.get_text() for label in draw.axes[0].get_legend().get_texts()]
        assert any("alone: 55.0 %" in label for label in shown)
    drawn = figures.by_history(table, "t").axes[0].get_lines()
    assert [line.get_ydata()[0] for line in drawn if "alone" in str(line.get_label())] == [pytest.approx(55.0)]
    (base,) = (line for line in lines(rows) if line[1:2] == ["alone"])
    assert base[2:6] == ["2", "55.0", "±", "5.0"]
    said = "Gains are over the backbone in the same runs, whose accuracy is 55.0 to 60.0 %."
    assert said in text.note(table)
    assert said in str(result_table(rows).caption)
    assert said not in text.note(settings(rows[:3]))
    assert result_table(rows[:3]).caption is None
