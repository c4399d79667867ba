"""Parent-category partition: the paper's ImageNet and UCF101 experiments.

Source: ICIIA (ACML 2024, PMLR 260:223-238), section 4 and the code released with it. `deal_parents` is the pure
function, the class around it checks arguments and splits off val images.

Legend: M images of the dataset, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from iciia_exp.data.clients import Clients, Ragged
from iciia_exp.data.partitions.base import Partition, clients_of, parents_of_classes, single_labels
from iciia_exp.errors import ConfigError, check_choice, check_float, check_int
from iciia_exp.seeding import generator

__all__ = [
    "ParentCategory",
    "deal_parents",
    "parent_clients",
    "parents_and_pools",
    "split_off_groups",
    "split_off_images",
]


def deal_parents(
    parents_M: np.ndarray,
    pools: Mapping[str, np.ndarray],
    chunks: Mapping[str, int],
    rng: np.random.Generator,
    even: bool,
) -> list[tuple[int, dict[str, np.ndarray]]]:
    """Deal pools of images out to clients of one parent category each; every image goes to one client.

    A parent has as many clients as its poorest pool has chunks (rounded up), so a parent that lacks images in one pool
    has none. The poorest pool is cut into whole chunks, the last one short, and the others by an integer range split,
    which gives every client the same number of images up to one; with ``even`` all pools are split by range.

    Args:
        parents_M: number of the parent category of every image.
        pools: numbers of the images to deal out, by role.
        chunks: images of a role that a client has at least, by role, where the parent has enough.
        rng: source of all randomness; images are shuffled within (parent, pool).
        even: split every pool by range.

    Returns:
        A list of (parent category, images by role), one entry per client, parents in increasing order.
    """
    clients = []
    sizes = np.bincount(parents_M)
    by_parent = {role: Ragged.from_pairs(parents_M[pool], pool, len(sizes)) for role, pool in pools.items()}
    for parent in np.flatnonzero(sizes).tolist():
        own = {role: rng.permutation(rows[parent]) for role, rows in by_parent.items()}
        counts = {role: -(-len(images) // chunks[role]) for role, images in own.items()}
        number = min(counts.values())
        poorest = min(counts, key=lambda role: counts[role])
        cuts = {}
        for role, images in own.items():
            if role == poorest and not even:
                cuts[role] = np.minimum(np.arange(number + 1) * chunks[role], len(images))
            else:
                cuts[role] = np.arange(number + 1) * len(images) // max(number, 1)
        clients += [
            (parent, {role: own[role][cuts[role][i] : cuts[role][i + 1]] for role in own}) for i in range(number)
        ]
    return clients


def split_off_groups(
    labels_M: np.ndarray, groups_M: np.ndarray, pool: np.ndarray, share: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Split a pool by (class, group), so that no group of a class is on both sides.

    From every class, groups are drawn in random order until about ``share`` of the class's images are on the second
    side; a class with a single group stays on the first.

    Returns:
        Image numbers of the first and of the second side.
    """
    first, second = [], []
    by_class = Ragged.from_pairs(labels_M[pool], pool, int(labels_M.max()) + 1)
    for label in np.flatnonzero(by_class.lengths).tolist():
        own = by_class[label]
        groups, counts = np.unique(groups_M[own], return_counts=True)
        order = rng.permutation(len(groups))[: max(len(groups) - 1, 0)]
        before = np.cumsum(counts[order]) - counts[order]
        # a group goes over while that brings the side closer to its share
        taken = groups[order[before + counts[order] / 2 <= share * len(own)]]
        over = np.isin(groups_M[own], taken)
        first.append(own[~over])
        second.append(own[over])
    return np.concatenate(first), np.concatenate(second)


def split_off_images(clients: Sequence[tuple[int, dict[str, np.ndarray]]], share: float) -> None:
    """Move ``share`` of every client's train images, at least one, to val; they are shuffled already."""
    for _, images in clients:
        keep = len(images["train"]) - max(1, round(share * len(images["train"])))
        images["train"], images["val"] = np.split(images["train"], [keep])


def parents_and_pools(
    table: pd.DataFrame, num_classes: int, partition: Partition
) -> tuple[np.ndarray, list[str], dict[str, np.ndarray]]:
    """Return every image's parent, int64 [M], the parents' names, and the images of train (with val) and test.

    Raises `ConfigError` where an image has no class or a class has no parent.
    """
    labels_M, splits_M = single_labels(table, partition), table["split"].to_numpy()
    lacking = ConfigError("_target_", type(partition).__name__, "{problem}; choose another partition")
    parents_K, names = parents_of_classes(table, num_classes, lacking)
    train = np.flatnonzero((splits_M == "train") | (splits_M == "val"))
    return parents_K[labels_M], names, {"train": train, "test": np.flatnonzero(splits_M == "test")}


def parent_clients(
    dealt: Sequence[tuple[int, dict[str, np.ndarray]]], names: Sequence[str], train_chunk: int, test_chunk: int
) -> Clients:
    """Join dealt clients, each with the name of its parent as type and a number within that parent as id.

    Raises `ConfigError` for the chunks where there is no client, or one lacks images of a role.
    """
    if not dealt:
        raise ConfigError("test_chunk", test_chunk, "no parent category has both train and test images")
    for parent, images in dealt:
        if empty := [role for role, rows in images.items() if not len(rows)]:
            problem = f"would leave a client of {names[parent]!r} without {empty[0]} images; use larger chunks"
            raise ConfigError("train_chunk", train_chunk, problem)
    number = [0] * len(names)
    entries = []
    for parent, images in dealt:
        entries.append((f"{names[parent]}-{number[parent]:03d}", names[parent], images))
        number[parent] += 1
    return clients_of(entries)


class ParentCategory(Partition):
    """Every client has images of one parent category, in train, val and test.

    Args:
        train_chunk, test_chunk: a parent has as many clients as the scarcer of its train images, in chunks of
            ``train_chunk``, and its test images, in chunks of ``test_chunk``. ImageNet: 80 and 16, which gives 3,161
            clients of 16 test and about 405 other images.
        val_share: of the train images, for choosing epochs and hyper-parameters.
        val_by: ``image``: within each client, image by image (ImageNet). ``owner``: by (class, owner) before
            clients are formed, so that no owner (in UCF101, a video group) is on both sides; val images then
            count in chunks of ``test_chunk`` too, and all three are dealt out evenly (UCF101: chunks of 16).
        seed: seed of the partition.

    The dataset's own val images, where it has some, are pooled with its train images first.
    """

    def __init__(
        self,
        train_chunk: int = 80,
        test_chunk: int = 16,
        val_share: float = 0.2,
        val_by: str = "image",
        seed: int = 0,
    ) -> None:
        self.train_chunk = check_int("train_chunk", train_chunk, 2)
        self.test_chunk = check_int("test_chunk", test_chunk, 1)
        self.val_share = check_float("val_share", val_share, 0.0, 0.9, open_low=True)
        self.val_by = check_choice("val_by", val_by, ("image", "owner"))
        self.seed = check_int("seed", seed, 0)

    def assign(self, table: pd.DataFrame, num_classes: int) -> Clients:
        """Return the clients; raises `ConfigError` where there would be none or one would lack images."""
        parents_M, names, pools = parents_and_pools(table, num_classes, self)
        rng = generator("parent_category", self.seed)
        if self.val_by == "owner":
            if table["owner"].isna().any():
                raise ConfigError("val_by", "owner", "the dataset has images without an owner; use image")
            labels_M, owners_M = table["label"].to_numpy(), pd.factorize(table["owner"])[0]
            train, val = split_off_groups(labels_M, owners_M, pools["train"], self.val_share, rng)
            pools = {"train": train, "val": val, "test": pools["test"]}
            chunks = {"train": self.train_chunk, "val": self.test_chunk, "test": self.test_chunk}
            dealt = deal_parents(parents_M, pools, chunks, rng, even=True)
        else:
            chunks = {"train": self.train_chunk, "test": self.test_chunk}
            dealt = deal_parents(parents_M, pools, chunks, rng, even=False)
            split_off_images(dealt, self.val_share)
        return parent_clients(dealt, names, self.train_chunk, self.test_chunk)
