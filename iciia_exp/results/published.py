"""Published numbers: facts in `published.csv`, and which run reproduces which row.

Source: ICIIA (ACML 2024, PMLR 260:223-238): its main results, its sweep over groups and layers and its experiment on
heterogeneity, means and standard errors over the seeds of the raw results released with it; accuracies in percent.
``ratio`` is that of the heterogeneity experiment, empty elsewhere. The published numbers of fine-tuning are of one run.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any

import pandas as pd

__all__ = ["published_number", "published_numbers"]


@cache
def _known() -> frozenset[tuple[str, str]]:
    """Return the data sets and backbones that there are facts about: most runs are of others."""
    return frozenset(published_numbers()[["dataset", "backbone"]].itertuples(index=False, name=None))


@cache
def published_numbers() -> pd.DataFrame:
    """Return the table of facts, one row per published mean."""
    with (files("iciia_exp.results") / "published.csv").open(encoding="utf-8") as file:
        return pd.read_csv(file, dtype={"num_layers": "Int64", "groups": "Int64"})


def _standard(row: dict[str, Any]) -> bool:
    """Whether a run's clients and module are of the published kind: by user, or by parent category, as a ratio."""
    keys = {key.removeprefix("config.partition.") for key in row if key.startswith("config.partition.")}
    if row["dataset"] in ("imagenet", "ucf101"):
        clients = {"train_chunk", "test_chunk"} <= keys
    else:
        clients = not keys & {"classes_per_client", "alpha", "train_chunk"}
    form = {"shuffle": True, "attention": "full", "heads": 4}
    return clients and all(row.get(f"config.method.{key}", value) == value for key, value in form.items())


def published_number(row: dict[str, Any]) -> dict[str, Any] | None:
    """Return the published row that a run reproduces (``accuracy``, ``standard_error``, ``clients``), or None.

    Data, number of classes, backbone, clients, method, layers, groups, heads and shuffle decide; the seed does not, nor
    does what it was trained with.
    """
    if (row["dataset"], row["backbone"]) not in _known():
        return None
    table = published_numbers()
    same = (table["dataset"] == row["dataset"]) & (table["backbone"] == row["backbone"])
    same &= (table["method"] == row["method"]) & (table["num_classes"] == row.get("num_classes"))
    if not same.any() or not _standard(row):
        return None
    ratio = row.get("config.partition.ratio")
    same &= table["ratio"].isna() if ratio is None else table["ratio"] == float(ratio)
    if row["method"] in ("iciia", "feedforward"):
        same &= (table["num_layers"] == row["num_layers"]) & (table["groups"] == row["groups"])
    return table[same].iloc[0].to_dict() if same.any() else None
