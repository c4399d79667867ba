"""Plots of a run and of a sweep: gain per client, accuracy by history, accuracy against overhead, and examples."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from iciia_exp.artifacts import atomic_write
from iciia_exp.results.published import published_number
from iciia_exp.results.summary import ALL
from iciia_exp.tasks import SINGLE_LABEL

__all__ = [
    *("COLOURS", "MARKERS", "hover", "new_figure", "save"),
    *(
        "accuracy_vs_history",
        "accuracy_vs_overhead",
        "draw_accuracy_vs_overhead",
        "gain_per_client",
        "draw_examples",
    ),
]

# Colours that differ in lightness too, so that the plots read in grey.
_BLUE, _ORANGE, _GREY, _DARK = "#1f5fa8", "#e8912d", "#9a9a9a", "#333333"
COLOURS = [_BLUE, _ORANGE, "#4c9f70", "#7b4ea3", "#b03a48"]  # five, and eight markers: forty pairs
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "*"]


def new_figure(width: float = 7.0, height: float = 4.2) -> tuple[Any, Any]:
    """Return an empty figure of so many inches and its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")  # no pyplot: no global state, no window
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def hover(artist: Any, text: str) -> None:
    """Let a line or a point say what it is: in SVG its id is ``hover:<text>``, which a page makes a tooltip."""
    artist.set_gid(f"hover:{text}")


def save(figure: Any, path: Path) -> Path:
    """Write a figure in the format that the file's name ends with."""
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format=path.suffix[1:])
    return path


def gain_per_client(clients: pd.DataFrame, row: dict[str, Any], path: Path) -> Path:
    """Draw every test client's gain over the backbone, sorted, with the mean and its interval."""
    gains = (
        np.sort(((clients["method_correct"] - clients["backbone_correct"]) / clients["decisions"]).to_numpy())[::-1]
        * 100
    )
    figure, axes = new_figure()
    position = np.arange(1, len(gains) + 1)
    many = len(gains) > 200
    drawn = np.linspace(0, len(gains) - 1, min(len(gains), 2000)).round().astype(int)  # two to a pixel are enough
    for part, colour, label in (
        (gains > 0, _BLUE, "better than the backbone"),
        (gains < 0, _ORANGE, "worse"),
        (gains == 0, _GREY, "equal"),
    ):
        if not part.any():
            continue
        label = f"{label}: {part.sum():,} of {len(gains):,} clients"
        if many:
            height = np.where(part, gains, 0)[drawn]
            axes.fill_between(position[drawn], height, step="mid", color=colour, linewidth=0, label=label)
        elif colour == _GREY:
            axes.plot(position[part], gains[part], "_", color=_DARK, markersize=6, label=label)
        else:
            hatch = "////" if colour == _ORANGE else None
            axes.bar(position[part], gains[part], width=0.85, color=colour, hatch=hatch, edgecolor="white", label=label)
    low, high, mean = (100 * row[k] for k in ("client_gain_low", "client_gain_high", "client_gain"))
    axes.axhspan(low, high, color=_DARK, alpha=0.15, linewidth=0, zorder=0)
    mean_label = f"mean {mean:+.1f} points (95 % interval {low:+.1f} to {high:+.1f})"
    axes.axhline(mean, color=_DARK, linewidth=1.2, label=mean_label)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xlim(0.3, len(gains) + 0.7)
    axes.set_ylim(min(gains.min(), 0) - 2, max(gains.max(), 0) + 2)
    axes.set_xlabel("test clients, sorted by gain")
    axes.set_ylabel("gain in accuracy (percentage points)")
    title = f"{row['method']} on {row['dataset']}: gain of every client over {row['backbone']}"
    axes.set_title(title, loc="left", fontsize=11)
    axes.legend(frameon=False, fontsize=8.5, loc="best")
    return save(figure, path)


def accuracy_vs_history(summary: pd.DataFrame, row: dict[str, Any], path: Path) -> Path:
    """Draw accuracy against the length of the history, for the method and the backbone on the same targets.

    Args:
        summary: of `iciia_exp.results.tables.history_summary`; its ``stream`` protocol is drawn.
        row: the run's results.
        path: the PNG to write.
    """
    part = summary[(summary["protocol"] == "stream") & (summary["history"] != ALL)]
    figure, axes = new_figure()
    place = np.arange(len(part))
    clients = part["clients"].to_numpy()
    low, high = (100 * (part["backbone_client_accuracy"] + part[f"client_gain_{side}"]) for side in ("low", "high"))
    label = "95 % interval of the gain over clients"
    axes.fill_between(place, low, high, color=_BLUE, alpha=0.15, linewidth=0, label=label)
    axes.plot(place, 100 * part["client_accuracy"], "o-", color=_BLUE, label=row["method"])
    axes.plot(place, 100 * part["worst_decile"], "o:", color=_BLUE, markersize=4, label="its worst decile")
    axes.plot(place, 100 * part["backbone_client_accuracy"], "s--", color=_DARK, label=f"{row['backbone']} alone")
    axes.plot(
        place, 100 * part["backbone_worst_decile"], "s:", color=_DARK, markersize=4, label="the backbone's worst decile"
    )
    fewer = bool(clients[-1] < clients[0])
    names = [f"{n}\n{c:,}" if fewer else str(n) for n, c in zip(part["history"], clients, strict=True)]
    axes.set_xticks(place, names)
    axes.set_xlabel("images of the client seen before" + " (below: clients that have so many)" * fewer)
    axes.set_ylabel("accuracy, mean over clients (%)")
    axes.set_title(f"{row['method']} on {row['dataset']}: accuracy by length of history", loc="left", fontsize=11)
    figure.legend(frameon=False, fontsize=8.5, loc="outside lower center", ncols=3)  # lines cross the whole plot
    return save(figure, path)


def accuracy_vs_overhead(rows: Sequence[dict[str, Any]], path: Path, highlight: str | None = None) -> Path:
    """Write `draw_accuracy_vs_overhead` to a file, PNG, PDF or SVG by its name."""
    return save(draw_accuracy_vs_overhead(rows, highlight), path)


def draw_accuracy_vs_overhead(rows: Sequence[dict[str, Any]], highlight: str | None = None) -> Any:
    """Draw accuracy against overhead (published convention), one point per setting, the backbone as a line.

    Runs that differ only in seeds are one point, their mean; error bars are the standard error over those runs where
    there are several, else the 95 % interval over clients. The paper's numbers for the same settings are hollow. In SVG
    a point's id is ``run-<setting_digest>``.

    Args:
        rows: rows of ``results.json`` on the same dataset and backbone.
        highlight: ``setting_digest`` of the run to draw in front; the others fade.

    Returns:
        A matplotlib figure.
    """
    from matplotlib.ticker import FuncFormatter, NullLocator

    frame = pd.DataFrame(list(rows))
    bounds = frame[frame.get("oracle", pd.Series(False, frame.index)).fillna(False).astype(bool)]
    methods = {m: i for i, m in enumerate(sorted(set(frame["method"]) - {"backbone"} - set(bounds["method"])))}
    crowded = len(methods) > 6  # then the legend stands beside the plot, the best first
    figure, axes = new_figure(width=9.2 if crowded else 7.0, height=4.8 if crowded else 4.2)
    backbone = frame.drop_duplicates(["partition_digest"])  # one backbone value per partition and backbone seed
    base = 100 * backbone["backbone_accuracy"].mean()
    base_label = f"{frame['backbone'].iloc[0]} alone: {base:.1f} %"
    axes.axhline(base, color=_DARK, linestyle="--", linewidth=1.2, label=base_label)
    if len(backbone) == 1:
        low, high = (100 * backbone[k].iloc[0] for k in ("backbone_accuracy_low", "backbone_accuracy_high"))
        axes.axhspan(low, high, color=_DARK, alpha=0.08, linewidth=0)
    for name, runs in bounds.groupby("method"):
        bound = 100 * runs["accuracy"].mean()
        axes.axhline(bound, color=_DARK, linestyle=":", linewidth=1.2, label=f"{name} (oracle): {bound:.1f} %")
    known = frame["backbone_macs"].notna().all()  # not that of features that were made elsewhere
    costs, points, several = [], [], False
    labelled = set()
    shown = frame[frame["method"].isin(list(methods))]
    if crowded:
        shown = shown.assign(mean=shown.groupby("setting_digest")["accuracy"].transform("mean"))
        shown = shown.sort_values("mean", ascending=False, kind="stable")
    for setting, runs in shown.groupby("setting_digest", sort=False):
        first = runs.iloc[0]
        y = 100 * runs["accuracy"].mean()
        if len(runs) > 1:
            several = True
            error = np.full((2, 1), 100 * runs["accuracy"].std(ddof=1) / np.sqrt(len(runs)))
        else:
            middle, low, high = (first[k] for k in ("accuracy", "accuracy_low", "accuracy_high"))
            error = 100 * np.array([[middle - low], [high - middle]])
        number = methods[first["method"]]
        front = highlight is None or setting == highlight
        colour = COLOURS[number % len(COLOURS)]
        label = first["method"] if first["method"] not in labelled else None
        if crowded and label:
            label = f"{label}: {y:.1f} %"
        labelled.add(first["method"])
        marker = MARKERS[number % len(MARKERS)]
        style: dict[str, Any] = {"marker": marker, "markersize": 7, "capsize": 3, "linestyle": "none"}
        x = first["overhead_percent"] if known else first["sequence_macs"]
        costs.append(x)
        points.append((x, y))
        point = axes.errorbar([x], [y], yerr=error, color=colour, alpha=1 if front else 0.45, label=label, **style)
        point.lines[0].set_gid(f"run-{setting}")
        if (fact := published_number({str(k): v for k, v in first.dropna().items()})) is not None:
            hollow = "published" if "published" not in labelled else None
            labelled.add("published")
            axes.plot(
                [x],
                [fact["accuracy"]],
                marker=marker,
                markersize=9,
                fillstyle="none",
                color=colour,
                linestyle="none",
                label=hollow,
            )
        if pd.notna(first.get("groups")) and len(frame) <= 24:
            text = f"G={int(first['groups'])}"
            axes.annotate(text, (x, y), xytext=(7, 4), textcoords="offset points", fontsize=8, color=colour)
    front = [(x, y) for x, y in sorted(points) if not any(b > y and a <= x for a, b in points)]
    if len(front) > 1 and highlight is None:
        axes.step(*zip(*front, strict=True), where="post", color=_GREY, linewidth=1, zorder=0, label="best at its cost")
    positive = [c for c in costs if c > 0]
    edge = 10 ** np.floor(np.log10(min(positive))) if positive else 1.0
    axes.set_xscale("symlog", linthresh=edge, linscale=0.4)
    axes.set_xlim(-0.15 * edge, max([*costs, edge]) * 3)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %" if known else f"{value:.0e}"))
    axes.xaxis.set_minor_locator(NullLocator())
    images = int(frame["cost_images"].iloc[0])
    of = ", % of the backbone's for one image" if known else ""
    axes.set_xlabel(f"added MACs{of} (published convention, {images} images)")
    axes.set_ylabel("top-1 accuracy (%)" if frame["task"].iloc[0] == SINGLE_LABEL else "accuracy over attributes (%)")
    bars = "standard error over seeds" if several else "95 % interval over clients"
    axes.set_title(f"{frame['dataset'].iloc[0]}: accuracy against overhead (bars: {bars})", loc="left", fontsize=11)
    if crowded:
        figure.legend(frameon=False, fontsize=8.5, loc="outside right center")
    else:
        axes.legend(frameon=False, fontsize=8.5, loc="best")
    return figure


def draw_examples(examples: pd.DataFrame, row: dict[str, Any], path: Path, each: int = 2) -> Path | None:
    """Draw targets, and beside each the images of its client that count most, with weight or influence.

    Args:
        examples: a run's ``attribution.parquet``; without pictures nothing is drawn.
        row: the run's results.
        path: the PNG to write.
        each: examples of each case at most.
    """
    from PIL import Image

    targets = examples[examples["rank"] == 0]
    targets = targets[targets["thumbnail"].notna()].groupby("case", sort=False).head(each)
    if targets.empty:
        return None
    columns, rows, step = 1 + int(examples["rank"].max()), len(targets), 1.45
    figure, axes = new_figure(1.5 * columns, 1.82 * rows + 0.75)
    figure.set_layout_engine("none")  # one pair of axes for all pictures: forty pairs take a second to lay out
    axes.set_position((0.01, 0.0, 0.98, 1 - 0.55 / (1.82 * rows + 0.75)))
    text: dict[str, Any] = {"fontsize": 7.5, "ha": "center", "va": "bottom"}
    for line, (_, target) in enumerate(targets.iterrows()):
        images = examples[examples["example"] == target["example"]].sort_values("rank")
        for column, (_, image) in enumerate(images.iterrows()):
            x, y = 1.18 * column, step * line
            if image["thumbnail"] is not None:
                with Image.open(io.BytesIO(image["thumbnail"])) as picture:
                    small, (w, h) = max(picture.size) <= 40, (side / max(picture.size) / 2 for side in picture.size)
                    where = (x + 0.5 - w, x + 0.5 + w, y + 0.5 + h, y + 0.5 - h)
                    axes.imshow(picture, cmap="gray", extent=where, interpolation="nearest" if small else "bilinear")
            if image["rank"]:
                share = f"{100 * image['weight']:.0f} %, " if pd.notna(image["weight"]) else ""
                axes.text(x + 0.5, y - 0.02, f"{_short(image['truth'])}\n{share}{image['influence']:+.2f} nats", **text)
        before, after = (
            f"{_short(target[f'{who}_prediction'])} ({100 * target[f'{who}_confidence']:.0f} %)"
            for who in ("backbone", "method")
        )
        said = f"{target['case']}: {_short(target['truth'])}\n{before} \u2192\n{after}"
        axes.text(0.5, step * line - 0.02, said, **text)
    axes.set_xlim(-0.08, 1.18 * columns - 0.1)
    axes.set_ylim(step * rows - 0.4, -0.45)
    axes.set_axis_off()
    what = (
        "share of attention, influence on the answer" if examples["weight"].notna().any() else "influence on the answer"
    )
    title = f"{row['method']} on {row['dataset']}: targets, answer before and after;\n"
    figure.suptitle(f"{title}images of the client that count most ({what})", x=0.01, ha="left", fontsize=10)
    return save(figure, path)


def _short(text: str, length: int = 22) -> str:
    return text if len(text) <= length else text[: length - 1] + "\u2026"
