"""HTML page: one self-contained file with sortable tables, figures, and the clients and examples of every run."""

import base64
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from iciia_exp import __version__
from iciia_exp.report.figures import all_figures
from iciia_exp.report.heterogeneity import PartitionSweep, draw_heterogeneity
from iciia_exp.report.text import note, summary
from iciia_exp.results.columns import columns_of
from iciia_exp.results.drawing import write_figure
from iciia_exp.results.tables import read_table

__all__ = ["page"]

#: Clients of a run on the page, at most: both ends of the list sorted by gain.
_CLIENTS = 1000

#: Settings of a table with clients, and with attribution examples (200 KiB each), at most: the most accurate.
_WITH_CLIENTS, _WITH_EXAMPLES = 100, 20


def page(comparisons: list[tuple[str, pd.DataFrame]], sweeps: Sequence[PartitionSweep] = ()) -> str:
    """Return the page.

    Args:
        comparisons: titles, and tables of settings (`iciia_exp.results.tables.settings`).
        sweeps: over a number of the partition (`iciia_exp.report.heterogeneity.partition_sweeps`).
    """
    environment = Environment(
        loader=PackageLoader("iciia_exp", "report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False}
    return environment.get_template("page.html").render(
        version=__version__,
        comparisons=[
            {
                "title": title,
                "note": note(table),
                "data": _rows(table),
                "figures": [(name, _svg(drawn)) for name, drawn in all_figures(table, title)],
            }
            for title, table in comparisons
        ],
        sweeps=[(sweep.title, _svg(draw_heterogeneity(sweep))) for sweep in sweeps],
    )


def _rows(table: pd.DataFrame) -> dict[str, Any]:
    """Return the table's head, and of every row its texts, the numbers it sorts by, its clients and its examples."""
    text = summary(table)
    alone, *lines = text.to_numpy().tolist()
    rows = [{"cells": alone, "sort": [None] * len(alone), "clients": None, "examples": None, "routes": None}]
    real = table[table["method"] != "backbone"]
    keys = {column.title: column.key for column in columns_of(table["task"].iloc[0])}
    for number, (cells, (_, setting)) in enumerate(zip(lines, real.iterrows(), strict=True)):
        values = [setting.get(keys.get(title)) for title in text.columns]
        values = [None if isinstance(value, str) else value for value in values]
        folder = setting["run_dirs"][0]
        rows.append(
            {
                "cells": cells,
                "sort": [None if pd.isna(value) else float(value) for value in values],
                "clients": _clients(folder) if number < _WITH_CLIENTS else None,
                "examples": _examples(folder) if number < _WITH_EXAMPLES else None,
                "routes": _routes(folder) if number < _WITH_EXAMPLES else None,
            }
        )
    return {"head": list(text.columns), "rows": rows}


def _clients(folder: Path) -> list[list[Any]] | None:
    """Return a run's clients, least gain first: name, type, images, classes, both accuracies in percent and the gain.

    Of very many clients, both ends.
    """
    if (table := read_table(folder / "clients.parquet")) is None:
        return None
    for who in ("backbone", "method"):
        table[who] = 100 * table[f"{who}_correct"] / table["decisions"]
    table["gain"] = table["method"] - table["backbone"]
    table = table.sort_values("gain", kind="stable").round({"backbone": 1, "method": 1, "gain": 1})
    if len(table) > _CLIENTS:
        table = pd.concat([table.head(_CLIENTS // 2), table.tail(_CLIENTS // 2)])
    columns = ["client", "client_type", "images", "classes", "backbone", "method", "gain"]
    return table[columns].to_numpy(dtype=object).tolist()


def _examples(folder: Path) -> list[dict[str, Any]] | None:
    """Return a run's attribution examples, each a target and its client's images by influence; None without any."""
    if (table := read_table(folder / "attribution.parquet")) is None:
        return None
    examples = []
    for _, rows in table.sort_values("rank", kind="stable").groupby("example"):
        target, *others = rows.to_dict("records")
        examples.append(
            {
                **{key: str(target[key]) for key in ("case", "client", "truth")},
                **{key: int(target[key]) for key in ("cases", "drawn")},
                "before": [str(target["backbone_prediction"]), _percent(target["backbone_confidence"])],
                "after": [str(target["method_prediction"]), _percent(target["method_confidence"])],
                "picture": _data_url(target["thumbnail"]),
                "others": [
                    {
                        "truth": str(other["truth"]),
                        "weight": None if pd.isna(other["weight"]) else _percent(other["weight"]),
                        "influence": round(float(other["influence"]), 4),
                        "picture": _data_url(other["thumbnail"]),
                    }
                    for other in others
                ],
            }
        )
    return examples


def _routes(folder: Path) -> list[dict[str, Any]] | None:
    """Return a router's examples: prompts with both pictures, the answer, and each metric; None without any."""
    if (table := read_table(folder / "route_examples.parquet")) is None or not len(table):
        return None
    return [
        {
            **{key: str(row[key]) for key in ("case", "prompt", "side")},
            **{key: int(row[key]) for key in ("cases", "drawn")},
            **{key: _percent(row[key]) for key in ("score", "superiority")},
            "pictures": {side: _data_url(row[f"{side}_picture"]) for side in ("device", "cloud")},
            "metrics": [
                {
                    "name": name,
                    "label": _percent(found["label"]),
                    "predicted": None if found["predicted"] is None else _percent(found["predicted"]),
                    "tokens": [str(token) for token in found["tokens"]],
                }
                for name, found in json.loads(row["metrics"]).items()
            ],
        }
        for row in table.to_dict("records")
    ]


def _percent(share: float) -> float:
    return round(100 * float(share), 1)


def _data_url(picture: bytes | None) -> str | None:
    if not isinstance(picture, bytes):
        return None
    kind = "png" if picture.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


def _svg(figure: Any) -> str:
    """Return a figure as SVG with text as text, escaped by matplotlib; ids ``hover:<label>`` become tooltips."""
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "report"}):
        write_figure(figure, out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return re.sub(r'<g id="hover:([^"]*)">', r"<g><title>\1</title>", text[text.index("<svg") :])
