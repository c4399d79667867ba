"""Lightning modules: a backbone on images, a classifier on features, a method on client batches.

A training that is killed and repeated gives the result of an uninterrupted one: checkpoints are written at the end of
every epoch, and all randomness comes from (seed, epoch, step).

Legend: B images, C clients, S images of a client, D features, K classes.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import BinaryCalibrationError
from torchmetrics.utilities import dim_zero_cat

from iciia_exp.data.batches import ClientBatch
from iciia_exp.data.images import ImageBatch
from iciia_exp.methods.base import Method
from iciia_exp.models.backbones.base import Backbone
from iciia_exp.recipe import Recipe
from iciia_exp.results.calibration import BINS
from iciia_exp.results.counts import ClientCountsMetric, batch_outcomes
from iciia_exp.tasks import CLICK, Task

__all__ = ["BackboneModule", "BaseModule", "ClassifierModule", "MethodModule"]

# The largest float32 below 1.
_BELOW_ONE = 1 - 2**-24

MONITOR = "val/accuracy"


class BaseModule(pl.LightningModule):
    """Optimiser and scheduler of a recipe, and a loss that is the mean over the items of all processes."""

    #: name of the training loss
    loss_name: str
    #: key of the optimiser in the configuration
    recipe_key: str
    #: metric of a scheduler that watches one (``ReduceLROnPlateau``)
    watched: str

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe

    def configure_optimizers(self) -> Any:
        """Build the recipe's optimiser and scheduler over the trained parameters."""
        # under a gradient scaler (16-mixed) a fused step unscales by itself, too late for clipping (Lightning PR 15555)
        fused = getattr(self.trainer.precision_plugin, "scaler", None) is None
        trunk = self.trunk_parameters()
        rest = [p for p in self.parameters() if p.requires_grad and not any(p is t for t in trunk)]
        optimizer = self.recipe.make_optimizer(rest, trunk, fused)
        steps, epochs = int(self.trainer.estimated_stepping_batches), int(self.trainer.max_epochs or 1)
        scheduler = self.recipe.make_scheduler(optimizer, steps, epochs)
        if scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {**scheduler, "monitor": self.watched}}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Step the scheduler; those of timm are told the number of epochs and of steps."""
        if hasattr(scheduler, "step_update"):
            scheduler.step(self.current_epoch + 1, metric)
            scheduler.step_update(self.global_step, metric)
        else:
            super().lr_scheduler_step(scheduler, metric)

    def mean_loss(self, loss: Tensor | None, items: int) -> Tensor:
        """Log the mean loss of this process's items, and return it so that gradients are those of all items' mean.

        Processes average their gradients, whatever their numbers of items.

        Args:
            loss: mean over ``items``; None if this process has none.
            items: their number.
        """
        if loss is None:  # the other processes wait for the gradients of this one
            loss = torch.stack([p.sum() for p in self.parameters() if p.requires_grad]).sum() * 0.0
        self.log_mean(self.loss_name, loss, items)
        if (processes := self.trainer.world_size) == 1:
            return loss
        mean = self.trainer.strategy.reduce(torch.tensor(float(items), device=self.device), reduce_op="mean")
        return loss * (items / mean.clamp(min=1 / processes))  # not 0 / 0 if no process has any

    def log_mean(self, name: str, value: Tensor, items: int) -> None:
        """Log the mean over the ``items`` of an epoch, of all processes."""
        self.log(name, value, on_step=False, on_epoch=True, prog_bar=True, sync_dist=True, batch_size=items)

    def trunk_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that are trained at the recipe's ``trunk_lr``."""
        return []

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip by norm; Lightning's own clipping refuses fused optimisers under mixed precision (issue 21435)."""
        if gradient_clip_val:
            nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)


class BackboneModule(BaseModule):
    """Trains trunk and head of a backbone on single images."""

    loss_name = watched = "backbone/loss"
    recipe_key = "backbone.recipe.optimizer"

    def __init__(self, backbone: Backbone, recipe: Recipe, task: Task) -> None:
        super().__init__(recipe)
        self.backbone, self.task = backbone, task

    def trunk_parameters(self) -> list[nn.Parameter]:
        """Return all but the classifier's parameters, if their rate is another."""
        if self.recipe.trunk_lr is None:
            return []
        head = set(map(id, self.backbone.head.parameters()))
        return [p for p in self.backbone.parameters() if id(p) not in head]

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor | None:
        """Return the loss of a batch of images; None if none of them could be read."""
        items = len(batch.images)
        if not items:
            return None if self.trainer.world_size == 1 else self.mean_loss(None, 0)
        if (own := self.backbone.training_loss(batch.images)) is not None:
            return self.mean_loss(own, items)
        logits_BK = self.backbone(batch.images)
        loss = self.mean_loss(self.task.loss(logits_BK, batch.labels), items)
        accuracy = self.task.correct(logits_BK, batch.labels).float().mean()
        self.log_mean("backbone/train_accuracy", accuracy, items)
        return loss


class ClassifierModule(BaseModule):
    """Trains a classifier of stored features on single images."""

    loss_name = watched = "classifier/loss"
    recipe_key = "classifier.optimizer"

    def __init__(self, classifier: nn.Module, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.classifier = classifier

    def training_step(self, batch: ClientBatch, batch_idx: int) -> Tensor:
        """Return the loss of a batch of images."""
        if not batch.mask_CS.any():
            return self.mean_loss(None, 0)
        arrays = {
            name: batch.arrays[name][:, 0] for name in getattr(self.classifier, "reads", ()) if name in batch.arrays
        }
        loss: Tensor = self.classifier.loss(batch.x_CSD[:, 0], batch.y_CS[:, 0], **arrays)  # type: ignore[operator]
        return self.mean_loss(loss, len(batch.client_C))


class MethodModule(BaseModule):
    """Trains a method on client batches, validates it on val clients, and counts per client in testing.

    Args:
        method: the method.
        head: the backbone's frozen classifier, for the paired counts.
        recipe: optimisation.
        clients: number of clients in the partition.
        unseen: numbers of the classes that the backbone has not learned from, to be counted apart; None: none are.
    """

    loss_name, watched = "train/loss", "val/log_loss"
    recipe_key = "optimizer"

    def __init__(
        self, method: Method, head: nn.Linear, recipe: Recipe, clients: int, unseen: Sequence[int] | None = None
    ) -> None:
        super().__init__(recipe)
        self.method = method
        decisions = method.task.decisions(method.num_classes)
        self._head = [head.requires_grad_(False)]  # in a list: not part of the checkpoint
        ranked = method.task == CLICK
        self.val_counts = ClientCountsMetric(clients, decisions, ranked)
        self.test_counts = ClientCountsMetric(clients, decisions, ranked)
        self.unseen = unseen
        parts = () if unseen is None else ("seen", "unseen", "backbone_seen", "backbone_unseen")
        self.by_class = nn.ModuleDict({part: MeanMetric() for part in parts})
        #: expected calibration error
        self.calibration = nn.ModuleDict({who: BinaryCalibrationError(BINS) for who in ("method", "backbone")})

    def training_step(self, batch: ClientBatch, batch_idx: int) -> Tensor:
        """Return the method's loss of a client batch."""
        images = int(batch.mask_CS.sum())
        if not images:  # fewer clients than processes are left
            return self.mean_loss(None, 0)
        loss: Tensor = self.method.training_loss(batch)  # type: ignore[operator]  # trainable methods have one
        return self.mean_loss(loss, images)

    def _count(self, metric: ClientCountsMetric, batch: ClientBatch) -> dict[str, Tensor]:
        """Add a batch to a metric; return the logits of backbone and method, none of a batch without images."""
        if not batch.mask_CS.any():  # fewer clients than processes are left
            return {}
        head = self._head[0].to(batch.x_CSD.device)
        logits = {"backbone": head(batch.x_CSD), "method": self.method.logits(batch)}
        metric.update(
            *batch_outcomes(
                self.method.task, logits["backbone"], logits["method"], batch.y_CS, batch.mask_CS, batch.client_C
            )
        )
        return logits

    def on_validation_epoch_start(self) -> None:
        """Reset the counts."""
        self.val_counts.reset()

    def validation_step(self, batch: ClientBatch, batch_idx: int) -> None:
        """Count correct decisions and losses on val clients."""
        self._count(self.val_counts, batch)

    def on_validation_epoch_end(self) -> None:
        """Log accuracy and log-loss over all val images."""
        _, counts = self.val_counts.counts()
        decisions = counts.decisions_C.sum()
        log = partial(self.log, sync_dist=True)  # the same numbers in every process
        log(MONITOR, float(counts.method_correct_C.sum() / decisions), prog_bar=True)
        log("val/log_loss", float(counts.method_loss_C.sum() / decisions))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the val accuracy of the epoch, whatever metric chooses the best one."""
        if (accuracy := self.trainer.callback_metrics.get(MONITOR)) is not None:
            checkpoint["val_accuracy"] = float(accuracy)

    def on_test_epoch_start(self) -> None:
        """Reset the counts."""
        self.test_counts.reset()
        for metric in (*self.calibration.values(), *self.by_class.values()):
            metric.reset()  # type: ignore[operator]

    def test_step(self, batch: ClientBatch, batch_idx: int) -> None:
        """Count correct decisions and losses on test clients, and update the calibration error."""
        y = batch.y_CS[batch.mask_CS]
        for who, logits_CSK in self._count(self.test_counts, batch).items():
            logits_TK = logits_CSK[batch.mask_CS]
            task = self.method.task
            correct_T = task.correct(logits_TK, y).flatten()
            # the metric puts a confidence of 1 into a bin of its own
            confidence_T = task.confidence(logits_TK).flatten().clamp(max=_BELOW_ONE)
            self._calibration(who).update(confidence_T, correct_T)
            if self.unseen is not None:
                unseen_T = torch.isin(y, torch.tensor(self.unseen, device=y.device))
                for part, chosen_T in (("seen", ~unseen_T), ("unseen", unseen_T)):
                    name = part if who == "method" else f"backbone_{part}"
                    self.by_class[name].update(correct_T[chosen_T].float())  # type: ignore[operator]

    def calibration_errors(self) -> dict[str, float]:
        """Return ``ece`` and ``backbone_ece``, fractions."""
        names = {"ece": "method", "backbone_ece": "backbone"}
        return {name: float(self._calibration(who).compute()) for name, who in names.items()}

    def confidences(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Return the confidence [T] of every decision, and whether it was right [T], of method and backbone."""
        metrics = {who: self._calibration(who) for who in ("method", "backbone")}

        def array(state: Any) -> np.ndarray:
            return dim_zero_cat(state).cpu().numpy()

        return {who: (array(metric.confidences), array(metric.accuracies)) for who, metric in metrics.items()}

    def class_accuracies(self) -> dict[str, float | None]:
        """Return ``seen_accuracy`` and ``unseen_accuracy`` of the method, and those of the backbone.

        They are on the classes that the backbone has and has not learned from; None without images of such classes.
        """
        metrics: Any = self.by_class.items()
        means = {f"{name}_accuracy": m.compute() if m.weight else None for name, m in metrics}
        return {name: None if mean is None else float(mean) for name, mean in means.items()}

    def _calibration(self, who: str) -> BinaryCalibrationError:
        metric = self.calibration[who]
        assert isinstance(metric, BinaryCalibrationError)
        return metric
