"""Classes per client: `deal_classes` is the pure function, the class around it checks and chooses.

Legend: M images of the dataset, K classes, R roles, P parent categories.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from iciia_exp.data.clients import ROLES, Clients, Ragged
from iciia_exp.data.partitions.base import (
    Partition,
    clients_of,
    numbered,
    parents_of_classes,
    role_pools,
    rounds,
    share_out,
    single_labels,
)
from iciia_exp.errors import ConfigError, check_choice, check_float, check_int
from iciia_exp.seeding import generator

__all__ = ["ClassesPerClient", "deal_classes", "in_words", "parents_or_any"]


def deal_classes(
    labels_M: np.ndarray,
    parents_K: np.ndarray,
    pools: Mapping[str, np.ndarray],
    quotas: Mapping[str, int],
    classes_per_client: int,
    rng: np.random.Generator,
) -> list[tuple[int, dict[str, np.ndarray]]]:
    """Deal pools of images out to clients of few classes, every image to at most one client.

    A client draws a parent category, in proportion to the images it has left, and ``classes_per_client`` distinct
    classes of it (all, if it has fewer), again in proportion; then from every pool its quota of images, spread over
    its classes as evenly as whole numbers allow. Dealing ends when no parent can fill another client, so a few images
    of each class may stay undealt.

    Args:
        labels_M: class of every image.
        parents_K: parent category of every class; a single value for all classes means "any classes together".
        pools: numbers of the images to deal out, by role.
        quotas: images of each role that a client gets.
        classes_per_client: classes of one client.
        rng: source of all randomness.

    Returns:
        A list of (parent category, images by role), one entry per client.
    """
    num_classes = len(parents_K)
    roles = list(pools)
    # decks[role][k]: the pool's images of class k in random order; cursor[r, k]: how many are dealt
    decks = {}
    for role, pool in pools.items():
        pool = rng.permutation(pool)
        decks[role] = Ragged.from_pairs(labels_M[pool], pool, num_classes)
    left_RK = np.stack([decks[role].lengths for role in roles])
    cursor_RK = np.zeros_like(left_RK)
    # A parent's classes count as its own only where every pool has images of them.
    held_K = (left_RK > 0).all(axis=0)
    members = {int(p): np.flatnonzero((parents_K == p) & held_K) for p in np.unique(parents_K)}
    members = {p: classes for p, classes in members.items() if len(classes)}
    want = {p: min(classes_per_client, len(classes)) for p, classes in members.items()}
    quota_R = np.array([quotas[role] for role in roles])

    clients = []
    eligible: dict[int, np.ndarray] = {}  # classes of every parent with images for one more client
    weights: dict[int, int] = {}  # images that they have left
    changed = list(members)  # dealing changes one parent at a time
    while True:
        for p in changed:
            enough = (left_RK[:, members[p]] >= -(-quota_R // want[p])[:, None]).all(axis=0)
            if enough.sum() < want[p]:
                del members[p]  # images only ever leave: this parent is exhausted
            else:
                eligible[p] = members[p][enough]
                weights[p] = left_RK[:, eligible[p]].sum()
        if not members:
            break
        keys = list(members)
        weight_P = np.array([weights[p] for p in keys], dtype=np.float64)
        parent = keys[rng.choice(len(keys), p=weight_P / weight_P.sum())]
        changed = [parent]
        weight_k = left_RK[:, eligible[parent]].sum(axis=0).astype(np.float64)
        chosen = rng.choice(eligible[parent], size=want[parent], replace=False, p=weight_k / weight_k.sum())
        images = {}
        for r, role in enumerate(roles):
            share, extra = divmod(int(quota_R[r]), len(chosen))
            parts = []
            for j, k in enumerate(chosen):
                take = share + (j < extra)
                start = cursor_RK[r, k]
                parts.append(decks[role][k][start : start + take])
                cursor_RK[r, k] += take
                left_RK[r, k] -= take
            images[role] = rng.permutation(np.concatenate(parts))
        clients.append((parent, images))
    return clients


def in_words(classes: int) -> str:
    """Return a number of classes in words, which is the type of a client whose classes have nothing in common."""
    return "1 class" if classes == 1 else f"{classes} classes"


def parents_or_any(
    table: pd.DataFrame, num_classes: int, by: str, classes_per_client: int, turnover: int = 0
) -> tuple[np.ndarray, list[str]]:
    """Return the parent of every class, int64 [K], and the types' names; with ``by="class"`` one parent for all.

    Raises `ConfigError` where no parent has ``classes_per_client`` classes, and ``turnover`` others to replace some.
    """
    if by == "class":
        parents_K, names = np.zeros(num_classes, dtype=np.int64), [in_words(classes_per_client)]
    else:
        parents_K, names = parents_of_classes(table, num_classes, ConfigError("by", by, "{problem}; use by=class"))
    biggest = int(np.bincount(parents_K).max())
    if classes_per_client + turnover > biggest:
        problem = f"{'the dataset has' if by == 'class' else 'the largest parent category has'} {biggest} classes"
        if turnover:
            problem += f", of which turnover={turnover} needs as many besides"
        problem += f"; use 1 to {biggest - turnover}" if biggest > turnover else "; use less turnover"
        raise ConfigError("classes_per_client", classes_per_client, problem)
    return parents_K, names


class ClassesPerClient(Partition):
    """Clients that see a few classes each.

    Args:
        classes_per_client: distinct classes of one client.
        images_per_client: images of one client. Split by client, each client has this many images of its one role;
            split within client, they are shared among train, val and test like the sizes of the pools.
        by: ``class``: any classes together; ``parent``: classes of one parent category.
        split: ``client``: train, val and test clients are different clients; ``within``: every client has
            images of all three. Either way the images of the three roles are disjoint.
        deals: how many times the train and val images are dealt out, to clients of other classes each time; the
            test images are dealt once, so that every one counts once.
        val_share: of the train images, class by class, where the dataset has no val images of its own.
        seed: seed of the partition.
    """

    def __init__(
        self,
        classes_per_client: int = 2,
        images_per_client: int = 16,
        by: str = "class",
        split: str = "client",
        deals: int = 10,
        val_share: float = 0.2,
        seed: int = 0,
    ) -> None:
        self.classes_per_client = check_int("classes_per_client", classes_per_client, 1)
        self.images_per_client = check_int("images_per_client", images_per_client, 1)
        self.by = check_choice("by", by, ("class", "parent"))
        self.split = check_choice("split", split, ("client", "within"))
        self.deals = check_int("deals", deals, 1)
        self.val_share = check_float("val_share", val_share, 0.0, 0.9, open_low=True)
        self.seed = check_int("seed", seed, 0)

    def assign(self, table: pd.DataFrame, num_classes: int) -> Clients:
        """Return the clients; raises `ConfigError` where some role would have no client or a client no image."""
        labels_M = single_labels(table, self)
        parents_K, names = parents_or_any(table, num_classes, self.by, self.classes_per_client)
        if self.images_per_client < self.classes_per_client:
            problem = f"a client of {self.classes_per_client} classes needs at least {self.classes_per_client} images"
            raise ConfigError("images_per_client", self.images_per_client, problem)
        rng = generator("classes_per_client", self.seed)
        pools = role_pools(table, labels_M, self.val_share, rng, self)
        entries: list[tuple[str, str, dict[str, np.ndarray]]] = []  # (id, type, images by role)

        def deal(roles: tuple[str, ...], quotas: dict[str, int], name: str) -> None:
            chosen = {role: pools[role] for role in roles}
            clients = deal_classes(labels_M, parents_K, chosen, quotas, self.classes_per_client, rng)
            if not clients:
                problem = f"the {' and '.join(f'{len(pools[r])} {r}' for r in roles)} images do not fill one client"
                problem += f" of {in_words(self.classes_per_client)}; use fewer images per client"
                raise ConfigError("images_per_client", self.images_per_client, problem)
            ids = numbered(name, len(clients))
            entries.extend((i, names[parent], images) for i, (parent, images) in zip(ids, clients, strict=True))

        if self.split == "within":
            lacking = "every client without {role} images"
            quotas = share_out(self.images_per_client, pools, "images_per_client", lacking)
            deal(ROLES, quotas, "client")
        else:
            quotas = dict.fromkeys(ROLES, self.images_per_client)
        for d, role, name in rounds(self.deals):
            if self.split == "client" or d > 0:
                deal((role,), {role: quotas[role]}, name)
        return clients_of(entries)
