import io

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread

from iciia_exp.engine.terminal import setup_logging
from iciia_exp.results import drawing
from iciia_exp.results.drawing import legend, line_styles, new_figure, save, write_figure
from iciia_exp.results.plots import (
    accuracy_vs_history,
    accuracy_vs_overhead,
    draw_accuracy_vs_overhead,
    gain_per_client,
)
from iciia_exp.results.tables import history_summary


def row(**change):
    base = {
        "name": "x", "dataset": "digits", "backbone": "small_cnn", "method": "iciia", "groups": 4, "num_layers": 1,
        "accuracy": 0.9, "accuracy_low": 0.88, "accuracy_high": 0.93, "backbone_accuracy": 0.8,
        "backbone_accuracy_low": 0.75, "backbone_accuracy_high": 0.85, "client_gain": 0.1, "client_gain_low": 0.05,
        "client_gain_high": 0.15, "overhead_percent": 3.0, "sequence_macs": 300, "backbone_macs": 1e4, "task": "single-label", "cost_images": 16, "setting_digest": "a",
        "partition_digest": "p", "digest": "d",
    }  # fmt: skip
    return base | change


def drawn(path):
    """Whether the picture has something on it, in more than one colour."""
    pixels = imread(path)[..., :3].reshape(-1, 3)
    return len(np.unique((pixels * 32).astype(int), axis=0)) > 10


def test_names_of_others_are_text(tmp_path, capsys, recwarn, monkeypatch):
    setup_logging()
    monkeypatch.setattr(drawing, "_lacking", set())
    figure, axes = new_figure("$\\frac{$ a\x1b[2J 漢字")
    axes.plot([1, 1000], [1, 2], label="costs $5 or $6")
    axes.set_xscale("log")
    axes.legend()
    for ending in ("png", "svg"):
        save(figure, tmp_path / f"a.{ending}")
    assert not [w for w in recwarn if "Glyph" in str(w.message)]
    assert capsys.readouterr().out == "warning: plots: the font lacks 字 漢; a box takes their place\n"  # once
    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        write_figure(figure, out, format="svg")
    assert "costs $5 or $6" in out.getvalue()
    assert "\\x1b[2J" in out.getvalue()
    assert "$</tspan>" not in out.getvalue()  # ticks of powers are formulas
    assert "$</text>" not in out.getvalue()


@pytest.mark.parametrize("beside", [True, False])
def test_a_long_label_leaves_room_for_the_data(tmp_path, beside, recwarn):
    figure, axes = new_figure("a")
    axes.plot([1, 2], [1, 2], label=" ".join(f"setting_{number}=0.5" for number in range(30)))
    legend(axes, beside)
    save(figure, tmp_path / "a.png")
    assert not recwarn.list  # matplotlib warns of axes without a size
    assert axes.get_position().width > 0.5


def test_a_method_has_one_colour_in_all_figures():
    methods = ("backbone", "iciia", "lame", "prior_em", "t3a")
    every = dict(zip(methods, line_styles(methods, methods), strict=True))
    few = line_styles(["t3a", "iciia", "iciia", "lame"], methods)
    assert [few[0], few[1], few[3]] == [every["t3a"], every["iciia"], every["lame"]]
    assert few[2]["color"] == few[1]["color"]
    assert len({tuple(style.items()) for style in few}) == 4
    assert len({style["color"] for style in line_styles(["iciia"] * 3, methods)}) == 3


@pytest.mark.slow
@pytest.mark.parametrize("clients", [1, 29, 3000])
def test_gain_per_client(tmp_path, clients):
    rng = np.random.default_rng(0)
    images = np.full(clients, 16)
    frame = pd.DataFrame(
        {
            "decisions": images,
            "backbone_correct": rng.binomial(16, 0.7, clients),
            "method_correct": rng.binomial(16, 0.8, clients),
        }
    )
    assert drawn(gain_per_client(frame, row(), tmp_path / "a.png"))


@pytest.mark.parametrize("last", [3, 4])
def test_accuracy_vs_history(tmp_path, last):
    rng = np.random.default_rng(0)
    parts = []
    for name in ("stream", "prefix"):
        for n, clients in ((0, 4), (5, last), (-1, 4)):
            columns = {"protocol": name, "history": n, "client": [f"c{i}" for i in range(clients)], "targets": 16}
            correct = {f"{who}_correct": rng.integers(4, 16, clients) for who in ("backbone", "method")}
            correct["both_correct"] = np.minimum(correct["backbone_correct"], correct["method_correct"])
            losses = {f"{who}_loss": rng.random(clients) * 16 for who in ("backbone", "method")}
            parts.append(pd.DataFrame({**columns, "decisions": 16, **correct, **losses}))
    summary = history_summary(pd.concat(parts))
    assert drawn(accuracy_vs_history(summary, row(), tmp_path / "a.png"))


def test_the_title_says_what_the_bars_are():
    several = [row(digest=str(seed), partition_digest=str(seed), accuracy=0.9 + seed / 100) for seed in range(3)]
    one = row(method="lame", digest="one", setting_digest="b", groups=None)
    for rows, said in (
        (several, "\nbars: standard error over seeds"),
        ([one], "\nbars: 95 % interval over clients"),
        ([*several, one], "\nbars: standard error over seeds; of one run 95 % interval over clients"),
    ):
        assert draw_accuracy_vs_overhead(rows).axes[0].get_title(loc="left").endswith(said)


@pytest.mark.slow
@pytest.mark.parametrize(
    "rows",
    [
        [row()],
        [row(overhead_percent=0.0, method="linear_head", groups=None)],
        [row(method="backbone", groups=None, overhead_percent=0.0)],
        [row(overhead_percent=10.0**i, setting_digest=str(i), digest=str(i)) for i in range(-2, 4)],
        [row(accuracy=0.9 + s / 100, digest=str(s), partition_digest=str(s)) for s in range(3)],
        [row(method=f"m{i}", setting_digest=str(i), digest=str(i), bound=i == 0, groups=None) for i in range(12)],
    ],
    ids=["one", "free", "backbone", "many", "seeds", "methods"],
)
def test_accuracy_vs_overhead(tmp_path, rows):
    assert drawn(accuracy_vs_overhead(rows, tmp_path / "a.png"))
