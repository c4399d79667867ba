"""Callbacks: seeded steps, divergence, early stopping and checkpoints that survive a kill."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from iciia_exp.errors import ConfigError
from iciia_exp.seeding import derive_seed


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
