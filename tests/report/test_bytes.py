"""Accuracy against bytes: which settings are drawn, and which are best at their bytes."""

import pandas as pd

from iciia_exp.report.figures import by_bytes


def table(**columns):
    rows = {
        "method": ["backbone", "linear_probe", "miet", "miet", "last", "oracle_classes"],
        "label": ["backbone", "linear_probe", "miet int8", "miet", "last", "oracle_classes"],
        "accuracy": [0.2, 0.5, 0.61, 0.6, 0.7, 0.9],
        "accuracy_se": 0.01,
        "task": "single-label",
        "published": None,
        "oracle": [False] * 5 + [True],
        "request_up_bytes": 100.0,
        "request_down_bytes": [0.0, 10.0, 500.0, 1000.0, 9000.0, 0.0],
    }
    return pd.DataFrame(rows | columns)


def test_settings_that_none_beats_with_as_few_bytes_are_joined():
    axes = by_bytes(table(), "digits").axes[0]
    (front,) = [line for line in axes.lines if line.get_label() == "best at its bytes"]
    assert front.get_xdata().tolist() == [110, 600, 9100]
    assert [text.get_text() for text in axes.texts] == ["last", "miet int8", "linear_probe"]
    heights = [text.get_window_extent().y1 for text in axes.texts]
    assert heights == sorted(heights, reverse=True), "one below the other"
    assert axes.get_xscale() == "log"
    drawn = set(axes.get_legend_handles_labels()[1])
    assert drawn == {"linear_probe", "miet", "last", "best at its bytes"}


def test_what_sends_nothing_is_drawn_at_zero():
    on_device = table(request_up_bytes=0.0, request_down_bytes=[0.0, 0.0, 500.0, 1000.0, 9000.0, 0.0])
    assert by_bytes(on_device, "digits").axes[0].get_xscale() == "symlog"


def test_without_a_difference_there_is_no_figure():
    assert by_bytes(table(request_down_bytes=7.0), "digits") is None
    assert by_bytes(table(request_down_bytes=float("nan")), "digits") is None
