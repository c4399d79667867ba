"""Published numbers beside ours, and sweeps over the partition, on rows made from a real one."""

import numpy as np
import pytest

from iciia_exp.artifacts import write_json
from iciia_exp.engine.execute import execute
from iciia_exp.report import figures
from iciia_exp.report import text as text_tables
from iciia_exp.report.__main__ import main
from iciia_exp.report.heterogeneity import draw_heterogeneity, partition_sweeps, sweep_table
from iciia_exp.results.plots import draw_accuracy_vs_overhead
from iciia_exp.results.published import published_number, published_numbers
from iciia_exp.results.tables import load_runs, settings

SWIN = {
    "dataset": "imagenet",
    "backbone": "swin_b",
    "num_classes": 1000,
    "method": "iciia",
    "num_layers": 3,
    "heads": 4,
    "groups": 256,
    "config.partition.train_chunk": 80,
    "config.partition.test_chunk": 16,
    "config.method.heads": 4,
}


def test_the_facts_are_whole():
    table = published_numbers()
    keys = ["dataset", "backbone", "method", "num_layers", "groups", "ratio"]
    assert not table.duplicated(keys).any()
    assert table["accuracy"].between(59, 93).all()
    assert set(table[table["method"] == "backbone"]["backbone"]) == {
        *("swin_b", "convnext_large", "resnet152", "mobilenetv3_large", "efficientnet_b4", "efficientnet_b7"),
        *("efficientnet_b0", "leaf_cnn", "c3d"),
    }
    sweep = table[table["table"] == "group sweep"]
    assert set(sweep["groups"]) >= {1, 2, 4, 8, 16, 32, 64, 128, 256, 1792}


@pytest.mark.parametrize(
    ("change", "accuracy"),
    [
        ({}, 88.86),
        ({"groups": 1}, 89.23),
        ({"method": "backbone"}, 83.58),
        ({"method": "prompt_tuning", "groups": None, "num_layers": None}, 87.00),
        ({"backbone": "efficientnet_b4", "groups": 1792, "num_layers": 1}, 84.56),
        ({"backbone": "efficientnet_b4", "groups": 1, "config.partition.ratio": 0.5}, 84.52),
        ({"groups": 2}, None),
        ({"num_layers": 2}, None),
        ({"num_classes": 10}, None),
        ({"dataset": "cifar10"}, None),
        ({"config.method.shuffle": False}, None),
        ({"config.method.attention": "causal"}, None),
        ({"config.method.heads": 8}, None),
        ({"method": "client_prior"}, None),
        ({"config.partition.ratio": 0.4}, None),
        ({"config.partition.train_chunk": 8}, None),
        ({"config.partition.test_chunk": 4}, None),
        ({"config.partition.train_images": 5}, None),
        ({"images": 8}, None),
        (
            {
                "backbone": "efficientnet_b4",
                "groups": 1,
                "config.partition.ratio": 0.5,
                "config.partition.of": "clients",
            },
            None,
        ),
    ],
)
def test_which_run_is_which_row(change, accuracy):
    found = published_number(SWIN | change)
    assert (found is None) == (accuracy is None)
    if found is not None:
        assert found["accuracy"] == pytest.approx(accuracy, abs=0.006)
        assert found["clients"] == 3161


def test_other_clients_are_no_published_row():
    row = {k: v for k, v in SWIN.items() if "partition" not in k}
    assert published_number(row | {"config.partition.alpha": 0.1}) is None
    users = {"dataset": "femnist", "backbone": "leaf_cnn", "num_classes": 62, "num_layers": 1}
    assert published_number(row | users | {"config.partition.min_images": 1})["accuracy"] == pytest.approx(91.375)
    assert published_number(row | users | {"config.partition.alpha": 0.1}) is None


@pytest.fixture
def rows(stages):
    """Rows of one real run as if it were another: a group sweep with two seeds of Swin-B on ImageNet."""
    small = stages("method=backbone", "evaluation.history_lengths=[]")
    execute(small, brief=True)
    row = load_runs([small.run.folder])[0] | {"epochs": 1}
    row = {k: v for k, v in row.items() if not k.startswith("config.partition.")}
    made = []
    for groups in (1, 16, 256):
        for seed in (0, 1):
            name = f"{groups}-{seed}"
            new = SWIN | {"groups": groups, "seed": seed, "digest": name, "setting_digest": str(groups)}
            made.append(
                row
                | new
                | {
                    "accuracy": 0.88 + 0.01 * seed,
                    "accuracy_low": 0,
                    "accuracy_high": 1,
                    "config.method.groups": groups,
                }
            )
    return made


def test_published_numbers_stand_beside_ours(rows):
    table = text_tables.summary(settings(rows))
    published = dict(zip(table["method"].str.rstrip(" *"), table["published"], strict=True))
    assert published == {
        "swin_b alone": "83.6",
        "iciia N=3 H=4 G=1": "89.2 ± 0.1",
        "iciia N=3 H=4 G=16": "–",
        "iciia N=3 H=4 G=256": "88.9 ± 0.0",
    }
    axes = draw_accuracy_vs_overhead(rows).axes[0]
    hollow = sorted(line.get_ydata()[0] for line in axes.lines if line.get_fillstyle() == "none")
    assert hollow == pytest.approx([88.856, 89.227])
    labels = [text.get_text() for text in figures.by_groups(settings(rows), "t").axes[0].get_legend().get_texts()]
    assert "iciia N=3, published" in labels


def test_without_published_rows_there_is_no_column(rows):
    ours = [row | {"dataset": "mine"} for row in rows]
    assert "published" not in text_tables.summary(settings(ours)).columns


@pytest.mark.slow
def test_a_sweep_over_the_partition(rows, tmp_path, capsys):
    made = []
    for ratio in (0, 0.5, 1):
        for row in rows[:2]:
            new = {"config.partition.ratio": ratio, "accuracy": row["accuracy"] - 0.1 * ratio, "gain": 0.05}
            new |= {"evaluation_digest": f"{row['digest']}-{ratio}"}
            new |= {"digest": f"{row['digest']}-{ratio}", "setting_digest": f"{row['setting_digest']}-{ratio}"}
            made.append(row | new)
    made.append(rows[-1] | {"evaluation_digest": "none"})  # of no ratio
    (sweep,) = partition_sweeps(made)
    assert sweep.key == "ratio"
    assert len(sweep.table) == 3
    text = sweep_table(sweep)
    assert text.columns.tolist() == ["partition.ratio", "0", "0.5", "1"]
    assert text.iloc[1].tolist() == ["iciia N=3 H=4 G=1", *(f"{a:.1f} ± 0.5 (+5.0)" for a in (88.5, 83.5, 78.5))]
    line = draw_heterogeneity(sweep).axes[0].lines[0]
    assert line.get_xdata().tolist() == [0, 0.5, 1]
    assert np.allclose(line.get_ydata(), 100 * rows[0]["backbone_accuracy"])
    for row in made:
        folder = tmp_path / "runs" / row["digest"]
        folder.mkdir(parents=True)
        write_json(folder / "results.json", {k: v for k, v in row.items() if k != "run_dir"})
    assert main([str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--html", str(tmp_path / "a.html")]) == 0
    assert "accuracy by partition.ratio" in capsys.readouterr().out
    for ending in ("md", "pdf", "png"):
        assert (tmp_path / "out" / f"0-heterogeneity.{ending}").stat().st_size > 100
    assert "accuracy by partition.ratio" in (tmp_path / "a.html").read_text()


def test_one_partition_is_no_sweep(rows):
    assert partition_sweeps(rows) == []
