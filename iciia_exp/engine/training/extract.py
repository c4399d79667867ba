"""Feature extraction: the frozen backbone once over every image of a dataset.

Legend: B images of a batch, D features, K classes, M images of the dataset.
"""

from __future__ import annotations

import logging
import os
import time
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from iciia_exp.config.settings import Extraction
from iciia_exp.data.dataset import ImageDataset, dense_labels
from iciia_exp.data.images import ImageBatch, ImageBlocks, TransformedImages, readable
from iciia_exp.data.store import FeatureWriter
from iciia_exp.engine.terminal import setup_logging
from iciia_exp.engine.training.image_loading import ThreadedFeatures, image_loader, images_per_step
from iciia_exp.engine.training.progress import progress_bar
from iciia_exp.engine.training.trainer import interruptible, make_trainer, quiet_lightning
from iciia_exp.errors import ConfigError, UserError
from iciia_exp.machine import plain_errors, process_count, process_rank
from iciia_exp.models.backbones.base import Backbone
from iciia_exp.tasks import Task

__all__ = ["extract", "extraction_trainer", "head_accuracy", "probes"]

log = logging.getLogger(__name__)


class _Extractor(pl.LightningModule):
    """Gives features of the images that nobody has done yet; every process takes its part of them.

    Args:
        backbone: the frozen network.
        images: all images of the dataset.
        extraction: how.
        folder: the store that is being made.
        known: number of an image that can be read.
        numbers: in one image.
    """

    def __init__(
        self,
        backbone: Backbone,
        images: TransformedImages,
        extraction: Extraction,
        folder: Path,
        known: int,
        numbers: int,
    ) -> None:
        super().__init__()
        self.backbone, self.images, self.extraction, self.folder = backbone, images, extraction, folder
        self.known, self.numbers = known, numbers
        self.allow_zero_length_dataloader_with_multiple_devices = True  # fewer images left than processes

    def predict_dataloader(self) -> DataLoader[Any] | ThreadedFeatures:
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
            return ThreadedFeatures(blocks, self._features)
        return image_loader(blocks, None, workers)

    def predict_step(self, batch: Any, batch_idx: int) -> tuple[ImageBatch, Tensor]:
        return (batch, self._features(batch)) if isinstance(batch, ImageBatch) else batch

    def _features(self, batch: ImageBatch) -> Tensor:
        return self.backbone.features(batch.images).float() if len(batch.images) else torch.empty(0, self.backbone.dim)

    def check_disk(self, problem: str) -> None:
        """Raise where an image that could be read before cannot be read any more: not the images are at fault."""
        dataset, transform = self.images.dataset, self.images.transform
        try:
            readable(dataset, transform, [self.known])
        except UserError as error:
            what = f"{dataset.describe(self.known)}: could be read before, not any more ({problem})"
            raise UserError(f"{what}; is its disk still there? The same command goes on from here") from error


class _Write(pl.Callback):
    """Hands every batch to the writer, shows throughput, and says early how long it will take."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.done = folder, 0

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Arrive in a process that Lightning started: it says what this one would, and nothing else."""
        self.__dict__ = state
        setup_logging()
        self._quiet = ExitStack()
        self._quiet.enter_context(quiet_lightning())

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.writer = FeatureWriter(self.folder, trainer.global_rank)
        self.images = trainer.predict_dataloaders.dataset.num_images  # type: ignore[union-attr]
        self._start: tuple[float, int] | None = None
        self._estimated = trainer.global_rank > 0
        self._bar = progress_bar(visible=trainer.global_rank == 0)
        self._bar.start()
        self._task = self._bar.add_task("features", total=self.images, note="")

    def on_predict_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any) -> None:
        batch, features = outputs
        if not len(features):
            pl_module.check_disk(batch.bad[-1][1])  # type: ignore[operator]
        self.writer.write(batch.rows.cpu().numpy(), features.cpu().numpy())
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
            log.info("features: %s images/s%s, about %s left", f"{rate:,.0f}", each, _duration(left))

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._bar.stop()
        self.writer.flush()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        trainer.strategy.barrier()  # all images are done; not in `on_predict_end`: who has no image never gets there

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if hasattr(self, "writer"):
            self._bar.stop()
            self.writer.flush()


def _estimate(dataset: ImageDataset, backbone: Backbone, rows: np.ndarray, workers: int, probes: int = 8) -> float:
    """Return roughly how many seconds extraction would take on the CPU, from a few images spread over the rest."""
    chosen = rows[np.linspace(0, len(rows) - 1, min(probes, len(rows)), dtype=int)] if len(rows) else rows
    start, images = time.monotonic(), []
    for row in chosen:
        try:
            images.append(backbone.transform(dataset[int(row)]))
        except Exception:
            continue
    if not images:
        return 0.0
    loading = (time.monotonic() - start) / max(1, workers)
    with torch.inference_mode():
        backbone.features(images[0][None])  # the first one takes several times as long
        start = time.monotonic()
        backbone.features(torch.stack(images))
    return (loading + time.monotonic() - start) / len(images) * len(rows)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def probes(rows: np.ndarray, first: int = 8, spread: int = 64) -> np.ndarray:
    """Return some of the images ``rows`` to try: the first few, then others spread over all."""
    return rows[np.unique([*range(min(first, len(rows))), *np.linspace(0, len(rows) - 1, spread, dtype=int)])]


def extract(
    dataset: ImageDataset,
    table: pd.DataFrame,
    backbone: Backbone,
    extraction: Extraction,
    folder: Path,
    trainer_config: dict[str, Any],
    manifest: dict[str, Any],
    with_head: bool = True,
) -> None:
    """Write the feature store of ``dataset`` under ``backbone`` into ``folder``, continuing what a kill left there.

    ``manifest`` is what the caller knows (names, digests); sizes, costs and accuracies are added. ``with_head`` is
    false where the classifier is fitted on these features later. Of several processes only the first finishes it.
    """
    backbone.eval().requires_grad_(False)
    images, first = len(table), process_rank() == 0
    known, example = readable(dataset, backbone.transform, probes(np.arange(images)))
    macs = backbone.macs(example)
    head = {name: tensor.detach().float().cpu() for name, tensor in backbone.head.state_dict().items()}
    start = time.monotonic()
    steps = backbone.faster(example)
    labels = dense_labels(table["label"], dataset.task, dataset.num_classes)
    if first:
        FeatureWriter.prepare(folder, images, backbone.dim, extraction.dtype)
        rows = FeatureWriter.remaining(folder)
        again = "" if len(rows) == images else f", {images - len(rows):,} already done"
        size = images * backbone.dim * np.dtype(extraction.dtype).itemsize
        log.info(
            "features: %s images x %s %s, %s%s", f"{images:,}", backbone.dim, extraction.dtype, _bytes(size), again
        )
        on_gpu = torch.cuda.is_available() and trainer_config.get("accelerator") != "cpu"
        some = 8 if (macs or 0) < 5e9 else 2
        if not on_gpu and (seconds := _estimate(dataset, backbone, rows, os.cpu_count() or 1, some)) > 60:
            log.info("features: about %s on this machine's processor, if nothing speeds it up", _duration(seconds))
    if not first or len(rows) or process_count() > 1:  # several work together or not at all
        wanted = TransformedImages(dataset, backbone.transform, np.arange(images), labels, extraction.on_bad_image)
        module = _Extractor(backbone, wanted, extraction, folder, known, example.numel())
        with quiet_lightning():
            warnings.filterwarnings("ignore", message=".*across ranks is zero.*")
            trainer = extraction_trainer(trainer_config, extraction, _Write(folder))
            logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # names each process that it ends
            with plain_errors(f"features.devices={extraction.devices}"), interruptible(trainer):
                trainer.predict(module, return_predictions=False)
        if torch.distributed.is_initialized():  # what follows is the first process's alone; metrics would wait for all
            torch.distributed.destroy_process_group()
    if not first:
        return
    bad = FeatureWriter.bad_images(folder)
    manifest = {
        **manifest,
        "dim": backbone.dim,
        "num_classes": backbone.num_classes,
        "images": images,
        "task": dataset.task,
        "class_names": list(dataset.class_names),
        "input_shape": list(example.shape),
        "transform": backbone.describe_transform(),
        "inference": steps,
        "macs": macs,
        "seconds": round(time.monotonic() - start, 2),
        "bad_images": _report_bad(dataset, bad, images),
    }
    if with_head:
        good = np.ones(images, dtype=bool)
        good[list(bad)] = False
        features = np.load(folder / "features.npy", mmap_mode="r")
        manifest["accuracy"] = head_accuracy(dataset.task, features, labels, head, _split_rows(table, good))
    FeatureWriter.finish(folder, table, head if with_head else None, manifest)


def extraction_trainer(config: dict[str, Any], extraction: Extraction, *callbacks: pl.Callback) -> pl.Trainer:
    """Return the trainer of the `trainer` group with the devices and the precision of extraction."""
    config = {k: v for k, v in config.items() if k not in ("devices", "num_nodes", "strategy")}
    if extraction.precision is not None:
        config["precision"] = extraction.precision
    more: dict[str, Any] = {"devices": extraction.devices, "num_nodes": extraction.num_nodes}
    wanted, started = extraction.devices * extraction.num_nodes, process_count()
    if started > 1 and started != wanted:
        problem = f"{started} processes were started; devices times num_nodes must be as many"
        raise ConfigError("features.devices", extraction.devices, problem)
    if extraction.num_nodes > 1 and started == 1:
        problem = f"start the same command on each machine with torchrun or srun, {wanted} processes in all"
        raise ConfigError("features.num_nodes", extraction.num_nodes, problem)
    if wanted > 1:
        # one process starts the others, unless torchrun or srun has: they need not repeat the whole command
        more["strategy"] = "ddp" if started > 1 else "ddp_spawn"
    try:
        return make_trainer(
            config, True, callbacks=list(callbacks), inference_mode=True, limit_predict_batches=None, **more
        )
    except UserError as error:
        if wanted == 1:
            raise
        problem = " ".join(str(error.__cause__ or error).split())
        raise ConfigError("features.devices", extraction.devices, problem) from error


def _report_bad(dataset: ImageDataset, bad: dict[int, str], images: int) -> list[dict[str, Any]]:
    """Say at the end which images could not be read, and return them for the manifest."""
    listed = [{"image": row, "what": dataset.describe(row), "problem": problem} for row, problem in bad.items()]
    if listed:
        first = listed[0]
        log.warning(
            "features: %s of %s images could not be read and are left out, %s first (%s); manifest.json lists them",
            f"{len(listed):,}",
            f"{images:,}",
            first["what"],
            first["problem"],
        )
    return listed


def _split_rows(table: pd.DataFrame, good: np.ndarray) -> dict[str, np.ndarray]:
    splits = table["split"].to_numpy()
    parts = {str(s): np.flatnonzero((splits == s) & good) for s in pd.unique(splits)}
    return {s: rows for s, rows in parts.items() if len(rows)}


def head_accuracy(
    task: Task,
    features: np.ndarray,
    labels: np.ndarray,
    head: dict[str, Tensor],
    parts: dict[str, np.ndarray],
    step: int = 65536,
) -> dict[str, float]:
    """Return the accuracy of a classifier by itself on each part of the images."""
    accuracy = {}
    for name, rows in parts.items():
        right, decisions = 0, 0
        for at in range(0, len(rows), step):
            some = rows[at : at + step]
            x = torch.from_numpy(features[some].astype(np.float32))  # a copy, in memory
            logits = torch.nn.functional.linear(x, head["weight"], head["bias"])
            correct = task.correct(logits, torch.from_numpy(labels[some]))
            right, decisions = right + int(correct.sum()), decisions + correct.numel()
        accuracy[name] = round(right / decisions, 4)
    return accuracy


def _bytes(size: int) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit in ("B", "KB") else f"{size:.1f} {unit}"
        size /= 1000  # type: ignore[assignment]
    return f"{size:.1f} TB"
