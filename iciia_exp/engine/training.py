"""Training with Lightning: modules for backbones and methods, and one way to fit either.

A training that is killed and repeated gives the result of an uninterrupted one: checkpoints are written at the end of
every epoch, and all randomness comes from (seed, epoch, step).

Legend: B images, C clients, S images of a client, D features, K classes.
"""

from __future__ import annotations

import logging
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.classification import BinaryCalibrationError

from iciia_exp import tasks
from iciia_exp.counts import ClientCountsMetric, read_batch
from iciia_exp.data.batches import ClientBatch
from iciia_exp.data.images import ImageBatch
from iciia_exp.engine.build import check_keys, parameters_of
from iciia_exp.engine.progress import TrainingProgress
from iciia_exp.errors import ConfigError, UserError, first_line
from iciia_exp.methods.base import Method
from iciia_exp.models.backbone import Backbone
from iciia_exp.recipe import Recipe
from iciia_exp.seeding import derive_seed

__all__ = ["BackboneModule", "MethodModule", "fit", "interruptible", "make_trainer", "quiet_lightning"]

MONITOR = "selection/accuracy"


class _Module(pl.LightningModule):
    """What both trainings share: the recipe's optimiser and schedule."""

    #: metrics to show beside the progress bar, the training loss first
    shown: tuple[str, ...] = ()
    #: where the recipe stands in the configuration
    recipe_key: str

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe

    def configure_optimizers(self) -> Any:
        """Build what the recipe says, over the parameters that are trained."""
        # a fused step under a gradient scaler (16-mixed) unscales by itself, too late for clipping
        fused = getattr(self.trainer.precision_plugin, "scaler", None) is None
        trunk = self.trunk_parameters()
        rest = [p for p in self.parameters() if p.requires_grad and not any(p is t for t in trunk)]
        optimizer = self.recipe.make_optimizer(rest, trunk, fused)
        steps, epochs = int(self.trainer.estimated_stepping_batches), int(self.trainer.max_epochs or 1)
        schedule = self.recipe.make_schedule(optimizer, steps, epochs)
        if schedule is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def trunk_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that have the recipe's rate for trunks, if it has one."""
        return []

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip by norm; Lightning's own way refuses every fused optimiser under mixed precision."""
        if gradient_clip_val:
            nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)


class BackboneModule(_Module):
    """Trains a backbone, trunk and head, on single images."""

    shown = ("backbone/loss", "backbone/train_accuracy")
    recipe_key = "backbone.recipe"

    def __init__(self, backbone: Backbone, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.backbone = backbone

    def trunk_parameters(self) -> list[nn.Parameter]:
        """Return all but the classifier's parameters, where they have a rate of their own."""
        if self.recipe.trunk_lr == self.recipe.lr:
            return []
        head = set(map(id, self.backbone.head.parameters()))
        return [p for p in self.backbone.parameters() if id(p) not in head]

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor | None:
        """Return the loss of a batch of images; None where none of them could be read."""
        if not len(batch.images):
            return None
        y_B = batch.labels
        logits_BK = self.backbone(batch.images)
        loss = tasks.loss(logits_BK, y_B)
        accuracy = tasks.hits(logits_BK, y_B).float().mean()
        log = partial(self.log, on_step=False, on_epoch=True, batch_size=len(y_B))
        log("backbone/loss", loss)
        log("backbone/train_accuracy", accuracy)
        return loss


class MethodModule(_Module):
    """Trains a method on client batches, watches the selection clients, and counts per client in testing.

    Args:
        method: the method.
        head: the backbone's frozen classifier, for the paired counts.
        recipe: optimisation.
        clients: number of clients in the partition.
        answers: right-or-wrong answers of one image (`iciia_exp.tasks.answers_per_image`).
    """

    shown = ("train/loss", MONITOR)
    recipe_key = "protocol.recipe"

    def __init__(self, method: Method, head: nn.Linear, recipe: Recipe, clients: int, answers: int = 1) -> None:
        super().__init__(recipe)
        self.method = method
        self._head = [head.requires_grad_(False)]  # in a list: not part of the checkpoint
        self.selection_counts = ClientCountsMetric(clients, answers)
        self.test_counts = ClientCountsMetric(clients, answers)
        #: expected calibration error, 15 bins, of the method's answers and the backbone's
        self.calibration = nn.ModuleDict({who: BinaryCalibrationError(15) for who in ("method", "backbone")})

    def training_step(self, batch: ClientBatch, batch_idx: int) -> Tensor:
        """Return the method's loss on a client batch."""
        logits_CSK = self.method.training_logits(batch)
        loss = self.method.loss(logits_CSK, batch.y_CS, batch.mask_CS)
        self.log("train/loss", loss, on_step=False, on_epoch=True, batch_size=int(batch.mask_CS.sum()))
        return loss

    def _count(self, metric: ClientCountsMetric, batch: ClientBatch) -> dict[str, Tensor]:
        """Add a batch's counts; return the logits of both."""
        head = self._head[0].to(batch.x_CSD.device)
        logits = {"backbone": head(batch.x_CSD), "method": self.method.answers(batch)}
        metric.update(*read_batch(logits["backbone"], logits["method"], batch.y_CS, batch.mask_CS, batch.client_C))
        return logits

    def on_validation_epoch_start(self) -> None:
        """Start counting afresh."""
        self.selection_counts.reset()

    def validation_step(self, batch: ClientBatch, batch_idx: int) -> None:
        """Count hits and losses on selection clients."""
        self._count(self.selection_counts, batch)

    def on_validation_epoch_end(self) -> None:
        """Log accuracy and log-loss over all selection images."""
        _, counts = self.selection_counts.counts()
        answers = counts.answers_C.sum()
        self.log(MONITOR, float(counts.method_hits_C.sum() / answers))
        self.log("selection/log_loss", float(counts.method_loss_C.sum() / answers))

    def on_test_epoch_start(self) -> None:
        """Start counting afresh."""
        self.test_counts.reset()
        for who in self.calibration:
            self._calibration(who).reset()

    def test_step(self, batch: ClientBatch, batch_idx: int) -> None:
        """Count hits and losses on test clients, and how far confidence and hits are apart."""
        y = batch.y_CS[batch.mask_CS]
        for who, logits_CSK in self._count(self.test_counts, batch).items():
            logits_TK = logits_CSK[batch.mask_CS]
            answers = tasks.confidence(logits_TK, y).flatten(), tasks.hits(logits_TK, y).flatten()
            self._calibration(who).update(*answers)

    def calibration_errors(self) -> dict[str, float]:
        """Return ``ece`` and ``backbone_ece``, fractions."""
        names = {"ece": "method", "backbone_ece": "backbone"}
        return {name: float(self._calibration(who).compute()) for name, who in names.items()}

    def _calibration(self, who: str) -> BinaryCalibrationError:
        metric = self.calibration[who]
        assert isinstance(metric, BinaryCalibrationError)
        return metric


class _SeedSteps(pl.Callback):
    """Seed every step from (seed, epoch, step): dropout then depends neither on how often training was interrupted nor
    on what else draws random numbers (starting to iterate over a loader does, and not at the same place on resuming).
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        torch.manual_seed(derive_seed("step", self.seed, trainer.current_epoch, batch_idx, trainer.global_rank))


class _Diverged(pl.Callback):
    """Stops a training whose loss is no longer a number, before its weights take the place of good ones."""

    def __init__(self, loss: str, key: str) -> None:
        self.loss, self.key = loss, key

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        loss = trainer.callback_metrics.get(self.loss)  # absent where no image of the epoch could be read
        if loss is not None and not torch.isfinite(loss):
            lr, epoch = pl_module.recipe.lr, trainer.current_epoch + 1  # type: ignore[union-attr]
            raise ConfigError(
                f"{self.key}.lr", lr, f"training diverged, the loss is not finite in epoch {epoch}; lower it"
            )


class _EarlyStopping(EarlyStopping):
    """Early stopping that stays stopped: Lightning forgets the decision when training resumes after it."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.wait_count >= self.patience:
            trainer.should_stop = True


class _Checkpoint(ModelCheckpoint):
    """A checkpoint callback that finds its files again where the run directory has moved before resuming."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        def here(path: str) -> str:
            return str(Path(str(self.dirpath)) / Path(path).name) if path else path

        paths = {k: here(v) for k, v in state_dict.items() if k.endswith("_model_path")}
        kept = {here(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict({**state_dict, **paths, "best_k_models": kept, "dirpath": self.dirpath})


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Silence what Lightning says on every start and a user cannot act on (devices found, tips, few workers)."""
    logger = logging.getLogger("lightning.pytorch")
    fabric = logging.getLogger("lightning.fabric")
    levels = logger.level, fabric.level
    logger.setLevel(logging.ERROR)
    fabric.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for message in (
                ".*does not have many workers.*",
                ".*exists and is not empty.*",
                ".*The number of training batches.*is smaller than the logging interval.*",
                ".*Checkpoint directory.*",
                ".*isinstance.treespec, LeafSpec.*",
                ".*GPU available but not used.*",
                ".*tensorboardX.*",
                ".*litlogger.*",
                ".*lr_scheduler.step.*",
            ):
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        logger.setLevel(levels[0])
        fabric.setLevel(levels[1])


@contextmanager
def interruptible(trainer: pl.Trainer) -> Iterator[None]:
    """Let Ctrl-C be an interruption again: Lightning ends the process with ``exit(1)`` and ignores further signals."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        if not trainer.interrupted:
            raise
    if trainer.interrupted:
        signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt


def make_trainer(config: dict[str, Any], sharded: bool = False, **arguments: Any) -> pl.Trainer:
    """Build Lightning's Trainer from the `trainer` group, with the engine's ``arguments`` on top.

    ``sharded`` allows more than one process.
    """
    check_keys(config, "trainer")
    own = {k: v for k, v in config.items() if not k.startswith("_")}
    if taken := sorted(set(own) & {"callbacks", "logger", "default_root_dir", "gradient_clip_val", "inference_mode"}):
        raise UserError(f"trainer.{taken[0]}: is set by the engine; leave it out")
    known = parameters_of(pl.Trainer)
    arguments = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,  # our samplers share the work out themselves
        "log_every_n_steps": 10,
        "logger": False,
        "enable_checkpointing": False,
        **own,
        **arguments,
    }
    arguments = {k: v for k, v in arguments.items() if k in known}
    try:
        trainer = pl.Trainer(**arguments)
    except Exception as error:  # Lightning raises many kinds, each with a clear first line
        text = first_line(error)
        for key, value in own.items():
            if key in text or (isinstance(value, str) and value in text):
                raise ConfigError(f"trainer.{key}", value, text) from error
        raise UserError(f"trainer: {text}") from error
    if trainer.world_size > 1 and not sharded:
        # a method trains on stored features, in minutes; and the stages' locks are per process
        problem = "only extraction is shared out, with features.devices; use one job per device for the rest"
        raise ConfigError("trainer.devices", own.get("devices"), problem)
    return trainer


def fit(
    module: _Module,
    train: DataLoader[Any],
    validation: DataLoader[Any] | None,
    *,
    seed: int,
    folder: Path,
    trainer_config: dict[str, Any],
    loggers: list[Any],
    title: str,
) -> dict[str, Any]:
    """Train ``module``, continuing from ``folder/last.ckpt`` where there is one; leave the weights to keep in it.

    With ``validation`` the weights of the epoch with the best selection accuracy are kept, else those of the last.

    Returns:
        epochs run, best epoch (from 1) and its selection accuracy (None without validation), and seconds of training.
    """
    recipe = module.recipe
    progress = TrainingProgress(title)
    best: _Checkpoint | None = None
    callbacks: list[pl.Callback] = [_SeedSteps(seed), progress, _Diverged(module.shown[0], module.recipe_key)]
    if validation is not None:
        if recipe.patience:
            callbacks.append(
                _EarlyStopping(MONITOR, mode="max", patience=recipe.patience, check_on_train_epoch_end=True)
            )
        keep: dict[str, Any] = {"monitor": MONITOR, "mode": "max", "filename": "best"}
        best = _Checkpoint(folder, save_on_train_epoch_end=True, enable_version_counter=False, **keep)
        callbacks.append(best)
    # after `best`, so that its memory of the best epoch is in the checkpoint that training resumes from
    callbacks.append(_Checkpoint(folder, "last", save_on_train_epoch_end=True, enable_version_counter=False))
    epochs = min(recipe.epochs, trainer_config.get("max_epochs") or recipe.epochs)
    last = folder / "last.ckpt"
    with quiet_lightning():
        trainer = make_trainer(
            trainer_config,
            max_epochs=epochs,
            callbacks=callbacks,
            logger=loggers,
            enable_checkpointing=True,
            gradient_clip_val=recipe.clip_norm or None,
            default_root_dir=folder,
        )
        with interruptible(trainer):
            trainer.fit(module, train, validation, ckpt_path=last if last.is_file() else None, weights_only=True)
    record: dict[str, Any] = {"epochs": trainer.current_epoch, "best_epoch": None, "selection_accuracy": None}
    if best is not None and best.best_model_path:
        state = torch.load(best.best_model_path, weights_only=True, map_location="cpu")
        module.load_state_dict(state["state_dict"])
        record["best_epoch"] = state["epoch"] + 1
        record["selection_accuracy"] = float(best.best_model_score)  # type: ignore[arg-type]
    record["seconds"] = round(progress.seconds, 2)
    return record
