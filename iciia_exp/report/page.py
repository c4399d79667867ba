"""HTML page: one self-contained file with a table to sort and filter, figures, and the clients of a run."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd

from iciia_exp import __version__
from iciia_exp.artifacts import read_json
from iciia_exp.report.examples import examples_of
from iciia_exp.report.figures import all_figures
from iciia_exp.report.heterogeneity import PartitionSweep, draw_heterogeneity
from iciia_exp.report.text import summary
from iciia_exp.results.plots import draw_accuracy_vs_overhead
from iciia_exp.results.tables import read_table

__all__ = ["page"]

#: Clients of a run that the page shows, at most: the ends of the list sorted by gain.
_CLIENTS = 1000

#: Settings of a table that the page has clients of, at most: the most accurate.
_WITH_CLIENTS = 100

#: Settings of a table that the page has attribution examples of, at most: the most accurate; 200 KiB each.
_EXAMPLES = 20

#: Columns of the table by which it sorts as numbers, and where the numbers are.
_NUMBERS = {
    "runs": "runs",
    "accuracy": "accuracy",
    "published": "published",
    "gain": "gain",
    "client accuracy": "client_accuracy",
    "worst decile": "worst_decile",
    "harmed (chance)": "harmed_share",
    "log-loss": "log_loss",
    "ECE": "ece",
    "overhead": "overhead_percent",
    "per image": "per_image_overhead_percent",
    "one more image": "streaming_overhead_percent",
    "parameters": "parameters",
    "kept": "state_bytes",
}


def page(comparisons: list[tuple[str, pd.DataFrame]], sweeps: Sequence[PartitionSweep] = ()) -> str:
    """Return the page.

    Args:
        comparisons: titles, and tables of settings (`iciia_exp.results.tables.settings`).
        sweeps: over a number of the partition (`iciia_exp.report.heterogeneity.partition_sweeps`).
    """
    sections, data = [], []
    for number, (title, table) in enumerate(comparisons):
        drawn = "".join(f'<figure id="{number}-{name}">{svg}</figure>' for name, svg in _figures(table, title))
        sections.append(
            f'<section data-number="{number}"><h2>{escape(title)}</h2>'
            f'<p class="note">{escape(_note(table))}</p><input type="search" placeholder="filter: iciia G=16" '
            f'aria-label="filter rows"><div class="wide"><table></table></div><div class="clients"></div>'
            f'<div class="figures">{drawn}</div></section>'
        )
        data.append(_rows(table))
    for sweep in sweeps:
        drawn = _svg(draw_heterogeneity(sweep), {})
        sections.append(f"<section><h2>{escape(sweep.title)}</h2><figure>{drawn}</figure></section>")
    template = (files("iciia_exp.report") / "page.html").read_text(encoding="utf-8")
    # "</" must not end the script early
    content = json.dumps(data, allow_nan=False).replace("</", "<\\/")
    parts = {"@@SECTIONS@@": "\n".join(sections), "@@DATA@@": content, "@@VERSION@@": __version__}
    return re.sub("|".join(parts), lambda match: parts[match.group()], template)


def _note(table: pd.DataFrame) -> str:
    first = table.iloc[0]
    return (
        f"{first['test_clients']:,} test clients, {first['test_images']:,} test images. Percent; ± standard error over "
        "runs, [95 % interval over clients]. Overhead in multiply-accumulates, of the backbone's for one image: "
        f"{first['cost_images']} images together, each of them, one more where state is kept. * none of the same cost "
        "or less is better. A click on a row shows its clients, and examples of what its answers owe to which images."
    )


def _rows(table: pd.DataFrame) -> dict[str, Any]:
    """Return the table's head, and of every row its texts, what they sort by, its clients and its examples."""
    text = summary(table)
    real = table[table["method"] != "backbone"].reset_index(drop=True)
    rows = [{"cells": list(text.iloc[0]), "sort": [None] * len(text.columns), "clients": None, "examples": None}]
    for i, setting in real.iterrows():
        values = [setting.get(_NUMBERS.get(column, "")) for column in text.columns]
        numbers = [None if value is None or pd.isna(value) else float(value) for value in values]
        cells, folders = list(text.iloc[int(str(i)) + 1]), setting["run_dirs"]
        examples = examples_of(folders[0]) if len(rows) <= _EXAMPLES else None
        clients = _clients(folders) if len(rows) <= _WITH_CLIENTS else None
        rows.append({"cells": cells, "sort": numbers, "clients": clients, "examples": examples})
    return {"head": list(text.columns), "rows": rows}


def _clients(folders: list[Path]) -> list[list[Any]] | None:
    """Return the clients of the first run, least gain first: name, type, images, classes, both accuracies and the gain.

    Of very many, both ends.
    """
    if (table := read_table(folders[0] / "clients.parquet")) is None:
        return None
    table = table.assign(
        backbone=100 * table["backbone_correct"] / table["decisions"],
        method=100 * table["method_correct"] / table["decisions"],
    )
    table = table.assign(gain=table["method"] - table["backbone"]).sort_values("gain", kind="stable")
    if len(table) > _CLIENTS:
        table = pd.concat([table.head(_CLIENTS // 2), table.tail(_CLIENTS // 2)])
    numbers = table[["backbone", "method", "gain"]].round(1)
    columns = ["client", "client_type", "images", "classes"]
    return pd.concat([table[columns], numbers], axis=1).to_numpy(dtype=object).tolist()


def _figures(table: pd.DataFrame, title: str) -> Iterator[tuple[str, str]]:
    """Yield names and SVG of the figures; points of the first say what they are."""
    rows = [read_json(folder / "results.json") for folders in table["run_dirs"] for folder in folders]
    labels = {s["setting_digest"]: f"{s['label']}: {100 * s['accuracy']:.1f} %" for _, s in table.iterrows()}
    yield "accuracy_vs_overhead", _svg(draw_accuracy_vs_overhead(rows), labels)
    for name, figure in all_figures(table, title.split(",")[0]):
        if figure is not None:
            yield name, _svg(figure, {})


def _svg(figure: Any, labels: dict[str, str]) -> str:
    """Return a figure as SVG with text as text; ids ``run-<key>`` and ``hover:<label>`` become tooltips."""
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "report"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'<g id="hover:([^"]*)">', r"<g><title>\1</title>", text)
    for key, label in labels.items():
        text = text.replace(f'<g id="run-{key}">', f'<g id="run-{key}"><title>{escape(label)}</title>')
    return text
