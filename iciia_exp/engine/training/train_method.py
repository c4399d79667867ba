"""Method training: the run of an experiment, on the clients' stored features."""

import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import yaml
from torch import nn
from torch.utils.data import DataLoader

from iciia_exp.artifacts import atomic_write, read_json, write_json
from iciia_exp.config.stored import store as store_config
from iciia_exp.data.batches import ClientBatch, ClientBatchSampler, ClientIndex, FeatureBatches
from iciia_exp.data.clients import Clients, Ragged
from iciia_exp.data.views import CloudView, require_own_labels
from iciia_exp.engine.inputs import Inputs
from iciia_exp.engine.training.train_backbone import backbone_head, frozen_backbone, in_epochs, out_of_fold
from iciia_exp.machine import process_rank, wait_for_others
from iciia_exp.methods.base import Ask, Record
from iciia_exp.methods.cotrain.base import CoTrained
from iciia_exp.models.backbones.weights import known_classes
from iciia_exp.recipe import Recipe
from iciia_exp.seeding import derive_seed, generator
from iciia_exp.serving.run import save_method

if TYPE_CHECKING:
    from iciia_exp.engine.training.data_module import ClientDataModule

__all__ = ["data_of", "draw_clients", "report_run", "train_method"]

log = logging.getLogger(__name__)


def train_method(inputs: Inputs, folder: Path) -> None:
    """Train the method and write the run, ``weights.safetensors`` last."""
    e, training = inputs.experiment, inputs.experiment.training
    store = inputs.open_store()
    clients = inputs.readable_clients(store)
    if process_rank() == 0:
        for name, value in (("config", e.config), ("overrides", list(e.overrides))):
            with atomic_write(folder / f"{name}.yaml") as file:
                yaml.safe_dump(value, file, sort_keys=False)
        clients.save(folder / "partition.parquet")
        statistics = clients.statistics(inputs.labels)
        write_json(folder / "partition.json", {row["role"]: row for row in statistics.to_dict("records")})
    head = backbone_head(inputs, store)
    torch.manual_seed(derive_seed("method", e.seed))
    method = inputs.new_method(head)
    known = inputs.known_clients
    batches = inputs.batches(store)
    draw_val = partial(_drawn_val, inputs, clients, batches)
    backbone = partial(frozen_backbone, inputs)
    seen = _cloud_clients(inputs) if issubclass(e.method_class, CoTrained) else known
    cloud = CloudView(seen, batches, inputs.num_classes, training.images, draw_val, backbone)
    if Ask.CLIENT_LABELS in e.method_class.asks:
        require_own_labels(known, method.name)

    fit = _Fit(inputs, clients, batches, cloud, head, folder / "checkpoints")
    record: Record = {"epochs": 0, "seconds": 0.0, **method.learn(cloud, fit)}
    wait_for_others()  # they may still read a checkpoint
    if process_rank() > 0:
        return
    write_json(folder / "training.json", record)
    stored = {
        "task": e.dataset_class.task,
        "class_names": inputs.facts.class_names,
        "images": training.images,
        "features": store.path.name,
        "backbone": None if e.dataset_class.vectors else _backbone_facts(inputs),
    }
    if beside := {name: list(shape) for name, shape in inputs.array_shapes.items() if name != "features"}:
        stored["arrays"] = beside
    save_method(folder, method, head, inputs.method_config, stored)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


@dataclass
class _Fit:
    """Trains modules with Lightning; see `iciia_exp.methods.base.Fit`."""

    inputs: Inputs
    clients: Clients
    batches: FeatureBatches
    cloud: CloudView
    head: nn.Linear
    folder: Path
    trained: Counter[str] = field(default_factory=Counter)  # how often each name was trained: each has own checkpoints

    def __call__(
        self,
        module: nn.Module,
        rows: np.ndarray | None = None,
        recipe: Recipe | None = None,
        arrays: Mapping[str, np.ndarray] | None = None,
    ) -> Record:
        recipe = recipe or self.inputs.experiment.training.recipe
        if rows is None:
            record = self._method(module, recipe)
        else:
            cloud = self.cloud.beside(rows, arrays) if arrays else self.cloud
            record = self._classifier(module, rows, recipe, cloud)
        module.to("cpu").eval().requires_grad_(False)
        return record

    def _method(self, method: Any, recipe: Recipe) -> Record:
        """Train a method on the clients of the configuration."""
        from iciia_exp.engine.training.callbacks import configured
        from iciia_exp.engine.training.fit import fit
        from iciia_exp.engine.training.modules import MethodModule

        e = self.inputs.experiment
        return fit(
            MethodModule(method, self.head, recipe, len(self.clients)),
            data_of(self.inputs, self.clients, self.batches, recipe),
            seed=e.seed,
            folder=self.folder,
            trainer_config=e.config["trainer"],
            loggers=self.inputs.tracker.loggers() if process_rank() == 0 else [],
            callbacks=configured(e.config["callbacks"]),
        )

    def _classifier(self, classifier: nn.Module, rows: np.ndarray, recipe: Recipe, cloud: CloudView) -> Record:
        """Train a classifier on single images that the cloud may read."""
        from iciia_exp.engine.training.fit import fit
        from iciia_exp.engine.training.modules import ClassifierModule

        e, name = self.inputs.experiment, type(classifier).__name__.lower()
        self.trained[name] += 1
        if (number := self.trained[name]) > 1:
            name = f"{name}_{number}"
        order: dict[str, Any] = {"rank": process_rank(), "world_size": self.inputs.processes}
        images = Ragged.from_rows([rows])
        sampler = ClientBatchSampler(images, 1, recipe.batch_size, shuffle=True, seed=e.seed, **order)
        record = fit(
            ClassifierModule(classifier, recipe),
            DataLoader(cloud, batch_size=None, sampler=sampler, **e.training.loading),
            seed=derive_seed(name, e.seed),
            folder=self.folder / name,
            trainer_config=e.config["trainer"],
            loggers=[],
        )
        count, seconds = f"{len(rows):,}", record["seconds"]
        log.info("%s: %s over %s images in %.1f s", name, in_epochs(record["epochs"]), count, seconds)
        return record


def _cloud_clients(inputs: Inputs) -> Clients:
    """Return the cloud as the one client whose train images are the backbone's, where it may not read the devices'."""
    none, own = Ragged.empty(1), Ragged.from_rows([inputs.cloud_rows])
    return Clients(np.array(["cloud"], dtype=object), np.array(["cloud"], dtype=object), own, none, none)


def data_of(inputs: Inputs, clients: Clients, batches: FeatureBatches, recipe: Recipe) -> "ClientDataModule":
    """Return the client batches on which a method is trained, validated and tested.

    Args:
        inputs: of the experiment.
        clients, batches: readable clients, and their stored features.
        recipe: for its batch size.
    """
    from iciia_exp.engine.training.data_module import ClientDataModule

    e, training = inputs.experiment, inputs.experiment.training
    return ClientDataModule(
        e.client_mix.known(clients),
        batches,
        training.images,
        training.train_images,
        recipe.batch_size,
        shuffle_images=training.shuffle_images,
        seed=e.seed,
        draw=None if e.client_mix.plain else draw_clients(inputs, clients, "train"),
        train_batches=FeatureBatches(batches.features, batches.labels, out_of_fold(inputs), batches.arrays),
        loading=training.loading,
    )


def _backbone_facts(inputs: Inputs) -> dict[str, Any]:
    """Return the facts from which `Run.load_backbone` builds the backbone."""
    e, spec = inputs.experiment, inputs.experiment.backbone
    classes, weights = spec.classes, spec.weights
    if isinstance(classes, str) and Path(classes).expanduser().is_file():
        classes = known_classes(classes)
    return {
        "name": spec.name,
        "train": spec.train,
        "model": store_config(e.config["backbone"]["model"]),
        "pretrained": spec.pretrained,
        "classes": classes,
        "folder": None if inputs.backbone is None else inputs.backbone.folder.name,
        "weights": None if weights is None else {"file": Path(weights).name, "digest": inputs.weights_digest},
        **({"arguments": more} if (more := inputs.facts.backbone_arguments) else {}),
    }


def report_run(folder: Path, made: bool) -> None:
    """Log the outcome of the training, or that it was done before."""
    if not made:
        log.info("train: %s, made before", folder.name)
        return
    record = read_json(folder / "training.json")
    if not record["epochs"]:
        return
    note = f"train: {in_epochs(record['epochs'])} in {record['seconds']:.1f} s"
    if record["best_epoch"]:
        best, when = 100 * record["val_accuracy"], in_epochs(record["best_epoch"])
        note += f", best val accuracy {best:.1f} % after {when}"
    log.info(note)


def draw_clients(
    inputs: Inputs, clients: Clients, role: str
) -> tuple[Callable[[np.random.Generator], ClientIndex], int]:
    """Return a function that draws an epoch's clients from the images of a role, and the number of its sequences."""
    mix, images = inputs.experiment.client_mix, inputs.experiment.training.train_images
    labels = inputs.labels
    inputs.experiment.named(lambda: mix.check(labels, clients[role], clients.types), "client_mix")
    draw = partial(mix.draw, clients[role], clients.types, labels, images)
    return draw, mix.count(clients[role], images)


def _drawn_val(inputs: Inputs, clients: Clients, batches: FeatureBatches, orders: int = 4) -> Iterator[ClientBatch]:
    """Yield batches of val clients drawn as the training clients, in several orders; none where none has val images."""
    if not len(clients.val.values):
        return
    draw, _ = draw_clients(inputs, clients, "val")
    for order in range(orders):
        rng = generator("calibration", inputs.experiment.seed, order)
        index_CS, client_C = draw(rng)
        for rows in np.array_split(rng.permutation(len(client_C)), -(-len(client_C) // 64)):
            yield batches[ClientIndex(index_CS[rows], client_C[rows])]
