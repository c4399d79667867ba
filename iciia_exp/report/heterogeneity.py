"""Heterogeneity: accuracy of the same settings on partitions that differ in one number."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import pandas as pd

from iciia_exp.results.columns import cell
from iciia_exp.results.drawing import BASELINE, MOST_LINES, draw_setting, legend, line_styles, measure, new_figure
from iciia_exp.results.labels import base_of, grouped, varying
from iciia_exp.results.tables import settings

__all__ = ["PartitionSweep", "draw_heterogeneity", "partition_sweeps", "sweep_table"]

_PREFIX = "config.partition."


class PartitionSweep(NamedTuple):
    """Runs whose partitions differ in ``key`` alone."""

    title: str
    key: str
    #: settings of every value of the key (`iciia_exp.results.tables.settings`), with a column ``value``
    table: pd.DataFrame


def partition_sweeps(rows: list[dict[str, Any]]) -> list[PartitionSweep]:
    """Return the sweeps over a number of the partition (ratio, alpha, classes per client) among the runs."""
    keys = {k for row in rows for k in row if k.startswith(_PREFIX) and not k.endswith(".seed")}
    return [sweep for key in sorted(keys) for sweep in _sweeps_over(key, rows)]


def _sweeps_over(key: str, rows: list[dict[str, Any]]) -> Iterator[PartitionSweep]:
    swept = [row for row in rows if isinstance(row.get(key), int | float) and not isinstance(row[key], bool)]
    for part in grouped(swept, lambda row: tuple(p for p in base_of(row) if p[0] != key)).values():
        first, name, values = part[0], key.removeprefix(_PREFIX), sorted({row[key] for row in part})
        if len(values) > 1:
            labels = {method: [k for k in keys if k != key] for method, keys in varying(part).items()}
            tables = [settings([r for r in part if r[key] == value], labels).assign(value=value) for value in values]
            title = f"{first['name']}: {first['dataset']}, {first['backbone']}, accuracy by partition.{name}"
            yield PartitionSweep(title, name, pd.concat(tables, ignore_index=True))


def _best_first(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Return the settings by mean accuracy, each with its rows by value."""
    parts = [(str(label), part) for label, part in table[table["method"] != "backbone"].groupby("label", sort=True)]
    return sorted(parts, key=lambda part: -part[1]["accuracy"].mean())


def sweep_table(sweep: PartitionSweep) -> pd.DataFrame:
    """Return a sweep as text: a line for the backbone and one per setting, a column per value; accuracy and gain."""
    table, name = sweep.table, f"partition.{sweep.key}"
    base = 100 * table.groupby("value")["alone_accuracy"].first()
    lines = [{name: f"{table['backbone'].iloc[0]} alone", **{f"{v:g}": f"{a:.1f}" for v, a in base.items()}}]
    for label, part in _best_first(table):
        cells = {
            f"{row['value']:g}": f"{cell(row, 'accuracy', errors=('se',))} ({cell(row, 'gain', 'gain', errors=())})"
            for _, row in part.iterrows()
        }
        lines.append({name: label, **cells})
    return pd.DataFrame(lines).fillna("–")


def draw_heterogeneity(sweep: PartitionSweep) -> Any:
    """Draw accuracy against the partition's number: a line per setting, the backbone dashed, published ones hollow."""
    table = sweep.table
    bars = " (bars: standard error over runs)" if table["accuracy_se"].notna().any() else ""
    figure, axes = new_figure(sweep.title + bars, f"partition.{sweep.key}", measure(table))
    base = 100 * table.groupby("value")["alone_accuracy"].first()
    axes.plot(base.index, base, **BASELINE, label=f"{table['backbone'].iloc[0]} alone")
    lines = _best_first(table)[:MOST_LINES]
    styles = line_styles([part["method"].iloc[0] for _, part in lines], table["method"])
    for (label, part), style in zip(lines, styles, strict=True):
        draw_setting(axes, part["value"], part, label, **style)
    if base.index.min() > 0 and base.index.max() / base.index.min() >= 20:
        axes.set_xscale("log")
        axes.minorticks_off()
    axes.set_xticks(base.index, [f"{v:g}" for v in base.index])
    legend(axes, beside=True)
    return figure
