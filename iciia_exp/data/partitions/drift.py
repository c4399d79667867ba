"""Drift partition: the classes of a client change along its history; `deal_histories` is the pure function.

Legend: M images of the dataset, K classes, k classes of one parent category.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from iciia_exp.data.clients import Clients, Ragged
from iciia_exp.data.partitions.base import Partition, clients_of, numbered, role_pools, rounds, single_labels
from iciia_exp.data.partitions.classes_per_client import in_words, parents_or_any
from iciia_exp.errors import ConfigError, check_choice, check_float, check_int
from iciia_exp.seeding import generator

__all__ = ["Drift", "deal_histories", "draw_phases"]

#: A parent category is used up when this many histories in a row could not be completed.
_TRIES = 20


def draw_phases(
    left_k: np.ndarray, need: int, classes: int, phases: int, turnover: int, rng: np.random.Generator
) -> list[np.ndarray] | None:
    """Draw the classes of one history, phase by phase (numbers in ``left_k``), or None where they run out on the way.

    New classes are drawn in proportion to the images left, from those that the phase before did not have. Old ones go
    at random, but first those without images for another phase.

    Args:
        left_k: images left of every class.
        need: images of a class in one phase, at most.
        classes, phases, turnover: classes of a phase, number of phases, classes replaced from one to the next.
        rng: source of all randomness.
    """
    left_k = left_k.copy()

    def draw(number: int, but: np.ndarray | None = None) -> list[int] | None:
        weight_k = np.where(left_k >= need, left_k, 0)
        if but is not None:
            weight_k[but] = 0
        drawn: list[int] = []
        for _ in range(number):  # what `Generator.choice` does, in a third of its time
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
        new = draw(turnover, but=order)
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
    """Deal a pool of images out to clients with histories, every image to at most one client.

    A client draws a parent category, in proportion to the images it has left, and its classes phase by phase; a phase
    has ``images_per_phase`` images, spread over its classes as evenly as whole numbers allow. Dealing ends when no
    parent can fill another history, so some images of each class stay undealt.

    Returns:
        A list of (parent category, images in the order of the history), one entry per client.
    """
    pool = rng.permutation(pool)
    decks = Ragged.from_pairs(labels_M[pool], pool, len(parents_K))
    left_K = decks.lengths
    need = -(-images_per_phase // classes_per_client)
    share, extra = divmod(images_per_phase, classes_per_client)
    # classes in sight at a phase and the one before
    wide = classes_per_client + (turnover if phases > 1 else 0)
    members = {int(p): np.flatnonzero((parents_K == p) & (left_K > 0)) for p in np.unique(parents_K)}
    weights: dict[int, int] = {}
    failures = dict.fromkeys(members, 0)
    changed = list(members)
    clients: list[tuple[int, np.ndarray]] = []
    while True:
        for p in changed:
            enough = left_K[members[p]] >= need
            if enough.sum() < wide or failures[p] == _TRIES:
                del members[p]
            else:
                weights[p] = left_K[members[p][enough]].sum()
        if not members:
            return clients
        keys = list(members)
        weight_P = np.array([weights[p] for p in keys], dtype=np.float64)
        parent = keys[rng.choice(len(keys), p=weight_P / weight_P.sum())]
        changed = [parent]
        history = draw_phases(left_K[members[parent]], need, classes_per_client, phases, turnover, rng)
        if history is None:
            failures[parent] += 1
            continue
        failures[parent] = 0
        images = []
        for chosen in history:
            parts = []
            for j, k in enumerate(members[parent][chosen]):
                take, dealt = share + (j < extra), len(decks[k]) - left_K[k]
                parts.append(decks[k][dealt : dealt + take])
                left_K[k] -= take
            images.append(rng.permutation(np.concatenate(parts)))
        clients.append((parent, np.concatenate(images)))


class Drift(Partition):
    """Clients that see a few classes at a time, and others later; split by client.

    A client's images are in the order of its history: phase after phase, shuffled within a phase. The images of train,
    val and test clients are disjoint.

    Args:
        classes_per_client: distinct classes of one client in one phase.
        images_per_phase: images of one client in one phase.
        phases: how many phases a history has; a client has ``phases * images_per_phase`` images.
        turnover: classes that are replaced from one phase to the next; a class may come back after a phase.
        by: ``class``: any classes together; ``parent``: classes of one parent category, which needs
            ``classes_per_client + turnover`` of them.
        deals: how many times the train and val images are dealt out, to clients of other classes each time; the
            test images are dealt once, so that every one counts once.
        val_share: of the train images, class by class, where the dataset has no val images of its own.
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
        self.classes_per_client = check_int("classes_per_client", classes_per_client, 1)
        self.images_per_phase = check_int(
            "images_per_phase", images_per_phase, classes_per_client, why="one image of each class"
        )
        self.phases = check_int("phases", phases, 1)
        self.turnover = check_int("turnover", turnover, 0, classes_per_client, why="of classes_per_client")
        self.by = check_choice("by", by, ("class", "parent"))
        self.deals = check_int("deals", deals, 1)
        self.val_share = check_float("val_share", val_share, 0.0, 0.9, open_low=True)
        self.seed = check_int("seed", seed, 0)

    def assign(self, table: pd.DataFrame, num_classes: int) -> Clients:
        """Return the clients; raises `ConfigError` where some role would have none."""
        labels_M = single_labels(table, self)
        turnover = self.turnover if self.phases > 1 else 0
        parents_K, names = parents_or_any(table, num_classes, self.by, self.classes_per_client, turnover)
        rng = generator("drift", self.seed)
        pools = role_pools(table, labels_M, self.val_share, rng, self)
        sizes = self.classes_per_client, self.images_per_phase, self.phases, self.turnover
        entries: list[tuple[str, str, dict[str, np.ndarray]]] = []  # (id, type, images by role)
        for _, role, name in rounds(self.deals):
            clients = deal_histories(labels_M, parents_K, pools[role], *sizes, rng)
            if not clients:
                problem = f"the {len(pools[role])} {role} images do not fill {self.phases} phases"
                problem += f" of {in_words(self.classes_per_client)}; use fewer images per phase, or fewer phases"
                raise ConfigError("images_per_phase", self.images_per_phase, problem)
            ids = numbered(name, len(clients))
            entries += [(i, names[parent], {role: rows}) for i, (parent, rows) in zip(ids, clients, strict=True)]
        return clients_of(entries, in_time=True)
