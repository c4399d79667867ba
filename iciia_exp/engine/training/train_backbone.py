"""Backbone stages: train the network, extract features, fit a classifier on them."""

import logging
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data.distributed import DistributedSampler

from iciia_exp.artifacts import atomic_write, load_tensors, read_array, read_json, save_tensors, write_json
from iciia_exp.data.clients import ROLES
from iciia_exp.data.store import FeatureStore
from iciia_exp.digest import file_digest
from iciia_exp.engine.inputs import Inputs
from iciia_exp.errors import ConfigError, UserError, first_line
from iciia_exp.machine import plain_errors, process_rank, wait_for_others
from iciia_exp.models.backbones.base import Backbone
from iciia_exp.seeding import derive_seed

__all__ = [
    *("backbone_head", "fit_head", "frozen_backbone", "in_epochs", "load_backbone", "make_features", "out_of_fold"),
    *("report_backbone", "report_features", "report_head", "train_backbone"),
]

log = logging.getLogger(__name__)

# Lightning is imported late: finding finished artifacts does not need it.


def in_epochs(count: int) -> str:
    """Return a number of epochs in words."""
    return "1 epoch" if count == 1 else f"{count} epochs"


# ---- training the network


def train_backbone(inputs: Inputs, folder: Path) -> None:
    """Train the network on the backbone's train images."""
    from iciia_exp.data.images import TransformedImages, readable
    from iciia_exp.engine.training.extract import probes
    from iciia_exp.engine.training.fit import fit
    from iciia_exp.engine.training.image_loading import image_loader
    from iciia_exp.engine.training.modules import BackboneModule

    e, spec = inputs.experiment, inputs.experiment.backbone
    assert spec.recipe is not None
    torch.manual_seed(derive_seed("backbone", spec.seed))
    backbone, rows = inputs.new_backbone(), inputs.backbone_rows
    readable(e.dataset, backbone.transform, probes(rows))
    log.info("backbone: training %s on %s images", spec.name, f"{len(rows):,}")
    images = TransformedImages(e.dataset, backbone.transform, rows, inputs.labels, e.extraction.on_bad_image)
    size, processes = spec.recipe.batch_size, inputs.processes
    if size % processes:
        raise ConfigError("backbone.recipe.batch_size", size, f"must be a multiple of the {processes} devices")
    order = derive_seed("order", spec.seed) % 2**31
    sampler: DistributedSampler[Any] = DistributedSampler(images, processes, process_rank() % processes, seed=order)
    loader = image_loader(images, size // processes, e.extraction.workers(len(rows)), sampler=sampler)
    with plain_errors("features.num_workers"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*training_step. returned .None.")  # a batch without readable images
        record = fit(
            BackboneModule(backbone, spec.recipe, e.dataset_class.task),
            loader,
            seed=derive_seed("backbone", spec.seed),
            folder=folder,
            trainer_config=e.config["trainer"],
            loggers=[],
        )
    wait_for_others()
    if process_rank() > 0:
        return
    save_tensors(folder / "weights.safetensors", backbone.state_dict())
    (folder / "last.ckpt").unlink(missing_ok=True)
    manifest = {
        "format": 1,
        "name": spec.name,
        "weights_digest": file_digest(folder / "weights.safetensors"),
        "dim": backbone.dim,
        "num_classes": backbone.num_classes,
        "images": len(rows),
        **record,
        "config": {"backbone": e.config["backbone"], "dataset": e.config["dataset"]},
    }
    write_json(folder / "manifest.json", manifest)


def report_backbone(folder: Path, made: bool) -> None:
    """Log the duration of the training, or that it was done before."""
    manifest = read_json(folder / "manifest.json")
    if made:
        log.info("backbone: %s in %.1f s", in_epochs(manifest["epochs"]), manifest["seconds"])
    else:
        log.info("backbone: %s, made before", manifest["name"])


def load_backbone(inputs: Inputs) -> tuple[Backbone, dict[str, Any]]:
    """Return the network, and the manifest of its training (empty if it is not trained here)."""
    torch.manual_seed(derive_seed("backbone", 0))  # for weights that are neither pre-trained nor trained here
    backbone = inputs.new_backbone()
    if inputs.backbone is None:
        if not inputs.experiment.backbone.started and not inputs.experiment.dataset_class.vectors:
            hint = "give backbone.weights, or train it with backbone.train=all"
            log.warning(
                "backbone: %s has no weights; its features are those of a random network; %s",
                inputs.experiment.backbone.name,
                hint,
            )
        return backbone, {}
    path = inputs.backbone.folder / "weights.safetensors"
    try:
        backbone.load_state_dict(load_tensors(path))
    except Exception as error:
        why = first_line(error)
        raise UserError(f"{path}: cannot be loaded ({why}); delete its folder and repeat") from error
    return backbone, read_json(inputs.backbone.folder / "manifest.json")


def frozen_backbone(inputs: Inputs) -> Backbone:
    """Return the network in evaluation mode, without gradients."""
    return load_backbone(inputs)[0].eval().requires_grad_(False)


# ---- features


def make_features(inputs: Inputs, folder: Path) -> None:
    """Extract the features of all images of the dataset, and what else the method reads."""
    from iciia_exp.engine.training.extract import extract

    e = inputs.experiment
    backbone, trained = load_backbone(inputs)
    manifest = {
        "dataset": e.dataset_class.name,
        "backbone": e.backbone.name,
        "weights_digest": trained.get("weights_digest", inputs.weights_digest),
        "backbone_seconds": trained.get("seconds"),
    }
    table, trainer, with_head = e.dataset.table, e.config["trainer"], e.backbone.train != "head"
    extract(e.dataset, table, backbone, e.extraction, folder, trainer, manifest, with_head, inputs.stored)


def report_features(inputs: Inputs, folder: Path, made: bool) -> None:
    """Log the backbone's accuracy, and whether the features were made before."""
    inputs.facts.remember()
    manifest = inputs.open_store().manifest
    if not made:
        bad = len(manifest.get("bad_images", ()))
        log.info("features: made before%s", f", without {bad:,} images that could not be read" if bad else "")
    if "accuracy" in manifest:
        _report_accuracy(inputs, manifest["accuracy"], " (splits of the dataset)")


# ---- a classifier on the features


def fit_head(inputs: Inputs, folder: Path) -> None:
    """Fit a classifier of the dataset's classes on the features."""
    from iciia_exp.engine.training.extract import head_accuracy
    from iciia_exp.models.linear_probe import fit_linear_head, out_of_fold_logits

    spec, task = inputs.experiment.backbone, inputs.experiment.dataset_class.task
    store = FeatureStore.open(inputs.features.folder)
    rows = inputs.backbone_rows[~store.bad[inputs.backbone_rows]]
    log.info("backbone: fitting a classifier on the features of %s images", f"{len(rows):,}")
    start, seed = time.monotonic(), derive_seed("head", spec.seed)
    features = store.array()
    x_MD, y = features[rows].astype(np.float32), inputs.labels[rows]
    weight, bias, record = fit_linear_head(x_MD, y, task, inputs.num_classes, seed)
    head = {"weight": torch.from_numpy(weight), "bias": torch.from_numpy(bias)}
    save_tensors(folder / "head.safetensors", head)
    if np.isin(rows, inputs.clients.train.values).any():  # methods are trained on them as well
        logits = out_of_fold_logits(x_MD, y, task, inputs.num_classes, record["penalty"], seed)
        for name, array in (("out_of_fold", logits), ("out_of_fold_images", rows)):
            with atomic_write(folder / f"{name}.npy", "wb") as file:
                np.save(file, array)
    parts = {"fitted": rows, **{r: inputs.clients[r].values for r in ROLES}}
    parts = {name: numbers[~store.bad[numbers]] for name, numbers in parts.items()}
    manifest = {
        "format": 1,
        "name": spec.name,
        "features": store.path.name,
        "images": len(rows),
        **record,
        "accuracy": head_accuracy(task, features, inputs.labels, head, parts),
        "seconds": round(time.monotonic() - start, 2),
    }
    write_json(folder / "manifest.json", manifest)


def report_head(inputs: Inputs, folder: Path, made: bool) -> None:
    """Log the classifier's accuracy, and whether it was fitted before."""
    accuracy = read_json(folder / "manifest.json")["accuracy"]
    if not made:  # perhaps for other clients, whose test images these are
        log.info("backbone: classifier fitted before")
        accuracy = {"fitted": accuracy["fitted"]}
    _report_accuracy(inputs, accuracy)


def _report_accuracy(inputs: Inputs, accuracy: dict[str, float], parts: str = "") -> None:
    """Log the backbone's accuracy on each part of the images; ``parts`` says what parts these are."""
    shares, spec = ", ".join(f"{100 * a:.1f} % of {s}" for s, a in accuracy.items()), inputs.experiment.backbone
    published = spec.published_top1
    # the published figure is for ImageNet's 50,000 validation images
    whole = published is not None and spec.train == "none" and inputs.num_classes == 1000
    note = f" (published: {published} % of test)" if whole else ""
    log.info("features: the backbone alone gets %s%s%s", shares, parts, note)


def backbone_head(inputs: Inputs, store: FeatureStore) -> nn.Linear:
    """Return the backbone's frozen classifier, from the store or fitted on the features."""
    folder = store.path if inputs.head is None else inputs.head.folder
    head = nn.Linear(store.dim, store.num_classes)
    head.load_state_dict(load_tensors(folder / "head.safetensors"))
    return head.requires_grad_(False)


def out_of_fold(inputs: Inputs) -> tuple[np.ndarray, np.ndarray] | None:
    """Return out-of-fold logits of the images that the classifier was fitted on, and their numbers; else None."""
    if inputs.head is None or not (inputs.head.folder / "out_of_fold.npy").is_file():
        return None
    folder = inputs.head.folder
    return read_array(folder / "out_of_fold.npy"), read_array(folder / "out_of_fold_images.npy", mmap=False)
