"""Parts of a figure: colours and markers, axes, legends, tooltips, and writing it."""

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
from iciia_exp.tasks import TASKS

__all__ = [
    *("BASELINE", "BLUE", "COLOURS", "DARK", "GREY", "MOST_LINES", "ORANGE"),
    *("cost_axis", "draw_setting", "hover", "legend", "legend_entries", "line_styles", "measure", "new_figure"),
    *("new_panels", "save", "wrapped", "write_figure"),
]

log = logging.getLogger(__name__)

# Colours that differ in lightness too, so that the plots read in grey.
BLUE, ORANGE, GREY, DARK = "#1f5fa8", "#e8912d", "#9a9a9a", "#333333"
COLOURS = [BLUE, ORANGE, "#4c9f70", "#7b4ea3", "#b03a48"]  # five, and eight markers: forty pairs
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
    form = "{:g} %" if percent else "{:.0e}"
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: form.format(value) if value or percent else "0"))
    axes.xaxis.set_minor_locator(NullLocator())
    low, high = axes.get_xlim()  # a tick between 0 and the edge would be printed over the 0
    axes.set_xticks([tick for tick in axes.get_xticks() if (tick == 0 or tick >= edge) and low <= tick <= high])


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
        styles.append({"color": COLOURS[colour % len(COLOURS)], "marker": marker})
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
