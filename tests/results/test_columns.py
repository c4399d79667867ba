"""A figure is one line of the list of columns: tables, page, averages over seeds and wandb show it."""

from io import StringIO

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from iciia_exp.artifacts import write_json
from iciia_exp.engine.terminal import result_table
from iciia_exp.report import text
from iciia_exp.report.page import page
from iciia_exp.results.columns import COLUMNS, Column, averaged, cell, summary_keys
from iciia_exp.results.tables import settings
from tests.engine.test_terminal import ROW

P10 = Column("p10", "10th percentile", console="10th\npct", wandb="test", backbone=True)


@pytest.fixture
def rows(tmp_path):
    """Two seeds of a setting, and another setting, with the figure ``p10``."""
    found = []
    for i, (setting, p10) in enumerate((("s", 0.62), ("s", 0.64), ("t", 0.317))):
        row = ROW | {"digest": f"d{i}", "setting_digest": setting, "p10": p10, "backbone_p10": 0.559}
        row |= {"groups": 4 if setting == "s" else 16, "task": "single-label", "cost_images": 16, "backbone_macs": 1000}
        row |= {"test_clients": 9, "test_images": 144}
        write_json(tmp_path / f"{i}" / "results.json", row)
        found.append(row | {"run_dir": tmp_path / f"{i}"})
    return found


@pytest.fixture
def _p10():
    COLUMNS.insert(6, P10)
    yield
    COLUMNS.remove(P10)


@pytest.mark.usefixtures("_p10")
def test_a_new_column_is_in_every_table_on_the_page_and_in_wandb(rows):
    table = settings(rows)
    pair, single = table.iloc[0], table.iloc[1]
    assert pair["p10"] == pytest.approx(0.63)
    assert pair["p10_se"] == pytest.approx(np.std([0.62, 0.64], ddof=1) / 2**0.5)
    assert single["p10"] == 0.317
    assert pair["backbone_p10"] == pytest.approx(0.559)

    summary = text.summary(table)
    assert summary["10th percentile"].tolist() == ["55.9", "63.0 ± 1.0", "31.7"]
    head, _, base, first, second = text.markdown(summary).splitlines()
    place = [title.strip() for title in head.split("|")].index("10th percentile")
    assert [line.split("|")[place].strip() for line in (base, first, second)] == summary["10th percentile"].tolist()
    assert "10th percentile" in text.latex(summary, "x")
    assert r"63.0 $\pm$ 1.0" in text.latex(summary, "x")
    assert pd.read_csv(StringIO(text.csv(table)))["p10"].tolist() == [pytest.approx(0.63), 0.317]
    found = page([("x", table)])
    assert '"10th percentile"' in found
    assert '"31.7"' in found

    out = StringIO()
    Console(file=out, width=140).print(result_table(rows))
    lines = out.getvalue().splitlines()
    assert "10th" in lines[0]
    assert "pct" in lines[1]
    assert "55.9" in lines[2]
    assert any("63.0" in line for line in lines)  # averaged, without an error as it does not ask for one
    assert not any("± 1.0" in line for line in lines)

    assert {key: name for key, name in summary_keys().items() if "p10" in key} == {
        "test/p10": "p10",
        "backbone/p10": "backbone_p10",
    }


def test_a_run_without_the_figure_has_a_dash(rows):
    for row in rows[:2]:
        del row["worst_decile"]
    assert text.summary(settings(rows))["worst decile"].tolist() == ["40.0", "–", "50.0"]


def test_columns_are_told_apart():
    for attribute in ("key", "title", "console"):
        names = [value for column in COLUMNS if (value := getattr(column, attribute))]
        assert len(names) == len(set(names))
    assert len(averaged()) == len(set(averaged()))


@pytest.mark.parametrize(
    ("form", "value", "expected"),
    [
        *(("bytes", 0, "0 B"), ("bytes", 600.0, "600 B"), ("bytes", 61440, "60 KiB"), ("bytes", 1025024, "1001 KiB")),
        *(("bytes", 1.5 * 2**20, "1.5 MiB"), ("bytes", 3 * 2**31, "6.0 GiB"), ("bytes", 2**50, "1048576.0 GiB")),
        *(("macs", 0, "0"), ("macs", 704, "704"), ("macs", 41536, "41.5 K"), ("macs", 15.4e9, "15.4 G")),
        *(("cost", 0.0, "0"), ("cost", 0.0234, "0.023 %"), ("cost", 4.3, "4.3 %"), ("cost", 1132.2, "1,132 %")),
        *(
            ("number", 30227, "30,227"),
            ("number", 28180.0, "28,180"),
            ("nats", 0.694, "0.69"),
            ("gain", 0.127, "+12.7"),
            ("gain", -0.016, "-1.6"),
        ),
        *(("percent", 0.897, "89.7"), ("percent", None, "–"), ("bytes", np.nan, "–"), ("gain", -1e-4, "+0.0")),
    ],
)
def test_printed_forms(form, value, expected):
    assert cell(pd.Series({"x": value}), "x", form) == expected


def test_printed_errors():
    row = pd.Series({"x": 0.5, "x_se": 0.01, "x_low": 0.4, "x_high": 0.6})
    assert cell(row, "x") == "50.0 ± 1.0"
    assert cell(row, "x", "nats") == "0.50 ± 0.01"
    assert cell(row, "x", "gain", ("low", "high")) == "+50.0 [+40.0, +60.0]"
    assert cell(row, "x", errors=()) == "50.0"
    assert cell(pd.Series({"x": 0.5, "x_by_chance": 0.25}), "x", "harm") == "50.0 (25.0)"
