"""Heterogeneity: accuracy of the same settings on partitions that differ in one number."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from iciia_exp.results.labels import base_of, label_of, unique_rows, varying
from iciia_exp.results.plots import COLOURS, MARKERS, hover, new_figure
from iciia_exp.results.published import published_number

__all__ = ["PartitionSweep", "draw_heterogeneity", "partition_sweeps", "sweep_table"]

_PREFIX = "config.partition."

# More settings than these are not told apart in one plot; the best are drawn.
_MOST = 10


class PartitionSweep(NamedTuple):
    """Runs whose partitions differ in ``key`` alone."""

    title: str
    key: str
    #: one row per setting and value: ``label``, ``value``, ``runs``, ``accuracy``, ``gain``, ``backbone_accuracy``, the
    #: standard errors ``..._se``, and ``published``, the paper's number where there is one
    table: pd.DataFrame


def partition_sweeps(rows: list[dict[str, Any]]) -> list[PartitionSweep]:
    """Return the sweeps over a number of the partition (ratio, alpha, classes per client) that the runs hold."""
    keys = {k for row in rows for k, v in row.items() if k.startswith(_PREFIX) and not k.endswith(".seed") and _real(v)}
    sweeps = []
    for key in sorted(keys):
        groups: dict[Any, list[dict[str, Any]]] = {}
        for row in rows:
            if _real(row.get(key)):
                groups.setdefault(tuple(p for p in base_of(row) if p[0] != key), []).append(row)
        for part in groups.values():
            if len({row[key] for row in part}) > 1:
                first, name = part[0], key.removeprefix(_PREFIX)
                title = f"{first['name']}: {first['dataset']}, {first['backbone']}, accuracy by partition.{name}"
                sweeps.append(PartitionSweep(title, name, _means(part, key)))
    return sweeps


def _real(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _means(rows: list[dict[str, Any]], key: str) -> pd.DataFrame:
    told = {method: [k for k in found if k != key] for method, found in varying(rows).items()}
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for row in unique_rows(rows):
        groups.setdefault((label_of(row, told), row[key]), []).append(row)
    found = []
    for (label, value), part in groups.items():
        line: dict[str, Any] = {"label": label, "method": part[0]["method"], "value": value, "runs": len(part)}
        line["backbone"] = part[0]["backbone"]
        for name in ("accuracy", "gain", "backbone_accuracy"):
            numbers = np.array([row[name] for row in part])
            line[name] = numbers.mean()
            line[f"{name}_se"] = numbers.std(ddof=1) / len(numbers) ** 0.5 if len(numbers) > 1 else np.nan
        fact = published_number(part[0])
        line["published"] = np.nan if fact is None else fact["accuracy"] / 100
        found.append(line)
    return pd.DataFrame(found)


def _best_first(table: pd.DataFrame) -> list[str]:
    real = table[table["method"] != "backbone"]
    return list(real.groupby("label")["accuracy"].mean().sort_values(ascending=False, kind="stable").index)


def sweep_table(sweep: PartitionSweep) -> pd.DataFrame:
    """Return a sweep as text: a line for the backbone and one per setting, a column per value; accuracy and gain."""
    values = sorted(sweep.table["value"].unique())
    base = sweep.table.groupby("value")["backbone_accuracy"].mean()
    name = f"partition.{sweep.key}"
    lines = [{name: f"{sweep.table['backbone'].iloc[0]} alone", **{f"{v:g}": f"{100 * base[v]:.1f}" for v in values}}]
    for label in _best_first(sweep.table):
        part = sweep.table[sweep.table["label"] == label].set_index("value")
        line = {name: label}
        for value, found in part[["accuracy", "accuracy_se", "gain"]].mul(100).to_dict("index").items():
            error = f" ± {found['accuracy_se']:.1f}" if pd.notna(found["accuracy_se"]) else ""
            line[f"{value:g}"] = f"{found['accuracy']:.1f}{error} ({found['gain']:+.1f})"
        lines.append(line)
    return pd.DataFrame(lines, columns=[name, *(f"{v:g}" for v in values)]).fillna("–")


def draw_heterogeneity(sweep: PartitionSweep) -> Any:
    """Draw accuracy against the partition's number: a line per setting, the backbone dashed, published ones hollow."""
    figure, axes = new_figure(width=9.2, height=4.8)
    values = sorted(sweep.table["value"].unique())
    base = 100 * sweep.table.groupby("value")["backbone_accuracy"].mean()
    name = sweep.table["backbone"].iloc[0]
    axes.plot(base.index, base, color="#333333", linestyle="--", linewidth=1.2, label=f"{name} alone")
    for i, label in enumerate(_best_first(sweep.table)[:_MOST]):
        part = sweep.table[sweep.table["label"] == label].sort_values("value")
        style: dict[str, Any] = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
        error = 100 * part["accuracy_se"].fillna(0)
        line = axes.errorbar(part["value"], 100 * part["accuracy"], error, capsize=3, label=label, **style)
        hover(line.lines[0], label)
        if part["published"].notna().any():
            style |= {"linestyle": ":", "fillstyle": "none", "label": f"{label}, published"}
            axes.plot(part["value"], 100 * part["published"], **style)
    if min(values) > 0 and max(values) / min(values) >= 20:
        axes.set_xscale("log")
        axes.minorticks_off()
    axes.set_xticks(values, [f"{v:g}" for v in values])
    axes.set_xlabel(f"partition.{sweep.key}")
    axes.set_ylabel("accuracy (%)")
    bars = " (bars: standard error over runs)" if sweep.table["accuracy_se"].notna().any() else ""
    axes.set_title(sweep.title + bars, loc="left", fontsize=11)
    figure.legend(frameon=False, fontsize=8.5, loc="outside right center")
    return figure
