"""Clients that see a few classes each: `deal_classes` is the pure function, the class around it checks and chooses."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from iciia_exp.data.clients import ROLES, Clients, Ragged
from iciia_exp.data.partitions.base import Partition, parents_of_classes
from iciia_exp.errors import ConfigError, check_choice, check_int
from iciia_exp.seeding import generator

__all__ = ["ClassesPerClient", "deal_classes"]


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
        by_class = pool[np.argsort(labels_M[pool], kind="stable")]
        counts_K = np.bincount(labels_M[pool], minlength=num_classes)
        decks[role] = np.split(by_class, np.cumsum(counts_K)[:-1])
    left_RK = np.array([[len(deck) for deck in decks[role]] for role in roles], dtype=np.int64)
    cursor_RK = np.zeros_like(left_RK)
    # A parent's classes count as its own only where every pool has images of them.
    held_K = (left_RK > 0).all(axis=0)
    members = {int(p): np.flatnonzero((parents_K == p) & held_K) for p in np.unique(parents_K)}
    members = {p: classes for p, classes in members.items() if len(classes)}
    want = {p: min(classes_per_client, len(classes)) for p, classes in members.items()}
    quota_R = np.array([quotas[role] for role in roles])

    clients = []
    while members:
        eligible = {}
        for p in list(members):
            enough = (left_RK[:, members[p]] >= -(-quota_R // want[p])[:, None]).all(axis=0)
            if enough.sum() < want[p]:
                del members[p]  # images only ever leave: this parent is exhausted
            else:
                eligible[p] = members[p][enough]
        if not members:
            break
        keys = list(members)
        weight_P = np.array([left_RK[:, eligible[p]].sum() for p in keys], dtype=np.float64)
        parent = keys[rng.choice(len(keys), p=weight_P / weight_P.sum())]
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


class ClassesPerClient(Partition):
    """Clients that see a few classes each.

    Args:
        classes_per_client: distinct classes of one client.
        images_per_client: images of one client. Split by client, each client has this many images of its one role;
            split within client, they are shared among train, selection and test like the sizes of the pools.
        by: ``class``: any classes together; ``parent``: classes of one parent category.
        split: ``client``: train, selection and test clients are different clients; ``within``: every client has
            images of all three. Either way the images of the three roles are disjoint.
        deals: how many times the train and selection images are dealt out, to clients of other classes each time; the
            test images are dealt once, so that every one counts once.
        seed: seed of the partition.
    """

    def __init__(
        self,
        classes_per_client: int = 2,
        images_per_client: int = 16,
        by: str = "class",
        split: str = "client",
        deals: int = 1,
        seed: int = 0,
    ) -> None:
        self.classes_per_client = check_int("classes_per_client", classes_per_client, 1)
        self.images_per_client = check_int("images_per_client", images_per_client, 1)
        self.by = check_choice("by", by, ("class", "parent"))
        self.split = check_choice("split", split, ("client", "within"))
        self.deals = check_int("deals", deals, 1)
        self.seed = check_int("seed", seed, 0)

    def assign(self, table: pd.DataFrame, num_classes: int) -> Clients:
        """Return the clients; raises `ConfigError` where some role would have no client or a client no image."""
        labels_M = table["label"].to_numpy()
        parents_K, names = self._parents(table, num_classes)
        biggest = int(np.bincount(parents_K).max())
        if self.classes_per_client > biggest:
            of = "the dataset has" if self.by == "class" else "the largest parent category has"
            problem = f"{of} {biggest} classes; use 1 to {biggest}"
            raise ConfigError("classes_per_client", self.classes_per_client, problem)
        if self.images_per_client < self.classes_per_client:
            problem = f"a client of {self.classes_per_client} classes needs at least {self.classes_per_client} images"
            raise ConfigError("images_per_client", self.images_per_client, problem)
        pools = {role: np.flatnonzero(table["split"].to_numpy() == role) for role in ROLES}
        for role, pool in pools.items():
            if not len(pool):
                raise ConfigError("split", self.split, f"the dataset has no {role} images for any client")

        rng = generator("classes_per_client", self.seed)
        entries: list[tuple[str, int, dict[str, np.ndarray]]] = []  # (id, parent, images by role)

        def deal(roles: tuple[str, ...], quotas: dict[str, int], name: str) -> None:
            chosen = {role: pools[role] for role in roles}
            clients = deal_classes(labels_M, parents_K, chosen, quotas, self.classes_per_client, rng)
            if not clients:
                problem = f"the {' and '.join(f'{len(pools[r])} {r}' for r in roles)} images do not fill one client"
                problem += f" of {self._classes}; use fewer images per client"
                raise ConfigError("images_per_client", self.images_per_client, problem)
            width = len(str(len(clients) - 1))
            entries.extend((f"{name}-{i:0{width}d}", parent, images) for i, (parent, images) in enumerate(clients))

        quotas = self._quotas(pools)
        if self.split == "within":
            deal(ROLES, quotas, "client")
        for d in range(self.deals):
            for role in ROLES:
                if (role == "test" and d > 0) or (self.split == "within" and d == 0):
                    continue
                deal((role,), {role: quotas[role]}, role if self.deals == 1 or role == "test" else f"{role}-{d}")
        empty = np.empty(0, dtype=np.int64)
        return Clients(
            ids=np.array([name for name, _, _ in entries], dtype=object),
            kinds=np.array([names[parent] for _, parent, _ in entries], dtype=object),
            **{role: Ragged.from_rows([images.get(role, empty) for _, _, images in entries]) for role in ROLES},
        )

    @property
    def _classes(self) -> str:
        return "1 class" if self.classes_per_client == 1 else f"{self.classes_per_client} classes"

    def _parents(self, table: pd.DataFrame, num_classes: int) -> tuple[np.ndarray, list[str]]:
        """Return the parent of every class, numbered, and the kinds' names."""
        if self.by == "class":
            return np.zeros(num_classes, dtype=np.int64), [self._classes]
        return parents_of_classes(table, num_classes, ConfigError("by", self.by, "{problem}; use by=class"))

    def _quotas(self, pools: dict[str, np.ndarray]) -> dict[str, int]:
        if self.split == "client":
            return dict.fromkeys(ROLES, self.images_per_client)
        total = sum(len(pool) for pool in pools.values())
        exact = {role: self.images_per_client * len(pool) / total for role, pool in pools.items()}
        quotas = {role: int(share) for role, share in exact.items()}
        for role in sorted(ROLES, key=lambda r: quotas[r] - exact[r])[: self.images_per_client - sum(quotas.values())]:
            quotas[role] += 1  # largest remainders first
        if short := [role for role in ROLES if not quotas[role]]:
            need = int(np.ceil(total / min(len(pool) for pool in pools.values())))
            problem = f"would leave every client without {short[0]} images; use at least {need}"
            raise ConfigError("images_per_client", self.images_per_client, problem)
        return quotas
