"""Tables: finished runs, settings with their seeds averaged, and accuracy by length of history."""

import contextlib
import logging
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from iciia_exp.artifacts import read_json, read_parquet
from iciia_exp.checksums import verify_folder
from iciia_exp.errors import UserError, nearest, printable
from iciia_exp.results.columns import COLUMNS, averaged
from iciia_exp.results.labels import base_of, grouped, label_of, unique_rows, varying
from iciia_exp.results.published import published_number
from iciia_exp.results.summary import COUNTS, ClientCounts, averages, summarise
from iciia_exp.tasks import TASKS

__all__ = [
    *("averages_by_history", "backbone_history", "backbone_line", "comparisons", "cost_images", "counted"),
    *("history_of", "history_summary", "load_runs", "pareto_front", "read_table", "select", "settings", "unbalanced"),
]

log = logging.getLogger(__name__)

# what runs that differ in seeds alone have in common, beside the columns of `COLUMNS` that are so
_COMMON = (
    *("name", "dataset", "task", "backbone", "method", "oracle", "groups", "heads", "num_layers", "setting_digest"),
    *("sequence_macs", "backbone_macs", "cost_images"),
)

# results of a run itself; a repository has the same ones, and no tables beside them
_EVALUATION = "evaluation-*"

# columns of `clients.parquet` that tables and figures read
_OF_CLIENTS = ("client", "client_type", "images", "classes", "decisions", "backbone_correct", "method_correct")


def load_runs(folders: Iterable[Path]) -> list[dict[str, Any]]:
    """Return the rows of all finished runs in the folders, at any depth, each with its ``run_dir``.

    A run is there once for every name of an experiment. Links to folders are followed.

    A run with a damaged file is left out, with a warning. Raises a `UserError` that names a folder without finished
    runs.
    """
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; give a run directory, or a folder with some (outputs)")
        paths = sorted(_results_in(folder))
        if not paths:
            raise UserError(f"{folder}: no finished runs in it (no results.json); repeat their command to finish them")
        damaged = []
        for path in paths:
            try:
                verify_folder(path.parent)
                row = read_json(path)
                _check_row(path, row)
            except UserError as error:
                damaged.append(error)
                continue
            whole = path.parent.match(_EVALUATION)
            row |= {"run_dir": path.parent, "latency_percent": _latency(path.parent.parent) if whole else None}
            key = (row["name"], row["evaluation_digest"])
            if key not in rows or (whole and not rows[key]["run_dir"].match(_EVALUATION)):
                rows[key] = row
        if len(damaged) == len(paths):
            raise damaged[0]
        for problem in damaged:
            log.warning("left out: %s", printable(problem))
    return sorted(rows.values(), key=lambda row: str(row.get("finished")))  # of several evaluations the newest counts


def _results_in(folder: Path) -> Iterator[Path]:
    """Yield every ``results.json`` once, by its own path if it has one in the folder, else by a link that leads to it.

    Links to a folder around this one are not followed.
    """
    own, read, pending = Path(os.path.realpath(folder)), set(), [folder]
    while pending:
        links = []
        for top in pending:
            for at, folders, files in os.walk(top):
                if (real := os.path.realpath(at)) in read:
                    folders.clear()
                    continue
                read.add(real)
                if "results.json" in files:
                    yield Path(at, "results.json")
                links += [path for name in sorted(folders) if (path := Path(at, name)).is_symlink()]
        pending = [link for link in links if not own.is_relative_to(os.path.realpath(link))]


def _latency(run: Path) -> float | None:
    """Return the time that a method adds to the backbone for one more image, in percent, by the run's export."""
    path = run / "export" / "latency.json"
    try:
        return float(read_json(path)["added_percent"]["1"]) if path.is_file() else None
    except (UserError, KeyError, TypeError, ValueError) as error:
        log.warning("left out: %s: %s", path, printable(error))
        return None


def _check_row(path: Path, row: dict[str, Any]) -> None:
    """Raise a `UserError` unless a row has what tables need."""
    digests = ("digest", "evaluation_digest", "setting_digest", "partition_digest")
    texts = ("name", "dataset", "backbone", "method", *digests)
    wrong = [key for key in texts if not isinstance(row.get(key), str)]
    wrong += [key for key in ("accuracy", "backbone_accuracy", "gain") if not isinstance(row.get(key), int | float)]
    if row.get("task") not in TASKS:
        wrong.append("task")
    if wrong:
        raise UserError(f"{path}: is not the results of a run ({wrong[0]}: {row.get(wrong[0])!r})")


def read_table(path: Path) -> pd.DataFrame | None:
    """Return one of a run's tables; None if the run has none. Raises a `UserError` that names a damaged file."""
    if not path.is_file():
        return None
    table = read_parquet(path)
    if path.name == "clients.parquet" and (lacks := [c for c in _OF_CLIENTS if c not in table]):
        raise UserError(f"{path}: has no column {lacks[0]}; delete {path.parent} and repeat the command")
    return table


def select(rows: list[dict[str, Any]], conditions: Iterable[str]) -> list[dict[str, Any]]:
    """Return the rows for which every ``key=value[,value]`` holds; the ``config.`` of a setting may be left out.

    Raises a `UserError` for a key that no run has, and where no row is left.
    """
    for condition in conditions:
        key, equals, values = condition.partition("=")
        if not equals:
            raise UserError(f"--where {condition}: expected key=value")
        keys = {k for row in rows for k in row}
        name = key if key in keys else f"config.{key}"
        if name not in keys:
            near = nearest(key, [k.removeprefix("config.") for k in keys])
            hint = f"; did you mean {near}?" if near else ""
            raise UserError(f"--where {condition}: no run has a key {key}{hint}")
        left = [row for row in rows if any(_is(row.get(name), text) for text in values.split(","))]
        if not left:
            known = sorted({str(row[name]) for row in rows if name in row})
            some = ", ".join(known[:8]) + (", ..." if len(known) > 8 else "")
            raise UserError(f"--where {condition}: no run is left; of those before it, {key} is {some}")
        rows = left
    return rows


def _is(value: Any, text: str) -> bool:
    """Return whether a text is a value, as one writes it on the command line or in YAML."""
    if isinstance(value, bool) or value is None:
        return text.lower() in {True: ("true",), False: ("false",), None: ("null", "none")}[value]
    if isinstance(value, int | float):
        with contextlib.suppress(ValueError):
            return float(text) == value
    return str(value) == text


def comparisons(rows: list[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield a title, and the runs whose accuracies one table may compare: those of one `base_of`."""
    groups = grouped(rows, base_of)
    titled = []
    for base, part in groups.items():
        first = part[0]
        alike = [
            b for b, other in groups.items() if all(other[0][k] == first[k] for k in ("name", "dataset", "backbone"))
        ]
        differs = [f"{k.removeprefix('config.')}={v}" for k, v in base if any((k, v) not in b for b in alike)]
        names = dict.fromkeys((first["name"], first["dataset"]))  # an experiment is often named by its data
        titled.append((" ".join([f"{': '.join(names)}, {first['backbone']}", *differs]), part))
    # numbers in titles count as numbers: 2 before 10
    yield from sorted(titled, key=lambda item: [int(w) if w.isdigit() else w for w in re.split(r"(\d+)", item[0])])


def settings(rows: list[dict[str, Any]], keys: dict[str, list[str]] | None = None) -> pd.DataFrame:
    """Return one row per setting, seeds averaged, best accuracy first: means, standard errors (``..._se``), runs.

    ``label`` names the setting; ``front`` marks the settings on the Pareto front of cost and accuracy, oracles left
    out. A setting of one run keeps its intervals over clients (``..._low``, ``..._high``). ``published`` is the paper's
    number for the same setting, where there is one (`iciia_exp.results.published`). Accuracies are fractions.
    ``alone_...``, the same in every row, is the mean of the backbone's figures over all backbones and partitions of
    ``rows``, whatever the number of their runs (`backbone_line`); ``partition_digests`` lists those of the setting.

    Args:
        rows: runs of one `base_of`.
        keys: the settings that labels show; by default those that `varying` finds in ``rows``.
    """
    rows, keys = unique_rows(rows), varying(rows) if keys is None else keys
    digests = [row["setting_digest"] for row in rows]
    runs = pd.DataFrame(rows, columns=pd.Index(averaged())).astype(float).groupby(digests, sort=False)
    means = runs.mean(skipna=False).join(runs.sem(skipna=False).add_suffix("_se"))
    common = (*_COMMON, *(column.key for column in COLUMNS if column.seeds == "common"))
    intervals = [f"{column.key}_{side}" for column in COLUMNS if column.interval for side in ("low", "high")]
    alone = _alone(rows)
    lines = []
    for part in grouped(rows, lambda row: row["setting_digest"]).values():
        first = part[0]
        line: dict[str, Any] = {"label": label_of(first, keys), "runs": len(part)}
        line |= {name: first.get(name) for name in common} | {"oracle": bool(first.get("oracle"))}
        line |= means.loc[first["setting_digest"]].to_dict()
        if len(part) == 1:
            line |= {name: first.get(name) for name in intervals}
        for key, change in (("published", {}), ("published_backbone", {"method": "backbone"})):
            fact = published_number(first | change) or {}
            line[key], line[f"{key}_se"] = (fact.get(k, np.nan) / 100 for k in ("accuracy", "standard_error"))
        line |= alone
        for key in ("test_clients", "test_images"):  # of seeds of the dataset or partition, others
            line[key] = [row.get(key) for row in part]
        line["partition_digests"] = [row["partition_digest"] for row in part]
        line["run_dirs"] = [Path(row["run_dir"]) for row in part if "run_dir" in row]
        lines.append(line)
    table = pd.DataFrame(lines).sort_values("accuracy", ascending=False, kind="stable", ignore_index=True)
    table["front"] = ~table["oracle"] & pareto_front(table["sequence_macs"], table["accuracy"].where(~table["oracle"]))
    table["front"] &= ~(table["gain"] < 0)  # the backbone alone costs nothing
    return table


def _alone(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return means and standard errors of the backbone's figures over the backbones and partitions of some runs."""
    bases = list({row["partition_digest"]: row for row in rows}.values())
    keys = [column.key for column in COLUMNS if column.backbone]
    found = pd.DataFrame(bases, columns=pd.Index([f"backbone_{key}" for key in keys])).astype(float)
    found.columns = pd.Index([f"alone_{key}" for key in keys])
    figures = pd.concat([found.mean(), found.sem().add_suffix("_se")])
    alone: dict[str, Any] = {str(key): value for key, value in figures.items()} | {"alone_runs": len(bases)}
    if len(bases) == 1:
        intervals = [f"{c.key}_{side}" for c in COLUMNS if c.backbone and c.interval for side in ("low", "high")]
        alone |= {f"alone_{key}": bases[0].get(f"backbone_{key}") for key in intervals}
    return alone


def backbone_line(table: pd.DataFrame) -> pd.Series:
    """Return the backbone's figures in a table of `settings`, as ``backbone_...``, and its ``runs``."""
    first = table.iloc[0]
    names = {name: name.replace("alone_", "backbone_", 1) for name in table.columns if name.startswith("alone_")}
    return first[list(names)].rename(names).rename({"backbone_runs": "runs"})


def counted(table: pd.DataFrame, key: str) -> str:
    """Return how many test clients or images the runs of a table of `settings` have."""
    counts = {count for counts in table[key] for count in counts}
    return f"{min(counts):,}" if len(counts) == 1 else f"{min(counts):,} to {max(counts):,}"


def cost_images(table: pd.DataFrame) -> str:
    """Return for how many images together the cost is stated."""
    low, high = table["cost_images"].min(), table["cost_images"].max()
    return f"{low}" if low == high else f"{low} to {high}"


def unbalanced(table: pd.DataFrame) -> str:
    """Return a sentence about a table of `settings` whose runs differ in backbones or partitions; else nothing."""
    if len({frozenset(digests) for digests in table["partition_digests"]}) == 1:
        return ""
    low, high = (100 * f for f in (table["backbone_accuracy"].min(), table["backbone_accuracy"].max()))
    return (
        "Settings have runs with different seeds of dataset, backbone or partition. Gains are over the backbone in the "
        f"same runs, whose accuracy is {low:.1f} to {high:.1f} %."
    )


def pareto_front(cost: pd.Series, accuracy: pd.Series) -> np.ndarray:
    """Return which points no other point of the same cost or less beats in accuracy, bool.

    An accuracy of NaN beats none; a cost of NaN is on no front.
    """
    costs, accuracies = cost.to_numpy(dtype=float), accuracy.to_numpy(dtype=float)
    beaten = (costs <= costs[:, None]) & (accuracies > accuracies[:, None])
    return ~np.any(beaten, axis=1) & ~np.isnan(costs)


def history_summary(table: pd.DataFrame, resamples: int = 500) -> pd.DataFrame:
    """Return one row per protocol and length of history: clients, targets, and the averages of ``results.json``.

    Args:
        table: a run's ``history.parquet`` or ``drawn_clients.parquet``.
        resamples: bootstrap resamples of the intervals (`iciia_exp.results.summary.summarise`).
    """
    rows = []
    for (name, n), part in table.groupby(["protocol", "history"], sort=False):
        arrays: dict[str, Any] = {f"{f}_C": part["targets" if f == "images" else f].to_numpy() for f in COUNTS}
        decisions = int(part["decisions"].iloc[0] // part["targets"].iloc[0])
        found = summarise(ClientCounts(**arrays, decisions=decisions), resamples)
        clients, targets = found.pop("test_clients"), found.pop("test_images")
        rows.append({"protocol": name, "history": n, "clients": clients, "targets": targets, **found})
    return pd.DataFrame(rows)


def history_of(setting: pd.Series, client_type: str | None = None) -> pd.DataFrame | None:
    """Return accuracy by images seen before, ``stream`` protocol, mean and standard error over a setting's runs.

    Args:
        setting: a row of `settings`.
        client_type: one of `iciia_exp.results.columns.DRAWN_TYPES`, whose drawn clients to read; None reads the
            partition's test clients.

    Returns:
        ``client_accuracy``, ``worst_decile`` and ``log_loss``, each also with ``backbone_`` and ``_se``; the index is
        the history. None where no run has the table.
    """
    parts = []
    for folder in setting["run_dirs"]:
        data = read_table(folder / ("history.parquet" if client_type is None else "drawn_clients.parquet"))
        if data is not None and client_type is not None:
            data = data[data["client_type"] == client_type]
        if data is not None and (data["protocol"] == "stream").any():
            parts.append(averages_by_history(data))
    if not parts:
        return None
    runs = pd.concat(parts).groupby("history", sort=False)
    return runs.mean().join(runs.sem().add_suffix("_se"))


def backbone_history(table: pd.DataFrame, client_type: str | None = None) -> pd.DataFrame | None:
    """Return the backbone's accuracy by images seen before, as `history_of` does, over all backbones and partitions."""
    rows = zip(table["partition_digests"], table["run_dirs"], strict=True)
    one_each = {digest: folder for digests, folders in rows for digest, folder in zip(digests, folders, strict=True)}
    return history_of(pd.Series({"run_dirs": list(one_each.values())}), client_type)


def averages_by_history(data: pd.DataFrame) -> pd.DataFrame:
    """Return averages of method and backbone by images seen before (the index), ``stream`` protocol.

    ``data`` is a run's ``history.parquet``, or rows of it.
    """
    rows = []
    for n, part in data[data["protocol"] == "stream"].groupby("history", sort=False):
        row: dict[str, Any] = {"history": n}
        for who, prefix in (("method", ""), ("backbone", "backbone_")):
            found = averages(*(part[f].to_numpy() for f in (f"{who}_correct", f"{who}_loss", "decisions")))
            row |= {f"{prefix}{name}": found[name] for name in ("client_accuracy", "worst_decile", "log_loss")}
        rows.append(row)
    return pd.DataFrame(rows).set_index("history")
