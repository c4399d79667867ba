"""Partition interface, and what several partitions share.

Legend: M images of the dataset, N members of a pool, K classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pandas as pd

from iciia_exp.data.clients import ROLES, Clients, Ragged
from iciia_exp.errors import ConfigError

__all__ = [
    "Partition",
    "clients_of",
    "draw_share",
    "numbered",
    "parents_of_classes",
    "role_pools",
    "rounds",
    "share_out",
    "single_labels",
]


class Partition(ABC):
    """A rule that assigns a dataset's images to clients."""

    @abstractmethod
    def assign(self, table: pd.DataFrame, num_classes: int) -> Clients:
        """Return the clients of a dataset's table (columns label, split, owner, parent); a pure function."""


def single_labels(table: pd.DataFrame, partition: Partition) -> np.ndarray:
    """Return the class of every image, int64 [M]; a multi-label table raises `ConfigError`."""
    if not pd.api.types.is_integer_dtype(table["label"].dtype):
        raise ConfigError("_target_", type(partition).__name__, "needs one label per image; use partition=owner")
    return table["label"].to_numpy(dtype=np.int64)


def draw_share(strata_N: np.ndarray, share: float, order_N: np.ndarray, spare: int = 1) -> np.ndarray:
    """Draw ``share`` of every stratum, rounded to whole members but at least one, bool [N].

    Args:
        strata_N: number of every member's stratum.
        share: of each stratum, 0 to 1.
        order_N: the members that are largest in it are drawn; random numbers, say, or times.
        spare: members of each stratum that are never drawn; a stratum of no more gives none.
    """
    sizes = np.bincount(strata_N)
    most = np.maximum(sizes - spare, 0)
    take = np.clip(np.floor(share * sizes + 0.5).astype(np.int64), np.minimum(most, 1), most)
    sorted_N = np.lexsort((-order_N, strata_N))
    rank_N = np.arange(len(strata_N)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    drawn_N = np.empty(len(strata_N), dtype=bool)
    drawn_N[sorted_N] = rank_N < np.repeat(take, sizes)
    return drawn_N


def role_pools(
    table: pd.DataFrame,
    labels_M: np.ndarray,
    val_share: float,
    rng: np.random.Generator,
    partition: Partition,
) -> dict[str, np.ndarray]:
    """Return the numbers of the images of every role; raises `ConfigError` where a role would have none.

    A dataset without val images of its own gives ``val_share`` of the train images of every class; one
    that has some takes nothing from ``rng``.
    """
    splits_M = table["split"].to_numpy()
    pools = {role: np.flatnonzero(splits_M == role) for role in ROLES}
    for role in ("train", "test"):
        if not len(pools[role]):
            raise ConfigError("_target_", type(partition).__name__, f"the dataset has no {role} images for any client")
    if not len(pools["val"]):
        train = pools["train"]
        drawn = draw_share(labels_M[train], val_share, rng.random(len(train)))
        if not drawn.any():
            problem = "the dataset has no val images, and no class has two train images to give one of them"
            raise ConfigError("val_share", val_share, problem)
        pools["train"], pools["val"] = train[~drawn], train[drawn]
    return pools


def share_out(number: int, pools: Mapping[str, np.ndarray], key: str, lacking: str) -> dict[str, int]:
    """Share a whole number among the roles like the sizes of their pools, largest remainders first.

    Raises `ConfigError` for ``key`` where a role would get none; ``lacking`` says what that would mean for ``{role}``.
    """
    total = sum(len(pool) for pool in pools.values())
    exact = {role: number * len(pool) / total for role, pool in pools.items()}
    shares = {role: int(share) for role, share in exact.items()}
    for role in sorted(pools, key=lambda r: shares[r] - exact[r])[: number - sum(shares.values())]:
        shares[role] += 1
    if short := [role for role in pools if not shares[role]]:
        need = int(np.ceil(total / min(len(pool) for pool in pools.values())))
        raise ConfigError(key, number, f"would leave {lacking.format(role=short[0])}; use at least {need}")
    return shares


def parents_of_classes(table: pd.DataFrame, num_classes: int, lacking: ConfigError) -> tuple[np.ndarray, list[str]]:
    """Return the number of every class's parent category, int64 [K], and the parents' names in that order.

    A class without a parent raises ``lacking``, with ``{problem}`` in its text replaced by what is wrong.
    """
    of_class = (
        table[["label", "parent"]].dropna(subset=["parent"]).drop_duplicates("label").set_index("label")["parent"]
    )
    missing = sorted(set(range(num_classes)) - set(of_class.index))
    if missing:
        some = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
        problem = lacking.problem.format(problem=f"the dataset has no parent category for the classes {some}")
        raise ConfigError(lacking.key, lacking.value, problem)
    codes, names = pd.factorize(of_class.sort_index(), sort=True)
    return np.asarray(codes, dtype=np.int64), [str(n) for n in names]


def rounds(deals: int) -> Iterator[tuple[int, str, str]]:
    """Yield (deal, role, name of its clients): train and val images ``deals`` times, test images once."""
    for d in range(deals):
        for role in ROLES:
            if role != "test" or d == 0:
                yield d, role, role if deals == 1 or role == "test" else f"{role}-{d}"


def numbered(name: str, count: int) -> list[str]:
    """Return ids of ``count`` clients.

    >>> numbered("train", 11)[-2:]
    ['train-09', 'train-10']
    """
    width = len(str(count - 1))
    return [f"{name}-{i:0{width}d}" for i in range(count)]


def clients_of(entries: Sequence[tuple[str, str, Mapping[str, np.ndarray]]], in_time: bool = False) -> Clients:
    """Join clients given as (id, type, images by role); ``in_time`` where images are in the order of time."""
    empty = np.empty(0, dtype=np.int64)
    return Clients(
        ids=np.array([name for name, _, _ in entries], dtype=object),
        types=np.array([client_type for _, client_type, _ in entries], dtype=object),
        **{role: Ragged.from_rows([images.get(role, empty) for _, _, images in entries]) for role in ROLES},
        in_time=in_time,
    )
