"""Published numbers: the table `published.csv`, and the row that a run reproduces.

Source: ICIIA (ACML 2024, PMLR 260:223-238): main results, sweep over groups and layers, and heterogeneity. Means and
standard errors are over the seeds of the raw results released with the paper; accuracies are in percent. ``ratio``
belongs to the heterogeneity experiment and is empty elsewhere. Fine-tuning was published with one run.
"""

from functools import cache
from importlib.resources import files
from typing import Any

import pandas as pd

__all__ = ["published_number", "published_numbers"]


@cache
def published_numbers() -> pd.DataFrame:
    """Return the table, one row per published mean."""
    with (files("iciia_exp.results") / "published.csv").open(encoding="utf-8") as file:
        return pd.read_csv(file, dtype={"num_layers": "Int64", "groups": "Int64"})


@cache
def _by_setting() -> dict[tuple[Any, ...], dict[str, Any]]:
    keys = ["dataset", "backbone", "num_classes", "method", "num_layers", "groups", "ratio"]
    rows: list[Any] = published_numbers().to_dict("records")
    return {tuple(None if pd.isna(row[key]) else row[key] for key in keys): row for row in rows}


#: Train and test images of a chunk of a parent category.
_CHUNKS = {"imagenet": (80, 16), "ucf101": (16, 16)}
_IMAGES = 16  # that are processed together


def _published_form(row: dict[str, Any]) -> bool:
    """Whether a run has the paper's clients (users, or chunks of a parent category) and the paper's module."""
    partition = {k.removeprefix("config.partition."): v for k, v in row.items() if k.startswith("config.partition.")}
    if (chunks := _CHUNKS.get(row["dataset"])) is not None:
        clients = (partition.get("train_chunk"), partition.get("test_chunk")) == chunks
    else:
        clients = not partition.keys() & {"classes_per_client", "alpha", "train_chunk"}
    whole = partition.get("train_images") is None and partition.get("of", "samples") == "samples"
    clients = clients and whole and row.get("images", _IMAGES) == _IMAGES
    module = {"shuffle": True, "attention": "full", "heads": 4}
    return clients and all(row.get(f"config.method.{key}", value) == value for key, value in module.items())


def published_number(row: dict[str, Any]) -> dict[str, Any] | None:
    """Return the published row that a run reproduces (``accuracy``, ``standard_error``, ``clients``), or None.

    Dataset, number of classes, backbone, clients (sizes of the chunks, what a ratio mixes, images processed together),
    method, layers, groups, heads and shuffle must agree; seeds and training may differ.
    """
    sizes = (row.get("num_layers"), row.get("groups")) if row["method"] in ("iciia", "feedforward") else (None, None)
    names = row["dataset"], row["backbone"], row.get("num_classes"), row["method"]
    fact = _by_setting().get((*names, *sizes, row.get("config.partition.ratio")))
    return fact if fact is not None and _published_form(row) else None
