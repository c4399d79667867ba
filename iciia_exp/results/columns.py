"""Columns: the one list of figures of a run, where each is shown, and its printed form."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import pandas as pd
from rich.filesize import pick_unit_and_suffix

from iciia_exp.tasks import CLICK, QUALITY, Task

__all__ = ["COLUMNS", "DRAWN_TYPES", "Column", "averaged", "backbone_cell", "cell", "columns_of", "summary_keys"]

#: Types of the clients in ``drawn_clients.parquet`` (`iciia_exp.engine.evaluation.drawn_clients`).
DRAWN_TYPES = ("random_classes", "homogeneous", "drifting")

_ERRORS = ("se", "low", "high")  # what a figure has beside its value
_COSTS = ("cost", "number", "bytes", "macs")  # forms of what the backbone alone has none of


@dataclass(frozen=True)
class Column:
    """A figure of a run.

    Attributes:
        key: name in ``results.json``.
        title: in the tables and on the page of a report; empty: not shown there.
        form: printed form (`cell`).
        console: title in the table that a run prints; empty: not shown there.
        console_errors: which of ``<key>_se``, ``<key>_low`` and ``<key>_high`` that table shows.
        wandb: section of the wandb summary, where the figure is ``<wandb>/<key>``; empty: not logged.
        backbone: whether ``results.json`` has the figure of the backbone alone, as ``backbone_<key>``.
        interval: whether it has a 95 % interval over clients, as ``<key>_low`` and ``<key>_high``.
        total: whether it counts the backbone as well; it is shown in tables where settings differ in it.
        titles: other titles in some tasks, by task: correct decisions of a click task are AUC times images, say.
        task: the only task that has the figure; empty: all.
        seeds: the figure of several runs that differ in seeds alone: their ``mean``, or the value that they have in
            ``common``; ``setting`` for what `iciia_exp.results.tables.settings` adds by itself.
    """

    key: str
    title: str = ""
    form: Literal["percent", "gain", "nats", "harm", "cost", "number", "bytes", "macs", "text"] = "percent"
    console: str = ""
    console_errors: tuple[str, ...] = ()
    wandb: str = ""
    backbone: bool = False
    interval: bool = False
    total: bool = False
    titles: Mapping[str, str] = field(default_factory=dict)
    task: str = ""
    seeds: Literal["mean", "common", "setting"] = "mean"


#: All figures, in the order of the tables.
COLUMNS = [
    Column("runs", "runs", "number", console="runs", seeds="setting"),
    Column(
        "accuracy",
        "accuracy",
        console="accuracy",
        console_errors=("se",),
        wandb="test",
        backbone=True,
        interval=True,
        titles={CLICK: "GAUC", QUALITY: "win rate"},
    ),
    Column("published", "published", seeds="setting"),
    Column("gain", "gain", "gain", console="gain", console_errors=("se", "low", "high"), wandb="test", interval=True),
    Column(
        "client_accuracy",
        "client accuracy",
        console="client\naccuracy",
        wandb="test",
        backbone=True,
        titles={CLICK: "mean AUC", QUALITY: "by kind"},
    ),
    Column("client_gain", form="gain", wandb="test"),
    Column("group_accuracy", "mean of groups", wandb="test", total=True),
    Column("seen_accuracy", "the backbone's classes", wandb="test", backbone=True, total=True),
    Column("unseen_accuracy", "classes new to it", wandb="test", backbone=True, total=True),
    Column("cloud_share", "in the cloud", wandb="test", total=True),
    Column("delta_p", "delta P", console="delta P", wandb="test", task=QUALITY),
    Column("win_rate_at_half", "win rate at half", console="at half:\nwins", wandb="test", task=QUALITY),
    Column("delta_p_at_half", "delta P at half", console="at half:\ndelta P", wandb="test", task=QUALITY),
    Column("rank_correlation", "rank correlation", console="rank\ncorr.", wandb="test", interval=True, task=QUALITY),
    Column("quality_area", "area", wandb="test", task=QUALITY),
    Column("worst_decile", "worst decile", console="worst\ndecile", wandb="test", backbone=True),
    Column("gain_where_backbone_is_worst", form="gain"),
    Column("improved_share", wandb="test"),
    Column("harmed_share", "harmed (chance)", "harm", console="harmed\n(chance)", wandb="test"),
    Column("harmed_share_by_chance"),
    Column("log_loss", "log-loss", "nats", wandb="test", backbone=True),
    Column("ece", "ECE", backbone=True),
    Column("seconds_train", form="number"),
    Column("overhead_percent", "overhead", "cost", console="over-\nhead", wandb="cost", seeds="common"),
    Column("per_image_overhead_percent", "per image", "cost", console="per\nimage", wandb="cost", seeds="common"),
    Column("streaming_overhead_percent", "one more image", "cost", wandb="cost", seeds="common"),
    Column("latency_percent", "time of one more image", "cost", seeds="common"),
    Column("parameters", "parameters", "number", wandb="cost", seeds="common"),
    Column("state_bytes", "kept", "bytes", seeds="common"),
    Column("client_down_bytes", "down, a client", "bytes", wandb="cost", seeds="common", total=True),
    Column("client_up_bytes", "up, a client", "bytes", wandb="cost", seeds="common", total=True),
    Column("rounds_down_bytes", "down, all rounds", "bytes", wandb="cost", total=True),
    Column("rounds_up_bytes", "up, all rounds", "bytes", wandb="cost", total=True),
    Column("rounds_device_macs", "device MACs, all rounds", "macs", wandb="cost", total=True),
    Column("client_device_macs", "learning, device MACs", "macs", wandb="cost", seeds="mean", total=True),
    Column("training_bytes", "learning, device memory", "bytes", wandb="cost", seeds="common", total=True),
    Column("request_down_bytes", "down, a request", "bytes", wandb="cost", seeds="common", total=True),
    Column("request_up_bytes", "up, a request", "bytes", wandb="cost", seeds="common", total=True),
    Column("request_device_macs", "a request, device MACs", "macs", wandb="cost", seeds="common", total=True),
    Column("request_cloud_macs", "a request, cloud MACs", "macs", wandb="cost", seeds="common", total=True),
    Column("leaves_device", "leaves the device", "text", seeds="common", total=True),
]


def columns_of(task: Task) -> list[Column]:
    """Return all figures with their titles in a task."""
    found = []
    for column in COLUMNS:
        if column.task in ("", task):
            title = column.titles.get(task)
            found.append(replace(column, title=title, console=title.replace(" ", "\n")) if title else column)
    return found


def averaged() -> list[str]:
    """Return the keys that are averaged over seeds, those of the backbone last."""
    means = [column for column in COLUMNS if column.seeds == "mean"]
    return [*(column.key for column in means), *(f"backbone_{column.key}" for column in means if column.backbone)]


def summary_keys() -> dict[str, str]:
    """Return the keys of a wandb run's summary, and the key in ``results.json`` of each."""
    logged = [column for column in COLUMNS if column.wandb]
    own = {f"{column.wandb}/{column.key}": column.key for column in logged}
    return own | {f"backbone/{column.key}": f"backbone_{column.key}" for column in logged if column.backbone}


def backbone_cell(row: pd.Series, column: Column, errors: tuple[str, ...] = _ERRORS) -> str:
    """Return a column's text in the line of the backbone alone; 0 for costs that it has none of.

    ``row`` is that of `iciia_exp.results.tables.backbone_line`, ``errors`` as in `cell`.
    """
    if column.backbone:
        return cell(row, f"backbone_{column.key}", column.form, errors)
    return "0" if column.form in _COSTS and not column.total else ""


def cell(row: pd.Series, key: str, form: str = "percent", errors: tuple[str, ...] = _ERRORS) -> str:
    """Return a figure as text, with its standard error or interval where the row has one.

    Args:
        row: a row of `iciia_exp.results.tables.settings`.
        key: of the figure.
        form: ``percent``, ``gain`` (percent with a sign), ``nats``, ``harm`` (percent, and the percentage by chance),
            ``cost`` (percent of the backbone's cost), ``number``, ``bytes`` (in KiB, MiB, ...), ``macs`` (in K, M,
            ...) or ``text``.
        errors: which of ``<key>_se``, ``<key>_low`` and ``<key>_high`` to show.
    """
    value = row.get(key)
    if pd.isna(value):
        return "–"
    if form == "text":
        return str(value)
    if form == "number":
        return f"{value:,.0f}"
    if form == "cost":
        return "0" if value == 0 else f"{value:.2g} %" if value < 10 else f"{value:,.0f} %"
    if form == "bytes":
        unit, suffix = pick_unit_and_suffix(int(value), ["B", "KiB", "MiB", "GiB"], 1024)
        return f"{value / unit:.{int(unit > 1024)}f} {suffix}"
    if form == "macs":
        unit, suffix = pick_unit_and_suffix(int(value), ["", "K", "M", "G", "T"], 1000)
        return f"{value / unit:.{int(unit > 1)}f} {suffix}".rstrip()
    if form == "harm":
        return f"{100 * value:.1f} ({100 * row[f'{key}_by_chance']:.1f})"
    scale, digits, sign = (1, 2, "z") if form == "nats" else (100, 1, "+z" if form == "gain" else "z")  # z: no -0.0
    text = f"{scale * value:{sign}.{digits}f}"
    error, low, high = (row.get(f"{key}_{end}", np.nan) if end in errors else np.nan for end in ("se", "low", "high"))
    if pd.notna(error):
        return f"{text} ± {scale * error:.{digits}f}"
    return text if pd.isna(low) else f"{text} [{scale * low:{sign}.{digits}f}, {scale * high:{sign}.{digits}f}]"
