"""Figures of a report, as PDF and PNG: by overhead, groups, history and client."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from iciia_exp.artifacts import read_json
from iciia_exp.results.columns import DRAWN_TYPES
from iciia_exp.results.plots import COLOURS, MARKERS, accuracy_vs_overhead, hover, new_figure, save
from iciia_exp.results.summary import ALL
from iciia_exp.results.tables import history_of, read_table

__all__ = ["by_groups", "by_history", "gain_distribution", "write_all"]

# More settings than this are not told apart in one plot; the best are drawn.
_MOST = 10


def _beside(axes: Any, lines: int) -> None:
    """Put the legend where it hides nothing: beside the plot where it is long."""
    if lines > 5:
        axes.figure.set_size_inches(9.2, 4.8)
        axes.figure.legend(frameon=False, fontsize=8.5, loc="outside right center")
    else:
        axes.legend(frameon=False, fontsize=8.5, loc="best")


def _base_line(axes: Any, table: pd.DataFrame) -> None:
    base = 100 * table["backbone_accuracy"].mean()
    label = f"{table['backbone'].iloc[0]} alone: {base:.1f} %"
    axes.axhline(base, color="#333333", linestyle="--", linewidth=1.2, label=label)


def by_groups(table: pd.DataFrame, title: str) -> Any | None:
    """Draw accuracy against the number of groups, a line for each method and number of layers; None without a sweep."""
    swept = table[table["groups"].notna()]
    lines = [(key, part.sort_values("groups")) for key, part in swept.groupby(["method", "num_layers"], sort=True)]
    lines = [(key, part) for key, part in lines if part["groups"].nunique() > 1]
    if not lines:
        return None
    figure, axes = new_figure()
    for i, ((method, layers), part) in enumerate(lines):
        error = 100 * part["accuracy_se"].fillna(0)
        style: dict[str, Any] = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "capsize": 3}
        drawn = axes.errorbar(part["groups"], 100 * part["accuracy"], error, label=f"{method} N={layers:.0f}", **style)
        hover(drawn.lines[0], f"{method} N={layers:.0f}")
        if part["published"].notna().any():
            style |= {"fillstyle": "none", "linestyle": ":", "label": f"{method} N={layers:.0f}, published"}
            axes.errorbar(part["groups"], 100 * part["published"], 100 * part["published_se"].fillna(0), **style)
    axes.set_xscale("log", base=2)
    ticks = sorted(set(swept["groups"].astype(int)))
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.minorticks_off()
    _base_line(axes, table)
    axes.set_xlabel("groups")
    axes.set_ylabel("accuracy (%)")
    axes.set_title(f"{title}: accuracy by groups and layers", loc="left", fontsize=11)
    _beside(axes, len(lines))
    return figure


def by_history(
    table: pd.DataFrame, title: str, file: str = "history.parquet", client_type: str | None = None
) -> Any | None:
    """Draw accuracy by images seen before, a line for each setting, the backbone dashed; None where no run has it."""
    # a setting has its colour by its place in the table, the same in every figure
    found: list[tuple[int, pd.Series, pd.DataFrame]] = []
    for i, (_, row) in enumerate(table.iterrows()):
        if (row["method"] != "backbone" or not found) and (history := history_of(row, file, client_type)) is not None:
            found.append((i, row, history))
        if len(found) > _MOST:
            break
    if not found:
        return None
    figure, axes = new_figure()
    lengths = [n for n in found[0][2].index if n != ALL]
    place = np.arange(len(lengths))
    drawn = [f for f in found if f[1]["method"] != "backbone"][:_MOST]
    for i, row, history in drawn:
        part = history.reindex(lengths)
        style: dict[str, Any] = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "capsize": 2}
        style["linestyle"] = ":" if row["oracle"] else "-"
        error = 100 * part["client_accuracy_se"].fillna(0)
        line = axes.errorbar(place, 100 * part["client_accuracy"], error, label=row["label"], markersize=5, **style)
        hover(line.lines[0], row["label"])
    base = 100 * found[0][2].reindex(lengths)["backbone_client_accuracy"]
    axes.plot(place, base, "--", color="#333333", label=f"{table['backbone'].iloc[0]} alone")
    axes.set_xticks(place, [str(n) for n in lengths])
    axes.set_xlabel("images of the client seen before")
    axes.set_ylabel("accuracy, mean over clients (%)")
    clients = "" if client_type is None else f", {client_type} clients"
    axes.set_title(f"{title}: accuracy by history{clients}", loc="left", fontsize=11)
    _beside(axes, len(drawn) + 1)
    return figure


def gain_distribution(table: pd.DataFrame, title: str) -> Any | None:
    """Draw how the gain over the backbone is spread over clients, a box for each setting, all its runs together."""
    gains, labels = [], []
    for _, row in table[table["method"] != "backbone"].head(_MOST).iterrows():
        parts = [t for f in row["run_dirs"] if (t := read_table(f / "clients.parquet")) is not None]
        if parts:
            clients = pd.concat(parts)
            gains.append(
                100 * ((clients["method_correct"] - clients["backbone_correct"]) / clients["decisions"]).to_numpy()
            )
            labels.append(row["label"])
    if not gains:
        return None
    figure, axes = new_figure(height=1.4 + 0.42 * len(gains))
    style: dict[str, Any] = {"showfliers": False, "showmeans": True, "patch_artist": True, "widths": 0.6}
    boxes = axes.boxplot(gains[::-1], orientation="horizontal", whis=(10, 90), **style)
    for box, label in zip(boxes["boxes"], labels[::-1], strict=True):
        box.set(facecolor="#d5e3f2", edgecolor="#1f5fa8")
        hover(box, label)
    for mark, style in (("medians", {"color": "#1f5fa8"}), ("means", {"marker": "D", "markerfacecolor": "#e8912d"})):
        for artist in boxes[mark]:
            artist.set(**style)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(1, len(labels) + 1), labels[::-1], fontsize=8.5)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color="#dddddd", linewidth=0.8)
    axes.set_xlabel("gain of a client over the backbone (points)")
    axes.set_title(
        f"{title}: gain per client (box: middle half, whiskers: 10 to 90 %, diamond: mean)", loc="right", fontsize=9.5
    )
    return figure


def all_figures(table: pd.DataFrame, title: str) -> Iterator[tuple[str, Any]]:
    """Yield the figures that the runs allow, with names."""
    yield "accuracy_vs_groups", by_groups(table, title)
    yield "accuracy_vs_history", by_history(table, title)
    for client_type in DRAWN_TYPES:
        yield f"accuracy_vs_history_{client_type}", by_history(table, title, "drawn_clients.parquet", client_type)
    yield "gain_per_client", gain_distribution(table, title)


def write_all(table: pd.DataFrame, title: str, out: Path, prefix: str = "") -> list[Path]:
    """Write every figure that the runs allow, as PDF and PNG; return the files."""
    rows = [read_json(folder / "results.json") for folders in table["run_dirs"] for folder in folders]
    files = []
    for ending in ("pdf", "png"):
        files.append(accuracy_vs_overhead(rows, out / f"{prefix}accuracy_vs_overhead.{ending}"))
    for name, figure in all_figures(table, title.split(",")[0]):
        if figure is not None:
            files += [save(figure, out / f"{prefix}{name}.{ending}") for ending in ("pdf", "png")]
    return files
