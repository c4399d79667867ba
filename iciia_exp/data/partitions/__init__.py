"""Partitions: rules that assign the images of a dataset to clients."""

from iciia_exp.data.partitions.base import Partition
from iciia_exp.data.partitions.classes_per_client import ClassesPerClient
from iciia_exp.data.partitions.dirichlet import Dirichlet
from iciia_exp.data.partitions.drift import Drift
from iciia_exp.data.partitions.owner import Owner
from iciia_exp.data.partitions.parent_category import ParentCategory, ReserveRatio
from iciia_exp.data.partitions.tasks import Tasks

__all__ = ["ClassesPerClient", "Dirichlet", "Drift", "Owner", "ParentCategory", "Partition", "ReserveRatio", "Tasks"]
