"""Calibration: accuracy of the decisions of a confidence, of method and backbone.

A reliability diagram (DeGroot and Fienberg 1983; Guo, Pleiss, Sun and Weinberger 2017). The mean distance between the
two, weighted by the decisions of each bin, is the expected calibration error, ``ece`` of ``results.json``.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from iciia_exp.results.drawing import BLUE, DARK, legend, new_figure, save

__all__ = ["BINS", "calibration_table", "draw_reliability", "pooled", "reliability_diagram"]

#: Bins of confidence, all of one width.
BINS = 15


def calibration_table(confidences: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> pd.DataFrame:
    """Return ``decisions``, their mean ``confidence`` and ``accuracy`` by ``who`` and ``bin``; empty bins left out.

    Args:
        confidences: of ``method`` and ``backbone``: confidence of every decision, from 0 to 1, and whether it is right.
    """
    parts = []
    for who, (confidence, right) in confidences.items():
        number = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
        frame = pd.DataFrame({"bin": number, "confidence": confidence.astype(float), "accuracy": right.astype(float)})
        found = frame.groupby("bin").agg({"confidence": "mean", "accuracy": "mean"})
        found.insert(0, "decisions", frame.groupby("bin").size())
        parts.append(found.reset_index().assign(who=who))
    return pd.concat(parts, ignore_index=True)


def pooled(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Return the table of several runs together."""
    every = pd.concat(tables)
    keys = ["who", "bin"]
    sums = (
        every[["confidence", "accuracy"]]
        .mul(every["decisions"], axis=0)
        .assign(decisions=every["decisions"], who=every["who"], bin=every["bin"])
        .groupby(keys, as_index=False)
        .sum()
    )
    sums[["confidence", "accuracy"]] = sums[["confidence", "accuracy"]].div(sums["decisions"], axis=0)
    return sums


def draw_reliability(axes: Any, confidence: Any, accuracy: Any, share: Any, label: str, style: dict[str, str]) -> None:
    """Draw a curve of bins, in percent: points as large as their share; ``style`` has color and marker."""
    x, y = 100 * confidence, 100 * accuracy
    axes.plot(x, y, linewidth=1, color=style["color"], linestyle=style.get("linestyle", "-"))
    axes.scatter(x, y, 10 + 250 * share, color=style["color"], marker=style["marker"], alpha=0.8, linewidth=0)
    axes.plot([], [], label=label, markersize=5, **style)


def reliability_diagram(table: pd.DataFrame, row: dict[str, Any], path: Path) -> Path:
    """Draw accuracy against confidence, the points as large as the share of the decisions.

    Args:
        table: of `calibration_table`.
        row: the run's results.
        path: the PNG to write.
    """
    title = f"{row['method']} on {row['dataset']}: calibration"
    figure, axes = new_figure(title, "confidence (%)", "accuracy of these decisions (%)")
    axes.plot([0, 100], [0, 100], color="black", linewidth=0.8, label="calibrated")
    for who, name, error, style in (
        ("backbone", f"{row['backbone']} alone", "backbone_ece", {"color": DARK, "marker": "s", "linestyle": "--"}),
        ("method", row["method"], "ece", {"color": BLUE, "marker": "o", "linestyle": "-"}),
    ):
        part = table[table["who"] == who]
        share = part["decisions"] / part["decisions"].sum()
        label = f"{name}, mean distance {100 * row[error]:.1f} points"
        draw_reliability(axes, part["confidence"], part["accuracy"], share, label, style)
    axes.set(xlim=(0, 103), ylim=(0, 103))
    legend(axes, beside=False)
    axes.get_legend().set_in_layout(False)  # a long name of a backbone leaves the axes their size
    return save(figure, path)
