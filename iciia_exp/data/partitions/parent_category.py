"""Parent-category partitions: the paper's ImageNet and UCF101 experiments, and its heterogeneity experiment (Figure 7).

Source: ICIIA (ACML 2024, PMLR 260:223-238), section 4 and the code released with it. For Figure 7, the code, which gave
the published numbers, mixes samples; the text of the paper mixes clients.

Legend: M images of the dataset, K classes.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from iciia_exp.data.clients import Clients, Ragged, positions
from iciia_exp.data.partitions.base import (
    Partition,
    clients_of,
    option_name,
    parents_of_classes,
    shuffled_groups,
    single_labels,
)
from iciia_exp.errors import ConfigError, check_choice, check_float, check_int
from iciia_exp.seeding import generator

__all__ = ["ParentCategory", "ReserveRatio", "deal_parents", "mix_clients", "mix_samples", "split_off_groups"]


def deal_parents(
    parents_M: np.ndarray,
    pools: Mapping[str, np.ndarray],
    chunks: Mapping[str, int],
    rng: np.random.Generator,
    even: bool,
) -> list[tuple[int, dict[str, np.ndarray]]]:
    """Assign pools of images, by role, to clients of one parent category each; every image goes to one client.

    A parent has as many clients as its smallest pool has chunks (rounded up), so a parent with an empty pool has none.
    The smallest pool is cut into whole chunks, with a short last one. The other pools, and with ``even`` all pools, are
    cut into equal parts, up to one image. Images are shuffled within a parent and pool. Returns a list of (parent
    category, images by role), an entry per client, parents in increasing order.
    """
    clients = []
    sizes = np.bincount(parents_M)
    by_parent = {role: Ragged.from_pairs(parents_M[pool], pool, len(sizes)) for role, pool in pools.items()}
    for parent in np.flatnonzero(sizes).tolist():
        images = {role: rng.permutation(rows[parent]) for role, rows in by_parent.items()}
        counts = {role: -(-len(images[role]) // chunks[role]) for role in images}
        smallest = min(counts, key=lambda role: counts[role])
        steps = np.arange(1, number := counts[smallest])
        cuts = {role: steps * len(rows) // max(number, 1) for role, rows in images.items()}
        if not even:
            cuts[smallest] = steps * chunks[smallest]
        parts = {role: np.split(rows, cuts[role]) for role, rows in images.items()}
        clients += [(parent, {role: parts[role][i] for role in parts}) for i in range(number)]
    return clients


def split_off_groups(
    labels_M: np.ndarray, groups_M: np.ndarray, pool: np.ndarray, share: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Split a pool by (class, group), so that every group of a class is on one side; return both sides.

    From every class, groups are drawn in random order until the second side has about ``share`` of the images of the
    class; a class with a single group stays on the first side.
    """
    first, second = [], []
    by_class = Ragged.from_pairs(labels_M[pool], pool, int(labels_M.max()) + 1)
    for label in np.flatnonzero(by_class.lengths).tolist():
        images = by_class[label]
        groups, counts = np.unique(groups_M[images], return_counts=True)
        order = rng.permutation(len(groups))[:-1]
        # a group is moved if that brings the second side closer to its share
        middle = np.cumsum(counts[order]) - counts[order] / 2
        moved = np.isin(groups_M[images], groups[order[middle <= share * len(images)]])
        first.append(images[~moved])
        second.append(images[moved])
    return np.concatenate(first), np.concatenate(second)


def parents_and_pools(
    table: pd.DataFrame, num_classes: int, partition: Partition
) -> tuple[np.ndarray, list[str], dict[str, np.ndarray]]:
    """Return every image's parent, int64 [M], the parents' names, and the images of train (with val) and test.

    A multi-label table and a class without a parent raise `ConfigError`.
    """
    labels_M, splits_M = single_labels(table, partition), table["split"]
    name, hint = option_name(partition), "choose another partition"
    parents_K, names = parents_of_classes(table, num_classes, "", name, hint)
    pools = {"train": splits_M.isin(("train", "val")), "test": splits_M == "test"}
    return parents_K[labels_M], names, {role: np.flatnonzero(images) for role, images in pools.items()}


def parent_clients(
    dealt: Sequence[tuple[int, dict[str, np.ndarray]]],
    names: Sequence[str],
    chunks: Mapping[str, int],
    val_share: float = 0.0,
) -> Clients:
    """Return clients named after their parents; ``val_share`` of each one's train images, at least one, go to val.

    Raises `ConfigError` for the chunks if there is no client, or a client has no images of a role.
    """
    if not dealt:
        raise ConfigError("test_chunk", chunks["test"], "no parent category has both train and test images")
    numbers: Counter[int] = Counter()
    entries = []
    for parent, images in dealt:
        if val_share:
            keep = len(images["train"]) - max(1, round(val_share * len(images["train"])))
            images = {**images, "train": images["train"][:keep], "val": images["train"][keep:]}
        if empty := [role for role, rows in images.items() if not len(rows)]:
            problem = f"would leave a client of {names[parent]!r} without {empty[0]} images; use larger chunks"
            raise ConfigError("train_chunk", chunks["train"], problem)
        entries.append((f"{names[parent]}-{numbers[parent]:03d}", names[parent], images))
        numbers[parent] += 1
    return clients_of(entries)


def _chunks(train: int, test: int) -> dict[str, int]:
    return {"train": check_int("train_chunk", train, 2), "test": check_int("test_chunk", test, 1)}


class ParentCategory(Partition):
    """Every client has train, val and test images of one parent category.

    The dataset's own val images are added to its train images first.

    Args:
        train_chunk, test_chunk: a parent has as many clients as it has chunks of ``train_chunk`` train images or chunks
            of ``test_chunk`` test images, whichever are fewer. ImageNet: 80 and 16, which gives 3,161 clients of 16
            test and about 405 other images.
        val_share: share of the train images, for choosing epochs and hyper-parameters.
        val_by: ``image``: val images are drawn image by image within each client (ImageNet). ``owner``: by (class,
            owner) before clients are formed, so that no owner (in UCF101, a video group) is in both train and val; val
            images then count in chunks of ``test_chunk`` too, and all three roles are divided evenly (UCF101: chunks
            of 16).
        seed: seed of the partition.
        train_images: of a client, at most, drawn at random; null: all.
    """

    def __init__(
        self,
        train_chunk: int = 80,
        test_chunk: int = 16,
        val_share: float = 0.2,
        val_by: str = "image",
        seed: int = 0,
        train_images: int | None = None,
    ) -> None:
        super().__init__(val_share, seed, train_images)
        self.chunks = _chunks(train_chunk, test_chunk)
        self.val_by = check_choice("val_by", val_by, ("image", "owner"))

    def assign(self, table: pd.DataFrame, num_classes: int) -> Clients:
        """Return the clients; raises `ConfigError` where there would be none or one would lack images."""
        parents_M, names, pools = parents_and_pools(table, num_classes, self)
        rng = generator("parent_category", self.seed)
        if self.val_by == "image":
            dealt = deal_parents(parents_M, pools, self.chunks, rng, even=False)
            return self.limited(parent_clients(dealt, names, self.chunks, self.val_share))
        if table["owner"].isna().any():
            raise ConfigError("val_by", "owner", "the dataset has images without an owner; use image")
        labels_M, owners_M = table["label"].to_numpy(), pd.factorize(table["owner"])[0]
        train, val = split_off_groups(labels_M, owners_M, pools["train"], self.val_share, rng)
        pools = {"train": train, "val": val, "test": pools["test"]}
        dealt = deal_parents(parents_M, pools, self.chunks | {"val": self.chunks["test"]}, rng, even=True)
        return self.limited(parent_clients(dealt, names, self.chunks))


def mix_samples(
    parents_M: np.ndarray, pools: Mapping[str, np.ndarray], ratio: float, rng: np.random.Generator
) -> np.ndarray:
    """Return new parents of the images, int64 [M]: ``ratio`` of each parent's images in each pool keep their parent.

    The other images of a pool exchange their parents at random, so that each parent has as many images as before.
    """
    mixed_M = parents_M.copy()
    for pool in pools.values():
        by_parent = shuffled_groups(parents_M, pool, int(parents_M.max()) + 1, rng)
        keep = np.round(ratio * by_parent.lengths)[by_parent.row_numbers]
        rest = by_parent.values[positions(by_parent.lengths) >= keep]
        mixed_M[rest] = rng.permutation(parents_M[rest])
    return mixed_M


def mix_clients(
    dealt: Sequence[tuple[int, dict[str, np.ndarray]]], mixed: int, ratio: float, rng: np.random.Generator
) -> list[tuple[int, dict[str, np.ndarray]]]:
    """Return clients of which ``ratio`` are unchanged, and the others have exchanged all their images at random.

    Every client has as many images of each role as before. The changed clients get the parent ``mixed``.
    """
    rest = np.sort(rng.permutation(len(dealt))[round(ratio * len(dealt)) :])
    result = list(dealt)
    if len(rest):
        rows = {}
        for role in dealt[0][1]:
            images = [dealt[i][1][role] for i in rest]
            rows[role] = np.split(rng.permutation(np.concatenate(images)), np.cumsum([len(i) for i in images])[:-1])
        for j, i in enumerate(rest):
            result[i] = (mixed, {role: rows[role][j] for role in rows})
    return result


class ReserveRatio(Partition):
    """Clients of `ParentCategory`, as for ImageNet, with a share of the images or clients mixed over all parents.

    With ``ratio=1`` the clients are the same as with `ParentCategory` and the same seed; with ``ratio=0`` all are
    uniform mixtures. The number and the sizes of the clients do not depend on the ratio. The type of a client is its
    parent category, or "mixed" where all its images are mixed. The dataset's own val images are added to its train
    images first.

    Args:
        ratio: share that is not mixed.
        of: ``samples``: this share of each parent's train images and of its test images stays with the parent; the
            rest is mixed before clients are formed, so that all clients are alike (the code). ``clients``: this share
            of the clients has one parent category, the others have images of all (the text of the paper).
        train_chunk, test_chunk: as in `ParentCategory`.
        val_share: share of each client's train images, for choosing epochs and hyper-parameters.
        seed: seed of the partition.
    """

    def __init__(
        self,
        ratio: float = 0.5,
        of: str = "samples",
        train_chunk: int = 80,
        test_chunk: int = 16,
        val_share: float = 0.2,
        seed: int = 0,
    ) -> None:
        super().__init__(val_share, seed)
        self.chunks = _chunks(train_chunk, test_chunk)
        self.ratio = check_float("ratio", ratio, 0.0, 1.0)
        self.of = check_choice("of", of, ("samples", "clients"))

    def assign(self, table: pd.DataFrame, num_classes: int) -> Clients:
        """Return the clients; raises `ConfigError` where there would be none or one would lack images."""
        parents_M, names, pools = parents_and_pools(table, num_classes, self)
        # mixing has its own generator, so that clients are drawn as by `ParentCategory`
        mixing, rng = generator("reserve_ratio", self.seed), generator("parent_category", self.seed)
        mixed = len(names)  # number of the client type without a parent
        if self.of == "samples":
            parents_M = mix_samples(parents_M, pools, self.ratio, mixing)
        dealt = deal_parents(parents_M, pools, self.chunks, rng, even=False)
        if self.of == "clients":
            dealt = mix_clients(dealt, mixed, self.ratio, mixing)
        elif self.ratio == 0:
            dealt = [(mixed, images) for _, images in dealt]
        return parent_clients(dealt, [*names, "mixed"], self.chunks, self.val_share)
