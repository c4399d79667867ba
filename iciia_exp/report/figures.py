"""Figures of a report: accuracy by overhead, bytes, groups, history and confidence, and the gain per client."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pandas as pd

from iciia_exp.artifacts import read_json
from iciia_exp.results import drawing, plots
from iciia_exp.results.calibration import pooled
from iciia_exp.results.columns import DRAWN_TYPES
from iciia_exp.results.summary import ALL
from iciia_exp.results.tables import backbone_history, history_of, pareto_front, read_table

__all__ = [
    "all_figures",
    "by_bytes",
    "by_confidence",
    "by_groups",
    "by_history",
    "by_rounds",
    "by_share",
    "gain_distribution",
]

_FEWEST = 10  # decisions of a bin of confidence


def by_groups(table: pd.DataFrame, title: str) -> Any | None:
    """Draw accuracy against the number of groups, a line for each method and number of layers; None without a sweep."""
    swept = table[table["groups"].notna()]
    lines = [(key, part.sort_values("groups")) for key, part in swept.groupby(["method", "num_layers"], sort=True)]
    lines = [(key, part) for key, part in lines if part["groups"].nunique() > 1]
    if not lines:
        return None
    figure, axes = drawing.new_figure(f"{title}: accuracy by groups and layers", "groups", drawing.measure(table))
    styles = drawing.line_styles([str(method) for (method, _), _ in lines], table["method"])
    for ((method, layers), part), style in zip(lines, styles, strict=True):
        drawing.draw_setting(axes, part["groups"], part, f"{method} N={layers:.0f}", **style)
    axes.set_xscale("log", base=2)
    ticks = sorted(set(swept["groups"].astype(int)))
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.minorticks_off()
    base = 100 * table["alone_accuracy"].iloc[0]
    axes.axhline(base, **drawing.BASELINE, label=f"{table['backbone'].iloc[0]} alone: {base:.1f} %")
    drawing.legend(axes, beside=len(lines) > 5)
    return figure


def by_history(table: pd.DataFrame, title: str, client_type: str | None = None) -> Any | None:
    """Draw accuracy by images seen before, a line for each setting, the backbone dashed; None where no run has it.

    ``client_type`` is that of `iciia_exp.results.tables.history_of`.
    """
    histories = ((row, h) for _, row in table.iterrows() if (h := history_of(row, client_type)) is not None)
    found = list(islice(histories, drawing.MOST_LINES + 1))
    if (alone := backbone_history(table, client_type)) is None:
        return None
    base = alone["backbone_client_accuracy"].drop(index=ALL, errors="ignore")
    drawn = [f for f in found if f[0]["method"] != "backbone"][: drawing.MOST_LINES]
    clients = "" if client_type is None else f", {client_type} clients"
    figure, axes = drawing.new_figure(
        f"{title}: accuracy by history{clients}", "images of the client seen before", "accuracy, mean over clients (%)"
    )
    place = np.arange(len(base))
    styles = drawing.line_styles([row["method"] for row, _ in drawn], table["method"])
    for (row, history), style in zip(drawn, styles, strict=True):
        more: Any = {"linestyle": ":" if row["oracle"] else "-", "capsize": 2, "markersize": 5}
        drawing.draw_setting(axes, place, history.reindex(base.index), row["label"], "client_accuracy", **style, **more)
    axes.plot(place, 100 * base, **drawing.BASELINE, label=f"{table['backbone'].iloc[0]} alone")
    axes.set_xticks(place, [str(n) for n in base.index])
    drawing.legend(axes, beside=len(drawn) > 4)
    return figure


def by_bytes(table: pd.DataFrame, title: str) -> Any | None:
    """Draw accuracy against the bytes of a request, up and down, a point for each setting; None where all are equal.

    Settings that no other beats with as few bytes are joined.
    """
    from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

    points = table[~table["oracle"] & (table["method"] != "backbone")]
    points = points[points["request_down_bytes"].notna() & points["request_up_bytes"].notna()]
    points = points.assign(bytes=points["request_down_bytes"] + points["request_up_bytes"])
    if points["bytes"].nunique() < 2:
        return None
    points = points.sort_values(["bytes", "accuracy"], ascending=[True, False])
    figure, axes = drawing.new_figure(
        f"{title}: accuracy against bytes",
        "sent for an image, up and down",
        drawing.measure(table),
        width=9.2,
        height=4.8,
    )
    methods = sorted(set(points["method"]))
    styles = dict(zip(methods, drawing.line_styles(methods, table["method"]), strict=True))
    for method, part in points.groupby("method", sort=True):
        style: Any = styles[str(method)] | {"linestyle": "none", "markersize": 7}
        drawing.draw_setting(axes, part["bytes"], part.drop(columns="published"), str(method), **style)
    front = points[pareto_front(points["bytes"], points["accuracy"])]
    style = {"where": "post", "color": drawing.GREY, "linewidth": 1, "zorder": 0, "label": "best at its bytes"}
    axes.step(front["bytes"], 100 * front["accuracy"], **style)
    for _, point in points.drop(front.index).iterrows():
        text = f"{point['label']}: {100 * point['accuracy']:.1f} %"
        drawing.hover(axes.plot([point["bytes"]], [100 * point["accuracy"]], ",", alpha=0)[0], text)
    if points["bytes"].min() > 0:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    else:  # what is on the device sends nothing
        axes.set_xscale("symlog", linthresh=1000, linscale=0.2)
    axes.xaxis.set_major_formatter(EngFormatter("B"))
    axes.xaxis.set_minor_locator(NullLocator())
    _name(axes, front)
    drawing.legend(axes, beside=True)
    return figure


def by_rounds(table: pd.DataFrame, title: str, x: str = "round") -> Any | None:
    """Draw accuracy by round, a line for each setting, the backbone dashed; None where no run has rounds.

    ``x`` is ``round``, or ``bytes``: those that a device has received and sent until then.
    """
    from matplotlib.ticker import EngFormatter, MaxNLocator

    found = []
    for _, row in table[table["method"] != "backbone"].iterrows():
        parts = [part for folder in row["run_dirs"] if (part := read_table(folder / "rounds.parquet")) is not None]
        if parts:
            found.append((row, _of_rounds(pd.concat(parts))))
    if not found:
        return None
    found = found[: drawing.MOST_LINES]
    labels = {"round": "round", "bytes": "sent to and by a device until then, mean over the devices"}
    ylabel = drawing.measure(table)
    figure, axes = drawing.new_figure(f"{title}: accuracy by {x}", labels[x], ylabel, width=9.2, height=4.8)
    names = [row["label"] for row, _ in found]  # most are of one method, and need colours of their own
    styles = drawing.line_styles(names, names)
    for (row, rounds), style in zip(found, styles, strict=True):
        more: Any = {"capsize": 2, "markersize": 4}
        drawing.draw_setting(
            axes, rounds.index if x == "round" else rounds["bytes"], rounds, row["label"], **style, **more
        )
    base = 100 * table["alone_accuracy"].iloc[0]
    axes.axhline(base, **drawing.BASELINE, label=f"{table['backbone'].iloc[0]} alone: {base:.1f} %")
    if x == "round":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    else:
        axes.xaxis.set_major_formatter(EngFormatter("B"))
    drawing.legend(axes, beside=True)
    return figure


#: What is drawn by the share in the cloud before the metrics, and its unit; the metrics are from 0 to 1.
_BY_SHARE = {"delta_p": "delta P (%)", "win_rate": "win rate (%)", "quality": "mean of the metrics"}


def by_share(table: pd.DataFrame, title: str) -> Any | None:
    """Draw quality by the share of requests in the cloud, a line for each router; None where no run has such curves.

    A panel each for delta P, win rate, the metrics' mean, every metric, and (``truth``) what is right in the pictures.
    The line of random requests is dashed, and that of the true PRS dotted.
    """
    found: list[tuple[str, Any, Any]] = []
    best, ends = None, None
    for _, row in table.iterrows():
        parts = [part for folder in row["run_dirs"] if (part := read_table(folder / "shares.parquet")) is not None]
        if not parts:
            continue
        of = dict(iter(pd.concat(parts).groupby("router")))
        curve = of["router"].groupby("share").mean(numeric_only=True)
        if best is None or len(best.columns) < len(curve.columns):
            best, ends = of["oracle"].groupby("share").mean(numeric_only=True), curve.iloc[[0, -1]]
        if not row["oracle"]:
            found.append((row["label"], curve, of["router"].groupby("share").sem(numeric_only=True).fillna(0)))
    if not found or best is None or ends is None:
        return None
    keys = [*_BY_SHARE, *(str(key) for key in best.columns if key not in _BY_SHARE)]
    labels = [label for label, _, _ in found[: drawing.MOST_LINES]]
    rows = -(-len(keys) // 3)
    figure, panels = drawing.new_panels(f"{title}: quality by share of requests in the cloud", rows, 3)
    for key, axes in zip(keys, panels.flat, strict=False):
        scale = 100 if key == "win_rate" else 1
        styles = drawing.line_styles(labels, labels)
        for number, ((label, curve, error), style) in enumerate(zip(found, styles, strict=False)):
            if key not in curve:
                continue
            at = {"label": label, "markersize": 4, "linestyle": "-" if number < 5 else "-.", **style}  # of five colours
            line = axes.errorbar(100 * curve.index, scale * curve[key], scale * error[key], **at)
            drawing.hover(line.lines[0], label)
        axes.plot(100 * best.index, scale * best[key], color=drawing.GREY, linestyle=":", label="by true PRS")
        axes.plot(100 * ends.index, scale * ends[key], **drawing.BASELINE, label="at random")
        axes.set_title("what is right" if key == "truth" else _BY_SHARE.get(key, key), loc="left", fontsize=9.5)
    for axes in list(panels.flat)[len(keys) :]:
        axes.remove()
    for axes in list(panels.flat)[max(0, len(keys) - 3) : len(keys)]:  # below which there is none
        axes.set_xlabel("requests in the cloud (%)", fontsize=8.5)
    handles, names = drawing.legend_entries(panels.flat[0])
    figure.legend(handles, names, frameon=False, fontsize=8.5, loc="outside lower center", ncols=4)
    return figure


def _of_rounds(tables: pd.DataFrame) -> pd.DataFrame:
    """Return accuracy and bytes of the way to answer that is served, by round, means over runs."""
    served = next(name for name in tables["answer"] if name != "backbone")
    own = tables[tables["answer"] == served]
    by_round = own.assign(bytes=own["down_bytes"] + own["up_bytes"]).groupby("round")
    found = by_round[["accuracy", "bytes"]].mean()
    return found.assign(accuracy_se=by_round["accuracy"].sem())


def _name(axes: Any, front: pd.DataFrame) -> None:
    """Write the label of every point of a front: of the best above it, of the others below it and below one another."""
    axes.margins(y=0.1)
    axes.figure.canvas.draw()
    points = 72 / axes.figure.dpi
    lowest = np.inf
    for number, (_, point) in enumerate(front.iloc[::-1].iterrows()):
        place = point["bytes"], 100 * point["accuracy"]
        height = axes.transData.transform(place)[1] * points
        lowest = min(height - 11, lowest - 10)
        offset = (6, lowest - height if number else 8)  # nothing is above the best
        text = axes.annotate(
            point["label"], place, offset, textcoords="offset points", fontsize=7.5, color=drawing.DARK
        )
        text.set_bbox({"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5})


def by_confidence(table: pd.DataFrame, title: str) -> Any | None:
    """Draw the accuracy of the decisions of each confidence, a line for each setting, its runs together."""
    drawn: list[tuple[pd.Series, pd.DataFrame]] = []
    for _, row in table[table["method"] != "backbone"].iterrows():
        if len(drawn) == drawing.MOST_LINES:
            break
        parts = [t for f in row["run_dirs"] if (t := read_table(f / "calibration.parquet")) is not None]
        if parts:
            bins = pooled(parts)
            drawn.append((row, bins[bins["decisions"] >= _FEWEST]))
    if not drawn:
        return None
    xlabel = f"confidence (%), by bins of at least {_FEWEST} decisions"
    figure, axes = drawing.new_figure(f"{title}: calibration", xlabel, "accuracy of these decisions (%)")
    axes.plot([0, 100], [0, 100], color="black", linewidth=0.8)
    styles = drawing.line_styles([row["method"] for row, _ in drawn], table["method"])
    for (row, bins), style in zip(drawn, styles, strict=True):
        own = bins[bins["who"] == "method"]
        label = f"{row['label']}, ECE {100 * row['ece']:.1f}"
        (line,) = axes.plot(100 * own["confidence"], 100 * own["accuracy"], markersize=4, label=label, **style)
        drawing.hover(line, label)
    alone = drawn[0][1].query("who == 'backbone'")
    label = f"{table['backbone'].iloc[0]} alone, ECE {100 * table['alone_ece'].iloc[0]:.1f}"
    axes.plot(100 * alone["confidence"], 100 * alone["accuracy"], **drawing.BASELINE, label=label)
    drawing.legend(axes, beside=len(drawn) > 4)
    return figure


def gain_distribution(table: pd.DataFrame, title: str) -> Any | None:
    """Draw the distribution of the gain over clients, a box for each setting, all its runs together."""
    boxes: dict[str, np.ndarray] = {}
    for _, row in table[table["method"] != "backbone"].head(drawing.MOST_LINES).iloc[::-1].iterrows():
        parts = [t for f in row["run_dirs"] if (t := read_table(f / "clients.parquet")) is not None]
        if parts:
            boxes[row["label"]] = plots.gains(pd.concat(parts))
    if not boxes:
        return None
    figure, axes = drawing.new_figure(
        xlabel="gain of a client over the backbone (points)", height=1.4 + 0.42 * len(boxes)
    )
    drawn = axes.boxplot(
        list(boxes.values()), orientation="horizontal", whis=(10, 90), widths=0.6,
        showfliers=False, showmeans=True, patch_artist=True,
        boxprops={"facecolor": "#d5e3f2", "edgecolor": drawing.BLUE}, medianprops={"color": drawing.BLUE},
        meanprops={"marker": "D", "markerfacecolor": drawing.ORANGE},
    )  # fmt: skip
    for box, label in zip(drawn["boxes"], boxes, strict=True):
        drawing.hover(box, label)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(1, len(boxes) + 1), [drawing.wrapped(label) for label in boxes], fontsize=8.5)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color="#dddddd", linewidth=0.8)
    text = f"{title}: gain per client (box: middle half, whiskers: 10 to 90 %, diamond: mean)"
    axes.set_title(text, loc="right", fontsize=9.5)
    return figure


def all_figures(table: pd.DataFrame, title: str) -> Iterator[tuple[str, Any]]:
    """Yield the name and figure of everything that the runs of a comparison allow."""
    rows = [read_json(folder / "results.json") for folders in table["run_dirs"] for folder in folders]
    title = title.split(",")[0]
    yield "accuracy_vs_overhead", plots.draw_accuracy_vs_overhead(rows)
    found = {"accuracy_vs_groups": by_groups(table, title), "accuracy_vs_history": by_history(table, title)}
    found["accuracy_vs_bytes"] = by_bytes(table, title)
    found["accuracy_vs_rounds"] = by_rounds(table, title)
    found["quality_vs_share"] = by_share(table, title)
    found["accuracy_vs_round_bytes"] = by_rounds(table, title, "bytes")
    found |= {f"accuracy_vs_history_{name}": by_history(table, title, name) for name in DRAWN_TYPES}
    found["calibration"] = by_confidence(table, title)
    found["gain_per_client"] = gain_distribution(table, title)
    yield from ((name, figure) for name, figure in found.items() if figure is not None)
