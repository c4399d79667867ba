"""Partitions: from labels, owners and parents to clients, as pure functions of an explicit generator."""

from iciia_exp.data.partitions.base import Partition
from iciia_exp.data.partitions.classes_per_client import ClassesPerClient
from iciia_exp.data.partitions.dirichlet import Dirichlet
from iciia_exp.data.partitions.drift import Drift
from iciia_exp.data.partitions.owner import Owner
from iciia_exp.data.partitions.parent_category import ParentCategory
from iciia_exp.data.partitions.reserve_ratio import ReserveRatio

__all__ = ["ClassesPerClient", "Dirichlet", "Drift", "Owner", "ParentCategory", "Partition", "ReserveRatio"]
