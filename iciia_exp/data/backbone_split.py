"""Backbone split: images that only the backbone is trained on.

The features of a network are more certain for its own training images than for new images, so methods should be
trained on other images than the backbone.
"""

import numpy as np
import pandas as pd

from iciia_exp.data.clients import rank_within
from iciia_exp.errors import ConfigError
from iciia_exp.seeding import generator

__all__ = ["reserve_for_backbone"]


def reserve_for_backbone(table: pd.DataFrame, share: float) -> pd.DataFrame:
    """Return a dataset's table with ``share`` of its train images moved to the split ``backbone``.

    Whole owners if every train image has an owner, otherwise the same share of the images of every class. The images
    do not depend on the seeds of a run, so that runs can be compared. A share that moves no image, or all images,
    raises `ConfigError`.
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
        classes = np.zeros(len(rows), dtype=np.int64) if label.dtype == object else label.to_numpy()
        rank = rank_within(classes, rng.random(len(rows)))
        chosen = rows[rank < np.round(share * np.bincount(classes))[classes]]
    if not 0 < len(chosen) < len(rows):
        raise ConfigError("reserve", share, f"leaves the backbone {len(chosen)} of {len(rows)} train images")
    split = table["split"].to_numpy(dtype=object).copy()
    split[chosen] = "backbone"
    return table.assign(split=split)
