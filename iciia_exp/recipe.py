"""Recipe: optimiser, schedule and length of training, with the same keys for backbones and methods."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from iciia_exp.errors import check_choice, check_float, check_int

if TYPE_CHECKING:
    import torch

__all__ = ["OPTIMIZERS", "SCHEDULES", "Recipe"]

OPTIMIZERS = ("sgd", "adam", "adamw")
SCHEDULES = ("constant", "cosine", "onecycle", "step")


class Recipe:
    """Optimiser, schedule and length of training.

    Args:
        optimizer: ``sgd``, ``adam`` or ``adamw``.
        lr: learning rate; with a schedule, its peak.
        epochs: passes over the data, at most.
        batch_size: items per step: images for a backbone, clients for a method.
        momentum: for ``sgd``.
        weight_decay: on all parameters.
        schedule: ``constant``, ``cosine`` (to zero), ``onecycle``, or ``step`` (a tenth every ``step_epochs``).
        clip_norm: largest norm of the gradient; 0 turns clipping off.
        patience: epochs without a better val accuracy after which training stops; 0 never stops early.
        trunk_lr: learning rate of a backbone's trunk; null is ``lr``.
        step_epochs: epochs between the steps of ``schedule: step``.
    """

    def __init__(
        self,
        optimizer: str = "adamw",
        lr: float = 1e-3,
        epochs: int = 10,
        batch_size: int = 32,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        schedule: str = "constant",
        clip_norm: float = 0.0,
        patience: int = 0,
        trunk_lr: float | None = None,
        step_epochs: int = 10,
    ) -> None:
        self.optimizer = check_choice("optimizer", optimizer, OPTIMIZERS)
        self.lr = check_float("lr", lr, 0.0, open_low=True)
        self.epochs = check_int("epochs", epochs, 1)
        self.batch_size = check_int("batch_size", batch_size, 1)
        self.momentum = check_float("momentum", momentum, 0.0, 1.0)
        self.weight_decay = check_float("weight_decay", weight_decay, 0.0)
        self.schedule = check_choice("schedule", schedule, SCHEDULES)
        self.clip_norm = check_float("clip_norm", clip_norm, 0.0)
        self.patience = check_int("patience", patience, 0)
        self.trunk_lr = self.lr if trunk_lr is None else check_float("trunk_lr", trunk_lr, 0.0)
        self.step_epochs = check_int("step_epochs", step_epochs, 1)

    def make_optimizer(
        self, parameters: Iterable[torch.nn.Parameter], trunk: Iterable[torch.nn.Parameter] = (), fused: bool = True
    ) -> torch.optim.Optimizer:
        """Return the optimiser over ``parameters`` and, at ``trunk_lr``, a backbone's ``trunk``.

        ``fused`` (Adam, AdamW) passes over memory once, not ten times.
        """
        import torch

        groups: list[dict[str, Any]] = [{"params": list(parameters)}]
        if trunk_parameters := list(trunk):
            groups.append({"params": trunk_parameters, "lr": self.trunk_lr})
        if self.optimizer == "sgd":
            return torch.optim.SGD(groups, self.lr, momentum=self.momentum, weight_decay=self.weight_decay)
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[self.optimizer]
        return kind(groups, self.lr, weight_decay=self.weight_decay, fused=fused)

    def make_schedule(
        self, optimizer: torch.optim.Optimizer, steps: int, epochs: int
    ) -> torch.optim.lr_scheduler.LRScheduler | None:
        """Return a scheduler to step every batch, for ``steps`` batches in ``epochs`` epochs; None if constant."""
        from torch.optim import lr_scheduler

        if self.schedule == "cosine":
            return lr_scheduler.CosineAnnealingLR(optimizer, steps)
        if self.schedule == "onecycle":
            # the step after the last batch is one more than OneCycleLR allows
            peaks = [group["lr"] for group in optimizer.param_groups]
            return lr_scheduler.OneCycleLR(optimizer, peaks, total_steps=steps + 1)
        if self.schedule == "step":
            return lr_scheduler.StepLR(optimizer, max(1, steps * self.step_epochs // epochs), gamma=0.1)
        return None
