"""Backbone split: images that only the backbone is trained on.

The features of a network are more certain for its own training images than for new images, so methods should be
trained on other images than the backbone.
"""

import re
from collections.abc import Sequence

import numpy as np
import pandas as pd

from iciia_exp.data.clients import rank_within
from iciia_exp.errors import ConfigError, nearest
from iciia_exp.seeding import generator

__all__ = ["class_numbers", "reserve_for_backbone", "without_classes"]


def class_numbers(classes: int | str | Sequence[int | str], class_names: Sequence[str]) -> list[int]:
    """Return the numbers of classes that are given as names, numbers, or a slice of numbers such as ``3::4``.

    Raises a `ConfigError` for a class that is not there.
    """
    key, count = "unseen_classes", len(class_names)
    if isinstance(classes, str):
        if not re.fullmatch(r"-?\d*:-?\d*(:-?\d*)?", classes):
            raise ConfigError(key, classes, "must be a list of classes, or a slice of their numbers such as 3::4")
        parts = [int(part) if part else None for part in classes.split(":")]
        if len(parts) == 3 and parts[2] == 0:
            raise ConfigError(key, classes, "must have a step other than 0")
        return sorted(range(count)[slice(*parts)])
    numbers, places = set(), {name: number for number, name in enumerate(class_names)}
    for given in classes if isinstance(classes, list | tuple) else [classes]:
        number = places.get(given) if isinstance(given, str) else given
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < count:
            near = nearest(str(given), class_names)
            hint = f"; did you mean {near}?" if near else ""
            raise ConfigError(key, given, f"is no class: names, or numbers from 0 to {count - 1}{hint}")
        numbers.add(number)
    return sorted(numbers)


def without_classes(table: pd.DataFrame, unseen: Sequence[int]) -> pd.DataFrame:
    """Return a dataset's table in which the backbone has the train images of all classes but those ``unseen``.

    Their train images are the clients', and those of the other classes are no client's. Raises a `ConfigError` if
    one of both is none.
    """
    if table["label"].dtype == object:
        raise ConfigError("unseen_classes", list(unseen), "is for tasks with one class for each image")
    split = table["split"].to_numpy(dtype=object).copy()
    learned = np.isin(split, ("train", "backbone"))
    clients = np.isin(table["label"].to_numpy(), list(unseen))
    split[learned & clients], split[learned & ~clients] = "train", "backbone"
    for name, whose in (("backbone", "the backbone"), ("train", "the clients")):
        if not (split == name).any():
            raise ConfigError("unseen_classes", list(unseen), f"leaves {whose} without train images")
    return table.assign(split=split)


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
