"""Tasks partition: every client has a task, classes that no other client has.

Source: the setting of "Minimal Interaction Separated Tuning" (CVPR 2025, arXiv 2406.17559): a device has classes and
labels of its own, and few labelled images of them. The assignment of classes to tasks is ours.

Legend: M images of the dataset, K classes, C clients.
"""

import numpy as np
import pandas as pd

from iciia_exp.data.clients import ROLES, Clients, Ragged, positions
from iciia_exp.data.partitions.base import (
    Partition,
    option_name,
    parents_of_classes,
    role_pools,
    shuffled_groups,
    single_labels,
)
from iciia_exp.errors import ConfigError, check_choice, check_int
from iciia_exp.seeding import generator

__all__ = ["Tasks"]


class Tasks(Partition):
    """Every client has the train, val and test images of its own classes, of the dataset's splits.

    The type of a client is the group of its task, if the dataset has groups (VTAB), else ``task``.

    Args:
        by: ``parent``: a parent category (an alphabet, say) is a task. ``class``: classes are dealt out in turn, so
            that task t has the classes t, t + tasks, t + 2 tasks ...
        tasks: C, for ``by: class``.
        shots: train images of a class, drawn at random; null is all. A class with fewer has all of them.
        val_shots: val images of a class, likewise.
        fewest_classes: of a task; parents with fewer classes are left out.
        val_share: share of the train images of every class for val, before ``shots``, if the dataset has no val images.
        seed: seed of the draws.
    """

    def __init__(
        self,
        by: str = "parent",
        tasks: int = 10,
        shots: int | None = None,
        val_shots: int | None = None,
        fewest_classes: int = 2,
        val_share: float = 0.2,
        seed: int = 0,
    ) -> None:
        super().__init__(val_share, seed)
        self.by, self.tasks = check_choice("by", by, ("parent", "class")), check_int("tasks", tasks, 1)
        self.shots = None if shots is None else check_int("shots", shots, 1)
        self.val_shots = None if val_shots is None else check_int("val_shots", val_shots, 1)
        self.fewest_classes = check_int("fewest_classes", fewest_classes, 1)

    def assign(self, table: pd.DataFrame, num_classes: int) -> Clients:
        """Return a client for each task that has images of every role.

        Raises `ConfigError` if there is none, if a class has no parent, or if there are more tasks than classes.
        """
        labels_M, rng = single_labels(table, self), generator("tasks", self.seed)
        task_K, names = self._tasks(table, num_classes)
        pools = role_pools(table, labels_M, self.val_share, rng, self)
        most = {"train": self.shots, "val": self.val_shots, "test": None}
        rows = {}
        for role in ROLES:
            by_class = shuffled_groups(labels_M, pools[role], num_classes, rng)
            kept = task_K[by_class.row_numbers] >= 0
            if (limit := most[role]) is not None:
                kept &= positions(by_class.lengths) < limit
            rows[role] = shuffled_groups(task_K[labels_M], by_class.values[kept], len(names), rng)
        whole = np.flatnonzero(np.all([rows[role].lengths > 0 for role in ROLES], axis=0))
        if not len(whole):
            problem = f"no task has images of every role and {self.fewest_classes} classes or more"
            raise ConfigError("fewest_classes", self.fewest_classes, problem)
        ids = np.array([names[task] for task in whole], dtype=object)
        train, val, test = (Ragged.from_rows([rows[role][int(task)] for task in whole]) for role in ROLES)
        types = np.array(["task"] * len(names), dtype=object)
        if "group" in table:
            known = table["group"].notna().to_numpy() & (task_K[labels_M] >= 0)
            types[task_K[labels_M[known]]] = table["group"].to_numpy()[known]
        return Clients(ids, types[whole], train, val, test)

    def _tasks(self, table: pd.DataFrame, num_classes: int) -> tuple[np.ndarray, list[str]]:
        """Return the task of every class, int64 [K], -1 for none, and the names of the tasks."""
        if self.by == "class":
            if 2 * self.tasks > num_classes:
                problem = f"{num_classes} classes give {num_classes // 2} tasks of two or more"
                raise ConfigError("tasks", self.tasks, problem)
            width = len(str(self.tasks - 1))
            return np.arange(num_classes) % self.tasks, [f"task-{t:0{width}d}" for t in range(self.tasks)]
        hint = "use partition.by=class"
        parents_K, names = parents_of_classes(table, num_classes, "", option_name(self), hint)
        sizes = np.bincount(parents_K, minlength=len(names))
        return np.where(sizes[parents_K] >= self.fewest_classes, parents_K, -1), names
