"""The backbone's part of a run: the network that is trained here, and the classifier that is fitted on its features."""

from __future__ import annotations

import logging
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data.distributed import DistributedSampler

from iciia_exp.artifacts import atomic_write, make_folder, read_json, write_json
from iciia_exp.config.build import Plan
from iciia_exp.data.clients import ROLES
from iciia_exp.data.store import FeatureStore
from iciia_exp.digest import file_digest
from iciia_exp.errors import UserError, first_line
from iciia_exp.machine import plain_errors
from iciia_exp.models.backbones.base import Backbone
from iciia_exp.seeding import derive_seed

__all__ = ["backbone_head", "fit_head", "in_epochs", "load_backbone", "out_of_fold", "say_accuracy", "train_backbone"]

log = logging.getLogger(__name__)


def in_epochs(count: int) -> str:
    """Return a number of epochs in words."""
    return "1 epoch" if count == 1 else f"{count} epochs"


def train_backbone(plan: Plan) -> None:
    """Train the network on the plan's images for it, unless that was done before."""
    spec = plan.backbone_spec

    def make(folder: Path) -> None:
        from safetensors.torch import save

        from iciia_exp.data.images import TransformedImages, readable
        from iciia_exp.engine.training.extract import probes
        from iciia_exp.engine.training.fit import fit
        from iciia_exp.engine.training.image_loading import image_loader
        from iciia_exp.engine.training.modules import BackboneModule

        assert spec.recipe is not None
        torch.manual_seed(derive_seed("backbone", spec.seed))
        backbone = plan.make_backbone()
        rows = plan.backbone_rows
        readable(plan.dataset, backbone.transform, probes(rows))
        log.info("backbone: training %s on %s images", spec.name, f"{len(rows):,}")
        images = TransformedImages(plan.dataset, backbone.transform, rows, plan.labels, plan.extraction.on_bad_image)
        sampler: DistributedSampler[Any] = DistributedSampler(
            images, 1, 0, seed=derive_seed("order", spec.seed) % 2**31
        )
        loader = image_loader(images, spec.recipe.batch_size, plan.extraction.workers(len(rows)), sampler=sampler)
        module = BackboneModule(backbone, spec.recipe)
        with plain_errors("features.num_workers"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*training_step. returned .None.")  # no image of it is readable
            record = fit(
                module,
                loader,
                None,
                seed=derive_seed("backbone", spec.seed),
                folder=folder,
                trainer_config=plan.config["trainer"],
                loggers=[],
                title=f"backbone {spec.name}",
            )
        with atomic_write(folder / "weights.safetensors", "wb") as file:
            file.write(save({name: t.detach().cpu().contiguous() for name, t in backbone.state_dict().items()}))
        manifest = {
            "format": 1,
            "name": spec.name,
            "digest": plan.backbone_digest,
            "weights_digest": file_digest(folder / "weights.safetensors"),
            "dim": backbone.dim,
            "num_classes": backbone.num_classes,
            "images": len(rows),
            **record,
            "config": {"backbone": plan.config["backbone"], "dataset": plan.config["dataset"]},
        }
        (folder / "last.ckpt").unlink(missing_ok=True)
        write_json(folder / "manifest.json", manifest)
        log.info("backbone: %s in %.1f s", in_epochs(record["epochs"]), record["seconds"])

    if not make_folder(plan.backbone_dir, f"backbone {spec.name}", make):
        log.info("backbone: %s, made before", spec.name)


def load_backbone(plan: Plan) -> tuple[Backbone, dict[str, Any]]:
    """Return the network that gives the features, and the manifest of its training here (empty if there was none)."""
    torch.manual_seed(derive_seed("backbone", 0))  # weights that nothing gives or trains are the same every time
    backbone = plan.make_backbone()
    if plan.backbone_spec.train != "all":
        return backbone, {}
    path = plan.backbone_dir / "weights.safetensors"
    try:
        backbone.load_state_dict(load_tensors(path))
    except Exception as error:
        why = first_line(error)
        raise UserError(f"{path}: cannot be loaded ({why}); delete its folder and repeat") from error
    return backbone, read_json(plan.backbone_dir / "manifest.json")


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def fit_head(plan: Plan) -> None:
    """Fit a classifier of the dataset's own classes on the trunk's features."""
    spec = plan.backbone_spec

    def make(folder: Path) -> None:
        from safetensors.torch import save

        from iciia_exp.engine.training.extract import head_accuracy
        from iciia_exp.models.linear_probe import fit_linear_head, out_of_fold_logits

        store = FeatureStore.open(plan.features_dir)
        rows = plan.backbone_rows[~store.bad[plan.backbone_rows]]
        log.info("backbone: fitting a classifier on the features of %s images", f"{len(rows):,}")
        start = time.monotonic()
        features = store.array()
        x_MD = features[rows].astype(np.float32)
        weight, bias, record = fit_linear_head(
            x_MD, plan.labels[rows], plan.dataset.task, plan.num_classes, derive_seed("head", spec.seed)
        )
        head = {"weight": torch.from_numpy(weight), "bias": torch.from_numpy(bias)}
        with atomic_write(folder / "head.safetensors", "wb") as file:
            file.write(save(head))
        if np.isin(rows, plan.clients.train.values).any():  # methods will be trained on them too
            fitted = (x_MD, plan.labels[rows], plan.dataset.task, plan.num_classes, record["penalty"])
            with atomic_write(folder / "out_of_fold.npy", "wb") as file:
                np.save(file, out_of_fold_logits(*fitted, derive_seed("head", spec.seed)))
            with atomic_write(folder / "out_of_fold_images.npy", "wb") as file:
                np.save(file, rows)
        parts = {"fitted": rows, **{r: plan.clients[r].values for r in ROLES if len(plan.clients[r].values)}}
        parts = {name: some[~store.bad[some]] for name, some in parts.items()}
        manifest = {
            "format": 1,
            "name": spec.name,
            "digest": plan.head_digest,
            "features_digest": plan.features_digest,
            "images": len(rows),
            **record,
            "accuracy": head_accuracy(features, plan.labels, head, parts),
            "seconds": round(time.monotonic() - start, 2),
        }
        write_json(folder / "manifest.json", manifest)

    if not make_folder(plan.backbone_dir, f"classifier on {spec.name}", make):
        log.info("backbone: classifier fitted before")
    say_accuracy(plan, read_json(plan.backbone_dir / "manifest.json")["accuracy"])


def say_accuracy(plan: Plan, accuracy: dict[str, float]) -> None:
    """Log what the backbone alone gets right of each part of the images."""
    said = ", ".join(f"{100 * a:.1f} % of {s}" for s, a in accuracy.items())
    published = plan.backbone_spec.published_top1
    # the published figure is for the whole of ImageNet's validation images
    whole = published is not None and plan.backbone_spec.train == "none" and plan.num_classes == 1000
    log.info("features: the backbone alone gets %s%s", said, f" (published: {published} % of test)" if whole else "")


def backbone_head(plan: Plan, store: FeatureStore) -> nn.Linear:
    """Return the backbone's frozen classifier: the store's own, or the one fitted on its features."""
    folder = plan.backbone_dir if plan.backbone_spec.train == "head" else store.path
    head = nn.Linear(store.dim, store.num_classes)
    head.load_state_dict(load_tensors(folder / "head.safetensors"))
    return head.requires_grad_(False)


def out_of_fold(plan: Plan) -> tuple[np.ndarray, np.ndarray] | None:
    """Return logits, as of new images, of those that the backbone's classifier was fitted on, and their numbers."""
    folder = plan.backbone_dir
    if plan.backbone_spec.train != "head" or not (folder / "out_of_fold.npy").is_file():
        return None
    return np.load(folder / "out_of_fold.npy", mmap_mode="r"), np.load(folder / "out_of_fold_images.npy")
