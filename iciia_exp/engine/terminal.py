"""Terminal: log lines and tables on standard output."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table

from iciia_exp.results.labels import label_of, unique_rows, varying

__all__ = ["console", "partition_table", "result_table", "setup_logging"]


def console() -> Console:
    """Return a console on the current standard output, 120 columns wide where that is no terminal."""
    out = Console(highlight=False)
    return out if out.is_terminal else Console(highlight=False, width=120)


class _Stdout(logging.StreamHandler):
    """Writes each record to the current standard output; warnings and errors begin with their level."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stdout
        super().emit(record)

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return f"{record.levelname.lower()}: {text}" if record.levelno >= logging.WARNING else text


def setup_logging() -> None:
    """Send the package's log messages to standard output; may be called again."""
    logger = logging.getLogger("iciia_exp")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    if not any(isinstance(h, _Stdout) for h in logger.handlers):
        logger.addHandler(_Stdout())


def partition_table(statistics: pd.DataFrame) -> Table:
    """Return a table of the numbers of clients, images and classes of each role."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("partition")
    for name in ("clients", "images", "distinct", "images per client", "classes per client"):
        table.add_column(name, justify="right")
    for row in statistics.to_dict("records"):
        spread = [f"{row[f'{k}_mean']:.1f} ± {row[f'{k}_sd']:.1f}" for k in ("images", "classes")]
        counts = [f"{row[k]:,}" for k in ("clients", "images", "distinct_images")]
        table.add_row(row["role"], *counts, *spread)
    return table


def _percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f}"


def _overhead(value: float | None) -> str:
    if value is None:
        return "–"
    return "0" if value == 0 else f"{value:.2g} %" if value < 10 else f"{value:,.0f} %"


def _cells(rows: Sequence[dict[str, Any]], several: bool, keys: dict[str, list[str]]) -> list[str]:
    """Return the cells of a line, averaged over runs that differ in seeds alone."""
    frame = pd.DataFrame(list(rows))
    mean = frame.mean(numeric_only=True)

    def spread(key: str) -> str:
        if len(frame) > 1:
            return f" ± {100 * frame[key].std(ddof=1) / len(frame) ** 0.5:.1f}"
        return f" [{100 * mean[f'{key}_low']:+.1f}, {100 * mean[f'{key}_high']:+.1f}]" if key == "gain" else ""

    return [
        label_of(rows[0], keys),
        *[str(len(rows))] * several,
        _percent(mean["accuracy"]) + spread("accuracy"),
        f"{100 * mean['gain']:+.1f}" + spread("gain"),
        _percent(mean["client_accuracy"]),
        _percent(mean["worst_decile"]),
        f"{_percent(mean['harmed_share'])} ({_percent(mean['harmed_share_by_chance'])})",
        _overhead(rows[0]["overhead_percent"]),
        _overhead(rows[0]["per_image_overhead_percent"]),
    ]


def result_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Return a table in percent: a line of the backbone, and a line per setting, averaged over seeds.

    Gains are over the backbone on the same images. The interval of one run is the 95 % bootstrap over clients; ``±`` of
    several runs is the standard error over runs. The share of harmed clients by chance alone is in brackets.

    Args:
        rows: results with the same `base_of`.
    """
    several = len({r["digest"] for r in rows}) > len({r["setting_digest"] for r in rows})
    table = Table(box=None, pad_edge=False, padding=(0, 0, 0, 1), header_style="bold")  # 91 columns of text
    table.add_column("method", overflow="fold")
    gain = "gain\n± s.e." if several else "gain\n[95 %]"
    averages = ("client\naccuracy", "worst\ndecile", "harmed\n(chance)")
    for name in ("runs",) * several + ("accuracy", gain, *averages, "over-\nhead", "per\nimage"):
        table.add_column(name, justify="right", overflow="fold")
    keys = varying(rows)
    bases = list({r["partition_digest"]: r for r in rows}.values())
    base = pd.DataFrame(bases).mean(numeric_only=True)
    cells = [_percent(base[f"backbone_{k}"]) for k in ("accuracy", "client_accuracy", "worst_decile")]
    name = f"{rows[0]['backbone']} alone"
    table.add_row(name, *[str(len(bases))] * several, cells[0], "", cells[1], cells[2], "", "0", "0")
    settings: dict[str, list[dict[str, Any]]] = {}
    for row in unique_rows(rows):  # a run that several jobs asked for counts once
        if row["method"] != "backbone":
            settings.setdefault(row["setting_digest"], []).append(row)
    for _, runs in sorted(settings.items(), key=lambda item: item[1][0]["sequence_macs"]):
        table.add_row(*_cells(runs, several, keys))
    return table
