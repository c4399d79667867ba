"""Setup: what is evaluated, on which clients and device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from iciia_exp.data.batches import FeatureBatches
from iciia_exp.data.clients import Clients
from iciia_exp.methods.base import Method
from iciia_exp.tasks import Task

__all__ = ["Setup"]


@dataclass(frozen=True)
class Setup:
    """A trained method beside the backbone, and the clients whose test images they classify."""

    #: The method and the backbone's classifier, in evaluation mode.
    method: Method
    head: nn.Linear
    #: Gathers features and labels.
    batches: FeatureBatches
    clients: Clients
    device: torch.device | str = "cpu"

    @property
    def task(self) -> Task:
        """The method's task."""
        return self.method.task
