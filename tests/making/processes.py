"""Work for processes that train together; in a module, so that a started process finds it."""

from contextlib import nullcontext
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from iciia_exp.config.experiment import Experiment
from iciia_exp.engine.stages import Stages
from iciia_exp.engine.training.processes import spawn
from iciia_exp.models.backbones.base import Backbone


class Plain(Backbone):
    """A network without dropout and batch norm, whose gradients are sums over images."""

    transform_settings = ()

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.dim = 16
        self.trunk = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh())
        self.head = nn.Linear(16, num_classes)

    def features(self, images: Tensor) -> Tensor:
        return self.trunk(images)

    def transform(self, image: Any) -> Tensor:
        return torch.as_tensor(image)


class Kill(pl.Callback):
    """Stops every process in the middle of an epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch == self.epoch and batch_idx == 1:
            raise RuntimeError("killed")


def together(jobs):
    """Make artifacts in two processes: (configuration, kind, folder) each; ``run killed`` is one that `Kill` stops."""
    spawn(_make, 2, jobs)


def _make(jobs):
    for config, kind, folder in jobs:
        folder.mkdir(parents=True, exist_ok=True)
        with pytest.raises(RuntimeError, match="^killed$") if "killed" in kind else nullcontext():
            getattr(Stages(Experiment.from_config(OmegaConf.create(config))), kind.split()[0]).make(folder)
