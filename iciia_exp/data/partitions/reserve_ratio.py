"""Reserve-ratio partition: the paper's experiment on heterogeneity (Figure 7).

Source: ICIIA (ACML 2024, PMLR 260:223-238), section 4. The code released with it, which gave the published numbers,
mixes samples; the paper's text speaks of clients. `mix_samples` and `mix_clients` are the pure functions.

Legend: M images of the dataset.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from iciia_exp.data.clients import Clients, Ragged
from iciia_exp.data.partitions.base import Partition
from iciia_exp.data.partitions.parent_category import deal_parents, parent_clients, parents_and_pools, split_off_images
from iciia_exp.errors import check_choice, check_float, check_int
from iciia_exp.seeding import generator

__all__ = ["ReserveRatio", "mix_clients", "mix_samples"]


def mix_samples(
    parents_M: np.ndarray, pools: Mapping[str, np.ndarray], ratio: float, rng: np.random.Generator
) -> np.ndarray:
    """Return parents in which ``ratio`` of each parent's images in each pool keep theirs, int64 [M].

    The others of a pool exchange theirs at random, so that a parent has as many images as before.
    """
    mixed_M = parents_M.copy()
    for pool in pools.values():
        shuffled = rng.permutation(pool)
        by_parent = Ragged.from_pairs(parents_M[shuffled], shuffled, int(parents_M.max()) + 1)
        rank = np.arange(len(pool)) - np.repeat(by_parent.offsets[:-1], by_parent.lengths)
        rest = by_parent.values[rank >= np.repeat(np.round(ratio * by_parent.lengths), by_parent.lengths)]
        mixed_M[rest] = rng.permutation(parents_M[rest])
    return mixed_M


def mix_clients(
    dealt: Sequence[tuple[int, dict[str, np.ndarray]]], mixed: int, ratio: float, rng: np.random.Generator
) -> list[tuple[int, dict[str, np.ndarray]]]:
    """Return clients of which ``ratio`` are as they were, and the others have exchanged all their images at random.

    Every client has as many images of each role as before; those that exchanged theirs get the parent ``mixed``.
    """
    rest = np.sort(rng.permutation(len(dealt))[round(ratio * len(dealt)) :])
    result = list(dealt)
    if len(rest):
        rows = {}
        for role in dealt[0][1]:
            own = [dealt[i][1][role] for i in rest]
            rows[role] = np.split(rng.permutation(np.concatenate(own)), np.cumsum([len(images) for images in own])[:-1])
        for j, i in enumerate(rest):
            result[i] = (mixed, {role: rows[role][j] for role in rows})
    return result


class ReserveRatio(Partition):
    """Clients of `ParentCategory`, as for ImageNet, with a share of the images or clients mixed over all parents.

    With ``ratio=1`` the clients are those of `ParentCategory` with the same seed; with ``ratio=0`` all are uniform
    mixtures. The number and the sizes of the clients do not depend on the ratio.

    Args:
        ratio: what is not mixed.
        of: ``samples``: this share of each parent's train images and of its test images stays with the parent, the
            rest is mixed before clients are formed, so that all clients are alike (the code). ``clients``: this share
            of the clients is of one parent category, the others are of none (the paper's text).
        train_chunk, test_chunk: as in `ParentCategory`.
        val_share: of each client's train images, for choosing epochs and hyper-parameters.
        seed: seed of the partition.

    A client's type is its parent category, or "mixed" where nothing is left of one. The dataset's own val images,
    where it has some, are pooled with its train images first.
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
        self.ratio = check_float("ratio", ratio, 0.0, 1.0)
        self.of = check_choice("of", of, ("samples", "clients"))
        self.train_chunk = check_int("train_chunk", train_chunk, 2)
        self.test_chunk = check_int("test_chunk", test_chunk, 1)
        self.val_share = check_float("val_share", val_share, 0.0, 0.9, open_low=True)
        self.seed = check_int("seed", seed, 0)

    def assign(self, table: pd.DataFrame, num_classes: int) -> Clients:
        """Return the clients; raises `ConfigError` where there would be none or one would lack images."""
        parents_M, names, pools = parents_and_pools(table, num_classes, self)
        # mixing has a generator of its own, so that dealing draws what `ParentCategory` draws
        mixing, dealing = generator("reserve_ratio", self.seed), generator("parent_category", self.seed)
        mixed = len(names)  # number of the client type without a parent
        if self.of == "samples":
            parents_M = mix_samples(parents_M, pools, self.ratio, mixing)
        chunks = {"train": self.train_chunk, "test": self.test_chunk}
        dealt = deal_parents(parents_M, pools, chunks, dealing, even=False)
        if self.of == "clients":
            dealt = mix_clients(dealt, mixed, self.ratio, mixing)
        elif self.ratio == 0:
            dealt = [(mixed, images) for _, images in dealt]
        split_off_images(dealt, self.val_share)
        return parent_clients(dealt, [*names, "mixed"], self.train_chunk, self.test_chunk)
