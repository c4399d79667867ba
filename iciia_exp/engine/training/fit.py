"""Fit: train a module with Lightning, resuming after a kill."""

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Timer, TQDMProgressBar
from torch.utils.data import DataLoader

from iciia_exp.engine.training.callbacks import _Checkpoint, _Diverged, _EarlyStopping, _SeedSteps
from iciia_exp.engine.training.modules import MONITOR, _Module
from iciia_exp.engine.training.trainer import interruptible, make_trainer, quiet_lightning

__all__ = ["fit"]


def fit(
    module: _Module,
    train: DataLoader[Any],
    validation: DataLoader[Any] | None,
    *,
    seed: int,
    folder: Path,
    trainer_config: dict[str, Any],
    loggers: list[Any],
) -> dict[str, Any]:
    """Train ``module``, continuing from ``folder/last.ckpt`` if it is there.

    Afterwards the module has the weights of the epoch with the best val accuracy; without ``validation``, of the last.

    Returns:
        Number of epochs, best epoch (from 1) and its val accuracy (None without validation), and seconds of training.
    """
    recipe = module.recipe
    timer, visible = Timer(), sys.stdout.isatty() and trainer_config.get("enable_progress_bar", True)
    best: _Checkpoint | None = None
    callbacks: list[pl.Callback] = [_SeedSteps(seed), timer, _Diverged(module.loss_name, module.recipe_key)]
    if visible:
        callbacks.append(TQDMProgressBar())
    if validation is not None:
        if recipe.patience:
            callbacks.append(
                _EarlyStopping(MONITOR, mode="max", patience=recipe.patience, check_on_train_epoch_end=True)
            )
        keep: dict[str, Any] = {"monitor": MONITOR, "mode": "max", "filename": "best"}
        best = _Checkpoint(folder, save_on_train_epoch_end=True, enable_version_counter=False, **keep)
        callbacks.append(best)
    # after `best`, so that the checkpoint to resume from has the state of `best`
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
            enable_progress_bar=visible,
            gradient_clip_val=recipe.clip_norm or None,
            default_root_dir=folder,
        )
        with interruptible(trainer):
            trainer.fit(module, train, validation, ckpt_path=last if last.is_file() else None, weights_only=True)
    record: dict[str, Any] = {"epochs": trainer.current_epoch, "best_epoch": None, "val_accuracy": None}
    if best is not None and best.best_model_path:
        state = torch.load(best.best_model_path, weights_only=True, map_location="cpu")
        module.load_state_dict(state["state_dict"])
        record["best_epoch"] = state["epoch"] + 1
        record["val_accuracy"] = float(best.best_model_score)  # type: ignore[arg-type]
    record["seconds"] = round(timer.time_elapsed(), 2)
    return record
