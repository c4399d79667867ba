"""Backbone split: images that only the backbone learns from.

A network's features of images it was trained on look more certain than those of new images. A method that learns from
the former learns what the latter will not show, so a backbone trained here can have images of its own.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from iciia_exp.errors import ConfigError
from iciia_exp.seeding import generator

__all__ = ["reserve_for_backbone"]


def reserve_for_backbone(table: pd.DataFrame, share: float) -> pd.DataFrame:
    """Return a dataset's table with ``share`` of its train images moved to the split ``backbone``.

    By owner where every train image has one, so that no client's images are on both sides; else image by image, the
    same share of every class. The same images whatever the seeds of a run, so that runs can be compared.
    """
    if not share:
        return table
    if (table["split"] == "backbone").any():
        raise ConfigError("reserve", share, "the dataset sets images aside for the backbone itself; use 0")
    rng = generator("reserve", 0)
    rows = np.flatnonzero(table["split"].to_numpy() == "train")
    owners = table["owner"].iloc[rows]
    if owners.notna().all() and owners.nunique() > 1:
        numbers, names = pd.factorize(owners)
        taken = rng.permutation(len(names)) < round(share * len(names))
        chosen = rows[taken[numbers]]
    else:
        label = table["label"].iloc[rows]
        kinds = np.zeros(len(rows), dtype=np.int64) if label.dtype == object else label.to_numpy()
        order = np.lexsort((rng.random(len(rows)), kinds))
        counts = np.bincount(kinds)
        position = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)  # within the class
        chosen = rows[order[position < np.round(share * np.repeat(counts, counts))]]
    if not 0 < len(chosen) < len(rows):
        raise ConfigError("reserve", share, f"leaves the backbone {len(chosen)} of {len(rows)} train images")
    split = table["split"].to_numpy(dtype=object).copy()
    split[chosen] = "backbone"
    return table.assign(split=split)
