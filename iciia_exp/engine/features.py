"""The features stage: run the frozen backbone once over every image of a dataset.

Legend: B images of a batch, D features, K classes, M images of the dataset.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from iciia_exp.cost import count_macs
from iciia_exp.data.dataset import ImageDataset
from iciia_exp.data.store import FeatureWriter
from iciia_exp.engine.progress import progress_bar
from iciia_exp.engine.training import interruptible, make_trainer, quiet_lightning
from iciia_exp.errors import check_choice, check_int
from iciia_exp.models.backbone import Backbone

__all__ = ["Extraction", "TransformedImages", "extract"]

log = logging.getLogger(__name__)


class Extraction:
    """How features are computed and stored.

    Args:
        dtype: ``float32`` or ``float16`` on disk; computation follows the trainer's precision.
        batch_size: images per step.
        num_workers: processes that load images; 0 loads them in this one.
    """

    cosmetic: ClassVar[frozenset[str]] = frozenset({"batch_size", "num_workers"})

    def __init__(self, dtype: str = "float32", batch_size: int = 256, num_workers: int = 0) -> None:
        self.dtype = check_choice("dtype", dtype, ("float32", "float16"))
        self.batch_size = check_int("batch_size", batch_size, 1)
        self.num_workers = check_int("num_workers", num_workers, 0)


class TransformedImages(Dataset[tuple[Tensor, int, int]]):
    """The images ``rows`` of a dataset, through a backbone's transform, with label and image number."""

    def __init__(self, dataset: ImageDataset, backbone: Backbone, rows: np.ndarray) -> None:
        self.dataset, self.transform, self.rows = dataset, backbone.transform, rows
        self.labels = dataset.table["label"].to_numpy()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        row = int(self.rows[index])
        return self.transform(self.dataset[row]), int(self.labels[row]), row


class _Extractor(pl.LightningModule):
    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def predict_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> tuple[Tensor, Tensor]:
        images, _, row_B = batch
        return self.backbone.features(images), row_B


class _Write(pl.Callback):
    """Hands every batch to the writer, shows throughput, and says early how long it will take."""

    def __init__(self, writer: FeatureWriter, images: int) -> None:
        self.writer, self.images, self.done = writer, images, 0

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start = time.monotonic()
        self._estimated = False
        self._bar = progress_bar()
        self._bar.start()
        self._task = self._bar.add_task("features", total=self.images, note="")

    def on_predict_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        features_BD, row_B = outputs
        self.writer.write(row_B.cpu().numpy(), features_BD.float().cpu().numpy())
        self.done += len(row_B)
        seconds = time.monotonic() - self._start
        rate = self.done / seconds
        self._bar.update(self._task, completed=self.done, note=f"{rate:,.0f} images/s")
        left = (self.images - self.done) / rate
        if not self._estimated and seconds > 5.0:
            self._estimated = True
            log.info("features: %s images/s, about %s left", f"{rate:,.0f}", _duration(left))

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._bar.stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._bar.stop()
        self.writer.flush()


def _estimate(dataset: ImageDataset, backbone: Backbone, rows: np.ndarray, workers: int, probes: int = 8) -> float:
    """Return roughly how many seconds extraction would take on the CPU, from a few images spread over the rest."""
    chosen = rows[np.linspace(0, len(rows) - 1, min(probes, len(rows)), dtype=int)] if len(rows) else rows
    if not len(chosen):
        return 0.0
    start = time.monotonic()
    images = torch.stack([backbone.transform(dataset[int(row)]) for row in chosen])
    loading = (time.monotonic() - start) / max(1, workers)
    start = time.monotonic()
    with torch.inference_mode():
        backbone.features(images)
    return (loading + time.monotonic() - start) / len(chosen) * len(rows)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def extract(
    dataset: ImageDataset,
    backbone: Backbone,
    extraction: Extraction,
    folder: Path,
    trainer_config: dict[str, Any],
    manifest: dict[str, Any],
) -> None:
    """Write the feature store of ``dataset`` under ``backbone`` into ``folder``, continuing what a kill left there.

    ``manifest`` is what the caller knows (names, digests); sizes, costs and accuracies are added.
    """
    table = dataset.table
    backbone.eval().requires_grad_(False)
    images = len(table)
    size = images * backbone.dim * np.dtype(extraction.dtype).itemsize
    writer = FeatureWriter(folder, images, backbone.dim, extraction.dtype)
    rows = writer.remaining()
    again = "" if len(rows) == images else f", {images - len(rows):,} already done"
    log.info("features: %s images x %s %s, %s%s", f"{images:,}", backbone.dim, extraction.dtype, _bytes(size), again)

    example = backbone.transform(dataset[0])
    macs = count_macs(backbone, example[None])
    start = time.monotonic()
    if (seconds := _estimate(dataset, backbone, rows, extraction.num_workers)) > 60:
        log.info("features: about %s on this machine's processor, if nothing speeds it up", _duration(seconds))
    loader = DataLoader(
        TransformedImages(dataset, backbone, rows),
        batch_size=extraction.batch_size,
        num_workers=extraction.num_workers,
        persistent_workers=extraction.num_workers > 0,
    )
    if len(rows):
        with quiet_lightning():
            whole: dict[str, Any] = {"inference_mode": True, "limit_predict_batches": None}
            trainer = make_trainer(trainer_config, callbacks=[_Write(writer, len(rows))], **whole)
            with interruptible(trainer):
                trainer.predict(_Extractor(backbone), loader, return_predictions=False)
    writer.flush()
    head = {name: tensor.detach().float().cpu() for name, tensor in backbone.head.state_dict().items()}
    manifest = {
        **manifest,
        "dim": backbone.dim,
        "num_classes": backbone.num_classes,
        "images": images,
        "input_shape": list(example.shape),
        "transform": backbone.describe_transform(),
        "macs": macs,
        "accuracy": _accuracy(folder, head, table),
        "seconds": round(time.monotonic() - start, 2),
    }
    writer.finish(table, head, manifest)


def _accuracy(folder: Path, head: dict[str, Tensor], table: Any, step: int = 65536) -> dict[str, float]:
    """Return the backbone's own top-1 accuracy on each split."""
    features = np.load(folder / "features.npy", mmap_mode="r")
    labels = table["label"].to_numpy()
    hits = np.empty(len(labels), dtype=bool)
    for at in range(0, len(labels), step):
        x = torch.from_numpy(features[at : at + step].astype(np.float32))  # a copy, in memory
        logits = torch.nn.functional.linear(x, head["weight"], head["bias"])
        hits[at : at + step] = logits.argmax(-1).numpy() == labels[at : at + step]
    return {str(split): round(float(hits[part].mean()), 4) for split, part in table.groupby("split").indices.items()}


def _bytes(size: int) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit in ("B", "KB") else f"{size:.1f} {unit}"
        size /= 1000  # type: ignore[assignment]
    return f"{size:.1f} TB"
