"""Plots: gain per client, accuracy by history, accuracy against overhead, examples, and the parts of a figure."""

import io
import logging
import re
import textwrap
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import pandas as pd

from iciia_exp.artifacts import atomic_write
from iciia_exp.errors import printable
from iciia_exp.results.summary import ALL
from iciia_exp.results.tables import backbone_line, settings
from iciia_exp.tasks import CLICK, TASKS

__all__ = [
    *("BASELINE", "BLUE", "MOST_LINES", "ORANGE", "draw_setting", "gains", "hover", "legend", "line_styles"),
    *("accuracy_vs_history", "accuracy_vs_overhead", "accuracy_vs_rounds", "draw_accuracy_vs_overhead"),
    *(
        "draw_examples",
        "draw_routes",
        "gain_per_client",
        "legend_entries",
        "measure",
        "new_figure",
        "new_panels",
        "quality_vs_share",
        "save",
        "wrapped",
        "write_figure",
    ),
]

log = logging.getLogger(__name__)

# Colours that differ in lightness too, so that the plots read in grey.
BLUE, ORANGE, GREY, DARK = "#1f5fa8", "#e8912d", "#9a9a9a", "#333333"
_COLOURS = [BLUE, ORANGE, "#4c9f70", "#7b4ea3", "#b03a48"]  # five, and eight markers: forty pairs
_MARKERS = ["o", "s", "^", "D", "v", "P", "X", "*"]

#: Characters that the font lacks, of which a line has been logged.
_lacking: set[str] = set()

#: Line of the backbone's accuracy.
BASELINE = {"color": DARK, "linestyle": "--", "linewidth": 1.2}

#: Settings in one plot, at most: more are not told apart.
MOST_LINES = 10


def new_figure(
    title: str = "", xlabel: str = "", ylabel: str = "", width: float = 7.0, height: float = 4.2
) -> tuple[Any, Any]:
    """Return an empty figure, its size in inches, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")  # no pyplot: no global state, no window
    axes = figure.subplots()
    _make_plain(axes)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.set_title(title, loc="left", fontsize=11)
    return figure, axes


def _make_plain(axes: Any) -> None:
    """Leave two of the frame's sides, and draw a horizontal grid below the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)


def new_panels(title: str, rows: int, columns: int, sharex: bool = True) -> tuple[Any, Any]:
    """Return an empty figure and its axes, [rows, columns]."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.1 * columns, 2.3 * rows + 1.1), dpi=150, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=sharex)
    for axes in panels.flat:
        _make_plain(axes)
        axes.tick_params(labelsize=8, labelbottom=True)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return figure, panels


def legend(axes: Any, beside: bool) -> None:
    """Draw the legend in the plot, or ``beside`` it on a larger figure, where a long one hides no line."""
    handles, names = legend_entries(axes)
    if beside:
        axes.figure.set_size_inches(9.2, 4.8)
        axes.figure.legend(handles, names, frameon=False, fontsize=8.5, loc="outside right center")
    else:
        axes.legend(handles, names, frameon=False, fontsize=8.5, loc="best")


def legend_entries(axes: Any) -> tuple[list[Any], list[str]]:
    """Return the lines of a legend, and their labels `wrapped`."""
    handles, names = axes.get_legend_handles_labels()
    return handles, [wrapped(name) for name in names]


def wrapped(label: str) -> str:
    """Return the label of a setting in at most three lines, so that a long one leaves room for the data.

    >>> wrapped("client_profile change=0.05")
    'client_profile change=0.05'
    """
    return "\n".join(textwrap.wrap(label, 46, max_lines=3, placeholder=" …")) or label


def cost_axis(axes: Any, cost: pd.Series, percent: bool = True) -> None:
    """Scale the x axis for costs: logarithmic, with a place for 0."""
    from matplotlib.ticker import FuncFormatter, NullLocator

    edge = 10 ** np.floor(np.log10(cost[cost > 0].min())) if (cost > 0).any() else 1.0
    axes.set_xscale("symlog", linthresh=edge, linscale=0.4)
    axes.set_xlim(-0.15 * edge, max([*cost, edge]) * 3)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %" if percent else f"{value:.0e}"))
    axes.xaxis.set_minor_locator(NullLocator())


def hover(artist: Any, text: str) -> None:
    """Give a line or a point a tooltip: in SVG its id is ``hover:<text>``, which the page makes a tooltip."""
    artist.set_gid(f"hover:{text}")


def save(figure: Any, path: Path) -> Path:
    """Write a figure in the format of the file's ending."""
    with atomic_write(path, "wb") as file:
        write_figure(figure, file, format=path.suffix[1:])
    return path


def write_figure(figure: Any, file: IO[Any], **options: Any) -> None:
    """Write a figure, whose texts are shown as they are: ``$`` begins no formula, and control characters are escaped.

    Characters that the font lacks are named in one line, once a process.

    Args:
        figure: of matplotlib.
        file: open for writing.
        options: of ``Figure.savefig``.
    """
    from matplotlib.axis import Tick
    from matplotlib.text import Text

    numbers = {id(text) for tick in figure.findobj(Tick) for text in (tick.label1, tick.label2)}
    for text in figure.findobj(Text):
        if id(text) not in numbers:
            text.set_parse_math(False)
            text.set_text(printable(text.get_text()))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        figure.savefig(file, **options)
    lacking = set()
    for warning in caught:
        if (found := re.match(r"Glyph (\d+) .*missing from", str(warning.message), re.DOTALL)) is not None:
            lacking.add(chr(int(found[1])))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    if new := sorted(lacking - _lacking):
        _lacking.update(new)
        log.warning("plots: the font lacks %s; a box takes their place", " ".join(new[:20]))


def line_styles(lines: Sequence[str], methods: Iterable[str]) -> list[dict[str, str]]:
    """Return colour and marker of every line of a figure.

    A method has one colour in all figures of a comparison, and its lines have different markers. Where all lines are of
    one method, they differ in colour, too.

    Args:
        lines: the method of every line.
        methods: all methods of the comparison, in the order of its table: neighbours have different colours.
    """
    numbers = {method: number for number, method in enumerate(m for m in dict.fromkeys(methods) if m != "backbone")}
    seen: Counter[str] = Counter()
    styles = []
    for method in lines:
        number, variant = numbers.get(method, 0), seen[method]
        colour = number if len(set(lines)) > 1 else number + variant
        marker = _MARKERS[(number + variant) % len(_MARKERS)]
        styles.append({"color": _COLOURS[colour % len(_COLOURS)], "marker": marker})
        seen[method] += 1
    return styles


def draw_setting(axes: Any, x: Any, table: pd.DataFrame, label: str, key: str = "accuracy", **style: Any) -> None:
    """Draw the column ``key`` of a table in percent, with standard errors, as a line of a style.

    Accuracies of the paper (column ``published``) are a second, hollow line.
    """
    style = {"capsize": 3, "label": label} | style
    line = axes.errorbar(x, 100 * table[key], 100 * table[f"{key}_se"].fillna(0), **style)
    hover(line.lines[0], label)
    if "published" in table and table["published"].notna().any():
        style |= {"fillstyle": "none", "linestyle": ":", "label": f"{label}, published"}
        axes.errorbar(x, 100 * table["published"], 100 * table["published_se"].fillna(0), **style)


def measure(table: pd.DataFrame) -> str:
    """Return what accuracy is in the task of some runs, in percent, as the label of an axis."""
    return f"{TASKS[table['task'].iloc[0]].measure} (%)"


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
            "unseen_accuracy": ("classes new to it", _COLOURS[2]),
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


def draw_routes(routes: pd.DataFrame, pictures: Any, row: dict[str, Any], path: Path, each: int = 5) -> Path | None:
    """Draw prompts with the pictures of both models: those that most clearly go to the cloud, and those that stay.

    Args:
        routes: the run's ``routes.parquet``.
        pictures: the stored pictures of all prompts, [M, 2, P, H, W, 3]; None where they were thrown away.
        row: the run's results.
        path: the PNG to write.
        each: prompts of each side, at most.
    """
    if pictures is None:
        return None
    ordered = routes.sort_values("score", kind="stable")
    groups = {"cloud": ordered[ordered["cloud"]].head(each), "device": ordered[~ordered["cloud"]].tail(each).iloc[::-1]}
    columns = [(side, item) for side, part in groups.items() for _, item in part.iterrows()]
    if not columns:
        return None
    wide, high = 1.12 * len(columns) + 0.25, 3.45
    figure, axes = new_figure(width=1.2 * wide, height=1.2 * high + 0.4)
    figure.set_layout_engine("none")
    axes.set_position((0.0, 0.0, 1.0, 1.2 * high / (1.2 * high + 0.4)))
    text: dict[str, Any] = {"fontsize": 6.5, "ha": "center"}
    for place, (side, item) in enumerate(columns):
        x = 1.12 * place
        for number, who in enumerate(("device", "cloud")):
            y = 1.0 + 1.2 * number
            where = (x, x + 1, y + 1, y)
            axes.imshow(pictures[int(item["image"]), number, 0], extent=where, interpolation="nearest")
            if who == side:
                frame = {"color": ORANGE, "linewidth": 2}
                axes.plot([x, x + 1, x + 1, x, x], [y, y, y + 1, y + 1, y], **frame)
        axes.text(x + 0.5, 0.92, "\n".join(textwrap.wrap(str(item["prompt"]), 19)[:6]), va="bottom", **text)
        scores = f"score {item['score']:.2f}\ntrue {item['superiority']:.2f}"
        axes.text(x + 0.5, 3.27, scores, va="top", **text)
    for number, who in enumerate(("device", "cloud")):
        axes.text(-0.06, 1.5 + 1.2 * number, who, fontsize=8, ha="right", va="center", rotation=90)
    axes.set(xlim=(-0.25, 1.12 * len(columns)), ylim=(3.7, 0.25))
    axes.set_axis_off()
    title = f"{row['method']} on {row['dataset']}: pictures of both models, and who answers (framed)"
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
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
    low, high, mean = (100 * row[k] for k in ("client_gain_low", "client_gain_high", "client_gain"))
    axes.axhspan(low, high, color=DARK, alpha=0.15, linewidth=0, zorder=0)
    mean_label = f"mean {mean:+.1f} points (95 % interval {low:+.1f} to {high:+.1f})"
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
    points = table[~table["oracle"] & (table["method"] != "backbone")]
    in_percent = table["backbone_macs"].notna().all()  # unknown for features that were made elsewhere
    cost = points["overhead_percent" if in_percent else "sequence_macs"]
    methods = sorted(set(points["method"]))
    styles = dict(zip(methods, line_styles(methods, table["method"]), strict=True))
    crowded = len(methods) > 6
    first = table.iloc[0]
    seeds, clients = "standard error over seeds", "95 % interval over clients"
    several = points["runs"] > 1
    bars = (seeds if several.all() else f"{seeds}; of one run {clients}") if several.any() else clients
    percent = ", % of the backbone's for one image" if in_percent else ""
    figure, axes = new_figure(
        f"{first['dataset']}: accuracy against overhead (bars: {bars})",
        f"added MACs{percent} (published convention, {first['cost_images']} images)",
        measure(table),
    )
    backbone = backbone_line(table)
    base = 100 * backbone["backbone_accuracy"]
    axes.axhline(base, **BASELINE, label=f"{first['backbone']} alone: {base:.1f} %")
    if backbone["runs"] == 1:
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
        if point["runs"] == 1:
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


def draw_examples(examples: pd.DataFrame, row: dict[str, Any], path: Path, each: int = 2) -> Path | None:
    """Draw targets, and beside each the images of its client with most influence, with weight and influence.

    Args:
        examples: the run's ``attribution.parquet``; without pictures nothing is drawn.
        row: the run's results.
        path: the PNG to write.
        each: examples of each case, at most.

    Returns:
        ``path``; None where nothing is drawn.
    """
    from PIL import Image

    targets = examples[examples["rank"] == 0]
    targets = targets[targets["thumbnail"].notna()].groupby("case", sort=False).head(each)
    if targets.empty:
        return None
    columns, rows, step = 1 + int(examples["rank"].max()), len(targets), 1.45
    figure, axes = new_figure(width=1.5 * columns, height=1.82 * rows + 0.75)
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
        title = f"{target['case']}: {_short(target['truth'])}\n{before} \u2192\n{after}"
        axes.text(0.5, step * line - 0.02, title, **text)
    axes.set(xlim=(-0.08, 1.18 * columns - 0.1), ylim=(step * rows - 0.4, -0.45))
    axes.set_axis_off()
    what = "share of attention, " * bool(examples["weight"].notna().any()) + "influence on the answer"
    title = f"{row['method']} on {row['dataset']}: targets, answer before and after;\n"
    figure.suptitle(f"{title}images of the client that count most ({what})", x=0.01, ha="left", fontsize=10)
    return save(figure, path)


def _short(text: str, length: int = 22) -> str:
    return text if len(text) <= length else text[: length - 1] + "\u2026"
