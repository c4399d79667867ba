"""Owner partition: every owner of images (user, writer, photographed person) is a client.

Source: ICIIA (ACML 2024, PMLR 260:223-238), section 4. iNaturalist and CelebA are split by client, FEMNIST within
client; 20 % of the train clients, or of each client's train images, are used for val.

Legend: M images of the dataset, N images in use, C clients.
"""

import logging
from collections.abc import Callable

import numpy as np
import pandas as pd

from iciia_exp.data.clients import ROLES, Clients
from iciia_exp.data.partitions.base import Partition, draw_share
from iciia_exp.errors import ConfigError, check_choice, check_float, check_int
from iciia_exp.seeding import generator

__all__ = ["Owner", "deal_owners", "give_val", "most_frequent"]

log = logging.getLogger(__name__)

TRAIN, VAL, TEST = range(len(ROLES))


def most_frequent(rows_N: np.ndarray, values_N: np.ndarray, rows: int) -> np.ndarray:
    """Return the most frequent value (0, 1, ...) of every row, the smallest in a tie, or -1 for an empty row."""
    number = int(values_N.max()) + 1 if len(values_N) else 1
    pairs, counts = np.unique(rows_N * number + values_N, return_counts=True)
    best = np.full(rows, -1, dtype=np.int64)
    order = np.lexsort((-(pairs % number), counts))  # the last assignment counts
    best[pairs[order] // number] = pairs[order] % number
    return best


def draw_roles(
    strata_N: np.ndarray, test_share: float, val_share: float, order_of: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Return a role for every element, int64 [N]; a stratum of three or more elements has all roles.

    ``val_share`` is a share of the elements that are not for testing; ``order_of`` gives an order for `draw_share`.
    """
    roles_N = np.full(len(strata_N), TRAIN)
    roles_N[draw_share(strata_N, test_share, order_of(np.arange(len(strata_N))), spare=2)] = TEST
    rest = np.flatnonzero(roles_N == TRAIN)
    roles_N[rest[draw_share(strata_N[rest], val_share, order_of(rest))]] = VAL
    return roles_N


def deal_owners(types_C: np.ndarray, test_share: float, val_share: float, rng: np.random.Generator) -> np.ndarray:
    """Return a role for every client, int64 [C], at random within each type; types of less than three are pooled."""
    small_C = np.bincount(types_C)[types_C] < len(ROLES)
    strata_C = np.where(small_C, 0, types_C + 1)
    return draw_roles(strata_C, test_share, val_share, lambda clients: rng.random(len(clients)))


def give_val(
    roles_N: np.ndarray, client_N: np.ndarray, order_N: np.ndarray, share: float, rng: np.random.Generator
) -> np.ndarray:
    """Return roles with a share of train moved to val, int64 [N].

    If no client has both train and test images: random train clients; otherwise the last train images of each client.
    """
    roles_N = roles_N.copy()
    train = np.flatnonzero(roles_N == TRAIN)
    number = int(client_N.max()) + 1
    trains_C, tests_C = (np.bincount(client_N[roles_N == role], minlength=number) > 0 for role in (TRAIN, TEST))
    if (trains_C & tests_C).any():
        moved = draw_share(client_N[train], share, order_N[train])
    else:
        moved_C = np.zeros(number, dtype=bool)
        moved_C[trains_C] = draw_share(np.zeros(trains_C.sum(), dtype=np.int64), share, rng.random(trains_C.sum()))
        moved = moved_C[client_N[train]]
    roles_N[train[moved]] = VAL
    return roles_N


class Owner(Partition):
    """Every owner of images is a client; its type is the most frequent parent category of its images, or "owner".

    The images of a client are in the order of the column ``time`` if the table has one, unknown times last; without it,
    and for equal times, in random order.

    Args:
        split: ``given``: the dataset's own splits; an owner with train and test images has both. ``client``: owners are
            assigned to train, val and test, so that every parent category with at least three owners has clients of
            each; the dataset's own splits are ignored, except that images for the backbone are left out. ``within``:
            the images of each owner are assigned likewise, the latest for testing.
        min_images: owners with fewer images, train, val and test together, are left out; ``within`` needs at least 3.
        test_share: share of the owners (``client``) or of each owner's images (``within``); unused with ``given``.
        val_share: share of the rest, likewise. ``given`` uses it if the dataset has no val images: a share of the
            train owners if no owner has both train and test images, otherwise of each owner's train images.
        seed: seed of the partition.
        train_images: of a client, at most, drawn at random; null: all.
    """

    def __init__(
        self,
        split: str = "given",
        min_images: int = 1,
        test_share: float = 0.2,
        val_share: float = 0.2,
        seed: int = 0,
        train_images: int | None = None,
    ) -> None:
        super().__init__(val_share, seed, train_images)
        self.split = check_choice("split", split, ("given", "client", "within"))
        self.min_images = check_int("min_images", min_images, 1)
        self.test_share = check_float("test_share", test_share, 0.0, 0.9, open_low=True)

    def assign(self, table: pd.DataFrame, num_classes: int) -> Clients:
        """Return the clients; images without an owner are left out.

        Raises `ConfigError` if no image has an owner, or a role has no client.
        """
        splits_M = table["split"].to_numpy()
        used = np.flatnonzero(splits_M != "backbone")
        owners = table["owner"].iloc[used]
        if lacking := int(owners.isna().sum()):
            problem = f"{lacking:,} of the dataset's {len(used):,} images have no owner"
            if lacking == len(used):
                hint = "give them (of a folder: a table with a column owner, dataset.csv=FILE)"
                raise ConfigError("", "owner", f"{problem}; {hint}, or choose another partition")
            log.warning("partition: %s; they are left out", problem)
            used, owners = used[owners.notna().to_numpy()], owners.dropna()
        client_N, names = pd.factorize(owners)
        images_C = np.bincount(client_N, minlength=len(names))
        least = max(self.min_images, len(ROLES) if self.split == "within" else 1)
        large_C = images_C >= least
        if not large_C.any():
            problem = f"every owner has fewer than {least} images, the largest {images_C.max(initial=0)}"
            raise ConfigError("min_images", self.min_images, problem)
        large_N = large_C[client_N]
        used, client_N, names = used[large_N], (np.cumsum(large_C) - 1)[client_N[large_N]], names[large_C]

        rng = generator("owner", self.seed)
        time_N = table["time"].to_numpy(dtype=np.float64)[used] if "time" in table else np.zeros(len(used))
        order_N = np.empty(len(used), dtype=np.int64)
        order_N[np.lexsort((rng.random(len(used)), time_N))] = np.arange(len(used))
        parent_N, parents = pd.factorize(table["parent"].iloc[used], sort=True)  # -1 where unknown
        types_C = most_frequent(client_N[parent_N >= 0], parent_N[parent_N >= 0], len(names))
        if self.split == "within":
            roles_N = draw_roles(client_N, self.test_share, self.val_share, lambda images: order_N[images])
        elif self.split == "client":
            roles_N = deal_owners(types_C + 1, self.test_share, self.val_share, rng)[client_N]
        else:
            roles_N = np.select([splits_M[used] == role for role in ROLES], range(len(ROLES)))
            if not (roles_N == VAL).any():
                roles_N = give_val(roles_N, client_N, order_N, self.val_share, rng)
        if empty := [role for r, role in enumerate(ROLES) if not (roles_N == r).any()]:
            others = " or ".join(f"split={s}" for s in ("given", "client", "within") if s != self.split)
            problem = f"none of the {len(names)} owners has {empty[0]} images; use {others}"
            raise ConfigError("split", self.split, problem)

        client_M, roles_M, order_M = (np.full(len(table), -1, dtype=np.int64) for _ in range(3))
        client_M[used], roles_M[used], order_M[used] = client_N, roles_N, order_N
        text = np.array([*map(str, parents), "owner"], dtype=object)  # type -1 is the last
        known_N = time_N[np.isfinite(time_N)]
        ids, in_time = np.array([*map(str, names)], dtype=object), len(known_N) > 0 and bool(np.ptp(known_N) > 0)
        return self.limited(Clients.from_assignment(ids, text[types_C], client_M, roles_M, order_M, in_time))
