"""Extractor: the Lightning module and callback that write the features and other arrays of the images that are left."""

import logging
import time
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor
from torch.utils.data import DataLoader

from iciia_exp.config.settings import Extraction
from iciia_exp.data.images import ImageBatch, ImageBlocks, TransformedImages, readable
from iciia_exp.data.store import FeatureWriter
from iciia_exp.engine.terminal import progress_bar, setup_logging
from iciia_exp.engine.training.image_loading import ThreadedOutputs, image_loader, images_per_step
from iciia_exp.engine.training.trainer import quiet_lightning
from iciia_exp.errors import UserError
from iciia_exp.models.backbones.base import Backbone

__all__ = ["Extractor", "WriteFeatures", "in_time"]

log = logging.getLogger(__name__)


class Extractor(pl.LightningModule):
    """Gives the arrays of the images that nobody has done yet; every process takes its part of them.

    Args:
        backbone: the frozen network.
        images: all images of the dataset.
        extraction: how.
        folder: the store that is being made.
        known: number of an image that can be read.
        numbers: in one image.
        arrays: names of the arrays.
    """

    def __init__(
        self,
        backbone: Backbone,
        images: TransformedImages,
        extraction: Extraction,
        folder: Path,
        known: int,
        numbers: int,
        arrays: frozenset[str],
    ) -> None:
        super().__init__()
        self.backbone, self.images, self.extraction, self.folder = backbone, images, extraction, folder
        self.known, self.numbers, self.arrays = known, numbers, arrays
        self.allow_zero_length_dataloader_with_multiple_devices = True  # fewer images left than processes

    def predict_dataloader(self) -> DataLoader[Any] | ThreadedOutputs:
        """Return this process's images: a run of consecutive ones, so that two processes seldom share a page."""
        self.trainer.strategy.barrier()  # the first process has made room by now
        left = FeatureWriter.remaining(self.folder)
        self.trainer.strategy.barrier()  # nobody has marked anything as done yet
        device = self.trainer.strategy.root_device.type
        size = self.extraction.batch_size or images_per_step(self.numbers, device)
        mine = np.array_split(np.unique(left // size), self.trainer.world_size)[self.trainer.global_rank]
        blocks = ImageBlocks(self.images, mine, size)
        workers = self.extraction.workers(blocks.num_images, device == "cpu")
        if device == "cpu" and not workers and self.trainer.precision == "32-true":  # autocast is this thread's alone
            return ThreadedOutputs(blocks, self._outputs)
        return image_loader(blocks, None, workers)

    def predict_step(self, batch: Any, batch_idx: int) -> tuple[ImageBatch, dict[str, Tensor]]:
        """Return a batch and its arrays by name, float32; none if no image could be read."""
        return (batch, self._outputs(batch)) if isinstance(batch, ImageBatch) else batch

    def _outputs(self, batch: ImageBatch) -> dict[str, Tensor]:
        if not len(batch.images):
            return {}
        return {name: values.float() for name, values in self.backbone.outputs(batch.images, self.arrays).items()}

    def check_disk(self, problem: str) -> None:
        """Raise where an image that could be read before cannot be read any more: not the images are at fault."""
        dataset, transform = self.images.dataset, self.images.transform
        try:
            readable(dataset, transform, [self.known])
        except UserError as error:
            what = f"{dataset.describe(self.known)}: could be read before, not any more ({problem})"
            raise UserError(f"{what}; is its disk still there? The same command goes on from here") from error


class WriteFeatures(BasePredictionWriter):
    """Hands every batch to the writer, shows throughput, and says early how long it will take."""

    def __init__(self, folder: Path) -> None:
        super().__init__(write_interval="batch")
        self.folder, self.done = folder, 0

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Arrive in a process that Lightning started: it says what this one would, and nothing else."""
        self.__dict__ = state
        setup_logging()
        self._quiet = ExitStack()
        self._quiet.enter_context(quiet_lightning())

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Silence, in each process, Lightning's warnings about loaders that are as they should be."""
        super().setup(trainer, pl_module, stage)
        for message in (".*infer the batch indices.*", ".*across ranks is zero.*"):
            warnings.filterwarnings("ignore", message=message)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the writer and the bar."""
        self.writer = FeatureWriter(self.folder, trainer.global_rank)
        self.images = trainer.predict_dataloaders.dataset.num_images  # type: ignore[union-attr]
        self._start: tuple[float, int] | None = None
        self._estimated = trainer.global_rank > 0
        self._bar = progress_bar(visible=trainer.global_rank == 0)
        self._bar.start()
        self._task = self._bar.add_task("features", total=self.images, note="")

    def write_on_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, prediction: Any, *_: Any, **__: Any
    ) -> None:
        """Write a batch; log how long the rest will take once that is known."""
        batch, arrays = prediction
        if arrays:
            self.writer.write(batch.rows.cpu().numpy(), {name: values.cpu().numpy() for name, values in arrays.items()})
        else:
            pl_module.check_disk(batch.bad[-1][1])  # type: ignore[operator]
        if batch.bad:
            self.writer.write_bad(batch.bad)
        self.done += len(batch.rows) + len(batch.bad)
        if self._start is None:  # the first batch waits for the processes that load it
            self._start = time.monotonic(), self.done
            return
        seconds = time.monotonic() - self._start[0]
        rate = (self.done - self._start[1]) / seconds
        self._bar.update(self._task, completed=self.done, note=f"{rate:,.0f} images/s")
        if not self._estimated and seconds > 5.0:
            self._estimated = True
            left = (self.images - self.done) / rate
            each = f" on each of {trainer.world_size} devices" if trainer.world_size > 1 else ""
            log.info("features: %s images/s%s, about %s left", f"{rate:,.0f}", each, in_time(left))

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Bring the last values to disk."""
        self._bar.stop()
        self.writer.flush()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Wait for the other processes."""
        trainer.strategy.barrier()  # all images are done; not in `on_predict_end`: who has no image never gets there

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Keep what was computed."""
        if hasattr(self, "writer"):
            self._bar.stop()
            self.writer.flush()


def in_time(seconds: float) -> str:
    """Return a number of seconds in words."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
