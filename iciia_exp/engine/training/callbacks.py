"""Callbacks: those of the configuration, seeded steps, divergence, and resuming after a kill."""

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason

from iciia_exp.config.build import build
from iciia_exp.config.check import class_of
from iciia_exp.errors import ConfigError
from iciia_exp.seeding import derive_seed

__all__ = ["Diverged", "LastCheckpoint", "Resume", "SeedSteps", "configured"]


def configured(nodes: dict[str, Any]) -> dict[str, pl.Callback]:
    """Build the callbacks of the group `callbacks`, by name."""
    for name, node in nodes.items():
        what = "a Lightning callback (lightning.pytorch.callbacks.Callback)"
        class_of(node, f"callbacks.{name}", pl.Callback, what)
    return {name: build(node, f"callbacks.{name}") for name, node in nodes.items()}


class SeedSteps(pl.Callback):
    """Seed every step from (seed, epoch, step).

    Dropout then depends neither on how often training was interrupted nor on what else draws random numbers. Lightning
    does not restore the random state of a resumed training.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seed PyTorch's generators."""
        torch.manual_seed(derive_seed("step", self.seed, trainer.current_epoch, batch_idx, trainer.global_rank))


class Diverged(EarlyStopping):
    """Stop a training whose loss is no longer finite, and do nothing else."""

    def __init__(self, loss: str) -> None:
        # not strict: the loss is absent if no image of the epoch could be read
        super().__init__(loss, patience=sys.maxsize, strict=False, check_on_train_epoch_end=True)

    def error(self, key: str, lr: float | None) -> ConfigError | None:
        """Return an error that names the learning rate if the training diverged."""
        if self.stopping_reason != EarlyStoppingReason.NON_FINITE_METRIC:
            return None
        problem = f"training diverged, the loss is not finite in epoch {self.stopped_epoch + 1}; lower it"
        return ConfigError(f"{key}.lr", lr, problem)


class LastCheckpoint(ModelCheckpoint):
    """Keep the last epoch, from which an interrupted training resumes; a class of its own beside the user's."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "last", save_on_train_epoch_end=True, enable_version_counter=False)


class Resume(pl.Callback):
    """Restore what Lightning leaves out on resuming.

    An early stopping stays stopped (Lightning issue 8278), and checkpoints are found again if the run directory has
    moved (Lightning issue 14443).
    """

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Find the files of checkpoints."""
        states = checkpoint["callbacks"]
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.state_key in states:
                states[callback.state_key] = _moved(states[callback.state_key], str(callback.dirpath))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop if training had stopped."""
        for callback in trainer.early_stopping_callbacks:
            assert isinstance(callback, EarlyStopping)
            if callback.stopping_reason != EarlyStoppingReason.NOT_STOPPED:
                trainer.should_stop = True


def _moved(state: dict[str, Any], folder: str) -> dict[str, Any]:
    """Return the state of a checkpoint callback with its files in ``folder``."""

    def here(path: str) -> str:
        return str(Path(folder) / Path(path).name) if path else path

    paths = {key: here(value) for key, value in state.items() if key.endswith("_model_path")}
    kept = {here(path): score for path, score in state["best_k_models"].items()}
    return {**state, **paths, "best_k_models": kept, "dirpath": folder}
