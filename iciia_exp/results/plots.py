"""Plots of a run: gain per client, accuracy by history, by round and by overhead, quality by share in the cloud."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from iciia_exp.results.drawing import (
    BASELINE,
    BLUE,
    COLOURS,
    DARK,
    GREY,
    ORANGE,
    cost_axis,
    hover,
    legend,
    legend_entries,
    line_styles,
    measure,
    new_figure,
    save,
)
from iciia_exp.results.summary import ALL
from iciia_exp.results.tables import backbone_line, cost_images, settings
from iciia_exp.tasks import CLICK

__all__ = [
    *("accuracy_vs_history", "accuracy_vs_overhead", "accuracy_vs_rounds", "draw_accuracy_vs_overhead"),
    *("gain_per_client", "gains", "quality_vs_share"),
]


def gains(clients: pd.DataFrame) -> np.ndarray:
    """Return every client's gain in accuracy over the backbone, in percentage points, from a run's clients."""
    return (100 * ((clients["method_correct"] - clients["backbone_correct"]) / clients["decisions"])).to_numpy()


def accuracy_vs_rounds(rounds: pd.DataFrame, row: dict[str, Any], path: Path) -> Path:
    """Draw the accuracy after every round: on all classes, and on those that the backbone knows and those new to it.

    ``rounds`` is the table of `iciia_exp.engine.evaluation.rounds`. The backbone alone is dashed, and the answers that
    are not served are dotted.
    """
    from matplotlib.ticker import MaxNLocator

    title = f"{row['method']} on {row['dataset']}: accuracy by round"
    figure, axes = new_figure(title, "rounds", "accuracy (%)", width=9.2, height=4.8)
    answers = [name for name in dict.fromkeys(rounds["answer"]) if name != "backbone"]
    apart = rounds["seen_accuracy"].notna().any() and rounds["unseen_accuracy"].notna().any()
    parts = {"accuracy": ("all classes", BLUE)}
    if apart:
        parts |= {
            "seen_accuracy": ("the backbone's classes", ORANGE),
            "unseen_accuracy": ("classes new to it", COLOURS[2]),
        }
    for key, (name, colour) in parts.items():
        for number, answer in enumerate(answers):
            own = rounds[rounds["answer"] == answer]
            style: Any = {"linestyle": ":", "linewidth": 1} if number else {"marker": "o", "markersize": 4}
            text = f"{name}, {answer}" if len(answers) > 1 else name
            axes.plot(own["round"], 100 * own[key], color=colour, label=text, **style)
        alone = 100 * rounds.loc[rounds["answer"] == "backbone", key].iloc[0]
        label = f"{row['backbone']} alone" if key == "accuracy" else None
        axes.axhline(alone, **(BASELINE | {"color": colour if apart else DARK}), label=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(-3, 103)
    legend(axes, beside=True)
    return save(figure, path)


def quality_vs_share(shares: pd.DataFrame, row: dict[str, Any], path: Path) -> Path:
    """Draw delta P by the share of requests in the cloud: of the router, by true PRS, and at random.

    ``shares`` is the table of `iciia_exp.engine.evaluation.routes.route_measures`; the share of the test requests, and
    the interval that was stated for it, are marked.
    """
    title = f"{row['method']} on {row['dataset']}: quality by share in the cloud"
    figure, axes = new_figure(title, "requests in the cloud (%)", "delta P (%)")
    for name, label, style in (
        ("oracle", "by true PRS", {"color": GREY, "linestyle": ":"}),
        ("router", row["method"], {"color": BLUE, "marker": "o", "markersize": 4}),
    ):
        own = shares[shares["router"] == name]
        axes.plot(100 * own["share"], own["delta_p"], label=label, **style)
    ends = shares[shares["router"] == "router"].iloc[[0, -1]]
    axes.plot(100 * ends["share"], ends["delta_p"], **BASELINE, label="at random")
    text = f"test requests: {100 * row['cloud_share']:.1f} %, asked {100 * row['asked_share']:.0f} %"
    axes.axvline(100 * row["cloud_share"], color=ORANGE, linewidth=1.2, label=text)
    axes.axvspan(100 * row["share_low"], 100 * row["share_high"], color=ORANGE, alpha=0.15, linewidth=0)
    legend(axes, beside=False)
    return save(figure, path)


def gain_per_client(clients: pd.DataFrame, row: dict[str, Any], path: Path) -> Path:
    """Draw every test client's gain (`gains`) over the backbone, sorted, with the mean and interval of its ``row``."""
    gain = np.sort(gains(clients))[::-1]
    title = f"{row['method']} on {row['dataset']}: gain of every client over {row['backbone']}"
    of = "AUC" if row["task"] == CLICK else "accuracy"
    figure, axes = new_figure(title, "test clients, sorted by gain", f"gain in {of} (percentage points)")
    position = np.arange(1, len(gain) + 1)
    drawn = np.linspace(0, len(gain) - 1, min(len(gain), 2000)).round().astype(int)  # two to a pixel are enough
    for part, colour, label in (
        (gain > 0, BLUE, "better than the backbone"),
        (gain < 0, ORANGE, "worse"),
        (gain == 0, GREY, "equal"),
    ):
        if not part.any():
            continue
        label = f"{label}: {part.sum():,} of {len(gain):,} clients"
        if len(gain) > 200:
            height = np.where(part, gain, 0)[drawn]
            axes.fill_between(position[drawn], height, step="mid", color=colour, linewidth=0, label=label)
        elif colour == GREY:
            axes.plot(position[part], gain[part], "_", color=DARK, markersize=6, label=label)
        else:
            hatch = "////" if colour == ORANGE else None
            axes.bar(position[part], gain[part], width=0.85, color=colour, hatch=hatch, edgecolor="white", label=label)
    mean = 100 * row["client_gain"]
    mean_label = f"mean {mean:+.1f} points"
    if pd.notna(row["client_gain_low"]):
        low, high = (100 * row[f"client_gain_{side}"] for side in ("low", "high"))
        axes.axhspan(low, high, color=DARK, alpha=0.15, linewidth=0, zorder=0)
        mean_label += f" (95 % interval {low:+.1f} to {high:+.1f})"
    axes.axhline(mean, color=DARK, linewidth=1.2, label=mean_label)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(xlim=(0.3, len(gain) + 0.7), ylim=(min(gain.min(), 0) - 2, max(gain.max(), 0) + 2))
    legend(axes, beside=False)
    return save(figure, path)


def accuracy_vs_history(summary: pd.DataFrame, row: dict[str, Any], path: Path) -> Path:
    """Draw accuracy against the length of the history, for the method and the backbone on the same targets.

    Args:
        summary: of `iciia_exp.results.tables.history_summary`; its ``stream`` protocol is drawn.
        row: the run's results.
        path: the PNG to write.
    """
    part = summary[(summary["protocol"] == "stream") & (summary["history"] != ALL)]
    place, clients = np.arange(len(part)), part["clients"].to_numpy()
    fewer = bool(clients[-1] < clients[0])
    figure, axes = new_figure(
        f"{row['method']} on {row['dataset']}: accuracy by length of history",
        "images of the client seen before" + " (below: clients that have so many)" * fewer,
        "accuracy, mean over clients (%)",
    )
    low, high = (100 * (part["backbone_client_accuracy"] + part[f"client_gain_{side}"]) for side in ("low", "high"))
    label = "95 % interval of the gain over clients"
    axes.fill_between(place, low, high, color=BLUE, alpha=0.15, linewidth=0, label=label)
    for key, form, colour, size, label in (
        ("client_accuracy", "o-", BLUE, 6, row["method"]),
        ("worst_decile", "o:", BLUE, 4, "its worst decile"),
        ("backbone_client_accuracy", "s--", DARK, 6, f"{row['backbone']} alone"),
        ("backbone_worst_decile", "s:", DARK, 4, "the backbone's worst decile"),
    ):
        axes.plot(place, 100 * part[key], form, color=colour, markersize=size, label=label)
    names = [f"{n}\n{c:,}" if fewer else str(n) for n, c in zip(part["history"], clients, strict=True)]
    axes.set_xticks(place, names)
    handles, names = legend_entries(axes)
    below = "outside lower center"  # lines cross the whole plot
    figure.legend(handles, names, frameon=False, fontsize=8.5, loc=below, ncols=3)
    return save(figure, path)


def accuracy_vs_overhead(rows: Sequence[dict[str, Any]], path: Path, highlight: str | None = None) -> Path:
    """Write the figure of `draw_accuracy_vs_overhead`."""
    return save(draw_accuracy_vs_overhead(rows, highlight), path)


def draw_accuracy_vs_overhead(rows: Sequence[dict[str, Any]], highlight: str | None = None) -> Any:
    """Draw accuracy against overhead (published convention), one point per setting, the backbone as a line.

    Runs that differ only in seeds are one point, their mean; error bars are the standard error over those runs where
    there are several, else the 95 % interval over clients. The paper's numbers for the same settings are hollow.

    Args:
        rows: rows of ``results.json`` on the same dataset and backbone.
        highlight: ``setting_digest`` of the run to draw in front; the others fade.

    Returns:
        A matplotlib figure.
    """
    table = settings(list(rows))
    oracles = table[table["oracle"]]
    in_percent = table["backbone_macs"].notna().all()  # unknown for features that were made elsewhere
    cost = pd.to_numeric(table["overhead_percent" if in_percent else "sequence_macs"])
    points = table[~table["oracle"] & (table["method"] != "backbone") & cost.notna()]  # some costs are unknown
    cost = cost[points.index]
    methods = sorted(set(points["method"]))
    styles = dict(zip(methods, line_styles(methods, table["method"]), strict=True))
    crowded = len(methods) > 6
    first = table.iloc[0]
    seeds, clients = "standard error over seeds", "95 % interval over clients"
    several = points["runs"] > 1
    bars = (seeds if several.all() else f"{seeds}; of one run {clients}") if several.any() else clients
    percent = ", % of the backbone's for one image" if in_percent else ""
    figure, axes = new_figure(
        f"{first['dataset']}: accuracy against overhead\nbars: {bars}",
        f"added MACs{percent} (published convention, {cost_images(table)} images)",
        measure(table),
    )
    backbone = backbone_line(table)
    base = 100 * backbone["backbone_accuracy"]
    axes.axhline(base, **BASELINE, label=f"{first['backbone']} alone: {base:.1f} %")
    if backbone["runs"] == 1 and pd.notna(backbone["backbone_accuracy_low"]):
        low, high = (100 * backbone[f"backbone_accuracy_{side}"] for side in ("low", "high"))
        axes.axhspan(low, high, color=DARK, alpha=0.08, linewidth=0)
    for name, bound in (100 * oracles.groupby("method")["accuracy"].mean()).items():
        axes.axhline(bound, color=DARK, linestyle=":", linewidth=1.2, label=f"{name} (oracle): {bound:.1f} %")
    labelled = set()
    for x, (_, point) in zip(cost, points.iterrows(), strict=True):
        method, y = point["method"], 100 * point["accuracy"]
        style: dict[str, Any] = styles[method] | {"linestyle": "none"}
        label = f"{method}: {y:.1f} %" if crowded else method
        error: Any = 100 * point["accuracy_se"]
        if point["runs"] == 1 and pd.notna(point["accuracy_low"]):
            error = [[y - 100 * point["accuracy_low"]], [100 * point["accuracy_high"] - y]]
        drawn = axes.errorbar(
            [x], [y], error, **style, markersize=7, capsize=3,
            alpha=1 if highlight in (None, point["setting_digest"]) else 0.45,
            label=None if method in labelled else label,
        )  # fmt: skip
        hover(drawn.lines[0], f"{point['label']}: {y:.1f} %")
        labelled.add(method)
        if pd.notna(point["published"]):
            label = None if "published" in labelled else "published"
            axes.plot([x], [100 * point["published"]], **style, markersize=9, fillstyle="none", label=label)
            labelled.add("published")
        if pd.notna(point["groups"]) and len(rows) <= 24:
            text: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8, "color": style["color"]}
            axes.annotate(f"G={int(point['groups'])}", (x, y), xytext=(7, 4), **text)
    front = points.assign(cost=cost)[points["front"]].sort_values(["cost", "accuracy"])
    if len(front) > 1 and highlight is None:
        style = {"where": "post", "color": GREY, "linewidth": 1, "zorder": 0, "label": "best at its cost"}
        axes.step(front["cost"], 100 * front["accuracy"], **style)
    cost_axis(axes, cost, bool(in_percent))
    legend(axes, beside=crowded)
    return figure
