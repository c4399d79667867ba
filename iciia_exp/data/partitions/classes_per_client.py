"""Classes-per-client partition: every client has images of a few classes.

Legend: M images of the dataset, K classes, R roles.
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from iciia_exp.data.clients import ROLES, Clients
from iciia_exp.data.partitions import base
from iciia_exp.errors import ConfigError, check_choice, check_int
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
    """Assign pools of images, by role, to clients with few classes; every image goes to at most one client.

    A client draws a parent category, in proportion to its unused images, and ``classes_per_client`` distinct classes
    of that parent (all, if it has fewer), again in proportion. From every pool it gets its quota of images, spread over
    its classes as evenly as whole numbers allow. Clients are drawn until no parent can fill another one, so a few
    images of each class may stay unused. Returns a list of (parent category, images by role), an entry per client.
    """
    groups = {role: base.shuffled_groups(labels_M, pool, len(parents_K), rng) for role, pool in pools.items()}
    left_RK = np.stack([by_class.lengths for by_class in groups.values()])  # unused images
    quota_R = np.array([quotas[role] for role in pools])
    held_K = (left_RK > 0).all(axis=0)  # a class counts where every pool has images of it
    members = {int(p): np.flatnonzero((parents_K == p) & held_K) for p in np.unique(parents_K[held_K])}
    want = {p: min(classes_per_client, len(classes)) for p, classes in members.items()}
    eligible: dict[int, np.ndarray] = {}  # classes of every parent with images for one more client

    def weigh(parent: int) -> int:
        enough = (left_RK[:, members[parent]] >= -(-quota_R // want[parent])[:, None]).all(axis=0)
        eligible[parent] = members[parent][enough]
        return left_RK[:, eligible[parent]].sum() if enough.sum() >= want[parent] else 0

    def draw(parent: int) -> dict[str, np.ndarray]:
        weight_k = left_RK[:, eligible[parent]].sum(axis=0).astype(np.float64)
        chosen = rng.choice(eligible[parent], size=want[parent], replace=False, p=weight_k / weight_k.sum())
        return {
            role: base.take_evenly(groups[role], left_K, chosen, quotas[role], rng)
            for role, left_K in zip(pools, left_RK, strict=True)
        }

    return base.deal_by_parent(members, weigh, draw, rng)


def in_words(classes: int) -> str:
    """Return a number of classes in words: the type of a client whose classes have no parent in common."""
    return "1 class" if classes == 1 else f"{classes} classes"


def parents_or_any(
    table: pd.DataFrame, num_classes: int, by: str, classes_per_client: int, turnover: int = 0
) -> tuple[np.ndarray, list[str]]:
    """Return the parent of every class, int64 [K], and the names of the client types; ``by="class"`` has one parent.

    Raises `ConfigError` unless some parent has ``classes_per_client + turnover`` classes.
    """
    if by == "class":
        parents_K, names = np.zeros(num_classes, dtype=np.int64), [in_words(classes_per_client)]
    else:
        parents_K, names = base.parents_of_classes(table, num_classes, "by", by, "use by=class")
    biggest = int(np.bincount(parents_K).max())
    if classes_per_client + turnover > biggest:
        problem = f"{'the dataset has' if by == 'class' else 'the largest parent category has'} {biggest} classes"
        if turnover:
            problem += f", and turnover={turnover} needs {turnover} of them"
        problem += f"; use 1 to {biggest - turnover}" if biggest > turnover else "; use less turnover"
        raise ConfigError("classes_per_client", classes_per_client, problem)
    return parents_K, names


class ClassesPerClient(base.Partition):
    """Clients with images of a few classes each.

    Args:
        classes_per_client: distinct classes of one client.
        images_per_client: images of one client. With ``split=client``, all are of the client's one role; with
            ``split=within``, they are divided among train, val and test in proportion to the sizes of the pools.
        by: ``class``: any classes can be together; ``parent``: the classes of a client have one parent category.
        split: ``client``: train, val and test clients are different clients; ``within``: every client has images of
            all three roles. In both cases the images of the roles are disjoint.
        deals: how often the train and val images are assigned, with other classes each time; test images once.
        val_share: share of the train images of every class for val, if the dataset has no val images.
        seed: seed of the partition.
        train_images: of a client, at most, drawn at random; null: all.
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
        train_images: int | None = None,
    ) -> None:
        super().__init__(val_share, seed, train_images)
        self.classes_per_client = check_int("classes_per_client", classes_per_client, 1)
        each = "one image of each class"
        self.images_per_client = check_int("images_per_client", images_per_client, classes_per_client, why=each)
        self.by = check_choice("by", by, ("class", "parent"))
        self.split = check_choice("split", split, ("client", "within"))
        self.deals = check_int("deals", deals, 1, 1000, "deals of all images")

    def assign(self, table: pd.DataFrame, num_classes: int) -> Clients:
        """Return the clients; raises `ConfigError` where a role would have no client or a client no image."""
        labels_M = base.single_labels(table, self)
        parents_K, names = parents_or_any(table, num_classes, self.by, self.classes_per_client)
        rng = generator("classes_per_client", self.seed)
        pools = base.role_pools(table, labels_M, self.val_share, rng, self)
        quotas = dict.fromkeys(ROLES, self.images_per_client)
        groups: list[tuple[tuple[str, ...], str]] = [((role,), name) for _, role, name in base.rounds(self.deals)]
        if self.split == "within":
            lacking = "every client without {role} images"
            sizes = {role: len(pool) for role, pool in pools.items()}
            quotas = base.share_out(self.images_per_client, sizes, "images_per_client", lacking)
            groups = [(ROLES, "client"), *(((role,), name) for d, role, name in base.rounds(self.deals) if d > 0)]
        entries: list[tuple[str, str, dict[str, np.ndarray]]] = []  # (id, type, images by role)
        for roles, name in groups:
            chosen = {role: pools[role] for role in roles}
            clients = deal_classes(labels_M, parents_K, chosen, quotas, self.classes_per_client, rng)
            if not clients:
                problem = f"the {' and '.join(f'{len(pools[r])} {r}' for r in roles)} images do not fill one client"
                problem += f" of {in_words(self.classes_per_client)}; use fewer images per client"
                raise ConfigError("images_per_client", self.images_per_client, problem)
            ids = base.numbered(name, len(clients))
            entries += [(i, names[parent], images) for i, (parent, images) in zip(ids, clients, strict=True)]
        return self.limited(base.clients_of(entries))
