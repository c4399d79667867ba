"""Partitions: from labels, owners and parents to clients, as pure functions of an explicit generator."""

from iciia_exp.data.partitions.base import Partition
from iciia_exp.data.partitions.classes_per_client import ClassesPerClient
from iciia_exp.data.partitions.parent_category import ParentCategory

__all__ = ["ClassesPerClient", "ParentCategory", "Partition"]
