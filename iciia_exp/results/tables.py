"""Tables over finished runs: one row per run, and one per setting with its seeds averaged.

Legend: R runs of a setting.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from iciia_exp.errors import UserError, first_line, nearest
from iciia_exp.results.columns import AVERAGED, SHARED
from iciia_exp.results.labels import base_of, label_of, unique_rows, varying
from iciia_exp.results.published import published_number
from iciia_exp.results.summary import ClientCounts, averages, summarise

__all__ = [
    "averages_by_history",
    "comparisons",
    "history_of",
    "history_summary",
    "load_runs",
    "read_table",
    "select",
    "settings",
]


def load_runs(folders: Iterable[Path]) -> list[dict[str, Any]]:
    """Return the rows of all finished runs in the folders, at any depth, each with its ``run_dir``; each run once."""
    rows: dict[str, dict[str, Any]] = {}
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; give a run directory, or a folder with some (outputs)")
        paths = sorted(folder.rglob("results.json"))
        if not paths:
            raise UserError(f"{folder}: no finished runs in it (no results.json); repeat their command to finish them")
        for path in paths:
            try:
                row = json.loads(path.read_text(encoding="utf-8"))
                rows.setdefault(row["evaluation_digest"], row | {"run_dir": path.parent})
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise UserError(f"{path}: is not the results of a run ({error})") from error
    return sorted(rows.values(), key=lambda row: str(row.get("finished")))  # of several evaluations the newest counts


def read_table(path: Path) -> pd.DataFrame | None:
    """Return one of a run's tables; None where there is none, a `UserError` that names a damaged one."""
    if not path.is_file():
        return None
    try:
        return pd.read_parquet(path)
    except Exception as error:  # Arrow raises several types
        hint = "delete the run's folder and repeat its command"
        raise UserError(f"{path}: cannot be read ({first_line(error)}); {hint}") from error


def select(rows: list[dict[str, Any]], conditions: Iterable[str]) -> list[dict[str, Any]]:
    """Return the rows for which every ``key=value`` holds; settings may be named without ``config.`` in front."""
    for condition in conditions:
        key, equals, wanted = condition.partition("=")
        if not equals:
            raise UserError(f"--where {condition}: expected key=value")
        keys = {k for row in rows for k in row}
        name = key if key in keys else f"config.{key}"
        if name not in keys:
            near = nearest(key, [k.removeprefix("config.") for k in keys])
            hint = f"; did you mean {near}?" if near else ""
            raise UserError(f"--where {condition}: no run has a key {key}{hint}")
        allowed = set(wanted.split(","))
        rows = [row for row in rows if str(row.get(name)) in allowed]
    if not rows:
        raise UserError("no run is left of those that --where selects")
    return rows


def comparisons(rows: list[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield runs whose accuracies may stand in one table: the same experiment, data, backbone and client type.

    With each comes a title that tells it from the others.
    """
    groups: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(base_of(row), []).append(row)
    same = ("name", "dataset", "backbone")
    titled = []
    for base, part in groups.items():
        first = part[0]
        alike = [b for b, other in groups.items() if all(other[0][k] == first[k] for k in same)]
        differs = [f"{k.removeprefix('config.')}={v}" for k, v in base if any((k, v) not in b for b in alike)]
        what = dict.fromkeys((first["name"], first["dataset"]))  # an experiment is often named by its data
        titled.append((" ".join([f"{': '.join(what)}, {first['backbone']}", *differs]), part))
    # numbers in titles count as numbers: 2 before 10
    yield from sorted(titled, key=lambda item: [int(w) if w.isdigit() else w for w in re.split(r"(\d+)", item[0])])


def settings(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Return one row per setting, seeds averaged, best accuracy first: means, standard errors (``..._se``), runs.

    ``label`` names the setting by what tells it from the others; ``front`` marks those that no cheaper or equally
    expensive one beats, bounds left out. With one run, intervals over clients are kept. ``published`` is the paper's
    number for the same setting, where there is one (`iciia_exp.results.published`).
    """
    keys = varying(rows)
    frames = []
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in unique_rows(rows):
        groups.setdefault(row["setting_digest"], []).append(row)
    for part in groups.values():
        first = part[0]
        line: dict[str, Any] = {"label": label_of(first, keys), "runs": len(part)}
        line |= {name: first.get(name) for name in SHARED}
        values = np.array([[_number(row.get(name)) for name in AVERAGED] for row in part])
        line |= dict(zip(AVERAGED, values.mean(axis=0), strict=True))
        error = values.std(axis=0, ddof=1) / len(part) ** 0.5 if len(part) > 1 else np.full(len(AVERAGED), np.nan)
        line |= dict(zip((f"{name}_se" for name in AVERAGED), error, strict=True))
        if len(part) == 1:
            line |= {f"{n}_{side}": first.get(f"{n}_{side}") for n in ("accuracy", "gain") for side in ("low", "high")}
        for key, of in (("published", {}), ("published_backbone", {"method": "backbone"})):
            found = published_number(first | of) or {}
            line[key], line[f"{key}_se"] = (found.get(k, np.nan) / 100 for k in ("accuracy", "standard_error"))
        line["run_dirs"] = [Path(row["run_dir"]) for row in part]
        frames.append(line)
    table = pd.DataFrame(frames).sort_values("accuracy", ascending=False, kind="stable", ignore_index=True)
    table["front"] = _front(table)
    return table


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)


def _front(table: pd.DataFrame) -> list[bool]:
    """Return which settings no other beats at its cost or less."""
    cost = table["sequence_macs"].to_numpy(dtype=float)
    accuracy, real = table["accuracy"].to_numpy(), ~table["oracle"].fillna(False).to_numpy(dtype=bool)
    better = (cost[None] <= cost[:, None]) & (accuracy[None] > accuracy[:, None]) & real[None]
    return list(real & ~better.any(axis=1))


def history_summary(table: pd.DataFrame, resamples: int = 500) -> pd.DataFrame:
    """Return one row per protocol and length: clients, targets, averages of backbone and method, and paired gains.

    ``table`` is a run's ``history.parquet`` or ``drawn_clients.parquet``. The averages are those of ``results.json``
    (`iciia_exp.results.summary.summarise`); ``log_loss_gain`` is the backbone's log-loss less the method's, with its
    own interval.
    """
    rows = []
    for (name, n), part in table.groupby(["protocol", "history"], sort=False):
        fields = ("backbone_correct", "method_correct", "both_correct", "backbone_loss", "method_loss")
        columns: dict[str, Any] = {f"{f}_C": part[f].to_numpy() for f in fields}
        decisions = int(part["decisions"].iloc[0] // part["targets"].iloc[0])
        found = summarise(ClientCounts(part["targets"].to_numpy(), **columns, decisions=decisions), resamples)
        clients, targets = found.pop("test_clients"), found.pop("test_images")
        rows.append({"protocol": name, "history": n, "clients": clients, "targets": targets, **found})
    return pd.DataFrame(rows)


def history_of(
    setting: pd.Series, file: str = "history.parquet", client_type: str | None = None
) -> pd.DataFrame | None:
    """Return accuracy by images seen before, ``stream`` protocol, mean and standard error over a setting's runs.

    None where no run has the file. Columns: ``client_accuracy``, ``worst_decile``, ``log_loss``, the backbone's, and
    ``..._se``; the index is the history.
    """
    parts = []
    for folder in setting["run_dirs"]:
        if (data := read_table(folder / file)) is not None:
            data = data[(data["protocol"] == "stream") & ((data["client_type"] == client_type) | (client_type is None))]
            if len(data):
                parts.append(averages_by_history(data))
    if not parts:
        return None
    grouped = pd.concat(parts).groupby("history", sort=False)
    return grouped.mean().join(grouped.sem().add_suffix("_se"))


def averages_by_history(data: pd.DataFrame) -> pd.DataFrame:
    """Return averages of method and backbone by images seen before (the index), ``stream`` protocol.

    ``data`` is a run's ``history.parquet``, or rows of it.
    """
    rows = []
    for n, part in data[data["protocol"] == "stream"].groupby("history", sort=False):
        row: dict[str, Any] = {"history": n}
        for who, prefix in (("method", ""), ("backbone", "backbone_")):
            correct, loss, decisions = (
                part[name].to_numpy() for name in (f"{who}_correct", f"{who}_loss", "decisions")
            )
            found = averages(correct, loss, decisions)
            row |= {f"{prefix}{name}": found[name] for name in ("client_accuracy", "worst_decile", "log_loss")}
        rows.append(row)
    return pd.DataFrame(rows).set_index("history")
