"""Fit: train a module with Lightning, resuming after a kill."""

import logging
import shutil
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar, Timer, TQDMProgressBar
from torch.utils.data import DataLoader

from iciia_exp.engine.training.callbacks import Diverged, LastCheckpoint, Resume, SeedSteps
from iciia_exp.engine.training.checkpoints import resumable
from iciia_exp.engine.training.modules import BaseModule
from iciia_exp.engine.training.processes import join_group
from iciia_exp.engine.training.trainer import interruptible, make_trainer, quiet_lightning
from iciia_exp.errors import ConfigError, first_line
from iciia_exp.machine import process_rank, wait_for_others

__all__ = ["fit"]

log = logging.getLogger(__name__)


def fit(
    module: BaseModule,
    data: DataLoader[Any] | pl.LightningDataModule,
    *,
    seed: int,
    folder: Path,
    trainer_config: dict[str, Any],
    loggers: list[Any],
    callbacks: Mapping[str, pl.Callback] | None = None,
) -> dict[str, Any]:
    """Train ``module``, continuing from ``folder/last.ckpt`` if it is there.

    Afterwards the module has the weights of the epoch that the first `ModelCheckpoint` with a ``monitor`` kept; without
    one, of the last.

    Args:
        module: what is trained.
        data: train batches, or a data module with train and val batches.
        seed: of the random numbers of every step.
        folder: for checkpoints.
        trainer_config: the group `trainer`.
        loggers: Lightning loggers.
        callbacks: further callbacks, by name.

    Returns:
        Number of epochs, best epoch (from 1) and its val accuracy (None without one), and seconds of training.

    Raises:
        UserError: the training diverged, or a callback or a key of the Trainer does not fit the training.
    """
    recipe, given = module.recipe, dict(callbacks or {})
    best = _place(given, folder)
    diverged = Diverged(module.loss_name)
    own: list[pl.Callback] = [SeedSteps(seed), diverged, Resume()]
    if (timer := next((c for c in given.values() if isinstance(c, Timer)), None)) is None:
        own.append(timer := Timer())
    bar = any(isinstance(c, ProgressBar) for c in given.values())
    if not bar and sys.stdout.isatty() and trainer_config.get("enable_progress_bar", True):
        own.append(TQDMProgressBar())
        bar = True
    epochs = recipe.epochs
    if (most := trainer_config.get("max_epochs")) not in (None, -1) and most < epochs:
        log.info("training %s of %d epochs (trainer.max_epochs)", most, epochs)
        epochs = most
    with quiet_lightning():
        trainer = make_trainer(
            trainer_config,
            max_epochs=epochs,
            # Lightning moves checkpoints to the end in this order: the last one has the state of the others
            callbacks=[*own, *given.values(), LastCheckpoint(folder)],
            logger=loggers,
            enable_checkpointing=True,
            enable_progress_bar=bar,
            gradient_clip_val=recipe.clip_norm or None,
            default_root_dir=folder,
        )
        resumed = resumable(folder, best)
        try:
            with interruptible(trainer):
                join_group(trainer)
                trainer.fit(module, data, ckpt_path=resumed, weights_only=True)
        except Exception as error:  # Lightning raises several kinds
            if (wrong := _configuration(error, trainer, trainer_config, given)) is None:
                raise
            raise wrong from error
    if (problem := diverged.error(module.recipe_key, recipe.lr)) is not None:
        wait_for_others()
        if process_rank() == 0:
            shutil.rmtree(folder)  # the last checkpoint is of no use
        raise problem
    record: dict[str, Any] = {"epochs": trainer.current_epoch, "best_epoch": None, "val_accuracy": None}
    if best is not None and best.best_model_path:
        state = torch.load(best.best_model_path, weights_only=True, map_location="cpu")
        module.load_state_dict(state["state_dict"])
        record |= {"best_epoch": state["epoch"] + 1, "val_accuracy": state.get("val_accuracy")}
    record["seconds"] = round(timer.time_elapsed(), 2)
    return record


def _place(callbacks: dict[str, pl.Callback], folder: Path) -> ModelCheckpoint | None:
    """Give checkpoints a folder where they have none; return the one whose epoch is kept."""
    best = None
    for name, callback in callbacks.items():
        if isinstance(callback, ModelCheckpoint):
            chosen = best is None and callback.monitor is not None
            best = callback if chosen else best
            callback.dirpath = callback.dirpath or str(folder if chosen else folder.parent / name)
    return best


def _configuration(
    error: Exception, trainer: pl.Trainer, config: Mapping[str, Any], callbacks: Mapping[str, pl.Callback]
) -> ConfigError | None:
    """Return an error of Lightning with the key that it is about, or None if it names none or is another's."""
    *_, (raised, _) = traceback.walk_tb(error.__traceback__)
    if not str(raised.f_globals.get("__name__")).startswith("lightning."):
        return None
    text = first_line(error)
    for name, callback in callbacks.items():
        monitor = getattr(callback, "monitor", None)
        logged = sorted(trainer.callback_metrics)
        if monitor not in (None, *logged) and (f"`{monitor}`" in text or repr(monitor) in text):
            return ConfigError(f"callbacks.{name}.monitor", monitor, f"is not logged; valid: {', '.join(logged)}")
    key = next((key for key in config if f"`{key}`" in text), None)
    return None if key is None else ConfigError(f"trainer.{key}", config[key], text)
