"""Partition interface, and functions that several partitions share.

Legend: M images of the dataset, N elements of a set, K classes.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
import pandas as pd

from iciia_exp.data.clients import ROLES, Clients, Ragged, rank_within
from iciia_exp.data.readers.files import few
from iciia_exp.errors import ConfigError, check_float, check_int
from iciia_exp.seeding import generator

__all__ = ["Partition"]

T = TypeVar("T")


class Partition(ABC):
    """A rule that assigns a dataset's images to clients."""

    def __init__(self, val_share: float, seed: int, train_images: int | None = None) -> None:
        self.val_share = check_float("val_share", val_share, 0.0, 0.9, open_low=True)
        self.seed = check_int("seed", seed, 0)
        self.train_images = None if train_images is None else check_int("train_images", train_images, 1)

    def limited(self, clients: Clients) -> Clients:
        """Return the clients with ``train_images`` random train images at most; more contain fewer."""
        if self.train_images is None:
            return clients
        train = clients.train
        keys = generator("train_images", self.seed).random(len(train.values))
        return replace(clients, train=train.where(rank_within(train.row_numbers, keys) < self.train_images))

    @abstractmethod
    def assign(self, table: pd.DataFrame, num_classes: int) -> Clients:
        """Return the clients of a dataset's table (columns label, split, owner, parent); a pure function."""


def option_name(partition: Partition) -> str:
    """Return the name of a partition's option in `conf/partition`: that of its class in snake case."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(partition).__name__).lower()


def single_labels(table: pd.DataFrame, partition: Partition) -> np.ndarray:
    """Return the class of every image, int64 [M]; a multi-label table raises `ConfigError`."""
    if not pd.api.types.is_integer_dtype(table["label"].dtype):
        raise ConfigError("", option_name(partition), "needs one label per image; use partition=owner")
    return table["label"].to_numpy(dtype=np.int64)


def draw_share(strata_N: np.ndarray, share: float, order_N: np.ndarray, spare: int = 1) -> np.ndarray:
    """Draw ``share`` of every stratum, rounded to the nearest whole number but at least one, bool [N].

    The elements with the largest ``order_N`` (for example random numbers) are drawn; ``spare`` elements of each stratum
    are never drawn.
    """
    sizes = np.bincount(strata_N)
    most = np.maximum(sizes - spare, 0)
    take = np.clip(np.floor(share * sizes + 0.5).astype(np.int64), np.minimum(most, 1), most)
    return rank_within(strata_N, -order_N) < take[strata_N]


def role_pools(
    table: pd.DataFrame, labels_M: np.ndarray, val_share: float, rng: np.random.Generator, partition: Partition
) -> dict[str, np.ndarray]:
    """Return the numbers of the images of every role; an empty role raises `ConfigError`.

    If the dataset has no val images, ``val_share`` of the train images of every class is drawn from ``rng``.
    """
    splits_M = table["split"].to_numpy()
    pools = {role: np.flatnonzero(splits_M == role) for role in ROLES}
    for role in ("train", "test"):
        if not len(pools[role]):
            raise ConfigError("", option_name(partition), f"the dataset has no {role} images for any client")
    if not len(pools["val"]):
        train = pools["train"]
        drawn = draw_share(labels_M[train], val_share, rng.random(len(train)))
        if not drawn.any():
            problem = "the dataset has no val images, and no class has two train images to give one of them"
            raise ConfigError("val_share", val_share, problem)
        pools["train"], pools["val"] = train[~drawn], train[drawn]
    return pools


def shuffled_groups(groups_M: np.ndarray, pool: np.ndarray, count: int, rng: np.random.Generator) -> Ragged:
    """Return a pool's images by group (class or parent, 0..count - 1), shuffled within each group."""
    pool = rng.permutation(pool)
    return Ragged.from_pairs(groups_M[pool], pool, count)


def take_evenly(
    by_class: Ragged, left_K: np.ndarray, classes: np.ndarray, number: int, rng: np.random.Generator
) -> np.ndarray:
    """Return the next ``number`` images of some classes, as evenly as whole numbers allow, shuffled.

    ``left_K``, the number of unused images of every class, is updated in place.
    """
    share, extra = divmod(number, len(classes))
    parts = []
    for j, k in enumerate(classes):
        take, start = share + (j < extra), by_class.offsets[k + 1] - left_K[k]
        parts.append(by_class.values[start : start + take])
        left_K[k] -= take
    return rng.permutation(np.concatenate(parts))


def deal_by_parent(
    parents: Iterable[int], weigh: Callable[[int], int], draw: Callable[[int], T | None], rng: np.random.Generator
) -> list[tuple[int, T]]:
    """Draw clients until no parent can fill another one; return (parent, client) pairs.

    ``weigh`` gives the unused images of a parent, 0 once it is exhausted; parents are drawn in proportion to it.
    ``draw`` gives a client of a parent, or None after a failed attempt.
    """
    weights = {parent: weight for parent in parents if (weight := weigh(parent))}
    clients = []
    while weights:
        weight_P = np.array(list(weights.values()), dtype=np.float64)
        parent = list(weights)[rng.choice(len(weights), p=weight_P / weight_P.sum())]
        if (client := draw(parent)) is not None:
            clients.append((parent, client))
        weights[parent] = weigh(parent)  # a client changes the images of one parent
        if not weights[parent]:
            del weights[parent]
    return clients


def share_out(number: int, sizes: Mapping[str, int], key: str, lacking: str) -> dict[str, int]:
    """Divide a whole number among the roles in proportion to ``sizes`` of their pools, largest remainders first.

    A role with a share of 0 raises `ConfigError` for ``key``; ``lacking`` says for ``{role}`` what that would mean.
    """
    total = sum(sizes.values())
    exact = {role: number * size / total for role, size in sizes.items()}
    shares = {role: int(share) for role, share in exact.items()}
    for role in sorted(sizes, key=lambda r: shares[r] - exact[r])[: number - sum(shares.values())]:
        shares[role] += 1
    if short := [role for role in sizes if not shares[role]]:
        need = int(np.ceil(total / min(sizes.values())))
        raise ConfigError(key, number, f"would leave {lacking.format(role=short[0])}; use at least {need}")
    return shares


def parents_of_classes(
    table: pd.DataFrame, num_classes: int, key: str, value: str, hint: str
) -> tuple[np.ndarray, list[str]]:
    """Return the number of every class's parent category, int64 [K], and the names of the parents.

    A class without a parent raises `ConfigError` for ``key`` and ``value``, with a hint.
    """
    pairs = table[["label", "parent"]].dropna(subset=["parent"]).drop_duplicates("label")
    of_class = pairs.set_index("label")["parent"].sort_index()
    if missing := sorted(set(range(num_classes)) - set(of_class.index)):
        which = "classes" if len(missing) == num_classes else f"classes with the numbers {few(missing, 5)}"
        problem = f"the dataset has no parent category for its {which}; give them (of a folder: dataset.parents=FILE)"
        raise ConfigError(key, value, f"{problem}, or {hint}")
    codes, names = pd.factorize(of_class, sort=True)
    return np.asarray(codes, dtype=np.int64), [str(n) for n in names]


def rounds(deals: int) -> Iterator[tuple[int, str, str]]:
    """Yield (round, role, name of its clients): train and val images ``deals`` times, test images once."""
    for d in range(deals):
        for role in ROLES:
            if role != "test" or d == 0:
                yield d, role, role if deals == 1 or role == "test" else f"{role}-{d}"


def numbered(name: str, count: int) -> list[str]:
    """Return ids of ``count`` clients: train-00, train-01, ..."""
    width = len(str(count - 1))
    return [f"{name}-{i:0{width}d}" for i in range(count)]


def clients_of(entries: Sequence[tuple[str, str, Mapping[str, np.ndarray]]], in_time: bool = False) -> Clients:
    """Join clients given as (id, type, images by role); ``in_time``: the images are in the order of time."""
    empty = np.empty(0, dtype=np.int64)
    ids, types = (np.array([entry[i] for entry in entries], dtype=object) for i in range(2))
    rows = {role: Ragged.from_rows([images.get(role, empty) for _, _, images in entries]) for role in ROLES}
    return Clients(ids, types, **rows, in_time=in_time)
