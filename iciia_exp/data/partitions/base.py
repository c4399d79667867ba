"""The interface of a partition, and what several of them need."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import pandas as pd

from iciia_exp.data.clients import Clients
from iciia_exp.errors import ConfigError

__all__ = ["Partition", "parents_of_classes"]


class Partition(ABC):
    """A rule that assigns a dataset's images to clients."""

    @abstractmethod
    def assign(self, table: pd.DataFrame, num_classes: int) -> Clients:
        """Return the clients of a dataset's table (columns label, split, owner, parent); a pure function."""


def parents_of_classes(table: pd.DataFrame, num_classes: int, lacking: ConfigError) -> tuple[np.ndarray, list[str]]:
    """Return the number of every class's parent category, int64 [K], and the parents' names in that order.

    A class without a parent raises ``lacking``, with ``{problem}`` in its text replaced by what is wrong.
    """
    of_class = table.dropna(subset=["parent"]).groupby("label")["parent"].first()
    missing = sorted(set(range(num_classes)) - set(of_class.index))
    if missing:
        some = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
        problem = lacking.problem.format(problem=f"the dataset has no parent category for the classes {some}")
        raise ConfigError(lacking.key, lacking.value, problem)
    codes, names = pd.factorize(of_class.sort_index(), sort=True)
    return np.asarray(codes, dtype=np.int64), [str(n) for n in names]
