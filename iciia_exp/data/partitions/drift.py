"""Drift partition: the classes of a client change over time.

Legend: M images of the dataset, K classes, k classes of one parent category.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from iciia_exp.data.clients import Clients
from iciia_exp.data.partitions import base
from iciia_exp.data.partitions.classes_per_client import in_words, parents_or_any
from iciia_exp.errors import ConfigError, check_choice, check_int
from iciia_exp.seeding import generator

__all__ = ["Drift", "deal_histories", "draw_phases"]

#: A parent category is exhausted after this many failed draws of a history in a row.
_TRIES = 20


def draw_phases(
    left_k: np.ndarray, need: int, classes: int, phases: int, turnover: int, rng: np.random.Generator
) -> list[np.ndarray] | None:
    """Draw the classes of one history, phase by phase, as indices of ``left_k``; None if the images do not suffice.

    New classes are drawn in proportion to their unused images, from the classes that the previous phase did not have.
    The replaced classes, ``turnover`` of ``classes`` between two phases, are drawn at random; classes with less than
    ``need`` unused images, the most of a class in one phase, are replaced first.
    """
    left_k = left_k.copy()

    def draw(number: int, exclude: Sequence[int] | np.ndarray = ()) -> list[int] | None:
        weight_k = np.where(left_k >= need, left_k, 0)
        weight_k[list(exclude)] = 0
        drawn: list[int] = []
        for _ in range(number):  # like `Generator.choice`, in a third of the time
            sum_k = np.cumsum(weight_k)
            if not sum_k[-1]:
                return None
            drawn.append(int(np.searchsorted(sum_k, rng.random() * sum_k[-1], side="right")))
            weight_k[drawn[-1]] = 0
        return drawn

    now = draw(classes)
    history: list[np.ndarray] = []
    while now is not None:
        history.append(np.array(now))
        if len(history) == phases:
            return history
        left_k[now] -= need
        order = rng.permutation(now)
        order = order[np.argsort(left_k[order] >= need, kind="stable")]  # the exhausted ones first
        stay = order[turnover:]
        new = draw(turnover, exclude=order)
        now = None if new is None or (left_k[stay] < need).any() else [*stay, *new]
    return None


def deal_histories(
    labels_M: np.ndarray,
    parents_K: np.ndarray,
    pool: np.ndarray,
    classes_per_client: int,
    images_per_phase: int,
    phases: int,
    turnover: int,
    rng: np.random.Generator,
) -> list[tuple[int, np.ndarray]]:
    """Assign a pool of images to clients with histories, every image to at most one client.

    A client draws a parent category, in proportion to its unused images, and its classes phase by phase. A phase has
    ``images_per_phase`` images, spread over its classes as evenly as whole numbers allow. Clients are made until no
    parent can fill another history, so some images of each class stay unused. Returns a list of (parent category,
    images in the order of the history), an entry per client.
    """
    by_class = base.shuffled_groups(labels_M, pool, len(parents_K), rng)
    left_K = by_class.lengths
    need = -(-images_per_phase // classes_per_client)
    distinct = classes_per_client + (turnover if phases > 1 else 0)  # classes of two phases in a row
    members = {int(p): np.flatnonzero((parents_K == p) & (left_K > 0)) for p in np.unique(parents_K)}
    failures = dict.fromkeys(members, 0)

    def weigh(parent: int) -> int:
        left_k = left_K[members[parent]]
        enough = left_k >= need
        return 0 if enough.sum() < distinct or failures[parent] == _TRIES else left_k[enough].sum()

    def draw(parent: int) -> np.ndarray | None:
        history = draw_phases(left_K[members[parent]], need, classes_per_client, phases, turnover, rng)
        failures[parent] = failures[parent] + 1 if history is None else 0
        if history is None:
            return None
        classes = (members[parent][phase] for phase in history)
        return np.concatenate([base.take_evenly(by_class, left_K, k, images_per_phase, rng) for k in classes])

    return base.deal_by_parent(members, weigh, draw, rng)


class Drift(base.Partition):
    """Clients whose classes change over time; train, val and test clients are different clients.

    A client's images are in the order of its history: phase by phase, shuffled within a phase. The images of train,
    val and test clients are disjoint.

    Args:
        classes_per_client: distinct classes of one client in one phase.
        images_per_phase: images of one client in one phase.
        phases: phases of a history; a client has ``phases * images_per_phase`` images.
        turnover: classes that are replaced between two phases; a class may return one phase later.
        by: ``class``: any classes can be together; ``parent``: the classes of a client have one parent category, which
            needs ``classes_per_client + turnover`` classes.
        deals: how often the train and val images are assigned, with other classes each time; test images once.
        val_share: share of the train images of every class for val, if the dataset has no val images.
        seed: seed of the partition.
    """

    def __init__(
        self,
        classes_per_client: int = 2,
        images_per_phase: int = 8,
        phases: int = 4,
        turnover: int = 1,
        by: str = "class",
        deals: int = 10,
        val_share: float = 0.2,
        seed: int = 0,
    ) -> None:
        super().__init__(val_share, seed)
        self.classes_per_client = check_int("classes_per_client", classes_per_client, 1)
        each = "one image of each class"
        self.images_per_phase = check_int("images_per_phase", images_per_phase, classes_per_client, why=each)
        self.phases = check_int("phases", phases, 1)
        self.turnover = check_int("turnover", turnover, 0, classes_per_client, why="of classes_per_client")
        self.by = check_choice("by", by, ("class", "parent"))
        self.deals = check_int("deals", deals, 1, 1000, "deals of all images")

    def assign(self, table: pd.DataFrame, num_classes: int) -> Clients:
        """Return the clients; raises `ConfigError` where a role would have no client."""
        labels_M = base.single_labels(table, self)
        turnover = self.turnover if self.phases > 1 else 0
        parents_K, names = parents_or_any(table, num_classes, self.by, self.classes_per_client, turnover)
        rng = generator("drift", self.seed)
        pools = base.role_pools(table, labels_M, self.val_share, rng, self)
        sizes = self.classes_per_client, self.images_per_phase, self.phases, self.turnover
        entries: list[tuple[str, str, dict[str, np.ndarray]]] = []  # (id, type, images by role)
        for _, role, name in base.rounds(self.deals):
            clients = deal_histories(labels_M, parents_K, pools[role], *sizes, rng)
            if not clients:
                problem = f"the {len(pools[role])} {role} images do not fill {self.phases} phases"
                problem += f" of {in_words(self.classes_per_client)}; use fewer images per phase, or fewer phases"
                raise ConfigError("images_per_phase", self.images_per_phase, problem)
            ids = base.numbered(name, len(clients))
            entries += [(i, names[parent], {role: rows}) for i, (parent, rows) in zip(ids, clients, strict=True)]
        return base.clients_of(entries, in_time=True)
