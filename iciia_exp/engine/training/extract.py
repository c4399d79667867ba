"""Feature extraction: the frozen backbone once over every image of a dataset, all stored arrays in one pass.

Legend: B images of a batch, D features, K classes, M images of the dataset.
"""

import logging
import math
import os
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import torch
from rich.filesize import decimal
from torch import Tensor

from iciia_exp.config.settings import Extraction
from iciia_exp.data.dataset import ImageDataset, dense_labels
from iciia_exp.data.images import Jpeg, TransformedImages, problems_of, readable, tell_bad
from iciia_exp.data.store import FeatureWriter
from iciia_exp.engine.training.extractor import Extractor, WriteFeatures, in_time
from iciia_exp.engine.training.processes import join_group, leave_group
from iciia_exp.engine.training.trainer import interruptible, make_trainer, quiet_lightning
from iciia_exp.errors import ConfigError, UserError
from iciia_exp.ledger import payload_bytes
from iciia_exp.machine import check_started, plain_errors, process_count, process_rank
from iciia_exp.models.backbones.base import Backbone
from iciia_exp.tasks import QUALITY, Task

__all__ = ["extract", "extraction_trainer", "head_accuracy", "probes"]

log = logging.getLogger(__name__)


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
    arrays: frozenset[str] = frozenset({"features"}),
) -> None:
    """Write the feature store of ``dataset`` under ``backbone`` into ``folder``, continuing what a kill left there.

    ``manifest`` is what the caller knows (names, digests); sizes, costs and accuracies are added. ``with_head`` is
    false where the classifier is fitted on these features later. ``arrays`` are stored: features as the configuration
    says, logits as float32, images as the network takes them, others as float16. Of several processes only the first
    finishes it.
    """
    backbone.eval().requires_grad_(False)
    images, first = len(table), process_rank() == 0
    stops = dataset.vectors and extraction.on_bad_image == "error"
    if stops and (bad := problems_of(dataset, range(images), dataset.probe)):  # vectors are read in no time
        hint = "repair them, or leave them out with features.on_bad_image=skip"
        raise UserError(f"{len(bad):,} of {images:,} vectors cannot be read ({tell_bad(dataset, bad)}); {hint}")
    jpeg = None if extraction.jpeg is None else Jpeg(backbone.transform, extraction.jpeg)
    transform = jpeg or backbone.transform
    known, example = readable(dataset, transform, probes(np.arange(images)))
    further, weights_bytes = backbone.further_costs(example), payload_bytes(backbone.state_dict())
    macs = backbone.macs(example)
    dtypes = {"features": extraction.dtype, "logits": "float32", "images": str(example.numpy().dtype)}
    dtypes |= backbone.dtypes
    layout = {n: (shape, dtypes.get(n, "float16")) for n, shape in backbone.output_shapes(example, arrays).items()}
    head = {name: tensor.detach().float().cpu() for name, tensor in backbone.head.state_dict().items()}
    start = time.monotonic()
    steps = backbone.faster(example)
    labels = dense_labels(table["label"], dataset.task, dataset.num_classes)
    if first:
        FeatureWriter.prepare(folder, images, layout)
        if dataset.task == QUALITY:
            _leave_out(folder, layout, np.flatnonzero(table["split"] == "backbone"))
        rows = FeatureWriter.remaining(folder)
        again = "" if len(rows) == images else f", {images - len(rows):,} already done"
        size = images * sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in layout.values())
        each = " and ".join(
            f"{'' if name == 'features' else f'{name} '}{' x '.join(map(str, shape))} {dtype}"
            for name, (shape, dtype) in layout.items()
        )
        log.info("features: %s images x %s, %s%s", f"{images:,}", each, decimal(size), again)
        on_gpu = torch.cuda.is_available() and trainer_config.get("accelerator") != "cpu"
        some = 8 if (macs or 0) < 5e9 else 2
        if not on_gpu and (seconds := _estimate(dataset, backbone, rows, os.cpu_count() or 1, some)) > 60:
            log.info("features: about %s on this machine's processor, if nothing speeds it up", in_time(seconds))
    if not first or len(rows) or process_count() > 1:  # several work together or not at all
        wanted = TransformedImages(dataset, transform, np.arange(images), labels, extraction.on_bad_image)
        module = Extractor(backbone, wanted, extraction, folder, known, example.numel(), arrays)
        with quiet_lightning():
            trainer = extraction_trainer(trainer_config, extraction, WriteFeatures(folder))
            logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # names each process that it ends
            with plain_errors(f"features.devices={extraction.devices}"), interruptible(trainer):
                join_group(trainer)
                trainer.predict(module, return_predictions=False)
        leave_group()
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
        "weights_bytes": weights_bytes,
        **further,
        **({} if jpeg is None else {"image_bytes": jpeg.mean_bytes(dataset, probes(np.arange(images)))}),
        **({"image_bytes": payload_bytes(example)} if example.dtype == torch.int32 else {}),  # a row of ids
        **_prompt_bytes(dataset),
        "seconds": round(time.monotonic() - start, 2),
        "bad_images": _report_bad(dataset, bad, images),
    }
    if with_head and dataset.task != QUALITY:  # whose requests have no labels
        good = np.ones(images, dtype=bool)
        good[list(bad)] = False
        splits = table["split"].to_numpy()
        parts = {str(split): np.flatnonzero((splits == split) & good) for split in pd.unique(splits)}
        features = np.load(folder / "features.npy", mmap_mode="r")
        manifest["accuracy"] = head_accuracy(dataset.task, features, labels, head, parts)
    FeatureWriter.finish(folder, table, head if with_head else None, manifest)


def _leave_out(folder: Path, layout: dict[str, tuple[tuple[int, ...], str]], rows: np.ndarray) -> None:
    """Write zeros for the prompts that only train the models: no router needs their answers."""
    writer = FeatureWriter(folder, 0)
    for some in np.array_split(rows, 1 + len(rows) // 1024):
        writer.write(some, {name: np.zeros((len(some), *shape), dtype) for name, (shape, dtype) in layout.items()})
    writer.flush()


def _prompt_bytes(dataset: ImageDataset) -> dict[str, int]:
    """Return the mean size of a prompt, of a dataset of such; else nothing."""
    prompts = [dataset[int(row)] for row in probes(np.arange(len(dataset)))] if dataset.task == QUALITY else []
    return {"image_bytes": round(float(np.mean([payload_bytes(text) for text in prompts])))} if prompts else {}


def extraction_trainer(config: dict[str, Any], extraction: Extraction, *callbacks: pl.Callback) -> pl.Trainer:
    """Return the trainer of the `trainer` group with the devices and the precision of extraction."""
    devices, num_nodes = extraction.devices, extraction.num_nodes
    if process_count() > 1 and devices * num_nodes == 1:  # torchrun or srun started the processes of the training
        devices, num_nodes = config.get("devices", 1), config.get("num_nodes", 1)
    config = {k: v for k, v in config.items() if k not in ("devices", "num_nodes", "strategy")}
    if extraction.precision is not None:
        config["precision"] = extraction.precision
    more: dict[str, Any] = {"devices": devices, "num_nodes": num_nodes}
    wanted = devices * num_nodes
    check_started("features", extraction.devices, extraction.num_nodes, wanted)
    if wanted > 1:
        # one process starts the others, unless torchrun or srun has: they need not repeat the whole command
        more["strategy"] = "ddp" if process_count() > 1 else "ddp_spawn"
    try:
        return make_trainer(config, callbacks=list(callbacks), inference_mode=True, limit_predict_batches=None, **more)
    except UserError as error:
        if wanted == 1:
            raise
        problem = " ".join(str(error.__cause__ or error).split())
        raise ConfigError("features.devices", extraction.devices, problem) from error


def _report_bad(dataset: ImageDataset, bad: dict[int, str], images: int) -> list[dict[str, Any]]:
    """Say at the end which images could not be read, and return them for the manifest."""
    listed = [{"image": row, "what": dataset.describe(row), "problem": problem} for row, problem in bad.items()]
    if listed:
        count = f"{len(listed):,} of {images:,} images could not be read and are left out"
        log.warning("features: %s (%s); manifest.json lists them", count, tell_bad(dataset, bad))
    return listed


def head_accuracy(
    task: Task,
    features: np.ndarray,
    labels: np.ndarray,
    head: dict[str, Tensor],
    parts: dict[str, np.ndarray],
    step: int = 65536,
) -> dict[str, float]:
    """Return the accuracy of a classifier by itself on each part of the images that has any."""
    accuracy = {}
    for name, rows in ((name, rows) for name, rows in parts.items() if len(rows)):
        right, decisions = 0, 0
        for at in range(0, len(rows), step):
            some = rows[at : at + step]
            x = torch.from_numpy(features[some].astype(np.float32))  # a copy, in memory
            logits = torch.nn.functional.linear(x, head["weight"], head["bias"])
            correct = task.correct(logits, torch.from_numpy(labels[some]))
            right, decisions = right + int(correct.sum()), decisions + correct.numel()
        accuracy[name] = round(right / decisions, 4)
    return accuracy
